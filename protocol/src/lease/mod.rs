//! The lease seam: who works on a task now. It saves work and proves nothing; markers prove.
//!
//! # The contract
//! - At most one holder at a time *believes* it holds a task, as far as clocks and pauses allow.
//! - Each claim that succeeds gets a larger fence than every earlier one for the task, until the
//!   backend loses its memory.
//! - A claim by the present owner extends its lease and keeps its fence: a claim whose reply was
//!   lost can be repeated.
//! - A redelivered task takes the lease over: the broker says that the old holder is gone. The old
//!   holder learns it at its next renewal.
//! - A take-over counts as a death of the task's worker, until that worker says that it lives
//!   ([`Leases::survived`]) or the task ends ([`Leases::release`]).

pub mod memory;
pub mod redis;

#[cfg(any(test, feature = "contract"))]
pub mod contract;

use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::Result;

/// How a claim ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The task is ours.
    Held {
        /// Grows with every new holder.
        fence: u64,
        /// Workers that died at this task since it last ended, as far as is known.
        deaths: u32,
    },
    /// Somebody else works on it.
    Taken {
        /// Who.
        owner: String,
        /// How long its lease still runs.
        remaining: Duration,
    },
}

/// Who works on which task.
#[async_trait]
pub trait Leases: Send + Sync {
    /// Claims a task for `ttl`. With `take_over` a living lease of another owner falls to us.
    async fn claim(&self, task: Uuid, owner: &str, ttl: Duration, take_over: bool)
    -> Result<Claim>;

    /// Extends our lease to `ttl` from now. `false`: it is no longer ours; stop at the next safe
    /// point.
    async fn renew(&self, task: Uuid, owner: &str, fence: u64, ttl: Duration) -> Result<bool>;

    /// Says that the worker whose lease was taken over is alive: its connection died, not it.
    async fn survived(&self, task: Uuid) -> Result<()>;

    /// Who holds a task's lease now.
    async fn holder(&self, task: Uuid) -> Result<Option<String>>;

    /// Gives the lease up: the task ended. Not ours any more: nothing happens.
    async fn release(&self, task: Uuid, owner: &str, fence: u64) -> Result<()>;
}
