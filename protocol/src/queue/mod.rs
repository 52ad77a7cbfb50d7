//! The queue seam: task and result messages, at least once.
//!
//! # The contract
//! - `publish` that returned Ok: the message is delivered at least once, also after a restart of
//!   what stands behind the seam (the in-process twin lives and dies with its process: there,
//!   markers and the next listing make up for it). On Err the outcome is unknown: publish again.
//! - A delivery stays invisible until it is acknowledged, given back or dropped. Dropping it without
//!   a word (a crash, a lost connection) makes it visible again, marked as redelivered.
//! - A delivery may come again while its holder is still at work, when the connection between them
//!   and the queue was lost. Acknowledging the lost one then does nothing, and is not an error.
//! - Order is not promised. Nobody derives the order of steps from it.

pub mod memory;
pub mod rabbit;

#[cfg(any(test, feature = "contract"))]
pub mod contract;

use async_trait::async_trait;

use crate::Result;
use crate::task::Step;

/// The named lanes that messages wait in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Ingest tasks.
    Ingest,
    /// Merge tasks.
    Merge,
    /// Optimize and cleanup tasks.
    Maintenance,
    /// Pieces of large steps, published by the workers that have them.
    Shard,
    /// Results of all tasks.
    Results,
}

impl Lane {
    /// The lanes of tasks.
    pub const TASKS: [Lane; 4] = [Lane::Ingest, Lane::Merge, Lane::Maintenance, Lane::Shard];

    /// All lanes.
    pub const ALL: [Lane; 5] =
        [Lane::Ingest, Lane::Merge, Lane::Maintenance, Lane::Shard, Lane::Results];

    /// Where the tasks of a step wait.
    pub fn of(step: Step) -> Self {
        match step {
            Step::Ingest => Self::Ingest,
            Step::Merge | Step::Restore => Self::Merge,
            Step::Optimize | Step::Cleanup => Self::Maintenance,
            Step::Shard => Self::Shard,
        }
    }

    /// The word people read.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Merge => "merge",
            Self::Maintenance => "maintenance",
            Self::Shard => "shard",
            Self::Results => "results",
        }
    }
}

/// A message on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The same for every copy of the same message.
    pub id: String,
    /// At most [`BODY_BYTES_MAX`](crate::task::BODY_BYTES_MAX) bytes.
    pub body: Vec<u8>,
    /// The W3C `traceparent` of who made it.
    pub trace: Option<String>,
}

impl Message {
    /// A message without a trace.
    pub fn new(id: impl Into<String>, body: Vec<u8>) -> Self {
        Self { id: id.into(), body, trace: None }
    }
}

/// Where messages go in and come out.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Puts a message into a lane. Ok: it will be delivered. A body above
    /// [`BODY_BYTES_MAX`](crate::task::BODY_BYTES_MAX) is refused.
    async fn publish(&self, lane: Lane, message: Message) -> Result<()>;

    /// Takes part in these lanes, with at most `ahead` messages of a lane in hand at a time.
    fn subscribe(&self, lanes: &[Lane], ahead: u16) -> Box<dyn Subscription>;

    /// Messages of a lane that nobody has in hand.
    async fn waiting(&self, lane: Lane) -> Result<usize>;

    /// Closes the queue: subscribers get `None`.
    fn close(&self);
}

/// One consumer. Dropping it gives what it had not handed out back to the others.
#[async_trait]
pub trait Subscription: Send {
    /// Waits for the next message. `None`: the queue was closed, and nothing more comes. Cancelling
    /// the wait loses nothing.
    async fn next(&mut self) -> Option<Delivery>;
}

/// One message in hand.
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// It was delivered before: a holder may have died, or may still be at work.
    pub redelivered: bool,
    /// How often it was delivered before, as far as the queue counts.
    pub returns: u32,
    settle: Option<Box<dyn Settle>>,
}

/// How a backend settles a delivery; each verb consumes it. Dropping it settles nothing.
#[async_trait]
pub trait Settle: Send {
    /// Removes the message for good.
    async fn ack(self: Box<Self>) -> Result<()>;
    /// Removes it from its lane for a person to look at: nobody will ever understand it.
    async fn set_aside(self: Box<Self>) -> Result<()>;
    /// Delivers it again after a pause, not marked as redelivered: nobody worked on it.
    async fn give_back(self: Box<Self>) -> Result<()>;
}

impl Delivery {
    /// A delivery that `settle` settles.
    pub fn new(message: Message, redelivered: bool, returns: u32, settle: Box<dyn Settle>) -> Self {
        Self { message, redelivered, returns, settle: Some(settle) }
    }

    /// Removes the message for good. Call it last: every step before it can be repeated.
    pub async fn ack(mut self) -> Result<()> {
        match self.settle.take() {
            Some(settle) => settle.ack().await,
            None => Ok(()),
        }
    }

    /// Sets the message aside for a person: no version will understand it.
    pub async fn set_aside(mut self) -> Result<()> {
        match self.settle.take() {
            Some(settle) => settle.set_aside().await,
            None => Ok(()),
        }
    }

    /// Puts the message back for somebody else, after a pause.
    pub async fn give_back(mut self) -> Result<()> {
        match self.settle.take() {
            Some(settle) => settle.give_back().await,
            None => Ok(()),
        }
    }
}

/// Refuses a body that is too large, for every backend.
pub(crate) fn check_size(message: &Message) -> Result<()> {
    use crate::task::BODY_BYTES_MAX;
    if message.body.len() <= BODY_BYTES_MAX {
        return Ok(());
    }
    let text = format!("a body of {} bytes; the limit is {BODY_BYTES_MAX}", message.body.len());
    Err(crate::Error::new(crate::Code::QueueFailed, text))
}
