//! How many rows at a time, where rows are wide: memory must not grow with them.

use deltalake::arrow::array::{Array, ArrayRef, RecordBatch};
use deltalake::parquet::arrow::ProjectionMask;
use deltalake::parquet::basic::Type;
use deltalake::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};

/// Rows of a batch, unless they are wide.
pub const BATCH_ROWS: usize = 8192;
/// Bytes of a batch of wide rows.
pub const BATCH_BYTES: usize = BATCH_ROWS * ROW_BYTES as usize;
/// Of rows that are wider there are fewer at a time.
const ROW_BYTES: u64 = 512;
/// Of a guess of a value's length no more is believed: few rows at a time take longer.
const GUESSED_BYTES_MAX: u64 = 8 << 10;

/// Of at most `rows_max` rows at a time, so many; never none. `rows` of them take `bytes`.
pub fn rows_at_a_time(rows_max: usize, (rows, bytes): (u64, u64)) -> usize {
    let usual = (rows_max as u64).saturating_mul(ROW_BYTES);
    let fit = u128::from(usual) * u128::from(rows.max(1)) / u128::from(bytes.max(1));
    usize::try_from(fit).unwrap_or(rows_max).clamp(1, rows_max)
}

/// The same for the rows of a Parquet file once they are decoded, with these columns.
pub fn rows_of_a_batch(metadata: &ParquetMetaData, columns: &ProjectionMask) -> usize {
    let of_group = |group: &RowGroupMetaData| {
        let read = group.columns().iter().enumerate().filter(|(at, _)| columns.leaf_included(*at));
        let bytes = read.map(|(_, column)| decoded_bytes(column)).fold(0, u64::saturating_add);
        rows_at_a_time(BATCH_ROWS, (u64::try_from(group.num_rows()).unwrap_or(0), bytes))
    };
    metadata.row_groups().iter().map(of_group).min().unwrap_or(BATCH_ROWS)
}

/// A column's values, each as often as it occurs: what is stored may be a dictionary of few.
fn decoded_bytes(column: &ColumnChunkMetaData) -> u64 {
    let values = u64::try_from(column.num_values()).unwrap_or(0);
    let of_each = match column.column_type() {
        Type::BOOLEAN => 1,
        Type::INT32 | Type::FLOAT => 4,
        Type::INT64 | Type::DOUBLE | Type::INT96 => 8,
        Type::FIXED_LEN_BYTE_ARRAY => {
            u64::try_from(column.column_descr().type_length()).unwrap_or(0)
        }
        Type::BYTE_ARRAY => {
            let told = column.unencoded_byte_array_data_bytes();
            let bytes = told.and_then(|bytes| u64::try_from(bytes).ok());
            let bytes = bytes.unwrap_or_else(|| guessed_bytes(column, values));
            return bytes.saturating_add(values.saturating_mul(4));
        }
    };
    values.saturating_mul(of_each)
}

/// The same of texts whose lengths the file does not tell: a dictionary has as many as its indexes, by their bits, can name.
fn guessed_bytes(column: &ColumnChunkMetaData, values: u64) -> u64 {
    let size = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
    let (plain, stored) = (size(column.uncompressed_size()), size(column.compressed_size()));
    let Some(from) = column.dictionary_page_offset() else { return plain };
    let dictionary = size(column.data_page_offset().saturating_sub(from));
    let dictionary = dictionary.saturating_mul(plain) / stored.max(1);
    let bits = plain.saturating_sub(dictionary).saturating_mul(8) / values.max(1);
    let of_each = (dictionary >> bits.min(63)).min(GUESSED_BYTES_MAX);
    values.saturating_mul(of_each).max(plain)
}

/// What a batch's rows take, not what they are a part of.
pub fn bytes_of_rows(batch: &RecordBatch) -> usize {
    let of_column = |column: &ArrayRef| {
        let bytes = column.to_data().get_slice_memory_size();
        bytes.unwrap_or_else(|_| column.get_array_memory_size())
    };
    batch.columns().iter().map(of_column).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use deltalake::arrow::array::StringArray;
    use deltalake::parquet::arrow::ArrowWriter;
    use deltalake::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    #[test]
    fn wide_rows_are_fewer_and_narrow_ones_as_many_as_before() {
        assert_eq!(rows_at_a_time(8192, (1_000, 100 * 1_000)), 8192);
        assert_eq!(rows_at_a_time(8192, (1_000, 100_000 * 1_000)), 41);
        assert_eq!(rows_at_a_time(8192, (1, 1 << 40)), 1);
        assert_eq!(rows_at_a_time(8192, (0, 0)), 8192);
    }

    #[test]
    fn values_of_a_dictionary_count_each_time() {
        let wide = "x".repeat(100_000);
        let values: ArrayRef = Arc::new(StringArray::from(vec![wide.as_str(); 2_000]));
        let batch = RecordBatch::try_from_iter([("wide", values)]).unwrap();
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        assert!(file.len() < 1_000_000);
        let read = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(file)).unwrap();
        assert_eq!(rows_of_a_batch(read.metadata(), &ProjectionMask::all()), 41);
        // Other writers do not tell: 512 at least, and usual rows are not taken for wide ones.
        let column = read.metadata().row_group(0).column(0).clone();
        let untold =
            column.into_builder().set_unencoded_byte_array_data_bytes(None).build().unwrap();
        assert_eq!(guessed_bytes(&untold, 2_000), 2_000 * GUESSED_BYTES_MAX);
    }
}
