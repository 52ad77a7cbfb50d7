//! How far a task's work is, for people: nothing is decided from it.

use std::sync::{Mutex, PoisonError};

use alluvium_protocol::Result;
use alluvium_protocol::heartbeat::{Amount, Progress};
use alluvium_table::arrow::array::RecordBatch;

use crate::Permit;

/// What a task does now, and how much of it is done.
#[derive(Debug, Default)]
pub struct Meter(Mutex<Progress>);

impl Meter {
    /// As it is now.
    pub fn progress(&self) -> Progress {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Permit {
    /// A part of the work begins; `of`: how much it is, as far as that is known.
    pub(crate) fn begin(&self, doing: &str, of: Amount) {
        let doing = doing.to_owned();
        self.meter.change(|progress| *progress = Progress { doing, done: Amount::default(), of });
    }

    /// A safe point, like [`Permit::check`], after so much more was done.
    pub(crate) fn done(&self, more: Amount) -> Result<()> {
        self.meter.change(|progress| progress.done += more);
        self.check()
    }

    /// The same where parts take turns: this one is as far as this.
    pub(crate) fn reached(&self, doing: &str, rows: u64, of: u64) -> Result<()> {
        let (done, of, doing) = (Amount::rows(rows), Amount::rows(of), doing.to_owned());
        self.meter.change(|progress| *progress = Progress { doing, done, of });
        self.check()
    }

    /// The same with a batch of rows that is passed on.
    pub(crate) fn counted(&self, batch: Result<RecordBatch>) -> Result<RecordBatch> {
        let batch = batch?;
        self.done(Amount::rows(batch.num_rows() as u64))?;
        Ok(batch)
    }
}
