//! The last row of each key out of raw's files, which hold an epoch's rows by key: a merge of as many
//! sorted runs as there are epochs, in memory that does not grow with their rows.
//!
//! ```text
//!  epoch 3   a b   d ┐
//!  epoch 5   a   c d ├─► smallest key first; of equal ones the last by (epoch, sequence, file, row)
//!  epoch 9     b   d ┘
//! ```
//! That the files are in order is seen on the way, not believed: files of another order are left to SQL.

use std::cmp::Ordering;
use std::collections::binary_heap::PeekMut;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::{Arc, OnceLock};

use alluvium_protocol::{Epoch, Error, Result};
use alluvium_table::arrow::array::{ArrayRef, RecordBatch};
use alluvium_table::arrow::compute::{SortOptions, interleave_record_batch};
use alluvium_table::arrow::datatypes::{Field, Schema, SchemaRef};
use alluvium_table::arrow::row::{RowConverter, Rows, SortField};
use alluvium_table::deletion::RowSet;
use alluvium_table::rows::Pick;
use alluvium_table::schema::find_column;
use alluvium_table::spool::Spool;
use alluvium_table::{LiveFile, Table};
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::winners::Rule;
use crate::{Permit, raw};

/// Rows given out at a time.
const BATCH_ROWS: usize = 8192;

/// The last row of each key of these files of raw, by key; `None`: a file is not in that order.
pub(crate) async fn last_rows(
    raw: &Table,
    rule: &Rule,
    files: &[LiveFile],
    permit: &Permit,
) -> Result<Option<Spool>> {
    let columns = Columns::new(raw, rule)?;
    let mut merging = Merging::new(columns, &rule.columns)?;
    let mut by_epoch: BTreeMap<Epoch, Vec<LiveFile>> = BTreeMap::new();
    for file in files {
        let epoch = raw::epoch_of(file).ok_or_else(|| Error::internal("a file of no epoch"))?;
        by_epoch.entry(epoch).or_default().push(file.clone());
    }
    for (epoch, mut files) in by_epoch {
        // The writer numbers its files in their names.
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let run = Run { rows: in_turn(raw.clone(), merging.columns.schema.clone(), files), epoch };
        if !merging.begin(run).await? {
            return Ok(None);
        }
    }
    while merging.next_key().await? {
        if merging.is_full() {
            permit.check()?;
            merging.give_out()?;
        }
        if !merging.is_sorted {
            return Ok(None);
        }
    }
    merging.give_out()?;
    Ok(Some(merging.out))
}

type Batches = BoxStream<'static, Result<RecordBatch>>;

/// The rows of files, one file after the other.
fn in_turn(table: Table, schema: SchemaRef, files: Vec<LiveFile>) -> Batches {
    futures::stream::iter(files)
        .then(move |file| {
            let (table, schema) = (table.clone(), Arc::clone(&schema));
            async move { table.rows_of(&file, &schema, Pick::Without(RowSet::new())).await }
        })
        .flat_map(|rows| match rows {
            Ok(rows) => rows,
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        })
        .boxed()
}

/// What is read of raw, and how rows are compared.
struct Columns {
    schema: SchemaRef,
    key: Vec<String>,
    order: Vec<String>,
    by_key: RowConverter,
    by_order: RowConverter,
}

impl Columns {
    fn new(raw: &Table, rule: &Rule) -> Result<Self> {
        let schema = raw.schema();
        let mut fields: Vec<Field> = Vec::new();
        let order = rule.order_within_epoch();
        let own = [raw::OP.to_owned()];
        for name in rule.columns.iter().chain(&own).chain(&order).chain(&rule.key) {
            let at = find_column(&schema, name);
            let field = schema.field(at.ok_or_else(|| Error::internal(name))?);
            if !fields.contains(field) {
                fields.push(field.clone());
            }
        }
        let schema = Arc::new(Schema::new(fields));
        let converter = |names: &[String]| {
            let fields = names.iter().map(|name| {
                let kind = schema.field_with_name(name).map(|field| field.data_type().clone());
                let nulls_first = SortOptions { descending: false, nulls_first: true };
                Ok(SortField::new_with_options(kind.map_err(Error::internal)?, nulls_first))
            });
            RowConverter::new(fields.collect::<Result<_>>()?).map_err(Error::internal)
        };
        let (by_key, by_order) = (converter(&rule.key)?, converter(&order)?);
        Ok(Self { schema, key: rule.key.clone(), order, by_key, by_order })
    }
}

fn rows_by(converter: &RowConverter, names: &[String], batch: &RecordBatch) -> Result<Rows> {
    let column = |name: &String| {
        batch.column_by_name(name).map(Arc::clone).ok_or_else(|| Error::internal(name))
    };
    let columns = names.iter().map(column).collect::<Result<Vec<ArrayRef>>>()?;
    converter.convert_columns(&columns).map_err(Error::internal)
}

/// An epoch's rows.
struct Run {
    rows: Batches,
    epoch: Epoch,
}

/// Rows of a run in memory.
struct Held {
    number: usize,
    epoch: Epoch,
    batch: RecordBatch,
    keys: Rows,
    /// Made when two rows of one key in one epoch are to be compared.
    order: OnceLock<Rows>,
}

/// The next row of a run.
#[derive(Clone)]
struct Head {
    held: Arc<Held>,
    row: usize,
    run: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap has its largest on top.
        other.held.keys.row(other.row).cmp(&self.held.keys.row(self.row))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

struct Merging {
    columns: Columns,
    runs: Vec<Run>,
    heads: BinaryHeap<Head>,
    is_sorted: bool,
    /// Batches ever held.
    held: usize,
    /// Winners that were not given out so far, and the batches that they are in.
    winners: Vec<(usize, usize)>,
    sources: Vec<Arc<Held>>,
    places: HashMap<usize, usize>,
    /// Positions of the columns that go out.
    projection: Vec<usize>,
    out: Spool,
}

impl Merging {
    fn new(columns: Columns, output: &[String]) -> Result<Self> {
        let mut projection = Vec::with_capacity(output.len() + 1);
        for name in output.iter().chain([&raw::OP.to_owned()]) {
            projection.push(columns.schema.index_of(name).map_err(Error::internal)?);
        }
        let given = columns.schema.project(&projection).map_err(Error::internal)?;
        Ok(Self {
            columns,
            runs: Vec::new(),
            heads: BinaryHeap::new(),
            is_sorted: true,
            held: 0,
            winners: Vec::with_capacity(BATCH_ROWS),
            sources: Vec::new(),
            places: HashMap::new(),
            projection,
            out: Spool::new(Arc::new(given)),
        })
    }

    /// Takes part in a run. False: it is not sorted.
    async fn begin(&mut self, run: Run) -> Result<bool> {
        self.runs.push(run);
        self.load(self.runs.len() - 1, None).await?;
        Ok(self.is_sorted)
    }

    /// Brings the next rows of a run into memory, which follow `last`.
    async fn load(&mut self, run: usize, last: Option<&Head>) -> Result<()> {
        let of = &mut self.runs[run];
        let batch = loop {
            match of.rows.next().await {
                None => return Ok(()),
                Some(batch) => match batch? {
                    batch if batch.num_rows() == 0 => {}
                    batch => break batch,
                },
            }
        };
        let keys = rows_by(&self.columns.by_key, &self.columns.key, &batch)?;
        let is_in_order = |row: usize| keys.row(row - 1) <= keys.row(row);
        self.is_sorted &= (1..batch.num_rows()).all(is_in_order);
        if let Some(last) = last {
            self.is_sorted &= last.held.keys.row(last.row).data() <= keys.row(0).data();
        }
        let held = Held { number: self.held, epoch: of.epoch, batch, keys, order: OnceLock::new() };
        self.held += 1;
        self.heads.push(Head { held: Arc::new(held), row: 0, run });
        Ok(())
    }

    /// Finds the last row of the smallest key that is left. False: none is left.
    async fn next_key(&mut self) -> Result<bool> {
        let Some(mut best) = self.heads.peek().cloned() else { return Ok(false) };
        self.pass().await?;
        while let Some(head) = self.heads.peek().filter(|head| **head == best).cloned() {
            if self.is_later(&head, &best)? {
                best = head;
            }
            self.pass().await?;
        }
        let sources = &mut self.sources;
        let place = *self.places.entry(best.held.number).or_insert_with(|| {
            sources.push(Arc::clone(&best.held));
            sources.len() - 1
        });
        self.winners.push((place, best.row));
        Ok(true)
    }

    /// Passes over the row on top.
    async fn pass(&mut self) -> Result<()> {
        let Some(mut top) = self.heads.peek_mut() else { return Ok(()) };
        if top.row + 1 < top.held.batch.num_rows() {
            top.row += 1;
            return Ok(());
        }
        let last = PeekMut::pop(top);
        self.load(last.run, Some(&last)).await
    }

    /// Of two rows with one key, which decides: the rule's order.
    fn is_later(&self, one: &Head, other: &Head) -> Result<bool> {
        if one.held.epoch != other.held.epoch {
            return Ok(one.held.epoch > other.held.epoch);
        }
        let (one_order, other_order) = (self.order_of(&one.held)?, self.order_of(&other.held)?);
        Ok(one_order.row(one.row).data() > other_order.row(other.row).data())
    }

    fn order_of<'a>(&self, held: &'a Held) -> Result<&'a Rows> {
        if held.order.get().is_none() {
            let rows = rows_by(&self.columns.by_order, &self.columns.order, &held.batch)?;
            // Somebody else's are the same.
            let _ = held.order.set(rows);
        }
        held.order.get().ok_or_else(|| Error::internal("no order"))
    }

    fn is_full(&self) -> bool {
        self.winners.len() >= BATCH_ROWS
    }

    fn give_out(&mut self) -> Result<()> {
        if self.winners.is_empty() {
            return Ok(());
        }
        let batches: Vec<&RecordBatch> = self.sources.iter().map(|held| &held.batch).collect();
        let rows = interleave_record_batch(&batches, &self.winners).map_err(Error::internal)?;
        let rows = rows.project(&self.projection).map_err(Error::internal)?;
        self.winners.clear();
        self.sources.clear();
        self.places.clear();
        self.out.push(rows)
    }
}
