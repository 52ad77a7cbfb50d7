//! Values into the types of their columns, one by one: what does not fit is found, never changed.

use std::collections::HashSet;
use std::sync::Arc;

use alluvium_protocol::pipeline::same_name;
use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int32Array, ListArray, MapArray, RecordBatch,
    RecordBatchOptions, StructArray, new_null_array,
};
use alluvium_table::arrow::buffer::{NullBuffer, OffsetBuffer};
use alluvium_table::arrow::compute::kernels::cmp::{distinct, not_distinct};
use alluvium_table::arrow::compute::kernels::zip::zip;
use alluvium_table::arrow::compute::{
    CastOptions, and, cast_with_options, is_not_null, is_null, nullif, or, take,
};
use alluvium_table::arrow::datatypes::{DataType, Fields, Float64Type, SchemaRef, TimeUnit};
use alluvium_table::arrow::row::{RowConverter, SortField};
use alluvium_table::arrow::util::display::{ArrayFormatter, FormatOptions};
use alluvium_table::schema::{delta_type, find_column, widens_to};

use crate::calendar::{self, any_of};

/// Cast values that do not fit become NULL; they are told by comparing.
const SAFE: CastOptions<'static> = CastOptions { safe: true, format_options: FormatOptions::new() };

/// Rows with the types of their columns.
pub struct Typed {
    /// All rows. A value that does not fit is NULL here.
    pub rows: RecordBatch,
    /// Columns with values that do not fit: name, and true for each such row.
    pub misfits: Vec<(String, BooleanArray)>,
}

/// The batch with exactly the columns of `schema`: found by name, in either case; absent ones are NULL.
/// A text is no number in the columns `strict`: of what decides between rows `03` is not `3`.
/// In the columns `written` it is one, unless zeros stand before it: `007` is not `7` there.
pub fn typed(
    batch: &RecordBatch,
    schema: &SchemaRef,
    strict: &[&str],
    written: &[&str],
) -> Result<Typed> {
    let rows = batch.num_rows();
    let mut columns = Vec::with_capacity(schema.fields().len());
    let mut misfits = Vec::new();
    for field in schema.fields() {
        let Some(at) = find_column(batch.schema_ref(), field.name()) else {
            columns.push(new_null_array(field.data_type(), rows));
            continue;
        };
        let is_strict = strict.iter().any(|name| same_name(name, field.name()));
        let found = delta_type(batch.column(at).data_type());
        let is_text = found == Some(DataType::Utf8) && field.data_type() != &DataType::Utf8;
        let (mut column, mut misfit) = match is_strict && is_text {
            true => nothing_fits(batch.column(at), field.data_type())?,
            false => fitted(batch.column(at), field.data_type())?,
        };
        let is_written = written.iter().any(|name| same_name(name, field.name()));
        if is_written && is_text && field.data_type().is_numeric() {
            let texts = cast(batch.column(at), &DataType::Utf8)?;
            let filled = texts.as_string::<i32>().iter().map(|t| Some(t.is_some_and(is_filled)));
            let filled: BooleanArray = filled.collect();
            misfit = Some(match misfit {
                Some(misfit) => or(&misfit, &filled).map_err(Error::internal)?,
                None => filled,
            });
        }
        if let Some(beyond) = calendar::beyond(&column)?.filter(|beyond| beyond.true_count() > 0) {
            column = nullif(&column, &beyond).map_err(Error::internal)?;
            misfit = Some(match misfit {
                Some(misfit) => or(&misfit, &beyond).map_err(Error::internal)?,
                None => beyond,
            });
        }
        columns.push(column);
        misfits.extend(misfit.filter(|m| m.true_count() > 0).map(|m| (field.name().clone(), m)));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    let rows = RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options);
    Ok(Typed { rows: rows.map_err(Error::internal)?, misfits })
}

/// A value as people read it.
pub fn shown(column: &dyn Array, row: usize) -> String {
    let options = FormatOptions::new();
    let shown = ArrayFormatter::try_new(column, &options).map(|f| f.value(row).to_string());
    let mut text = shown.unwrap_or_default();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// All values of the column may be of type `to` without being looked at.
pub fn fits_whole(from: &DataType, to: &DataType) -> bool {
    delta_type(from).is_some_and(|held| widens_to(&held, to))
}

type Fitted = (ArrayRef, Option<BooleanArray>);

fn nothing_fits(column: &ArrayRef, to: &DataType) -> Result<Fitted> {
    let misfit = is_not_null(column).map_err(Error::internal)?;
    Ok((new_null_array(to, column.len()), Some(misfit)))
}

fn fitted(column: &ArrayRef, to: &DataType) -> Result<Fitted> {
    let from = column.data_type();
    if from == to {
        return Ok((Arc::clone(column), None));
    }
    let nothing = || nothing_fits(column, to);
    let Some(held) = delta_type(from) else {
        return if from == &DataType::Null {
            Ok((new_null_array(to, column.len()), None))
        } else {
            nothing()
        };
    };
    // Part by part: what does not fit is told at any depth.
    if to.is_nested()
        && let Some(fitted) = fitted_nested(column, to)?
    {
        return Ok(fitted);
    }
    if widens_to(&held, to) {
        // Unless a date lies beyond what a time can say.
        let made = cast_with_options(column, to, &SAFE).map_err(Error::internal)?;
        let misfit = lost(column, &made)?;
        return Ok((made, Some(misfit)));
    }
    if !is_judged_by_value(&held, to) {
        return nothing();
    }
    let column = cast_with_options(column, &held, &SAFE).map_err(Error::internal)?;
    let made = if held == DataType::Utf8 { from_text(&column, to)? } else { cast(&column, to)? };
    let mut misfit = lost(&column, &made)?;
    if to.is_floating() && held == DataType::Utf8 {
        misfit = or(&misfit, &inexact(&column, &made)?).map_err(Error::internal)?;
    }
    if held == DataType::Utf8
        && let Some(scale) = scale_of(to)
    {
        let cut = column.as_string::<i32>().iter();
        let cut = cut.map(|text| Some(text.is_some_and(|text| has_digits_beyond(text, scale))));
        misfit = or(&misfit, &cut.collect()).map_err(Error::internal)?;
    }
    if held == DataType::Utf8 && matches!(to, DataType::Timestamp(_, None)) {
        // Taking the zone away would tell another time of the day.
        let zoned = column.as_string::<i32>().iter().map(|text| Some(text.is_some_and(has_zone)));
        misfit = or(&misfit, &zoned.collect()).map_err(Error::internal)?;
    }
    if let Some(way_back) = way_back(&held, to) {
        // What was rounded or cut does not come back as it was.
        let back = cast(&made, &way_back)?;
        let came = cast(&column, &way_back)?;
        let changed = distinct(&back, &came).map_err(Error::internal)?;
        let changed = and(&changed, &is_not_null(&came).map_err(Error::internal)?);
        misfit = or(&misfit, &changed.map_err(Error::internal)?).map_err(Error::internal)?;
    }
    Ok((made, Some(misfit)))
}

/// Nested values, part by part; a row does not fit when one of its parts does not. `None`: they are not
/// of one shape.
fn fitted_nested(column: &ArrayRef, to: &DataType) -> Result<Option<Fitted>> {
    let internal = |e: alluvium_table::arrow::error::ArrowError| Error::internal(e);
    match to {
        DataType::Struct(fields) => {
            let Some(values) = column.as_struct_opt() else { return Ok(None) };
            let (columns, misfit) = fitted_parts(values, fields)?;
            let made = StructArray::try_new(fields.clone(), columns, values.nulls().cloned());
            Ok(Some((Arc::new(made.map_err(internal)?), Some(misfit))))
        }
        DataType::List(field) => {
            let Some(values) = column.as_list_opt::<i32>() else { return Ok(None) };
            let (items, misfit) = fitted(values.values(), field.data_type())?;
            let misfit = misfit.map(|misfit| any_of(values.offsets(), &misfit));
            let (offsets, nulls) = (values.offsets().clone(), values.nulls().cloned());
            let made = ListArray::try_new(Arc::clone(field), offsets, items, nulls);
            Ok(Some((Arc::new(made.map_err(internal)?), misfit)))
        }
        DataType::Map(field, sorted) => {
            let (Some(values), DataType::Struct(fields)) = (column.as_map_opt(), field.data_type())
            else {
                return Ok(None);
            };
            let (columns, misfit) = fitted_parts(values.entries(), fields)?;
            let misfit = any_of(values.offsets(), &misfit);
            let twice = has_key_twice(&columns[0], values.offsets())?;
            let mut misfit = or(&misfit, &twice).map_err(internal)?;
            if let Some(nulls) = values.nulls() {
                let there = BooleanArray::new(nulls.inner().clone(), None);
                misfit = and(&misfit, &there).map_err(internal)?;
            }
            // A key that does not fit would be NULL, which no map holds.
            let keep = values.nulls().map_or_else(
                || (0..values.len()).map(|row| !misfit.value(row)).collect::<Vec<_>>(),
                |nulls| {
                    (0..values.len()).map(|row| nulls.is_valid(row) && !misfit.value(row)).collect()
                },
            );
            let ranges = values.offsets().windows(2).zip(&keep).filter(|(_, keep)| **keep);
            let kept = ranges.flat_map(|(pair, _)| pair[0]..pair[1]);
            let kept: Int32Array = kept.map(Some).collect();
            let columns = columns.iter().map(|column| take(column, &kept, None).map_err(internal));
            let columns = columns.collect::<Result<Vec<_>>>()?;
            let lengths = values.offsets().windows(2).zip(&keep);
            let lengths =
                lengths.map(|(pair, keep)| if *keep { (pair[1] - pair[0]) as usize } else { 0 });
            let offsets = OffsetBuffer::from_lengths(lengths);
            let entries = StructArray::try_new(fields.clone(), columns, None).map_err(internal)?;
            let nulls = Some(NullBuffer::from(keep)).filter(|nulls| nulls.null_count() > 0);
            let made = MapArray::try_new(Arc::clone(field), offsets, entries, nulls, *sorted);
            Ok(Some((Arc::new(made.map_err(internal)?), Some(misfit))))
        }
        _ => Ok(None),
    }
}

/// The parts of structures, found by name.
fn fitted_parts(values: &StructArray, fields: &Fields) -> Result<(Vec<ArrayRef>, BooleanArray)> {
    let names: Vec<String> = values.fields().iter().map(|f| f.name().to_lowercase()).collect();
    let mut misfit = BooleanArray::from(vec![false; values.len()]);
    let mut seen = Vec::new();
    let mut columns = Vec::new();
    for field in fields {
        let Some(at) = names.iter().position(|name| *name == field.name().to_lowercase()) else {
            columns.push(new_null_array(field.data_type(), values.len()));
            continue;
        };
        seen.push(at);
        let (column, wrong) = fitted(values.column(at), field.data_type())?;
        columns.push(column);
        if let Some(wrong) = wrong {
            misfit = or(&misfit, &wrong).map_err(Error::internal)?;
        }
    }
    // A part that the column has no place for would be lost.
    for at in (0..names.len()).filter(|at| !seen.contains(at)) {
        let there = is_not_null(values.column(at)).map_err(Error::internal)?;
        misfit = or(&misfit, &there).map_err(Error::internal)?;
    }
    if let Some(nulls) = values.nulls() {
        let there = BooleanArray::new(nulls.inner().clone(), None);
        misfit = and(&misfit, &there).map_err(Error::internal)?;
    }
    Ok((columns, misfit))
}

/// True for each map with a key that is there twice: `1` and `01` are one number.
fn has_key_twice(keys: &ArrayRef, offsets: &OffsetBuffer<i32>) -> Result<BooleanArray> {
    let fields = vec![SortField::new(keys.data_type().clone())];
    let converter = RowConverter::new(fields).map_err(Error::internal)?;
    let rows = converter.convert_columns(&[Arc::clone(keys)]).map_err(Error::internal)?;
    let twice = offsets.windows(2).map(|pair| {
        let mut seen = HashSet::new();
        Some((pair[0]..pair[1]).any(|at| !seen.insert(rows.row(at as usize))))
    });
    Ok(twice.collect())
}

fn cast(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    cast_with_options(column, to, &SAFE).map_err(Error::internal)
}

/// True where a value became NULL.
fn lost(column: &ArrayRef, made: &ArrayRef) -> Result<BooleanArray> {
    let was = is_not_null(column).map_err(Error::internal)?;
    let is = is_null(made).map_err(Error::internal)?;
    and(&was, &is).map_err(Error::internal)
}

/// Texts in a type. Whole numbers may be written `1.0`, as some writers of JSON do.
fn from_text(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    let made = cast(column, to)?;
    if !to.is_integer() || lost(column, &made)?.true_count() == 0 {
        return Ok(made);
    }
    let exact = cast(column, &DataType::Decimal128(38, 10))?;
    let whole = cast(&exact, to)?;
    let is_whole = not_distinct(&cast(&whole, &DataType::Decimal128(38, 10))?, &exact);
    let is_whole = is_whole.map_err(Error::internal)?;
    let none = new_null_array(to, column.len());
    let whole = zip(&is_whole, &whole, &none).map_err(Error::internal)?;
    zip(&is_not_null(&made).map_err(Error::internal)?, &made, &whole).map_err(Error::internal)
}

/// Zeros, or a plus, before a number.
fn is_filled(text: &str) -> bool {
    let digits = text.trim().trim_start_matches('-').as_bytes();
    digits.first() == Some(&b'+')
        || (digits.first() == Some(&b'0') && digits.get(1).is_some_and(u8::is_ascii_digit))
}

/// Behind the time of the day: an offset, or the name of a zone.
fn has_zone(text: &str) -> bool {
    let time = text.trim_end().get(11..).unwrap_or_default();
    time.contains(|c: char| c.is_ascii_alphabetic() || matches!(c, '+' | '-'))
}

/// Digits of the second that Delta has no place for.
pub(crate) fn has_nanoseconds(time: &str) -> bool {
    time.get(19..).is_some_and(|rest| rest.starts_with('.') && has_digits_beyond(rest, 6))
}

/// Digits behind the point that a type has.
fn scale_of(kind: &DataType) -> Option<usize> {
    match kind {
        DataType::Decimal128(_, scale) => usize::try_from(*scale).ok(),
        kind if kind.is_integer() => Some(0),
        _ => None,
    }
}

/// A number as it is written has other digits than zeros behind so many after the point.
fn has_digits_beyond(text: &str, scale: usize) -> bool {
    let Some((_, behind)) = text.split_once('.') else { return false };
    let end = behind.find(|c: char| !c.is_ascii_digit()).unwrap_or(behind.len());
    let (digits, rest) = behind.split_at(end);
    // An exponent moves the point.
    !rest.starts_with(['e', 'E']) && digits.bytes().skip(scale).any(|digit| digit != b'0')
}

/// True where a text of digits became infinite, a number that is not zero became zero, or a whole
/// number another one.
fn inexact(texts: &ArrayRef, made: &ArrayRef) -> Result<BooleanArray> {
    let is_single = made.data_type() == &DataType::Float32;
    let made = cast(made, &DataType::Float64)?;
    let made = made.as_primitive::<Float64Type>().iter();
    let texts = texts.as_string::<i32>().iter();
    Ok(texts
        .zip(made)
        .map(|(text, made)| {
            let (Some(text), Some(made)) = (text.map(str::trim), made) else { return Some(false) };
            let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
            let has =
                |digits: std::ops::RangeInclusive<char>| mantissa.contains(|c| digits.contains(&c));
            if made.is_infinite() {
                return Some(has('0'..='9'));
            }
            if made == 0.0 {
                return Some(has('1'..='9'));
            }
            let digits = text.trim_start_matches(['-', '+']).trim_start_matches('0');
            let is_whole = digits.bytes().all(|byte| byte.is_ascii_digit());
            // As exact as programs write it: the shortest digits, filled up with zeros.
            let shown = match is_single {
                true => (made.abs() as f32).to_string(),
                false => made.abs().to_string(),
            };
            let is_exact = digits
                .parse::<u128>()
                .is_ok_and(|whole| whole as f64 == made.abs() && made.abs() as u128 == whole);
            Some(is_whole && shown != digits && !is_exact)
        })
        .collect())
}

/// Some values of type `from` are values of `to`, and which is plain. A number is no time, and a time
/// with a zone none without.
fn is_judged_by_value(from: &DataType, to: &DataType) -> bool {
    let is_number = |kind: &DataType| kind.is_numeric();
    match (from, to) {
        (DataType::Utf8, DataType::Boolean | DataType::Date32 | DataType::Binary) => true,
        (DataType::Utf8, DataType::Timestamp(..)) => true,
        (DataType::Utf8, to) => is_number(to),
        (DataType::Timestamp(_, None), DataType::Date32) => true,
        (from, to) => is_number(from) && is_number(to),
    }
}

/// The type in which value and result are compared; `None`: a parsed text is what it says.
fn way_back(from: &DataType, to: &DataType) -> Option<DataType> {
    match (from, to) {
        (DataType::Utf8, DataType::Decimal128(_, scale)) => {
            Some(DataType::Decimal128(38, scale.saturating_add(10).min(38)))
        }
        (DataType::Utf8, DataType::Date32) => {
            Some(DataType::Timestamp(TimeUnit::Microsecond, None))
        }
        (DataType::Utf8, _) => None,
        (from, _) => Some(from.clone()),
    }
}

#[cfg(test)]
mod tests {
    use alluvium_table::arrow::array::{
        Date32Array, Decimal128Array, Float64Array, Int32Array, Int64Array, StringArray,
    };
    use alluvium_table::arrow::datatypes::Int64Type;

    use super::*;

    /// Rows that do not fit.
    fn misfits(column: impl Array + 'static, to: DataType) -> Vec<usize> {
        let (made, misfit) = fitted(&(Arc::new(column) as ArrayRef), &to).unwrap();
        assert_eq!(made.data_type(), &to);
        let misfit = misfit.unwrap_or_else(|| BooleanArray::from(vec![false; made.len()]));
        (0..misfit.len()).filter(|at| misfit.value(*at)).collect()
    }

    #[test]
    fn numbers_fit_or_are_told() {
        use DataType as T;
        let longs = || Int64Array::from(vec![Some(1), Some(1 << 40), None, Some(-5)]);
        assert_eq!(misfits(longs(), T::Int32), [1]);
        assert_eq!(misfits(longs(), T::Utf8), [0, 1, 3]);
        assert_eq!(misfits(longs(), T::Date32), [0, 1, 3]);
        assert_eq!(misfits(longs(), T::Boolean), [0, 1, 3]);
        assert_eq!(misfits(longs(), T::Decimal128(5, 2)), [1]);
        assert_eq!(misfits(Int64Array::from(vec![(1 << 53) + 1, 3]), T::Float64), [0]);
        assert_eq!(
            misfits(Float64Array::from(vec![1.0, 1.5, f64::NAN, 1e300]), T::Int64),
            [1, 2, 3]
        );
        assert_eq!(misfits(Float64Array::from(vec![0.1, 0.5]), T::Float32), [0]);
        let decimals =
            Decimal128Array::from(vec![1239, 1200]).with_precision_and_scale(10, 3).unwrap();
        assert_eq!(misfits(decimals, T::Decimal128(10, 2)), [0]);
        assert_eq!(misfits(Int32Array::from(vec![1]), T::Int64), [0_usize; 0]);
    }

    #[test]
    fn texts_fit_or_are_told() {
        use DataType as T;
        let texts = |list: &[&str]| StringArray::from(list.to_vec());
        assert_eq!(misfits(texts(&["1", "x", "1.0", "1.5", "1e3", ""]), T::Int64), [1, 3, 4, 5]);
        assert_eq!(
            misfits(texts(&["1.239", "1.23", "1.230", "1e9", "abc"]), T::Decimal128(10, 2)),
            [0, 3, 4]
        );
        assert_eq!(
            misfits(texts(&["2024-01-02", "2024-13-01", "2024-01-02T10:00:00", "soon"]), T::Date32),
            [1, 2, 3]
        );
        let instant = T::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        assert_eq!(misfits(texts(&["2024-01-02T03:04:05Z", "2024-01-02", "12"]), instant), [2]);
        assert_eq!(misfits(texts(&["true", "false", "maybe"]), T::Boolean), [2]);
        let (made, _) = fitted(&(Arc::new(texts(&["1.0", "7"])) as ArrayRef), &T::Int64).unwrap();
        assert_eq!(made.as_primitive::<Int64Type>().values(), &[1, 7]);
    }

    #[test]
    fn a_text_is_no_number_that_it_does_not_say() {
        use DataType as T;
        let texts = |list: &[&str]| StringArray::from(list.to_vec());
        let wide = ["9007199254740993", "9007199254740992", "0.1", "1e-400", "0", "0.0", "1e400"];
        assert_eq!(misfits(texts(&wide), T::Float64), [0, 3, 6]);
        let long = ["9223372036854776000", "9223372036854775808", "9223372036854775807", "-007"];
        assert_eq!(misfits(texts(&long), T::Float64), [2]);
        assert_eq!(misfits(texts(&["16777217", "16777216", "0.1"]), T::Float32), [0]);
        let plain = T::Timestamp(TimeUnit::Microsecond, None);
        let times = ["2020-01-01T01:02:03+02:00", "2020-01-01T01:02:03Z", "2020-01-01 01:02:03"];
        assert_eq!(misfits(texts(&times), plain), [0, 1]);
    }

    #[test]
    fn a_time_is_a_date_only_at_midnight() {
        use alluvium_table::arrow::array::TimestampMicrosecondArray;
        let day = 86_400_000_000_i64;
        let times = TimestampMicrosecondArray::from(vec![day, day + 1]);
        assert_eq!(misfits(times, DataType::Date32), [1]);
        assert_eq!(
            misfits(
                Date32Array::from(vec![1]),
                DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
            ),
            [0]
        );
    }
}
