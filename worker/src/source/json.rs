//! JSON values: the types that they allow, and their columns.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use alluvium_protocol::pipeline::same_name;
use alluvium_table::arrow::array::RecordBatch;
use alluvium_table::arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use alluvium_table::arrow::error::ArrowError;
use alluvium_table::arrow::json::ReaderBuilder;
use alluvium_table::schema::find_column;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// What the values of a place in the objects allow.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum JsonKind {
    /// Only null.
    #[default]
    Null,
    Boolean,
    Long,
    /// Whole numbers, some beyond those of a column.
    Whole,
    Double,
    Text,
    List(Box<JsonKind>),
    /// Names as they were spelt, also where they differ in case only: they may be keys of a map.
    Struct(Vec<(String, JsonKind)>),
}

impl JsonKind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Boolean,
            Value::Number(number) if number.is_i64() => Self::Long,
            Value::Number(number) if number.is_u64() => Self::Whole,
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
            (Self::Long, Self::Whole) | (Self::Whole, Self::Long) => Self::Whole,
            (Self::Long | Self::Whole, Self::Double) | (Self::Double, Self::Long | Self::Whole) => {
                Self::Double
            }
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
            Self::Whole | Self::Text => DataType::Utf8,
            Self::List(item) => {
                DataType::List(Arc::new(Field::new("element", item.kind_or_text(), true)))
            }
            Self::Struct(fields) if fields.is_empty() => DataType::Null,
            Self::Struct(fields) => {
                let fields = one_spelling(fields);
                let fields =
                    fields.iter().map(|(name, kind)| Field::new(name, kind.kind_or_text(), true));
                DataType::Struct(fields.collect::<Vec<_>>().into())
            }
        }
    }

    /// Some name within it is spelt otherwise in the type that it is decoded as.
    pub(super) fn is_respelt(&self, decoded: &DataType) -> bool {
        match (self, decoded) {
            (Self::List(item), DataType::List(field)) => item.is_respelt(field.data_type()),
            (Self::Struct(found), DataType::Struct(fields)) => found.iter().any(|(name, kind)| {
                let field = fields.iter().find(|field| same_name(field.name(), name));
                field
                    .is_some_and(|field| field.name() != name || kind.is_respelt(field.data_type()))
            }),
            (Self::Struct(found), DataType::Map(entries, _)) => {
                let DataType::Struct(parts) = entries.data_type() else { return false };
                let value = parts.last().map(|value| value.data_type());
                value.is_some_and(|value| found.iter().any(|(_, kind)| kind.is_respelt(value)))
            }
            _ => false,
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

/// The fields with each name once, as it was spelt first.
fn one_spelling(fields: &[(String, JsonKind)]) -> Vec<(String, JsonKind)> {
    let mut one: Vec<(String, JsonKind)> = Vec::with_capacity(fields.len());
    let mut at: HashMap<String, usize> = HashMap::new();
    for (name, kind) in fields {
        match at.get(&name.to_lowercase()) {
            Some(at) => {
                let known = &mut one[*at].1;
                *known = std::mem::take(known).merged(kind.clone());
            }
            None => {
                at.insert(name.to_lowercase(), one.len());
                one.push((name.clone(), kind.clone()));
            }
        }
    }
    one
}

/// The object with the names of its columns, and of the structures within, as these spell them.
/// `None`: a name is there twice.
pub(super) fn respelt(line: &str, columns: &SchemaRef) -> Option<String> {
    let value: Box<RawValue> = serde_json::from_str(line).ok()?;
    let columns = DataType::Struct(columns.fields().clone());
    respelt_value(value, &columns).map(|value| value.get().to_owned())
}

fn respelt_value(value: Box<RawValue>, kind: &DataType) -> Option<Box<RawValue>> {
    let text = value.get();
    let made = match kind {
        DataType::Struct(fields) if text.starts_with('{') => {
            let Members(members) = serde_json::from_str(text).ok()?;
            let mut made = BTreeMap::new();
            for (name, value) in members {
                let field = fields.iter().find(|field| same_name(field.name(), &name));
                let (name, value) = match field {
                    Some(field) => (field.name().clone(), respelt_value(value, field.data_type())?),
                    None => (name, value),
                };
                if made.insert(name, value).is_some() {
                    return None;
                }
            }
            serde_json::value::to_raw_value(&made)
        }
        DataType::List(field) if text.starts_with('[') => {
            let items: Vec<Box<RawValue>> = serde_json::from_str(text).ok()?;
            let items = items.into_iter().map(|item| respelt_value(item, field.data_type()));
            serde_json::value::to_raw_value(&items.collect::<Option<Vec<_>>>()?)
        }
        DataType::Map(entries, _) if text.starts_with('{') => {
            let DataType::Struct(parts) = entries.data_type() else { return Some(value) };
            let kind = parts.last()?.data_type();
            let Members(members) = serde_json::from_str(text).ok()?;
            let members =
                members.into_iter().map(|(name, value)| Some((name, respelt_value(value, kind)?)));
            serde_json::value::to_raw_value(&members.collect::<Option<BTreeMap<_, _>>>()?)
        }
        _ => return Some(value),
    };
    made.ok()
}

/// Adds what an object says to what is known of its columns.
fn learn(kinds: &mut Vec<(String, JsonKind)>, object: &Map<String, Value>) {
    for (name, value) in object {
        add(kinds, name, JsonKind::of(value));
    }
}

/// The columns of a file's objects, as far as they were seen.
#[derive(Default)]
pub(super) struct Columns {
    kinds: Vec<(String, JsonKind)>,
    /// Where a name is among them, in lower case.
    at: HashMap<String, usize>,
}

impl Columns {
    /// Adds an object's. Returns it with the names as they were seen first; `None`: this text is no
    /// object, or has a name twice.
    pub(super) fn learn<'a>(&mut self, text: &'a str) -> Option<Cow<'a, str>> {
        let Members(mut members) = serde_json::from_str(text).ok()?;
        let mut is_renamed = false;
        let mut seen = HashSet::new();
        let mut found = BTreeMap::new();
        for (name, value) in &mut members {
            let lower = name.to_lowercase();
            if !seen.insert(lower.clone()) {
                return None;
            }
            if let Some(at) = self.at.get(&lower)
                && self.kinds[*at].0 != *name
            {
                name.clone_from(&self.kinds[*at].0);
                is_renamed = true;
            }
            if has_twice(value) {
                return None;
            }
            let value: Value = serde_json::from_str(value.get()).ok()?;
            found.insert(name.clone(), (lower, JsonKind::of(&value)));
        }
        for (name, (lower, kind)) in found {
            match self.at.get(&lower) {
                Some(at) => {
                    let known = &mut self.kinds[*at].1;
                    *known = std::mem::take(known).merged(kind);
                }
                None => {
                    self.at.insert(lower, self.kinds.len());
                    self.kinds.push((name, kind));
                }
            }
        }
        if !is_renamed {
            return Some(Cow::Borrowed(text));
        }
        let members: BTreeMap<String, Box<RawValue>> = members.into_iter().collect();
        serde_json::to_string(&members).ok().map(Cow::Owned)
    }

    /// Names and kinds.
    pub(super) fn into_kinds(self) -> Vec<(String, JsonKind)> {
        self.kinds
    }
}

/// Somewhere within the value an object has a name twice.
fn has_twice(value: &RawValue) -> bool {
    let text = value.get();
    if text.starts_with('[') && text.contains('{') {
        let items: Result<Vec<Box<RawValue>>, _> = serde_json::from_str(text);
        return items.is_ok_and(|items| items.iter().any(|item| has_twice(item)));
    }
    if !text.starts_with('{') {
        return false;
    }
    let Ok(Members(members)) = serde_json::from_str(text) else { return false };
    let mut seen = HashSet::new();
    members.iter().any(|(name, value)| !seen.insert(name) || has_twice(value))
}

/// An object's names and values in their order, each as often as it is there.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Members;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

fn add(kinds: &mut Vec<(String, JsonKind)>, name: &str, kind: JsonKind) {
    match kinds.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = std::mem::take(known).merged(kind),
        None => kinds.push((name.to_owned(), kind)),
    }
}

/// How objects are decoded that have these columns: single values as text, also within nested ones.
/// What they are is judged afterwards, value by value; a decoder would cut `1.5` to fit an integer.
pub(super) fn decoding(found: &Schema, columns: &SchemaRef) -> SchemaRef {
    let fields = found.fields().iter().map(|field| {
        let wanted = find_column(columns, field.name()).map(|at| columns.field(at).data_type());
        Field::new(field.name(), as_text(field.data_type(), wanted), true)
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// The nested type that was found, or else is wanted, with text where single values stand.
fn as_text(found: &DataType, wanted: Option<&DataType>) -> DataType {
    let item = |field: &Field, kind| Arc::new(Field::new(field.name(), kind, true));
    match (found, wanted) {
        (_, Some(DataType::Map(entries, sorted))) | (DataType::Map(entries, sorted), None) => {
            let DataType::Struct(parts) = entries.data_type() else { return DataType::Utf8 };
            let [key, value] = parts.as_ref() else { return DataType::Utf8 };
            let kind = match key.data_type() {
                DataType::Binary => DataType::Binary,
                _ => DataType::Utf8,
            };
            let key = Arc::new(Field::new(key.name(), kind, false));
            let value = item(value, as_text(value.data_type(), Some(value.data_type())));
            let parts = DataType::Struct(vec![key, value].into());
            DataType::Map(Arc::new(Field::new(entries.name(), parts, false)), *sorted)
        }
        (DataType::Struct(fields), wanted) => {
            let fields = fields.iter().map(|field| {
                let wanted = match wanted {
                    Some(DataType::Struct(wanted)) => {
                        wanted.iter().find(|w| same_name(w.name(), field.name()))
                    }
                    _ => None,
                };
                item(field, as_text(field.data_type(), wanted.map(|field| field.data_type())))
            });
            DataType::Struct(fields.collect::<Vec<_>>().into())
        }
        (DataType::List(element), wanted) => {
            let wanted = match wanted {
                Some(DataType::List(wanted)) => Some(wanted.data_type()),
                _ => None,
            };
            DataType::List(item(element, as_text(element.data_type(), wanted)))
        }
        // Only null so far, or all kinds of things: what is wanted tells lines that are no such thing.
        (_, Some(wanted @ (DataType::Struct(_) | DataType::List(_)))) => as_text(wanted, None),
        // As hexadecimal digits: JSON has no other way.
        (DataType::Binary, None) | (_, Some(DataType::Binary)) => DataType::Binary,
        _ => DataType::Utf8,
    }
}

/// The first column that makes the line impossible to decode.
pub(super) fn culprit(line: &str, schema: &SchemaRef) -> Option<String> {
    let alone = |field: &FieldRef| Arc::new(Schema::new(vec![Arc::clone(field)]));
    let fails = |field: &&FieldRef| {
        let columns = alone(field);
        respelt(line, &columns).is_none_or(|line| decode(&[line], &columns).is_err())
    };
    schema.fields().iter().find(fails).map(|field| field.name().clone())
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
