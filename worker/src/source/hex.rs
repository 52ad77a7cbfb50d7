//! Bytes that text writes in hexadecimal digits, also within values and as keys of maps.

use std::collections::HashSet;
use std::sync::Arc;

use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, ListArray, MapArray, StructArray,
};
use alluvium_table::arrow::datatypes::{DataType, Field, FieldRef};
use alluvium_table::arrow::error::ArrowError;

/// The field with text where bytes stand.
pub(super) fn as_digits(field: &Field) -> Field {
    let inner = |field: &FieldRef| Arc::new(as_digits(field));
    let kind = match field.data_type() {
        DataType::Binary => DataType::Utf8,
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect()),
        DataType::List(item) => DataType::List(inner(item)),
        DataType::Map(entries, sorted) => DataType::Map(inner(entries), *sorted),
        other => other.clone(),
    };
    field.clone().with_data_type(kind)
}

/// Values of a field [`as_digits`] as those of type `kind`.
///
/// # Errors
/// A text is not pairs of digits, or a map has one key twice.
pub(super) fn as_bytes(column: &ArrayRef, kind: &DataType) -> Result<ArrayRef, ArrowError> {
    Ok(match kind {
        DataType::Binary if column.data_type() == &DataType::Utf8 => {
            let texts = column.as_string::<i32>().iter();
            let bytes = texts.map(|text| text.map(bytes_of).transpose());
            Arc::new(bytes.collect::<Result<Vec<_>, _>>()?.into_iter().collect::<BinaryArray>())
        }
        DataType::Struct(fields) => {
            let parts = column.as_struct();
            let columns = parts.columns().iter().zip(fields);
            let columns = columns.map(|(column, field)| as_bytes(column, field.data_type()));
            let columns = columns.collect::<Result<Vec<_>, _>>()?;
            let nulls = parts.nulls().cloned();
            let made =
                StructArray::try_new_with_length(fields.clone(), columns, nulls, parts.len());
            Arc::new(made?)
        }
        DataType::List(item) => {
            let list = column.as_list::<i32>();
            let items = as_bytes(list.values(), item.data_type())?;
            let (offsets, nulls) = (list.offsets().clone(), list.nulls().cloned());
            Arc::new(ListArray::try_new(Arc::clone(item), offsets, items, nulls)?)
        }
        DataType::Map(entries, sorted) => {
            let map = column.as_map();
            let both: ArrayRef = Arc::new(map.entries().clone());
            let both = as_bytes(&both, entries.data_type())?.as_struct().clone();
            if let Some(keys) = both.column(0).as_binary_opt::<i32>() {
                // `ff` and `FF` are the same bytes.
                let is_twice = |pair: &[i32]| {
                    let mut seen = HashSet::new();
                    (pair[0]..pair[1]).any(|at| !seen.insert(keys.value(at as usize)))
                };
                if map.offsets().windows(2).any(is_twice) {
                    return Err(ArrowError::JsonError("a map has a key twice".to_owned()));
                }
            }
            let (offsets, nulls) = (map.offsets().clone(), map.nulls().cloned());
            Arc::new(MapArray::try_new(Arc::clone(entries), offsets, both, nulls, *sorted)?)
        }
        _ => Arc::clone(column),
    })
}

fn bytes_of(text: &str) -> Result<Vec<u8>, ArrowError> {
    let not = || ArrowError::JsonError(format!("{text:?} is not pairs of hexadecimal digits"));
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return Err(not());
    }
    let value = |digit: u8| char::from(digit).to_digit(16).ok_or_else(not);
    let pair = |pair: &[u8]| Ok((value(pair[0])? << 4 | value(pair[1])?) as u8);
    digits.chunks_exact(2).map(pair).collect()
}
