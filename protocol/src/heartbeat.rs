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
}
