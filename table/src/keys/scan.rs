//! The scan of a table's key columns for the keys of a set.
//!
//! ```text
//!  live files ─► side index ───────────────────────────────────────────────────► positions
//!       └─ none ─► footers ─► row groups that may hold a key ─► their key columns, fetched in one go
//!                                                                   └─► decoded, asked ─► positions
//! ```
//! Files are passed over by the values of their partition where these are part of the key, and by
//! smallest and largest values of whole numbers, days and texts: other types' are left out by some
//! writers (NaN) or written with fewer digits than they have.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alluvium_protocol::metrics::metrics;
use alluvium_protocol::pipeline::SideIndex;
use alluvium_protocol::{Code, Error, Result};
use deltalake::arrow::array::{ArrayRef, StringArray, UInt64Array, new_null_array};
use deltalake::arrow::compute::{CastOptions, cast_with_options, take};
use deltalake::arrow::datatypes::DataType;
use deltalake::parquet::arrow::ProjectionMask;
use deltalake::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ParquetRecordBatchReaderBuilder,
};
use deltalake::parquet::file::metadata::ColumnChunkMetaData;
use deltalake::parquet::file::reader::ChunkReader;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::Semaphore;

use super::cache::{self, Cache};
use super::encode::FORM;
use super::fetch::Parts;
use super::footers::for_arrow;
use super::making::Making;
use super::pages::{each_value, is_readable};
use super::set::KeySet;
use super::side::{Entry, Wanted};
use crate::classify::{foreign, of_file};
use crate::deletion::RowSet;
use crate::files::path_of;
use crate::schema::find_column;
use crate::store::{Place, place_of};
use crate::width::rows_of_a_batch;
use crate::{LiveFile, Table};

/// Requests under way at a time where a request takes long.
const REMOTE_REQUESTS: usize = 16;
/// Footers read at a time.
const FOOTERS_AT_ONCE: usize = 16;
/// What is counted of memory.
const MEBIBYTE: u64 = 1 << 20;

/// What to look for, and where.
pub struct Scan<'a> {
    /// The table.
    pub table: &'a Table,
    /// Its key columns, as it spells them.
    pub key: &'a [String],
    /// Fetched bytes in memory at a time, as long as one row group is not more.
    pub memory_bytes: usize,
    /// Side indexes are used, and made.
    pub index: SideIndex,
}

/// A file with rows of keys of the set.
pub struct Found {
    /// The file.
    pub file: LiveFile,
    /// Rows in it, deleted ones included.
    pub rows_in_file: u64,
    /// Rows that were deleted before.
    pub deleted: RowSet,
    /// Its live rows with such keys.
    pub rows: RowSet,
    /// How many of them have a key of which a row comes.
    pub coming: u64,
}

/// Where a key column's values come from.
#[derive(Clone)]
enum Source {
    /// A column of the file.
    Column(String),
    /// The file's partition: one row.
    Partition(ArrayRef),
}

/// A file that may hold a key.
struct Candidate {
    /// Its number.
    file: usize,
    /// The key's values that its partition gives.
    partition: Vec<Option<ArrayRef>>,
    /// Of its side index.
    name: u128,
}

/// A row group to be read.
struct Unit {
    file: usize,
    making: Option<Arc<Making>>,
    footer: ArrowReaderMetadata,
    group: usize,
    first_row: u64,
    ranges: Vec<Range<u64>>,
    mask: ProjectionMask,
    sources: Arc<Vec<Source>>,
}

impl Unit {
    fn rows(&self) -> u64 {
        let rows = self.footer.metadata().row_group(self.group).num_rows();
        u64::try_from(rows).unwrap_or(0)
    }
}

#[derive(Default)]
struct Hits {
    coming: RowSet,
    leaving: RowSet,
}

impl Scan<'_> {
    /// Finds the rows of `files` with keys of the set. `go_on` is asked before each row group, and told
    /// how many rows were looked through and how many are to be, as far as that is known.
    pub async fn find(
        &self,
        files: &[LiveFile],
        keys: &Arc<KeySet>,
        go_on: &(dyn Fn(u64, u64) -> Result<()> + Sync),
    ) -> Result<Vec<Found>> {
        let mut by_file: Vec<Option<(Hits, u64)>> = files.iter().map(|_| None).collect();
        let candidates = self.candidates(files, keys)?;
        let count = candidates.len();
        let of = candidates.iter().filter_map(|candidate| files[candidate.file].rows).sum();
        let looked = AtomicU64::new(0);
        let go_on = &|rows| go_on(looked.fetch_add(rows, Ordering::Relaxed) + rows, of);
        let unread = self.look_up(files, candidates, keys, &mut by_file, go_on).await?;
        metrics().searched("index", count - unread.len());
        metrics().searched("columns", unread.len());
        let left: u64 = unread.iter().filter_map(|candidate| files[candidate.file].rows).sum();
        let units = self.units(files, unread, keys).await?;
        // Passed over.
        go_on(left.saturating_sub(units.iter().map(Unit::rows).sum()))?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let at_once = match place_of(self.table.uri())? {
            Place::Local(_) => processors,
            Place::Remote(_) => processors.max(REMOTE_REQUESTS),
        };
        let memory = u32::try_from((self.memory_bytes as u64 / MEBIBYTE).max(1));
        let memory = memory.map_err(Error::internal)?;
        let fetching = Arc::new(Semaphore::new(memory as usize));
        let decoding = Arc::new(Semaphore::new(processors));
        let reading = units.into_iter().map(|unit| {
            let (fetching, decoding) = (Arc::clone(&fetching), Arc::clone(&decoding));
            let (keys, file) = (Arc::clone(keys), &files[unit.file]);
            async move {
                go_on(unit.rows())?;
                let (at, path) = (unit.file, file.path.clone());
                if let Some(local) = self.table.local_path(file)? {
                    let _turn = decoding.acquire_owned().await.map_err(Error::internal)?;
                    let work = move || {
                        let open = || {
                            std::fs::File::open(&local)
                                .map_err(|e| of_file(format!("read {path}"), &e))
                        };
                        decode(unit, open, &keys, &path)
                    };
                    let hits = tokio::spawn(async { work() }).await;
                    return Ok((at, hits.map_err(Error::internal)??));
                }
                let bytes: u64 = unit.ranges.iter().map(|range| range.end - range.start).sum();
                let share = u32::try_from(bytes.div_ceil(MEBIBYTE)).unwrap_or(memory).min(memory);
                let _share = fetching.acquire_many(share).await.map_err(Error::internal)?;
                let parts = self.fetch(file, &unit.ranges).await?;
                let _turn = decoding.acquire_owned().await.map_err(Error::internal)?;
                let work = move || decode(unit, || Ok(parts.clone()), &keys, &path);
                let hits = tokio::spawn(async { work() }).await.map_err(Error::internal)??;
                Ok::<_, Error>((at, hits))
            }
        });
        let mut done = futures::stream::iter(reading).buffer_unordered(at_once);
        while let Some((at, (hits, rows_in_file))) = done.try_next().await? {
            if hits.coming.is_empty() && hits.leaving.is_empty() {
                continue;
            }
            let (held, _) = by_file[at].get_or_insert_with(|| (Hits::default(), rows_in_file));
            held.coming |= hits.coming;
            held.leaving |= hits.leaving;
        }
        drop(done);
        let live = by_file.into_iter().zip(files).filter_map(|(hits, file)| Some((hits?, file)));
        let live: Vec<_> = live.map(|((hits, rows), file)| self.live(file, hits, rows)).collect();
        let live = futures::stream::iter(live).buffered(FOOTERS_AT_ONCE);
        live.try_filter_map(|found| async move { Ok(found) }).try_collect().await
    }

    /// What is left of a file's hits without those that are deleted already.
    async fn live(
        &self,
        file: &LiveFile,
        mut hits: Hits,
        rows_in_file: u64,
    ) -> Result<Option<Found>> {
        let deleted = self.table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
        if deleted.max().is_some_and(|last| last >= rows_in_file) {
            let text = format!(
                "{} of {} has {rows_in_file} rows, and its deletion vector deletes others",
                file.path,
                self.table.uri()
            );
            return Err(Error::new(Code::TableUnreadable, text));
        }
        hits.coming -= &deleted;
        hits.leaving -= &deleted;
        let coming = hits.coming.len();
        let rows = hits.coming | hits.leaving;
        let found = Found { file: file.clone(), rows_in_file, deleted, rows, coming };
        Ok((!found.rows.is_empty()).then_some(found))
    }

    async fn fetch(&self, file: &LiveFile, ranges: &[Range<u64>]) -> Result<Parts> {
        let doing = || format!("read {} of {}", file.path, self.table.uri());
        if ranges.is_empty() {
            return Ok(Parts { length: file.size, parts: Vec::new() });
        }
        let read = self.table.store().get_ranges(&path_of(&file.path), ranges).await;
        let read = read.map_err(|e| of_file(doing(), &e))?;
        let parts = ranges.iter().map(|range| range.start).zip(read).collect();
        Ok(Parts { length: file.size, parts })
    }

    /// The files that may hold a key of the set, as far as the log tells.
    fn candidates(&self, files: &[LiveFile], keys: &KeySet) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for (at, file) in files.iter().enumerate() {
            let Some(partition) = self.partition_of(file, keys)? else { continue };
            if keys.is_within(self.key, file.stats.as_deref()) {
                let name = self.cache().map_or(0, |cache| self.index_name(cache, file, keys));
                candidates.push(Candidate { file: at, partition, name });
            }
        }
        Ok(candidates)
    }

    fn cache(&self) -> Option<&'static Cache> {
        if self.index == SideIndex::Off { None } else { cache::kept() }
    }

    /// The name of a file's side index: of all that it depends on.
    fn index_name(&self, cache: &Cache, file: &LiveFile, keys: &KeySet) -> u128 {
        let (table, types) = (self.table.id(), keys.types());
        let LiveFile { path, size, modified, .. } = file;
        let uri = self.table.uri();
        let key = self.key;
        cache.name(&format!("{FORM:?} {uri} {table} {path:?} {size} {modified} {key:?} {types:?}"))
    }

    /// Finds the rows of those files that have a side index; returns the others.
    async fn look_up(
        &self,
        files: &[LiveFile],
        candidates: Vec<Candidate>,
        keys: &Arc<KeySet>,
        by_file: &mut [Option<(Hits, u64)>],
        go_on: &(dyn Fn(u64) -> Result<()> + Sync),
    ) -> Result<Vec<Candidate>> {
        let Some(cache) = self.cache() else { return Ok(candidates) };
        let has_index = |candidate: &Candidate| cache.has(candidate.name);
        let (named, mut unread): (Vec<_>, Vec<_>) = candidates.into_iter().partition(has_index);
        if named.is_empty() {
            return Ok(unread);
        }
        go_on(0)?;
        let wanted = Arc::new(Wanted::new(cache.key(), keys.iter()));
        let searching = named.into_iter().map(|candidate| {
            let (wanted, name) = (Arc::clone(&wanted), candidate.name);
            let work = move || {
                let mut hits = Hits::default();
                let rows = cache.find(name, &wanted, |row, comes| hits.add(row, comes));
                (hits, rows)
            };
            let rows = files[candidate.file].rows.unwrap_or(0);
            async move {
                go_on(rows)?;
                let found = tokio::spawn(async move { work() }).await;
                Ok::<_, Error>((candidate, found.map_err(Error::internal)?))
            }
        });
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let mut done = futures::stream::iter(searching).buffer_unordered(processors);
        while let Some((candidate, (hits, rows))) = done.try_next().await? {
            match rows {
                Some(rows) if !hits.coming.is_empty() || !hits.leaving.is_empty() => {
                    by_file[candidate.file] = Some((hits, rows));
                }
                Some(_) => {}
                None => unread.push(candidate),
            }
        }
        Ok(unread)
    }

    /// The row groups of these files that may hold a key of the set.
    async fn units(
        &self,
        files: &[LiveFile],
        candidates: Vec<Candidate>,
        keys: &KeySet,
    ) -> Result<Vec<Unit>> {
        // Beside the keys and what is fetched, which take a share of this size each.
        let room = Arc::new(Semaphore::new(self.memory_bytes / 2 / 1024));
        let mut footers = Vec::new();
        for candidate in candidates {
            footers.push(self.units_of(&files[candidate.file], candidate, (keys, &room)));
        }
        let footers = futures::stream::iter(footers).buffered(FOOTERS_AT_ONCE);
        let units: Vec<Vec<Unit>> = footers.try_collect().await?;
        Ok(units.into_iter().flatten().collect())
    }

    async fn units_of(
        &self,
        file: &LiveFile,
        Candidate { file: at, partition, name }: Candidate,
        (keys, room): (&KeySet, &Arc<Semaphore>),
    ) -> Result<Vec<Unit>> {
        let doing = || format!("read {} of {}", file.path, self.table.uri());
        let footer = self.table.footer(&file.path, file.size).await?;
        let footer = for_arrow(footer).map_err(|e| foreign(doing(), &e))?;
        let (mut sources, mut roots) = (Vec::new(), Vec::new());
        for (name, constant) in self.key.iter().zip(partition) {
            if let Some(constant) = constant {
                sources.push(Source::Partition(constant));
                continue;
            }
            // Written before the table had the column: NULL, which is no key.
            let Some(root) = find_column(footer.schema(), name) else { return Ok(Vec::new()) };
            roots.push(root);
            sources.push(Source::Column(footer.schema().field(root).name().clone()));
        }
        let metadata = Arc::clone(footer.metadata());
        let descriptor = metadata.file_metadata().schema_descr();
        let mask = ProjectionMask::roots(descriptor, roots.iter().copied());
        let sources = Arc::new(sources);
        let (mut units, mut first_row) = (Vec::new(), 0);
        for (group, of_group) in metadata.row_groups().iter().enumerate() {
            let rows = u64::try_from(of_group.num_rows()).map_err(Error::internal)?;
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for (leaf, column) in of_group.columns().iter().enumerate() {
                if roots.contains(&descriptor.get_column_root_idx(leaf)) {
                    ranges.push(range_of(column).ok_or_else(|| {
                        let text = format!("{}: a column chunk is nowhere", doing());
                        Error::new(Code::TableUnreadable, text)
                    })?);
                }
            }
            if keys.may_be_in(&footer, of_group, &named(&sources)) {
                units.push(Unit {
                    file: at,
                    making: None,
                    footer: footer.clone(),
                    group,
                    first_row,
                    ranges,
                    mask: mask.clone(),
                    sources: Arc::clone(&sources),
                });
            }
            first_row += rows;
        }
        // An index is made of all keys of a file, and what most scans pass over needs none.
        if let Some(cache) = self.cache()
            && units.len() == metadata.num_row_groups()
            && u32::try_from(first_row).is_ok()
            && cache.pays(name, first_row, self.index)
        {
            let making = Making::new(cache, (name, first_row, units.len()), Arc::clone(room));
            let making = Arc::new(making);
            units.iter_mut().for_each(|unit| unit.making = Some(Arc::clone(&making)));
        }
        Ok(units)
    }

    /// The key's values that a file's partition gives, by key column; `None`: no key has them.
    fn partition_of(
        &self,
        file: &LiveFile,
        keys: &KeySet,
    ) -> Result<Option<Vec<Option<ArrayRef>>>> {
        let schema = self.table.schema();
        let mut values = Vec::with_capacity(self.key.len());
        for (at, name) in self.key.iter().enumerate() {
            let Some(text) = file.partition.get(name) else {
                values.push(None);
                continue;
            };
            let column = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
            let value = partition_value(text.as_deref(), schema.field(column).data_type())?;
            if !keys.has_in_column(at, &value)? {
                return Ok(None);
            }
            values.push(Some(value));
        }
        Ok(Some(values))
    }
}

/// Where a column chunk lies, unless its footer lies.
fn range_of(column: &ColumnChunkMetaData) -> Option<Range<u64>> {
    let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
    let (start, length) = (u64::try_from(start).ok()?, u64::try_from(column.compressed_size()));
    Some(start..start.checked_add(length.ok()?)?)
}

/// The names of the file's columns among the sources.
fn named(sources: &[Source]) -> Vec<Option<&str>> {
    let mut names = Vec::with_capacity(sources.len());
    for source in sources {
        names.push(match source {
            Source::Column(name) => Some(name.as_str()),
            Source::Partition(_) => None,
        });
    }
    names
}

/// A partition's value, as the log writes it, as one row of its column's type.
pub(crate) fn partition_value(text: Option<&str>, kind: &DataType) -> Result<ArrayRef> {
    // The log cannot tell an empty text from a NULL.
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(new_null_array(kind, 1));
    };
    let options = CastOptions { safe: false, ..CastOptions::default() };
    let value = cast_with_options(&StringArray::from(vec![text]), kind, &options);
    value.map_err(|e| foreign(format!("read the partition value {text:?}"), &e))
}

/// One row, so many times.
pub(crate) fn repeated(value: &ArrayRef, rows: usize) -> Result<ArrayRef> {
    take(value, &UInt64Array::from_value(0, rows), None).map_err(Error::internal)
}

/// Reads a row group's keys: its rows with keys of the set, and the rows in its file.
fn decode<R: ChunkReader + 'static>(
    unit: Unit,
    open: impl Fn() -> Result<R>,
    keys: &KeySet,
    path: &str,
) -> Result<(Hits, u64)> {
    let rows = unit.footer.metadata().file_metadata().num_rows();
    let rows_in_file = u64::try_from(rows).map_err(Error::internal)?;
    let making = unit.making.clone();
    let wanted = making.as_deref().filter(|making| making.begin());
    let (hits, entries) = match decode_pages(&unit, &open, keys, wanted)? {
        Some(read) => read,
        None => decode_arrays(unit, open()?, (keys, wanted), path)?,
    };
    if let Some(making) = making {
        making.take(entries);
    }
    Ok((hits, rows_in_file))
}

/// One text or binary column, straight from its pages; `None`: it is to be read as arrays.
fn decode_pages<R: ChunkReader + 'static>(
    unit: &Unit,
    open: impl Fn() -> Result<R>,
    keys: &KeySet,
    making: Option<&Making>,
) -> Result<Option<(Hits, Vec<Entry>)>> {
    let [Source::Column(name)] = unit.sources.as_slice() else { return Ok(None) };
    let group = unit.footer.metadata().row_group(unit.group);
    let mut columns = group.columns().iter();
    let column = columns.find(|column| column.column_path().parts() == [name.as_str()]);
    let held = unit.footer.schema().field_with_name(name).map(|field| field.data_type());
    let (Some(column), Ok(held)) = (column, held) else { return Ok(None) };
    let is_bytes = held.is_string() || held.is_binary();
    if !keys.is_bytes() || !is_bytes || !is_readable(column) {
        return Ok(None);
    }
    let rows = u64::try_from(group.num_rows()).map_err(Error::internal)?;
    let (mut hits, mut entries) = (Hits::default(), Vec::new());
    let read = each_value(&Arc::new(open()?), column, rows, |values| {
        keys.find_bytes(values, |row, comes| hits.add(unit.first_row + row, comes));
        if let Some(making) = making {
            let values = values.iter();
            entries.extend(values.map(|(row, key)| making.entry(key, unit.first_row + row)));
        }
    });
    Ok(read.map(|()| (hits, entries)))
}

fn decode_arrays<R: ChunkReader + 'static>(
    unit: Unit,
    bytes: R,
    (keys, making): (&KeySet, Option<&Making>),
    path: &str,
) -> Result<(Hits, Vec<Entry>)> {
    let failed = |e: &(dyn std::error::Error + 'static)| foreign(format!("read keys of {path}"), e);
    let batch_rows = rows_of_a_batch(unit.footer.metadata(), &unit.mask);
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, unit.footer)
        .with_row_groups(vec![unit.group])
        .with_projection(unit.mask)
        .with_batch_size(batch_rows)
        .build()
        .map_err(|e| failed(&e))?;
    let (mut hits, mut entries) = (Hits::default(), Vec::new());
    let mut first_row = unit.first_row;
    for batch in reader {
        let batch = batch.map_err(|e| failed(&e))?;
        let columns = unit
            .sources
            .iter()
            .map(|source| match source {
                Source::Column(name) => batch
                    .column_by_name(name)
                    .map(Arc::clone)
                    .ok_or_else(|| Error::internal(format!("{path} lost column {name}"))),
                Source::Partition(value) => repeated(value, batch.num_rows()),
            })
            .collect::<Result<Vec<ArrayRef>>>()?;
        let encoded = keys.encode(&columns)?;
        keys.find_encoded(&encoded, |row, comes| hits.add(first_row + row as u64, comes));
        if let Some(making) = making {
            let entry = |row, key: &[u8]| making.entry(key, first_row + row as u64);
            encoded.each(|row, key| entries.push(entry(row, key)));
        }
        first_row += batch.num_rows() as u64;
    }
    Ok((hits, entries))
}

impl Hits {
    fn add(&mut self, row: u64, comes: bool) {
        let rows = if comes { &mut self.coming } else { &mut self.leaving };
        rows.insert(row);
    }
}
