//! The quarantine: refused rows, kept as they came, with place and reason. Ingest is its only
//! writer, and commits it before raw: raw's marker alone means done.

use std::collections::HashSet;
use std::sync::Arc;

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::Generation;
use alluvium_protocol::{Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::array::{ArrayRef, Int64Array, RecordBatch, TimestampMicrosecondArray};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use alluvium_table::classify::foreign;
use alluvium_table::commit::{Change, CommitOutcome, Operation};
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::pause::Pauses;
use alluvium_table::spool::Spool;
use alluvium_table::store::object_store_at;
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{Add, LiveFile, Table, TableSpec};
use chrono::{DateTime, Utc};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::Permit;
use crate::ingest::{COMMIT_PATIENCE, Wanted};
use crate::raw::{EPOCH, FILE, GENERATION, ROW};
use crate::raw_commit::already;
use crate::tables::Tables;

fn spec() -> TableSpec {
    let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    TableSpec {
        schema: Arc::new(Schema::new(vec![
            Field::new(FILE, DataType::Utf8, true),
            Field::new(ROW, DataType::Int64, true),
            Field::new("reason", DataType::Utf8, true),
            Field::new("row", DataType::Utf8, true),
            Field::new(GENERATION, DataType::Int64, true),
            Field::new("_quarantined_at", instant, true),
            Field::new(EPOCH, DataType::Int64, true),
        ])),
        partition_by: vec![EPOCH.to_owned()],
        properties: Vec::new(),
    }
}

/// A quarantine without rows, for queries, where none was made so far.
pub fn register_empty(session: &SessionContext, name: &str) -> Result<()> {
    let none = session.read_batch(RecordBatch::new_empty(spec().schema));
    let none = none.map_err(Error::internal)?.into_view();
    session.register_table(name, none).map(drop).map_err(Error::internal)
}

/// Makes the quarantine of an epoch exactly `refused`. Returns the number of rows.
pub async fn replace(
    tables: &Tables,
    pipeline: &Pipeline,
    wanted: &Wanted<'_>,
    refused: Spool,
    now: DateTime<Utc>,
    permit: &Permit,
) -> Result<u64> {
    let rows = refused.rows() as u64;
    if rows == 0 && tables.open(&pipeline.quarantine).await?.is_none() {
        return Ok(0);
    }
    let Wanted { epoch, generation, .. } = *wanted;
    let mut table = tables.open_or_create(&pipeline.quarantine, spec).await?;
    let written = write(&table, refused, epoch, generation, now).await?;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    crash::point("quarantine.before_commit")?;
    loop {
        permit.check()?;
        let value = epoch.to_string();
        let files = table
            .files_where(|partition| partition.get(EPOCH) == Some(&Some(value.clone())))
            .await?;
        let paths = |adds: &[Add]| adds.iter().map(|add| add.path.clone()).collect::<HashSet<_>>();
        let live: HashSet<String> = files.iter().map(|file| file.path.clone()).collect();
        if live == paths(&written.adds) {
            // It landed, and only the reply was lost; or there is nothing.
            break;
        }
        // A process may be slow: others read this content since, or read newer one. Asked after the snapshot that the
        // commit is for, which is lost when they get in between.
        let newest = files.iter().filter_map(generation_of).max();
        if let Some(newest) = newest.filter(|newest| *newest > generation)
            && is_pinned(pipeline, epoch, newest).await?
        {
            return Ok(rows);
        }
        if let Some(raw) = tables.open(&pipeline.raw).await?
            && already(&raw, pipeline, wanted).is_some()
        {
            // Raw's commit will find that, too.
            return Ok(rows);
        }
        // No marker: writing the same partition again changes nothing but file names.
        let change = Change {
            operation: Operation::Overwrite { predicate: format!("{EPOCH} = {epoch}") },
            adds: written.adds.clone(),
            removes: files.into_iter().map(|file| file.remove).collect(),
            others: Vec::new(),
            markers: Vec::new(),
            info: serde_json::json!({
                "pipeline": pipeline.id, "epoch": epoch, "generation": generation,
                "step": "ingest", "rows": rows,
            }),
        };
        match table.commit(change).await? {
            CommitOutcome::Landed => break,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => table.refresh().await?,
        }
    }
    crash::point("quarantine.after_commit")?;
    tables.remember(&table);
    Ok(rows)
}

/// The content that a file's rows are of, by its statistics.
fn generation_of(file: &LiveFile) -> Option<Generation> {
    let stats: serde_json::Value = serde_json::from_str(file.stats.as_deref()?).ok()?;
    stats["maxValues"][GENERATION].as_i64()
}

/// There is such content: raw and state may have begun anew since, and generations with them.
async fn is_pinned(pipeline: &Pipeline, epoch: Epoch, generation: Generation) -> Result<bool> {
    let store = object_store_at(&pipeline.state)?;
    let path = Path::from(Manifest::path(&pipeline.id, epoch, generation));
    match store.head(&path).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(foreign(format!("look for {path}"), &error)),
    }
}

/// Takes an epoch's rows out. Returns how many these were.
pub async fn forget(pipeline: &Pipeline, epoch: Epoch) -> Result<u64> {
    let Some(mut table) = Table::open(&pipeline.quarantine).await? else { return Ok(0) };
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        let value = epoch.to_string();
        let files = table
            .files_where(|partition| partition.get(EPOCH) == Some(&Some(value.clone())))
            .await?;
        if files.is_empty() {
            return Ok(0);
        }
        let rows = files.iter().filter_map(|file| file.rows).sum();
        let change = Change {
            operation: Operation::Overwrite { predicate: format!("{EPOCH} = {epoch}") },
            adds: Vec::new(),
            removes: files.into_iter().map(|file| file.remove).collect(),
            others: Vec::new(),
            markers: Vec::new(),
            info: serde_json::json!({
                "pipeline": pipeline.id, "epoch": epoch, "step": "quarantine drop", "rows": rows,
            }),
        };
        crash::point("quarantine.before_commit")?;
        match table.commit(change).await? {
            CommitOutcome::Landed => return Ok(rows),
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => table.refresh().await?,
        }
    }
}

async fn write(
    table: &Table,
    refused: Spool,
    epoch: Epoch,
    generation: Generation,
    now: DateTime<Utc>,
) -> Result<Written> {
    let mut writer = FileWriter::new(table, u64::MAX)?;
    for batch in refused.finish()?.batches()? {
        writer.write(&as_kept(&batch?, epoch, generation, now)?).await?;
    }
    writer.finish().await
}

fn as_kept(
    batch: &RecordBatch,
    epoch: Epoch,
    generation: Generation,
    now: DateTime<Utc>,
) -> Result<RecordBatch> {
    let rows = batch.num_rows();
    let constant = |value: i64| Arc::new(Int64Array::from(vec![value; rows])) as ArrayRef;
    let at = TimestampMicrosecondArray::from(vec![now.timestamp_micros(); rows]);
    let mut columns: Vec<ArrayRef> = batch.columns().to_vec();
    columns.push(constant(generation));
    columns.push(Arc::new(at.with_timezone("UTC")));
    columns.push(constant(epoch.value()));
    RecordBatch::try_new(spec().schema, columns).map_err(Error::internal)
}
