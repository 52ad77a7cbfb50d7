//! Which columns an epoch gives raw: the table's and the declared ones, then what its files bring.

use alluvium_protocol::pipeline::{Content, Format, Mode, NewColumns, same_name};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::schema::{delta_type, find_column, parse_type, widens_to};

use crate::raw::{self, OWN};
use crate::slowly::VALIDITY;

/// So begin the names of helpers in our queries; no file may have such a column either.
const HELPERS: &str = "_alluvium_";

/// Levels of nested values: a table's log with more cannot be read again
/// (serde_json stops at 128 levels of JSON, and a structure in a structure takes three).
pub(crate) const DEPTH_MAX: usize = 30;

/// The columns of a file, or of what `select` makes of all files.
pub(crate) type NamedSchema = (String, SchemaRef);

/// What an epoch's columns are.
pub(crate) struct Columns {
    /// The data columns of raw.
    pub(crate) table: Vec<Field>,
    /// Those of them that the table has with a narrower type.
    pub(crate) widened: Vec<Field>,
    /// Columns of the files that stay out of the tables.
    pub(crate) left_out: Vec<Field>,
    /// Columns that say nothing, not even their type.
    void: Vec<Field>,
}

impl Columns {
    /// All that expressions may speak of.
    pub(crate) fn read(&self) -> Vec<Field> {
        [self.table.as_slice(), &self.left_out, &self.void].concat()
    }
}

/// The declared columns, in their order.
pub(crate) fn declared(content: &Content) -> Result<Vec<Field>> {
    let field = |column: &alluvium_protocol::pipeline::Declared| {
        let kind = parse_type(&column.kind).map_err(|e| Error::new(Code::ConfigInvalid, e))?;
        Ok(Field::new(&column.name, kind, true))
    };
    content.declared.iter().map(field).collect()
}

/// Decides the columns. `table` is raw's schema, or main's while there is no raw.
pub(crate) fn decide(
    pipeline: &Pipeline,
    epoch: Epoch,
    folder: &str,
    table: Option<&SchemaRef>,
    is_first_raw: bool,
    files: &[NamedSchema],
) -> Result<Columns> {
    let declared = declared(&pipeline.content)?;
    let mut widened = Vec::new();
    let mut columns = match table {
        Some(schema) => with_declared(data_of(pipeline, schema), &declared, &mut widened),
        None => declared.clone(),
    };
    // Tables without data columns were made by an epoch without rows: this one says which there are.
    let known = columns.len();
    for (file, schema) in files {
        add_columns(pipeline, epoch, file, schema, known, &mut columns, &mut widened, &declared)?;
    }
    let known = if known == 0 { columns.len() } else { known };
    let (needed, new): (Vec<Field>, Vec<Field>) =
        columns.split_off(known).into_iter().partition(|column| {
            // The rule needs these, also where no earlier file gave them a type; and main, which may be
            // older than raw, never has what is ignored.
            let of_rule = pipeline.content.key.iter().chain(&pipeline.content.sequence_by);
            of_rule.into_iter().any(|name| same_name(name, column.name()))
                || (is_first_raw && pipeline.is_ignored(column.name()))
        });
    columns.extend(needed);
    let left_out = match pipeline.content.new_columns {
        NewColumns::Evolve => {
            columns.extend(new);
            Vec::new()
        }
        NewColumns::Fail if !new.is_empty() => {
            return Err(new_columns(pipeline, folder, &names_of(&new)));
        }
        NewColumns::Freeze | NewColumns::Fail => new,
    };
    let read = [columns.as_slice(), &left_out].concat();
    if let Some(column) =
        read.iter().find(|column| has_map_of_plain_times(column.data_type(), false))
    {
        let text = format!(
            "{folder}: column {:?} has a map with times without a zone, which tables here cannot say",
            column.name()
        );
        return Err(Error::new(Code::ColumnTypeMismatch, text)
            .with_help("give the times a zone where the files are written, or with `select`"));
    }
    if let Some(column) = read.iter().find(|column| depth(column.data_type()) > DEPTH_MAX) {
        let text = format!(
            "{folder}: column {:?} is nested deeper than {DEPTH_MAX} levels, which a table's log cannot say",
            column.name()
        );
        return Err(Error::new(Code::ColumnTypeMismatch, text).with_help(
            "write the inner values as text where the files are written, or with `select`",
        ));
    }
    let void = void_columns(&read, files);
    Ok(Columns { table: columns, widened, left_out, void })
}

/// The library that makes our tables does not look into maps for what asks for a feature.
fn has_map_of_plain_times(kind: &DataType, in_map: bool) -> bool {
    match kind {
        DataType::Timestamp(_, None) => in_map,
        DataType::Map(entries, _) => has_map_of_plain_times(entries.data_type(), true),
        DataType::List(item) => has_map_of_plain_times(item.data_type(), in_map),
        DataType::Struct(fields) => {
            fields.iter().any(|field| has_map_of_plain_times(field.data_type(), in_map))
        }
        _ => false,
    }
}

fn depth(kind: &DataType) -> usize {
    match kind {
        DataType::List(item) => 1 + depth(item.data_type()),
        DataType::Map(entries, _) => depth(entries.data_type()),
        DataType::Struct(fields) => {
            1 + fields.iter().map(|field| depth(field.data_type())).max().unwrap_or(0)
        }
        _ => 0,
    }
}

pub(crate) fn names_of(columns: &[Field]) -> Vec<String> {
    columns.iter().map(|field| field.name().clone()).collect()
}

/// Data columns of raw, or of main.
fn data_of(pipeline: &Pipeline, schema: &Schema) -> Vec<Field> {
    let mut columns = raw::data_fields(schema);
    if pipeline.content.mode == Mode::Scd2 {
        columns.retain(|field| !VALIDITY.contains(&field.name().as_str()));
    }
    columns
}

/// The table's columns and the declared ones, which do not contradict them: that was checked.
fn with_declared(
    mut columns: Vec<Field>,
    declared: &[Field],
    widened: &mut Vec<Field>,
) -> Vec<Field> {
    for field in declared {
        let Some(at) = find_column(&Schema::new(columns.clone()), field.name()) else {
            columns.push(field.clone());
            continue;
        };
        let held = columns[at].data_type();
        if widens_to(field.data_type(), held) {
            continue;
        }
        columns[at] = Field::new(columns[at].name(), field.data_type().clone(), true);
        widened.push(columns[at].clone());
    }
    columns
}

/// Adds a file's columns. The first `known` columns are the table's and the declared ones.
#[allow(clippy::too_many_arguments, reason = "one step of one function, split for reading")]
fn add_columns(
    pipeline: &Pipeline,
    epoch: Epoch,
    file: &str,
    schema: &Schema,
    known: usize,
    columns: &mut Vec<Field>,
    widened: &mut Vec<Field>,
    declared: &[Field],
) -> Result<()> {
    let may_widen = pipeline.content.new_columns == NewColumns::Evolve;
    let declared = Schema::new(declared.to_vec());
    let mut seen: Vec<String> = Vec::new();
    for field in schema.fields() {
        let place = format!("{epoch}/{file}, column {:?}", field.name());
        check_name(pipeline, field.name(), &mut seen, &place)?;
        // A column without a type says nothing: it reads as NULL.
        if field.data_type() == &DataType::Null {
            continue;
        }
        let Some(found) = delta_type(field.data_type()) else {
            let text = format!("{place}: Delta cannot hold the type {}", field.data_type());
            return Err(Error::new(Code::ColumnTypeMismatch, text));
        };
        let Some(at) = find_column(&Schema::new(columns.clone()), field.name()) else {
            columns.push(Field::new(field.name(), found, true));
            continue;
        };
        let is_wider = !widens_to(&found, columns[at].data_type())
            && widens_to(columns[at].data_type(), &found);
        // What does not fit otherwise is judged value by value when it is read.
        if is_wider
            && (at >= known || (may_widen && find_column(&declared, field.name()).is_none()))
        {
            columns[at] = Field::new(columns[at].name(), found, true);
            if at < known {
                widened.retain(|known| known.name() != columns[at].name());
                widened.push(columns[at].clone());
            }
        }
    }
    Ok(())
}

/// Columns of the files that say nothing, not even their type, and that the table does not know: they
/// are no columns of the table, and expressions read them as NULL.
fn void_columns(columns: &[Field], files: &[NamedSchema]) -> Vec<Field> {
    let mut found: Vec<Field> = Vec::new();
    let known = Schema::new(columns.to_vec());
    for field in files.iter().flat_map(|(_, schema)| schema.fields()) {
        let is_new = find_column(&Schema::new(found.clone()), field.name()).is_none();
        if is_new && find_column(&known, field.name()).is_none() {
            found.push(Field::new(field.name(), DataType::Utf8, true));
        }
    }
    found
}

/// What readers of a change data feed find beside the row.
const OF_FEED: [&str; 3] = ["_change_type", "_commit_version", "_commit_timestamp"];

fn check_name(pipeline: &Pipeline, name: &str, seen: &mut Vec<String>, place: &str) -> Result<()> {
    let lower = name.to_lowercase();
    let is_validity = pipeline.content.mode == Mode::Scd2 && VALIDITY.contains(&lower.as_str());
    let is_of_feed = pipeline.content.change_feed && OF_FEED.contains(&lower.as_str());
    if OWN.contains(&lower.as_str()) || lower.starts_with(HELPERS) || is_validity || is_of_feed {
        let text = format!("{place}: the name is reserved for Alluvium's own columns");
        return Err(Error::new(Code::ReservedColumn, text)
            .with_help("rename the column where the file is written, or with `select`"));
    }
    if seen.contains(&lower) {
        let text = format!("{place}: the file has this column twice (case does not count)");
        return Err(Error::new(Code::ColumnTypeMismatch, text));
    }
    seen.push(lower);
    Ok(())
}

fn new_columns(pipeline: &Pipeline, folder: &str, names: &[String]) -> Error {
    let text =
        format!("{folder} has columns that {} does not have: {}", pipeline.raw, names.join(", "));
    let help = format!(
        "set `schema` of pipeline.{} to \"evolve\" or \"freeze\", then `alluvium retry`",
        pipeline.id
    );
    Error::new(Code::NewColumn, text).with_help(help)
}

/// Key columns must be in every file; the sequence column in at least one, or declared. Objects of JSON may
/// leave out what is NULL: there it is enough that the table or the configuration knows the column.
pub(crate) fn check_columns(
    pipeline: &Pipeline,
    folder: &str,
    table: Option<&SchemaRef>,
    files: &[NamedSchema],
) -> Result<()> {
    let content = &pipeline.content;
    let is_declared =
        |name: &str| content.declared.iter().any(|column| same_name(&column.name, name));
    let is_known = |name: &str| {
        content.format == Format::Json
            && (is_declared(name) || table.is_some_and(|table| find_column(table, name).is_some()))
    };
    for (file, schema) in files {
        for key in &content.key {
            if find_column(schema, key).is_none() && !is_known(key) {
                let names: Vec<&str> =
                    schema.fields().iter().map(|f| f.name().as_str()).take(20).collect();
                let text = format!(
                    "{folder}/{file} has no key column {key:?}; it has {}",
                    names.join(", ")
                );
                let help = format!(
                    "deliver the folder with the column, or set `key` of pipeline.{}",
                    pipeline.id
                );
                return Err(Error::new(Code::KeyColumnMissing, text).with_help(help));
            }
        }
    }
    let Some(sequence) = &content.sequence_by else { return Ok(()) };
    let is_missing = !is_known(sequence)
        && !is_declared(sequence)
        && files.iter().all(|(_, schema)| find_column(schema, sequence).is_none());
    if is_missing && !files.is_empty() {
        let text = format!("no file of {folder} has the column {sequence:?}");
        let help = format!("set `sequence_by` of pipeline.{}", pipeline.id);
        return Err(Error::new(Code::SequenceColumnMissing, text).with_help(help));
    }
    Ok(())
}
