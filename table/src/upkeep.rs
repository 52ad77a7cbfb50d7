//! Which data files gain by being written anew.

use std::collections::BTreeMap;

use crate::LiveFile;

/// Fewer files of a partition that are only small are left alone: they would not become larger.
pub const BIN_FILES_MIN: usize = 2;
/// Files below this share of the target size are small.
const SMALL_FILE_DIVISOR: u64 = 4;
/// One row in so many marked as deleted makes a file worn.
const WORN_SHARE: u64 = 10;

/// So many of a file's rows are marked as deleted that readers gain by its being written anew.
fn is_worn(file: &LiveFile) -> bool {
    match (file.rows, file.live_rows()) {
        (Some(rows), Some(live)) => (rows - live) * WORN_SHARE >= rows && rows > live,
        _ => false,
    }
}

/// The files that gain by being written anew, by partition: worn ones, and small ones that are not alone.
pub fn candidates(files: Vec<LiveFile>, target_file_bytes: u64) -> Vec<Vec<LiveFile>> {
    let small = target_file_bytes / SMALL_FILE_DIVISOR;
    let mut by_partition: BTreeMap<Vec<(String, Option<String>)>, Vec<LiveFile>> = BTreeMap::new();
    for file in files.into_iter().filter(|file| file.size < small || is_worn(file)) {
        let mut partition: Vec<_> = file.partition.clone().into_iter().collect();
        partition.sort();
        by_partition.entry(partition).or_default().push(file);
    }
    let gains = |files: &Vec<LiveFile>| files.len() >= BIN_FILES_MIN || files.iter().any(is_worn);
    by_partition.into_values().filter(gains).collect()
}

/// How many files there are, and how many of them gain by being written anew.
pub fn counts(files: Vec<LiveFile>, target_file_bytes: u64) -> (u64, u64) {
    let all = files.len() as u64;
    let gaining: usize = candidates(files, target_file_bytes).iter().map(Vec::len).sum();
    (all, gaining as u64)
}
