//! Keys as bytes: equal bytes, equal keys.
//!
//! One text or binary column is its own bytes; one whole number, time or truth value eight bytes; all
//! else is arrow's row format. Floats are equal as in SQL here: NaN is NaN, and there is one zero.

use std::sync::Arc;

use deltalake::arrow::ARROW_VERSION;
use deltalake::arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, Int64Array, StringArray, new_null_array,
};
use deltalake::arrow::buffer::NullBuffer;
use deltalake::arrow::compute::{CastOptions, cast_with_options};
use deltalake::arrow::datatypes::{DataType, Int64Type};
use deltalake::arrow::error::ArrowError;
use deltalake::arrow::row::{RowConverter, Rows, SortField};

use crate::floats::with_one_zero;

/// The way that keys become bytes, which is to change with any change in them: side indexes hold hashes of
/// these bytes. Arrow's row format may change with arrow.
pub(super) const FORM: (u32, &str) = (2, ARROW_VERSION);

/// Makes bytes of the keys of one table.
pub(super) struct Encoder {
    types: Vec<DataType>,
    way: Way,
}

enum Way {
    Text,
    Number,
    Rows(RowConverter),
}

/// The keys of a batch.
pub(super) struct Encoded {
    keys: Keys,
    /// A key with a NULL in it is no key.
    nulls: Option<NullBuffer>,
}

enum Keys {
    Text(StringArray),
    Binary(BinaryArray),
    Numbers(Int64Array),
    Rows(Rows),
}

impl Encoder {
    /// For key columns of these types.
    pub(super) fn new(types: &[DataType]) -> Result<Self, ArrowError> {
        let way = match types {
            [DataType::Utf8 | DataType::Binary] => Way::Text,
            [
                DataType::Int8
                | DataType::Int16
                | DataType::Int32
                | DataType::Int64
                | DataType::Date32
                | DataType::Timestamp(..)
                | DataType::Boolean,
            ] => Way::Number,
            _ => {
                let fields = types.iter().cloned().map(SortField::new).collect();
                Way::Rows(RowConverter::new(fields)?)
            }
        };
        Ok(Self { types: types.to_vec(), way })
    }

    /// A key is the bytes of its one column.
    pub(super) fn is_bytes(&self) -> bool {
        matches!(self.way, Way::Text)
    }

    /// The keys of these columns, one for each type, of equal length. Other types are cast; a value
    /// that does not fit is an error.
    pub(super) fn encode(&self, columns: &[ArrayRef]) -> Result<Encoded, ArrowError> {
        let options = CastOptions { safe: false, ..CastOptions::default() };
        let columns = columns
            .iter()
            .zip(&self.types)
            .map(|(column, kind)| match column.data_type() == kind {
                true => Ok(Arc::clone(column)),
                false if column.data_type() == &DataType::Null => {
                    Ok(new_null_array(kind, column.len()))
                }
                false if is_cut(column.data_type(), kind) => {
                    let text = format!("{} is no {kind}", column.data_type());
                    Err(ArrowError::CastError(text))
                }
                false => cast_with_options(column, kind, &options),
            })
            .collect::<Result<Vec<ArrayRef>, _>>()?;
        let nulls = columns.iter().fold(None, |nulls: Option<NullBuffer>, column| {
            NullBuffer::union(nulls.as_ref(), column.logical_nulls().as_ref())
        });
        let keys = match (&self.way, columns.as_slice()) {
            (Way::Text, [column]) => match column.as_string_opt::<i32>() {
                Some(text) => Keys::Text(text.clone()),
                None => Keys::Binary(column.as_binary::<i32>().clone()),
            },
            (Way::Number, [column]) => {
                let whole = cast_with_options(column, &DataType::Int64, &options)?;
                Keys::Numbers(whole.as_primitive::<Int64Type>().clone())
            }
            (Way::Rows(converter), columns) => {
                let columns: Vec<ArrayRef> = columns.iter().map(with_one_zero).collect();
                Keys::Rows(converter.convert_columns(&columns)?)
            }
            _ => {
                let text = "as many key columns as types".to_owned();
                return Err(ArrowError::InvalidArgumentError(text));
            }
        };
        Ok(Encoded { keys, nulls })
    }
}

/// A cast would cut values of `from` to fit without a word.
fn is_cut(from: &DataType, to: &DataType) -> bool {
    use DataType as T;
    match (from, to) {
        (T::Decimal128(_, from), T::Decimal128(_, to)) => to < from,
        (T::Decimal128(..), to) => to.is_integer(),
        (from, to) => from.is_floating() && !to.is_floating(),
    }
}

impl Encoded {
    /// Calls `visit` with each key and its row, in order.
    pub(super) fn each(&self, mut visit: impl FnMut(usize, &[u8])) {
        let is_key = |row: usize| self.nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
        match &self.keys {
            Keys::Text(keys) => {
                let (offsets, bytes) = (keys.value_offsets(), keys.value_data());
                for row in (0..keys.len()).filter(|row| is_key(*row)) {
                    visit(row, &bytes[offsets[row] as usize..offsets[row + 1] as usize]);
                }
            }
            Keys::Binary(keys) => {
                for row in (0..keys.len()).filter(|row| is_key(*row)) {
                    visit(row, keys.value(row));
                }
            }
            Keys::Numbers(keys) => {
                for row in (0..keys.len()).filter(|row| is_key(*row)) {
                    visit(row, &keys.value(row).to_le_bytes());
                }
            }
            Keys::Rows(keys) => {
                for row in (0..keys.num_rows()).filter(|row| is_key(*row)) {
                    visit(row, keys.row(row).data());
                }
            }
        }
    }

    /// A row's key, which has no NULL in it, in `space` where it is not kept as bytes.
    pub(super) fn key<'a>(&'a self, row: usize, space: &'a mut [u8; 8]) -> &'a [u8] {
        match &self.keys {
            Keys::Text(keys) => keys.value(row).as_bytes(),
            Keys::Binary(keys) => keys.value(row),
            Keys::Numbers(keys) => {
                *space = keys.value(row).to_le_bytes();
                space
            }
            Keys::Rows(keys) => keys.row(row).data(),
        }
    }
}

#[cfg(test)]
mod tests {
    use deltalake::arrow::array::{Date32Array, Float64Array};

    use super::*;

    fn bytes(types: &[DataType], columns: &[ArrayRef]) -> Vec<Vec<u8>> {
        let encoded = Encoder::new(types).unwrap().encode(columns).unwrap();
        let mut keys = Vec::new();
        encoded.each(|_, key| keys.push(key.to_vec()));
        keys
    }

    /// Side indexes on disk hold hashes of these bytes: when this fails, `FORM` is to change.
    #[test]
    fn keys_become_the_bytes_that_they_became_before() {
        let text: ArrayRef = Arc::new(StringArray::from(vec![Some("k\u{e9}"), None]));
        assert_eq!(bytes(&[DataType::Utf8], &[text]), [b"k\xc3\xa9".to_vec()]);
        let day: ArrayRef = Arc::new(Date32Array::from(vec![-2]));
        assert_eq!(bytes(&[DataType::Date32], &[day]), [(-2_i64).to_le_bytes().to_vec()]);
        let float: ArrayRef = Arc::new(Float64Array::from(vec![1.0]));
        let whole: ArrayRef = Arc::new(Int64Array::from(vec![3]));
        assert_eq!(
            bytes(&[DataType::Float64, DataType::Int64], &[float, whole]),
            [[1, 0xbf, 0xf0, 0, 0, 0, 0, 0, 0, 1, 0x80, 0, 0, 0, 0, 0, 0, 3]]
        );
        assert_eq!(
            FORM,
            (2, "59.3.2"),
            "the row format may have changed: see above, then say so here"
        );
    }
}
