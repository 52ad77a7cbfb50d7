//! Does one task and proves it.
//!
//! Owns: the worker's loop ([`slots`]), and the steps as functions of a task and its tables:
//! [`ingest`], [`merge`], [`optimize`], [`cleanup`], [`restore`].
//! Never: lists a source, decides order, retries a task, writes the ledger, or knows a coordinator.

mod answers;
pub mod as_of;
pub mod aside;
mod calendar;
mod checks;
pub mod cleanup;
mod columns;
mod compact;
mod curve;
mod edit;
mod feed;
mod folding;
mod gates;
mod ground;
pub mod incoming;
pub mod ingest;
mod keeper;
pub mod lineage;
pub mod merge;
pub mod meter;
pub mod optimize;
mod ordered;
pub mod points;
pub mod quarantine;
pub mod raw;
mod raw_commit;
pub mod refusals;
pub mod restore;
mod reverts;
pub mod rowwise;
mod search;
pub mod selecting;
mod shards;
pub mod slots;
mod slowly;
mod sorted;
mod sorter;
pub mod source;
pub mod tables;
pub mod typing;
mod unchanged;
mod widening;
pub mod winners;

pub use shards::Team;

use std::sync::Arc;

use alluvium_protocol::clock::ClockRef;
use alluvium_protocol::task::{Report, Task, Work};
use alluvium_protocol::{Code, Error, Result};
use tokio_util::sync::CancellationToken;

/// What every step may use.
#[derive(Clone)]
pub struct Workshop {
    /// The time.
    pub clock: ClockRef,
    /// Tables in use by this process: snapshots are brought forward, not loaded anew.
    pub tables: Arc<tables::Tables>,
}

/// Says at safe points whether the task may go on.
#[derive(Clone)]
pub struct Permit {
    /// The process stops.
    pub stopping: CancellationToken,
    /// The lease went to somebody else.
    pub lease_lost: CancellationToken,
    /// How far it is.
    pub meter: Arc<meter::Meter>,
    /// Others, who may do pieces of the work.
    pub team: Option<Team>,
}

impl Permit {
    /// A permit that nobody takes back.
    pub fn unlimited() -> Self {
        let (stopping, lease_lost) = (CancellationToken::new(), CancellationToken::new());
        Self { stopping, lease_lost, meter: Arc::default(), team: None }
    }

    /// Err at a safe point: stop here, nothing is half-written.
    pub fn check(&self) -> Result<()> {
        if self.lease_lost.is_cancelled() {
            return Err(Error::new(Code::LeaseLost, "another worker has the task now"));
        }
        if self.stopping.is_cancelled() {
            return Err(Error::new(Code::Stopping, "the process is being stopped"));
        }
        Ok(())
    }
}

impl Workshop {
    /// Does the task's work. Running it again, or twice at once, changes nothing more.
    pub async fn execute(&self, task: &Task, permit: &Permit) -> Result<Report> {
        permit.check()?;
        match &task.work {
            Work::Ingest { epoch, generation, manifest, manifest_hash } => {
                let wanted = ingest::Wanted {
                    epoch: *epoch,
                    generation: *generation,
                    manifest,
                    manifest_hash,
                };
                ingest::ingest(self, task, &wanted, permit).await
            }
            Work::Merge { epochs } => merge::merge(self, task, epochs, permit).await,
            Work::Optimize => optimize::optimize(self, task, permit).await,
            Work::Cleanup => cleanup::cleanup(self, task, permit).await,
            Work::Restore { to, request } => {
                restore::restore(self, task, *to, request, permit).await
            }
            Work::Shard { of, lead, plan, number, .. } => {
                let lead = (*of, lead.as_str());
                shards::help(self, task, lead, (plan, *number), permit).await
            }
        }
    }
}
