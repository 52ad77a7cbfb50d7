//! What a process says about itself every few seconds, for people; nothing is decided from it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Epoch;
use crate::task::Step;

/// A living process of the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Unique among living processes.
    pub name: String,
    /// `worker` or `coordinator`.
    pub role: String,
    /// The machine.
    pub host: String,
    /// The process on it.
    pub process: u32,
    /// Alluvium's version.
    pub version: String,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it said this.
    pub at: DateTime<Utc>,
    /// Tasks that it can have in hand.
    pub slots: usize,
    /// It takes no new tasks, and why.
    pub resting: Option<String>,
    /// Tasks that it has in hand.
    pub tasks: Vec<InHand>,
    /// Share of one processor that it uses, 1.0 for a whole one.
    pub cpu: f64,
    /// Memory that it uses, bytes.
    pub memory_bytes: u64,
    /// Disk for spilling that is free, bytes.
    pub disk_free_bytes: u64,
}

/// A task in hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InHand {
    /// The task's id.
    pub task: Uuid,
    /// The pipeline.
    pub pipeline: String,
    /// The step.
    pub step: Step,
    /// Its epochs.
    pub epochs: Vec<Epoch>,
    /// Since when.
    pub since: DateTime<Utc>,
    /// How far it is.
    #[serde(default)]
    pub progress: Progress,
}

/// How far the part of a task's work is that is being done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, in words; empty: nothing is known.
    pub doing: String,
    /// So much of it is done.
    pub done: Amount,
    /// So much it is in all; 0 where that is not known.
    pub of: Amount,
}

/// An amount of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Rows.
    pub rows: u64,
    /// Bytes.
    pub bytes: u64,
    /// Files.
    pub files: u64,
}

impl Amount {
    /// So many rows.
    pub fn rows(rows: u64) -> Self {
        Self { rows, ..Self::default() }
    }
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, more: Self) {
        self.rows += more.rows;
        self.bytes += more.bytes;
        self.files += more.files;
    }
}

impl Progress {
    /// The share that is done, 0 to 1, by rows if their number is known, else by bytes or files.
    pub fn share(&self) -> Option<f64> {
        let pairs = [
            (self.done.rows, self.of.rows),
            (self.done.bytes, self.of.bytes),
            (self.done.files, self.of.files),
        ];
        let (done, of) = pairs.into_iter().find(|(_, of)| *of > 0)?;
        Some((done as f64 / of as f64).min(1.0))
    }
}

impl std::fmt::Display for Progress {
    /// `looks for keys: 45 % (2250000 of 5000000 rows)`; empty where nothing is known.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.doing)?;
        if let Some(share) = self.share() {
            write!(f, ": {:.0} %", share * 100.0)?;
        }
        let amounts = [
            (self.done.rows, self.of.rows, 1, "rows"),
            (self.done.bytes, self.of.bytes, 1 << 20, "MiB"),
            (self.done.files, self.of.files, 1, "files"),
        ];
        let amounts = amounts.into_iter().filter(|(done, of, unit, _)| done.max(of) / unit > 0);
        let amounts = amounts.map(|(done, of, unit, name)| match of {
            0 => format!("{} {name}", done / unit),
            of => format!("{} of {} {name}", done / unit, of / unit),
        });
        let amounts: Vec<String> = amounts.collect();
        if amounts.is_empty() { Ok(()) } else { write!(f, " ({})", amounts.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_aloud() {
        let mut progress = Progress::default();
        assert_eq!(progress.to_string(), "");
        progress.doing = "looks for keys".to_owned();
        progress.of.rows = 5_000_000;
        progress.done += Amount::rows(2_250_000);
        assert_eq!(progress.to_string(), "looks for keys: 45 % (2250000 of 5000000 rows)");
        progress = Progress { doing: "reads".to_owned(), ..progress };
        progress.of = Amount { rows: 0, bytes: 3 << 20, files: 3 };
        progress.done = Amount { rows: 10, bytes: 1 << 20, files: 1 };
        assert_eq!(progress.to_string(), "reads: 33 % (10 rows, 1 of 3 MiB, 1 of 3 files)");
        // A file that grew while it was read.
        progress.done.bytes = 9 << 20;
        assert_eq!(progress.share(), Some(1.0));
    }
}
