//! Tasks and their results: the two messages between coordinator and worker.
//!
//! Bodies are JSON of at most [`BODY_BYTES_MAX`]; file lists go by path and hash, never by content.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::marker::Generation;
use crate::{Code, Epoch, Error, Pipeline, Result};

/// Largest message body. RabbitMQ and its dead letters stay cheap, and nobody smuggles data.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// The message format this build writes. Another major number is given back, never parked.
pub const FORMAT_MAJOR: u32 = 1;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Folder to raw.
    Ingest,
    /// Raw to main.
    Merge,
    /// Main's small files into large sorted ones.
    Optimize,
    /// Unreferenced files and expired logs.
    Cleanup,
    /// Main back to an earlier point.
    Restore,
    /// A piece of a large ingest, merge or optimize.
    Shard,
}

impl Step {
    /// All steps, in the order of a run; pieces of them last.
    pub const ALL: [Step; 6] =
        [Step::Ingest, Step::Merge, Step::Optimize, Step::Cleanup, Step::Restore, Step::Shard];

    /// The word people read.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Merge => "merge",
            Self::Optimize => "optimize",
            Self::Cleanup => "cleanup",
            Self::Restore => "restore",
            Self::Shard => "shard",
        }
    }
}

/// A point to which main is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreTo {
    /// Only epochs up to this one are applied.
    Epoch(Epoch),
    /// The files of this version of main.
    Version(i64),
}

/// What a task is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "step")]
pub enum Work {
    /// Write the epoch's content into raw.
    Ingest {
        /// The epoch.
        epoch: Epoch,
        /// The content's generation.
        generation: Generation,
        /// The manifest's path below the state folder.
        manifest: String,
        /// SHA-256 of the manifest's bytes.
        manifest_hash: String,
    },
    /// Apply these epochs' content to main, in one commit.
    Merge {
        /// The epochs, ascending.
        epochs: Vec<Epoch>,
    },
    /// Rewrite one bin of main's small files.
    Optimize,
    /// Delete what nothing refers to any more.
    Cleanup,
    /// Take main back, and hold the pipeline.
    Restore {
        /// The point.
        to: RestoreTo,
        /// The request that asks for it: done once, however often it is tried.
        request: String,
    },
    /// Do one piece of a step, for the worker that has the step. The coordinator knows nothing of it.
    Shard {
        /// The step's epochs.
        epochs: Vec<Epoch>,
        /// The step's task.
        of: Uuid,
        /// Who had it when this was asked for. Somebody else has it: nobody waits for the piece.
        lead: String,
        /// The plan, below the state folder.
        plan: String,
        /// Which piece.
        number: u32,
    },
}

impl Work {
    /// The kind of work.
    pub fn step(&self) -> Step {
        match self {
            Self::Ingest { .. } => Step::Ingest,
            Self::Merge { .. } => Step::Merge,
            Self::Optimize => Step::Optimize,
            Self::Cleanup => Step::Cleanup,
            Self::Restore { .. } => Step::Restore,
            Self::Shard { .. } => Step::Shard,
        }
    }

    /// The epochs concerned, ascending.
    pub fn epochs(&self) -> Vec<Epoch> {
        match self {
            Self::Ingest { epoch, .. } => vec![*epoch],
            Self::Merge { epochs } | Self::Shard { epochs, .. } => epochs.clone(),
            Self::Optimize | Self::Cleanup | Self::Restore { .. } => Vec::new(),
        }
    }
}

/// A step of a run (or of maintenance) as a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Message format, major.
    pub format: u32,
    /// Deterministic: the same work has the same id, whoever publishes it and how often.
    pub id: Uuid,
    /// The resolved definition.
    pub pipeline: Pipeline,
    /// What to do.
    pub work: Work,
    /// Counts from 1; retries raise it.
    pub attempt: u32,
    /// When this attempt was published.
    pub published_at: DateTime<Utc>,
}

impl Task {
    /// The id of a piece of work: equal work, equal id. `salt` tells maintenance tasks apart.
    pub fn id_of(pipeline: &str, work: &Work, salt: i64) -> Uuid {
        let name = match work {
            Work::Ingest { epoch, generation, .. } => {
                format!("{pipeline}/ingest/{epoch}/{generation}")
            }
            Work::Merge { epochs } => {
                let list: Vec<String> = epochs.iter().map(Epoch::to_string).collect();
                format!("{pipeline}/merge/{}/{salt}", list.join(","))
            }
            Work::Optimize => format!("{pipeline}/optimize/{salt}"),
            Work::Cleanup => format!("{pipeline}/cleanup/{salt}"),
            Work::Restore { request, .. } => format!("{pipeline}/restore/{request}"),
            Work::Shard { plan, number, .. } => format!("{plan}/{number}"),
        };
        Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes())
    }
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// The effect is in the table (now or before).
    Done(Box<Report>),
    /// It is not, or not known to be; the error's class says what follows.
    Failed(Error),
}

/// Facts about a finished task. Zero where a step has nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The table held the effect already: nothing was written.
    pub already: bool,
    /// Generation by epoch, as the markers have it now.
    pub generations: Vec<(Epoch, Generation)>,
    /// Epochs among them whose content is empty by request.
    pub empty: Vec<Epoch>,
    /// Raw's version with the effect.
    pub raw_version: Option<i64>,
    /// Main's version with the effect.
    pub main_version: Option<i64>,
    /// Rows in the data files, or winners given to the merge.
    pub rows_read: u64,
    /// Rows written to the step's table.
    pub rows_written: u64,
    /// Rows refused.
    pub rows_quarantined: u64,
    /// Rows that `select` left out.
    #[serde(default)]
    pub rows_filtered: u64,
    /// Columns of the files that did not enter the table.
    #[serde(default)]
    pub columns_left_out: Vec<String>,
    /// Rows for which each expectation did not hold, in the order of the configuration.
    #[serde(default)]
    pub expectations: Vec<(String, u64)>,
    /// Rows whose key occurs again later in the epoch.
    pub rows_superseded: u64,
    /// Rows that main gained.
    pub rows_inserted: u64,
    /// Rows of main with new values.
    pub rows_updated: u64,
    /// Rows that main lost.
    pub rows_deleted: u64,
    /// Data files added.
    pub files_added: u64,
    /// Data files removed (from the table, or from storage by cleanup).
    pub files_removed: u64,
    /// Bytes of the files added.
    pub bytes_written: u64,
    /// The merge could not take the fast path.
    pub reconciled: bool,
    /// Main after a merge or optimize.
    #[serde(flatten)]
    pub main: MainFiles,
    /// Commits that lost a race before this one won.
    pub conflicts: u64,
    /// Main is held: nothing was done.
    #[serde(default)]
    pub held: bool,
    /// Pieces that it was done in; 0: in one.
    #[serde(default)]
    pub pieces: u64,
    /// Epochs that a restore took out of main; they merge again after `resume`.
    #[serde(default)]
    pub taken_out: Vec<Epoch>,
}

/// Main's data files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainFiles {
    /// How many there are.
    pub main_files: u64,
    /// Those of them that gain by being written anew.
    pub main_small_files: u64,
    /// What a read costs, in percent of what it costs when all are new: an estimate.
    #[serde(default)]
    pub main_read_cost: u32,
}

/// A worker's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskResult {
    /// The task's id.
    pub task: Uuid,
    /// The pipeline's id.
    pub pipeline: String,
    /// What was to be done.
    pub work: Work,
    /// Which attempt this was.
    pub attempt: u32,
    /// Who made it.
    pub worker: String,
    /// Workers that died at the task, as far as is known.
    #[serde(default)]
    pub deaths: u32,
    /// When the task was published.
    pub published_at: DateTime<Utc>,
    /// When work began.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: DateTime<Utc>,
    /// The trace context of the attempt.
    #[serde(default)]
    pub trace: Option<String>,
    /// How it ended.
    pub verdict: Verdict,
}

/// A message with results: all that ended while the message before was on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskResults {
    /// Message format, major.
    pub format: u32,
    /// At least one.
    pub results: Vec<TaskResult>,
}

/// Writes a message body.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(message).map_err(Error::internal)?;
    if body.len() > BODY_BYTES_MAX {
        let text = format!("a message of {} bytes; the limit is {BODY_BYTES_MAX}", body.len());
        return Err(Error::new(Code::QueueFailed, text));
    }
    Ok(body)
}

/// Another version wrote the body, and will understand it. Else it is garbage.
pub fn is_of_another_version(body: &[u8]) -> bool {
    let found = serde_json::from_slice::<serde_json::Value>(body).ok();
    let format = found.and_then(|found| found["format"].as_u64());
    format.is_some_and(|format| format != u64::from(FORMAT_MAJOR))
}

/// Reads a message body of a known format.
pub fn decode<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Envelope {
        format: u32,
    }
    let unknown = |text: String| Error::new(Code::MessageUnknown, text);
    let envelope: Envelope = serde_json::from_slice(body).map_err(|e| unknown(e.to_string()))?;
    if envelope.format != FORMAT_MAJOR {
        let text = format!("message format {}; this build knows {FORMAT_MAJOR}", envelope.format);
        return Err(unknown(text));
    }
    serde_json::from_slice(body).map_err(|e| unknown(e.to_string()))
}
