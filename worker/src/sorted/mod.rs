//! The last row of each key out of raw's files, which hold rows by key: a merge of as many sorted runs as
//! there are writers (one for an epoch, or for a piece of a large one), in memory that does not grow with
//! their rows.
//!
//! ```text
//!  epoch 3   a b   d ┐
//!  epoch 5   a   c d ├─► smallest key first; of equal ones the last by (epoch, sequence, file, row)
//!  epoch 9     b   d ┘
//! ```
//! That the files are in order is seen on the way, not believed: files of another order are left to the sorter.

mod cuts;
mod ranges;
mod shares;

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
use alluvium_table::width::{BATCH_BYTES, BATCH_ROWS, bytes_of_rows};
use alluvium_table::{LiveFile, Table};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};

pub(crate) use self::cuts::Cuts;
use self::ranges::{Range, Reach};
pub(crate) use self::shares::{Share, rows_of, text_of};
use crate::ground::columns_of;
use crate::search::{Search, comes};
use crate::winners::Rule;
use crate::{Permit, raw};

/// Batches that rows given out at a time are of; all runs have one in memory anyway.
const SOURCES_MAX: usize = 256;
/// Of the memory this part may go into rows of runs that wait for their turn.
const RUNS_SHARE: u64 = 2;
/// One of so many parts of the memory may keep what was fetched of a store.
const KEPT_PART: usize = 8;
/// Runs that are opened at a time.
const RUNS_AT_ONCE: usize = 16;

/// The last row of each key, or of some keys: where it is in raw's files.
pub(crate) struct LastRows {
    raw: Table,
    rule: Rule,
    /// Files by epoch and writer, in order, with their rows that are the last of a key.
    runs: BTreeMap<RunId, Vec<(LiveFile, RowSet)>>,
    keys: u64,
    upserts: u64,
    /// Rows of the files that were passed over: all, or those of a range.
    passed: u64,
}

/// The epoch and the writer of files that follow one another in the order of their keys.
type RunId = (Epoch, String);

/// The writer of a file: what its name (`part-00001-<writer>-c000.zstd.parquet`) says after its number.
fn writer_of(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    let writer = name.strip_prefix("part-").and_then(|rest| rest.split_once('-'));
    writer.map_or_else(String::new, |(_, writer)| writer.to_owned())
}

impl LastRows {
    /// No rows so far of these files.
    fn none(raw: &Table, rule: &Rule, files: &[LiveFile]) -> Result<Self> {
        let mut runs: BTreeMap<RunId, Vec<(LiveFile, RowSet)>> = BTreeMap::new();
        for file in files {
            let epoch = raw::epoch_of(file).ok_or_else(|| Error::internal("a file of no epoch"))?;
            let run = runs.entry((epoch, writer_of(&file.path))).or_default();
            run.push((file.clone(), RowSet::new()));
        }
        for files in runs.values_mut() {
            // The writer numbers its files in their names.
            files.sort_by(|(a, _), (b, _)| a.path.cmp(&b.path));
        }
        Ok(Self { raw: raw.clone(), rule: rule.clone(), runs, keys: 0, upserts: 0, passed: 0 })
    }

    /// Finds them, by the columns that decide, and has their keys searched for: of all keys, or of a range. `None`:
    /// a file is not in the order of its keys, or there are more runs than so much memory is enough for.
    pub(crate) async fn find(
        raw: &Table,
        rule: &Rule,
        (files, memory_bytes): (&[LiveFile], usize),
        range: Option<(&Cuts, usize)>,
        search: &mut Search<'_>,
        permit: &Permit,
    ) -> Result<Option<Self>> {
        let range = match range {
            Some((cuts, number)) => Some(cuts.range(raw, rule, files, number).await?),
            None => None,
        };
        // What decides is in the rows that are given out later, too.
        let raw = raw.keeping(memory_bytes / KEPT_PART);
        let files = range.as_ref().map_or(files, |range| &range.files);
        let mut found = Self::none(&raw, rule, files)?;
        if !found.is_walkable(memory_bytes).await? {
            return Ok(None);
        }
        let runs: Vec<RunId> = found.runs.keys().cloned().collect();
        let mut walk = found.walk(range.as_ref())?;
        walk.begin().await?;
        let of = range
            .as_ref()
            .map_or_else(|| files.iter().filter_map(|file| file.rows).sum(), |range| range.rows);
        while let Some(rows) = walk.next_batch().await? {
            permit.reached("chooses the last row of each key", walk.rows_read, of)?;
            if !walk.is_sorted {
                return Ok(None);
            }
            let comes = comes(&rows)?;
            for (at, place) in std::mem::take(&mut walk.places).into_iter().enumerate() {
                found.insert(&runs, place, comes.value(at))?;
            }
            search.add(&rows.columns()[..rule.key.len()], &comes).await?;
        }
        found.raw.keep_no_more();
        found.passed = walk.passed;
        Ok(walk.is_sorted.then_some(found))
    }

    /// Its files can be walked side by side: nobody else deleted rows of them, and there are no more runs than so
    /// much memory is enough for.
    async fn is_walkable(&self, memory_bytes: usize) -> Result<bool> {
        let mut files = self.runs.values().flatten();
        let has_marks = files.any(|(file, _)| file.remove.deletion_vector.is_some());
        Ok(!has_marks && self.held_bytes().await? <= memory_bytes as u64 / RUNS_SHARE)
    }

    /// A walk through the columns that decide.
    fn walk(&self, range: Option<&Range>) -> Result<Merging> {
        let deciding = [self.rule.key.clone(), vec![raw::OP.to_owned()]].concat();
        let columns = Columns::new(&self.raw, &self.rule, &deciding)?;
        let picks = self.runs.iter().map(|((epoch, _), files)| {
            let pick = |(file, _): &(LiveFile, RowSet)| {
                let all = || Pick::Without(RowSet::new());
                (file.clone(), range.map_or_else(all, |range| range.pick(file)))
            };
            (*epoch, files.iter().map(pick).collect())
        });
        let mut walk = Merging::new(&self.raw, columns, &deciding, picks.collect())?;
        walk.reach = range.map(|range| range.reach.clone());
        Ok(walk)
    }

    /// Rows of the files that were passed over.
    pub(crate) fn passed(&self) -> u64 {
        self.passed
    }

    fn insert(&mut self, runs: &[RunId], place: Place, comes: bool) -> Result<()> {
        let (run, file, row) = place;
        let of_run = self.runs.get_mut(&runs[run]).and_then(|files| files.get_mut(file));
        of_run.ok_or_else(|| Error::internal("a row of no file"))?.1.insert(row);
        self.keys += 1;
        self.upserts += u64::from(comes);
        Ok(())
    }

    /// About how much memory it takes to give out the rows: a file of each run is open.
    async fn held_bytes(&self) -> Result<u64> {
        let columns = columns_of(&self.raw.schema(), &self.rule.columns)?;
        let firsts = self.runs.values().filter_map(|files| files.first());
        let looks = firsts.map(|(file, _)| self.raw.bytes_while_read(file, &columns));
        let looks = futures::stream::iter(looks.collect::<Vec<_>>()).buffered(RUNS_AT_ONCE);
        looks.try_fold(0, |all, bytes| async move { Ok(all + bytes) }).await
    }

    /// How many keys, and rows that come.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.keys, self.upserts)
    }

    /// These rows, by key: the columns of main that come from files, and `_op`.
    pub(crate) async fn rows(&self) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        let output = [self.rule.columns.clone(), vec![raw::OP.to_owned()]].concat();
        let columns = Columns::new(&self.raw, &self.rule, &output)?;
        let picks = self.runs.iter().map(|((epoch, _), files)| {
            let last = |(file, rows): &(LiveFile, RowSet)| (file.clone(), Pick::Only(rows.clone()));
            (*epoch, files.iter().map(last).collect())
        });
        let mut merging = Merging::new(&self.raw, columns, &output, picks.collect())?;
        merging.begin().await?;
        let rows = futures::stream::try_unfold(merging, |mut merging| async move {
            let rows = merging.next_batch().await?;
            Ok(rows.map(|rows| (rows, merging)))
        });
        Ok(rows.boxed())
    }
}

/// The run, the file of it, and the position of a row.
type Place = (usize, usize, u64);

/// Batches of rows.
type Batches = BoxStream<'static, Result<RecordBatch>>;

/// A batch, the number of its file, and its first row's position there.
type Placed = (RecordBatch, usize, u64);

/// The rows of files, one file after the other. Positions are right where no row between them is left out.
fn in_turn(
    table: Table,
    schema: SchemaRef,
    files: Vec<(LiveFile, Pick)>,
) -> BoxStream<'static, Result<Placed>> {
    futures::stream::iter(files.into_iter().enumerate())
        .then(move |(number, (file, pick))| {
            let (table, schema) = (table.clone(), Arc::clone(&schema));
            async move {
                let first = match &pick {
                    Pick::Without(_) => 0,
                    Pick::Only(rows) => rows.min().unwrap_or(0),
                };
                Ok((number, first, table.rows_of(&file, &schema, pick).await?))
            }
        })
        .flat_map(|opened: Result<(usize, u64, Batches)>| match opened {
            Ok((number, mut next, rows)) => {
                let placed = rows.map(move |batch| {
                    let batch = batch?;
                    let first = next;
                    next += batch.num_rows() as u64;
                    Ok((batch, number, first))
                });
                placed.boxed()
            }
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
    /// Reads `output`, and what decides.
    fn new(raw: &Table, rule: &Rule, output: &[String]) -> Result<Self> {
        let schema = raw.schema();
        let mut fields: Vec<Field> = Vec::new();
        let order = rule.order_within_epoch();
        for name in output.iter().chain(&order).chain(&rule.key) {
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
    rows: BoxStream<'static, Result<Placed>>,
    epoch: Epoch,
}

impl Run {
    /// The next batch that has rows.
    async fn next(&mut self) -> Result<Option<Placed>> {
        while let Some((batch, file, first_row)) = self.rows.try_next().await? {
            if batch.num_rows() > 0 {
                return Ok(Some((batch, file, first_row)));
            }
        }
        Ok(None)
    }
}

/// Rows of a run in memory.
struct Held {
    number: usize,
    run: usize,
    epoch: Epoch,
    file: usize,
    first_row: u64,
    batch: RecordBatch,
    /// Bytes of a row, about.
    row_bytes: usize,
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
    /// Rows with other keys are passed by.
    reach: Option<Reach>,
    /// Batches ever held, and rows that were read.
    held: usize,
    rows_read: u64,
    /// Rows passed over.
    passed: u64,
    /// Last rows that were not given out so far, and the batches that they are in.
    last: Vec<(usize, usize)>,
    last_bytes: usize,
    sources: Vec<Arc<Held>>,
    by_number: HashMap<usize, usize>,
    /// Positions of the columns that go out.
    projection: Vec<usize>,
    /// Where each row is that was given out.
    places: Vec<Place>,
}

impl Merging {
    fn new(
        raw: &Table,
        columns: Columns,
        output: &[String],
        picks: Vec<(Epoch, Vec<(LiveFile, Pick)>)>,
    ) -> Result<Self> {
        let mut projection = Vec::with_capacity(output.len());
        for name in output {
            projection.push(columns.schema.index_of(name).map_err(Error::internal)?);
        }
        let run = |(epoch, files)| {
            let rows = in_turn(raw.clone(), Arc::clone(&columns.schema), files);
            Run { rows, epoch }
        };
        Ok(Self {
            runs: picks.into_iter().map(run).collect(),
            columns,
            heads: BinaryHeap::new(),
            is_sorted: true,
            reach: None,
            held: 0,
            rows_read: 0,
            passed: 0,
            last: Vec::with_capacity(BATCH_ROWS),
            last_bytes: 0,
            sources: Vec::new(),
            by_number: HashMap::new(),
            projection,
            places: Vec::new(),
        })
    }

    /// Brings the first rows of all runs into memory; on object storage that is mostly waiting.
    async fn begin(&mut self) -> Result<()> {
        let mut firsts = Vec::with_capacity(self.runs.len());
        for (number, run) in self.runs.iter_mut().enumerate() {
            firsts.push(async move { Ok::<_, Error>((number, run.next().await?)) });
        }
        let firsts = futures::stream::iter(firsts).buffered(RUNS_AT_ONCE);
        let firsts: Vec<(usize, Option<Placed>)> = firsts.try_collect().await?;
        for (run, first) in firsts {
            if let Some(first) = first
                && !self.hold(run, first, None)?
            {
                self.load(run, None).await?;
            }
        }
        Ok(())
    }

    /// The last rows of the next keys.
    async fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        while !self.is_full() && self.next_key().await? {}
        if self.last.is_empty() {
            return Ok(None);
        }
        let place = |(source, row): &(usize, usize)| {
            let held = &self.sources[*source];
            (held.run, held.file, held.first_row + *row as u64)
        };
        self.places = self.last.iter().map(place).collect();
        let whole = match self.sources.as_slice() {
            // All of one batch, in its order.
            [held] if self.last.len() == held.batch.num_rows() => held.batch.clone(),
            sources => {
                let batches: Vec<&RecordBatch> = sources.iter().map(|held| &held.batch).collect();
                interleave_record_batch(&batches, &self.last).map_err(Error::internal)?
            }
        };
        self.last.clear();
        self.last_bytes = 0;
        self.sources.clear();
        self.by_number.clear();
        whole.project(&self.projection).map(Some).map_err(Error::internal)
    }

    /// Rows that wait hold the batches that they are in. One batch goes out whole, where it can.
    fn is_full(&self) -> bool {
        let is_wide = match self.sources.as_slice() {
            [held] => {
                self.last_bytes >= BATCH_BYTES / 2 && self.last.len() == held.batch.num_rows()
            }
            _ => self.last_bytes >= BATCH_BYTES,
        };
        is_wide || self.last.len() >= BATCH_ROWS || self.sources.len() >= SOURCES_MAX
    }

    /// Brings the next rows of a run into memory, which follow `last`.
    async fn load(&mut self, run: usize, last: Option<&Head>) -> Result<()> {
        while let Some(next) = self.runs[run].next().await? {
            if self.hold(run, next, last)? {
                break;
            }
        }
        Ok(())
    }

    /// Holds those of a batch's rows that are within reach. False: there are none.
    fn hold(&mut self, run: usize, placed: Placed, last: Option<&Head>) -> Result<bool> {
        let (mut batch, file, mut first_row) = placed;
        let mut keys = rows_by(&self.columns.by_key, &self.columns.key, &batch)?;
        let is_in_order = |row: usize| keys.row(row - 1) <= keys.row(row);
        self.is_sorted &= (1..batch.num_rows()).all(is_in_order);
        self.rows_read += batch.num_rows() as u64;
        if let Some(reach) = &self.reach {
            let within = reach.within(&keys);
            if within.len() < batch.num_rows() {
                first_row += within.start as u64;
                batch = batch.slice(within.start, within.len());
                keys = rows_by(&self.columns.by_key, &self.columns.key, &batch)?;
            }
        }
        if batch.num_rows() == 0 {
            return Ok(false);
        }
        if let Some(last) = last {
            self.is_sorted &= last.held.keys.row(last.row).data() <= keys.row(0).data();
        }
        let (number, epoch, order) = (self.held, self.runs[run].epoch, OnceLock::new());
        let row_bytes = bytes_of_rows(&batch) / batch.num_rows();
        let held = Held { number, run, epoch, file, first_row, batch, row_bytes, keys, order };
        self.held += 1;
        self.heads.push(Head { held: Arc::new(held), row: 0, run });
        Ok(true)
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
        let source = *self.by_number.entry(best.held.number).or_insert_with(|| {
            sources.push(Arc::clone(&best.held));
            sources.len() - 1
        });
        self.last.push((source, best.row));
        self.last_bytes += best.held.row_bytes;
        Ok(true)
    }

    /// Passes over the row on top.
    async fn pass(&mut self) -> Result<()> {
        let Some(mut top) = self.heads.peek_mut() else { return Ok(()) };
        self.passed += 1;
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
}
