//! Dates that no calendar has: 32 bits of days reach further than the years that programs count, and what
//! writes statistics of a data file gives up on them.

use std::ops::RangeInclusive;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{Array, ArrayRef, AsArray, BooleanArray};
use alluvium_table::arrow::buffer::NullBuffer;
use alluvium_table::arrow::compute::or;
use alluvium_table::arrow::datatypes::{DataType, Date32Type};
use chrono::{DateTime, NaiveDate};

/// True for each row with such a date, in structs, lists and maps, too. `None`: the type has no dates.
pub(crate) fn beyond(column: &ArrayRef) -> Result<Option<BooleanArray>> {
    let found = match column.data_type() {
        DataType::Date32 => {
            let days = days();
            let dates = column.as_primitive::<Date32Type>().iter();
            dates.map(|date| Some(date.is_some_and(|date| !days.contains(&date.into())))).collect()
        }
        DataType::Struct(_) => {
            let mut found: Option<BooleanArray> = None;
            for part in column.as_struct().columns() {
                found = match (found, beyond(part)?) {
                    (Some(one), Some(other)) => Some(or(&one, &other).map_err(Error::internal)?),
                    (one, other) => one.or(other),
                };
            }
            let Some(found) = found else { return Ok(None) };
            found
        }
        DataType::List(_) => {
            let lists = column.as_list::<i32>();
            let Some(items) = beyond(lists.values())? else { return Ok(None) };
            any_of(lists.offsets(), &items)
        }
        DataType::Map(..) => {
            let maps = column.as_map();
            let entries: ArrayRef = std::sync::Arc::new(maps.entries().clone());
            let Some(items) = beyond(&entries)? else { return Ok(None) };
            any_of(maps.offsets(), &items)
        }
        _ => return Ok(None),
    };
    let is_there = |row: usize| column.nulls().is_none_or(|nulls: &NullBuffer| nulls.is_valid(row));
    let found =
        found.iter().enumerate().map(|(row, found)| Some(found == Some(true) && is_there(row)));
    Ok(Some(found.collect()))
}

/// Days since 1970 that are dates.
fn days() -> RangeInclusive<i64> {
    let since = |date: NaiveDate| (date - DateTime::UNIX_EPOCH.date_naive()).num_days();
    since(NaiveDate::MIN)..=since(NaiveDate::MAX)
}

/// True for each list with such an item.
pub(crate) fn any_of(offsets: &[i32], items: &BooleanArray) -> BooleanArray {
    let ranges = offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize);
    ranges.map(|mut range| Some(range.any(|at| items.value(at)))).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use alluvium_table::arrow::array::{Date32Array, Int64Array, ListArray, StructArray};
    use alluvium_table::arrow::buffer::OffsetBuffer;
    use alluvium_table::arrow::datatypes::Field;

    use super::*;

    #[test]
    fn dates_beyond_the_calendar_are_found_at_any_depth() {
        let dates: ArrayRef =
            Arc::new(Date32Array::from(vec![Some(i32::MAX), Some(0), None, Some(i32::MIN)]));
        let found = |column: &ArrayRef| -> Vec<bool> {
            beyond(column).unwrap().unwrap().iter().map(Option::unwrap).collect()
        };
        assert_eq!(found(&dates), [true, false, false, true]);
        let field = Arc::new(Field::new("day", DataType::Date32, true));
        let nulls = Some(NullBuffer::from(vec![true, true, true, false]));
        let parts = StructArray::new(vec![field].into(), vec![dates], nulls);
        let parts: ArrayRef = Arc::new(parts);
        assert_eq!(found(&parts), [true, false, false, false]);
        let item = Arc::new(Field::new("item", parts.data_type().clone(), true));
        let lists = ListArray::new(item, OffsetBuffer::from_lengths([0, 1, 3]), parts, None);
        assert_eq!(found(&(Arc::new(lists) as ArrayRef)), [false, true, false]);
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        assert!(beyond(&numbers).unwrap().is_none());
    }
}
