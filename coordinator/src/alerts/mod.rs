//! Alerts: one for each incident, one more when it grows, one when it is over.
//!
//! ```text
//!  book, surroundings ─► conditions (what is wrong now) ─► incidents (open, grown, over)
//!                                                              │ stored with the outbox, one write
//!  sinks ◄── outbox: sent until it is taken, after a crash with the same id ◄──┘
//! ```
//! An incident is a kind of trouble of one pipeline; its subjects (epochs, workers) come and go within
//! it. Five hundred failures of one epoch are one incident.

pub mod conditions;
pub mod incidents;
pub mod keeper;
mod render;
pub mod sinks;

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

macro_rules! kinds {
    ($($variant:ident = $word:literal, $severity:ident, $title:literal;)*) => {
        /// A kind of trouble.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Kind {
            $(#[doc = $title] $variant,)*
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word in configurations and messages.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// How bad it is.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)* }
            }

            /// A few words for people.
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }
        }
    };
}

kinds! {
    Blocked = "blocked", Critical, "epochs are blocked";
    Poison = "poison", Critical, "epochs are parked: their workers die";
    LateBlocked = "late_blocked", Critical, "a late epoch cannot go in";
    Broken = "broken", Critical, "source or tables cannot be used";
    Maintenance = "maintenance", Warning, "optimize or cleanup keeps failing";
    Quarantine = "quarantine", Warning, "many rows are refused";
    FolderChanged = "folder_changed", Warning, "folders changed after they were read";
    FolderIncomplete = "folder_incomplete", Warning, "folders do not become complete";
    NothingArrived = "nothing_arrived", Warning, "nothing arrived";
    Lag = "lag", Critical, "epochs wait too long";
    NoWorkers = "no_workers", Critical, "no worker is alive";
    DeadLetters = "dead_letters", Warning, "messages that nobody understands";
    LowDisk = "low_disk", Warning, "disks run full";
    Hook = "hook", Warning, "the hook after a merge fails";
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Somebody should look today.
    Warning,
    /// Data does not go on.
    Critical,
}

impl Severity {
    /// The word, as PagerDuty has it, too.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// Which incident: its kind and its pipeline (empty: the whole cluster).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The kind of trouble.
    pub kind: Kind,
    /// The pipeline's id, or empty.
    pub pipeline: String,
}

/// Something that is wrong now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which incident it belongs to.
    pub key: Key,
    /// What it concerns (an epoch, a worker), and a sentence about it.
    pub subjects: BTreeMap<String, String>,
    /// What to type next.
    pub help: String,
}

/// What a look found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// What is wrong.
    pub conditions: Vec<Condition>,
    /// What could not be judged: incidents of these keys stay as they are.
    pub unknown: Vec<Key>,
}

/// An open incident.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    /// Its id, in every message about it.
    pub id: String,
    /// The kind of trouble.
    pub kind: Kind,
    /// The pipeline, or empty.
    pub pipeline: String,
    /// When it began.
    pub opened_at: DateTime<Utc>,
    /// When people were told last.
    pub told_at: DateTime<Utc>,
    /// What it concerns, and a sentence about each.
    pub subjects: BTreeMap<String, String>,
    /// Subjects that people were told of.
    pub told: Vec<String>,
    /// What to type next.
    pub help: String,
}

/// What happened to an incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It began.
    Opened,
    /// It concerns more.
    Grew,
    /// It is over.
    Resolved,
    /// Somebody tries the sink.
    Test,
}

impl Change {
    /// The word in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Grew => "grew",
            Self::Resolved => "resolved",
            Self::Test => "test",
        }
    }
}

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unique; the same when it is sent again.
    pub id: String,
    /// What happened.
    pub change: Change,
    /// When.
    pub at: DateTime<Utc>,
    /// The incident, as it is now.
    pub incident: Incident,
}

impl Event {
    /// One line for people.
    pub fn title(&self) -> String {
        let Incident { kind, pipeline, .. } = &self.incident;
        let of = if pipeline.is_empty() { "alluvium" } else { pipeline };
        match self.change {
            Change::Resolved => format!("{of}: over: {}", kind.title()),
            Change::Test => format!("{of}: this is a test of an alert; nothing is wrong"),
            Change::Opened | Change::Grew => format!("{of}: {}", kind.title()),
        }
    }
}
