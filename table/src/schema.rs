//! Column types: what Delta can hold, and which type can take another's values.

use std::sync::Arc;

use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::compute::{CastOptions, cast_with_options};
use deltalake::arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef, TimeUnit};
use deltalake::arrow::error::ArrowError;

/// The type that Delta keeps values of `found` in; `None`: it cannot hold them.
pub fn delta_type(found: &DataType) -> Option<DataType> {
    use DataType as T;
    let held = match found {
        T::Boolean | T::Int8 | T::Int16 | T::Int32 | T::Int64 => found.clone(),
        T::Float32 | T::Float64 | T::Date32 | T::Binary | T::Utf8 => found.clone(),
        T::UInt8 => T::Int16,
        T::UInt16 => T::Int32,
        T::UInt32 => T::Int64,
        T::UInt64 => T::Decimal128(20, 0),
        T::Float16 => T::Float32,
        T::Date64 => T::Date32,
        T::Decimal32(p, s) | T::Decimal64(p, s) | T::Decimal128(p, s) if *s >= 0 => {
            T::Decimal128(*p, *s)
        }
        T::LargeUtf8 | T::Utf8View => T::Utf8,
        T::LargeBinary | T::BinaryView | T::FixedSizeBinary(_) => T::Binary,
        T::Timestamp(_, None) => T::Timestamp(TimeUnit::Microsecond, None),
        T::Timestamp(_, Some(_)) => T::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        T::Dictionary(_, value) => return delta_type(value),
        T::List(item) | T::LargeList(item) | T::ListView(item) | T::FixedSizeList(item, _) => {
            T::List(nested(item)?)
        }
        T::Struct(fields) => {
            T::Struct(fields.iter().map(nested).collect::<Option<Vec<_>>>()?.into())
        }
        T::Map(entries, sorted) => T::Map(nested(entries)?, *sorted),
        _ => return None,
    };
    Some(held)
}

fn nested(field: &FieldRef) -> Option<FieldRef> {
    Some(Arc::new(Field::new(field.name(), delta_type(field.data_type())?, field.is_nullable())))
}

/// A schema without view, large and dictionary types and without metadata, as files are written.
pub(crate) fn plain(schema: &Schema) -> SchemaRef {
    let fields: Fields = schema
        .fields()
        .iter()
        .map(|field| {
            let held = delta_type(field.data_type()).unwrap_or_else(|| field.data_type().clone());
            Field::new(field.name(), held, field.is_nullable())
        })
        .collect();
    Arc::new(Schema::new(fields))
}

/// Every value of `from` is exactly one of `to`.
pub fn widens_to(from: &DataType, to: &DataType) -> bool {
    use DataType as T;
    let is_narrow_float =
        matches!(to, T::Float64) && matches!(from, T::Int8 | T::Int16 | T::Int32 | T::Float32);
    match (from, to) {
        _ if from == to || is_narrow_float => true,
        (T::Null, _) => true,
        (T::Int8, T::Int16 | T::Int32 | T::Int64) => true,
        (T::Int16, T::Int32 | T::Int64) => true,
        (T::Int32, T::Int64) => true,
        (T::Int8 | T::Int16, T::Float32) => true,
        (T::Decimal128(p, s), T::Decimal128(wider_p, wider_s)) => {
            wider_s >= s
                && i16::from(*wider_p) - i16::from(*wider_s) >= i16::from(*p) - i16::from(*s)
        }
        (T::Date32, T::Timestamp(TimeUnit::Microsecond, None)) => true,
        (T::List(a), T::List(b)) => widens_to(a.data_type(), b.data_type()),
        (T::Struct(a), T::Struct(b)) => {
            a.len() == b.len()
                && a.iter()
                    .zip(b)
                    .all(|(a, b)| a.name() == b.name() && widens_to(a.data_type(), b.data_type()))
        }
        (T::Map(a, _), T::Map(b, _)) => widens_to(a.data_type(), b.data_type()),
        _ => false,
    }
}

/// The batch with exactly the columns and types of `schema`: columns are found by name, in either
/// case; absent ones are NULL. A value that does not fit its type is an error, never a NULL.
pub fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let options = CastOptions { safe: false, ..CastOptions::default() };
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let column = match find_column(batch.schema_ref(), field.name()) {
            Some(index) => cast_with_options(batch.column(index), field.data_type(), &options)?,
            None => deltalake::arrow::array::new_null_array(field.data_type(), batch.num_rows()),
        };
        columns.push(column);
    }
    let rows =
        deltalake::arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &rows)
}

/// The position of a column: by its exact name, or else in another case (Delta's columns are
/// case-insensitive).
pub fn find_column(schema: &Schema, name: &str) -> Option<usize> {
    schema.index_of(name).ok().or_else(|| {
        schema.fields().iter().position(|field| field.name().eq_ignore_ascii_case(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use deltalake::arrow::array::{Int32Array, Int64Array, StringArray};

    #[test]
    fn widening_never_loses_a_value() {
        use DataType as T;
        let yes = [
            (T::Int32, T::Int64),
            (T::Float32, T::Float64),
            (T::Int32, T::Float64),
            (T::Decimal128(10, 2), T::Decimal128(12, 4)),
        ];
        let no = [
            (T::Int64, T::Int32),
            (T::Int64, T::Float64),
            (T::Float64, T::Float32),
            (T::Decimal128(10, 2), T::Decimal128(10, 4)),
            (T::Utf8, T::Int32),
            (T::Int32, T::Utf8),
        ];
        assert!(yes.iter().all(|(from, to)| widens_to(from, to)));
        assert!(no.iter().all(|(from, to)| !widens_to(from, to)));
    }

    #[test]
    fn conforming_finds_columns_in_any_case_and_order_and_fills_absent_ones() {
        let batch = RecordBatch::try_from_iter([
            ("B", Arc::new(Int32Array::from(vec![7])) as _),
            ("a", Arc::new(StringArray::from(vec!["x"])) as _),
        ])
        .unwrap();
        let wanted = Arc::new(Schema::new(vec![
            Field::new("a", DataType::Utf8, true),
            Field::new("b", DataType::Int64, true),
            Field::new("c", DataType::Float64, true),
        ]));
        let made = conform(&batch, &wanted).unwrap();
        assert_eq!(made.column(1).as_ref(), &Int64Array::from(vec![7]));
        assert_eq!(made.column(2).null_count(), 1);
    }

    #[test]
    fn a_value_that_does_not_fit_is_an_error() {
        let big = Arc::new(Int64Array::from(vec![1_i64 << 40])) as _;
        let batch = RecordBatch::try_from_iter([("a", big)]).unwrap();
        let wanted = Arc::new(Schema::new(vec![Field::new("a", DataType::Int32, true)]));
        assert!(conform(&batch, &wanted).is_err());
    }
}
