//! Where a key's present value comes from, and what every epoch said of it as far as raw reaches.
//!
//! Reads only. The rule is that of `winners`; main is read beside it, so that a table which somebody
//! else wrote is seen.

use alluvium_protocol::marker::Markers;
use alluvium_protocol::pipeline::{Mode, same_name};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::arrow::datatypes::{DataType, Schema};
use alluvium_table::schema::find_column;
use alluvium_table::session::{query_session, quoted, quoted_list};
use alluvium_table::{Table, query};
use serde_json::{Map, Value};

use crate::folding::top_of;
use crate::merge::BASE_VERSION;
use crate::raw;
use crate::slowly::VALIDITY;
use crate::winners::Rule;

/// Memory of the search; it reads few columns and sorts few rows.
const SEARCH_BYTES: usize = 256 << 20;

/// What became of a row of raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It decides the key's present value.
    Current,
    /// A later row decides.
    Superseded,
    /// It is not in main: its epoch was never merged, or this content of it was not.
    Waiting,
    /// It says that an earlier generation of its epoch had the key, and this one has not.
    Revert,
}

impl Fate {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Superseded => "superseded",
            Self::Waiting => "waiting",
            Self::Revert => "revert",
        }
    }
}

/// One row of raw with the key.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its epoch.
    pub epoch: Epoch,
    /// Generation, `_op`, `_file`, `_row`, `_ingested_at`, by raw's names without the underscore.
    pub place: Map<String, Value>,
    /// What became of it.
    pub fate: Fate,
    /// Its data columns.
    pub values: Map<String, Value>,
}

/// All that the tables know of one key.
#[derive(Clone, Debug)]
pub struct Lineage {
    /// Rows of raw, the deciding order backwards: the last word comes first.
    pub rows: Vec<Said>,
    /// Main's row.
    pub main: Option<Map<String, Value>>,
    /// The base's row, where main was adopted.
    pub base: Option<Map<String, Value>>,
    /// Main still has an earlier content of an epoch that speaks of the key.
    pub is_pending: bool,
}

impl Lineage {
    /// The row of raw that decides.
    pub fn current(&self) -> Option<&Said> {
        self.rows.iter().find(|row| row.fate == Fate::Current)
    }

    /// Main holds what the rule says, as far as that can be told now.
    pub fn agrees(&self) -> bool {
        if self.is_pending {
            return true;
        }
        let expected = match self.current() {
            Some(row) if row.place["op"] == raw::UPSERT => Some(&row.values),
            Some(_) => None,
            None => self.base.as_ref(),
        };
        match (expected, &self.main) {
            (None, None) => true,
            (Some(expected), Some(found)) => {
                // A column that only one of them has is NULL in the other.
                let value = |row: &Map<String, Value>, name: &str| {
                    row.get(name).cloned().unwrap_or(Value::Null)
                };
                let names = expected.keys().chain(found.keys());
                names.into_iter().all(|name| value(expected, name) == value(found, name))
            }
            _ => false,
        }
    }
}

/// Looks for a key: one text for each of the pipeline's key columns, in their order.
///
/// # Errors
/// `NotPossibleNow`: there is no raw table, or a text is no value of its column.
pub async fn lineage(pipeline: &Pipeline, key: &[String]) -> Result<Lineage> {
    let columns = &pipeline.content.key;
    if columns.is_empty() {
        let text = format!("{} has mode = \"append\": its rows have no key", pipeline.id);
        let help =
            format!("its columns `_file` and `_row` in {} say where a row is from", pipeline.raw);
        return Err(Error::new(Code::NotPossibleNow, text).with_help(help));
    }
    if key.len() != columns.len() {
        let text =
            format!("the key of {} is {}; {} given", pipeline.id, columns.join(", "), key.len());
        let help = format!("`--key` once for each column: --key {}", columns.join(" --key "));
        return Err(Error::new(Code::NotPossibleNow, text).with_help(help));
    }
    let main = Table::open(&pipeline.main).await?;
    // After main: what it has applied is in this snapshot of raw, too.
    let raw = Table::open(&pipeline.raw).await?.ok_or_else(|| {
        let text = format!("there is no raw table at {} yet", pipeline.raw);
        Error::new(Code::NotPossibleNow, text)
    })?;
    raw.check_settings(pipeline)?;
    let of = |table: &Table| Markers::of_pipeline(&pipeline.id, table.transactions());
    let markers = Markers::joined(of(&raw), main.as_ref().map(of).unwrap_or_default());
    check_values(pipeline, &raw.schema(), key).await?;
    let rows = rows_of_raw(pipeline, &raw, key).await?;
    let main_row = match &main {
        Some(main) => row_of(main, pipeline, &raw, key).await?,
        None => None,
    };
    let base = match &main {
        Some(main) => base_of(main).await?,
        None => None,
    };
    let base = match &base {
        Some(base) => row_of(base, pipeline, &raw, key).await?,
        None => None,
    };
    let top = match pipeline.content.mode {
        Mode::Snapshot => Some(top_of(&raw, &markers.applied()).await?.map(|(top, _)| top)),
        _ => None,
    };
    let rows = judged(rows, &markers, top)?;
    let is_replaced = |row: &Said| markers.is_applied(row.epoch) && markers.needs_merge(row.epoch);
    let is_pending = rows.iter().any(is_replaced);
    Ok(Lineage { rows, main: main_row, base, is_pending })
}

async fn base_of(main: &Table) -> Result<Option<Table>> {
    let version = main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
    match version {
        Some(version) => Table::open_at(main.uri(), Some(version)).await,
        None => Ok(None),
    }
}

async fn rows_of_raw(
    pipeline: &Pipeline,
    raw: &Table,
    key: &[String],
) -> Result<Vec<Map<String, Value>>> {
    let session = query_session(SEARCH_BYTES);
    raw.register(&session, "raw", None).await?;
    let rule = Rule::new(pipeline, raw);
    let sql = format!(
        "SELECT {}, {} FROM raw WHERE {} ORDER BY {}",
        quoted_list(raw::OWN),
        rule.column_list(),
        condition(&raw.schema(), pipeline, key),
        rule.last_first(),
    );
    objects(query::rows(&session, &sql).await.map_err(|error| no_such_value(error, raw, pipeline))?)
}

/// The row with the key, under raw's names of the columns.
async fn row_of(
    table: &Table,
    pipeline: &Pipeline,
    raw: &Table,
    key: &[String],
) -> Result<Option<Map<String, Value>>> {
    let session = query_session(SEARCH_BYTES);
    table.register(&session, "main", None).await?;
    let (schema, names) = (table.schema(), raw::data_fields(&raw.schema()));
    let columns: Vec<String> = schema
        .fields()
        .iter()
        .filter(|field| !is_validity(pipeline, field.name()))
        .map(|field| {
            let known = names.iter().find(|name| same_name(name.name(), field.name()));
            let name = known.map_or(field.name(), |known| known.name());
            format!("{} AS {}", quoted(field.name()), quoted(name))
        })
        .collect();
    let mut condition = condition(&schema, pipeline, key);
    if pipeline.content.mode == Mode::Scd2 {
        condition.push_str(" AND is_current");
    }
    let sql = format!("SELECT {} FROM main WHERE {condition} LIMIT 1", columns.join(", "));
    let rows = query::rows(&session, &sql).await;
    let rows = rows.map_err(|error| no_such_value(error, table, pipeline))?;
    Ok(objects(rows)?.pop())
}

fn is_validity(pipeline: &Pipeline, name: &str) -> bool {
    pipeline.content.mode == Mode::Scd2 && VALIDITY.contains(&name)
}

fn condition(schema: &Schema, pipeline: &Pipeline, key: &[String]) -> String {
    let text = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let equal = pipeline.content.key.iter().zip(key).map(|(column, value)| {
        let field = find_column(schema, column).map(|at| schema.field(at));
        let name = quoted(field.map_or(column.as_str(), |field| field.name()));
        match field.map(|field| field.data_type()) {
            Some(DataType::Utf8) | None => format!("{name} = {}", text(value)),
            Some(DataType::Binary) => format!("{name} = X{}", text(value)),
            // No number equals it, and statistics do not know it.
            Some(DataType::Float32 | DataType::Float64) if is_nan(value) => {
                format!("isnan({name})")
            }
            Some(kind) => {
                format!("{name} = arrow_cast({}, {})", text(value), text(&kind.to_string()))
            }
        }
    });
    equal.collect::<Vec<_>>().join(" AND ")
}

fn is_nan(value: &str) -> bool {
    value.eq_ignore_ascii_case("nan")
}

/// Each text is a value of its column, to the last digit.
async fn check_values(pipeline: &Pipeline, schema: &Schema, key: &[String]) -> Result<()> {
    let session = query_session(SEARCH_BYTES);
    for (column, value) in pipeline.content.key.iter().zip(key) {
        let Some(at) = find_column(schema, column) else { continue };
        let kind = schema.field(at).data_type();
        let literal = format!("'{}'", value.replace('\'', "''"));
        let sql = format!("SELECT arrow_cast({literal}, '{kind}')");
        let is_one = match kind {
            DataType::Utf8 => true,
            DataType::Binary => {
                value.len().is_multiple_of(2) && value.bytes().all(|byte| byte.is_ascii_hexdigit())
            }
            DataType::Decimal128(_, scale) => {
                let digits = value.split_once('.').map_or("", |(_, digits)| digits);
                digits.trim_end_matches('0').len() <= usize::try_from(*scale).unwrap_or(0)
                    && query::rows(&session, &sql).await.is_ok()
            }
            _ => query::rows(&session, &sql).await.is_ok(),
        };
        if !is_one {
            let text = format!("{value:?} is no value of the key column {column} {kind}");
            let help = match kind {
                DataType::Binary => {
                    "a binary key is given in hexadecimal digits: --key 00ff".to_owned()
                }
                _ => format!(
                    "`alluvium query {} \"SELECT * FROM main LIMIT 5\"` shows what keys look like",
                    pipeline.id
                ),
            };
            return Err(Error::new(Code::NotPossibleNow, text).with_help(help));
        }
    }
    Ok(())
}

fn no_such_value(error: Error, table: &Table, pipeline: &Pipeline) -> Error {
    let schema = table.schema();
    let kinds: Vec<String> = pipeline
        .content
        .key
        .iter()
        .filter_map(|name| find_column(&schema, name).map(|at| schema.field(at)))
        .map(|field| format!("{} {}", field.name(), field.data_type()))
        .collect();
    Error::new(error.code, format!("look for the key ({}): {}", kinds.join(", "), error.message))
}

fn objects(rows: Vec<Value>) -> Result<Vec<Map<String, Value>>> {
    let object = |row| match row {
        Value::Object(row) => Ok(row),
        other => Err(Error::internal(format!("a row is no object: {other}"))),
    };
    rows.into_iter().map(object).collect()
}

/// `top`: only this epoch's rows count, or none's.
fn judged(
    rows: Vec<Map<String, Value>>,
    markers: &Markers,
    top: Option<Option<Epoch>>,
) -> Result<Vec<Said>> {
    let mut is_decided = false;
    let mut judged = Vec::with_capacity(rows.len());
    for mut values in rows {
        let mut place = Map::new();
        for name in raw::OWN {
            let value = values.remove(name).unwrap_or(Value::Null);
            place.insert(name.trim_start_matches('_').to_owned(), value);
        }
        let epoch = place["epoch"].as_i64().and_then(Epoch::new);
        let epoch = epoch.ok_or_else(|| Error::internal("a row of raw has no epoch"))?;
        let fate = if !markers.is_applied(epoch) || markers.needs_merge(epoch) {
            Fate::Waiting
        } else if place["op"] == raw::REVERT {
            Fate::Revert
        } else if is_decided || top.is_some_and(|top| top != Some(epoch)) {
            Fate::Superseded
        } else {
            is_decided = true;
            Fate::Current
        };
        judged.push(Said { epoch, place, fate, values });
    }
    Ok(judged)
}
