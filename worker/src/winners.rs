//! Which row of a key wins: the rule of "What main is".
//!
//! Owns: the columns that decide and their order, for merges (`ground.rs`, `sorted.rs`), and the rule as SQL
//! for questions about a whole table at an epoch (`as_of.rs`).

use alluvium_protocol::Pipeline;
use alluvium_protocol::pipeline::{Mode, same_name};
use alluvium_table::Table;
use alluvium_table::arrow::datatypes::Field;
use alluvium_table::schema::find_column;
use alluvium_table::session::{quoted, quoted_list};

use crate::ingest::table_names;
use crate::{raw, slowly};

/// Names and order, as raw spells them.
#[derive(Clone)]
pub struct Rule {
    /// The key's columns.
    pub key: Vec<String>,
    /// The data columns that enter main.
    pub columns: Vec<String>,
    /// Main's columns: these, and what the mode adds.
    pub output: Vec<String>,
    /// What main is.
    pub mode: Mode,
    /// `ORDER BY` that puts the last row of a key first.
    last_first: String,
    /// Columns that order rows of a key in one epoch, the last one last, NULL lowest.
    within_epoch: Vec<String>,
}

impl Rule {
    /// The rule of a pipeline over its raw table.
    pub fn new(pipeline: &Pipeline, table: &Table) -> Self {
        let schema = table.schema();
        let names = |fields: &[Field]| fields.iter().map(|f| f.name().clone()).collect::<Vec<_>>();
        let columns = names(&raw::main_fields(pipeline, &schema));
        let mode = pipeline.content.mode;
        let output = [columns.clone(), names(&raw::fields_of_mode(mode))].concat();
        let mut last_first = format!("{} DESC", quoted(raw::EPOCH));
        let mut within_epoch = Vec::new();
        // Raw lacks the column as long as no file had a value in it.
        if let Some(sequence) = &pipeline.content.sequence_by
            && let Some(at) = find_column(&schema, sequence)
        {
            within_epoch.push(schema.field(at).name().clone());
            let sequence = quoted(schema.field(at).name());
            last_first.push_str(&format!(", {sequence} DESC NULLS LAST"));
        }
        for place in [raw::FILE, raw::ROW] {
            last_first.push_str(&format!(", {} DESC", quoted(place)));
            within_epoch.push(place.to_owned());
        }
        let key = table_names(table, &pipeline.content.key);
        Self { key, columns, output, mode, last_first, within_epoch }
    }

    /// A column of the key as raw spells it; `None`: it is none.
    pub(crate) fn key_name<'a>(&'a self, name: &str) -> Option<&'a String> {
        self.key.iter().find(|key| same_name(key, name))
    }

    /// `left.k = right.k AND …`
    pub fn keys_equal(&self, left: &str, right: &str) -> String {
        let equal = self.key.iter().map(|k| format!("{left}.{0} = {right}.{0}", quoted(k)));
        equal.collect::<Vec<_>>().join(" AND ")
    }

    /// The key's columns, quoted, with commas.
    pub fn key_list(&self) -> String {
        quoted_list(self.key.iter().map(String::as_str))
    }

    /// The data columns, quoted, with commas.
    pub fn column_list(&self) -> String {
        quoted_list(self.columns.iter().map(String::as_str))
    }

    /// Main's columns, quoted, with commas.
    pub fn output_list(&self) -> String {
        quoted_list(self.output.iter().map(String::as_str))
    }

    /// `ORDER BY` that puts the last row of a key first.
    pub fn last_first(&self) -> &str {
        &self.last_first
    }

    /// Columns that order rows of a key in one epoch, the last one last, NULL lowest.
    pub(crate) fn order_within_epoch(&self) -> Vec<String> {
        self.within_epoch.clone()
    }

    /// The last row per key of a relation: for epochs above all applied ones, without reverts.
    fn last_rows(&self, relation: &str) -> String {
        format!(
            "SELECT {columns}, {op} FROM (SELECT {columns}, {op}, row_number() OVER \
             (PARTITION BY {key} ORDER BY {order}) AS _rank FROM {relation}) WHERE _rank = 1",
            columns = self.column_list(),
            op = quoted(raw::OP),
            key = self.key_list(),
            order = self.last_first,
        )
    }

    /// Every row of a relation, with its epoch.
    pub(crate) fn all_rows(&self, relation: &str) -> String {
        format!("SELECT {}, {} FROM {relation}", self.output_list(), quoted(raw::OP))
    }

    /// Main as the fold of `applied` over `base`, whole; these are its columns.
    pub(crate) fn whole(&self, columns: &[String], has_base: bool) -> String {
        let op = quoted(raw::OP);
        let of_raw = |name: &String| {
            let known = self.output.iter().find(|known| same_name(known, name));
            let from = known.map_or_else(|| "NULL".to_owned(), |known| quoted(known));
            format!("{from} AS {}", quoted(name))
        };
        let of_base = |name: &String| quoted(self.key_name(name).unwrap_or(name));
        // The left side is held in memory: the keys of raw, never all of the base.
        let rest = format!(
            " UNION ALL SELECT {} FROM (SELECT DISTINCT {} FROM mentioned) m \
             RIGHT ANTI JOIN base b ON {}",
            columns.iter().map(of_base).collect::<Vec<_>>().join(", "),
            self.key_list(),
            self.keys_equal("b", "m"),
        );
        format!(
            "WITH mentioned AS (SELECT * FROM applied WHERE {op} <> '{revert}'), last AS ({last}) \
             SELECT {columns} FROM last WHERE {op} = '{upsert}'{rest}",
            revert = raw::REVERT,
            last = match self.mode {
                Mode::Upsert | Mode::Snapshot => self.last_rows("mentioned"),
                Mode::Append => self.all_rows("mentioned"),
                Mode::Scd2 => slowly::versions(self, "mentioned"),
            },
            columns = columns.iter().map(of_raw).collect::<Vec<_>>().join(", "),
            upsert = raw::UPSERT,
            rest = if has_base { rest } else { String::new() },
        )
    }
}
