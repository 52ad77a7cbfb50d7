//! What a table's files cost its readers, and which of them gain by being written anew.
//!
//! The cost is counted in rows of a file without marks. It is a model, fitted to what delta-rs takes on two
//! processors (5 million rows, a sum over one column: 41 ms; 66 to 90 after the first merge with marks
//! in every file, 112 after five, 170 after twenty): files with marks are read one after the other.

use std::collections::BTreeMap;

use alluvium_protocol::Pipeline;
use alluvium_protocol::task::MainFiles;
use serde::Serialize;
use serde_json::Value;

use crate::LiveFile;

/// Fewer files of a partition that are only small are left alone: they would not become larger.
pub const BIN_FILES_MIN: usize = 2;
/// Files below this share of the target size are small.
const SMALL_FILE_DIVISOR: u64 = 4;
/// One row in so many marked as deleted makes a file worn.
const WORN_SHARE: u64 = 10;

/// What it takes to begin a read, in rows.
const READ_ROWS: f64 = 1e6;
/// What it takes to open a file.
const FILE_ROWS: f64 = 25e3;
/// What a row of a file with marks takes, and how much more when a fifth of them, or more, is deleted.
const MARKED: f64 = 2.0;
const MARKED_MORE: f64 = 1.0;
const MARKED_SHARE: f64 = 0.2;
/// Bytes of a row, where a file does not tell how many it has.
const ROW_BYTES: u64 = 64;

/// What is to become of a table's files.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Files are to have about so many bytes.
    pub target_file_bytes: u64,
    /// From this cost of a read on, in percent, files with marks are written anew, worn or not.
    pub read_cost_max: u32,
}

/// A pipeline's policy.
pub fn policy(pipeline: &Pipeline) -> Policy {
    let sizes = &pipeline.sizes;
    Policy { target_file_bytes: sizes.target_file_bytes, read_cost_max: sizes.read_cost_max }
}

/// A table's physical state.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Health {
    /// Live data files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Rows that readers see.
    pub rows: u64,
    /// Rows that are marked as deleted.
    pub deleted_rows: u64,
    /// Files with such marks.
    pub marked_files: u64,
    /// Files so full of them that they are written anew.
    pub worn_files: u64,
    /// Files below a quarter of the target size.
    pub small_files: u64,
    /// Files that gain by being written anew: what optimize takes.
    pub gaining_files: u64,
    /// Their bytes.
    pub gaining_bytes: u64,
    /// What a read costs, in percent of what it costs when all files are new: an estimate.
    pub read_cost: u32,
    /// How many files hold a value of the first key column, on average; `None`: statistics do not tell.
    pub key_overlap: Option<f64>,
}

impl Health {
    /// What a coordinator is told of it.
    pub fn counts(&self) -> MainFiles {
        MainFiles {
            main_files: self.files,
            main_small_files: self.gaining_files,
            main_read_cost: self.read_cost,
        }
    }
}

fn is_small(file: &LiveFile, policy: Policy) -> bool {
    file.size < policy.target_file_bytes / SMALL_FILE_DIVISOR
}

/// So many of a file's rows are marked as deleted that readers gain by its being written anew.
fn is_worn(file: &LiveFile) -> bool {
    match (file.rows, file.live_rows()) {
        (Some(rows), Some(live)) => (rows - live) * WORN_SHARE >= rows && rows > live,
        _ => false,
    }
}

fn is_marked(file: &LiveFile) -> bool {
    file.remove.deletion_vector.is_some()
}

/// Rows, deleted ones included, and rows that readers see.
fn rows_of(file: &LiveFile) -> (u64, u64) {
    let rows = file.rows.unwrap_or(file.size / ROW_BYTES);
    (rows, file.live_rows().unwrap_or(rows))
}

fn cost_of(file: &LiveFile) -> f64 {
    let (rows, live) = rows_of(file);
    let deleted = (rows - live) as f64 / rows.max(1) as f64;
    let of_row = match is_marked(file) {
        true => MARKED + MARKED_MORE * (deleted / MARKED_SHARE).min(1.0),
        false => 1.0,
    };
    FILE_ROWS + rows as f64 * of_row
}

/// What reading would save if the file's rows were in a new one, in rows.
pub fn saving(file: &LiveFile) -> f64 {
    cost_of(file) - rows_of(file).1 as f64
}

/// What a read costs, in percent of what it costs when all files are new.
fn read_cost(files: &[LiveFile], policy: Policy) -> u32 {
    let (mut cost, mut rows) = (READ_ROWS, 0);
    let mut bytes: BTreeMap<Vec<(&str, Option<&str>)>, u64> = BTreeMap::new();
    for file in files {
        cost += cost_of(file);
        rows += rows_of(file).1;
        let values = file.partition.iter().map(|(name, value)| (name.as_str(), value.as_deref()));
        let mut partition: Vec<_> = values.collect();
        partition.sort_unstable();
        *bytes.entry(partition).or_default() += file.size;
    }
    let target = policy.target_file_bytes.max(1);
    let new_files: u64 = bytes.values().map(|bytes| bytes.div_ceil(target).max(1)).sum();
    let best = READ_ROWS + new_files as f64 * FILE_ROWS + rows as f64;
    (100.0 * cost / best).round() as u32
}

/// The files that gain by being written anew, by partition.
pub fn candidates(files: Vec<LiveFile>, policy: Policy) -> Vec<Vec<LiveFile>> {
    let is_dear = read_cost(&files, policy) >= policy.read_cost_max;
    let is_full = move |file: &LiveFile| is_worn(file) || (is_dear && is_marked(file));
    let mut by_partition: BTreeMap<Vec<(String, Option<String>)>, Vec<LiveFile>> = BTreeMap::new();
    for file in files.into_iter().filter(|file| is_small(file, policy) || is_full(file)) {
        let mut partition: Vec<_> = file.partition.clone().into_iter().collect();
        partition.sort();
        by_partition.entry(partition).or_default().push(file);
    }
    let gains = |files: &Vec<LiveFile>| files.len() >= BIN_FILES_MIN || files.iter().any(is_full);
    by_partition.into_values().filter(gains).collect()
}

/// A table's state by its files; `key` is the first column that they are in the order of.
pub fn health(files: Vec<LiveFile>, policy: Policy, key: Option<&str>) -> Health {
    let mut health = Health {
        files: files.len() as u64,
        read_cost: read_cost(&files, policy),
        key_overlap: key.and_then(|key| overlap(&files, key)),
        ..Health::default()
    };
    for file in &files {
        let (rows, live) = rows_of(file);
        health.bytes += file.size;
        health.rows += live;
        health.deleted_rows += rows - live;
        health.marked_files += u64::from(is_marked(file));
        health.worn_files += u64::from(is_worn(file));
        health.small_files += u64::from(is_small(file, policy));
    }
    for file in candidates(files, policy).iter().flatten() {
        health.gaining_files += 1;
        health.gaining_bytes += file.size;
    }
    health
}

/// How many files' ranges a value lies in: the mean over the smallest value of each file.
fn overlap(files: &[LiveFile], key: &str) -> Option<f64> {
    let mut ranges = Vec::with_capacity(files.len());
    for file in files {
        let stats: Value = serde_json::from_str(file.stats.as_deref()?).ok()?;
        let bound = |of: &str| Bound::of(stats.get(of)?.get(key)?);
        ranges.push((bound("minValues")?, bound("maxValues")?));
    }
    let holding = |value: &Bound| {
        let is_in = |(least, most): &&(Bound, Bound)| least <= value && value <= most;
        ranges.iter().filter(is_in).count()
    };
    // Few enough to be compared each with each; of very many, some will do.
    let step = (ranges.len() / 1000).max(1);
    let some: Vec<usize> = ranges.iter().step_by(step).map(|(least, _)| holding(least)).collect();
    (!some.is_empty()).then(|| some.iter().sum::<usize>() as f64 / some.len() as f64)
}

/// A value of the statistics.
#[derive(PartialEq, PartialOrd)]
enum Bound {
    Number(f64),
    Text(String),
}

impl Bound {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.as_f64().map(Self::Number),
            Value::String(text) => Some(Self::Text(text.clone())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use deltalake::kernel::{Add, DeletionVectorDescriptor, StorageType};

    use super::*;

    const POLICY: Policy = Policy { target_file_bytes: 1000, read_cost_max: 225 };

    fn file(size: u64, rows: u64, deleted: i64, keys: (i64, i64)) -> LiveFile {
        let stats = serde_json::json!({
            "numRecords": rows, "minValues": {"k": keys.0}, "maxValues": {"k": keys.1}
        });
        let vector = (deleted > 0).then(|| DeletionVectorDescriptor {
            storage_type: StorageType::Inline,
            path_or_inline_dv: String::new(),
            offset: None,
            size_in_bytes: 0,
            cardinality: deleted,
        });
        LiveFile::of(&Add {
            path: format!("{size}-{rows}-{deleted}-{}", keys.0),
            size: i64::try_from(size).unwrap(),
            stats: Some(stats.to_string()),
            deletion_vector: vector,
            ..Add::default()
        })
    }

    #[test]
    fn small_and_worn_files_gain() {
        let files = vec![
            file(900, 100, 0, (0, 9)),
            file(900, 100, 9, (10, 19)),
            file(900, 100, 10, (20, 29)),
            file(249, 100, 0, (0, 29)),
        ];
        let health = health(files, POLICY, Some("k"));
        assert_eq!((health.files, health.gaining_files, health.gaining_bytes), (4, 2, 1149));
        assert_eq!((health.small_files, health.worn_files, health.marked_files), (1, 1, 2));
        assert_eq!((health.rows, health.deleted_rows), (381, 19));
        // 0: two files; 10 and 20: two each; 0 of the small one: two.
        assert_eq!(health.key_overlap, Some(2.0));
    }

    #[test]
    fn one_small_file_is_left_alone() {
        let health = health(vec![file(10, 1, 0, (1, 1)), file(900, 5, 0, (2, 3))], POLICY, None);
        assert_eq!((health.small_files, health.gaining_files, health.key_overlap), (1, 0, None));
    }

    #[test]
    fn marks_in_every_file_of_a_large_table_are_written_anew_when_reads_become_dear() {
        let table = |deleted| (0..20).map(|n| file(900, 1_000_000, deleted, (n, n))).collect();
        let cost = |deleted| health(table(deleted), POLICY, None);
        assert_eq!(cost(0).read_cost, 100);
        let once = cost(20_000);
        assert!((190..225).contains(&once.read_cost), "{once:?}");
        assert_eq!(once.gaining_files, 0);
        let often = cost(80_000);
        assert!(often.read_cost > 225, "{often:?}");
        assert_eq!((often.worn_files, often.gaining_files), (0, 20));
    }

    #[test]
    fn a_few_files_of_few_rows_are_cheap() {
        let files = (0..5).map(|n| file(10, 10, 0, (n, n))).collect();
        assert!(health(files, POLICY, None).read_cost < 120);
    }
}
