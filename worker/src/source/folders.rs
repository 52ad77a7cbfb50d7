//! Columns that stand in a file's path: `year=2024/site=a/part-0.parquet`.

use std::sync::Arc;

use alluvium_table::arrow::array::{ArrayRef, StringArray};
use alluvium_table::arrow::datatypes::{DataType, Field};

/// Hive's and Spark's name for NULL in a path.
const NULL: &str = "__HIVE_DEFAULT_PARTITION__";

/// Name and value of each folder `name=value`, outermost first; the values are text.
pub(super) fn columns_of(file: &str) -> Vec<(Field, ArrayRef)> {
    let mut folders: Vec<&str> = file.split('/').collect();
    folders.pop();
    let pairs = folders.into_iter().filter_map(|folder| folder.split_once('='));
    pairs
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, value)| {
            let value = (value != NULL).then(|| decoded(value));
            let field = Field::new(decoded(name), DataType::Utf8, true);
            (field, Arc::new(StringArray::from(vec![value])) as ArrayRef)
        })
        .collect()
}

/// `%2F` and the like, which writers use for what a path cannot hold.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut found = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], code) {
            (b'%', Some(byte)) => {
                found.push(byte);
                at += 3;
            }
            (byte, _) => {
                found.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(found).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use alluvium_table::arrow::array::AsArray;

    use super::*;

    #[test]
    fn a_path_gives_columns() {
        let found =
            columns_of("y=2024/plain/site=a%2Fb/none=__HIVE_DEFAULT_PARTITION__/x=1.parquet");
        let told: Vec<(String, Option<String>)> = found
            .iter()
            .map(|(field, value)| {
                let value = value.as_string::<i32>().iter().next().flatten().map(str::to_owned);
                (field.name().clone(), value)
            })
            .collect();
        let expected = [("y", Some("2024")), ("site", Some("a/b")), ("none", None)];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(told, expected);
    }
}
