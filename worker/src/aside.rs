//! Rows that were refused, on their way into quarantine: place, reason, and the row as it came.

use std::sync::{Arc, Mutex};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, GenericListArray, Int64Array, MapArray,
    OffsetSizeTrait, PrimitiveArray, RecordBatch, RecordBatchOptions, StringArray, StructArray,
};
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{
    DataType, Decimal128Type, Field, FieldRef, Fields, Float32Type, Float64Type, Int64Type, Schema,
    SchemaRef,
};
use alluvium_table::arrow::error::ArrowError;
use alluvium_table::arrow::json::writer::{LineDelimited, NullableEncoder};
use alluvium_table::arrow::json::{Encoder, EncoderFactory, EncoderOptions, WriterBuilder};
use alluvium_table::query::with_text_decimals;
use alluvium_table::spool::Spool;

use crate::raw::{FILE, ROW};

/// The last column of refused rows: why.
pub const REASON: &str = "_alluvium_reason";
/// The row as it came, as JSON, beside what was made of it.
pub const CAME: &str = "_alluvium_came";
/// Why a row is in quarantine: a NULL in its key.
pub const NULL_KEY: &str = "null_key";
/// Why: it cannot be read as a row.
pub const MALFORMED: &str = "malformed";
/// Why: `select` fails for it.
pub const SELECT: &str = "select";
/// Why a file is in quarantine.
pub const CORRUPT_FILE: &str = "corrupt_file";

/// What one reading set aside.
pub struct Aside {
    refused: Spool,
    /// Rows that `select` left out.
    pub filtered: u64,
}

/// Shared between the streams of one reading.
pub type AsideRef = Arc<Mutex<Aside>>;

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(FILE, DataType::Utf8, true),
        Field::new(ROW, DataType::Int64, true),
        Field::new("reason", DataType::Utf8, true),
        Field::new("row", DataType::Utf8, true),
    ]))
}

/// A place for what one reading sets aside.
pub fn new() -> AsideRef {
    Arc::new(Mutex::new(Aside { refused: Spool::new(schema()), filtered: 0 }))
}

impl Aside {
    /// Keeps rows of a file, given as JSON text.
    pub fn push(
        &mut self,
        file: &str,
        places: &[i64],
        reason: &str,
        rows: Vec<String>,
    ) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        let files = vec![file; places.len()];
        let reasons = vec![reason; places.len()];
        let places = Int64Array::from(places.to_vec());
        self.add(StringArray::from(files), places, StringArray::from(reasons), rows)
    }

    /// Keeps a file that cannot be read.
    pub fn push_file(&mut self, file: &str, error: &Error) -> Result<()> {
        let text = serde_json::json!({"error": error.message}).to_string();
        let place = Int64Array::from(vec![None]);
        let files = StringArray::from(vec![file]);
        self.add(files, place, StringArray::from(vec![CORRUPT_FILE]), vec![text])
    }

    /// Keeps rows of a query: data columns, place, and [`REASON`] last.
    pub fn keep(&mut self, rows: &RecordBatch) -> Result<()> {
        let column = |name: &str| {
            let column = rows.column_by_name(name);
            column.ok_or_else(|| Error::internal(format!("refused rows without {name}")))
        };
        let text = |name: &str| -> Result<StringArray> {
            let column = alluvium_table::arrow::compute::cast(column(name)?, &DataType::Utf8);
            Ok(column.map_err(Error::internal)?.as_string::<i32>().clone())
        };
        let places = column(ROW)?.as_primitive::<Int64Type>().clone();
        if rows.column_by_name(CAME).is_some() {
            let came = text(CAME)?.iter().map(|row| row.unwrap_or_default().to_owned()).collect();
            return self.add(text(FILE)?, places, text(REASON)?, came);
        }
        let own = [FILE, ROW, REASON];
        let schema = rows.schema();
        let data: Vec<usize> = (0..rows.num_columns())
            .filter(|at| !own.contains(&schema.field(*at).name().as_str()))
            .collect();
        let texts = texts_of(&rows.project(&data).map_err(Error::internal)?)?;
        self.add(text(FILE)?, places, text(REASON)?, texts)
    }

    fn add(
        &mut self,
        files: StringArray,
        places: Int64Array,
        reasons: StringArray,
        rows: Vec<String>,
    ) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let rows = StringArray::from(rows);
        let columns: Vec<alluvium_table::arrow::array::ArrayRef> =
            vec![Arc::new(files), Arc::new(places), Arc::new(reasons), Arc::new(rows)];
        let batch = RecordBatch::try_new(schema(), columns).map_err(Error::internal)?;
        self.refused.push(batch)
    }

    /// Takes up where a taken one was left.
    pub(crate) fn put_back(&mut self, rows: Spool) {
        self.refused = rows;
    }

    /// All that were kept.
    pub fn take(&mut self) -> Spool {
        std::mem::replace(&mut self.refused, Spool::new(schema()))
    }
}

/// Each row as a JSON object.
pub fn texts_of(batch: &RecordBatch) -> Result<Vec<String>> {
    // Numbers in JSON lose digits in most readers; names in JSON are text.
    let batch = &with_text_keys(&with_text_decimals(batch)?)?;
    let mut text = Vec::new();
    // A NULL within a value is part of it; a column without a value is left out.
    let has_nested = batch.schema_ref().fields().iter().any(|f| f.data_type().is_nested());
    let builder = WriterBuilder::new()
        .with_explicit_nulls(has_nested)
        .with_encoder_factory(Arc::new(AllNumbers));
    let mut writer = builder.build::<_, LineDelimited>(&mut text);
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Code::Internal, format!("write refused rows as JSON: {e}"))
    };
    writer.write(batch).map_err(|e| failed(&e))?;
    writer.finish().map_err(|e| failed(&e))?;
    drop(writer);
    let text = String::from_utf8(text).map_err(|e| failed(&e))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Keys of maps become text: JSON has no others.
fn with_text_keys(batch: &RecordBatch) -> Result<RecordBatch> {
    let columns: Vec<ArrayRef> = batch.columns().iter().map(text_keyed).collect::<Result<_>>()?;
    let schema = batch.schema();
    let fields = schema.fields().iter().zip(&columns);
    let fields: Vec<Field> = fields.map(|(field, column)| of_type(field, column)).collect();
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &rows)
        .map_err(Error::internal)
}

fn of_type(field: &Field, values: &ArrayRef) -> Field {
    field.clone().with_data_type(values.data_type().clone())
}

fn text_keyed(column: &ArrayRef) -> Result<ArrayRef> {
    let made: ArrayRef = match column.data_type() {
        DataType::Map(entries, sorted) => {
            let map = column.as_map();
            let (keys, values) = (text_of(map.keys())?, text_keyed(map.values())?);
            let DataType::Struct(parts) = entries.data_type() else {
                return Err(Error::internal("a map without entries"));
            };
            let parts: Fields = vec![of_type(&parts[0], &keys), of_type(&parts[1], &values)].into();
            let both = StructArray::try_new(parts, vec![keys, values], None);
            let both = both.map_err(Error::internal)?;
            let field = entries.as_ref().clone().with_data_type(both.data_type().clone());
            let (offsets, nulls) = (map.offsets().clone(), map.nulls().cloned());
            let made = MapArray::try_new(Arc::new(field), offsets, both, nulls, *sorted);
            Arc::new(made.map_err(Error::internal)?)
        }
        DataType::List(_) => Arc::new(text_keyed_items(column.as_list::<i32>())?),
        DataType::LargeList(_) => Arc::new(text_keyed_items(column.as_list::<i64>())?),
        DataType::Struct(fields) => {
            let parts = column.as_struct();
            let columns = parts.columns().iter().map(text_keyed);
            let columns: Vec<ArrayRef> = columns.collect::<Result<_>>()?;
            let fields: Fields =
                fields.iter().zip(&columns).map(|(field, column)| of_type(field, column)).collect();
            let nulls = parts.nulls().cloned();
            let made = StructArray::try_new_with_length(fields, columns, nulls, parts.len());
            Arc::new(made.map_err(Error::internal)?)
        }
        _ => Arc::clone(column),
    };
    Ok(made)
}

fn text_keyed_items<O: OffsetSizeTrait>(list: &GenericListArray<O>) -> Result<GenericListArray<O>> {
    let items = text_keyed(list.values())?;
    let field = match list.data_type() {
        DataType::List(field) | DataType::LargeList(field) => of_type(field, &items),
        other => return Err(Error::internal(format!("{other} is no list"))),
    };
    let (offsets, nulls) = (list.offsets().clone(), list.nulls().cloned());
    GenericListArray::try_new(Arc::new(field), offsets, items, nulls).map_err(Error::internal)
}

/// Bytes in hexadecimal digits, as within values.
fn text_of(keys: &ArrayRef) -> Result<ArrayRef> {
    use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary, Utf8};
    if !matches!(keys.data_type(), Binary | BinaryView | FixedSizeBinary(_) | LargeBinary) {
        return cast(keys, &Utf8).map_err(Error::internal);
    }
    let bytes = cast(keys, &Binary).map_err(Error::internal)?;
    let texts = bytes.as_binary::<i32>().iter();
    let texts = texts.map(|bytes| {
        bytes.map(|bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    });
    Ok(Arc::new(texts.collect::<StringArray>()))
}

/// NaN and the infinities as text: JSON has no number for them, and NULL is another value.
#[derive(Debug)]
struct AllNumbers;

impl EncoderFactory for AllNumbers {
    fn make_default_encoder<'a>(
        &self,
        _field: &'a FieldRef,
        array: &'a dyn Array,
        _options: &'a EncoderOptions,
    ) -> std::result::Result<Option<NullableEncoder<'a>>, ArrowError> {
        let encoder: Box<dyn Encoder + 'a> = match array.data_type() {
            DataType::Float64 => Box::new(Floats(array.as_primitive::<Float64Type>())),
            DataType::Float32 => Box::new(Floats(array.as_primitive::<Float32Type>())),
            DataType::Decimal128(..) => Box::new(Decimals(array.as_primitive::<Decimal128Type>())),
            _ => return Ok(None),
        };
        Ok(Some(NullableEncoder::new(encoder, array.nulls().cloned())))
    }
}

struct Floats<'a, T: ArrowPrimitiveType>(&'a PrimitiveArray<T>);

impl<T: ArrowPrimitiveType> Encoder for Floats<'_, T>
where
    T::Native: Into<f64> + std::fmt::Debug,
{
    fn encode(&mut self, at: usize, out: &mut Vec<u8>) {
        let value = self.0.value(at);
        let wide: f64 = value.into();
        let text = match wide {
            _ if wide.is_nan() => "\"NaN\"".to_owned(),
            f64::INFINITY => "\"Infinity\"".to_owned(),
            f64::NEG_INFINITY => "\"-Infinity\"".to_owned(),
            // The shortest text that reads back as the same number.
            _ => format!("{value:?}"),
        };
        out.extend_from_slice(text.as_bytes());
    }
}

/// Decimals as text: most readers of JSON take a number for a double.
struct Decimals<'a>(&'a PrimitiveArray<Decimal128Type>);

impl Encoder for Decimals<'_> {
    fn encode(&mut self, at: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("\"{}\"", self.0.value_as_string(at)).as_bytes());
    }
}

/// A line that is no row, as a JSON object.
pub fn line_as_json(line: &str) -> String {
    serde_json::json!({"line": line}).to_string()
}
