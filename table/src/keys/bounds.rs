//! Smallest and largest keys of a set, and whether a file or a row group can hold one of them.

use chrono::NaiveDate;
use deltalake::arrow::array::{Array, ArrayRef, AsArray};
use deltalake::arrow::compute::{max, max_string, min, min_string};
use deltalake::arrow::datatypes::{DataType, Date32Type, Int64Type};
use deltalake::parquet::arrow::arrow_reader::ArrowReaderMetadata;
use deltalake::parquet::data_type::AsBytes;
use deltalake::parquet::file::metadata::RowGroupMetaData;
use deltalake::parquet::file::statistics::Statistics;
use serde_json::Value;

/// What is known of one key column of a set.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Bounds {
    /// No key so far.
    #[default]
    None,
    /// Whole numbers, and days since 1970.
    Numbers(i64, i64),
    /// Texts.
    Texts(String, String),
    /// Of a type whose statistics are not trusted.
    Any,
}

impl Bounds {
    /// Takes in a column of the set, which is of `kind`.
    pub(super) fn extend(&mut self, column: &ArrayRef, kind: &DataType) {
        if column.null_count() == column.len() {
            return;
        }
        let of_column = of(column, kind);
        *self = match (std::mem::take(self), of_column) {
            (Self::None, other) => other,
            (Self::Numbers(a, b), Self::Numbers(c, d)) => Self::Numbers(a.min(c), b.max(d)),
            (Self::Texts(a, b), Self::Texts(c, d)) => Self::Texts(a.min(c), b.max(d)),
            _ => Self::Any,
        };
    }

    /// Statistics of a file, as its log has them, leave room for one of these keys.
    pub(super) fn meets_stats(&self, least: &Value, most: &Value) -> bool {
        let number = |value: &Value| match value.as_str() {
            Some(day) => day_of(day),
            None => value.as_i64(),
        };
        match self {
            Self::Numbers(from, to) => match (number(least), number(most)) {
                (Some(least), Some(most)) => *from <= most && least <= *to,
                _ => true,
            },
            Self::Texts(from, to) => match (least.as_str(), most.as_str()) {
                (Some(least), Some(most)) => from.as_str() <= most && least <= to.as_str(),
                _ => true,
            },
            Self::None | Self::Any => true,
        }
    }

    /// The same for a column of a row group whose values are of type `held`.
    pub(super) fn meets_group(&self, statistics: &Statistics, held: &DataType) -> bool {
        use DataType as T;
        if statistics.is_min_max_deprecated() {
            return true;
        }
        let is_number = matches!(held, T::Int8 | T::Int16 | T::Int32 | T::Int64 | T::Date32);
        match (self, statistics) {
            (Self::Numbers(from, to), Statistics::Int32(stats)) if is_number => {
                let (least, most) = (stats.min_opt(), stats.max_opt());
                least.is_none_or(|least| i64::from(*least) <= *to)
                    && most.is_none_or(|most| *from <= i64::from(*most))
            }
            (Self::Numbers(from, to), Statistics::Int64(stats)) if is_number => {
                stats.min_opt().is_none_or(|least| least <= to)
                    && stats.max_opt().is_none_or(|most| from <= most)
            }
            (Self::Texts(from, to), Statistics::ByteArray(stats)) if held == &T::Utf8 => {
                stats.min_opt().is_none_or(|least| least.as_bytes() <= to.as_bytes())
                    && stats.max_opt().is_none_or(|most| from.as_bytes() <= most.as_bytes())
            }
            _ => true,
        }
    }
}

fn of(column: &ArrayRef, kind: &DataType) -> Bounds {
    use DataType as T;
    match kind {
        T::Int8 | T::Int16 | T::Int32 | T::Int64 => {
            let Ok(column) = deltalake::arrow::compute::cast(column, &T::Int64) else {
                return Bounds::Any;
            };
            let column = column.as_primitive::<Int64Type>();
            match (min(column), max(column)) {
                (Some(least), Some(most)) => Bounds::Numbers(least, most),
                _ => Bounds::Any,
            }
        }
        T::Date32 => match column.as_primitive_opt::<Date32Type>().map(|c| (min(c), max(c))) {
            Some((Some(least), Some(most))) => Bounds::Numbers(least.into(), most.into()),
            _ => Bounds::Any,
        },
        T::Utf8 => match column.as_string_opt::<i32>().map(|c| (min_string(c), max_string(c))) {
            Some((Some(least), Some(most))) => Bounds::Texts(least.to_owned(), most.to_owned()),
            _ => Bounds::Any,
        },
        _ => Bounds::Any,
    }
}

fn day_of(text: &str) -> Option<i64> {
    let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
    Some((day - NaiveDate::default()).num_days())
}

/// The statistics of a file, as its log has them, leave room for keys with these bounds.
pub(super) fn meet_stats(bounds: &[Bounds], names: &[String], stats: Option<&str>) -> bool {
    let stats = stats.and_then(|text| serde_json::from_str::<Value>(text).ok());
    let Some(stats) = stats else { return true };
    let (least, most) = (&stats["minValues"], &stats["maxValues"]);
    let mut columns = bounds.iter().zip(names);
    columns.all(|(bounds, name)| bounds.meets_stats(&least[name.as_str()], &most[name.as_str()]))
}

/// The same for a row group; `names` are the file's columns, where the key's are not its partition.
pub(super) fn meet_group(
    bounds: &[Bounds],
    names: &[Option<&str>],
    footer: &ArrowReaderMetadata,
    group: &RowGroupMetaData,
) -> bool {
    let mut columns = bounds.iter().zip(names);
    columns.all(|(bounds, name)| {
        let Some(name) = name else { return true };
        let column = group.columns().iter().find(|column| column.column_path().parts() == [*name]);
        let statistics = column.and_then(|column| column.statistics());
        let held = footer.schema().field_with_name(name).map(|field| field.data_type());
        match (statistics, held) {
            (Some(statistics), Ok(held)) => bounds.meets_group(statistics, held),
            _ => true,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use deltalake::arrow::array::{Date32Array, Int32Array, StringArray};
    use serde_json::json;

    use super::*;

    fn bounds(column: ArrayRef) -> Bounds {
        let mut bounds = Bounds::default();
        let kind = column.data_type().clone();
        bounds.extend(&column, &kind);
        bounds
    }

    #[test]
    fn a_file_is_passed_over_only_when_no_key_can_be_in_it() {
        let numbers = bounds(Arc::new(Int32Array::from(vec![Some(5), None, Some(9)])));
        assert_eq!(numbers, Bounds::Numbers(5, 9));
        for (least, most, meets) in [(1, 4, false), (1, 5, true), (9, 9, true), (10, 20, false)] {
            assert_eq!(numbers.meets_stats(&json!(least), &json!(most)), meets, "{least} {most}");
        }
        assert!(numbers.meets_stats(&Value::Null, &json!(1)));
        let texts = bounds(Arc::new(StringArray::from(vec!["b", "d"])));
        assert!(!texts.meets_stats(&json!("e"), &json!("f")));
        assert!(texts.meets_stats(&json!("a"), &json!("b")));
        let days = bounds(Arc::new(Date32Array::from(vec![0, 10])));
        assert!(days.meets_stats(&json!("1970-01-11"), &json!("1970-02-01")));
        assert!(!days.meets_stats(&json!("1970-01-12"), &json!("1970-02-01")));
    }

    #[test]
    fn bounds_grow_with_what_is_added() {
        let mut numbers = bounds(Arc::new(Int32Array::from(vec![5])));
        numbers.extend(&(Arc::new(Int32Array::from(vec![-1])) as ArrayRef), &DataType::Int32);
        assert_eq!(numbers, Bounds::Numbers(-1, 5));
    }
}
