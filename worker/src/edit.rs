//! An edit of main: files with keys in question are rewritten without them, beside the rows that come.

use std::collections::BTreeSet;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::AsArray;
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{DataType, Int64Type};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::scan::FILE_COLUMN;
use alluvium_table::schema::find_column;
use alluvium_table::session::quoted;
use alluvium_table::spool::Spool;
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{LiveFile, Table};

use crate::merge::BASE_VERSION;
use crate::raw;
use crate::winners::{Rule, Scope};

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
}

impl Edit {
    /// Finds the files of main with keys of `winners`.
    pub(crate) async fn find_touched(
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
        self.rows_before = live.iter().map(LiveFile::live_rows).sum();
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

    /// Writes the rows that stay and the ones that come.
    pub(crate) async fn write(
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
