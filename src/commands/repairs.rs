//! Corrected rows, as people give them to `quarantine replay --rows`.

use std::collections::BTreeSet;
use std::path::Path;

use alluvium_coordinator::manifests::Manifests;
use alluvium_protocol::manifest::Repairs;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::session::query_session;
use alluvium_table::{Table, query};
use alluvium_worker::raw::OWN;
use serde_json::Value;

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
    let columns = known_columns(pipeline, epoch).await?;
    let mut repairs = Repairs::new();
    for (at, item) in items.iter().enumerate() {
        if is_unchanged(item) {
            continue;
        }
        let (file, row) = (item["file"].as_str(), item["row"].as_i64());
        let (Some(file), Some(row)) = (file, row) else {
            return Err(refused(format!("item {} has no `file` and `row`", at + 1)));
        };
        let content =
            item.get("content").filter(|content| content.is_object() || content.is_null());
        let Some(content) = content else {
            return Err(refused(format!("row {row} of {file}: `content` is no object")));
        };
        if item.get("epoch").and_then(Value::as_i64).is_some_and(|other| other != epoch.value()) {
            return Err(refused(format!("row {row} of {file} is of another epoch")));
        }
        if !known.contains(&(file.to_owned(), row)) {
            return Err(refused(format!("epoch {epoch} has no row {row} of {file}")));
        }
        let names = content.as_object().into_iter().flat_map(|content| content.keys());
        let is_unknown = |name: &&String| !columns.contains(&name.to_lowercase());
        // What `select` reads is only known with the file.
        if pipeline.content.select.is_none()
            && let Some(name) = names.into_iter().find(is_unknown)
        {
            return Err(refused(format!("row {row} of {file}: there is no column {name:?}")));
        }
        repairs.entry(file.to_owned()).or_default().insert(row, content.clone());
    }
    match repairs.is_empty() {
        true => Err(refused("it holds no row".to_owned())),
        false => Ok(repairs),
    }
}

/// What `show` prints of something that is no row: nobody corrected it.
fn is_unchanged(item: &Value) -> bool {
    let content = item["content"].as_object();
    let is_only = |name: &str| content.is_some_and(|c| c.len() == 1 && c.contains_key(name));
    match item["reason"].as_str() {
        Some("malformed") => is_only("line"),
        Some("corrupt_file") => is_only("error"),
        _ => false,
    }
}

fn items_of(text: &str) -> std::result::Result<Vec<Value>, serde_json::Error> {
    let values: Vec<Value> = serde_json::Deserializer::from_str(text)
        .into_iter()
        .collect::<std::result::Result<_, _>>()?;
    Ok(values
        .into_iter()
        .flat_map(|value| match value {
            Value::Array(items) => items,
            Value::Object(mut whole) if whole.get("items").is_some_and(Value::is_array) => {
                match whole.remove("items") {
                    Some(Value::Array(items)) => items,
                    _ => Vec::new(),
                }
            }
            one => vec![one],
        })
        .collect())
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
        raw.register(&session, "t", None, false).await?;
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
