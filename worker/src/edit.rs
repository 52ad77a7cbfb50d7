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

use alluvium_protocol::pipeline::{DeletionVectors, Mode, same_name};
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::compute::filter_record_batch;
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::deletion::Mark;
use alluvium_table::keys::Found;
use alluvium_table::session::{quoted, quoted_list};
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{Action, Add, LiveFile, Remove, Table};
use futures::{StreamExt, TryStreamExt};
use tracing::Instrument;

use crate::checks::agree;
use crate::search::{Search, Searched, comes, key_in};
use crate::sorted::LastRows;
use crate::winners::{self, Rule};
use crate::{Permit, feed, raw};

/// Paths of files, as the log spells them.
pub(crate) fn paths(files: &[LiveFile]) -> Vec<String> {
    files.iter().map(|file| file.path.clone()).collect()
}

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
    touched: Vec<Found>,
    /// Files that go whole, without a look at their keys.
    whole: Vec<LiveFile>,
    /// New files: rows that come, and those that stay of files that are written anew.
    pub(crate) written: Written,
    /// Touched files that stay, with marks at the rows that go.
    marked: Vec<Add>,
    /// Files that tell the changes row by row, where main is to.
    pub(crate) feed: Vec<Action>,
}

/// One row per key of the epochs, or several versions of it; and `_op`.
pub(crate) enum Winners {
    /// By key, where they are.
    InRaw(Arc<LastRows>),
    /// In no order.
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
    pub(crate) session: &'a SessionContext,
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
        mut winners: Winners,
        search: Search<'_>,
    ) -> Result<()> {
        let Self { main, rule, permit, pipeline, .. } = *self;
        if pipeline.content.skip_unchanged && rule.mode != Mode::Scd2 {
            edit.take(search.finish().await?);
            if !edit.touched.is_empty() {
                let changed = self.changed_ones(edit, &winners.spooled().await?).await?;
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
        self.take_out(edit).await?;
        if main.tells_changes() && !edit.touched.is_empty() {
            winners.spooled().await?.register(self.session, "winners")?;
            register_keys(self.session, rule).await?;
            main.register(self.session, "touched", Some(&edit.touched_paths())).await?;
            edit.feed = feed::write(self.session, main, rule, &self.coming()).await?;
            self.forget("winners")?;
        }
        Ok(())
    }

    fn forget(&self, table: &str) -> Result<()> {
        let forgotten = self.session.deregister_table(table);
        forgotten.map(drop).map_err(|e| foreign("put a helper table away", &e))
    }

    /// The winners that are not as main has them.
    async fn changed_ones(&self, edit: &Edit, rows: &Arc<Spooled>) -> Result<Arc<Spooled>> {
        rows.register(self.session, "winners")?;
        self.main.register(self.session, "main", Some(&edit.touched_paths())).await?;
        let changed = changed_ones(self.session, self.main, self.rule).await?;
        self.forget("winners")?;
        self.forget("main")?;
        Ok(Arc::new(changed))
    }

    /// SQL of the rows that come, with main's columns.
    fn coming(&self) -> String {
        format!(
            "SELECT {} FROM winners WHERE {} = '{}'",
            padded_columns(self.main, self.rule),
            quoted(raw::OP),
            raw::UPSERT
        )
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
                let written = tokio::spawn(writing.in_current_span()).await;
                return written.map_err(Error::internal)?;
            }
        };
        rows.register(self.session, "winners")?;
        let order = quoted_list(key_in(main, self.rule).iter().map(String::as_str));
        let sql = format!("{} ORDER BY {order}", self.coming());
        let written = written(self.session, main, &sql, target).await;
        self.forget("winners")?;
        written
    }

    /// Marks the rows that go, or writes their files anew without them.
    async fn take_out(&self, edit: &mut Edit) -> Result<()> {
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
            let file = found.file.clone();
            copying.push(async move {
                permit.check()?;
                let copy = async move { main.copy_without(&file, &main.schema(), gone, target).await };
                tokio::spawn(copy.in_current_span()).await.map_err(Error::internal)?
            });
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
    let rows = last.rows().await?.map(|batch| {
        let batch = batch?;
        filter_record_batch(&batch, &comes(&batch)?).map_err(Error::internal)
    });
    FileWriter::new(&main, target)?.write_rows(rows).await
}

/// A column of `winner_keys`: the key has rows that come.
const COMES: &str = "_alluvium_comes";

impl Edit {
    /// The files that become live.
    pub(crate) fn adds(&self) -> Vec<Add> {
        self.written.adds.iter().chain(&self.marked).cloned().collect()
    }

    /// The files, or states of files, that stop being live.
    pub(crate) fn removes(&self) -> Vec<Remove> {
        let touched = self.touched.iter().map(|found| &found.file);
        touched.chain(&self.whole).map(|file| file.remove.clone()).collect()
    }

    /// The files that go and come make main as many rows larger as were counted.
    pub(crate) fn check_counts(&self, uri: &str) -> Result<()> {
        let of_adds = self.marked.iter().map(|add| LiveFile::of(add).live_rows());
        let gone = self.touched.iter().map(|found| &found.file).chain(&self.whole);
        let gone: Option<u64> = gone.map(LiveFile::live_rows).sum();
        // An adopted table may have files without statistics.
        let (Some(before), Some(gone), Some(marked)) =
            (self.rows_before, gone, of_adds.sum::<Option<u64>>())
        else {
            return Ok(());
        };
        let expected = (before + self.upserts).saturating_sub(self.hits);
        let after = (before + marked + self.written.rows).saturating_sub(gone);
        agree("merge", "rows of main", expected, after, uri)
    }

    /// How many files go for good.
    pub(crate) fn files_removed(&self) -> u64 {
        (self.touched.len() + self.whole.len() - self.marked.len()) as u64
    }

    fn touched_paths(&self) -> Vec<String> {
        self.touched.iter().map(|found| found.file.path.clone()).collect()
    }

    fn take(&mut self, searched: Searched) {
        self.keys = searched.keys;
        self.upserts = searched.upserts;
        self.touched = searched.touched;
        self.hits = self.touched.iter().map(|found| found.rows.len()).sum();
        self.updated = self.touched.iter().map(|found| found.coming).sum();
    }

    /// Mode append: main's partitions of the epochs are those of `added`, or empty without it.
    pub(crate) async fn replace_epochs(
        &mut self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
        epochs: &BTreeSet<Epoch>,
        target_file_bytes: u64,
    ) -> Result<()> {
        let live = main.files().await?;
        self.rows_before = live.iter().map(LiveFile::live_rows).sum();
        let is_of = |file: &LiveFile| raw::epoch_of(file).is_some_and(|e| epochs.contains(&e));
        self.whole = live.into_iter().filter(is_of).collect();
        self.hits = self.whole.iter().filter_map(LiveFile::live_rows).sum();
        if session.table_exist("added").map_err(Error::internal)? {
            let sql = format!(
                "SELECT {} FROM (SELECT * FROM added WHERE {} <> '{}') ORDER BY {}",
                padded_columns(main, rule),
                quoted(raw::OP),
                raw::REVERT,
                quoted_list([raw::EPOCH, raw::FILE, raw::ROW]),
            );
            self.written = written(session, main, &sql, target_file_bytes).await?;
        }
        self.upserts = self.written.rows;
        self.keys = self.written.rows;
        Ok(())
    }
}

/// The distinct keys of `winners`, as table `winner_keys`.
async fn register_keys(session: &SessionContext, rule: &Rule) -> Result<()> {
    let doing = "find the keys of the epochs";
    let sql = format!(
        "SELECT {key}, bool_or({op} = '{upsert}') AS {COMES} FROM winners GROUP BY {key}",
        key = rule.key_list(),
        op = quoted(raw::OP),
        upsert = raw::UPSERT,
    );
    let view = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?.into_view();
    session.register_table("winner_keys", view).map_err(|e| foreign(doing, &e))?;
    Ok(())
}

/// The rows of `winners` that are not as main has them.
async fn changed_ones(session: &SessionContext, main: &Table, rule: &Rule) -> Result<Spooled> {
    let same: Vec<String> = main
        .schema()
        .fields()
        .iter()
        .filter(|field| rule.key_name(field.name()).is_none())
        .map(|field| {
            let known = rule.output.iter().find(|c| same_name(c, field.name()));
            let coming = known.map_or_else(|| "NULL".to_owned(), |c| format!("w.{}", quoted(c)));
            format!("(m.{} IS NOT DISTINCT FROM {coming})", quoted(field.name()))
        })
        .collect();
    let sql = format!(
        "SELECT w.* FROM winners w LEFT ANTI JOIN main m ON {keys} AND w.{op} = '{upsert}' AND {same}",
        keys = rule.keys_equal("w", "m"),
        op = quoted(raw::OP),
        upsert = raw::UPSERT,
        same = if same.is_empty() { "TRUE".to_owned() } else { same.join(" AND ") },
    );
    winners::collect(session, &sql).await?.finish()
}

async fn written(
    session: &SessionContext,
    main: &Table,
    sql: &str,
    target_file_bytes: u64,
) -> Result<Written> {
    let doing = "compute main's new rows";
    let frame = session.sql(sql).await.map_err(|e| foreign(doing, &e))?;
    let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    FileWriter::new(main, target_file_bytes)?.write_all(stream).await
}

/// Main's columns out of the winners: an adopted table may have more than raw.
fn padded_columns(main: &Table, rule: &Rule) -> String {
    let columns: Vec<String> = main
        .schema()
        .fields()
        .iter()
        .map(|field| {
            let known = rule.output.iter().find(|c| same_name(c, field.name()));
            match known {
                Some(column) => format!("{} AS {}", quoted(column), quoted(field.name())),
                None => format!("NULL AS {}", quoted(field.name())),
            }
        })
        .collect();
    columns.join(", ")
}
