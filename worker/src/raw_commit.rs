//! The commit of one raw partition: the old files out, the new ones in, with the epoch's marker.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::{EpochMarker, epoch_app_id};
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::datatypes::{FieldRef, SchemaRef};
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::pause::Pauses;
use alluvium_table::write::Written;
use alluvium_table::{LiveFile, Table};

use crate::aside::AsideRef;
use crate::ingest::{COMMIT_PATIENCE, Wanted};
use crate::{Permit, Workshop, raw};

/// Files in raw's folder that no commit names yet.
pub(crate) struct Prepared {
    pub(crate) written: Written,
    /// Rows of the folder among them; the others are reverts.
    pub(crate) content_rows: u64,
    pub(crate) aside: AsideRef,
    /// Paths of the partition's files that revert rows were computed from.
    pub(crate) previous: Vec<String>,
    /// The columns that the files were written with.
    pub(crate) schema: SchemaRef,
}

/// The report when raw holds this generation or a later one.
pub(crate) fn already(table: &Table, pipeline: &Pipeline, wanted: &Wanted<'_>) -> Option<Report> {
    let app_id = epoch_app_id(&pipeline.id, wanted.epoch, EpochMarker::Ingest);
    let found = table.transaction(&app_id)?;
    (found >= wanted.generation).then(|| Report {
        already: true,
        generations: vec![(wanted.epoch, found)],
        raw_version: Some(table.version()),
        ..Report::default()
    })
}

/// The live files of the epoch's partition. Without an ingest marker there are none: a table with a
/// thousand epochs is not searched for the files of a new one.
async fn partition_files(
    table: &Table,
    pipeline: &Pipeline,
    epoch: Epoch,
) -> Result<Vec<LiveFile>> {
    let app_id = epoch_app_id(&pipeline.id, epoch, EpochMarker::Ingest);
    if table.transaction(&app_id).is_none() {
        return Ok(Vec::new());
    }
    let value = epoch.to_string();
    table.files_where(|partition| partition.get(raw::EPOCH) == Some(&Some(value.clone()))).await
}

pub(crate) async fn partition_paths(
    table: &Table,
    pipeline: &Pipeline,
    epoch: Epoch,
) -> Result<Vec<String>> {
    let files = partition_files(table, pipeline, epoch).await?;
    Ok(files.into_iter().map(|file| file.path).collect())
}

/// The commit of one partition, tried until it landed or cannot any more.
pub(crate) struct RawCommit<'a> {
    pub(crate) workshop: &'a Workshop,
    pub(crate) task: &'a Task,
    pub(crate) wanted: &'a Wanted<'a>,
    pub(crate) manifest: &'a Manifest,
    pub(crate) started: Instant,
    pub(crate) age_max: Duration,
}

impl RawCommit<'_> {
    /// Commits, again and again, with the same files.
    pub(crate) async fn land(
        &self,
        mut table: Table,
        prepared: Prepared,
        mut report: Report,
        permit: &Permit,
    ) -> Result<Report> {
        let pipeline = &self.task.pipeline;
        let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
        crash::point("ingest.before_commit")?;
        loop {
            permit.check()?;
            let turn = self.workshop.tables.turn(&pipeline.raw).await;
            // A snapshot is costly to bring forward: the last holder of the turn has left one. If
            // another process was faster the commit is lost, and storage is asked.
            match self.workshop.tables.known(&pipeline.raw) {
                Some(known) if known.version() > table.version() => table = known,
                _ => {}
            }
            if let Some(found) = already(&table, pipeline, self.wanted) {
                return Ok(Report { conflicts: report.conflicts, ..found });
            }
            let partition = partition_files(&table, pipeline, self.wanted.epoch).await?;
            self.check_still_fits(&table, &partition, &prepared)?;
            let outcome = table.commit(self.change(partition, &prepared, &report)).await?;
            if matches!(outcome, CommitOutcome::Landed) {
                self.workshop.tables.remember(&table);
            }
            drop(turn);
            match outcome {
                CommitOutcome::Landed => break,
                CommitOutcome::Lost(error) => {
                    tracing::debug!(%error, table = pipeline.raw, "lost a commit race");
                    report.conflicts += 1;
                    if !pauses.wait().await {
                        return Err(error);
                    }
                    table.refresh().await?;
                    self.workshop.tables.remember(&table);
                }
            }
        }
        crash::point("ingest.after_commit")?;
        if let Err(error) = table.checkpoint_if_due().await {
            tracing::warn!(%error, "no checkpoint; the next one makes up for it");
        }
        Ok(Report { raw_version: Some(table.version()), ..report })
    }

    /// The files depend on the snapshot in two ways only: revert rows on the previous partition,
    /// and column types on the schema.
    fn check_still_fits(
        &self,
        table: &Table,
        partition: &[LiveFile],
        prepared: &Prepared,
    ) -> Result<()> {
        let moved_on = |why: &str| {
            let text = format!("{}: {why} while the epoch was read", self.task.pipeline.raw);
            Err(Error::new(Code::TableMovedOn, text))
        };
        if self.started.elapsed() > self.age_max {
            return moved_on("a quarter of the vacuum retention passed");
        }
        let present: BTreeSet<&String> = partition.iter().map(|file| &file.path).collect();
        let previous: BTreeSet<&String> = prepared.previous.iter().collect();
        if present != previous {
            return moved_on("the epoch's partition changed");
        }
        let schema = table.schema();
        let is_same = |field: &FieldRef| {
            let held = schema.field_with_name(field.name());
            held.is_ok_and(|held| held.data_type() == field.data_type())
        };
        if !prepared.schema.fields().iter().all(is_same) {
            return moved_on("a column got a wider type");
        }
        Ok(())
    }

    fn change(&self, partition: Vec<LiveFile>, prepared: &Prepared, report: &Report) -> Change {
        let pipeline = &self.task.pipeline;
        let removes = partition.into_iter().map(|file| file.remove).collect();
        let app_id = epoch_app_id(&pipeline.id, self.wanted.epoch, EpochMarker::Ingest);
        Change {
            operation: Operation::Overwrite {
                predicate: format!("{} = {}", raw::EPOCH, self.wanted.epoch),
            },
            adds: prepared.written.adds.clone(),
            removes,
            others: Vec::new(),
            markers: vec![Marker { app_id, version: self.wanted.generation }],
            info: serde_json::json!({
                "pipeline": pipeline.id,
                "step": "ingest",
                "task": self.task.id,
                "attempt": self.task.attempt,
                "epochs": [{"epoch": self.wanted.epoch, "generation": self.wanted.generation}],
                "folder": self.manifest.folder,
                "reason": self.manifest.reason,
                "manifest": self.wanted.manifest_hash,
                "configuration": pipeline.hash(),
                "rows": report.rows_written,
                "rows_read": report.rows_read,
                "rows_quarantined": report.rows_quarantined,
                "rows_filtered": report.rows_filtered,
                "pieces": report.pieces,
            }),
        }
    }
}
