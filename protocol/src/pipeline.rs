//! The resolved definition of a pipeline, as every task carries it. It holds no secret.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// In which order epochs enter main.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Epoch n+1 merges after n.
    Sequential,
    /// Epochs merge as they are ready.
    Arrival,
}

/// What a blocked epoch does to later ones of its pipeline, in sequential order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBlock {
    /// Later merges wait.
    Stop,
    /// Later merges go on; the blocked epoch is reconciled when it is repaired.
    Continue,
}

/// When a folder counts as complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// A file with this name is in the folder.
    Marker(String),
    /// A JSON file with this name lists the data files.
    Manifest(String),
    /// Two listings at least this far apart are equal.
    Quiet(Duration),
}

/// What becomes of rows, or of their epoch, that are not as they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// They are counted.
    Warn,
    /// They are refused, and kept in quarantine.
    Quarantine,
    /// The epoch is blocked, and no table is touched.
    Fail,
}

/// What must be true of every row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expectation {
    /// Unique in its pipeline.
    pub name: String,
    /// SQL over the incoming row; a row for which it is false or NULL fails.
    pub sql: String,
    /// What becomes of such rows.
    pub action: Action,
}

/// What becomes of rows of an epoch whose key occurs again later in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDuplicate {
    /// They stay in raw; the last row decides.
    #[default]
    Last,
    /// They are refused; the last row decides.
    Quarantine,
    /// The epoch is blocked.
    Fail,
}

/// What becomes of a row or a file that cannot be taken as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBad {
    /// The epoch is blocked, and nothing of it lands.
    #[default]
    Fail,
    /// It goes to quarantine; the rest lands.
    Quarantine,
}

/// How the data files are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Parquet files.
    #[default]
    Parquet,
    /// The folder is a Delta table.
    Delta,
    /// Text with separated fields.
    Csv(Csv),
    /// A JSON object on each line.
    Json,
}

impl Format {
    /// The word of the configuration.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Delta => "delta",
            Self::Csv(_) => "csv",
            Self::Json => "json",
        }
    }

    /// Values come as text, and get their types here.
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Csv(_) | Self::Json)
    }
}

/// How CSV files are written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Csv {
    /// Between two fields.
    pub delimiter: u8,
    /// The first line names the columns.
    pub header: bool,
    /// The text that means NULL.
    pub null: String,
}

/// What main is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The current row of each key.
    #[default]
    Upsert,
    /// Every row of every epoch.
    Append,
    /// The rows of the highest epoch.
    Snapshot,
    /// Every version of each key, with the epochs in which it was valid.
    Scd2,
}

impl Mode {
    /// The word of the configuration and of the tables' property.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Upsert => "upsert",
            Self::Append => "append",
            Self::Snapshot => "snapshot",
            Self::Scd2 => "scd2",
        }
    }
}

/// A column that the configuration declares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Its type, in the words of the configuration: `long`, `decimal(12,2)`, `array<string>`.
    pub kind: String,
}

/// Bounds that an epoch must keep to enter the tables. Shares in hundredths of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gates {
    /// Fewest rows, as a share of what earlier epochs had.
    pub rows_min: Option<u64>,
    /// Most rows, as a share of what earlier epochs had.
    pub rows_max: Option<u64>,
    /// Most refused rows, as a share of the epoch's.
    pub refused_max: Option<u64>,
}

/// What becomes of a column that the tables do not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewColumns {
    /// It is added to them.
    #[default]
    Evolve,
    /// It is left out, and named.
    Freeze,
    /// The epoch is blocked.
    Fail,
}

/// What a row of an incoming file is named after.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Columns that identify a row. All of them; order matters for sorting only.
    pub key: Vec<String>,
    /// Orders rows of one key within an epoch, before file and row.
    pub sequence_by: Option<String>,
    /// SQL over the incoming row: true makes it a delete.
    pub delete_when: Option<String>,
    /// What becomes of columns that the tables do not have.
    #[serde(default)]
    pub new_columns: NewColumns,
    /// Columns that stay in raw.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// What must be true of every row.
    #[serde(default)]
    pub expectations: Vec<Expectation>,
    /// What becomes of earlier rows of a key.
    #[serde(default)]
    pub on_duplicate: OnDuplicate,
    /// How files are written.
    #[serde(default)]
    pub format: Format,
    /// What main is.
    #[serde(default)]
    pub mode: Mode,
    /// Columns with a type of their own; they stand first.
    #[serde(default)]
    pub declared: Vec<Declared>,
    /// SQL over each row as it came; its result is what the epoch says.
    #[serde(default)]
    pub select: Option<String>,
    /// What becomes of values that do not fit their column.
    #[serde(default)]
    pub on_mismatch: OnBad,
    /// What becomes of files that cannot be read.
    #[serde(default)]
    pub on_corrupt_file: OnBad,
    /// What holds an epoch back.
    #[serde(default)]
    pub gates: Gates,
    /// Columns that main's folders are named after.
    #[serde(default)]
    pub partition_by: Vec<String>,
    /// Main tells its changes row by row.
    #[serde(default)]
    pub change_feed: bool,
    /// Rows that are as main has them are left alone.
    #[serde(default)]
    pub skip_unchanged: bool,
}

/// How rows of main that go are taken out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeletionVectors {
    /// They are marked as deleted where the table knows such marks (those made here do); else their
    /// files are written anew.
    #[default]
    Auto,
    /// Their files are written anew.
    Off,
    /// A table that does not know such marks learns them.
    Upgrade,
}

/// Whether workers keep side indexes of data files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SideIndex {
    /// Of those that are scanned more than once and are not small.
    #[default]
    Auto,
    /// Of all that are scanned.
    Always,
    /// Of none.
    Off,
}

/// Sizes and limits of the work on a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Data files of main and raw are cut at about this size.
    pub target_file_bytes: u64,
    /// Most epochs in one merge.
    pub batch_epochs: usize,
    /// Most raw bytes in one merge (one epoch may be larger).
    pub batch_bytes: u64,
    /// Files below a quarter of the target size that make an optimize worthwhile.
    pub small_files: usize,
    /// From this cost of a read on, in percent of a table's that is all new, files with marks of deleted
    /// rows are written anew.
    #[serde(default = "read_cost_max")]
    pub read_cost_max: u32,
    /// Bytes of small files that one optimize commit rewrites at most.
    pub bin_bytes: u64,
    /// An ingest or merge of more bytes, or worn files of more bytes, are work for several workers.
    #[serde(default = "shard_bytes")]
    pub shard_bytes: u64,
    /// Age after which an unreferenced file is deleted.
    pub vacuum_retention: Duration,
    /// Memory that one task's sorting and joining may use before it spills to disk.
    pub memory_bytes: usize,
}

fn read_cost_max() -> u32 {
    225
}

fn shard_bytes() -> u64 {
    1 << 30
}

/// One pipeline: a source prefix and the tables it feeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// `[a-z][a-z0-9_]*`; part of every marker.
    pub id: String,
    /// Holds the epoch folders.
    pub source: String,
    /// URI of the raw table.
    pub raw: String,
    /// URI of the main table.
    pub main: String,
    /// URI of the quarantine table.
    pub quarantine: String,
    /// URI of the folder with ledger and manifests.
    pub state: String,
    /// What rows mean.
    pub content: Content,
    /// Merge order.
    pub order: Order,
    /// What a blocked epoch stops.
    pub on_block: OnBlock,
    /// How long later epochs wait for an incomplete lower one.
    pub hold_for_earlier: Duration,
    /// When a folder is complete.
    pub ready: Ready,
    /// Only files whose path in the folder matches this expression.
    pub include: Option<String>,
    /// No files whose path in the folder matches this one.
    pub exclude: Option<String>,
    /// Epochs below it are not processed.
    pub start_from: Option<i64>,
    /// An existing main table may become the base.
    pub adopt: bool,
    /// How rows of main that go are taken out.
    #[serde(default)]
    pub deletion_vectors: DeletionVectors,
    /// Whether workers keep side indexes of its tables' files.
    #[serde(default)]
    pub side_index: SideIndex,
    /// Whether optimize runs by policy.
    pub optimize: bool,
    /// Optimize orders rows by these columns, several along a Z-order curve; empty: by the key.
    #[serde(default)]
    pub cluster_by: Vec<String>,
    /// How often cleanup runs; `None`: never.
    pub cleanup_every: Option<Duration>,
    /// Sizes and limits.
    pub sizes: Sizes,
}

/// Property of main: columns that it leaves out. Absent: none.
pub const IGNORE: &str = "alluvium.ignore";
/// Property of main: columns that its folders are named after. Absent: none.
pub const PARTITION_BY: &str = "alluvium.partition_by";

impl Pipeline {
    /// The settings that define content, as kept in the properties of raw and main. A table made
    /// with others must not be written.
    pub fn content_properties(&self) -> [(&'static str, String); 3] {
        [
            ("alluvium.pipeline", self.id.clone()),
            ("alluvium.key", self.content.key.join(",")),
            ("alluvium.mode", self.content.mode.as_str().to_owned()),
        ]
    }

    /// The same for main alone: it can be made anew from raw.
    pub fn main_properties(&self) -> Vec<(&'static str, String)> {
        let ignored = (IGNORE, self.content.ignore.join(","));
        let partitioned = (PARTITION_BY, self.content.partition_by.join(","));
        self.content_properties().into_iter().chain([ignored, partitioned]).collect()
    }

    /// The column stays in raw (Delta's columns are case-insensitive).
    pub fn is_ignored(&self, column: &str) -> bool {
        self.content.ignore.iter().any(|name| same_name(name, column))
    }

    /// A short hash of the whole definition, for `commitInfo`.
    pub fn hash(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        short_hash(&text)
    }
}

/// The first 16 hex digits of the SHA-256 of `bytes`.
pub fn short_hash(bytes: &[u8]) -> String {
    let mut hash = full_hash(bytes);
    hash.truncate(16);
    hash
}

/// The SHA-256 of `bytes` in hex.
pub fn full_hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names of columns are the same in any case, as Delta has it.
pub fn same_name(one: &str, other: &str) -> bool {
    match one.is_ascii() && other.is_ascii() {
        true => one.eq_ignore_ascii_case(other),
        false => one.to_lowercase() == other.to_lowercase(),
    }
}
