//! An edit of main: rows with keys in question go, beside the rows that come.
//!
//! ```text
//!  winners ─► set of keys ─► positions of their rows in main's files (key columns only)
//!     │                          ├─► marked as deleted, file by file      (deletion vectors)
//!     └─► rows that come:        └─► or the files without them, written anew  (copy-on-write)
//!         new files, by key
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::pipeline::{DeletionVectors, Mode};
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::array::{AsArray, BooleanArray, RecordBatch};
use alluvium_table::arrow::compute::filter_record_batch;
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::deletion::Mark;
use alluvium_table::keys::Found;
use alluvium_table::rows::Pick;
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{Action, Add, LiveFile, Remove, Table};
use futures::{StreamExt, TryStreamExt};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::checks::agree;
use crate::ordered::Seen;
use crate::search::{Search, Searched, comes};
use crate::slowly::VALIDITY;
use crate::sorted::LastRows;
use crate::sorter::{Plan, Runs, Sorter};
use crate::unchanged::changed_ones;
use crate::winners::Rule;
use crate::{Permit, feed, raw};

/// What happens to main's files.
#[derive(Default)]
pub(crate) struct Edit {
    /// Rows of main before, where statistics tell.
    pub(crate) rows_before: Option<u64>,
    /// Keys in question.
    pub(crate) keys: u64,
    /// Rows that come.
    pub(crate) upserts: u64,
    /// Rows of main that go.
    pub(crate) hits: u64,
    /// Rows of main that go and come again.
    pub(crate) updated: u64,
    /// Files with rows that go.
    pub(crate) touched: Vec<Found>,
    /// Files, or states of files, that stop being live.
    pub(crate) gone: Vec<Gone>,
    /// New files: rows that come, and those that stay of files that are written anew.
    pub(crate) written: Written,
    /// Touched files that stay, with marks at the rows that go.
    pub(crate) marked: Vec<Add>,
    /// Files that tell the changes row by row, where main is to.
    pub(crate) feed: Vec<Action>,
}

/// A file that stops being live as it is.
pub(crate) struct Gone {
    pub(crate) file: LiveFile,
    /// Live rows that it had.
    pub(crate) rows: u64,
}

/// One row per key of the epochs, or several versions of it; and `_op`.
pub(crate) enum Winners {
    /// By key, where they are.
    InRaw(Arc<LastRows>),
    /// In any order.
    Computed(Arc<Spooled>),
}

impl Winners {
    /// The rows, to be read any number of times.
    async fn spooled(&self) -> Result<Arc<Spooled>> {
        let last = match self {
            Self::Computed(rows) => return Ok(Arc::clone(rows)),
            Self::InRaw(last) => last,
        };
        let mut rows = last.rows().await?;
        let mut spool: Option<Spool> = None;
        while let Some(batch) = rows.try_next().await? {
            spool.get_or_insert_with(|| Spool::new(batch.schema())).push(batch)?;
        }
        let spool = spool.ok_or_else(|| Error::internal("winners without a row"))?;
        Ok(Arc::new(spool.finish()?))
    }
}

/// What an edit is made with.
pub(crate) struct Editing<'a> {
    pub(crate) main: &'a Table,
    pub(crate) rule: &'a Rule,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) permit: &'a Permit,
}

impl Editing<'_> {
    /// Finds the rows of main with keys of `winners`, which `search` knows, takes them out, and writes
    /// those that come.
    pub(crate) async fn carry_out(
        &self,
        edit: &mut Edit,
        winners: Winners,
        search: Search<'_>,
    ) -> Result<()> {
        let written = self.write(edit, winners, search).await?;
        // Where no row goes, the new files tell what comes.
        if !edit.touched.is_empty() {
            self.tell(edit, &written).await?;
        }
        self.take_out(edit).await
    }

    /// Finds them and writes those that come; returns of which winners these are.
    pub(crate) async fn write(
        &self,
        edit: &mut Edit,
        mut winners: Winners,
        search: Search<'_>,
    ) -> Result<Winners> {
        let Self { main, rule, permit, pipeline, .. } = *self;
        if pipeline.content.skip_unchanged && rule.mode != Mode::Scd2 {
            edit.take(search.finish().await?);
            if !edit.touched.is_empty() {
                let all = winners.spooled().await?;
                let changed = changed_ones(self, &edit.touched, &all).await?;
                let live = edit.touched.drain(..).map(|found| found.file).collect();
                let mut search = Search::new(main, rule, pipeline, live, permit, changed.rows())?;
                search.add_rows(&changed).await?;
                edit.take(search.finish().await?);
                winners = Winners::Computed(changed);
            }
            edit.written = self.write_coming(&winners, edit.upserts).await?;
        } else {
            // What comes is written while the other processors look for what goes.
            let upserts = search.upserts();
            let coming = self.write_coming(&winners, upserts);
            let (searched, written) = futures::join!(search.finish(), coming);
            edit.take(searched?);
            edit.written = written?;
        }
        permit.check()?;
        Ok(winners)
    }

    /// Writes the change feed, where main is to tell its changes: a commit that tells some must tell all.
    pub(crate) async fn tell(&self, edit: &mut Edit, winners: &Winners) -> Result<()> {
        if self.main.tells_changes() {
            edit.feed = feed::write(self, &edit.touched, winners.spooled().await?.as_ref()).await?;
        }
        Ok(())
    }

    /// Rows of main that were found, with these columns, as the plan orders them.
    pub(crate) async fn rows_that_go(
        &self,
        found: &[Found],
        columns: &SchemaRef,
        plan: &Plan,
    ) -> Result<Runs> {
        let mut sorter = Sorter::new(plan)?;
        let rows = found.iter().map(|found| found.rows.len()).sum();
        self.permit.begin("reads rows of main", Amount::rows(rows));
        for found in found {
            let pick = Pick::Only(found.rows.clone());
            let mut rows = self.main.rows_of(&found.file, columns, pick).await?;
            while let Some(batch) = rows.next().await {
                sorter.push(self.permit.counted(batch)?)?;
            }
        }
        sorter.finish()
    }

    /// Writes the rows that come, by key.
    async fn write_coming(&self, winners: &Winners, upserts: u64) -> Result<Written> {
        let (main, target) = (self.main, self.pipeline.sizes.target_file_bytes);
        if upserts == 0 {
            return Ok(Written::default());
        }
        let rows = match winners {
            Winners::Computed(rows) => rows,
            Winners::InRaw(last) => {
                // A task of its own: encoding must not keep the search from going on.
                let writing = write_upserts(main.clone(), Arc::clone(last), target);
                let writing = AbortOnDropHandle::new(tokio::spawn(writing.in_current_span()));
                return writing.await.map_err(Error::internal)?;
            }
        };
        let mut order = self.rule.key.clone();
        if self.rule.mode == Mode::Scd2 {
            order.push(VALIDITY[0].to_owned());
        }
        let plan = Plan::new(rows.schema(), &order, self.pipeline.sizes.memory_bytes)?;
        let mut sorter = Sorter::new(&plan)?;
        for batch in rows.batches()? {
            self.permit.check()?;
            sorter.push(only_coming(&batch?)?)?;
        }
        let permit = self.permit.clone();
        let rows = sorter.finish()?.batches().map(move |batch| permit.check().and(batch));
        FileWriter::new(main, target)?.write_rows(futures::stream::iter(rows)).await
    }

    /// Marks the rows that go, or writes their files anew without them.
    pub(crate) async fn take_out(&self, edit: &mut Edit) -> Result<()> {
        let (marking, copying): (Vec<&Found>, Vec<&Found>) =
            edit.touched.iter().partition(|found| self.may_mark(&found.file));
        let marks = marking.iter().map(|found| Mark {
            file: &found.file,
            rows_in_file: found.rows_in_file,
            deleted: &found.deleted | &found.rows,
        });
        edit.marked = self.main.mark_deleted(&marks.collect::<Vec<_>>()).await?;
        let staying = self.copy_without_them(&copying, &mut edit.written).await?;
        let expected = edit.upserts + staying;
        if edit.written.rows != expected {
            let text = format!("{} rows written, {expected} expected", edit.written.rows);
            return Err(Error::internal(text));
        }
        edit.gone.extend(edit.touched.iter().map(|found| Gone {
            file: found.file.clone(),
            rows: found.rows_in_file - found.deleted.len(),
        }));
        Ok(())
    }

    /// Rows of a file may be marked as deleted. Of a path with letters that are written in another way
    /// in a URL (a partition `a/b`) polars 2.1 overlooks the marks.
    fn may_mark(&self, file: &LiveFile) -> bool {
        self.main.marks_rows()
            && self.pipeline.deletion_vectors != DeletionVectors::Off
            && file.has_plain_path()
    }

    /// Writes files anew, without the rows that go; as many as there are processors at a time. Returns
    /// how many rows are to stay.
    async fn copy_without_them(&self, files: &[&Found], written: &mut Written) -> Result<u64> {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let target = self.pipeline.sizes.target_file_bytes;
        let mut copying = Vec::with_capacity(files.len());
        let mut staying = 0;
        for found in files {
            let gone = &found.deleted | &found.rows;
            staying += found.rows_in_file - gone.len();
            let (main, permit) = (self.main.clone(), self.permit.clone());
            let (file, rows) = (found.file.clone(), found.rows_in_file);
            copying.push(async move {
                permit.check()?;
                let bytes = file.size;
                let copy =
                    async move { main.copy_without(&file, &main.schema(), gone, target).await };
                let copying = AbortOnDropHandle::new(tokio::spawn(copy.in_current_span()));
                let copied = copying.await.map_err(Error::internal)??;
                permit.done(Amount { rows, bytes, files: 1 })?;
                Ok::<_, Error>(copied)
            });
        }
        let of = Amount {
            rows: files.iter().map(|found| found.rows_in_file).sum(),
            bytes: files.iter().map(|found| found.file.size).sum(),
            files: files.len() as u64,
        };
        if of.files > 0 {
            self.permit.begin("writes files anew without rows that go", of);
        }
        let mut copied = futures::stream::iter(copying).buffer_unordered(at_once);
        while let Some(copy) = copied.try_next().await? {
            written.adds.extend(copy.adds);
            written.rows += copy.rows;
        }
        Ok(staying)
    }
}

/// Writes those of the rows that come, as they are.
async fn write_upserts(main: Table, last: Arc<LastRows>, target: u64) -> Result<Written> {
    let rows = last.rows().await?.map(|batch| only_coming(&batch?));
    FileWriter::new(&main, target)?.write_rows(rows).await
}

/// Those of the rows that come.
pub(crate) fn only_coming(batch: &RecordBatch) -> Result<RecordBatch> {
    filter_record_batch(batch, &comes(batch)?).map_err(Error::internal)
}

fn without_reverts(batch: &RecordBatch) -> Result<RecordBatch> {
    let op = batch.column_by_name(raw::OP).and_then(|op| op.as_string_opt::<i32>());
    let op = op.ok_or_else(|| Error::internal("no _op"))?;
    let stays: BooleanArray = op.iter().map(|op| Some(op != Some(raw::REVERT))).collect();
    filter_record_batch(batch, &stays).map_err(Error::internal)
}

pub(crate) fn is_upsert(row: &Seen) -> bool {
    let op = row.batch.column_by_name(raw::OP).and_then(|op| op.as_string_opt::<i32>());
    op.is_some_and(|op| op.value(row.row) == raw::UPSERT)
}

impl Edit {
    /// The files that become live.
    pub(crate) fn adds(&self) -> Vec<Add> {
        self.written.adds.iter().chain(&self.marked).cloned().collect()
    }

    /// The files, or states of files, that stop being live.
    pub(crate) fn removes(&self) -> Vec<Remove> {
        self.gone.iter().map(|gone| gone.file.remove.clone()).collect()
    }

    /// The files that go and come make main as many rows larger as were counted.
    pub(crate) fn check_counts(&self, uri: &str) -> Result<()> {
        let gone: u64 = self.gone.iter().map(|gone| gone.rows).sum();
        let after = self.written.rows + self.marked_rows();
        agree("merge", "rows of main", self.upserts + gone, after + self.hits, uri)
    }

    /// Rows of main afterwards, as statistics will tell them.
    pub(crate) fn rows_after(&self) -> Option<u64> {
        let gone: u64 = self.gone.iter().map(|gone| gone.file.live_rows()).sum::<Option<u64>>()?;
        Some((self.rows_before? + self.marked_rows() + self.written.rows).saturating_sub(gone))
    }

    fn marked_rows(&self) -> u64 {
        self.marked.iter().filter_map(|add| LiveFile::of(add).live_rows()).sum()
    }

    /// How many files go for good.
    pub(crate) fn files_removed(&self) -> u64 {
        (self.gone.len() - self.marked.len()) as u64
    }

    pub(crate) fn take(&mut self, searched: Searched) {
        self.keys = searched.keys;
        self.upserts = searched.upserts;
        self.touched = searched.touched;
        self.count_hits();
    }

    /// Counts the rows that go.
    pub(crate) fn count_hits(&mut self) {
        self.hits = self.touched.iter().map(|found| found.rows.len()).sum();
        self.updated = self.touched.iter().map(|found| found.coming).sum();
    }

    /// Mode append: main's partitions of the epochs are those of `added`.
    pub(crate) async fn replace_epochs(
        &mut self,
        main: &Table,
        epochs: &BTreeSet<Epoch>,
        added: Runs,
        target_file_bytes: u64,
    ) -> Result<()> {
        let live = main.files().await?;
        self.rows_before = live.iter().map(LiveFile::live_rows).sum();
        let is_of = |file: &LiveFile| raw::epoch_of(file).is_some_and(|e| epochs.contains(&e));
        let gone = live.into_iter().filter(is_of);
        self.gone = gone.map(|file| Gone { rows: file.live_rows().unwrap_or(0), file }).collect();
        self.hits = self.gone.iter().map(|gone| gone.rows).sum();
        let rows = futures::stream::iter(added.batches().map(|batch| without_reverts(&batch?)));
        self.written = FileWriter::new(main, target_file_bytes)?.write_rows(rows).await?;
        self.upserts = self.written.rows;
        self.keys = self.written.rows;
        Ok(())
    }
}
