//! Ingest: one epoch's folder becomes raw's partition `_epoch = e`, whole, with its marker.
//!
//! ```text
//!  marker there? ─► manifest ─► footers, columns ─► rows sorted by key ─► files in raw's folder
//!                                                        └─► refused rows ─► quarantine's commit
//!  raw's commit: remove all of the partition, add the files, marker; again until it landed
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::{Generation, Markers};
use alluvium_protocol::pipeline::{Format, full_hash, same_name};
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::Table;
use alluvium_table::arrow::datatypes::{Field, Schema, SchemaRef};
use alluvium_table::classify::foreign;
use alluvium_table::commit::CommitOutcome;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::pause::Pauses;
use alluvium_table::schema::{find_column, widens_to};
use alluvium_table::session::{quoted, work_session};
use alluvium_table::store::object_store_at;
use alluvium_table::write::{FileWriter, Written};
use futures::StreamExt;
use object_store::ObjectStoreExt;
use serde::{Deserialize, Serialize};

use crate::aside::{self, AsideRef};
use crate::checks::{agree, read_back};
use crate::columns::{self, Columns, NamedSchema, check_columns, names_of};
use crate::incoming::{Incoming, Reading};
use crate::raw_commit::{Prepared, RawCommit, already, partition_paths};
use crate::refusals::{Judged, judge, read_through};
use crate::reverts::revert_rows;
use crate::selecting::{Selection, input_of};
use crate::shards::of_ingest::{Split, in_pieces};
use crate::sorter::{Plan, Runs, Sorter};
use crate::source::SourceFile;
use crate::widening::{narrower, widen};
use crate::{Permit, Workshop, gates, quarantine, raw};

/// How long a commit is tried against other writers before the attempt counts as failed.
pub(crate) const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

/// What an ingest task asks for.
pub struct Wanted<'a> {
    /// The epoch.
    pub epoch: Epoch,
    /// Its content's generation.
    pub generation: Generation,
    /// Path of the manifest below the state folder.
    pub manifest: &'a str,
    /// Its SHA-256.
    pub manifest_hash: &'a str,
}

/// Carries out an ingest task.
pub async fn ingest(
    workshop: &Workshop,
    task: &Task,
    wanted: &Wanted<'_>,
    permit: &Permit,
) -> Result<Report> {
    let started = Instant::now();
    let pipeline = &task.pipeline;
    let present = workshop.tables.open(&pipeline.raw).await?;
    if let Some(table) = &present {
        table.check_settings(pipeline)?;
        if let Some(report) = already(table, pipeline, wanted) {
            return Ok(report);
        }
    }
    let manifest = read_manifest(pipeline, wanted).await?;
    permit.begin("opens the folder's files", Amount::default());
    let opened = SourceFile::open_all(pipeline, &manifest).await?;
    check_raw_has_it(workshop, pipeline, wanted).await?;
    let schema = match &present {
        Some(raw) => Some(raw.schema()),
        // Main was there before raw: its columns and their types stand.
        None => workshop.tables.open(&pipeline.main).await?.map(|main| main.schema()),
    };
    let (incoming, columns) = incoming_of(
        pipeline,
        &manifest,
        opened.files,
        (schema.as_ref(), present.is_none()),
        permit,
    )
    .await?;
    crash::point("ingest.after_read")?;
    permit.check()?;

    let judged = judge(pipeline, &incoming).await?;
    gates::check(pipeline, &manifest, present.as_ref(), &incoming, &judged).await?;
    let table =
        prepare_table(workshop, pipeline, present, &columns, (manifest.epoch, permit)).await?;
    let own = own_values(wanted, workshop);
    let split = Split { manifest: &manifest, corrupt: &opened.corrupt };
    let whole = (&incoming, &judged);
    let job = split.into_job(pipeline, &table, whole, &own, permit)?;
    let pieces = job.as_ref().map_or(0, |job| job.parts.len() as u64);
    let (written, aside) = match job {
        Some(job) => in_pieces(workshop, task, job, permit).await?,
        None => write_content(pipeline, &table, whole, &own, permit).await?,
    };
    let prepared = with_reverts(pipeline, &table, whole, (written, aside), &own, permit).await?;
    crash::point("ingest.after_write")?;
    permit.check()?;

    let (refused, rows_filtered) = {
        let mut aside = prepared.aside.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (file, error) in &opened.corrupt {
            aside.push_file(file, error)?;
        }
        (aside.take(), aside.filtered)
    };
    let now = workshop.clock.now();
    let rows_quarantined =
        quarantine::replace(&workshop.tables, pipeline, wanted, refused, now, permit).await?;
    let corrupt = opened.corrupt.len() as u64;
    let kept = prepared.content_rows + rows_quarantined + rows_filtered;
    let what = "rows of the folder, in raw, in quarantine or left out by select";
    agree("ingest", what, incoming.rows() + corrupt, kept, &pipeline.raw)?;
    let written = &prepared.written;
    read_back("ingest.files", &table, &written.adds, written.rows).await?;
    let report = Report {
        generations: vec![(wanted.epoch, wanted.generation)],
        empty: manifest.reason.is_empty_content().then_some(wanted.epoch).into_iter().collect(),
        rows_read: incoming.rows(),
        rows_written: prepared.written.rows,
        rows_quarantined,
        rows_filtered,
        expectations: judged.failed,
        columns_left_out: names_of(&columns.left_out),
        files_added: prepared.written.adds.len() as u64,
        bytes_written: alluvium_table::bytes_of(&prepared.written.adds),
        pieces,
        ..Report::default()
    };
    let age_max = pipeline.sizes.vacuum_retention / 4;
    let commit = RawCommit { workshop, task, wanted, manifest: &manifest, started, age_max };
    commit.land(table, prepared, report, permit).await
}

/// How the folder's rows are read, and which columns they give the table.
async fn incoming_of(
    pipeline: &Pipeline,
    manifest: &Manifest,
    files: Vec<SourceFile>,
    (table, is_first_raw): (Option<&SchemaRef>, bool),
    permit: &Permit,
) -> Result<(Incoming, Columns)> {
    let content = &pipeline.content;
    let mut schemas: Vec<NamedSchema> =
        files.iter().map(|file| (file.name.clone(), Arc::clone(&file.schema))).collect();
    let selection = match &content.select {
        Some(select) if files.iter().any(SourceFile::has_columns) => {
            let all: Vec<SchemaRef> =
                schemas.iter().map(|(_, schema)| Arc::clone(schema)).collect();
            let input = input_of(&all, matches!(content.format, Format::Csv(_)));
            Some(Selection::compile(pipeline, select, &input).await?)
        }
        _ => None,
    };
    if content.select.is_some() {
        // Without a row in the folder nothing is known of what there is to be selected.
        let selected = selection.as_ref().map(|s| ("select".to_owned(), Arc::clone(s.output())));
        schemas = selected.into_iter().collect();
    }
    // A text file without rows may be one without columns, too.
    let is_empty = |name: &str| {
        files
            .iter()
            .any(|f| f.name == name && f.is_text() && (f.rows == 0 || f.schema.fields().is_empty()))
    };
    let with_rows: Vec<NamedSchema> =
        schemas.iter().filter(|(name, _)| !is_empty(name)).cloned().collect();
    check_columns(pipeline, &manifest.folder, table, &with_rows)?;
    let columns =
        columns::decide(pipeline, manifest.epoch, &manifest.folder, table, is_first_raw, &schemas)?;
    // Expressions may speak of columns that do not enter the table.
    let read = Arc::new(Schema::new(columns.read()));
    Ok((incoming_as(pipeline, manifest, files, (read, selection), permit), columns))
}

/// The rows of these files of the folder, read so.
pub(crate) fn incoming_as(
    pipeline: &Pipeline,
    manifest: &Manifest,
    files: Vec<SourceFile>,
    (columns, selection): (SchemaRef, Option<Selection>),
    permit: &Permit,
) -> Incoming {
    let content = &pipeline.content;
    let repairs = manifest.repairs.iter().map(|(file, rows)| {
        (
            file.clone(),
            rows.iter().filter_map(|(row, content)| Some((*row, content.clone()?))).collect(),
        )
    });
    let exact = [content.key.as_slice(), content.sequence_by.as_slice()].concat();
    let is_declared = |name: &str| content.declared.iter().any(|d| same_name(&d.name, name));
    let reading = Reading {
        key: content.key.clone(),
        partitions: content.partition_by.clone(),
        written: exact.iter().filter(|name| !is_declared(name)).cloned().collect(),
        exact,
        selection,
        columns,
        on_mismatch: content.on_mismatch,
        repairs: repairs.collect(),
        permit: permit.clone(),
    };
    Incoming::new(&manifest.folder, files, reading)
}

/// Content after the first takes back what the first said: without that in raw, nobody knows it.
async fn check_raw_has_it(
    workshop: &Workshop,
    pipeline: &Pipeline,
    wanted: &Wanted<'_>,
) -> Result<()> {
    if wanted.generation == 1 {
        return Ok(());
    }
    // Main first: what it has applied is then in this snapshot of raw, too, or was lost.
    let main = workshop.tables.open(&pipeline.main).await?;
    let raw = workshop.tables.open(&pipeline.raw).await?;
    let of = |table: Option<Table>| {
        table.map(|t| Markers::of_pipeline(&pipeline.id, t.transactions())).unwrap_or_default()
    };
    match Markers::joined(of(raw), of(main)).is_lost(wanted.epoch) {
        true => Err(raw::lost(pipeline, &[wanted.epoch])),
        false => Ok(()),
    }
}

async fn read_manifest(pipeline: &Pipeline, wanted: &Wanted<'_>) -> Result<Manifest> {
    let doing = || format!("read the manifest {} of {}", wanted.manifest, pipeline.state);
    let store = object_store_at(&pipeline.state)?;
    let path = object_store::path::Path::from(wanted.manifest);
    let body = match store.get(&path).await {
        Ok(found) => found.bytes().await.map_err(|e| foreign(doing(), &e))?,
        Err(object_store::Error::NotFound { .. }) => {
            // Deleted; or this worker looks at another storage than the coordinator.
            let text = format!("{}: it is not there", doing());
            return Err(Error::new(Code::StorageUnavailable, text)
                .with_help("does [storage] of every worker lead where the coordinator's does?"));
        }
        Err(error) => return Err(foreign(doing(), &error)),
    };
    if full_hash(&body) != wanted.manifest_hash {
        let text = format!("{}: its content is not what was published", doing());
        return Err(Error::new(Code::FolderChanged, text));
    }
    let manifest: Manifest = serde_json::from_slice(&body)
        .map_err(|e| Error::new(Code::ManifestInvalid, format!("{}: {e}", doing())))?;
    let is_asked_for = manifest.pipeline == pipeline.id
        && manifest.epoch == wanted.epoch
        && manifest.generation == wanted.generation;
    if !is_asked_for {
        let text = format!(
            "{}: it is of {} {}, generation {}",
            doing(),
            manifest.pipeline,
            manifest.epoch,
            manifest.generation
        );
        return Err(Error::new(Code::ManifestInvalid, text));
    }
    Ok(manifest)
}

/// Raw with all these columns, each as wide as it must be; what is new comes in commits of its own.
async fn prepare_table(
    workshop: &Workshop,
    pipeline: &Pipeline,
    present: Option<Table>,
    columns: &Columns,
    (epoch, permit): (Epoch, &Permit),
) -> Result<Table> {
    let mut table = match present {
        Some(table) => table,
        None => {
            let spec = || raw::spec(pipeline, &columns.table);
            workshop.tables.open_or_create(&pipeline.raw, spec).await?
        }
    };
    table.check_settings(pipeline)?;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        let missing = raw::missing_columns(&table.schema(), &columns.table);
        let narrow = narrower(&table.schema(), &columns.widened);
        if missing.is_empty() && narrow.is_empty() {
            check_types(&table, &columns.table)?;
            workshop.tables.remember(&table);
            return Ok(table);
        }
        let _turn = workshop.tables.turn(&pipeline.raw).await;
        let outcome = if missing.is_empty() {
            widen(&mut table, pipeline, &narrow, Some((epoch, permit))).await?
        } else {
            crash::point("schema.before_commit")?;
            let info =
                serde_json::json!({"pipeline": pipeline.id, "step": "schema", "epoch": epoch});
            table.add_columns(&missing, info).await?
        };
        match outcome {
            CommitOutcome::Landed => crash::point("schema.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => table.refresh().await?,
        }
    }
}

/// Another ingest may have added a column of the same name just now, with another type: then this one
/// is tried again, and its values are judged by that type.
fn check_types(table: &Table, columns: &[Field]) -> Result<()> {
    let schema = table.schema();
    for column in columns {
        let Some(at) = find_column(&schema, column.name()) else { continue };
        let held = schema.field(at).data_type();
        if !widens_to(column.data_type(), held) {
            let text = format!(
                "column {:?}: the files have {}, the table now has {held}",
                column.name(),
                column.data_type()
            );
            return Err(Error::new(Code::TableMovedOn, text));
        }
    }
    Ok(())
}

/// What raw says of each row of the epoch, beside the row.
fn own_values(wanted: &Wanted<'_>, workshop: &Workshop) -> Own {
    Own {
        generation: wanted.generation,
        at: workshop.clock.now().timestamp_micros(),
        epoch: wanted.epoch,
    }
}

/// Raw's own columns of an epoch's rows.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Own {
    generation: Generation,
    /// Microseconds since 1970.
    at: i64,
    epoch: Epoch,
}

impl Own {
    fn columns(self) -> [(&'static str, i64); 3] {
        [
            (raw::GENERATION, self.generation),
            (raw::INGESTED_AT, self.at),
            (raw::EPOCH, self.epoch.value()),
        ]
    }
}

/// Writes the rows that are content; the others are set aside.
pub(crate) async fn write_content(
    pipeline: &Pipeline,
    table: &Table,
    (incoming, judged): (&Incoming, &Judged),
    own: &Own,
    permit: &Permit,
) -> Result<(Written, AsideRef)> {
    let session = work_session(pipeline.sizes.memory_bytes);
    let aside = aside::new();
    incoming.register_with_came(&session, "incoming", &aside::new())?;
    judged.set_aside(&session, &aside).await?;
    // Read once with the aside: rows without a key go there.
    read_with(&session, incoming, judged, &aside).await?;
    permit.begin("reads the folder's rows", Amount::rows(incoming.rows()));
    if !incoming.has_content() {
        read_through(&session).await?;
        return Ok((Written::default(), aside));
    }
    let delete_when = judged.delete_when();
    let written = content_rows(&session, pipeline, table, delete_when, own, permit).await?;
    Ok((written, aside))
}

/// Keys that an earlier content of the epoch had, and this one has not, come to what was written.
async fn with_reverts(
    pipeline: &Pipeline,
    table: &Table,
    (incoming, judged): (&Incoming, &Judged),
    (mut written, aside): (Written, AsideRef),
    own: &Own,
    permit: &Permit,
) -> Result<Prepared> {
    let content_rows = written.rows;
    let previous = partition_paths(table, pipeline, own.epoch).await?;
    if !previous.is_empty() && !pipeline.content.key.is_empty() {
        // Read again only for the keys; what it refuses was kept by the first reading.
        let session = work_session(pipeline.sizes.memory_bytes);
        read_with(&session, incoming, judged, &aside::new()).await?;
        let columns = own.columns();
        let own = (own.epoch, columns.as_slice());
        let reverts = revert_rows(&session, pipeline, table, own, permit).await?;
        written.adds.extend(reverts.adds);
        written.rows += reverts.rows;
    }
    Ok(Prepared { written, content_rows, aside, previous, schema: table.schema() })
}

/// Registers `incoming`, which refuses into `aside`, and `accepted` over it.
async fn read_with(
    session: &SessionContext,
    incoming: &Incoming,
    judged: &Judged,
    aside: &AsideRef,
) -> Result<()> {
    session.deregister_table("incoming").map_err(|e| foreign("read the folder", &e))?;
    incoming.register(session, "incoming", aside)?;
    judged.register(session).await
}

/// The epoch's rows with their `_op`, sorted by key and then as the rule orders them.
async fn content_rows(
    session: &SessionContext,
    pipeline: &Pipeline,
    table: &Table,
    delete_when: Option<&str>,
    own: &Own,
    permit: &Permit,
) -> Result<Written> {
    let content = &pipeline.content;
    let own = own
        .columns()
        .into_iter()
        .map(|(n, value)| format!("CAST({value} AS BIGINT) AS {}", quoted(n)));
    let own = own.collect::<Vec<_>>().join(", ");
    let op = match delete_when {
        Some(condition) => {
            format!("CASE WHEN {condition} THEN '{}' ELSE '{}' END", raw::DELETE, raw::UPSERT)
        }
        None => format!("'{}'", raw::UPSERT),
    };
    let mut order = table_names(table, &content.key);
    order.extend(content.sequence_by.iter().map(|name| table_name(table, name)));
    order.extend([raw::FILE, raw::ROW].map(str::to_owned));
    let sql = format!("SELECT *, {op} AS {}, {own} FROM accepted", quoted(raw::OP));
    let sorted = sorted(session, &sql, &order, pipeline, permit).await?;
    let writer = FileWriter::of_runs(table, pipeline.sizes.target_file_bytes)?;
    let read = permit.meter.progress().done;
    permit.begin("writes raw", Amount::rows(read.rows));
    let permit = permit.clone();
    let rows = sorted.batches().map(move |batch| permit.counted(batch));
    writer.write_rows(futures::stream::iter(rows)).await
}

/// The rows of a query by these columns.
pub(crate) async fn sorted(
    session: &SessionContext,
    sql: &str,
    order: &[String],
    pipeline: &Pipeline,
    permit: &Permit,
) -> Result<Runs> {
    let doing = "sort the folder's rows";
    let frame = session.sql(sql).await.map_err(|e| foreign(doing, &e))?;
    let mut rows = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    let plan = Plan::new(&rows.schema(), order, pipeline.sizes.memory_bytes)?;
    let mut sorter = Sorter::new(&plan)?;
    while let Some(batch) = rows.next().await {
        sorter.push(permit.counted(batch.map_err(|e| foreign(doing, &e)))?)?;
    }
    sorter.finish()
}

/// A column's name as the table spells it.
pub(crate) fn table_name(table: &Table, column: &str) -> String {
    let schema = table.schema();
    find_column(&schema, column)
        .map_or_else(|| column.to_owned(), |at| schema.field(at).name().clone())
}

pub(crate) fn table_names(table: &Table, columns: &[String]) -> Vec<String> {
    columns.iter().map(|column| table_name(table, column)).collect()
}
