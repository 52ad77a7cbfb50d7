//! Facts for people who watch a run, told after they are durable.

use alluvium_protocol::task::{Report, Step};
use alluvium_protocol::{Epoch, Error};

/// One fact.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A discovery ended.
    Discovered {
        /// The pipeline.
        pipeline: String,
        /// Epochs that wait for work.
        waiting: usize,
        /// Epochs in all.
        known: usize,
    },
    /// Raw holds an epoch.
    EpochIngested {
        /// The pipeline.
        pipeline: String,
        /// The epoch.
        epoch: Epoch,
        /// Counts.
        report: Box<Report>,
    },
    /// Main has epochs applied.
    EpochsMerged {
        /// The pipeline.
        pipeline: String,
        /// The epochs.
        epochs: Vec<Epoch>,
        /// Those of them that came after a higher one.
        late: Vec<Epoch>,
        /// Counts.
        report: Box<Report>,
    },
    /// Main was taken back to an earlier point.
    RolledBack {
        /// The pipeline.
        pipeline: String,
        /// Epochs that merge again after `resume`.
        epochs: Vec<Epoch>,
    },
    /// Maintenance ended.
    Maintained {
        /// The pipeline.
        pipeline: String,
        /// Optimize or cleanup.
        step: Step,
        /// Counts.
        report: Box<Report>,
    },
    /// An attempt failed and is made again.
    Retrying {
        /// The pipeline.
        pipeline: String,
        /// The step.
        step: Step,
        /// Its epochs.
        epochs: Vec<Epoch>,
        /// Why.
        error: Error,
    },
    /// An epoch stopped until somebody helps.
    EpochBlocked {
        /// The pipeline.
        pipeline: String,
        /// The epoch.
        epoch: Epoch,
        /// The step.
        step: Step,
        /// Why.
        error: Error,
    },
    /// A folder is not complete.
    EpochWaits {
        /// The pipeline.
        pipeline: String,
        /// The epoch.
        epoch: Epoch,
        /// Why.
        why: String,
    },
    /// Something a person should look at, although work goes on.
    Warning {
        /// The pipeline.
        pipeline: String,
        /// A sentence.
        text: String,
    },
}
