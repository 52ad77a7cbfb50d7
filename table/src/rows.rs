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
use deltalake::parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use deltalake::parquet::errors::{ParquetError, Result as ParquetResult};
use deltalake::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{ObjectStoreExt, coalesce_ranges};

use crate::classify::foreign;
use crate::deletion::RowSet;
use crate::files::path_of;
use crate::keys::footers::for_arrow;
use crate::keys::scan::{partition_value, repeated};
use crate::schema::{conform, find_column};
use crate::store::StoreRef;
use crate::{LiveFile, Table};

/// Rows read at a time.
const BATCH_ROWS: usize = 8192;
/// So many bytes that nobody asked for are read rather than another request made.
const GAP_MAX: u64 = 256 << 10;
/// Rows of a column that are decoded at a time: a page, which writers end at 20,000 rows, and a batch.
const HELD_ROWS: u64 = 20_000 + BATCH_ROWS as u64;

/// Rows of a file, by their position in it; deleted ones are counted and not left out by themselves.
pub enum Pick {
    /// All but these.
    Without(RowSet),
    /// These.
    Only(RowSet),
}

impl Table {
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
        let footer = for_arrow(Arc::clone(&metadata)).map_err(|e| foreign(&doing, &e))?;
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
                let opened = File::open(local).map_err(|e| foreign(&doing, &e))?;
                let reading = ParquetRecordBatchReaderBuilder::new_with_metadata(opened, footer);
                let rows = picked(reading, mask, only).build();
                let rows = rows.map_err(|e| foreign(&doing, &e))?;
                futures::stream::iter(rows.map(|batch| batch.map_err(ParquetError::from))).boxed()
            }
            None => {
                let (store, path) = (self.store(), path_of(&file.path));
                let reader = Reader { store, path, metadata };
                let reading = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, footer);
                let rows = picked(reading, mask, only).build();
                rows.map_err(|e| foreign(&doing, &e))?.boxed()
            }
        };
        let partition = self.partition_fields(file, schema)?;
        let schema = Arc::clone(schema);
        let mut first_row: u64 = 0;
        let rows = rows.map(move |batch| {
            let mut batch = batch.map_err(|e| foreign(&doing, &e))?;
            let count = batch.num_rows() as u64;
            if !without.is_empty() {
                let is_kept =
                    (first_row..first_row + count).map(|row| Some(!without.contains(row)));
                let is_kept: BooleanArray = is_kept.collect();
                batch = filter_record_batch(&batch, &is_kept).map_err(|e| foreign(&doing, &e))?;
            }
            first_row += count;
            let batch = with_columns(&batch, &partition)?;
            conform(&batch, &schema)
                .map_err(|e| Error::new(Code::ColumnTypeMismatch, format!("{doing}: {e}")))
        });
        Ok(rows.boxed())
    }

    /// About how many bytes of these columns are in memory at a time while [`Table::rows_of`] gives them out:
    /// pages and a batch, and what is encoded of a row group where no disk holds it.
    pub async fn bytes_while_read(&self, file: &LiveFile, schema: &SchemaRef) -> Result<u64> {
        let doing = format!("read {} of {}", file.path, self.uri);
        let metadata = self.footer(&file.path, file.size).await?;
        let footer = for_arrow(Arc::clone(&metadata)).map_err(|e| foreign(&doing, &e))?;
        let roots = schema.fields().iter().filter_map(|f| find_column(footer.schema(), f.name()));
        let mask = ProjectionMask::roots(footer.parquet_schema(), roots);
        let is_local = self.local_path(file)?.is_some();
        let of_group = |group: &RowGroupMetaData| {
            let rows = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
            let read = group.columns().iter().enumerate().filter(|(at, _)| mask.leaf_included(*at));
            let of_column = |(_, column): (usize, &ColumnChunkMetaData)| {
                let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
                let plain = bytes(column.uncompressed_size());
                let held = plain.saturating_mul(HELD_ROWS.min(rows)) / rows;
                held + if is_local { 0 } else { bytes(column.compressed_size()) }
            };
            read.map(of_column).sum()
        };
        Ok(metadata.row_groups().iter().map(of_group).max().unwrap_or(0))
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

/// A reader of these columns and rows.
fn picked<T>(
    reading: ArrowReaderBuilder<T>,
    columns: ProjectionMask,
    rows: Option<RowSelection>,
) -> ArrowReaderBuilder<T> {
    let reading = reading.with_batch_size(BATCH_ROWS).with_projection(columns);
    match rows {
        Some(rows) => reading.with_row_selection(rows),
        None => reading,
    }
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
        let get = |range| self.store.get_range(&self.path, range);
        let read = async move { coalesce_ranges(&ranges, get, GAP_MAX).await };
        read.map(|read| read.map_err(|e| ParquetError::External(e.into()))).boxed()
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
