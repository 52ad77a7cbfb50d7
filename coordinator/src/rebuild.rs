//! Rows of `processed_folders` out of the tables: what the ledger should say, derived from truth.
//!
//! Epoch, generation, state and time come from markers and raw's content, which live as long as the
//! tables; rows, files and versions from commits, as far as the log reaches.

use std::collections::{BTreeMap, HashMap};

use alluvium_protocol::manifest::Reason;
use alluvium_protocol::marker::{EpochMarker, Generation, epoch_app_id};
use alluvium_protocol::state::State;
use alluvium_protocol::task::Report;
use alluvium_protocol::{Epoch, Result};
use alluvium_table::Table;
use alluvium_table::history::CommitRecord;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::book::Book;
use crate::ledger::{Ledger, LedgerTable};

/// Rows for epochs that were just merged.
pub(crate) async fn rows_of(
    book: &Book,
    merged: &[Epoch],
    report: &Report,
    now: DateTime<Utc>,
) -> Vec<Value> {
    let mut rows = Vec::with_capacity(merged.len());
    for epoch in merged {
        let entry = &book.entries[epoch];
        let generation = book.markers.merge.get(epoch).copied().unwrap_or(entry.generation);
        let content = book.markers.ingest.get(epoch).copied().unwrap_or(generation);
        let pinned = book.manifests.load(*epoch, content).await.ok().flatten();
        let reason = pinned.as_ref().map(|pinned| pinned.manifest.reason.as_str());
        rows.push(json!({
            "pipeline": book.pipeline.id,
            "epoch_folder": entry.folder.clone().unwrap_or_else(|| epoch.to_string()),
            "epoch": epoch,
            "generation": generation,
            "state": entry.state.as_str(),
            "processed_at": now.to_rfc3339(),
            "reason": reason,
            "late": entry.late,
            "raw_version": report.raw_version,
            "main_version": report.main_version,
            "rebuilt": false,
        }));
    }
    rows
}

/// Rows for applied epochs that the ledger does not name at their present generation.
pub async fn missing(book: &Book, state: &str) -> Result<Vec<Value>> {
    let mut ledger = Ledger::open(state);
    let id = book.pipeline.id.clone();
    let known = ledger.processed().await?;
    let epochs: Vec<(Epoch, Generation)> = book
        .markers
        .applied()
        .into_iter()
        .map(|epoch| (epoch, book.markers.merge[&epoch]))
        .filter(|(epoch, generation)| !known.contains(&(id.clone(), *epoch, *generation)))
        .collect();
    if epochs.is_empty() {
        return Ok(Vec::new());
    }
    derive(book, &epochs).await
}

/// Appends what is missing and says how many rows that were.
pub async fn rebuild(book: &Book, state: &str) -> Result<usize> {
    let rows = missing(book, state).await?;
    let count = rows.len();
    Ledger::open(state).append(LedgerTable::ProcessedFolders, rows).await?;
    Ok(count)
}

async fn derive(book: &Book, epochs: &[(Epoch, Generation)]) -> Result<Vec<Value>> {
    let id = &book.pipeline.id;
    let main = Table::open(&book.pipeline.main).await?;
    let raw = Table::open(&book.pipeline.raw).await?;
    let merges = commits_by_marker(main.as_ref()).await?;
    let ingests = commits_by_marker(raw.as_ref()).await?;
    let contents = crate::book::contents_of(raw.as_ref()).await?;
    let mut highest_by_version: BTreeMap<i64, Epoch> = BTreeMap::new();
    for (epoch, _) in epochs {
        let app_id = epoch_app_id(id, *epoch, EpochMarker::Merge);
        if let Some(commit) = merges.get(&app_id) {
            let highest = highest_by_version.entry(commit.version).or_insert(*epoch);
            *highest = (*highest).max(*epoch);
        }
    }
    let mut rows = Vec::with_capacity(epochs.len());
    for (epoch, generation) in epochs {
        let app_id = epoch_app_id(id, *epoch, EpochMarker::Merge);
        let merge = merges.get(&app_id);
        let ingest = ingests.get(&epoch_app_id(id, *epoch, EpochMarker::Ingest));
        let time = main.as_ref().and_then(|table| table.transaction_time(&app_id));
        let at = time.and_then(DateTime::from_timestamp_millis).or(merge.map(|commit| commit.at));
        let content = contents.get(epoch).copied().unwrap_or_default();
        let late = merge.map(|commit| {
            highest_by_version.range(..commit.version).any(|(_, highest)| highest > epoch)
        });
        let info = |name: &str| ingest.map(|commit| commit.info[name].clone());
        let reason = info("reason").and_then(|text| serde_json::from_value::<Reason>(text).ok());
        let is_skipped = match reason {
            Some(reason) => reason.is_empty_content(),
            None => {
                let is_ingested = book.markers.ingest.contains_key(epoch) && raw.is_some();
                is_ingested && !content.has_rows
            }
        };
        rows.push(json!({
            "pipeline": id,
            "epoch_folder": info("folder").unwrap_or_else(|| json!(epoch.to_string())),
            "epoch": epoch,
            "generation": generation,
            "state": if is_skipped { State::Skipped } else { State::Processed }.as_str(),
            "processed_at": at.map(|at| at.to_rfc3339()),
            "reason": reason,
            "late": late,
            "raw_version": ingest.map(|commit| commit.version),
            "main_version": merge.map(|commit| commit.version),
            "rows_read": info("rows_read"),
            "rows_in_raw": content.rows,
            "rows_quarantined": info("rows_quarantined"),
            "rebuilt": true,
        }));
    }
    Ok(rows)
}

/// The newest commit that carries each marker, as far as the log reaches.
async fn commits_by_marker(table: Option<&Table>) -> Result<HashMap<String, CommitRecord>> {
    let mut found = HashMap::new();
    let Some(table) = table else { return Ok(found) };
    for commit in table.history(0).await? {
        for (app_id, _) in commit.markers.clone() {
            found.entry(app_id).or_insert_with(|| commit.clone());
        }
    }
    Ok(found)
}
