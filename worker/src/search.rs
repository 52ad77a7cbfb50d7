//! The search for rows of main with keys of the epochs, in turns when the keys are more than memory holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use alluvium_protocol::pipeline::SideIndex;
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_table::arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch};
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::DataType;
use alluvium_table::keys::{Found, KeySet, Scan};
use alluvium_table::schema::find_column;
use alluvium_table::spool::Spooled;
use alluvium_table::{LiveFile, Table};

use crate::winners::Rule;
use crate::{Permit, raw};

/// A set of keys takes at most this share of the work memory; more keys are looked for in turns.
pub(crate) const KEYS_SHARE: usize = 4;

/// Room that is made ahead, at most: more comes as it is needed.
const ROOM_KEYS: usize = 1 << 18;

/// What is looked for, and what was found so far.
pub(crate) struct Search<'a> {
    main: &'a Table,
    rule: &'a Rule,
    live: Vec<LiveFile>,
    permit: &'a Permit,
    /// The key's columns as main spells them, and their types.
    key: Vec<String>,
    types: Vec<DataType>,
    /// Those of them that main's folders are named after.
    apart: Vec<usize>,
    memory: usize,
    index: SideIndex,
    keys: KeySet,
    found: BTreeMap<String, Found>,
    counted: u64,
    upserts: u64,
}

/// What was found.
#[derive(Default)]
pub(crate) struct Searched {
    /// Distinct keys.
    pub(crate) keys: u64,
    /// Rows that come.
    pub(crate) upserts: u64,
    /// Files of main with rows of these keys.
    pub(crate) touched: Vec<Found>,
}

impl<'a> Search<'a> {
    /// A search in `live`, files of main, with room for the keys of so many rows.
    pub(crate) fn new(
        main: &'a Table,
        rule: &'a Rule,
        pipeline: &Pipeline,
        live: Vec<LiveFile>,
        permit: &'a Permit,
        rows: usize,
    ) -> Result<Self> {
        let schema = main.schema();
        let key = key_in(main, rule);
        let types = key
            .iter()
            .map(|name| find_column(&schema, name).map(|at| schema.field(at).data_type().clone()))
            .collect::<Option<Vec<DataType>>>()
            .ok_or_else(|| Error::internal("main lacks a column of its key"))?;
        let partitions = main.partition_columns();
        let apart: Vec<usize> =
            (0..key.len()).filter(|at| partitions.contains(&key[*at])).collect();
        let keys = KeySet::new(&types, rows.min(ROOM_KEYS), &apart)?;
        let memory = pipeline.sizes.memory_bytes / KEYS_SHARE;
        let (found, counted, upserts) = (BTreeMap::new(), 0, 0);
        Ok(Self {
            main,
            rule,
            live,
            permit,
            key,
            types,
            apart,
            memory,
            index: pipeline.side_index,
            keys,
            found,
            counted,
            upserts,
        })
    }

    /// Looks for these keys, too; of each it is known whether a row of it comes.
    pub(crate) async fn add(&mut self, columns: &[ArrayRef], comes: &BooleanArray) -> Result<()> {
        if self.keys.bytes() > self.memory {
            self.look().await?;
        }
        self.upserts += comes.true_count() as u64;
        self.keys.add(columns, &|row| comes.value(row))
    }

    /// Looks for the keys of these rows, which have an `_op`.
    pub(crate) async fn add_rows(&mut self, rows: &Spooled) -> Result<()> {
        for batch in rows.batches()? {
            let batch = batch?;
            let column = |name: &String| {
                let column = batch.column_by_name(name);
                column.map(Arc::clone).ok_or_else(|| Error::internal(format!("no {name} there")))
            };
            let columns = self.rule.key.iter().map(column).collect::<Result<Vec<_>>>()?;
            self.add(&columns, &comes(&batch)?).await?;
        }
        Ok(())
    }

    /// Rows that come, so far.
    pub(crate) fn upserts(&self) -> u64 {
        self.upserts
    }

    /// Finds the rows of all keys.
    pub(crate) async fn finish(mut self) -> Result<Searched> {
        self.look().await?;
        let touched = self.found.into_values().collect();
        Ok(Searched { keys: self.counted, upserts: self.upserts, touched })
    }

    async fn look(&mut self) -> Result<()> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let empty = KeySet::new(&self.types, 0, &self.apart)?;
        let keys = Arc::new(std::mem::replace(&mut self.keys, empty));
        self.counted += keys.len() as u64;
        let (table, key, memory_bytes) = (self.main, &self.key, self.memory);
        let scan = Scan { table, key, memory_bytes, index: self.index };
        for found in scan
            .find(&self.live, &keys, &|rows, of| {
                self.permit.reached("looks for keys in main", rows, of)
            })
            .await?
        {
            match self.found.get_mut(&found.file.path) {
                None => drop(self.found.insert(found.file.path.clone(), found)),
                Some(held) => {
                    let before = held.rows.len();
                    held.rows |= &found.rows;
                    // A key of an earlier turn again, in mode scd2 only: its row is counted once.
                    held.coming += found.coming.min(held.rows.len() - before);
                }
            }
        }
        Ok(())
    }
}

/// The key's columns, as main spells them.
pub(crate) fn key_in(main: &Table, rule: &Rule) -> Vec<String> {
    let schema = main.schema();
    let spelled = |name: &String| {
        find_column(&schema, name)
            .map_or_else(|| name.clone(), |at| schema.field(at).name().clone())
    };
    rule.key.iter().map(spelled).collect()
}

/// Which rows come, by their `_op`.
pub(crate) fn comes(batch: &RecordBatch) -> Result<BooleanArray> {
    let op = batch.column_by_name(raw::OP).ok_or_else(|| Error::internal("no _op"))?;
    let op = cast(op, &DataType::Utf8).map_err(Error::internal)?;
    let op = op.as_string::<i32>().iter();
    Ok(op.map(|op| Some(op == Some(raw::UPSERT))).collect())
}
