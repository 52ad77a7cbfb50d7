//! Where runs are cut into ranges of keys: so that each has about as many rows, as far as files tell of their pages.
//!
//! Rows below a key are those of pages that end below it, and a part of those that begin below it and end above. Where the
//! latter are many, what part that is, and keys to cut at, are seen in some of these pages.

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{ArrayRef, RecordBatch, UInt64Array};
use alluvium_table::arrow::compute::{concat_batches, interleave_record_batch, take_record_batch};
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::arrow::ipc::reader::StreamReader;
use alluvium_table::arrow::ipc::writer::StreamWriter;
use alluvium_table::arrow::row::Rows;
use alluvium_table::deletion::RowSet;
use alluvium_table::rows::Pick;
use alluvium_table::stretches::Stretches;
use alluvium_table::{LiveFile, Table};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as STANDARD;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::ranges::{keys_of, told};
use super::{Columns, LastRows, RUNS_AT_ONCE};
use crate::ground::columns_of;
use crate::winners::Rule;

/// All ranges together read each row so often at most: a page that several have rows in is read for each of them.
const READ_MAX: u64 = 4;
/// Pages are looked into where those that a cut goes through have more rows than one of so many parts of a range.
const PART: u64 = 4;
/// So many pages, and so many keys of each.
const PAGES_SEEN: usize = 32;
const KEYS_SEEN: usize = 64;

/// The keys at which ranges end, and the smallest and largest one: an Arrow IPC stream in base 64.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Cuts(String);

impl Cuts {
    /// Cuts these files into so many ranges at most. `None`: they do not tell of their pages, cannot be walked side
    /// by side, or are one range.
    pub(crate) async fn choose(
        raw: &Table,
        rule: &Rule,
        (files, memory_bytes): (&[LiveFile], usize),
        ranges_max: usize,
    ) -> Result<Option<Self>> {
        let Some(told) = told(raw, rule, files).await? else { return Ok(None) };
        if !LastRows::none(raw, rule, files)?.is_walkable(memory_bytes).await? {
            return Ok(None);
        }
        let columns = Columns::new(raw, rule, &rule.key)?;
        let pages = Pages::of(&told, &columns)?;
        let rows = pages.rows();
        let ranges = ranges_max.min(
            usize::try_from(READ_MAX * rows / pages.cut_through().max(1)).unwrap_or(ranges_max),
        );
        let of_each = rows.div_ceil(ranges.max(1) as u64);
        let seen = if pages.cut_through() * PART > of_each {
            see(raw, &columns_of(&raw.schema(), &rule.key)?, files, &told, &pages).await?
        } else {
            Vec::new()
        };
        let seen_keys = keys_of(&columns, seen.iter())?;
        let mut candidates: Vec<(&[u8], (usize, usize))> = Vec::new();
        for (source, keys) in pages.least.iter().chain(&seen_keys).enumerate() {
            candidates.extend(keys.iter().enumerate().map(|(at, key)| (key.data(), (source, at))));
        }
        candidates.sort_unstable();
        candidates.dedup_by_key(|(key, _)| *key);
        let Some((_, smallest)) = candidates.first() else { return Ok(None) };
        let (mut places, mut next) = (vec![*smallest], of_each);
        for (key, place) in &candidates[1..] {
            if places.len() == ranges {
                break;
            }
            let below = pages.below(key, &seen_keys);
            if below >= next {
                places.push(*place);
                // A key with the rows of several ranges is one of them.
                next = (below / of_each + 1) * of_each;
            }
        }
        if places.len() < 2 {
            return Ok(None);
        }
        let sources = told.iter().map(|of_file| &of_file.least).chain(&seen);
        let sources: Vec<&RecordBatch> =
            sources.chain(told.iter().map(|of_file| &of_file.most)).collect();
        let (file, at) = pages.largest;
        places.push((told.len() + seen.len() + file, at));
        let bounds = interleave_record_batch(&sources, &places).map_err(Error::internal)?;
        Self::of(&bounds).map(Some)
    }

    fn of(bounds: &RecordBatch) -> Result<Self> {
        let mut writer =
            StreamWriter::try_new(Vec::new(), &bounds.schema()).map_err(Error::internal)?;
        writer.write(bounds).map_err(Error::internal)?;
        let bytes = writer.into_inner().map_err(Error::internal)?;
        Ok(Self(STANDARD.encode(bytes)))
    }

    pub(super) fn bounds(&self) -> Result<RecordBatch> {
        let bytes = STANDARD.decode(&self.0).map_err(Error::internal)?;
        let mut batches = StreamReader::try_new(bytes.as_slice(), None).map_err(Error::internal)?;
        let bounds = batches.next().ok_or_else(|| Error::internal("cuts without a key"))?;
        bounds.map_err(Error::internal)
    }

    /// How many ranges there are, and the values of the key's first column at their ends.
    pub(crate) fn ends(&self) -> Result<(usize, ArrayRef)> {
        let bounds = self.bounds()?;
        Ok((bounds.num_rows().saturating_sub(1), bounds.column(0).clone()))
    }
}

/// What all files tell: keys as arrow's row format has them.
struct Pages {
    least: Vec<Rows>,
    /// The keys at which pages begin, and at which they end; in order, with the rows of all pages up to there.
    begins: Vec<(Vec<u8>, u64)>,
    ends: Vec<(Vec<u8>, u64)>,
    /// By the keys at which they begin: the file, the page, and its rows.
    in_order: Vec<(usize, usize)>,
    /// The page that ends last.
    largest: (usize, usize),
}

impl Pages {
    fn of(told: &[Stretches], columns: &Columns) -> Result<Self> {
        let least = keys_of(columns, told.iter().map(|of_file| &of_file.least))?;
        let most = keys_of(columns, told.iter().map(|of_file| &of_file.most))?;
        let (mut begins, mut ends) = (Vec::new(), Vec::new());
        for (file, of_file) in told.iter().enumerate() {
            for (at, span) in of_file.starts.windows(2).enumerate() {
                let rows = span[1] - span[0];
                begins.push((least[file].row(at).data().to_vec(), rows, (file, at)));
                ends.push((most[file].row(at).data().to_vec(), rows, (file, at)));
            }
        }
        begins.sort_unstable();
        ends.sort_unstable();
        let largest = ends.last().map_or((0, 0), |(_, _, place)| *place);
        let in_order = begins.iter().map(|(_, _, place)| *place).collect();
        let summed = |keys: Vec<(Vec<u8>, u64, _)>| {
            let mut all = 0;
            let add = |(key, rows, _): (Vec<u8>, u64, (usize, usize))| {
                all += rows;
                (key, all)
            };
            keys.into_iter().map(add).collect()
        };
        Ok(Self { least, begins: summed(begins), ends: summed(ends), in_order, largest })
    }

    fn rows(&self) -> u64 {
        self.ends.last().map_or(0, |(_, rows)| *rows)
    }

    /// Rows of the pages that a cut goes through, on average.
    fn cut_through(&self) -> u64 {
        let through = |(key, _): &(Vec<u8>, u64)| {
            let begun = first_of(&self.begins, |begin| begin <= key);
            begun.saturating_sub(first_of(&self.ends, |end| end < key))
        };
        self.begins.iter().map(through).sum::<u64>() / (self.begins.len() as u64).max(1)
    }

    /// About how many rows have smaller keys, as far as pages were seen.
    fn below(&self, key: &[u8], seen: &[Rows]) -> u64 {
        let begun = first_of(&self.begins, |begin| begin.as_slice() < key);
        let ended = first_of(&self.ends, |end| end.as_slice() < key);
        let (mut of, mut smaller) = (0, 0);
        for keys in seen {
            let count = keys.num_rows();
            let is_through = keys.row(0).data() < key && keys.row(count - 1).data() >= key;
            if is_through {
                of += count as u64;
                smaller += keys.iter().filter(|seen| seen.data() < key).count() as u64;
            }
        }
        let through = begun.saturating_sub(ended);
        ended + (through * smaller).checked_div(of).unwrap_or(through / 2)
    }
}

/// Rows of the first pages, of those whose keys are so.
fn first_of(keys: &[(Vec<u8>, u64)], is_so: impl Fn(&Vec<u8>) -> bool) -> u64 {
    let pages = keys.partition_point(|(key, _)| is_so(key));
    pages.checked_sub(1).map_or(0, |last| keys[last].1)
}

/// Some keys of some pages, which are as many rows apart.
async fn see(
    raw: &Table,
    key: &SchemaRef,
    files: &[LiveFile],
    told: &[Stretches],
    pages: &Pages,
) -> Result<Vec<RecordBatch>> {
    let step = pages.in_order.len().div_ceil(PAGES_SEEN).max(1);
    let looks = pages.in_order.iter().skip(step / 2).step_by(step).map(|(file, at)| async move {
        let span = told[*file].starts[*at]..told[*file].starts[at + 1];
        let mut rows = RowSet::new();
        rows.insert_range(span);
        let rows = raw.rows_of(&files[*file], key, Pick::Only(rows)).await?;
        let rows: Vec<RecordBatch> = rows.try_collect().await?;
        let rows = concat_batches(key, &rows).map_err(Error::internal)?;
        let last = rows.num_rows().saturating_sub(1) as u64;
        let seen = (KEYS_SEEN as u64 - 1).min(last.max(1));
        let some: UInt64Array = (0..=seen).map(|nth| nth * last / seen).collect();
        take_record_batch(&rows, &some).map_err(Error::internal)
    });
    let looks = looks.collect::<Vec<_>>();
    futures::stream::iter(looks).buffered(RUNS_AT_ONCE).try_collect().await
}
