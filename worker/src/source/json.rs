//! JSON values: the types that they allow, and their columns.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use alluvium_protocol::pipeline::same_name;
use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{
    AsArray, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions, StringArray,
};
use alluvium_table::arrow::compute::filter;
use alluvium_table::arrow::datatypes::{DataType, Field, FieldRef, Int64Type, Schema, SchemaRef};
use alluvium_table::arrow::error::ArrowError;
use alluvium_table::arrow::json::ReaderBuilder;
use alluvium_table::schema::find_column;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{Piece, hex};
use crate::columns::DEPTH_MAX;

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
    /// All kinds of things, lists or objects among them.
    Mixed(Parts),
}

/// What the lists and the objects of a place hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Parts {
    item: Option<Box<JsonKind>>,
    fields: Option<Vec<(String, JsonKind)>>,
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
            (Self::Struct(a), Self::Struct(b)) => Self::Struct(fields_of_both(a, b)),
            (a, b) => match (a.into_parts(), b.into_parts()) {
                (None, None) => Self::Text,
                (Some(parts), None) | (None, Some(parts)) => Self::Mixed(parts),
                (Some(a), Some(b)) => Self::Mixed(a.merged(b)),
            },
        }
    }

    fn into_parts(self) -> Option<Parts> {
        match self {
            Self::List(item) => Some(Parts { item: Some(item), fields: None }),
            Self::Struct(fields) => Some(Parts { item: None, fields: Some(fields) }),
            Self::Mixed(parts) => Some(parts),
            _ => None,
        }
    }

    fn item(&self) -> Option<&JsonKind> {
        match self {
            Self::List(item) => Some(item),
            Self::Mixed(parts) => parts.item.as_deref(),
            _ => None,
        }
    }

    fn fields(&self) -> Option<&[(String, JsonKind)]> {
        match self {
            Self::Struct(fields) => Some(fields),
            Self::Mixed(parts) => parts.fields.as_deref(),
            _ => None,
        }
    }

    /// Levels of lists and objects.
    fn depth(&self) -> usize {
        let fields = self.fields().unwrap_or_default().iter().map(|(_, kind)| kind);
        let deepest = fields.chain(self.item()).map(Self::depth).max();
        deepest.map_or(usize::from(self.fields().is_some() || self.item().is_some()), |d| d + 1)
    }

    /// As a type of a column.
    pub(super) fn kind(&self) -> DataType {
        match self {
            Self::Null => DataType::Null,
            Self::Boolean => DataType::Boolean,
            Self::Long => DataType::Int64,
            Self::Double => DataType::Float64,
            Self::Whole | Self::Text | Self::Mixed(_) => DataType::Utf8,
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

    /// How values are decoded that are wanted so: single ones as text, also within nested ones. What
    /// they are is judged afterwards; a decoder would cut `1.5` to fit an integer. Parts that nobody
    /// wants are decoded, too, or they would be lost without a word.
    fn decoded_as(&self, wanted: Option<&DataType>) -> DataType {
        let wanted_part = |name: &str| match wanted {
            Some(DataType::Struct(fields)) => {
                fields.iter().find(|f| same_name(f.name(), name)).map(|field| field.data_type())
            }
            _ => None,
        };
        match (wanted, self.fields(), self.item()) {
            (Some(DataType::Map(entries, sorted)), fields, _) => {
                let DataType::Struct(parts) = entries.data_type() else { return DataType::Utf8 };
                let [key, value] = parts.as_ref() else { return DataType::Utf8 };
                let key_kind = text_type(key.data_type());
                let found = fields.unwrap_or_default().iter().map(|(_, kind)| kind.clone());
                let found = found.fold(Self::Null, Self::merged);
                let kind = found.decoded_as(Some(value.data_type()));
                let key = Arc::new(Field::new(key.name(), key_kind, false));
                let value = Arc::new(Field::new(value.name(), kind, true));
                let parts = DataType::Struct(vec![key, value].into());
                DataType::Map(Arc::new(Field::new(entries.name(), parts, false)), *sorted)
            }
            (Some(DataType::Struct(_)), Some(fields), _) if !fields.is_empty() => {
                let fields = one_spelling(fields).into_iter().map(|(name, kind)| {
                    let decoded = kind.decoded_as(wanted_part(&name));
                    Field::new(name, decoded, true)
                });
                DataType::Struct(fields.collect::<Vec<_>>().into())
            }
            (Some(DataType::List(wanted)), _, Some(item)) => {
                let decoded = item.decoded_as(Some(wanted.data_type()));
                DataType::List(Arc::new(Field::new("element", decoded, true)))
            }
            // Only null so far, or single values: what is wanted tells lines that are no such thing.
            (Some(wanted @ (DataType::Struct(_) | DataType::List(_))), ..)
                if matches!(self, Self::Null | Self::Mixed(_)) || !self.kind().is_nested() =>
            {
                text_type(wanted)
            }
            (Some(DataType::Binary), ..) => DataType::Binary,
            _ => text_type(&self.kind()),
        }
    }

    /// Some name within it is spelt otherwise in the type that it is decoded as.
    fn is_respelt(&self, decoded: &DataType) -> bool {
        let found = self.fields().unwrap_or_default();
        match decoded {
            DataType::List(field) => {
                self.item().is_some_and(|item| item.is_respelt(field.data_type()))
            }
            DataType::Struct(fields) => found.iter().any(|(name, kind)| {
                let field = fields.iter().find(|field| same_name(field.name(), name));
                field
                    .is_some_and(|field| field.name() != name || kind.is_respelt(field.data_type()))
            }),
            DataType::Map(entries, _) => {
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

impl Parts {
    fn merged(self, other: Self) -> Self {
        let item = match (self.item, other.item) {
            (Some(a), Some(b)) => Some(Box::new(a.merged(*b))),
            (a, b) => a.or(b),
        };
        let fields = match (self.fields, other.fields) {
            (Some(a), Some(b)) => Some(fields_of_both(a, b)),
            (a, b) => a.or(b),
        };
        Self { item, fields }
    }
}

fn fields_of_both(
    mut a: Vec<(String, JsonKind)>,
    b: Vec<(String, JsonKind)>,
) -> Vec<(String, JsonKind)> {
    for (name, kind) in b {
        add(&mut a, &name, kind);
    }
    a
}

/// The type with text where single values stand. Bytes are read from hexadecimal digits: JSON has no
/// other way.
fn text_type(kind: &DataType) -> DataType {
    let of = |field: &FieldRef| {
        Arc::new(field.as_ref().clone().with_data_type(text_type(field.data_type())))
    };
    match kind {
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(of).collect()),
        DataType::List(item) => DataType::List(of(item)),
        DataType::Map(entries, sorted) => DataType::Map(of(entries), *sorted),
        DataType::Binary => DataType::Binary,
        _ => DataType::Utf8,
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
fn respelt(line: &str, columns: &SchemaRef) -> Option<String> {
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
    /// object, has a name twice, or is nested deeper than a table's log can say.
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
            let kind = JsonKind::of(&value);
            if kind.depth() > DEPTH_MAX {
                return None;
            }
            found.insert(name.clone(), (lower, kind));
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

/// How objects become columns.
pub(super) struct Decoding {
    schema: SchemaRef,
    /// Names within values are spelt in more than one way.
    is_respelt: bool,
}

impl Decoding {
    /// For objects with these columns, whose types are to be those of `columns`.
    pub(super) fn new<'a>(
        kinds: impl Iterator<Item = (&'a str, &'a JsonKind)>,
        columns: &SchemaRef,
    ) -> Self {
        let mut is_respelt = false;
        let fields = kinds.map(|(name, kind)| {
            let wanted = find_column(columns, name).map(|at| columns.field(at).data_type());
            let decoded = kind.decoded_as(wanted);
            is_respelt |= kind.is_respelt(&decoded);
            Field::new(name, decoded, true)
        });
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        Self { schema, is_respelt }
    }

    fn decode(&self, lines: &[&str]) -> Option<RecordBatch> {
        if !self.is_respelt {
            return decode(lines, &self.schema).ok();
        }
        let lines = lines.iter().map(|line| respelt(line, &self.schema));
        decode(&lines.collect::<Option<Vec<_>>>()?, &self.schema).ok()
    }

    /// The rows of `texts`, which came as `lines`. Some line may have an object where others have a
    /// number: such are told.
    pub(super) fn piece(
        &self,
        texts: &[&str],
        lines: StringArray,
        places: Int64Array,
    ) -> Result<Piece> {
        if let Some(rows) = self.decode(texts) {
            let misfits = Vec::new();
            return Ok(Piece { rows, places, lines: Some(lines), misfits, are_corrections: false });
        }
        let fits: BooleanArray =
            texts.iter().map(|line| Some(self.decode(&[*line]).is_some())).collect();
        let misfits = (0..texts.len()).filter(|at| !fits.value(*at));
        let misfits = misfits.map(|at| {
            let column = culprit(texts[at], &self.schema).unwrap_or_default();
            (places.value(at), lines.value(at).to_owned(), column)
        });
        let misfits = misfits.collect();
        let good: Vec<&str> =
            texts.iter().zip(&fits).filter(|(_, f)| *f == Some(true)).map(|(t, _)| *t).collect();
        let rows = self.decode(&good);
        let rows =
            rows.ok_or_else(|| Error::internal("lines that fit alone do not fit together"))?;
        let lines = filter(&lines, &fits).map_err(Error::internal)?;
        let places = filter(&places, &fits).map_err(Error::internal)?;
        Ok(Piece {
            rows,
            places: places.as_primitive::<Int64Type>().clone(),
            lines: Some(lines.as_string::<i32>().clone()),
            misfits,
            are_corrections: false,
        })
    }
}

/// The first column that makes the line impossible to decode.
fn culprit(line: &str, schema: &SchemaRef) -> Option<String> {
    let alone = |field: &FieldRef| Arc::new(Schema::new(vec![Arc::clone(field)]));
    let fails = |field: &&FieldRef| {
        let columns = alone(field);
        respelt(line, &columns).is_none_or(|line| decode(&[line], &columns).is_err())
    };
    schema.fields().iter().find(fails).map(|field| field.name().clone())
}

/// The lines, each an object, as columns.
fn decode<T: AsRef<str>>(lines: &[T], schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    let digits: Vec<Field> =
        schema.fields().iter().map(|field| hex::as_digits(field.as_ref())).collect();
    let digits = Arc::new(Schema::new(digits));
    let builder = ReaderBuilder::new(Arc::clone(&digits)).with_coerce_primitive(true);
    let mut decoder = builder.with_batch_size(lines.len().max(1)).build_decoder()?;
    for line in lines {
        decoder.decode(line.as_ref().as_bytes())?;
        decoder.decode(b"\n")?;
    }
    let batch = decoder.flush()?;
    let batch = batch.unwrap_or_else(|| RecordBatch::new_empty(Arc::clone(&digits)));
    if digits == *schema {
        return Ok(batch);
    }
    let columns = batch.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| hex::as_bytes(column, field.data_type()));
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &rows)
}
