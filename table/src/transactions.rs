//! All of a table's `txn` actions in one pass: the newest checkpoint's `txn` column, then the
//! commits above it. Kept with its version and brought forward commit by commit, because the
//! library looks up one app id per log replay.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#transaction-identifiers>

use std::collections::HashMap;
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result};
use deltalake::arrow::array::{Array, AsArray, RecordBatch};
use deltalake::arrow::datatypes::Int64Type;
use deltalake::logstore::LogStoreRef;
use deltalake::parquet::arrow::ProjectionMask;
use deltalake::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use crate::classify::foreign;
use crate::commit::Marker;

/// Commits read at once while the log is brought forward.
const COMMITS_AT_ONCE: usize = 8;

/// Transactions above the shared ones that are kept apart: enough that sharing pays, few enough to
/// copy with every snapshot.
const RECENT_MAX: usize = 256;

/// Version by app id, as of one version of the table.
///
/// A table has one transaction per epoch, and every snapshot carries them: most of them are shared
/// between snapshots, and only the most recent ones are copied.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transactions {
    as_of: Option<u64>,
    shared: Arc<HashMap<String, Written>>,
    recent: HashMap<String, Written>,
}

/// An app id's newest transaction.
#[derive(Clone, Copy, Debug)]
struct Written {
    version: i64,
    /// Milliseconds since 1970.
    at: Option<i64>,
}

/// One `txn` action.
type Txn = (String, Written);

impl Transactions {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        let older = self.shared.iter().filter(|(app_id, _)| !self.recent.contains_key(*app_id));
        self.recent.iter().chain(older).map(|(app_id, txn)| (app_id.as_str(), txn.version))
    }

    pub(crate) fn version(&self, app_id: &str) -> Option<i64> {
        self.get(app_id).map(|txn| txn.version)
    }

    pub(crate) fn updated(&self, app_id: &str) -> Option<i64> {
        self.get(app_id)?.at
    }

    fn get(&self, app_id: &str) -> Option<&Written> {
        self.recent.get(app_id).or_else(|| self.shared.get(app_id))
    }

    /// Takes in a commit of our own, which made `version`.
    pub(crate) fn landed(&mut self, version: u64, markers: &[Marker], at: i64) {
        for marker in markers {
            let txn = Written { version: marker.version, at: Some(at) };
            self.recent.insert(marker.app_id.clone(), txn);
        }
        self.settle(version);
    }

    fn settle(&mut self, version: u64) {
        if self.recent.len() > RECENT_MAX {
            Arc::make_mut(&mut self.shared).extend(self.recent.drain());
        }
        self.as_of = Some(version);
    }

    /// Brings the set to `version`, from the newest checkpoint when that saves reading.
    pub(crate) async fn advance(&mut self, log_store: &LogStoreRef, version: u64) -> Result<()> {
        if self.as_of.is_some_and(|as_of| as_of > version) {
            *self = Self::default();
        }
        if self.as_of.is_none() {
            let store = log_store.object_store(None);
            if let Some(checkpoint) = newest_checkpoint(&store, version).await? {
                for path in &checkpoint.parts {
                    read_checkpoint(&store, path, &mut self.recent).await?;
                }
                self.as_of = Some(checkpoint.version);
            }
        }
        let first = self.as_of.map_or(0, |as_of| as_of + 1);
        let commits: Vec<Vec<Txn>> = futures::stream::iter(first..=version)
            .map(|version| read_commit(log_store, version))
            .buffered(COMMITS_AT_ONCE)
            .try_collect()
            .await?;
        self.recent.extend(commits.into_iter().flatten());
        self.settle(version);
        Ok(())
    }
}

async fn read_commit(log_store: &LogStoreRef, version: u64) -> Result<Vec<Txn>> {
    let doing = || format!("read commit {version} of {}", log_store.root_url());
    let body = log_store
        .read_commit_entry(version)
        .await
        .map_err(|e| foreign(doing(), &e))?
        .ok_or_else(|| Error::new(Code::TableUnreadable, format!("{}: missing", doing())))?;
    let mut found = Vec::new();
    for line in body.split(|byte| *byte == b'\n') {
        // Most lines are large Adds; only those that can be a txn are parsed.
        if !line.trim_ascii_start().starts_with(b"{\"txn\"") {
            continue;
        }
        let action: serde_json::Value = serde_json::from_slice(line)
            .map_err(|e| Error::new(Code::TableUnreadable, format!("{}: {e}", doing())))?;
        let app_id = action["txn"]["appId"].as_str();
        let txn_version = action["txn"]["version"].as_i64();
        if let (Some(app_id), Some(txn_version)) = (app_id, txn_version) {
            let at = action["txn"]["lastUpdated"].as_i64();
            found.push((app_id.to_owned(), Written { version: txn_version, at }));
        }
    }
    Ok(found)
}

struct Checkpoint {
    version: u64,
    parts: Vec<Path>,
}

/// The newest complete checkpoint at or below `version`, single, in parts, or with a UUID (V2).
async fn newest_checkpoint(
    store: &Arc<dyn ObjectStore>,
    version: u64,
) -> Result<Option<Checkpoint>> {
    let log = Path::from("_delta_log");
    // `_last_checkpoint` is only a hint and may be stale; a listing costs one request.
    let listed = store.list_with_delimiter(Some(&log)).await;
    let listed = listed.map_err(|e| foreign("list the table's log", &e))?;
    let mut found: HashMap<(u64, usize), Vec<Path>> = HashMap::new();
    for object in listed.objects {
        let Some(name) = object.location.filename() else { continue };
        let parts: Vec<&str> = name.split('.').collect();
        let Some(at) = parts.first().and_then(|text| text.parse::<u64>().ok()) else { continue };
        if at > version || parts.get(1) != Some(&"checkpoint") || parts.last() != Some(&"parquet") {
            continue;
        }
        let total = match parts.len() {
            // N.checkpoint.parquet, N.checkpoint.<uuid>.parquet
            3 | 4 => 1,
            // N.checkpoint.<part>.<total>.parquet
            5 => parts[3].parse::<usize>().unwrap_or(usize::MAX),
            _ => continue,
        };
        found.entry((at, total)).or_default().push(object.location);
    }
    let newest = found
        .into_iter()
        .filter(|((_, total), paths)| paths.len() >= *total)
        .max_by_key(|((version, _), _)| *version);
    Ok(newest.map(|((version, _), parts)| Checkpoint { version, parts }))
}

async fn read_checkpoint(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    found: &mut HashMap<String, Written>,
) -> Result<()> {
    let doing = || format!("read checkpoint {path}");
    let body = store.get(path).await.map_err(|e| foreign(doing(), &e))?;
    let body = body.bytes().await.map_err(|e| foreign(doing(), &e))?;
    let builder =
        ParquetRecordBatchReaderBuilder::try_new(body).map_err(|e| foreign(doing(), &e))?;
    if builder.schema().field_with_name("txn").is_err() {
        return Ok(());
    }
    let mask = ProjectionMask::columns(builder.parquet_schema(), ["txn"]);
    let reader = builder.with_projection(mask).build().map_err(|e| foreign(doing(), &e))?;
    for batch in reader {
        collect(&batch.map_err(|e| foreign(doing(), &e))?, found);
    }
    Ok(())
}

fn collect(batch: &RecordBatch, found: &mut HashMap<String, Written>) {
    let Some(txn) = batch.column_by_name("txn").and_then(|column| column.as_struct_opt()) else {
        return;
    };
    let app_ids = txn.column_by_name("appId").and_then(|column| column.as_string_opt::<i32>());
    let numbers =
        txn.column_by_name("version").and_then(|column| column.as_primitive_opt::<Int64Type>());
    let (Some(app_ids), Some(numbers)) = (app_ids, numbers) else { return };
    let updates =
        txn.column_by_name("lastUpdated").and_then(|column| column.as_primitive_opt::<Int64Type>());
    for row in 0..txn.len() {
        if txn.is_valid(row) && app_ids.is_valid(row) && numbers.is_valid(row) {
            let at = updates.filter(|at| at.is_valid(row)).map(|at| at.value(row));
            let txn = Written { version: numbers.value(row), at };
            found.insert(app_ids.value(row).to_owned(), txn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker(epoch: usize, version: i64) -> Marker {
        Marker { app_id: format!("alluvium/p/{epoch}/ingest"), version }
    }

    #[test]
    fn the_newest_version_counts_wherever_it_is_kept() {
        let mut found = Transactions::default();
        for epoch in 0..3 * RECENT_MAX {
            found.landed(epoch as u64 + 1, &[marker(epoch, 1)], 7);
        }
        assert!(!found.shared.is_empty() && found.recent.len() <= RECENT_MAX);
        let snapshot = found.clone();
        found.landed(9_999, &[marker(0, 2)], 8);
        assert_eq!(found.version("alluvium/p/0/ingest"), Some(2));
        assert_eq!(found.updated("alluvium/p/0/ingest"), Some(8));
        assert_eq!(snapshot.version("alluvium/p/0/ingest"), Some(1));
        assert_eq!(found.iter().count(), 3 * RECENT_MAX);
        assert_eq!(found.iter().map(|(_, version)| version).sum::<i64>(), 3 * 256 + 1);
    }
}
