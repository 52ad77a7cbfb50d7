//! Rows that were refused, on their way into quarantine: place, reason, and the row as it came.

use std::sync::{Arc, Mutex};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, Int64Array, PrimitiveArray, RecordBatch,
    RecordBatchOptions, StringArray,
};
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{
    DataType, Decimal128Type, Field, FieldRef, Float32Type, Float64Type, Int64Type, Schema,
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
    /// DataFusion passes errors on as text: the coded one waits here.
    pub error: Option<Error>,
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
    Arc::new(Mutex::new(Aside { refused: Spool::new(schema()), filtered: 0, error: None }))
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
    let schema = batch.schema();
    let fields: Vec<Field> = schema.fields().iter().map(|field| text_keys(field)).collect();
    let cast = |(column, field): (&ArrayRef, &Field)| match column.data_type() == field.data_type()
    {
        true => Ok(Arc::clone(column)),
        false => cast(column, field.data_type()).map_err(Error::internal),
    };
    let columns = batch.columns().iter().zip(&fields).map(cast).collect::<Result<Vec<_>>>()?;
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let schema = Arc::new(Schema::new(fields));
    RecordBatch::try_new_with_options(schema, columns, &rows).map_err(Error::internal)
}

fn text_keys(field: &Field) -> Field {
    let inner = |field: &FieldRef| Arc::new(text_keys(field));
    let kind = match field.data_type() {
        DataType::Map(entries, sorted) => match entries.data_type() {
            DataType::Struct(parts) if parts.len() == 2 => {
                let key = parts[0].as_ref().clone().with_data_type(DataType::Utf8);
                let parts = DataType::Struct(vec![Arc::new(key), inner(&parts[1])].into());
                DataType::Map(Arc::new(entries.as_ref().clone().with_data_type(parts)), *sorted)
            }
            other => other.clone(),
        },
        DataType::List(item) => DataType::List(inner(item)),
        DataType::LargeList(item) => DataType::LargeList(inner(item)),
        DataType::Struct(parts) => DataType::Struct(parts.iter().map(inner).collect()),
        other => other.clone(),
    };
    field.clone().with_data_type(kind)
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
