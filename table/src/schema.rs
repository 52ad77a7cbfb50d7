//! Column types: what Delta can hold, and which type can take another's values.

use std::sync::Arc;

use alluvium_protocol::pipeline::same_name;
use deltalake::arrow::array::{
    Array, ArrayRef, AsArray, ListArray, RecordBatch, StructArray, new_null_array,
};
use deltalake::arrow::compute::{CastOptions, cast_with_options};
use deltalake::arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef, TimeUnit};
use deltalake::arrow::error::ArrowError;

/// The type that Delta keeps values of `found` in; `None`: it cannot hold them. Whatever a file promises of values
/// within values, NULL has a place there: the next file may promise less.
pub fn delta_type(found: &DataType) -> Option<DataType> {
    held_as(found, &|_| true)
}

fn held_as(found: &DataType, is_nullable: &dyn Fn(&Field) -> bool) -> Option<DataType> {
    let nested = |field: &FieldRef| {
        let kind = held_as(field.data_type(), is_nullable)?;
        Some(Arc::new(Field::new(field.name(), kind, is_nullable(field))))
    };
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
        T::Dictionary(_, value) => return held_as(value, is_nullable),
        T::List(item) | T::LargeList(item) | T::ListView(item) | T::FixedSizeList(item, _) => {
            T::List(nested(item)?)
        }
        T::Struct(fields) => {
            T::Struct(fields.iter().map(nested).collect::<Option<Vec<_>>>()?.into())
        }
        T::Map(entries, sorted) => {
            let T::Struct(fields) = entries.data_type() else { return None };
            let [key, value] = fields.as_ref() else { return None };
            let key = Field::new(key.name(), held_as(key.data_type(), is_nullable)?, false);
            let fields = T::Struct(vec![Arc::new(key), nested(value)?].into());
            T::Map(Arc::new(Field::new(entries.name(), fields, false)), *sorted)
        }
        _ => return None,
    };
    Some(held)
}

/// A schema without view, large and dictionary types and without metadata, as files are written.
pub(crate) fn plain(schema: &Schema) -> SchemaRef {
    let fields: Fields = schema
        .fields()
        .iter()
        .map(|field| {
            let held = held_as(field.data_type(), &Field::is_nullable);
            let held = held.unwrap_or_else(|| field.data_type().clone());
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

/// The type that these words of the configuration mean: Delta's names, and `array<T>`, `map<K,V>`,
/// `struct<a:T,b:T>`.
///
/// # Errors
/// What is wrong, for people.
pub fn parse_type(text: &str) -> Result<DataType, String> {
    let text = text.trim();
    let (word, inner) = match text.split_once(['<', '(']) {
        None => (text, None),
        Some((word, rest)) => {
            let close = if text[word.len()..].starts_with('<') { '>' } else { ')' };
            let inner = rest.trim_end().strip_suffix(close);
            (word, Some(inner.ok_or_else(|| format!("{text:?} does not end with {close}"))?))
        }
    };
    let word = word.trim().to_ascii_lowercase();
    let field = |name: &str, kind| Arc::new(Field::new(name, kind, true));
    let kind = match (word.as_str(), inner) {
        ("string", None) => DataType::Utf8,
        ("boolean", None) => DataType::Boolean,
        ("byte", None) => DataType::Int8,
        ("short", None) => DataType::Int16,
        ("int" | "integer", None) => DataType::Int32,
        ("long" | "bigint", None) => DataType::Int64,
        ("float", None) => DataType::Float32,
        ("double", None) => DataType::Float64,
        ("date", None) => DataType::Date32,
        ("timestamp", None) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        ("timestamp_ntz", None) => DataType::Timestamp(TimeUnit::Microsecond, None),
        ("binary", None) => DataType::Binary,
        ("decimal", Some(inner)) => {
            let (precision, scale) = inner.split_once(',').unwrap_or((inner, "0"));
            let precision: u8 = precision.trim().parse().unwrap_or(0);
            let scale: i8 = scale.trim().parse().unwrap_or(-1);
            let fits = (1..=38).contains(&precision) && (0..=38).contains(&scale);
            if !fits || i16::from(scale) > i16::from(precision) {
                return Err(format!(
                    "{text:?}: a decimal has 1 to 38 digits, and no more behind the point"
                ));
            }
            DataType::Decimal128(precision, scale)
        }
        ("array", Some(inner)) => DataType::List(field("element", parse_type(inner)?)),
        ("map", Some(inner)) => {
            let parts = parts(inner);
            let [key, value] = parts.as_slice() else {
                return Err(format!("{text:?}: write map<KEY, VALUE>"));
            };
            let key = Arc::new(Field::new("key", parse_type(key)?, false));
            let entries = Fields::from(vec![key, field("value", parse_type(value)?)]);
            DataType::Map(
                Arc::new(Field::new("key_value", DataType::Struct(entries), false)),
                false,
            )
        }
        ("struct", Some(inner)) => {
            let mut fields = Vec::new();
            for part in parts(inner) {
                let (name, kind) = part
                    .split_once(':')
                    .ok_or_else(|| format!("{text:?}: write struct<NAME:TYPE>"))?;
                fields.push(field(name.trim(), parse_type(kind)?));
            }
            DataType::Struct(fields.into())
        }
        _ => {
            return Err(format!(
                "{text:?} is no type; there are string, boolean, byte, short, int, long, float, double, \
                 date, timestamp, timestamp_ntz, binary, decimal(P,S), array<T>, map<K,V>, struct<a:T>"
            ));
        }
    };
    Ok(kind)
}

/// Splits at commas that stand in no brackets.
fn parts(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, letter) in text.char_indices() {
        match letter {
            '<' | '(' => depth += 1,
            '>' | ')' => depth -= 1,
            ',' if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(&text[start..]);
    found
}

/// The batch with exactly the columns and types of `schema`: columns are found by name, in either
/// case; absent ones are NULL. A value that does not fit its type is an error, never a NULL.
pub fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let column = match find_column(batch.schema_ref(), field.name()) {
            Some(index) => fit(batch.column(index), field.data_type())?,
            None => new_null_array(field.data_type(), batch.num_rows()),
        };
        columns.push(column);
    }
    let rows =
        deltalake::arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &rows)
}

/// The values as `kind`. Fields of structures are found by name, too: a file that was written before one
/// was added has NULL there.
fn fit(column: &ArrayRef, kind: &DataType) -> Result<ArrayRef, ArrowError> {
    let options = CastOptions { safe: false, ..CastOptions::default() };
    match (column.data_type(), kind) {
        (held, wanted) if held == wanted => Ok(Arc::clone(column)),
        (DataType::Struct(_), DataType::Struct(fields)) => {
            let held = column.as_struct();
            let parts = fields.iter().map(|field| {
                let mut names = held.fields().iter();
                match names.position(|held| same_name(held.name(), field.name())) {
                    Some(at) => fit(held.column(at), field.data_type()),
                    None => Ok(new_null_array(field.data_type(), held.len())),
                }
            });
            let parts = parts.collect::<Result<Vec<ArrayRef>, _>>()?;
            if parts.is_empty() {
                return cast_with_options(column, kind, &options);
            }
            let made = StructArray::try_new(fields.clone(), parts, held.nulls().cloned())?;
            Ok(Arc::new(made))
        }
        (DataType::List(_), DataType::List(item)) => {
            let held = column.as_list::<i32>();
            let values = fit(held.values(), item.data_type())?;
            let (offsets, nulls) = (held.offsets().clone(), held.nulls().cloned());
            Ok(Arc::new(ListArray::try_new(Arc::clone(item), offsets, values, nulls)?))
        }
        _ => cast_with_options(column, kind, &options),
    }
}

/// The position of a column: by its exact name, or else in another case (Delta's columns are
/// case-insensitive).
pub fn find_column(schema: &Schema, name: &str) -> Option<usize> {
    schema
        .index_of(name)
        .ok()
        .or_else(|| schema.fields().iter().position(|field| same_name(field.name(), name)))
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
    fn types_are_read_from_words() {
        use DataType as T;
        assert_eq!(parse_type(" Decimal(12, 2)"), Ok(T::Decimal128(12, 2)));
        let nested = parse_type("struct<a:array<long>,b:map<string,decimal(3,1)>>").unwrap();
        let T::Struct(fields) = nested else { panic!("no struct") };
        assert_eq!(fields.len(), 2);
        assert!(matches!(fields[1].data_type(), T::Map(..)));
        for bad in [
            "",
            "text",
            "decimal",
            "decimal(50,2)",
            "decimal(2,3)",
            "array<long",
            "map<long>",
            "struct<a>",
        ] {
            assert!(parse_type(bad).is_err(), "{bad}");
        }
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
