//! JSON values: the types that they allow, and their columns.

use std::sync::Arc;

use alluvium_table::arrow::array::RecordBatch;
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::arrow::error::ArrowError;
use alluvium_table::arrow::json::ReaderBuilder;
use alluvium_table::schema::find_column;
use serde_json::{Map, Value};

/// What the values of a place in the objects allow.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum JsonKind {
    /// Only null.
    #[default]
    Null,
    Boolean,
    Long,
    Double,
    Text,
    List(Box<JsonKind>),
    Struct(Vec<(String, JsonKind)>),
}

impl JsonKind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Boolean,
            Value::Number(number) if number.is_i64() => Self::Long,
            // Beyond the whole numbers that a column can hold exactly.
            Value::Number(number) if number.is_u64() => Self::Text,
            Value::Number(_) => Self::Double,
            Value::String(_) => Self::Text,
            Value::Array(items) => {
                let kind = items.iter().map(Self::of).fold(Self::Null, Self::merged);
                Self::List(Box::new(kind))
            }
            Value::Object(object) => {
                let mut fields = Vec::new();
                learn(&mut fields, object);
                Self::Struct(fields)
            }
        }
    }

    /// What holds the values of both.
    pub(super) fn merged(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::Null, b) => b,
            (a, Self::Null) => a,
            (Self::Long, Self::Double) | (Self::Double, Self::Long) => Self::Double,
            (Self::List(a), Self::List(b)) => Self::List(Box::new(a.merged(*b))),
            (Self::Struct(mut a), Self::Struct(b)) => {
                for (name, kind) in b {
                    add(&mut a, &name, kind);
                }
                Self::Struct(a)
            }
            _ => Self::Text,
        }
    }

    /// As a type of a column.
    pub(super) fn kind(&self) -> DataType {
        match self {
            Self::Null => DataType::Null,
            Self::Boolean => DataType::Boolean,
            Self::Long => DataType::Int64,
            Self::Double => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::List(item) => {
                DataType::List(Arc::new(Field::new("element", item.kind_or_text(), true)))
            }
            Self::Struct(fields) if fields.is_empty() => DataType::Null,
            Self::Struct(fields) => {
                let fields =
                    fields.iter().map(|(name, kind)| Field::new(name, kind.kind_or_text(), true));
                DataType::Struct(fields.collect::<Vec<_>>().into())
            }
        }
    }

    /// Within a column something must stand where only null was seen.
    fn kind_or_text(&self) -> DataType {
        match self.kind() {
            DataType::Null => DataType::Utf8,
            kind => kind,
        }
    }
}

/// Adds what an object says to what is known of its columns.
pub(super) fn learn(kinds: &mut Vec<(String, JsonKind)>, object: &Map<String, Value>) {
    for (name, value) in object {
        add(kinds, name, JsonKind::of(value));
    }
}

fn add(kinds: &mut Vec<(String, JsonKind)>, name: &str, kind: JsonKind) {
    match kinds.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = std::mem::take(known).merged(kind),
        None => kinds.push((name.to_owned(), kind)),
    }
}

/// How objects are decoded that have these columns: single values as text, nested ones with the types
/// of `columns`, where these are known.
pub(super) fn decoding(found: &Schema, columns: &SchemaRef) -> SchemaRef {
    let fields = found.fields().iter().map(|field| {
        let wanted = find_column(columns, field.name()).map(|at| columns.field(at).data_type());
        let kind = match wanted.unwrap_or(field.data_type()) {
            nested @ (DataType::List(_) | DataType::Struct(_) | DataType::Map(..)) => {
                nested.clone()
            }
            _ => DataType::Utf8,
        };
        Field::new(field.name(), kind, true)
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// The lines, each an object, as columns.
pub(super) fn decode<T: AsRef<str>>(
    lines: &[T],
    schema: &SchemaRef,
) -> Result<RecordBatch, ArrowError> {
    let builder = ReaderBuilder::new(Arc::clone(schema)).with_coerce_primitive(true);
    let mut decoder = builder.with_batch_size(lines.len().max(1)).build_decoder()?;
    for line in lines {
        decoder.decode(line.as_ref().as_bytes())?;
        decoder.decode(b"\n")?;
    }
    let batch = decoder.flush()?;
    Ok(batch.unwrap_or_else(|| RecordBatch::new_empty(Arc::clone(schema))))
}
