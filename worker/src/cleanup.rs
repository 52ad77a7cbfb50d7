//! Cleanup: files that nothing refers to any more, expired log entries, small files of the ledger.
//!
//! It makes no commit on main: data files that no version within the retention names are deleted,
//! which changes nothing that a reader of those versions sees.

use std::time::Instant;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Pipeline, Result, crash};
use alluvium_table::Table;

use crate::optimize::{Landing, Order, write_bin};
use crate::points::kept_versions;
use crate::{Permit, Workshop, shards};

/// A ledger table with more files than this is rewritten into one.
const LEDGER_FILES_MAX: usize = 50;

/// The ledger's tables below the state folder, and the columns that order them.
const LEDGER: [(&str, &[&str]); 3] = [
    ("ledger/processed_folders", &["pipeline", "epoch", "generation"]),
    ("ledger/step_events", &["at", "pipeline"]),
    ("ledger/audit_log", &["at"]),
];

/// Carries out a cleanup task.
pub async fn cleanup(workshop: &Workshop, task: &Task, permit: &Permit) -> Result<Report> {
    let pipeline = &task.pipeline;
    let mut report = Report::default();
    for uri in [&pipeline.raw, &pipeline.main, &pipeline.quarantine] {
        permit.check()?;
        permit.begin("looks for files that nothing names", Amount::default());
        if let Some(table) = workshop.tables.open(uri).await? {
            report.files_removed += clean(&table, pipeline, permit).await?;
        }
    }
    report.files_removed += shards::forget_old(pipeline).await?;
    for (path, order) in LEDGER {
        permit.check()?;
        let uri = format!("{}/{path}", pipeline.state.trim_end_matches('/'));
        if let Some(mut table) = Table::open(&uri).await? {
            compact(&mut table, pipeline, order, permit).await?;
            report.files_removed += clean(&table, pipeline, permit).await?;
        }
    }
    Ok(report)
}

/// A step that is to end does so between so many deletions.
const DELETED_AT_ONCE: usize = 100;

/// What a cleanup would delete now, without deleting it: paths below the table.
pub async fn dry_run(table: &Table, pipeline: &Pipeline) -> Result<Vec<String>> {
    let (retention, kept) = (pipeline.sizes.vacuum_retention, kept_versions(table));
    let mut files = table.unreferenced_files(retention, &kept).await?;
    files.extend(table.unreferenced_vectors(retention, &kept).await?);
    Ok(files)
}

async fn clean(table: &Table, pipeline: &Pipeline, permit: &Permit) -> Result<u64> {
    let files = dry_run(table, pipeline).await?;
    crash::point("cleanup.before_delete")?;
    let mut deleted = 0;
    for some in files.chunks(DELETED_AT_ONCE) {
        permit.check()?;
        deleted += table.delete_files(some).await?;
    }
    crash::point("cleanup.after_delete")?;
    // A version that is kept is read through its log entries, too.
    if kept_versions(table).is_empty() {
        table.clean_log().await?;
    }
    Ok(deleted)
}

async fn compact(
    table: &mut Table,
    pipeline: &Pipeline,
    order: &[&str],
    permit: &Permit,
) -> Result<()> {
    let files = table.files().await?;
    if files.len() <= LEDGER_FILES_MAX {
        return Ok(());
    }
    let order: Vec<String> = order.iter().map(|name| (*name).to_owned()).collect();
    let started = Instant::now();
    let written = write_bin(table, pipeline, &files, &Order::by(order.clone()), permit).await?;
    let landing = Landing { started, pipeline, step: "cleanup", pieces: 0, key: &order, permit };
    landing.land(table, &files, &written).await?;
    Ok(())
}
