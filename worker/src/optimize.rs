//! Optimize: one bin of main's small and worn files becomes larger files sorted by key. No row changes.
//!
//! A merge that gets in between is no reason to begin again: rows that it marked as deleted in files of the
//! bin are looked for by their keys in the new files, and marked there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use alluvium_protocol::marker::{Markers, maintenance_app_id};
use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Error, Pipeline, Result, crash};
use alluvium_table::arrow::datatypes::{Field, Schema};
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::deletion::{Mark, RowSet, version_of};
use alluvium_table::keys::{KeySet, Scan};
use alluvium_table::rows::Pick;
use alluvium_table::schema::find_column;
use alluvium_table::upkeep::{BIN_FILES_MIN, candidates, policy, saving};
use alluvium_table::write::Written;
use alluvium_table::{Add, LiveFile, Table};
use futures::TryStreamExt;

use crate::compact::Compaction;
use crate::curve::Curve;
use crate::ingest::table_names;
use crate::merge::{check_age, count_files};
use crate::search::KEYS_SHARE;
use crate::shards::of_optimize::in_pieces;
use crate::shards::{PIECES_MAX, pieces_of};
use crate::{Permit, Workshop};

/// So often a bin that lost to another commit is fitted to what that one did.
const REBASES_MAX: u32 = 10;

/// Carries out an optimize task: at most one bin.
pub async fn optimize(workshop: &Workshop, task: &Task, permit: &Permit) -> Result<Report> {
    let pipeline = &task.pipeline;
    let _turn = workshop.tables.turn(&pipeline.main).await;
    let Some(mut table) = workshop.tables.open(&pipeline.main).await? else {
        return Ok(Report { already: true, ..Report::default() });
    };
    let started = Instant::now();
    let bins = pick_bins(&table, pipeline, permit).await?;
    if bins.is_empty() {
        let main = count_files(&table, pipeline).await?;
        return Ok(Report { already: true, main, ..Report::default() });
    }
    let order = Order::of(&table, pipeline)?;
    let (bin, written, pieces) = match bins.as_slice() {
        [bin] => (bin.clone(), write_bin(&table, pipeline, bin, &order, permit).await?, 0),
        several => in_pieces(workshop, task, (&table, several), permit).await?,
    };
    let step = task.work.step().as_str();
    let landing = Landing { started, pipeline, step, pieces, key: &order.key, permit };
    let report = landing.land(&mut table, &bin, &written).await?;
    workshop.tables.remember(&table);
    Ok(Report { main: count_files(&table, pipeline).await?, ..report })
}

/// Candidates of the partition where most is to be saved, those that save most for their bytes first, in
/// bins: one, or all where they are work for several workers.
async fn pick_bins(
    table: &Table,
    pipeline: &Pipeline,
    permit: &Permit,
) -> Result<Vec<Vec<LiveFile>>> {
    let by_partition = candidates(table.files().await?, policy(pipeline));
    let of_all = |files: &Vec<LiveFile>| files.iter().map(saving).sum::<f64>();
    let most = by_partition.into_iter().max_by(|one, other| of_all(one).total_cmp(&of_all(other)));
    let Some(mut most) = most else { return Ok(Vec::new()) };
    let of_byte = |file: &LiveFile| saving(file) / file.size.max(1) as f64;
    most.sort_by(|one, other| {
        of_byte(other).total_cmp(&of_byte(one)).then_with(|| one.path.cmp(&other.path))
    });
    let all: u64 = most.iter().map(|file| file.size).sum();
    let bins_max = if pieces_of(all, pipeline, permit) > 1 { PIECES_MAX } else { 1 };
    let mut bytes = 0;
    let mut bins: Vec<Vec<LiveFile>> = vec![Vec::new()];
    for file in most {
        bytes += file.size;
        let held = bins.last().map_or(0, Vec::len);
        if bytes > pipeline.sizes.bin_bytes && held >= BIN_FILES_MIN {
            if bins.len() == bins_max {
                break;
            }
            bytes = file.size;
            bins.push(Vec::new());
        }
        if let Some(bin) = bins.last_mut() {
            bin.push(file);
        }
    }
    // What is left over for the last one may be too little to gain by it.
    if bins.len() > 1 {
        bins.retain(|bin| bin.len() >= BIN_FILES_MIN);
    }
    Ok(bins)
}

/// In which order the rows of a bin are written.
pub(crate) struct Order {
    /// Several: along a curve. None: by the key.
    clustered: Vec<String>,
    key: Vec<String>,
}

impl Order {
    /// As the pipeline has it, in the table's names.
    pub(crate) fn of(table: &Table, pipeline: &Pipeline) -> Result<Self> {
        let key = table_names(table, &pipeline.content.key);
        Ok(Self { clustered: clustered_by(table, pipeline)?, key })
    }

    /// By these columns.
    pub(crate) fn by(key: Vec<String>) -> Self {
        Self { clustered: Vec::new(), key }
    }
}

/// The columns of `cluster_by`, as the table spells them.
fn clustered_by(table: &Table, pipeline: &Pipeline) -> Result<Vec<String>> {
    let schema = table.schema();
    let place = |name: &String| {
        let at = find_column(&schema, name).ok_or_else(|| {
            let text = format!("optimize.cluster_by: {} has no column {name:?}", table.uri());
            Error::new(Code::KeyColumnMissing, text)
                .with_help(format!("correct `optimize.cluster_by` of pipeline.{}", pipeline.id))
        })?;
        let field = schema.field(at);
        if field.data_type().is_nested() {
            let text = format!("optimize.cluster_by: {name:?} has type {}", field.data_type());
            return Err(Error::new(Code::ColumnTypeMismatch, text)
                .with_help("numbers, texts, times and binary values have an order"));
        }
        Ok(field.name().clone())
    };
    pipeline.cluster_by.iter().map(place).collect()
}

/// Writes the rows of `bin` anew, in this order.
pub(crate) async fn write_bin(
    table: &Table,
    pipeline: &Pipeline,
    bin: &[LiveFile],
    order: &Order,
    permit: &Permit,
) -> Result<Written> {
    let (memory, target) = (pipeline.sizes.memory_bytes, pipeline.sizes.target_file_bytes);
    let (mut curve, mut by) = (None, order.key.clone());
    match order.clustered.as_slice() {
        [] => {}
        [one] => by.insert(0, one.clone()),
        several => curve = Some(Curve::learn(table, bin, several, permit).await?),
    }
    let compaction = Compaction::new(table, (curve, &by), memory, target, permit)?;
    let written = compaction.write(bin).await?;
    crash::point("optimize.after_write")?;
    let before: Option<u64> = bin.iter().map(LiveFile::live_rows).sum();
    if before.is_some_and(|before| before != written.rows) {
        return Err(Error::internal(format!("{} rows of {before:?} rewritten", written.rows)));
    }
    Ok(written)
}

/// What a bin's commit is made with.
pub(crate) struct Landing<'a> {
    pub(crate) started: Instant,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) step: &'a str,
    /// In which the bin was written; 0: in one.
    pub(crate) pieces: u64,
    pub(crate) key: &'a [String],
    pub(crate) permit: &'a Permit,
}

impl Landing<'_> {
    /// Commits the new files of `bin` for exactly the snapshot that they were read of, or that they were
    /// fitted to.
    pub(crate) async fn land(
        &self,
        table: &mut Table,
        bin: &[LiveFile],
        written: &Written,
    ) -> Result<Report> {
        let Self { started, pipeline, step, pieces, key, permit } = *self;
        let mut fitted = Fitted { adds: written.adds.clone(), bin: bin.to_vec() };
        let mut conflicts = 0;
        loop {
            permit.check()?;
            check_age(started, pipeline)?;
            let change = fitted.change(table, pipeline, (step, pieces));
            crash::point("optimize.before_commit")?;
            let CommitOutcome::Lost(lost) = table.commit(change).await? else { break };
            table.refresh().await?;
            match fitted.to(table, pipeline, key, &written.adds, bin, permit).await? {
                Fit::Landed => break,
                Fit::Again if conflicts < u64::from(REBASES_MAX) => conflicts += 1,
                Fit::Again | Fit::Not => return Err(Error::new(Code::TableMovedOn, lost.message)),
            }
        }
        crash::point("optimize.after_commit")?;
        if let Err(error) = table.checkpoint_if_due().await {
            tracing::warn!(%error, "no checkpoint; the next one makes up for it");
        }
        Ok(Report {
            main_version: Some(table.version()),
            rows_read: written.rows,
            rows_written: written.rows,
            files_added: written.adds.len() as u64,
            files_removed: bin.len() as u64,
            bytes_written: alluvium_table::bytes_of(&written.adds),
            conflicts,
            ..Report::default()
        })
    }
}

/// A bin's new and old files, as a snapshot is to have and has them.
struct Fitted {
    adds: Vec<Add>,
    bin: Vec<LiveFile>,
}

/// How a bin stands to a newer snapshot.
enum Fit {
    /// It is in there already: the commit's reply was lost.
    Landed,
    /// It is fitted, and can be committed for it.
    Again,
    /// Its files are no longer what was read.
    Not,
}

impl Fitted {
    fn change(&self, table: &Table, pipeline: &Pipeline, (step, pieces): (&str, u64)) -> Change {
        let silent = |add: &Add| Add { data_change: false, ..add.clone() };
        let removes = self.bin.iter().map(|file| {
            let mut remove = file.remove.clone();
            remove.data_change = false;
            remove
        });
        let maintenance = Markers::of_pipeline(&pipeline.id, table.transactions()).maintenance;
        Change {
            operation: Operation::Merge,
            adds: self.adds.iter().map(silent).collect(),
            removes: removes.collect(),
            others: Vec::new(),
            markers: vec![Marker {
                app_id: maintenance_app_id(&pipeline.id),
                version: maintenance + 1,
            }],
            info: serde_json::json!({"pipeline": pipeline.id, "step": step, "pieces": pieces}),
        }
    }

    /// Fits the files `adds`, which have the rows of `bin` as they were read, to a newer snapshot.
    async fn to(
        &mut self,
        table: &Table,
        pipeline: &Pipeline,
        key: &[String],
        adds: &[Add],
        bin: &[LiveFile],
        permit: &Permit,
    ) -> Result<Fit> {
        let live = table.files().await?;
        let live: HashMap<&str, &LiveFile> = live.iter().map(|f| (f.path.as_str(), f)).collect();
        let is_gone = bin.iter().all(|file| !live.contains_key(file.path.as_str()));
        let is_there = adds.iter().any(|add| live.contains_key(add.path.as_str()));
        if is_there || (adds.is_empty() && is_gone) {
            return Ok(Fit::Landed);
        }
        let (mut now, mut gone) = (Vec::new(), Vec::new());
        for file in bin {
            let Some(held) = live.get(file.path.as_str()) else { return Ok(Fit::Not) };
            now.push((*held).clone());
            let version = |file: &LiveFile| {
                version_of(file.remove.deletion_vector.as_ref())
                    .map(|(path, offset)| (path.to_owned(), offset))
            };
            if version(file) == version(held) {
                continue;
            }
            let before = table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
            let deleted = table.deleted_rows(held.remove.deletion_vector.as_ref()).await?;
            if !before.is_subset(&deleted) {
                // A rollback brought rows back.
                return Ok(Fit::Not);
            }
            gone.push((file, deleted - before));
        }
        self.adds = if gone.is_empty() {
            adds.to_vec()
        } else {
            // A key is in one row, then, by which that row is found again.
            let has_keys = matches!(pipeline.content.mode, Mode::Upsert | Mode::Snapshot);
            if !has_keys || key.is_empty() || !table.marks_rows() {
                return Ok(Fit::Not);
            }
            match without(table, pipeline, key, adds, gone, permit).await? {
                Some(adds) => adds,
                None => return Ok(Fit::Not),
            }
        };
        self.bin = now;
        Ok(Fit::Again)
    }
}

/// The new files with marks at the rows that are `gone` from files of the bin; `None`: they are not all
/// found.
async fn without(
    table: &Table,
    pipeline: &Pipeline,
    key: &[String],
    adds: &[Add],
    gone: Vec<(&LiveFile, RowSet)>,
    permit: &Permit,
) -> Result<Option<Vec<Add>>> {
    let schema = table.schema();
    let mut fields: Vec<Field> = Vec::with_capacity(key.len());
    for name in key {
        let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
        fields.push(schema.field(at).clone());
    }
    let kinds: Vec<_> = fields.iter().map(|field| field.data_type().clone()).collect();
    let fields = Arc::new(Schema::new(fields));
    let partitions = table.partition_columns();
    let apart: Vec<usize> = (0..key.len()).filter(|at| partitions.contains(&key[*at])).collect();
    let mut keys = KeySet::new(&kinds, 0, &apart)?;
    let memory_bytes = pipeline.sizes.memory_bytes / KEYS_SHARE;
    let mut expected = 0;
    for (file, rows) in gone {
        expected += rows.len();
        let mut batches = table.rows_of(file, &fields, Pick::Only(rows)).await?;
        while let Some(batch) = batches.try_next().await? {
            permit.check()?;
            keys.add(batch.columns(), &|_| false)?;
            if keys.bytes() > memory_bytes {
                return Ok(None);
            }
        }
    }
    let files: Vec<LiveFile> = adds.iter().map(LiveFile::of).collect();
    let scan = Scan { table, key, memory_bytes, index: pipeline.side_index };
    let found = scan
        .find(&files, &Arc::new(keys), &|rows, of| {
            permit.reached("looks for rows that a merge marked", rows, of)
        })
        .await?;
    if found.iter().map(|found| found.rows.len()).sum::<u64>() != expected {
        return Ok(None);
    }
    let marks: Vec<Mark<'_>> = found
        .iter()
        .map(|found| Mark {
            file: &found.file,
            rows_in_file: found.rows_in_file,
            deleted: found.rows.clone(),
        })
        .collect();
    let mut fitted = table.mark_deleted(&marks).await?;
    let is_touched = |add: &&Add| found.iter().any(|found| found.file.path == add.path);
    fitted.extend(adds.iter().filter(|add| !is_touched(add)).cloned());
    Ok(Some(fitted))
}
