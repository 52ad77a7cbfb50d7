//! One zero and one NaN: floating-point numbers that are equal have the same bits.
//!
//! SQL's sorting, grouping and joining disagree about more than one of either.

use std::sync::Arc;

use deltalake::arrow::array::{Array, ArrayRef, AsArray, ListArray, StructArray};
use deltalake::arrow::datatypes::{DataType, Float32Type, Float64Type};

/// The same values, in structs and lists, too. Maps are left as they are: they are no keys.
pub fn with_one_zero(column: &ArrayRef) -> ArrayRef {
    let double = |value: f64| if value.is_nan() { f64::NAN } else { value + 0.0 };
    let single = |value: f32| if value.is_nan() { f32::NAN } else { value + 0.0 };
    match column.data_type() {
        DataType::Float64 => {
            Arc::new(column.as_primitive::<Float64Type>().unary::<_, Float64Type>(double))
        }
        DataType::Float32 => {
            Arc::new(column.as_primitive::<Float32Type>().unary::<_, Float32Type>(single))
        }
        DataType::Struct(fields) if !fields.is_empty() => {
            let values = column.as_struct();
            let columns = values.columns().iter().map(with_one_zero).collect();
            Arc::new(StructArray::new(fields.clone(), columns, values.nulls().cloned()))
        }
        DataType::List(field) => {
            let lists = column.as_list::<i32>();
            let values = with_one_zero(lists.values());
            let (offsets, nulls) = (lists.offsets().clone(), lists.nulls().cloned());
            Arc::new(ListArray::new(Arc::clone(field), offsets, values, nulls))
        }
        _ => Arc::clone(column),
    }
}

#[cfg(test)]
mod tests {
    use deltalake::arrow::array::{Float32Array, Float64Array};
    use deltalake::arrow::buffer::OffsetBuffer;
    use deltalake::arrow::datatypes::{Field, Fields};

    use super::*;

    #[test]
    fn zeros_and_nans_have_the_same_bits_at_any_depth() {
        let other_nan = f64::from_bits(0xfff8_0000_0000_0001);
        let values: ArrayRef =
            Arc::new(Float64Array::from(vec![Some(-0.0), None, Some(other_nan)]));
        let item = Arc::new(Field::new("item", DataType::Float64, true));
        let list = ListArray::new(item, OffsetBuffer::from_lengths([1, 0, 2]), values, None);
        let single: ArrayRef = Arc::new(Float32Array::from(vec![-0.0, 1.5, -f32::NAN]));
        let fields = Fields::from(vec![
            Field::new("l", list.data_type().clone(), true),
            Field::new("s", DataType::Float32, true),
        ]);
        let all: ArrayRef = Arc::new(StructArray::new(fields, vec![Arc::new(list), single], None));
        let one = with_one_zero(&all);
        let one = one.as_struct();
        let doubles = one.column(0).as_list::<i32>().values().clone();
        let bits: Vec<Option<u64>> =
            doubles.as_primitive::<Float64Type>().iter().map(|v| v.map(f64::to_bits)).collect();
        assert_eq!(bits, [Some(0), None, Some(f64::NAN.to_bits())]);
        let bits: Vec<u32> = one
            .column(1)
            .as_primitive::<Float32Type>()
            .values()
            .iter()
            .map(|v| v.to_bits())
            .collect();
        assert_eq!(bits, [0, 1.5_f32.to_bits(), f32::NAN.to_bits()]);
    }
}
