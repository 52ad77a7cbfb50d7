//! Ingest: one epoch's folder becomes raw's partition `_epoch = e`, whole, with its marker.
//!
//! ```text
//!  marker there? ─► manifest ─► footers, columns ─► rows sorted by key ─► files in raw's folder
//!                                                        └─► refused rows ─► quarantine's commit
//!  raw's commit: remove all of the partition, add the files, marker; again until it landed
//! ```

use std::time::{Duration, Instant};

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::{Generation, Markers};
use alluvium_protocol::pipeline::{NewColumns, full_hash};
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::Table;
use alluvium_table::arrow::datatypes::Field;
use alluvium_table::classify::foreign;
use alluvium_table::commit::CommitOutcome;
use alluvium_table::datafusion::dataframe::DataFrame;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::pause::Pauses;
use alluvium_table::schema::{find_column, widens_to};
use alluvium_table::session::{quoted, quoted_list, work_session};
use alluvium_table::store::object_store_at;
use alluvium_table::write::{FileWriter, Written};
use object_store::ObjectStoreExt;

use crate::checks::{agree, read_back};
use crate::incoming::{AsideRef, Incoming, first_error};
use crate::raw_commit::{Prepared, RawCommit, already, partition_paths};
use crate::refusals::{Judged, judge};
use crate::source::SourceFile;
use crate::{Permit, Workshop, quarantine, raw};

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
    let files = SourceFile::open_all(&pipeline.source, &manifest).await?;
    check_columns(pipeline, &manifest, &files)?;
    check_raw_has_it(workshop, pipeline, wanted).await?;
    let schema = match &present {
        Some(raw) => Some(raw.schema()),
        // Main was there before raw: its columns and their types stand.
        None => workshop.tables.open(&pipeline.main).await?.map(|main| main.schema()),
    };
    let mut columns = raw::union_columns(schema.as_ref(), &files, wanted.epoch)?;
    // Tables without data columns were made by an epoch without rows: this one says which there are.
    let known = schema.as_ref().map(|schema| raw::data_fields(schema).len());
    let known = known.filter(|known| *known > 0).unwrap_or(columns.len());
    let is_first_raw = present.is_none();
    let (needed, new): (Vec<Field>, Vec<Field>) =
        columns.split_off(known).into_iter().partition(|column| {
            // The rule needs these, also where no earlier file gave them a type; and main, which may be
            // older than raw, never has what is ignored.
            let of_rule = pipeline.content.key.iter().chain(&pipeline.content.sequence_by);
            of_rule.into_iter().any(|name| name.eq_ignore_ascii_case(column.name()))
                || (is_first_raw && pipeline.is_ignored(column.name()))
        });
    columns.extend(needed);
    match pipeline.content.new_columns {
        NewColumns::Evolve => columns.extend(new.iter().cloned()),
        NewColumns::Fail if !new.is_empty() => {
            return Err(new_columns(pipeline, &manifest.folder, &names_of(&new)));
        }
        NewColumns::Freeze | NewColumns::Fail => {}
    }
    let left_out = match pipeline.content.new_columns {
        NewColumns::Freeze => new,
        NewColumns::Evolve | NewColumns::Fail => Vec::new(),
    };
    crash::point("ingest.after_read")?;
    permit.check()?;

    let exact = [pipeline.content.key.as_slice(), pipeline.content.sequence_by.as_slice()].concat();
    // Expressions may speak of columns that do not enter the table.
    let read = [columns.as_slice(), left_out.as_slice()].concat();
    let void = raw::void_columns(&read, &files);
    let all = [read.as_slice(), void.as_slice()].concat();
    let incoming = Incoming::new(&manifest.folder, files, &pipeline.content.key, exact, all);
    let judged = judge(pipeline, &incoming).await?;
    let table = prepare_table(workshop, pipeline, present, &columns).await?;
    let prepared = write_files(workshop, task, wanted, &table, &incoming, &judged).await?;
    crash::point("ingest.after_write")?;
    permit.check()?;

    let refused = {
        let mut aside = prepared.aside.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        aside.take()
    };
    let now = workshop.clock.now();
    let rows_quarantined = quarantine::replace(
        &workshop.tables,
        pipeline,
        wanted.epoch,
        wanted.generation,
        refused,
        now,
    )
    .await?;
    let kept = prepared.content_rows + rows_quarantined;
    let what = "rows of the folder, in raw or quarantine";
    agree("ingest", what, incoming.rows(), kept, &pipeline.raw)?;
    let written = &prepared.written;
    read_back("ingest.files", &table, &written.adds, written.rows).await?;
    let report = Report {
        generations: vec![(wanted.epoch, wanted.generation)],
        empty: manifest.reason.is_empty_content().then_some(wanted.epoch).into_iter().collect(),
        rows_read: incoming.rows(),
        rows_written: prepared.written.rows,
        rows_quarantined,
        expectations: judged.failed,
        columns_left_out: names_of(&left_out),
        files_added: prepared.written.adds.len() as u64,
        bytes_written: alluvium_table::bytes_of(&prepared.written.adds),
        ..Report::default()
    };
    let age_max = pipeline.sizes.vacuum_retention / 4;
    let commit = RawCommit { workshop, task, wanted, manifest: &manifest, started, age_max };
    commit.land(table, prepared, report, permit).await
}

fn names_of(columns: &[Field]) -> Vec<String> {
    columns.iter().map(|field| field.name().clone()).collect()
}

fn new_columns(pipeline: &Pipeline, folder: &str, names: &[String]) -> Error {
    let text =
        format!("{folder} has columns that {} does not have: {}", pipeline.raw, names.join(", "));
    let help = format!(
        "set `schema` of pipeline.{} to \"evolve\" or \"freeze\", then `alluvium retry`",
        pipeline.id
    );
    Error::new(Code::NewColumn, text).with_help(help)
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

/// Key columns must be in every file; the sequence column in at least one.
fn check_columns(pipeline: &Pipeline, manifest: &Manifest, files: &[SourceFile]) -> Result<()> {
    for file in files {
        for key in &pipeline.content.key {
            if find_column(&file.schema, key).is_none() {
                let names: Vec<&str> =
                    file.schema.fields().iter().map(|f| f.name().as_str()).take(20).collect();
                let text = format!(
                    "{}/{} has no key column {key:?}; it has {}",
                    manifest.folder,
                    file.name,
                    names.join(", ")
                );
                let help = format!(
                    "deliver the folder with the column, or set `key` of pipeline.{}",
                    pipeline.id
                );
                return Err(Error::new(Code::KeyColumnMissing, text).with_help(help));
            }
        }
    }
    let Some(sequence) = &pipeline.content.sequence_by else { return Ok(()) };
    let is_missing = files.iter().all(|file| find_column(&file.schema, sequence).is_none());
    if is_missing && !files.is_empty() {
        let text = format!("no file of {} has the column {sequence:?}", manifest.folder);
        let help = format!("set `sequence_by` of pipeline.{}", pipeline.id);
        return Err(Error::new(Code::SequenceColumnMissing, text).with_help(help));
    }
    Ok(())
}

/// Raw with all these columns; new ones are added in a commit of their own.
async fn prepare_table(
    workshop: &Workshop,
    pipeline: &Pipeline,
    present: Option<Table>,
    columns: &[Field],
) -> Result<Table> {
    let mut table = match present {
        Some(table) => table,
        None => {
            let spec = || raw::spec(pipeline, columns);
            workshop.tables.open_or_create(&pipeline.raw, spec).await?
        }
    };
    table.check_settings(pipeline)?;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        let missing = raw::missing_columns(&table.schema(), columns);
        if missing.is_empty() {
            check_types(&table, columns)?;
            workshop.tables.remember(&table);
            return Ok(table);
        }
        let _turn = workshop.tables.turn(&pipeline.raw).await;
        crash::point("schema.before_commit")?;
        match table.add_columns(&missing).await? {
            CommitOutcome::Landed => crash::point("schema.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => table.refresh().await?,
        }
    }
}

/// Another ingest may have added a column of the same name just now, with another type.
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
            return Err(Error::new(Code::ColumnTypeMismatch, text));
        }
    }
    Ok(())
}

async fn write_files(
    workshop: &Workshop,
    task: &Task,
    wanted: &Wanted<'_>,
    table: &Table,
    incoming: &Incoming,
    judged: &Judged,
) -> Result<Prepared> {
    let pipeline = &task.pipeline;
    let session = work_session(pipeline.sizes.memory_bytes);
    let aside = incoming.aside();
    let unheeded = incoming.aside();
    incoming.register(&session, "incoming", &unheeded)?;
    let kept = judged.set_aside(pipeline, &session, &aside).await;
    kept.map_err(|error| first_error(&unheeded, error))?;
    // Read once with the aside: rows without a key go there.
    read_with(&session, incoming, judged, &aside).await?;
    let now = workshop.clock.now().timestamp_micros();
    let own = format!(
        "CAST({} AS BIGINT) AS {}, CAST({now} AS BIGINT) AS {}, CAST({} AS BIGINT) AS {}",
        wanted.generation,
        quoted(raw::GENERATION),
        quoted(raw::INGESTED_AT),
        wanted.epoch,
        quoted(raw::EPOCH),
    );
    // Empty content by request: there are no rows, and perhaps no columns to speak of.
    let mut written = match incoming.rows() {
        0 => Written::default(),
        _ => content_rows(&session, pipeline, table, &own, &aside).await?,
    };
    let content_rows = written.rows;
    let previous = partition_paths(table, pipeline, wanted.epoch).await?;
    if !previous.is_empty() {
        // Read again only for the keys; what it refuses was kept by the first reading.
        let unheeded = incoming.aside();
        read_with(&session, incoming, judged, &unheeded).await?;
        table.register(&session, "previous", Some(&previous), false).await?;
        let reverts = revert_rows(&session, pipeline, table, &own, &unheeded).await?;
        written.adds.extend(reverts.adds);
        written.rows += reverts.rows;
    }
    Ok(Prepared { written, content_rows, aside, previous })
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
    own: &str,
    aside: &AsideRef,
) -> Result<Written> {
    let content = &pipeline.content;
    let op = match &content.delete_when {
        Some(condition) => {
            format!("CASE WHEN ({condition}) THEN '{}' ELSE '{}' END", raw::DELETE, raw::UPSERT)
        }
        None => format!("'{}'", raw::UPSERT),
    };
    let key = quoted_list(table_names(table, &content.key).iter().map(String::as_str));
    let sequence = match &content.sequence_by {
        Some(column) => format!("{} ASC NULLS FIRST, ", quoted(&table_name(table, column))),
        None => String::new(),
    };
    let place = quoted_list([raw::FILE, raw::ROW]);
    let sql = format!(
        "SELECT *, {op} AS {}, {own} FROM accepted ORDER BY {key}, {sequence}{place}",
        quoted(raw::OP)
    );
    let doing = "sort the folder's rows";
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    write_rows(frame, doing, pipeline, table, aside).await
}

/// A revert row for each key of the previous content that the new one lacks.
async fn revert_rows(
    session: &SessionContext,
    pipeline: &Pipeline,
    table: &Table,
    own: &str,
    aside: &AsideRef,
) -> Result<Written> {
    let names = table_names(table, &pipeline.content.key);
    let key = quoted_list(names.iter().map(String::as_str));
    let on: Vec<String> = names.iter().map(|n| format!("p.{0} = i.{0}", quoted(n))).collect();
    let sql = format!(
        "SELECT p.*, '{revert}' AS {op}, '' AS {file}, CAST(0 AS BIGINT) AS {row}, {own} \
         FROM (SELECT DISTINCT {key} FROM previous) p \
         LEFT ANTI JOIN accepted i ON {on} ORDER BY {key}",
        revert = raw::REVERT,
        op = quoted(raw::OP),
        file = quoted(raw::FILE),
        row = quoted(raw::ROW),
        on = on.join(" AND "),
    );
    let doing = "find the keys that vanished";
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    write_rows(frame, doing, pipeline, table, aside).await
}

async fn write_rows(
    frame: DataFrame,
    doing: &str,
    pipeline: &Pipeline,
    table: &Table,
    aside: &AsideRef,
) -> Result<Written> {
    let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    let writer = FileWriter::new(table, pipeline.sizes.target_file_bytes)?;
    writer.write_all(stream).await.map_err(|error| first_error(aside, error))
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
