//! Merge: the content of a set of epochs enters main, in one commit with one marker each.
//!
//! ```text
//!  S = main's snapshot, R = raw's ─► which epochs need it? ─► one row per key (winners)
//!        ▲                                                        │
//!        │ lost                          rows of S with such keys go, winners come
//!        └──────────────────────────◄       ─► commit for exactly S
//! ```

use std::collections::BTreeSet;
use std::time::Instant;

use alluvium_protocol::marker::{
    EpochMarker, Generation, Markers, epoch_app_id, floor_app_id, hold_app_id,
};
use alluvium_protocol::pipeline::{DeletionVectors, Mode};
use alluvium_protocol::task::{MainFiles, Report, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema};
use alluvium_table::classify::foreign;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::pause::Pauses;
use alluvium_table::schema::{find_column, widens_to};
use alluvium_table::session::{quoted_list, work_session};
use alluvium_table::upkeep::{health, policy};
use alluvium_table::{Action, CHANGE_FEED, DELETION_VECTORS, LiveFile, Table, TableSpec, query};

use crate::checks::{agree, read_back};
use crate::edit::Edit;
use crate::folding::Fold;
use crate::ingest::{COMMIT_PATIENCE, table_names};
use crate::shards::of_merge::in_pieces;
use crate::tables::is_ours;
use crate::widening::{narrower, widen};
use crate::{Permit, Workshop, raw};

/// Table property: the version an adopted table had; it is the base of the rule.
pub const BASE_VERSION: &str = "alluvium.base_version";

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
        if attempt.markers.is_held() {
            // Paused, or rolled back, after the task went out.
            return Ok(Report { conflicts, held: true, ..attempt.already() });
        }
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
        let mut raw = open_raw(workshop, pipeline).await?;
        let main = loop {
            let main = prepare_main(workshop, pipeline, &raw).await?;
            // After main's snapshot: what S has applied is in this snapshot of raw, too.
            raw = open_raw(workshop, pipeline).await?;
            // An epoch that came again meanwhile may have brought columns, or wider types.
            let data = data_of(pipeline, &raw);
            if raw::missing_columns(&main.schema(), &data).is_empty()
                && narrower(&main.schema(), &data).is_empty()
            {
                break main;
            }
        };
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

    /// All epochs lie above every applied one and take nothing back: at its first content an epoch
    /// has no revert rows, and a rollback left none of it in main.
    fn is_fast(&self) -> bool {
        let applied = self.markers.applied();
        let highest = applied.last().copied().max(self.markers.floor);
        self.targets.iter().all(|(epoch, _)| {
            let is_first = self.markers.ingest.get(epoch) == Some(&1);
            is_first && highest.is_none_or(|highest| *epoch > highest)
        })
    }

    /// Computes, writes and commits. Inner error: the commit is not known to have landed.
    async fn carry_out(
        mut self,
        workshop: &Workshop,
        permit: &Permit,
    ) -> Result<Result<Report, Error>> {
        let started = Instant::now();
        let pipeline = &self.task.pipeline;
        let epochs: BTreeSet<Epoch> = self.targets.iter().map(|(epoch, _)| *epoch).collect();
        let changed = raw::files_of(&self.raw, &epochs).await?;
        let rows_read = changed.iter().filter_map(|file| file.rows).sum();
        let is_fast = self.is_fast();
        let mut applied = self.markers.applied();
        let needs_all = match pipeline.content.mode {
            Mode::Append => false,
            Mode::Upsert | Mode::Snapshot => !is_fast,
            Mode::Scd2 => true,
        };
        if needs_all {
            self.check_raw_is_whole(&applied)?;
        }
        applied.extend(&epochs);
        let (main, raw) = (&self.main, &self.raw);
        let fold = Fold { pipeline, main, raw, changed: &epochs, applied: &applied, is_fast };
        let done = in_pieces(workshop, self.task, (&fold, &changed), permit).await?;
        let (edit, pieces) = match done {
            Some(done) => done,
            None => (fold.edit(permit).await?, 0),
        };
        crash::point("merge.after_write")?;
        permit.check()?;
        read_back("merge.files", &self.main, &edit.written.adds, edit.written.rows).await?;

        edit.check_counts(self.main.uri())?;

        check_age(started, pipeline)?;
        let report = Report { pieces, ..self.report(&edit, rows_read, !is_fast) };
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
        let main = match self.check_main(&edit).await {
            Err(error) if error.code == Code::CountsDisagree => {
                // It is in main already: nothing more goes in until somebody looked.
                if let Err(failed) = hold(&mut self.main, pipeline).await {
                    tracing::error!(%failed, "the pipeline is not paused, and should be");
                }
                return Err(error.with_help(format!(
                    "nothing more is merged: look at {}, then `alluvium resume {}`",
                    pipeline.main, pipeline.id
                )));
            }
            checked => checked?,
        };
        let main_version = Some(self.main.version());
        Ok(Ok(Report { main_version, main, ..report }))
    }

    /// Main, read back after its commit, gained and lost what was counted. Its files.
    async fn check_main(&self, edit: &Edit) -> Result<MainFiles> {
        let files = self.main.files().await?;
        let rows = files.iter().map(LiveFile::live_rows).sum::<Option<u64>>();
        // Without edits nothing was counted; an adopted table may have files without statistics.
        if let (Some(expected), Some(rows)) = (edit.rows_after(), rows) {
            agree("merge.landed", "rows of main, read back", expected, rows, self.main.uri())?;
        }
        Ok(health(files, policy(&self.task.pipeline), None).counts())
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
            files_removed: edit.files_removed(),
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
            adds: edit.adds(),
            removes: edit.removes(),
            others: edit.feed.clone(),
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
                "pieces": report.pieces,
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

/// Pauses the pipeline by a marker in main.
async fn hold(main: &mut Table, pipeline: &Pipeline) -> Result<()> {
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        let markers = Markers::of_pipeline(&pipeline.id, main.transactions());
        if markers.is_held() {
            return Ok(());
        }
        let change = Change {
            operation: Operation::Merge,
            adds: Vec::new(),
            removes: Vec::new(),
            others: Vec::new(),
            markers: vec![Marker { app_id: hold_app_id(&pipeline.id), version: markers.hold + 1 }],
            info: serde_json::json!({"pipeline": pipeline.id, "step": "hold", "hold": true}),
        };
        crash::point("hold.before_commit")?;
        match main.commit(change).await? {
            CommitOutcome::Landed => crash::point("hold.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => main.refresh().await?,
        }
    }
}

/// Main's files, counted.
pub async fn count_files(main: &Table, pipeline: &Pipeline) -> Result<MainFiles> {
    Ok(health(main.files().await?, policy(pipeline), None).counts())
}

async fn open_raw(workshop: &Workshop, pipeline: &Pipeline) -> Result<Table> {
    let raw = workshop.tables.open(&pipeline.raw).await?;
    let raw = raw.ok_or_else(|| {
        Error::new(Code::NotPossibleNow, format!("there is no raw table at {}", pipeline.raw))
    })?;
    raw.check_settings(pipeline)?;
    Ok(raw)
}

/// The columns that main is to have for this raw.
fn data_of(pipeline: &Pipeline, raw: &Table) -> Vec<Field> {
    let of_mode = raw::fields_of_mode(pipeline.content.mode);
    [raw::main_fields(pipeline, &raw.schema()), of_mode].concat()
}

/// Main with all of raw's data columns: created, adopted or evolved, each in a commit of its own.
async fn prepare_main(workshop: &Workshop, pipeline: &Pipeline, raw: &Table) -> Result<Table> {
    let data = data_of(pipeline, raw);
    let partition_by = partitions_of(pipeline, &data)?;
    let spec = || TableSpec {
        schema: std::sync::Arc::new(Schema::new(data.clone())),
        partition_by: partition_by.clone(),
        properties: properties_of_new(pipeline),
    };
    if pipeline.adopt && workshop.tables.open(&pipeline.main).await?.is_none() {
        return Err(Table::nothing_to_adopt(pipeline));
    }
    let mut main = workshop.tables.open_or_create(&pipeline.main, spec).await?;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        main.check_settings(pipeline)?;
        let missing = raw::missing_columns(&main.schema(), &data);
        let narrow = narrower(&main.schema(), &data);
        let outcome = if !is_ours(&main) {
            adopt(&mut main, raw, pipeline).await?
        } else if !narrow.is_empty() {
            widen(&mut main, pipeline, &narrow, None).await?
        } else if pipeline.content.change_feed && !main.tells_changes() {
            let actions = main.turn_on_change_feed()?;
            turn_on(&mut main, pipeline, "change feed", actions).await?
        } else if pipeline.deletion_vectors == DeletionVectors::Upgrade && !main.marks_rows() {
            let actions = main.turn_on_deletion_vectors()?;
            turn_on(&mut main, pipeline, "deletion vectors", actions).await?
        } else if !missing.is_empty() {
            crash::point("schema.before_commit")?;
            let info = serde_json::json!({"pipeline": pipeline.id, "step": "schema"});
            main.add_columns(&missing, info).await?
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

/// Commits what turns on a feature of the table.
async fn turn_on(
    main: &mut Table,
    pipeline: &Pipeline,
    feature: &str,
    others: Vec<Action>,
) -> Result<CommitOutcome> {
    main.commit(Change {
        operation: Operation::Merge,
        adds: Vec::new(),
        removes: Vec::new(),
        others,
        markers: Vec::new(),
        info: serde_json::json!({"pipeline": pipeline.id, "step": feature}),
    })
    .await
}

/// Columns that main's folders are named after, as main will spell them.
fn partitions_of(pipeline: &Pipeline, data: &[Field]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    if pipeline.content.mode == Mode::Append {
        found.push(raw::EPOCH.to_owned());
    }
    let schema = Schema::new(data.to_vec());
    for name in &pipeline.content.partition_by {
        let at = find_column(&schema, name).ok_or_else(|| {
            let text = format!("no epoch so far has the partition column {name:?}");
            Error::new(Code::KeyColumnMissing, text)
                .with_help(format!("set `partition_by` of pipeline.{}", pipeline.id))
        })?;
        let field = schema.field(at);
        if field.data_type().is_nested() || field.data_type() == &DataType::Binary {
            let text = format!("partition_by: column {name:?} has type {}", field.data_type());
            let help = format!(
                "folders are named after numbers, texts and times: set `partition_by` of pipeline.{}",
                pipeline.id
            );
            return Err(Error::new(Code::ColumnTypeMismatch, text).with_help(help));
        }
        found.push(field.name().clone());
    }
    if data.iter().all(|field| found.contains(field.name())) {
        let what =
            if data.is_empty() { "no epoch so far has a column" } else { "all are partitions" };
        let text = format!("{}: a table needs a column, and {what}", pipeline.main);
        return Err(Error::new(Code::KeyColumnMissing, text).with_help(
            "deliver the epoch again with rows, or `alluvium skip` it; or set `partition_by`",
        ));
    }
    Ok(found)
}

fn properties_of(pipeline: &Pipeline) -> Vec<(String, String)> {
    let properties = pipeline.main_properties().into_iter().filter(|(_, value)| !value.is_empty());
    let feed = pipeline.content.change_feed.then(|| (CHANGE_FEED.to_owned(), "true".to_owned()));
    properties.map(|(name, value)| (name.to_owned(), value)).chain(feed).collect()
}

/// A new main's properties.
fn properties_of_new(pipeline: &Pipeline) -> Vec<(String, String)> {
    let marks = pipeline.deletion_vectors != DeletionVectors::Off;
    let marks = marks.then(|| (DELETION_VECTORS.to_owned(), "true".to_owned()));
    properties_of(pipeline).into_iter().chain(marks).collect()
}

/// Makes an existing table the base: its properties say so, and the floor settles older epochs.
async fn adopt(main: &mut Table, raw: &Table, pipeline: &Pipeline) -> Result<CommitOutcome> {
    if !pipeline.adopt {
        return Err(Table::not_ours(pipeline));
    }
    check_adoptable(main, raw, pipeline).await?;
    // Said before anything is written: what is turned on cannot be turned off again.
    main.check_writable(pipeline.content.mode != Mode::Append)?;
    let mut properties = properties_of(pipeline);
    properties.push((BASE_VERSION.to_owned(), main.version().to_string()));
    let properties: Vec<(String, Option<String>)> =
        properties.into_iter().map(|(name, value)| (name, Some(value))).collect();
    let floor = pipeline.start_from.map(|start| start - 1).filter(|floor| *floor >= 0);
    let markers = floor
        .map(|version| Marker { app_id: floor_app_id(&pipeline.id), version })
        .into_iter()
        .collect();
    let others = vec![main.change_properties(&properties)?];
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
        if pipeline.is_ignored(field.name()) {
            let text = format!(
                "{} has the column {:?}, which columns.ignore keeps out of main",
                main.uri(),
                field.name()
            );
            let help = format!("take it out of `columns.ignore` of pipeline.{}", pipeline.id);
            return Err(Error::new(Code::SettingsMismatch, text).with_help(help));
        }
        let at = find_column(&held, field.name());
        // Main's column becomes as wide as raw's, or raw's is as wide as main's already.
        let fits = |at: usize| {
            let (raw, main) = (held.field(at).data_type(), field.data_type());
            widens_to(raw, main) || widens_to(main, raw)
        };
        if !at.is_some_and(fits) {
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
    main.register(&session, "main", None).await?;
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
