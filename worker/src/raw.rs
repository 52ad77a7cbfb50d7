//! The raw table: its own columns, and its schema as a union of all that came.

use std::collections::BTreeSet;
use std::sync::Arc;

use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::datatypes::{DataType, Field, Fields, Schema, TimeUnit};
use alluvium_table::schema::find_column;
use alluvium_table::{LiveFile, Table, TableSpec};

use crate::slowly;

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

/// Columns of main that come from no file.
pub(crate) fn fields_of_mode(mode: Mode) -> Vec<Field> {
    match mode {
        Mode::Upsert | Mode::Snapshot => Vec::new(),
        Mode::Append => vec![Field::new(EPOCH, DataType::Int64, true)],
        Mode::Scd2 => slowly::fields(),
    }
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

/// A file of raw holds nothing but reverts, by its statistics: these are written apart from content.
pub(crate) fn is_all_reverts(stats: Option<&str>) -> bool {
    let parsed = stats.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    parsed.is_some_and(|stats| stats["minValues"][OP] == REVERT && stats["maxValues"][OP] == REVERT)
}

/// The epoch whose partition a file is in.
pub(crate) fn epoch_of(file: &LiveFile) -> Option<Epoch> {
    file.partition.get(EPOCH)?.as_ref()?.parse().ok()
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

/// The columns of `wanted` that `table` lacks.
pub fn missing_columns(table: &Schema, wanted: &[Field]) -> Fields {
    wanted.iter().filter(|field| find_column(table, field.name()).is_none()).cloned().collect()
}
