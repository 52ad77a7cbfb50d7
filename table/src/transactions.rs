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

/// Commits read at once while the log is brought forward.
const COMMITS_AT_ONCE: usize = 8;

/// Version by app id, as of one version of the table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transactions {
    as_of: Option<u64>,
    versions: HashMap<String, i64>,
    updated: HashMap<String, i64>,
}

/// One `txn` action: app id, version, when it was written (milliseconds since 1970).
type Txn = (String, i64, Option<i64>);

impl Transactions {
    pub(crate) fn versions(&self) -> &HashMap<String, i64> {
        &self.versions
    }

    pub(crate) fn updated(&self, app_id: &str) -> Option<i64> {
        self.updated.get(app_id).copied()
    }

    fn insert(&mut self, (app_id, version, updated): Txn) {
        match updated {
            Some(at) => self.updated.insert(app_id.clone(), at),
            None => self.updated.remove(&app_id),
        };
        self.versions.insert(app_id, version);
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
                    read_checkpoint(&store, path, self).await?;
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
        for txn in commits.into_iter().flatten() {
            self.insert(txn);
        }
        self.as_of = Some(version);
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
            found.push((app_id.to_owned(), txn_version, action["txn"]["lastUpdated"].as_i64()));
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
    found: &mut Transactions,
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

fn collect(batch: &RecordBatch, found: &mut Transactions) {
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
            let updated = updates.filter(|at| at.is_valid(row)).map(|at| at.value(row));
            found.insert((app_ids.value(row).to_owned(), numbers.value(row), updated));
        }
    }
}
