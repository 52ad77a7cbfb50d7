//! An edit of main: files with keys in question are rewritten without them, beside the rows that come.

use std::collections::BTreeSet;

use alluvium_protocol::pipeline::{Mode, same_name};
use alluvium_protocol::{Epoch, Error, Result};
use alluvium_table::arrow::array::AsArray;
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{DataType, Int64Type};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::scan::FILE_COLUMN;
use alluvium_table::schema::find_column;
use alluvium_table::session::{quoted, quoted_list};
use alluvium_table::spool::Spool;
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{Action, LiveFile, Table};

use crate::merge::BASE_VERSION;
use crate::winners::{self, Rule, Scope};
use crate::{feed, raw};

/// Paths of files, as the log spells them.
pub(crate) fn paths(files: &[LiveFile]) -> Vec<String> {
    files.iter().map(|file| file.path.clone()).collect()
}

/// Registers what the formula is computed over: the applied epochs' rows, and the base if there is one.
pub(crate) async fn reconcile_over(
    session: &SessionContext,
    main: &Table,
    raw: &Table,
    applied: &[LiveFile],
) -> Result<Scope> {
    if applied.is_empty() {
        let doing = "read the applied epochs";
        let none = session.sql("SELECT * FROM changes WHERE FALSE").await;
        let none = none.map_err(|e| foreign(doing, &e))?.into_view();
        session.register_table("applied", none).map_err(|e| foreign(doing, &e))?;
    } else {
        raw.register(session, "applied", Some(&paths(applied)), false).await?;
    }
    let base = main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
    let Some(version) = base else { return Ok(Scope::Reconcile { has_base: false }) };
    let base = Table::open_at(main.uri(), Some(version)).await?;
    let base = base.ok_or_else(|| Error::internal("the base version is gone"))?;
    base.register(session, "base_version", None, false).await?;
    register_with_columns(session, &base, raw).await?;
    Ok(Scope::Reconcile { has_base: true })
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
    pub(crate) touched: Vec<LiveFile>,
    /// Rows in those files that stay are written again, beside the ones that come.
    pub(crate) written: Written,
    /// Files that tell the changes row by row, where main is to.
    pub(crate) feed: Vec<Action>,
}

/// A column of `winner_keys`: the key has rows that come.
const COMES: &str = "_alluvium_comes";

impl Edit {
    /// Finds the files of main with keys of `winners`.
    pub(crate) async fn find_touched(
        &mut self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
        skip_unchanged: bool,
    ) -> Result<()> {
        let doing = "find the files with keys of the epochs";
        let live = main.files().await?;
        self.rows_before = live.iter().map(LiveFile::live_rows).sum();
        if !live.is_empty() {
            main.register(session, "main", None, true).await?;
        }
        if skip_unchanged && !live.is_empty() && rule.mode != Mode::Scd2 {
            leave_unchanged(session, main, rule).await?;
        }
        let op = quoted(raw::OP);
        let keys = match rule.mode {
            Mode::Scd2 => format!(
                "SELECT {key}, bool_or({op} = '{upsert}') AS {COMES} FROM winners GROUP BY {key}",
                key = rule.key_list(),
                upsert = raw::UPSERT,
            ),
            _ => format!(
                "SELECT {key}, {op} = '{upsert}' AS {COMES} FROM winners",
                key = rule.key_list(),
                upsert = raw::UPSERT,
            ),
        };
        let view = session.sql(&keys).await.map_err(|e| foreign(doing, &e))?.into_view();
        session.register_table("winner_keys", view).map_err(|e| foreign(doing, &e))?;
        let count = format!(
            "SELECT (SELECT count(*) FROM winners WHERE {op} = '{}') AS coming, \
             (SELECT count(*) FROM winner_keys) AS keys",
            raw::UPSERT
        );
        let frame = session.sql(&count).await.map_err(|e| foreign(doing, &e))?;
        let batches = frame.collect().await.map_err(|e| foreign(doing, &e))?;
        let counted = |at: usize| {
            let batch = batches.first();
            batch.map_or(0, |b| b.column(at).as_primitive::<Int64Type>().value(0).unsigned_abs())
        };
        (self.upserts, self.keys) = (counted(0), counted(1));
        if live.is_empty() {
            return Ok(());
        }
        let file = quoted(FILE_COLUMN);
        let sql = format!(
            "SELECT CAST(m.{file} AS VARCHAR), count(*), count(CASE WHEN w.{COMES} THEN 1 END) \
             FROM winner_keys w JOIN main m ON {same} GROUP BY m.{file}",
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

    /// Writes the rows that stay and the ones that come.
    pub(crate) async fn write(
        &mut self,
        session: &SessionContext,
        main: &Table,
        rule: &Rule,
        target_file_bytes: u64,
    ) -> Result<()> {
        let coming = format!(
            "SELECT {} FROM winners WHERE {} = '{}'",
            padded_columns(main, rule),
            quoted(raw::OP),
            raw::UPSERT
        );
        let mut sql = coming.clone();
        if !self.touched.is_empty() {
            self.keep_untouched(session, main, rule).await?;
            sql = format!("SELECT * FROM kept UNION ALL {coming}");
        }
        let sql = format!("SELECT * FROM ({sql}) ORDER BY {}", order_in(main, rule));
        self.written = written(session, main, &sql, target_file_bytes).await?;
        self.check_counts()?;
        if main.tells_changes() && !self.touched.is_empty() {
            self.feed = feed::write(session, main, rule, &coming).await?;
        }
        Ok(())
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
        self.touched = live.into_iter().filter(is_of).collect();
        self.hits = self.touched.iter().filter_map(LiveFile::live_rows).sum();
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
            "SELECT {all} FROM winner_keys w RIGHT ANTI JOIN touched t ON {same}",
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

/// Takes rows out of `winners` that are as main has them.
async fn leave_unchanged(session: &SessionContext, main: &Table, rule: &Rule) -> Result<()> {
    let doing = "compare with main's rows";
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
    let changed = winners::collect(session, &sql).await?;
    session.deregister_table("winners").map_err(|e| foreign(doing, &e))?;
    changed.register(session, "winners")
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

/// `ORDER BY` by the key, as main spells it.
fn order_in(main: &Table, rule: &Rule) -> String {
    let schema = main.schema();
    let spelled = |name: &String| {
        let at = find_column(&schema, name);
        at.map_or_else(|| quoted(name), |at| quoted(schema.field(at).name()))
    };
    let order: Vec<String> = rule.key.iter().map(spelled).collect();
    order.join(", ")
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
