//! The queue seam: task and result messages, at least once.
//!
//! # The contract
//! - `publish` that returned Ok: the message is delivered at least once, also after a restart of
//!   what stands behind the seam (the in-process twin lives and dies with its process: there,
//!   markers and the next listing make up for it). On Err the outcome is unknown: publish again.
//! - A delivery stays invisible until it is acknowledged, given back or dropped. Dropping it without
//!   a word (a crash, a lost connection) makes it visible again, marked as redelivered.
//! - Order is not promised. Nobody derives the order of steps from it.

pub mod memory;

#[cfg(any(test, feature = "contract"))]
pub mod contract;

use async_trait::async_trait;

use crate::Result;

/// The named lanes that messages wait in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Ingest tasks.
    Ingest,
    /// Merge tasks.
    Merge,
    /// Optimize and cleanup tasks.
    Maintenance,
    /// Results of all tasks.
    Results,
}

impl Lane {
    /// The lanes of tasks.
    pub const TASKS: [Lane; 3] = [Lane::Ingest, Lane::Merge, Lane::Maintenance];
}

/// Where messages go in and come out.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Puts a message into a lane. Ok: it will be delivered. A body above
    /// [`BODY_BYTES_MAX`](crate::task::BODY_BYTES_MAX) is refused.
    async fn publish(&self, lane: Lane, body: Vec<u8>) -> Result<()>;

    /// Waits for the next message of any of these lanes. `None`: the queue was closed, and nothing
    /// more comes. Cancelling the wait loses nothing.
    async fn receive(&self, lanes: &[Lane]) -> Result<Option<Delivery>>;

    /// Closes the queue: waiting receivers get `None`.
    fn close(&self);
}

/// One message in hand.
pub struct Delivery {
    /// The message.
    pub body: Vec<u8>,
    /// It was delivered before: a holder may have died, or may still be at work.
    pub redelivered: bool,
    settle: Option<Box<dyn Settle>>,
}

/// How a backend settles a delivery; each verb consumes it. Dropping it settles nothing.
#[async_trait]
pub trait Settle: Send {
    /// Removes the message for good.
    async fn ack(self: Box<Self>) -> Result<()>;
    /// Delivers it again later, not marked as redelivered: nobody worked on it.
    async fn give_back(self: Box<Self>) -> Result<()>;
}

impl Delivery {
    /// A delivery that `settle` settles.
    pub fn new(body: Vec<u8>, redelivered: bool, settle: Box<dyn Settle>) -> Self {
        Self { body, redelivered, settle: Some(settle) }
    }

    /// Removes the message for good. Call it last: every step before it can be repeated.
    pub async fn ack(mut self) -> Result<()> {
        match self.settle.take() {
            Some(settle) => settle.ack().await,
            None => Ok(()),
        }
    }

    /// Puts the message back for somebody else, later.
    pub async fn give_back(mut self) -> Result<()> {
        match self.settle.take() {
            Some(settle) => settle.give_back().await,
            None => Ok(()),
        }
    }
}
