//! The raw table: its own columns, and its schema as a union of all that came.

use std::collections::BTreeSet;
use std::sync::Arc;

use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use alluvium_table::schema::{delta_type, find_column, widens_to};
use alluvium_table::{LiveFile, Table, TableSpec};

use crate::source::SourceFile;

/// Raw's partition column: the epoch.
pub const EPOCH: &str = "_epoch";
/// `upsert`, `delete` or `revert`.
pub const OP: &str = "_op";
/// Path of the row's file in its folder.
pub const FILE: &str = "_file";
/// The row's position in its file, from 0.
pub const ROW: &str = "_row";
/// The content's generation.
pub const GENERATION: &str = "_generation";
/// When the row was read.
pub const INGESTED_AT: &str = "_ingested_at";

/// Columns that Alluvium adds; a file must not have them.
pub const OWN: [&str; 6] = [EPOCH, OP, FILE, ROW, GENERATION, INGESTED_AT];

/// So begin the names of helpers in our queries; no file may have such a column either.
const HELPERS: &str = "_alluvium_";

/// The `_op` of a row that is to be in main.
pub const UPSERT: &str = "upsert";
/// The `_op` of a row whose key is to be absent.
pub const DELETE: &str = "delete";
/// The `_op` of a key that an earlier generation had and this one has not.
pub const REVERT: &str = "revert";

/// Raw's own columns. They come first: statistics are kept for the leading columns, and `_op`'s tell
/// an epoch without content.
pub fn own_fields() -> Vec<Field> {
    let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    vec![
        Field::new(OP, DataType::Utf8, true),
        Field::new(FILE, DataType::Utf8, true),
        Field::new(ROW, DataType::Int64, true),
        Field::new(GENERATION, DataType::Int64, true),
        Field::new(INGESTED_AT, instant, true),
        Field::new(EPOCH, DataType::Int64, true),
    ]
}

/// The columns of `schema` that came from files.
pub fn data_fields(schema: &Schema) -> Vec<Field> {
    let fields = schema.fields().iter().filter(|field| !OWN.contains(&field.name().as_str()));
    fields.map(|field| field.as_ref().clone().with_nullable(true)).collect()
}

/// Those of them that enter main.
pub fn main_fields(pipeline: &Pipeline, schema: &Schema) -> Vec<Field> {
    let fields = data_fields(schema);
    fields.into_iter().filter(|field| !pipeline.is_ignored(field.name())).collect()
}

/// The error of a raw table that lacks epochs which main has.
pub fn lost(pipeline: &Pipeline, epochs: &[Epoch]) -> Error {
    let names: Vec<String> = epochs.iter().take(5).map(Epoch::to_string).collect();
    let text = format!(
        "main has epochs that {} no longer holds ({}): what they said cannot be taken back or \
         reconciled",
        pipeline.raw,
        names.join(", ")
    );
    let way = if pipeline.adopt {
        "restore the raw table; or begin again: move raw's folder away, put the table as it was \
         before it was adopted back as main, then `alluvium run --once`"
    } else {
        "restore the raw table; or rebuild both: move the folders of raw and main away, then \
         `alluvium run --once`"
    };
    Error::new(Code::TableUnreadable, text).with_help(way)
}

/// Raw's files with the content of these epochs.
pub async fn files_of(raw: &Table, epochs: &BTreeSet<Epoch>) -> Result<Vec<LiveFile>> {
    let values: BTreeSet<String> = epochs.iter().map(Epoch::to_string).collect();
    let is_wanted = |value: &Option<String>| value.as_ref().is_some_and(|v| values.contains(v));
    raw.files_where(|partition| partition.get(EPOCH).is_some_and(is_wanted)).await
}

/// A new raw table with these data columns.
pub fn spec(pipeline: &Pipeline, data: &[Field]) -> TableSpec {
    let fields: Vec<Field> = own_fields().into_iter().chain(data.iter().cloned()).collect();
    TableSpec {
        schema: Arc::new(Schema::new(fields)),
        partition_by: vec![EPOCH.to_owned()],
        properties: pipeline
            .content_properties()
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec(),
    }
}

/// The data columns after these files: the table's, then new ones in the order in which they come.
/// A file's column that does not fit the table's type, or another file's, is an error that names it.
pub fn union_columns(
    table: Option<&SchemaRef>,
    files: &[SourceFile],
    epoch: Epoch,
) -> Result<Vec<Field>> {
    let mut columns = table.map_or_else(Vec::new, |schema| data_fields(schema));
    let fixed = columns.len();
    for file in files {
        let mut seen: Vec<String> = Vec::new();
        for field in file.schema.fields() {
            let place = format!("{epoch}/{}, column {:?}", file.name, field.name());
            check_name(field.name(), &mut seen, &place)?;
            // A column without a type says nothing: it reads as NULL.
            if field.data_type() == &DataType::Null {
                continue;
            }
            let Some(found) = delta_type(field.data_type()) else {
                let text = format!("{place}: Delta cannot hold the type {}", field.data_type());
                return Err(Error::new(Code::ColumnTypeMismatch, text));
            };
            let present = find_column(&Schema::new(columns.clone()), field.name());
            match present {
                None => columns.push(Field::new(field.name(), found, true)),
                Some(at) if widens_to(&found, columns[at].data_type()) => {}
                Some(at) if at >= fixed && widens_to(columns[at].data_type(), &found) => {
                    columns[at] = Field::new(columns[at].name(), found, true);
                }
                Some(at) => return Err(does_not_fit(&place, &found, &columns[at], at < fixed)),
            }
        }
    }
    Ok(columns)
}

/// Columns of the files that say nothing, not even their type, and that the table does not know: they
/// are no columns of the table, and expressions read them as NULL.
pub fn void_columns(columns: &[Field], files: &[SourceFile]) -> Vec<Field> {
    let mut found: Vec<Field> = Vec::new();
    let known = Schema::new(columns.to_vec());
    for field in files.iter().flat_map(|file| file.schema.fields()) {
        let is_new = find_column(&Schema::new(found.clone()), field.name()).is_none();
        if is_new && find_column(&known, field.name()).is_none() {
            found.push(Field::new(field.name(), DataType::Utf8, true));
        }
    }
    found
}

fn check_name(name: &str, seen: &mut Vec<String>, place: &str) -> Result<()> {
    let lower = name.to_lowercase();
    if OWN.contains(&lower.as_str()) || lower.starts_with(HELPERS) {
        let text = format!("{place}: the name is reserved for Alluvium's own columns");
        return Err(Error::new(Code::ReservedColumn, text)
            .with_help("rename the column where the file is written"));
    }
    if seen.contains(&lower) {
        let text = format!("{place}: the file has this column twice (case does not count)");
        return Err(Error::new(Code::ColumnTypeMismatch, text));
    }
    seen.push(lower);
    Ok(())
}

fn does_not_fit(place: &str, found: &DataType, column: &Field, in_table: bool) -> Error {
    let holder = if in_table { "the table has" } else { "another file of the folder has" };
    let text = format!("{place}: the file has {found}, {holder} {}", column.data_type());
    Error::new(Code::ColumnTypeMismatch, text)
        .with_help("write the column with the table's type (a narrower one is fine), then deliver the folder again")
}

/// The columns of `wanted` that `table` lacks.
pub fn missing_columns(table: &Schema, wanted: &[Field]) -> Fields {
    wanted.iter().filter(|field| find_column(table, field.name()).is_none()).cloned().collect()
}
