//! What the commits of a table say about themselves, newest first.

use alluvium_protocol::{Code, Error, Result};
use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt, TryStreamExt};
use serde_json::Value;

use crate::Table;
use crate::classify::foreign;

/// Log entries read at a time.
const RECORDS_AT_ONCE: usize = 16;

/// One commit, as far as it concerns Alluvium.
#[derive(Clone, Debug)]
pub struct CommitRecord {
    /// The version it made.
    pub version: i64,
    /// When.
    pub at: DateTime<Utc>,
    /// `commitInfo.operation`.
    pub operation: String,
    /// `commitInfo.engineInfo`: who wrote it.
    pub engine: String,
    /// Our part of `commitInfo`, or null.
    pub info: Value,
    /// Markers that landed with it.
    pub markers: Vec<(String, i64)>,
    /// Name and type of each column, where the commit states the schema.
    pub columns: Option<Vec<(String, String)>>,
}

impl Table {
    /// The commits from this snapshot down to `oldest`, or to the end of the log's retention.
    pub async fn history(&self, oldest: i64) -> Result<Vec<CommitRecord>> {
        let versions = (oldest.max(0)..=self.version()).rev();
        let mut reading = Vec::new();
        for version in versions {
            reading.push(self.commit_record(version).boxed());
        }
        let mut found = futures::stream::iter(reading).buffered(RECORDS_AT_ONCE);
        let mut records = Vec::new();
        // One that has expired: everything below is gone, too.
        while let Some(Some(record)) = found.try_next().await? {
            records.push(record);
        }
        Ok(records)
    }

    /// One commit; `None` when its log file has expired.
    pub async fn commit_record(&self, version: i64) -> Result<Option<CommitRecord>> {
        let doing = || format!("read commit {version} of {}", self.uri());
        let at = u64::try_from(version).map_err(|_| Error::internal(doing()))?;
        let body = self.log_store.read_commit_entry(at).await.map_err(|e| foreign(doing(), &e))?;
        let Some(body) = body else { return Ok(None) };
        let mut record = CommitRecord {
            version,
            at: DateTime::UNIX_EPOCH,
            operation: String::new(),
            engine: String::new(),
            info: Value::Null,
            markers: Vec::new(),
            columns: None,
        };
        for line in body.split(|byte| *byte == b'\n') {
            let line = line.trim_ascii_start();
            let kinds: [&[u8]; 3] = [b"{\"txn\"", b"{\"commitInfo\"", b"{\"metaData\""];
            if !kinds.iter().any(|kind| line.starts_with(kind)) {
                continue;
            }
            let action: Value = serde_json::from_slice(line)
                .map_err(|e| Error::new(Code::TableUnreadable, format!("{}: {e}", doing())))?;
            read_action(&action, &mut record);
        }
        Ok(Some(record))
    }
}

fn read_action(action: &Value, record: &mut CommitRecord) {
    let txn = &action["txn"];
    if let (Some(app_id), Some(version)) = (txn["appId"].as_str(), txn["version"].as_i64()) {
        record.markers.push((app_id.to_owned(), version));
    }
    let schema = action["metaData"]["schemaString"].as_str();
    if let Some(schema) = schema.and_then(|text| serde_json::from_str::<Value>(text).ok()) {
        let fields = schema["fields"].as_array().into_iter().flatten();
        let column = |field: &Value| {
            let kind = &field["type"];
            // Nested types are objects; their outer word is what fits a line.
            let kind = kind.as_str().or(kind["type"].as_str()).unwrap_or_default();
            (field["name"].as_str().unwrap_or_default().to_owned(), kind.to_owned())
        };
        record.columns = Some(fields.map(column).collect());
    }
    let commit_info = &action["commitInfo"];
    if commit_info.is_object() {
        let millis = commit_info["timestamp"].as_i64().unwrap_or(0);
        record.at = DateTime::from_timestamp_millis(millis).unwrap_or(DateTime::UNIX_EPOCH);
        record.operation = commit_info["operation"].as_str().unwrap_or("").to_owned();
        record.engine = commit_info["engineInfo"].as_str().unwrap_or("").to_owned();
        record.info = commit_info["alluvium"].clone();
    }
}
