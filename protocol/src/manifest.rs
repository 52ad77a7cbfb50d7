//! The manifest: the pinned list of an epoch's objects at one generation.
//!
//! It is stored once, with If-None-Match, before any task is published; storing it is what allocates
//! the generation. An ingest reads exactly what it lists.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::Epoch;
use crate::marker::Generation;

/// Why this content was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The folder became complete.
    Arrival,
    /// The folder changed before it was read.
    Changed,
    /// A person asked to read the folder again.
    Replay,
    /// A person asked to take the epoch's content back.
    Undo,
    /// A person asked to leave the epoch out.
    Skip,
}

impl Reason {
    /// The content is empty by request.
    pub fn is_empty_content(self) -> bool {
        matches!(self, Self::Undo | Self::Skip)
    }

    /// The word people read.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Arrival => "arrival",
            Self::Changed => "changed",
            Self::Replay => "replay",
            Self::Undo => "undo",
            Self::Skip => "skip",
        }
    }
}

/// One data file, as it was when it was listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Path within the folder, with `/`; this is raw's `_file`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The store's entity tag; reads demand it.
    pub etag: Option<String>,
    /// When the store last changed it.
    pub modified: DateTime<Utc>,
}

/// The pinned list of an epoch's objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The pipeline's id.
    pub pipeline: String,
    /// The epoch.
    pub epoch: Epoch,
    /// Which content of the epoch this is.
    pub generation: Generation,
    /// The folder's name below the source, as it is spelt.
    pub folder: String,
    /// Why this content was asked for.
    pub reason: Reason,
    /// The request that asked for it, so that a request carried out twice counts once.
    pub request: Option<String>,
    /// When it was pinned.
    pub pinned_at: DateTime<Utc>,
    /// The data files, by name.
    pub objects: Vec<Object>,
    /// Rows that somebody corrected, by file and position: what is to be read there instead.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub repairs: Repairs,
}

/// Corrected rows by file and position: the text of a JSON object, whose numbers stay as they were
/// written; `None` takes a correction back.
pub type Repairs = BTreeMap<String, BTreeMap<i64, Option<String>>>;

impl Manifest {
    /// Bytes of all data files.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.size).sum()
    }

    /// The manifest's path below the state folder.
    pub fn path(pipeline: &str, epoch: Epoch, generation: Generation) -> String {
        format!("manifests/{pipeline}/{epoch}-{generation}.json")
    }

    /// Reads epoch and generation from the last part of a manifest's path.
    pub fn parse_name(name: &str) -> Option<(Epoch, Generation)> {
        let (epoch, generation) = name.strip_suffix(".json")?.split_once('-')?;
        Some((epoch.parse().ok()?, generation.parse().ok()?))
    }
}
