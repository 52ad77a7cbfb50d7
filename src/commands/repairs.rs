//! Corrected rows, as people give them to `quarantine replay --rows`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use alluvium_coordinator::manifests::Manifests;
use alluvium_protocol::manifest::Repairs;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::session::query_session;
use alluvium_table::{Table, query};
use alluvium_worker::raw::OWN;
use serde_json::Value;
use serde_json::value::RawValue;

use super::quarantine::rows;

/// Memory for reading places of rows.
const READ_BYTES: usize = 256 << 20;

/// Reads the file: an array or lines of objects with `file`, `row` and `content`. Each must be a row
/// that is in quarantine, or was corrected before.
pub(crate) async fn read(pipeline: &Pipeline, epoch: Epoch, path: &Path) -> Result<Repairs> {
    let refused = |why: String| {
        let help =
            format!("`alluvium quarantine show {} {epoch} -o json` prints them", pipeline.id);
        Error::new(Code::RepairUnknown, format!("{}: {why}", path.display())).with_help(help)
    };
    let text = std::fs::read_to_string(path).map_err(|e| refused(e.to_string()))?;
    let items = items_of(&text).map_err(|e| refused(format!("not JSON: {e}")))?;
    let known = known_places(pipeline, epoch).await?;
    if known.is_empty() {
        let text = format!("nothing of epoch {epoch} was read so far: it has no row to correct");
        let help = format!("`alluvium epochs {}` says why it waits", pipeline.id);
        return Err(Error::new(Code::RepairUnknown, text).with_help(help));
    }
    let columns = known_columns(pipeline, epoch).await?;
    let mut repairs = Repairs::new();
    for (at, item) in items.iter().enumerate() {
        let content = item.get("content").map(|content| content.get()).unwrap_or_default();
        let object: Option<Object> = match content {
            "null" => None,
            text => serde_json::from_str(text).ok(),
        };
        if is_unchanged(item, object.as_ref()) {
            continue;
        }
        let (file, row) = (field(item, "file"), field(item, "row"));
        let (Some(file), Some(row)) = (file.as_str(), row.as_i64()) else {
            return Err(refused(format!("item {} has no `file` and `row`", at + 1)));
        };
        if object.is_none() && content != "null" {
            return Err(refused(format!("row {row} of {file}: `content` is no object")));
        }
        if field(item, "epoch").as_i64().is_some_and(|other| other != epoch.value()) {
            return Err(refused(format!("row {row} of {file} is of another epoch")));
        }
        if !known.contains(&(file.to_owned(), row)) {
            return Err(refused(format!("epoch {epoch} has no row {row} of {file}")));
        }
        let is_unknown = |name: &&String| !columns.contains(&name.to_lowercase());
        // What `select` reads is only known with the file.
        if pipeline.content.select.is_none()
            && let Some(name) = object.iter().flat_map(|object| object.keys()).find(is_unknown)
        {
            return Err(refused(format!("row {row} of {file}: there is no column {name:?}")));
        }
        // As text: a number keeps every digit that somebody wrote.
        let content = object.map(|_| content.to_owned());
        repairs.entry(file.to_owned()).or_default().insert(row, content);
    }
    match repairs.is_empty() {
        true => Err(refused("it holds no row".to_owned())),
        false => Ok(repairs),
    }
}

/// An object whose values are text still.
type Object = BTreeMap<String, Box<RawValue>>;

fn field(item: &Object, name: &str) -> Value {
    item.get(name).and_then(|raw| serde_json::from_str(raw.get()).ok()).unwrap_or_default()
}

/// What `show` prints of something that is no row: nobody corrected it.
fn is_unchanged(item: &Object, content: Option<&Object>) -> bool {
    let is_only = |name: &str| content.is_some_and(|c| c.len() == 1 && c.contains_key(name));
    match field(item, "reason").as_str() {
        Some("malformed") => is_only("line"),
        Some("corrupt_file") => is_only("error"),
        _ => false,
    }
}

/// An array, lines of objects, or the whole that `show` prints.
fn items_of(text: &str) -> std::result::Result<Vec<Object>, serde_json::Error> {
    let mut items = Vec::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<Box<RawValue>>() {
        let value = value?;
        let list = match value.get().starts_with('[') {
            true => Some(value.get().to_owned()),
            false => {
                let whole: Object = serde_json::from_str(value.get()).unwrap_or_default();
                let list = whole.get("items").map(|items| items.get().to_owned());
                if list.is_none() {
                    items.push(whole);
                }
                list
            }
        };
        if let Some(list) = list {
            let list: Vec<Box<RawValue>> = serde_json::from_str(&list)?;
            let item = |item: Box<RawValue>| serde_json::from_str(item.get()).unwrap_or_default();
            items.extend(list.into_iter().map(item));
        }
    }
    Ok(items)
}

/// Columns that a row of the epoch may have, in lower case: raw's, declared ones, those that refused
/// rows came with.
async fn known_columns(pipeline: &Pipeline, epoch: Epoch) -> Result<BTreeSet<String>> {
    let mut names: Vec<String> =
        pipeline.content.declared.iter().map(|column| column.name.clone()).collect();
    if let Some(raw) = Table::open(&pipeline.raw).await? {
        names.extend(raw.schema().fields().iter().map(|field| field.name().clone()));
    }
    let came = format!("SELECT row FROM t WHERE _epoch = {epoch} AND reason <> 'malformed'");
    for row in rows(pipeline, &came).await? {
        let content = row["row"].as_str().map(serde_json::from_str::<Value>);
        if let Some(Ok(Value::Object(content))) = content {
            names.extend(content.into_iter().map(|(name, _)| name));
        }
    }
    names.retain(|name| !OWN.contains(&name.as_str()));
    Ok(names.iter().map(|name| name.to_lowercase()).collect())
}

/// Rows of the epoch: refused ones, those in raw, and those that were corrected before.
async fn known_places(pipeline: &Pipeline, epoch: Epoch) -> Result<BTreeSet<(String, i64)>> {
    let sql = format!("SELECT _file AS file, _row AS row FROM t WHERE _epoch = {epoch}");
    let mut found = rows(pipeline, &sql).await?;
    if let Some(raw) = Table::open(&pipeline.raw).await? {
        let session = query_session(READ_BYTES);
        raw.register(&session, "t", None).await?;
        found.extend(query::rows(&session, &format!("{sql} AND _op <> 'revert'")).await?);
    }
    let mut known: BTreeSet<(String, i64)> = found
        .iter()
        .filter_map(|row| Some((row["file"].as_str()?.to_owned(), row["row"].as_i64()?)))
        .collect();
    let manifests = Manifests::open(pipeline)?;
    if let Some(generation) = manifests.newest().await?.get(&epoch)
        && let Some(pinned) = manifests.load(epoch, *generation).await?
    {
        for (file, rows) in pinned.manifest.repairs {
            known.extend(rows.into_keys().map(|row| (file.clone(), row)));
        }
    }
    Ok(known)
}
