//! Rows in the order of their keys, several kinds side by side: the last row of each key, and which of the
//! kinds has one. A few batches of each are in memory.

use std::sync::Arc;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{Array, AsArray, RecordBatch, StringArray};
use alluvium_table::arrow::compute::{SortOptions, interleave_record_batch};
use alluvium_table::arrow::datatypes::{DataType, SchemaRef};
use alluvium_table::arrow::row::{RowConverter, Rows, SortField};
use alluvium_table::floats::with_one_zero;
use alluvium_table::schema::{conform, find_column};
use alluvium_table::width::{BATCH_BYTES, BATCH_ROWS, bytes_of_rows};

use crate::raw;

/// Batches that chosen rows are of.
const BATCHES_MAX: usize = 32;

/// Batches of rows in order.
pub(crate) type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// Goes through rows in the order of their keys, NULL lowest.
pub(crate) struct Cursor {
    batches: Batches,
    converter: RowConverter,
    key: Vec<usize>,
    /// Columns whose values are compared, and how; what has no such way is compared one by one.
    values: Vec<usize>,
    by_values: Option<RowConverter>,
    held: Option<Held>,
    at: usize,
}

/// Rows in memory.
struct Held {
    batch: Arc<RecordBatch>,
    keys: Rows,
    values: Option<Rows>,
}

/// A row, and its values for comparisons.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) batch: Arc<RecordBatch>,
    pub(crate) row: usize,
    values: Option<Box<[u8]>>,
}

impl Cursor {
    /// Stands at the first of the rows, which have this schema.
    pub(crate) fn new(batches: Batches, schema: &SchemaRef, key: &[String]) -> Result<Self> {
        let place = |name: &String| find_column(schema, name).ok_or_else(|| Error::internal(name));
        let key = key.iter().map(place).collect::<Result<Vec<usize>>>()?;
        let lowest = SortOptions { descending: false, nulls_first: true };
        let fields = key
            .iter()
            .map(|at| SortField::new_with_options(schema.field(*at).data_type().clone(), lowest));
        let converter = RowConverter::new(fields.collect()).map_err(Error::internal)?;
        let (values, by_values) = (Vec::new(), None);
        let mut cursor = Self { batches, converter, key, values, by_values, held: None, at: 0 };
        cursor.load()?;
        Ok(cursor)
    }

    /// The same, with rows that can be compared by these columns.
    pub(crate) fn comparing(mut self, schema: &SchemaRef, columns: &[String]) -> Result<Self> {
        let place = |name: &String| find_column(schema, name).ok_or_else(|| Error::internal(name));
        self.values = columns.iter().map(place).collect::<Result<Vec<usize>>>()?;
        let kinds = self.values.iter().map(|at| schema.field(*at).data_type().clone());
        let fields: Vec<SortField> = kinds.map(SortField::new).collect();
        if !fields.is_empty() && RowConverter::supports_fields(&fields) {
            self.by_values = Some(RowConverter::new(fields).map_err(Error::internal)?);
        }
        if let Some(held) = &mut self.held {
            held.values = values_of(&held.batch, &self.values, self.by_values.as_ref())?;
        }
        Ok(self)
    }

    fn load(&mut self) -> Result<()> {
        self.held = None;
        self.at = 0;
        for batch in self.batches.by_ref() {
            let batch = batch?;
            if batch.num_rows() > 0 {
                // A table that others wrote may hold several zeros, which are one key.
                let key: Vec<_> =
                    self.key.iter().map(|at| with_one_zero(batch.column(*at))).collect();
                let keys = self.converter.convert_columns(&key).map_err(Error::internal)?;
                let values = values_of(&batch, &self.values, self.by_values.as_ref())?;
                self.held = Some(Held { batch: Arc::new(batch), keys, values });
                return Ok(());
            }
        }
        Ok(())
    }

    /// The key of the row at which it stands; `None`: there are no more.
    pub(crate) fn key(&self) -> Option<&[u8]> {
        self.held.as_ref().map(|held| held.keys.row(self.at).data())
    }

    pub(crate) fn advance(&mut self) -> Result<()> {
        self.at += 1;
        match &self.held {
            Some(held) if self.at < held.batch.num_rows() => Ok(()),
            _ => self.load(),
        }
    }

    /// The batch at whose beginning it stands; it goes on to the next one.
    pub(crate) fn next_batch(&mut self) -> Result<Option<Arc<RecordBatch>>> {
        let batch = self.held.as_ref().map(|held| Arc::clone(&held.batch));
        self.load()?;
        Ok(batch)
    }

    /// Goes on to the first key that is not below this one.
    fn seek(&mut self, key: &[u8]) -> Result<bool> {
        while self.key().is_some_and(|held| held < key) {
            self.advance()?;
        }
        Ok(self.key() == Some(key))
    }

    fn row(&self) -> Option<(&Arc<RecordBatch>, usize)> {
        self.held.as_ref().map(|held| (&held.batch, self.at))
    }

    /// The row at which it stands, to be kept.
    pub(crate) fn seen(&self) -> Option<Seen> {
        let held = self.held.as_ref()?;
        let values = held.values.as_ref().map(|values| values.row(self.at).data().into());
        Some(Seen { batch: Arc::clone(&held.batch), row: self.at, values })
    }

    /// Both rows have the same values, NULL and NaN the same as themselves.
    pub(crate) fn is_same(&self, one: &Seen, other: &Seen) -> bool {
        if let (Some(one), Some(other)) = (&one.values, &other.values) {
            return one == other;
        }
        let value = |of: &Seen, at: usize| of.batch.column(at).slice(of.row, 1).to_data();
        self.values.iter().all(|at| value(one, *at) == value(other, *at))
    }
}

fn values_of(
    batch: &RecordBatch,
    columns: &[usize],
    converter: Option<&RowConverter>,
) -> Result<Option<Rows>> {
    let Some(converter) = converter else { return Ok(None) };
    let columns: Vec<_> = columns.iter().map(|at| Arc::clone(batch.column(*at))).collect();
    converter.convert_columns(&columns).map(Some).map_err(Error::internal)
}

/// Goes through two kinds of rows with unique keys side by side. `visit` is told of each key which have it.
pub(crate) fn side_by_side(
    mut one: Cursor,
    mut other: Cursor,
    mut visit: impl FnMut(Option<&Seen>, Option<&Seen>, &Cursor) -> Result<()>,
) -> Result<()> {
    loop {
        let (has_one, has_other) = match (one.key(), other.key()) {
            (None, None) => return Ok(()),
            (Some(left), Some(right)) => (left <= right, right <= left),
            (left, right) => (left.is_some(), right.is_some()),
        };
        let left = if has_one { one.seen() } else { None };
        let right = if has_other { other.seen() } else { None };
        visit(left.as_ref(), right.as_ref(), &one)?;
        if has_one {
            one.advance()?;
        }
        if has_other {
            other.advance()?;
        }
    }
}

/// Rows that were chosen out of batches.
#[derive(Default)]
pub(crate) struct Picks {
    batches: Vec<Arc<RecordBatch>>,
    /// Of a row of each.
    row_bytes: Vec<usize>,
    places: Vec<(usize, usize)>,
    bytes: usize,
}

impl Picks {
    pub(crate) fn pick(&mut self, batch: &Arc<RecordBatch>, row: usize) {
        let known = self.batches.iter().rposition(|held| Arc::ptr_eq(held, batch));
        let at = known.unwrap_or_else(|| {
            self.row_bytes.push(bytes_of_rows(batch) / batch.num_rows().max(1));
            self.batches.push(Arc::clone(batch));
            self.batches.len() - 1
        });
        self.bytes += self.row_bytes[at];
        self.places.push((at, row));
    }

    /// Chosen rows hold the batches that they are in: few rows of many batches are enough, too.
    pub(crate) fn is_full(&self) -> bool {
        self.places.len() >= BATCH_ROWS
            || self.bytes >= BATCH_BYTES
            || self.batches.len() >= BATCHES_MAX
    }

    /// The chosen rows; `None`: there are none.
    pub(crate) fn take(&mut self) -> Result<Option<RecordBatch>> {
        if self.places.is_empty() {
            return Ok(None);
        }
        let batches: Vec<&RecordBatch> = self.batches.iter().map(AsRef::as_ref).collect();
        let rows = interleave_record_batch(&batches, &self.places).map_err(Error::internal)?;
        *self = Self::default();
        Ok(Some(rows))
    }
}

/// The last row of each key that is no revert; keys that have reverts alone are left out.
pub(crate) struct LastOfEach {
    rows: Cursor,
    /// Where `_op` is; `None`: all rows count.
    op: Option<usize>,
    picks: Picks,
}

impl LastOfEach {
    /// Of rows by key and then in the order in which they apply.
    pub(crate) fn new(rows: Cursor, schema: &SchemaRef) -> Self {
        Self { rows, op: schema.index_of(raw::OP).ok(), picks: Picks::default() }
    }

    fn counts(&self, batch: &RecordBatch, row: usize) -> bool {
        let op = self.op.and_then(|at| batch.column(at).as_string_opt::<i32>());
        op.is_none_or(|op| op.value(row) != raw::REVERT)
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let mut key: Vec<u8> = Vec::new();
        while !self.picks.is_full() {
            let Some(first) = self.rows.key() else { break };
            key.clear();
            key.extend_from_slice(first);
            let mut last = None;
            while self.rows.key() == Some(&key) {
                if let Some((batch, row)) = self.rows.row()
                    && self.counts(batch, row)
                {
                    last = Some((Arc::clone(batch), row));
                }
                self.rows.advance()?;
            }
            if let Some((batch, row)) = last {
                self.picks.pick(&batch, row);
            }
        }
        self.picks.take()
    }
}

impl Iterator for LastOfEach {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

/// A row for each key of `keys`: the one of `rows`, else the one of `base`, else the one of `keys` itself.
/// Each has a key once, and all have the same columns.
pub(crate) struct Layers {
    keys: Cursor,
    rows: Cursor,
    base: Option<Cursor>,
    /// Rows of `rows` with other keys come, too.
    with_others: bool,
    picks: Picks,
}

impl Layers {
    /// These, one over the other.
    pub(crate) fn new(keys: Cursor, rows: Cursor, base: Option<Cursor>, with_others: bool) -> Self {
        Self { keys, rows, base, with_others, picks: Picks::default() }
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let Self { keys, rows, base, with_others, picks } = self;
        while !picks.is_full() {
            let is_other = match (rows.key(), keys.key()) {
                (Some(row), Some(key)) => row < key,
                (row, None) => row.is_some(),
                (None, Some(_)) => false,
            };
            if *with_others && is_other {
                rows.row().into_iter().for_each(|(batch, row)| picks.pick(batch, row));
                rows.advance()?;
                continue;
            }
            let Some(key) = keys.key() else { break };
            let is_in_base = match base {
                Some(base) => base.seek(key)?,
                None => false,
            };
            let is_in_rows = rows.seek(key)?;
            let from = match base.as_ref().filter(|_| is_in_base) {
                _ if is_in_rows => &*rows,
                Some(base) => base,
                None => &*keys,
            };
            from.row().into_iter().for_each(|(batch, row)| picks.pick(batch, row));
            keys.advance()?;
            if is_in_rows {
                rows.advance()?;
            }
        }
        picks.take()
    }
}

impl Iterator for Layers {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

/// The keys of one side that the other has not, each once.
pub(crate) struct Without {
    keys: Cursor,
    others: Cursor,
    picks: Picks,
}

impl Without {
    /// Those of `keys` that are not among `others`; both in order, and of the same types.
    pub(crate) fn new(keys: Cursor, others: Cursor) -> Self {
        Self { keys, others, picks: Picks::default() }
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let mut key: Vec<u8> = Vec::new();
        while !self.picks.is_full() {
            let Some(first) = self.keys.key() else { break };
            key.clear();
            key.extend_from_slice(first);
            if !self.others.seek(&key)? {
                self.keys.row().into_iter().for_each(|(batch, row)| self.picks.pick(batch, row));
            }
            while self.keys.key() == Some(&key) {
                self.keys.advance()?;
            }
        }
        self.picks.take()
    }
}

impl Iterator for Without {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

/// The rows with these columns, absent ones NULL, and with this `_op`, where one is given.
pub(crate) fn with_columns(
    batches: impl Iterator<Item = Result<RecordBatch>> + Send + 'static,
    columns: &SchemaRef,
    op: Option<&'static str>,
) -> Batches {
    let columns = Arc::clone(columns);
    Box::new(batches.map(move |batch| {
        let batch = conform(&batch?, &columns).map_err(Error::internal)?;
        let Some((op, at)) = op.zip(columns.index_of(raw::OP).ok()) else { return Ok(batch) };
        let mut values = batch.columns().to_vec();
        let op = StringArray::from_iter_values(std::iter::repeat_n(op, batch.num_rows()));
        debug_assert_eq!(columns.field(at).data_type(), &DataType::Utf8);
        values[at] = Arc::new(op);
        RecordBatch::try_new(Arc::clone(&columns), values).map_err(Error::internal)
    }))
}
