//! Rows put in order in memory that does not grow with them.
//!
//! ```text
//!  rows ─► parts that fit into memory, sorted ─► runs, on disk beyond a share of the memory
//!                                                  │ the first key of each batch
//!                                                  ▼
//!           ranges of keys that fit into memory ─► sorted ─► rows, range by range
//! ```
//! Parts that are in order already, as those of our own files are, are not sorted again.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{RecordBatch, UInt32Array};
use alluvium_table::arrow::compute::{SortOptions, interleave_record_batch, take_record_batch};
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::arrow::row::{RowConverter, Rows, SortField};
use alluvium_table::floats::with_one_zero;
use alluvium_table::schema::find_column;
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::width::{BATCH_ROWS, bytes_of_rows, rows_at_a_time};

/// Rows of a run that are read at a time: a range begins and ends within one.
const RUN_BATCH_ROWS: usize = 2048;
/// More runs than this are merged.
const RUNS_MAX: usize = 64;
/// One row of so many is looked at to find ranges.
const SAMPLE_ROWS: usize = 128;
/// One of so many parts of the memory holds runs; and one, for all that sort at a time, what they sort.
const MEMORY_PARTS: usize = 16;

/// By what rows are ordered, and in how much memory. Cheap to clone; clones share the memory.
#[derive(Clone)]
pub(crate) struct Plan {
    schema: SchemaRef,
    /// Positions of the columns in the schema. NULL is lowest.
    order: Arc<[usize]>,
    /// Sorted at a time.
    part_bytes: usize,
    /// What may still be held of runs in memory.
    left: Arc<AtomicUsize>,
}

impl Plan {
    /// Rows of `schema` by these columns, for one sorter at a time.
    pub(crate) fn new(schema: &SchemaRef, order: &[String], memory_bytes: usize) -> Result<Self> {
        Self::for_several(schema, order, memory_bytes, 1)
    }

    /// The same for so many sorters, or readers of sorted rows, at a time.
    pub(crate) fn for_several(
        schema: &SchemaRef,
        order: &[String],
        memory_bytes: usize,
        at_once: usize,
    ) -> Result<Self> {
        let place = |name: &String| {
            find_column(schema, name)
                .ok_or_else(|| Error::internal(format!("no column {name} to sort by")))
        };
        Ok(Self {
            schema: Arc::clone(schema),
            order: order.iter().map(place).collect::<Result<_>>()?,
            part_bytes: memory_bytes / MEMORY_PARTS / at_once.max(1),
            left: Arc::new(AtomicUsize::new(memory_bytes / MEMORY_PARTS)),
        })
    }

    fn converter(&self) -> Result<RowConverter> {
        let lowest = SortOptions { descending: false, nulls_first: true };
        let field = |at: &usize| {
            SortField::new_with_options(self.schema.field(*at).data_type().clone(), lowest)
        };
        RowConverter::new(self.order.iter().map(field).collect()).map_err(Error::internal)
    }

    fn keys(&self, converter: &RowConverter, batch: &RecordBatch) -> Result<Rows> {
        // As cursors over sorted rows compare them.
        let columns: Vec<_> =
            self.order.iter().map(|at| with_one_zero(batch.column(*at))).collect();
        converter.convert_columns(&columns).map_err(Error::internal)
    }
}

/// Takes rows in any order.
pub(crate) struct Sorter {
    plan: Plan,
    converter: RowConverter,
    part: Vec<RecordBatch>,
    part_bytes: usize,
    runs: Vec<Run>,
}

/// Rows in order.
struct Run {
    rows: Spooled,
    /// The first key of each batch.
    firsts: Vec<Box<[u8]>>,
    /// Keys of some rows, as many before the first as between two.
    samples: Vec<Box<[u8]>>,
    bytes: usize,
    /// How often its rows were merged.
    level: u32,
}

impl Sorter {
    /// A sorter without rows.
    pub(crate) fn new(plan: &Plan) -> Result<Self> {
        let converter = plan.converter()?;
        Ok(Self {
            plan: plan.clone(),
            converter,
            part: Vec::new(),
            part_bytes: 0,
            runs: Vec::new(),
        })
    }

    /// Takes rows of the plan's schema.
    pub(crate) fn push(&mut self, batch: RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        self.part_bytes += bytes_of_rows(&batch);
        self.part.push(batch);
        if self.part_bytes > self.plan.part_bytes { self.end_part() } else { Ok(()) }
    }

    /// Ends: the rows can be read any number of times.
    pub(crate) fn finish(mut self) -> Result<Runs> {
        self.end_part()?;
        Ok(Runs { plan: self.plan, runs: self.runs })
    }

    fn end_part(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.part_bytes);
        let mut parts = Vec::with_capacity(self.part.len());
        for batch in self.part.drain(..) {
            let (keys, rows) = (self.plan.keys(&self.converter, &batch)?, 0..batch.num_rows());
            parts.push(Part { batch, keys, rows });
        }
        if parts.is_empty() {
            return Ok(());
        }
        let mut run = NewRun::new(&self.plan, bytes, 0);
        let rows: usize = parts.iter().map(|part| part.rows.len()).sum();
        let batch_rows = rows_at_a_time(RUN_BATCH_ROWS, (rows as u64, bytes as u64));
        if is_sorted(&parts) {
            for part in parts {
                for first in part.rows.clone().step_by(batch_rows) {
                    let rows = batch_rows.min(part.rows.end - first);
                    let key = |row: usize| part.keys.row(first + row).data();
                    run.push(part.batch.slice(first, rows), key)?;
                }
            }
        } else {
            for batch in Sorted::new(parts, batch_rows) {
                let batch = batch?;
                let keys = self.plan.keys(&self.converter, &batch)?;
                run.push(batch, |row| keys.row(row).data())?;
            }
        }
        self.runs.push(run.finish()?);
        merge_last(&self.plan, &mut self.runs)
    }
}

/// A run that is being written.
struct NewRun {
    spool: Spool,
    firsts: Vec<Box<[u8]>>,
    samples: Vec<Box<[u8]>>,
    bytes: usize,
    level: u32,
}

impl NewRun {
    fn new(plan: &Plan, bytes: usize, level: u32) -> Self {
        let takes = |left: usize| left.checked_sub(bytes);
        let fits = plan.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, takes).is_ok();
        let memory = if fits { usize::MAX } else { 0 };
        let spool = Spool::within(Arc::clone(&plan.schema), memory);
        Self { spool, firsts: Vec::new(), samples: Vec::new(), bytes, level }
    }

    /// Appends rows; `key` gives the key of each.
    fn push<'a>(&mut self, batch: RecordBatch, key: impl Fn(usize) -> &'a [u8]) -> Result<()> {
        self.firsts.push(key(0).into());
        self.samples.extend(sampled(batch.num_rows()).map(|row| Box::from(key(row))));
        self.spool.push(batch)
    }

    fn finish(self) -> Result<Run> {
        let Self { spool, firsts, samples, bytes, level } = self;
        Ok(Run { rows: spool.finish()?, firsts, samples, bytes, level })
    }
}

/// Makes one run of the last ones when they are many: each on disk is an open file, and each range of keys
/// reads a little of all.
fn merge_last(plan: &Plan, runs: &mut Vec<Run>) -> Result<()> {
    while let Some(level) = runs.last().map(|run| run.level) {
        let of_level = runs.iter().rev().take_while(|run| run.level == level).count();
        if of_level < RUNS_MAX {
            return Ok(());
        }
        let merging = Runs { plan: plan.clone(), runs: runs.split_off(runs.len() - of_level) };
        let (rows, bytes) = merging.size();
        let batch_rows = rows_at_a_time(RUN_BATCH_ROWS, (rows as u64, bytes as u64));
        let mut merged = NewRun::new(plan, bytes, level + 1);
        let converter = plan.converter()?;
        for batch in merging.batches() {
            let batch = batch?;
            for first in (0..batch.num_rows()).step_by(batch_rows) {
                let rows = batch_rows.min(batch.num_rows() - first);
                let batch = batch.slice(first, rows);
                let keys = plan.keys(&converter, &batch)?;
                merged.push(batch, |row| keys.row(row).data())?;
            }
        }
        runs.push(merged.finish()?);
    }
    Ok(())
}

/// Rows of a batch that stand for those around them.
fn sampled(rows: usize) -> impl Iterator<Item = usize> {
    (SAMPLE_ROWS / 2..rows.max(SAMPLE_ROWS / 2 + 1))
        .step_by(SAMPLE_ROWS)
        .map(move |row| row.min(rows - 1))
}

/// Rows that are in order within each run.
pub(crate) struct Runs {
    plan: Plan,
    runs: Vec<Run>,
}

/// Keys from one, and below another.
#[derive(Clone)]
pub(crate) struct Keys {
    from: Option<Box<[u8]>>,
    to: Option<Box<[u8]>>,
}

impl Runs {
    /// Takes in the runs of another sorter of the same plan, whose rows come after.
    pub(crate) fn extend(&mut self, other: Self) -> Result<()> {
        self.runs.extend(other.runs);
        merge_last(&self.plan, &mut self.runs)
    }

    /// Rows and bytes.
    fn size(&self) -> (usize, usize) {
        let of_run = |(rows, bytes), run: &Run| (rows + run.rows.rows(), bytes + run.bytes);
        self.runs.iter().fold((0, 0), of_run)
    }

    /// Ranges that fit into memory, with about as many rows each: a multiple of `count`, unless keys are equal.
    pub(crate) fn ranges(&self, count: usize) -> Vec<Keys> {
        let (_, bytes) = self.size();
        let count =
            bytes.div_ceil(self.plan.part_bytes.max(1)).max(1).next_multiple_of(count.max(1));
        let samples = self.runs.iter().flat_map(|run| run.samples.iter());
        let mut samples: Vec<&[u8]> = samples.map(AsRef::as_ref).collect();
        samples.sort_unstable();
        let at = |part: usize| samples.get(part * samples.len() / count);
        let mut bounds: Vec<Box<[u8]>> =
            (1..count).filter_map(at).map(|key| Box::from(*key)).collect();
        bounds.dedup();
        let from = std::iter::once(None).chain(bounds.iter().cloned().map(Some));
        let to = bounds.iter().cloned().map(Some).chain(std::iter::once(None));
        from.zip(to).map(|(from, to)| Keys { from, to }).collect()
    }

    /// All rows, in order.
    pub(crate) fn batches(self) -> impl Iterator<Item = Result<RecordBatch>> + Send + 'static {
        let ranges = self.ranges(1);
        ranges.into_iter().flat_map(move |range| self.rows_in(&range))
    }

    /// The rows in a range, in order; of equal ones in the order in which they came.
    pub(crate) fn rows_in(
        &self,
        range: &Keys,
    ) -> Box<dyn Iterator<Item = Result<RecordBatch>> + Send> {
        match self.sorted_in(range) {
            Ok(sorted) => Box::new(sorted),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn sorted_in(&self, range: &Keys) -> Result<Sorted> {
        let converter = self.plan.converter()?;
        let mut parts = Vec::new();
        for run in &self.runs {
            let below = |key: &[u8]| run.firsts.partition_point(|first| **first < *key);
            let first = range.from.as_deref().map_or(0, |from| below(from).saturating_sub(1));
            let end = range.to.as_deref().map_or(run.firsts.len(), below);
            for batch in run.rows.batches_from(first)?.take(end.saturating_sub(first)) {
                let batch = batch?;
                let keys = self.plan.keys(&converter, &batch)?;
                let from = range.from.as_deref().map_or(0, |from| rows_below(&keys, from));
                let to = range.to.as_deref().map_or(keys.num_rows(), |to| rows_below(&keys, to));
                if to - from.min(to) == batch.num_rows() {
                    parts.push(Part { batch, keys, rows: from..to });
                } else if from < to {
                    // A copy: a slice would keep the rest in memory.
                    let rows = UInt32Array::from_iter_values(from as u32..to as u32);
                    let batch = take_record_batch(&batch, &rows).map_err(Error::internal)?;
                    let (keys, rows) = (self.plan.keys(&converter, &batch)?, 0..batch.num_rows());
                    parts.push(Part { batch, keys, rows });
                }
            }
        }
        let (rows, bytes) = self.size();
        Ok(Sorted::new(parts, rows_at_a_time(BATCH_ROWS, (rows as u64, bytes as u64))))
    }
}

/// How many of the keys, which are in order, are below one.
fn rows_below(keys: &Rows, key: &[u8]) -> usize {
    let (mut from, mut to) = (0, keys.num_rows());
    while from < to {
        let middle = from.midpoint(to);
        match keys.row(middle).data() < key {
            true => from = middle + 1,
            false => to = middle,
        }
    }
    from
}

/// Some rows of a batch, and the keys of all its rows.
struct Part {
    batch: RecordBatch,
    keys: Rows,
    rows: Range<usize>,
}

fn is_sorted(parts: &[Part]) -> bool {
    let keys = || parts.iter().flat_map(|part| part.rows.clone().map(|row| part.keys.row(row)));
    keys().zip(keys().skip(1)).all(|(one, next)| one.data() <= next.data())
}

/// A row's place among the parts, with the beginning of its key: most comparisons need no more.
struct Place {
    begins: u64,
    part: u32,
    row: u32,
}

/// The rows of parts in the order of their keys, some at a time; of equal ones in the order of the parts.
struct Sorted {
    parts: Vec<Part>,
    places: Vec<Place>,
    at: usize,
    batch_rows: usize,
}

impl Sorted {
    fn new(parts: Vec<Part>, batch_rows: usize) -> Self {
        let mut places = Vec::with_capacity(parts.iter().map(|part| part.rows.len()).sum());
        for (number, part) in (0..).zip(&parts) {
            for row in part.rows.clone() {
                let begins = beginning(part.keys.row(row).data());
                places.push(Place { begins, part: number, row: row as u32 });
            }
        }
        let key = |place: &Place| parts[place.part as usize].keys.row(place.row as usize);
        places.sort_by(|one, other| {
            let by_beginning = one.begins.cmp(&other.begins);
            by_beginning.then_with(|| key(one).data().cmp(key(other).data()))
        });
        Self { parts, places, at: 0, batch_rows }
    }

    fn rows_of_next(&self) -> usize {
        self.batch_rows.min(self.places.len() - self.at)
    }

    fn next_batch(&mut self) -> Result<RecordBatch> {
        let places = &self.places[self.at..self.at + self.rows_of_next()];
        self.at += places.len();
        let places: Vec<(usize, usize)> =
            places.iter().map(|place| (place.part as usize, place.row as usize)).collect();
        let batches: Vec<&RecordBatch> = self.parts.iter().map(|part| &part.batch).collect();
        interleave_record_batch(&batches, &places).map_err(Error::internal)
    }
}

impl Iterator for Sorted {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.at < self.places.len()).then(|| self.next_batch())
    }
}

/// The first eight bytes of a key, as a number of the same order.
fn beginning(key: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let length = key.len().min(8);
    bytes[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use alluvium_table::arrow::array::{ArrayRef, Int64Array, StringArray, cast::AsArray};
    use alluvium_table::arrow::datatypes::{DataType, Field, Int64Type, Schema};

    use super::*;

    fn batch(numbers: &[i64]) -> RecordBatch {
        let texts: StringArray =
            numbers.iter().map(|n| (n % 7 != 0).then(|| format!("{:05}", n % 1000))).collect();
        let columns: [(&str, ArrayRef); 2] =
            [("text", Arc::new(texts)), ("number", Arc::new(Int64Array::from(numbers.to_vec())))];
        let fields = [("text", DataType::Utf8), ("number", DataType::Int64)]
            .map(|(name, kind)| Field::new(name, kind, true));
        let columns = columns.map(|(_, column)| column).to_vec();
        RecordBatch::try_new(Arc::new(Schema::new(fields.to_vec())), columns).unwrap()
    }

    fn sorted(memory: usize, order: &[&str]) -> (usize, Vec<(Option<String>, i64)>) {
        let order: Vec<String> = order.iter().map(|name| (*name).to_owned()).collect();
        let numbers: Vec<i64> = (0..50_000).map(|n| n * 7919 % 50_000).collect();
        let plan = Plan::new(batch(&[]).schema_ref(), &order, memory).unwrap();
        let mut sorter = Sorter::new(&plan).unwrap();
        let whole = batch(&numbers);
        for at in (0..numbers.len()).step_by(1000) {
            // Slices of one batch: each is as large as its rows.
            sorter.push(whole.slice(at, 1000)).unwrap();
        }
        let runs = sorter.finish().unwrap();
        let ranges = runs.ranges(3).len();
        let mut rows = Vec::new();
        for batch in runs.batches() {
            let batch = batch.unwrap();
            let numbers = batch.column(1).as_primitive::<Int64Type>();
            let texts = batch.column(0).as_string::<i32>();
            rows.extend(texts.iter().map(|t| t.map(str::to_owned)).zip(numbers.values().to_vec()));
        }
        (ranges, rows)
    }

    #[test]
    fn rows_come_in_order_whether_they_fit_into_memory_or_not() {
        let mut expected: Vec<(Option<String>, i64)> =
            (0..50_000).map(|n| ((n % 7 != 0).then(|| format!("{:05}", n % 1000)), n)).collect();
        expected.sort();
        let (few, in_memory) = sorted(1 << 30, &["text", "number"]);
        let (many, on_disk) = sorted(1 << 20, &["text", "number"]);
        // So little that there are hundreds of runs, which are merged.
        let (_, merged) = sorted(1 << 14, &["text", "number"]);
        assert!(in_memory == expected && on_disk == expected && merged == expected);
        assert!(few == 3 && many > few && many % 3 == 0, "{few} {many}");
    }

    #[test]
    fn equal_rows_stay_in_the_order_in_which_they_came() {
        let (_, rows) = sorted(1 << 20, &["text"]);
        let came: Vec<i64> = (0..50_000).map(|n| n * 7919 % 50_000).collect();
        let mut expected: Vec<(Option<String>, i64)> =
            came.iter().map(|n| ((n % 7 != 0).then(|| format!("{:05}", n % 1000)), *n)).collect();
        expected.sort_by(|one, other| one.0.cmp(&other.0));
        assert!(rows == expected);
    }
}
