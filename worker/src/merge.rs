//! Merge: the content of a set of epochs enters main, in one commit with one marker each.
//!
//! ```text
//!  S = main's snapshot, R = raw's ─► which epochs need it? ─► one row per key (winners)
//!        ▲                                                        │
//!        │ lost                          files of S with such keys, rewritten without them;
//!        └──────────────────────────◄    winners beside them ─► commit for exactly S
//! ```
//! Copy-on-write: files without a key of the set stay as they are.

use std::collections::BTreeSet;
use std::time::Instant;

use alluvium_protocol::marker::{EpochMarker, Generation, Markers, epoch_app_id, floor_app_id};
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::array::AsArray;
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{DataType, Int64Type, Schema};
use alluvium_table::classify::foreign;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::pause::Pauses;
use alluvium_table::scan::FILE_COLUMN;
use alluvium_table::schema::{find_column, widens_to};
use alluvium_table::session::{quoted, quoted_list, work_session};
use alluvium_table::spool::Spool;
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{LiveFile, Table, TableSpec, query};

use crate::ingest::{COMMIT_PATIENCE, table_names};
use crate::tables::is_ours;
use crate::winners::{self, Rule, Scope};
use crate::{Permit, Workshop, raw};

/// Table property: the version an adopted table had; it is the base of the rule.
pub const BASE_VERSION: &str = "alluvium.base_version";

/// Files below this share of the target size are small.
pub const SMALL_FILE_DIVISOR: u64 = 4;

/// Carries out a merge task.
pub async fn merge(
    workshop: &Workshop,
    task: &Task,
    epochs: &[Epoch],
    permit: &Permit,
) -> Result<Report> {
    let pipeline = &task.pipeline;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    let mut conflicts = 0;
    let _turn = workshop.tables.turn(&pipeline.main).await;
    loop {
        permit.check()?;
        let attempt = Attempt::plan(workshop, task, epochs).await?;
        crash::point("merge.after_plan")?;
        if attempt.targets.is_empty() {
            return Ok(Report { conflicts, ..attempt.already() });
        }
        match attempt.carry_out(workshop, permit).await? {
            Ok(report) => return Ok(Report { conflicts, ..report }),
            Err(error) => {
                tracing::debug!(%error, table = pipeline.main, "lost a commit race");
                conflicts += 1;
                if !pauses.wait().await {
                    return Err(error);
                }
            }
        }
    }
}

/// One try: a snapshot of each table, and what to do on exactly these.
struct Attempt<'a> {
    task: &'a Task,
    main: Table,
    raw: Table,
    markers: Markers,
    asked: Vec<Epoch>,
    /// Epochs that need the merge, with the generation it will write.
    targets: Vec<(Epoch, Generation)>,
}

impl<'a> Attempt<'a> {
    async fn plan(workshop: &Workshop, task: &'a Task, epochs: &[Epoch]) -> Result<Self> {
        let pipeline = &task.pipeline;
        let main = prepare_main(workshop, task).await?;
        // After main's snapshot: what S has applied is in this snapshot of raw, too.
        let raw = open_raw(workshop, pipeline).await?;
        let markers = Markers::joined(
            Markers::of_pipeline(&pipeline.id, raw.transactions()),
            Markers::of_pipeline(&pipeline.id, main.transactions()),
        );
        let targets = epochs
            .iter()
            .filter(|epoch| markers.needs_merge(**epoch) && !markers.is_settled(**epoch))
            .map(|epoch| (*epoch, markers.merge_target(*epoch)))
            .collect();
        Ok(Self { task, main, raw, markers, asked: epochs.to_vec(), targets })
    }

    fn already(&self) -> Report {
        let generations = self
            .asked
            .iter()
            .filter(|epoch| self.markers.is_applied(**epoch))
            .map(|epoch| (*epoch, self.markers.merge[epoch]))
            .collect();
        Report {
            already: true,
            generations,
            main_version: Some(self.main.version()),
            ..Report::default()
        }
    }

    /// All epochs lie above every applied one and take nothing back.
    fn is_fast(&self) -> bool {
        let applied = self.markers.applied();
        let highest = applied.last().copied().max(self.markers.floor);
        self.targets.iter().all(|(epoch, generation)| {
            *generation == 1 && highest.is_none_or(|highest| *epoch > highest)
        })
    }

    async fn raw_files(&self, epochs: &BTreeSet<Epoch>) -> Result<Vec<LiveFile>> {
        let values: BTreeSet<String> = epochs.iter().map(Epoch::to_string).collect();
        let is_wanted = |value: &Option<String>| value.as_ref().is_some_and(|v| values.contains(v));
        self.raw.files_where(|partition| partition.get(raw::EPOCH).is_some_and(is_wanted)).await
    }

    /// Computes, writes and commits. Inner error: the commit is not known to have landed.
    async fn carry_out(
        mut self,
        workshop: &Workshop,
        permit: &Permit,
    ) -> Result<Result<Report, Error>> {
        let started = Instant::now();
        let pipeline = &self.task.pipeline;
        let session = work_session(pipeline.sizes.memory_bytes);
        let rule = Rule::new(pipeline, &self.raw);
        let epochs: BTreeSet<Epoch> = self.targets.iter().map(|(epoch, _)| *epoch).collect();
        let changed = self.raw_files(&epochs).await?;
        let rows_read = changed.iter().filter_map(|file| file.rows).sum();
        let is_fast = self.is_fast();

        let mut edit = Edit::default();
        if !changed.is_empty() {
            self.raw.register(&session, "changes", Some(&paths(&changed)), false).await?;
            let scope = self.scope(&session, is_fast, &epochs).await?;
            let spool = winners::compute(&session, &rule, &scope).await?;
            edit.keys = spool.rows() as u64;
            spool.register(&session, "winners")?;
            edit.find_touched(&session, &self.main, &rule).await?;
            permit.check()?;
            edit.write(&session, &self.main, &rule, pipeline.sizes.target_file_bytes).await?;
        }
        crash::point("merge.after_write")?;
        permit.check()?;

        check_age(started, pipeline)?;
        let report = self.report(&edit, rows_read, !is_fast);
        let change = self.change(&edit, &report);
        crash::point("merge.before_commit")?;
        match self.main.commit(change).await? {
            CommitOutcome::Lost(error) => return Ok(Err(error)),
            CommitOutcome::Landed => {}
        }
        crash::point("merge.after_commit")?;
        workshop.tables.remember(&self.main);
        if let Err(error) = self.main.checkpoint_if_due().await {
            tracing::warn!(%error, "no checkpoint; the next one makes up for it");
        }
        let (main_files, main_small_files) = count_files(&self.main, pipeline).await?;
        let main_version = Some(self.main.version());
        Ok(Ok(Report { main_version, main_files, main_small_files, ..report }))
    }

    async fn scope(
        &self,
        session: &SessionContext,
        is_fast: bool,
        epochs: &BTreeSet<Epoch>,
    ) -> Result<Scope> {
        if is_fast {
            return Ok(Scope::Fast);
        }
        let mut all = self.markers.applied();
        self.check_raw_is_whole(&all)?;
        all.extend(epochs);
        let files = self.raw_files(&all).await?;
        self.raw.register(session, "applied", Some(&paths(&files)), false).await?;
        let base = self.main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
        let Some(version) = base else { return Ok(Scope::Reconcile { has_base: false }) };
        let base = Table::open_at(self.main.uri(), Some(version)).await?;
        let base = base.ok_or_else(|| Error::internal("the base version is gone"))?;
        base.register(session, "base_version", None, false).await?;
        register_with_columns(session, &base, &self.raw).await?;
        Ok(Scope::Reconcile { has_base: true })
    }

    /// Without the older epochs' rows a late epoch's values would overwrite newer ones.
    fn check_raw_is_whole(&self, applied: &BTreeSet<Epoch>) -> Result<()> {
        let lost: Vec<Epoch> =
            applied.iter().filter(|epoch| self.markers.is_lost(**epoch)).copied().collect();
        if lost.is_empty() { Ok(()) } else { Err(raw::lost(&self.task.pipeline, &lost)) }
    }

    fn report(&self, edit: &Edit, rows_read: u64, reconciled: bool) -> Report {
        // What was asked for and is applied already is done, too.
        let mut generations = self.already().generations;
        generations.retain(|(epoch, _)| self.targets.iter().all(|(target, _)| target != epoch));
        generations.extend(&self.targets);
        Report {
            generations,
            raw_version: Some(self.raw.version()),
            rows_read,
            rows_written: edit.written.rows,
            rows_superseded: u64::saturating_sub(rows_read, edit.keys),
            rows_inserted: edit.upserts.saturating_sub(edit.updated),
            rows_updated: edit.updated,
            rows_deleted: edit.hits.saturating_sub(edit.updated),
            files_added: edit.written.adds.len() as u64,
            files_removed: edit.touched.len() as u64,
            bytes_written: alluvium_table::bytes_of(&edit.written.adds),
            reconciled,
            ..Report::default()
        }
    }

    fn change(&self, edit: &Edit, report: &Report) -> Change {
        let pipeline = &self.task.pipeline;
        let markers = self
            .targets
            .iter()
            .map(|(epoch, generation)| Marker {
                app_id: epoch_app_id(&pipeline.id, *epoch, EpochMarker::Merge),
                version: *generation,
            })
            .collect();
        let epochs: Vec<_> = self
            .targets
            .iter()
            .map(
                |(epoch, generation)| serde_json::json!({"epoch": epoch, "generation": generation}),
            )
            .collect();
        Change {
            operation: Operation::Merge,
            adds: edit.written.adds.clone(),
            removes: edit.touched.iter().map(|file| file.remove.clone()).collect(),
            others: Vec::new(),
            markers,
            info: serde_json::json!({
                "pipeline": pipeline.id,
                "step": "merge",
                "task": self.task.id,
                "attempt": self.task.attempt,
                "epochs": epochs,
                "raw_version": self.raw.version(),
                "configuration": pipeline.hash(),
                "reconciled": report.reconciled,
                "rows_inserted": report.rows_inserted,
                "rows_updated": report.rows_updated,
                "rows_deleted": report.rows_deleted,
            }),
        }
    }
}

/// No commit names a file whose writing began so long ago that a cleanup might take it for an orphan.
pub(crate) fn check_age(started: Instant, pipeline: &Pipeline) -> Result<()> {
    if started.elapsed() > pipeline.sizes.vacuum_retention / 4 {
        let text = format!("{}: a quarter of the retention passed while writing", pipeline.main);
        return Err(Error::new(Code::TableMovedOn, text));
    }
    Ok(())
}

fn paths(files: &[LiveFile]) -> Vec<String> {
    files.iter().map(|file| file.path.clone()).collect()
}

/// Data files of main, and the small ones among them.
pub async fn count_files(main: &Table, pipeline: &Pipeline) -> Result<(u64, u64)> {
    let files = main.files().await?;
    let limit = pipeline.sizes.target_file_bytes / SMALL_FILE_DIVISOR;
    let small = files.iter().filter(|file| file.size < limit).count();
    Ok((files.len() as u64, small as u64))
}

async fn open_raw(workshop: &Workshop, pipeline: &Pipeline) -> Result<Table> {
    let raw = workshop.tables.open(&pipeline.raw).await?;
    let raw = raw.ok_or_else(|| {
        Error::new(Code::NotPossibleNow, format!("there is no raw table at {}", pipeline.raw))
    })?;
    raw.check_settings(pipeline)?;
    Ok(raw)
}

/// Main with all of raw's data columns: created, adopted or evolved, each in a commit of its own.
async fn prepare_main(workshop: &Workshop, task: &Task) -> Result<Table> {
    let pipeline = &task.pipeline;
    let raw = open_raw(workshop, pipeline).await?;
    let data = raw::data_fields(&raw.schema());
    let spec = || TableSpec {
        schema: std::sync::Arc::new(Schema::new(data.clone())),
        partition_by: Vec::new(),
        properties: pipeline
            .content_properties()
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec(),
    };
    if pipeline.adopt && workshop.tables.open(&pipeline.main).await?.is_none() {
        return Err(Table::nothing_to_adopt(pipeline));
    }
    let mut main = workshop.tables.open_or_create(&pipeline.main, spec).await?;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        main.check_settings(pipeline)?;
        let missing = raw::missing_columns(&main.schema(), &data);
        let outcome = if !is_ours(&main) {
            adopt(&mut main, &raw, pipeline).await?
        } else if !missing.is_empty() {
            crash::point("schema.before_commit")?;
            main.add_columns(&missing).await?
        } else {
            workshop.tables.remember(&main);
            return Ok(main);
        };
        match outcome {
            CommitOutcome::Landed => crash::point("schema.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => main.refresh().await?,
        }
    }
}

/// Makes an existing table the base: its properties say so, and the floor settles older epochs.
async fn adopt(main: &mut Table, raw: &Table, pipeline: &Pipeline) -> Result<CommitOutcome> {
    if !pipeline.adopt {
        return Err(Table::not_ours(pipeline));
    }
    check_adoptable(main, raw, pipeline).await?;
    let mut properties: Vec<(String, String)> =
        pipeline.content_properties().map(|(name, value)| (name.to_owned(), value)).to_vec();
    properties.push((BASE_VERSION.to_owned(), main.version().to_string()));
    let floor = pipeline.start_from.map(|start| start - 1).filter(|floor| *floor >= 0);
    let markers = floor
        .map(|version| Marker { app_id: floor_app_id(&pipeline.id), version })
        .into_iter()
        .collect();
    let others = vec![main.set_properties(&properties)?];
    main.commit(Change {
        operation: Operation::Merge,
        adds: Vec::new(),
        removes: Vec::new(),
        others,
        markers,
        info: serde_json::json!({"pipeline": pipeline.id, "step": "adopt"}),
    })
    .await
}

/// A base must have the key, once per row, and nothing that raw could not give back.
async fn check_adoptable(main: &Table, raw: &Table, pipeline: &Pipeline) -> Result<()> {
    let (schema, held) = (main.schema(), raw.schema());
    for key in &pipeline.content.key {
        if find_column(&schema, key).is_none() {
            let text = format!("{} has no key column {key:?}: it cannot be adopted", main.uri());
            return Err(Error::new(Code::KeyColumnMissing, text));
        }
    }
    for field in schema.fields() {
        if raw::OWN.contains(&field.name().to_lowercase().as_str()) {
            let text = format!("{}: the column {:?} has a reserved name", main.uri(), field.name());
            return Err(Error::new(Code::ReservedColumn, text));
        }
        let at = find_column(&held, field.name());
        if at.is_none_or(|at| !widens_to(held.field(at).data_type(), field.data_type())) {
            let text = format!(
                "{} was begun without column {:?} of {}, or with another type",
                raw.uri(),
                field.name(),
                main.uri()
            );
            return Err(Error::new(Code::ColumnTypeMismatch, text)
                .with_help("move raw's folder away, then `alluvium run --once`"));
        }
    }
    let doing = || format!("look for keys that {} holds twice", main.uri());
    let session = work_session(pipeline.sizes.memory_bytes);
    main.register(&session, "main", None, false).await?;
    let names = table_names(main, &pipeline.content.key);
    let key = quoted_list(names.iter().map(String::as_str));
    let sql = format!("SELECT {key} FROM main GROUP BY {key} HAVING count(*) > 1 LIMIT 1");
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing(), &e))?;
    let twice = frame.collect().await.map_err(|e| foreign(doing(), &e))?;
    match query::to_json(&twice)?.first() {
        Some(row) => {
            let text = format!("{} holds a key more than once: {row}", main.uri());
            Err(Error::new(Code::TableNotOurs, text)
                .with_help("leave one row of each key in it, or choose other `key` columns"))
        }
        None => Ok(()),
    }
}

/// The base, with a NULL for each of raw's data columns that it lacks.
async fn register_with_columns(session: &SessionContext, base: &Table, raw: &Table) -> Result<()> {
    let doing = "read the base version";
    let schema = base.schema();
    let columns: Vec<String> = raw::data_fields(&raw.schema())
        .iter()
        .map(|field| match find_column(&schema, field.name()) {
            Some(at) => {
                format!("{} AS {}", quoted(schema.field(at).name()), quoted(field.name()))
            }
            None => format!("NULL AS {}", quoted(field.name())),
        })
        .collect();
    let sql = format!("SELECT {} FROM base_version", columns.join(", "));
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    session.register_table("base", frame.into_view()).map_err(|e| foreign(doing, &e))?;
    Ok(())
}

/// What happens to main's files.
#[derive(Default)]
struct Edit {
    /// Keys in question.
    keys: u64,
    /// Rows that come.
    upserts: u64,
    /// Rows of main that go.
    hits: u64,
    /// Rows of main that go and come again.
    updated: u64,
    /// Files with rows that go.
    touched: Vec<LiveFile>,
    /// Rows in those files that stay are written again, beside the ones that come.
    written: Written,
}

impl Edit {
    async fn find_touched(
        &mut self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
    ) -> Result<()> {
        let doing = "find the files with keys of the epochs";
        let op = quoted(raw::OP);
        let count = format!("SELECT count(*) FROM winners WHERE {op} = '{}'", raw::UPSERT);
        let frame = session.sql(&count).await.map_err(|e| foreign(doing, &e))?;
        let batches = frame.collect().await.map_err(|e| foreign(doing, &e))?;
        let counts = batches.first().map(|batch| batch.column(0).as_primitive::<Int64Type>());
        self.upserts = counts.map_or(0, |counts| counts.value(0).unsigned_abs());
        let live = main.files().await?;
        if live.is_empty() {
            return Ok(());
        }
        main.register(session, "main", None, true).await?;
        let file = quoted(FILE_COLUMN);
        let sql = format!(
            "SELECT CAST(m.{file} AS VARCHAR), count(*), \
             count(CASE WHEN w.{op} = '{upsert}' THEN 1 END) \
             FROM winners w JOIN main m ON {same} GROUP BY m.{file}",
            upsert = raw::UPSERT,
            same = rule.keys_equal("w", "m"),
        );
        let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        let batches = frame.collect().await.map_err(|e| foreign(doing, &e))?;
        let mut urls = BTreeSet::new();
        for batch in &batches {
            let files = cast(batch.column(0), &DataType::Utf8).map_err(Error::internal)?;
            let hits = batch.column(1).as_primitive::<Int64Type>();
            let updated = batch.column(2).as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                urls.insert(files.as_string::<i32>().value(row).to_owned());
                self.hits += hits.value(row).unsigned_abs();
                self.updated += updated.value(row).unsigned_abs();
            }
        }
        let found = urls.len();
        self.touched = live.into_iter().filter(|file| main.is_file_url(file, &urls)).collect();
        if self.touched.len() != found {
            return Err(Error::internal(format!("{found} touched files, not all in the log")));
        }
        Ok(())
    }

    async fn write(
        &mut self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
        target_file_bytes: u64,
    ) -> Result<()> {
        let doing = "compute main's new rows";
        let columns = rule.column_list();
        let mut sql =
            format!("SELECT {columns} FROM winners WHERE {} = '{}'", quoted(raw::OP), raw::UPSERT);
        if !self.touched.is_empty() {
            self.keep_untouched(session, main, rule).await?;
            sql = format!(
                "SELECT * FROM kept UNION ALL SELECT {} FROM winners WHERE {} = '{}'",
                padded_columns(main, rule),
                quoted(raw::OP),
                raw::UPSERT
            );
        }
        let sql = format!("SELECT * FROM ({sql}) ORDER BY {}", rule.key_list());
        let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
        self.written = FileWriter::new(main, target_file_bytes)?.write_all(stream).await?;
        self.check_counts()
    }

    /// The touched files' rows whose keys the epochs do not speak of, as table `kept`. A step of its
    /// own: the join's memory is free again before the sort takes all there is. The side that a hash
    /// join holds in memory is its left one: the epochs' keys, never main's rows.
    async fn keep_untouched(
        &self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
    ) -> Result<()> {
        let doing = "find main's rows that stay";
        main.register(session, "touched", Some(&paths(&self.touched)), false).await?;
        let schema = main.schema();
        let all: Vec<String> = schema.fields().iter().map(|f| quoted(f.name())).collect();
        let sql = format!(
            "SELECT {all} FROM winners w RIGHT ANTI JOIN touched t ON {same}",
            all = all.join(", "),
            same = rule.keys_equal("t", "w"),
        );
        let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
        Spool::collect(stream, doing).await?.register(session, "kept")
    }

    /// What was written is what stayed and what came; anything else is a bug that must not land.
    fn check_counts(&self) -> Result<()> {
        let Some(before) = self.touched.iter().map(|file| file.live_rows()).sum::<Option<u64>>()
        else {
            return Ok(());
        };
        let expected = before - self.hits + self.upserts;
        if self.written.rows != expected {
            let text = format!("{} rows written, {expected} expected", self.written.rows);
            return Err(Error::internal(text));
        }
        Ok(())
    }
}

/// Main's columns out of the winners: an adopted table may have more than raw.
fn padded_columns(main: &Table, rule: &Rule) -> String {
    let columns: Vec<String> = main
        .schema()
        .fields()
        .iter()
        .map(|field| {
            let known = rule.columns.iter().find(|c| c.eq_ignore_ascii_case(field.name()));
            match known {
                Some(column) => format!("{} AS {}", quoted(column), quoted(field.name())),
                None => format!("NULL AS {}", quoted(field.name())),
            }
        })
        .collect();
    columns.join(", ")
}
