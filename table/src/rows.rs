//! The rows of one data file, in its order, as the table's columns.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result};
use bytes::Bytes;
use deltalake::arrow::array::{ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions};
use deltalake::arrow::compute::filter_record_batch;
use deltalake::arrow::datatypes::{Field, Schema, SchemaRef};
use deltalake::parquet::arrow::ProjectionMask;
use deltalake::parquet::arrow::arrow_reader::{
    ArrowReaderBuilder, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
};
use deltalake::parquet::arrow::async_reader::{
    AsyncFileReader, ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder,
};
use deltalake::parquet::errors::{ParquetError, Result as ParquetResult};
use deltalake::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStoreExt, coalesce_ranges};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::classify::of_file;
use crate::deletion::RowSet;
use crate::files::path_of;
use crate::kept::Kept;
use crate::keys::footers::for_arrow;
use crate::keys::scan::{partition_value, repeated};
use crate::schema::{conform, find_column};
use crate::store::StoreRef;
use crate::width::rows_of_a_batch;
use crate::{LiveFile, Table};

/// So many bytes that nobody asked for are read rather than another request made. More would be whole row
/// groups of raw, of which a share of a merge needs a part.
const GAP_MAX: u64 = 64 << 10;
/// A row group of at most so many bytes is fetched while rows of the one before are used.
const AHEAD_BYTES_MAX: u64 = 8 << 20;
/// Rows of a page, which writers end there, where the file does not tell.
const PAGE_ROWS: u64 = 20_000;

/// Rows of a file, by their position in it; deleted ones are counted and not left out by themselves.
pub enum Pick {
    /// All but these.
    Without(RowSet),
    /// These.
    Only(RowSet),
}

impl Table {
    /// The same table, of whose files what is fetched is kept, up to so many bytes, until
    /// [`Table::keep_no_more`]: for who reads columns twice.
    #[must_use]
    pub fn keeping(&self, bytes: usize) -> Self {
        Self { kept: Some(Arc::new(Kept::new(bytes))), ..self.clone() }
    }

    /// What is fetched from now on is not kept.
    pub fn keep_no_more(&self) {
        if let Some(kept) = &self.kept {
            kept.close();
        }
    }

    /// Rows of a file in its order, with the columns of `schema`: they are found by name, absent ones
    /// are NULL, the partition's are filled in.
    pub async fn rows_of(
        &self,
        file: &LiveFile,
        schema: &SchemaRef,
        pick: Pick,
    ) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        let doing = format!("read {} of {}", file.path, self.uri);
        let metadata = self.footer(&file.path, file.size).await?;
        let rows_in_file = metadata.file_metadata().num_rows();
        let footer = for_arrow(Arc::clone(&metadata)).map_err(|e| of_file(&doing, &e))?;
        let roots = schema.fields().iter().filter_map(|f| find_column(footer.schema(), f.name()));
        let mask = ProjectionMask::roots(footer.parquet_schema(), roots);
        let (mut without, mut only) = (RowSet::new(), None);
        match pick {
            Pick::Without(gone) => without = gone,
            Pick::Only(rows) => {
                let rows_in_file = usize::try_from(rows_in_file).map_err(Error::internal)?;
                let ranges = ranges_of(&rows).into_iter();
                only = Some(RowSelection::from_consecutive_ranges(ranges, rows_in_file));
            }
        }
        let rows = match self.local_path(file)? {
            // Page by page: what is in memory does not grow with the row groups.
            Some(local) => {
                let opened = File::open(local).map_err(|e| of_file(&doing, &e))?;
                let reading = ParquetRecordBatchReaderBuilder::new_with_metadata(opened, footer);
                let rows = picked(reading, mask, only).build();
                let rows = rows.map_err(|e| of_file(&doing, &e))?;
                futures::stream::iter(rows.map(|batch| batch.map_err(ParquetError::from))).boxed()
            }
            None => {
                let (store, path, kept) = (self.store(), path_of(&file.path), self.kept.clone());
                let reader = Reader { store, path, metadata: Arc::clone(&metadata), kept };
                let reading = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, footer);
                let is_small = largest_group(&metadata, &mask) <= AHEAD_BYTES_MAX;
                let groups = picked(reading, mask, only).build();
                let groups = groups.map_err(|e| of_file(&doing, &e))?;
                if is_small { fetched_ahead(groups) } else { groups.boxed() }
            }
        };
        let partition = self.partition_fields(file, schema)?;
        let schema = Arc::clone(schema);
        let mut first_row: u64 = 0;
        let rows = rows.map(move |batch| {
            let mut batch = batch.map_err(|e| of_file(&doing, &e))?;
            let count = batch.num_rows() as u64;
            if !without.is_empty() {
                let is_kept =
                    (first_row..first_row + count).map(|row| Some(!without.contains(row)));
                let is_kept: BooleanArray = is_kept.collect();
                batch = filter_record_batch(&batch, &is_kept).map_err(|e| of_file(&doing, &e))?;
            }
            first_row += count;
            let batch = with_columns(&batch, &partition)?;
            conform(&batch, &schema)
                .map_err(|e| Error::new(Code::ColumnTypeMismatch, format!("{doing}: {e}")))
        });
        Ok(rows.boxed())
    }

    /// About how many bytes of these columns are in memory at a time while [`Table::rows_of`] gives them out:
    /// pages and a batch, and what is encoded of two row groups where no disk holds them.
    pub async fn bytes_while_read(&self, file: &LiveFile, schema: &SchemaRef) -> Result<u64> {
        let doing = format!("read {} of {}", file.path, self.uri);
        let metadata = self.footer(&file.path, file.size).await?;
        let footer = for_arrow(Arc::clone(&metadata)).map_err(|e| of_file(&doing, &e))?;
        let roots = schema.fields().iter().filter_map(|f| find_column(footer.schema(), f.name()));
        let mask = ProjectionMask::roots(footer.parquet_schema(), roots);
        let encoded = match (self.local_path(file)?, largest_group(&metadata, &mask)) {
            (Some(_), _) => 0,
            // The one whose rows are used, and the next.
            (None, bytes @ ..=AHEAD_BYTES_MAX) => 2 * bytes,
            (None, bytes) => bytes,
        };
        let batch_rows = rows_of_a_batch(&metadata, &mask) as u64;
        let of_group = |(at, group): (usize, &RowGroupMetaData)| -> u64 {
            let rows = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
            let pages = metadata.offset_index().and_then(|index| index.get(at));
            let of_column = |(at, column): (usize, &ColumnChunkMetaData)| {
                let plain = u64::try_from(column.uncompressed_size()).unwrap_or(0);
                let pages = pages.and_then(|pages| pages.get(at)).map(|of| of.page_locations.len());
                // A page, and a batch.
                let of_page = pages.map_or(PAGE_ROWS, |pages| rows.div_ceil(pages.max(1) as u64));
                plain.saturating_mul(rows.min(of_page + batch_rows)) / rows
            };
            included(group, &mask).map(of_column).sum()
        };
        let decoded = metadata.row_groups().iter().enumerate().map(of_group).max().unwrap_or(0);
        Ok(encoded + decoded)
    }

    /// A file's partition as columns of one row, those of `schema`, in the table's own types: "0.1" of a
    /// float is another number than "0.1" of the double that it may be on its way to.
    fn partition_fields(&self, file: &LiveFile, schema: &Schema) -> Result<Vec<(Field, ArrayRef)>> {
        let (mut fields, held) = (Vec::new(), self.schema());
        for name in self.partition_columns() {
            let Some(at) = find_column(schema, &name) else { continue };
            let own = find_column(&held, &name).ok_or_else(|| Error::internal(&name))?;
            let kind = held.field(own).data_type();
            let field = schema.field(at).clone().with_data_type(kind.clone());
            let text = file.partition.get(&name).and_then(Option::as_deref);
            fields.push((field, partition_value(text, kind)?));
        }
        Ok(fields)
    }
}

/// The columns of a row group that are read, by their position.
fn included<'a>(
    group: &'a RowGroupMetaData,
    mask: &'a ProjectionMask,
) -> impl Iterator<Item = (usize, &'a ColumnChunkMetaData)> {
    group.columns().iter().enumerate().filter(|(at, _)| mask.leaf_included(*at))
}

/// The most bytes that these columns take in a row group, as they are stored.
fn largest_group(metadata: &ParquetMetaData, mask: &ProjectionMask) -> u64 {
    let of_column = |(_, column): (usize, &ColumnChunkMetaData)| {
        u64::try_from(column.compressed_size()).unwrap_or(0)
    };
    let of_group = |group: &RowGroupMetaData| included(group, mask).map(of_column).sum();
    metadata.row_groups().iter().map(of_group).max().unwrap_or(0)
}

/// A reader of these columns and rows.
fn picked<T>(
    reading: ArrowReaderBuilder<T>,
    columns: ProjectionMask,
    rows: Option<RowSelection>,
) -> ArrowReaderBuilder<T> {
    let batch_rows = rows_of_a_batch(reading.metadata(), &columns);
    let reading = reading.with_batch_size(batch_rows).with_projection(columns);
    match rows {
        Some(rows) => reading.with_row_selection(rows),
        None => reading,
    }
}

/// The rows of row groups, of which the next one is fetched while those of one are used.
fn fetched_ahead(
    groups: ParquetRecordBatchStream<Reader>,
) -> BoxStream<'static, ParquetResult<RecordBatch>> {
    let fetch = |mut groups: ParquetRecordBatchStream<Reader>| {
        let next = async move {
            let group = groups.next_row_group().await?;
            Ok::<_, ParquetError>(group.map(|group| (group, groups)))
        };
        AbortOnDropHandle::new(tokio::spawn(next.in_current_span()))
    };
    let groups = futures::stream::try_unfold(fetch(groups), move |fetching| async move {
        let fetched = fetching.await.map_err(|e| ParquetError::External(Error::internal(e).into()));
        Ok::<_, ParquetError>(fetched??.map(|(group, groups)| {
            let rows = group.map(|batch| batch.map_err(ParquetError::from));
            (futures::stream::iter(rows), fetch(groups))
        }))
    });
    groups.try_flatten().boxed()
}

/// Rows that follow one another, as ranges.
fn ranges_of(rows: &RowSet) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for row in rows.iter().filter_map(|row| usize::try_from(row).ok()) {
        match ranges.last_mut() {
            Some(last) if last.end == row => last.end = row + 1,
            _ => ranges.push(row..row + 1),
        }
    }
    ranges
}

/// A data file in a store, its footer known.
struct Reader {
    store: StoreRef,
    path: Path,
    metadata: Arc<ParquetMetaData>,
    kept: Option<Arc<Kept>>,
}

impl Reader {
    /// These ranges, of which those that are near each other are fetched together.
    async fn fetch(&self, ranges: &[Range<u64>]) -> ParquetResult<Vec<Bytes>> {
        let get = |range| self.store.get_range(&self.path, range);
        let fetched = coalesce_ranges(ranges, get, GAP_MAX).await;
        fetched.map_err(|e: object_store::Error| ParquetError::External(e.into()))
    }

    /// The same, of which some may be kept.
    async fn fetch_missing(&self, kept: &Kept, ranges: &[Range<u64>]) -> ParquetResult<Vec<Bytes>> {
        let known: Vec<Option<Bytes>> =
            ranges.iter().map(|range| kept.get(&self.path, range)).collect();
        let missing = ranges.iter().zip(&known).filter(|(_, known)| known.is_none());
        let missing: Vec<Range<u64>> = missing.map(|(range, _)| range.clone()).collect();
        let fetched = self.fetch(&missing).await?;
        for (range, bytes) in missing.iter().zip(&fetched) {
            kept.keep(&self.path, range.start, bytes);
        }
        let mut fetched = fetched.into_iter();
        let all: Option<Vec<Bytes>> =
            known.into_iter().map(|known| known.or_else(|| fetched.next())).collect();
        all.ok_or_else(|| ParquetError::General("a range was not fetched".to_owned()))
    }
}

impl AsyncFileReader for Reader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        let read = async move { self.store.get_range(&self.path, range).await };
        read.map(|read| read.map_err(|e| ParquetError::External(e.into()))).boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, ParquetResult<Vec<Bytes>>> {
        async move {
            match &self.kept {
                Some(kept) => self.fetch_missing(kept, &ranges).await,
                None => self.fetch(&ranges).await,
            }
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        std::future::ready(Ok(Arc::clone(&self.metadata))).boxed()
    }
}

/// The batch with further columns, each of one value. The file's own of such a name give way.
fn with_columns(batch: &RecordBatch, columns: &[(Field, ArrayRef)]) -> Result<RecordBatch> {
    if columns.is_empty() {
        return Ok(batch.clone());
    }
    let is_new = |name: &str| columns.iter().all(|(field, _)| field.name() != name);
    let (mut fields, mut values) = (Vec::new(), Vec::new());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        if is_new(field.name()) {
            fields.push(Arc::clone(field));
            values.push(Arc::clone(column));
        }
    }
    for (field, value) in columns {
        fields.push(Arc::new(field.clone()));
        values.push(repeated(value, batch.num_rows())?);
    }
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), values, &rows)
        .map_err(Error::internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_ranges() {
        assert_eq!(ranges_of(&[1, 2, 3, 7, 9, 10].into_iter().collect()), [1..4, 7..8, 9..11]);
        assert!(ranges_of(&RowSet::new()).is_empty());
    }
}
