//! `alluvium lineage`: why a key has the value that it has.

use std::path::Path;

use alluvium_protocol::Result;
use alluvium_worker::lineage::{self, Fate, Lineage, Said};
use alluvium_worker::raw::UPSERT;
use serde_json::{Map, Value, json};

use crate::cli::Output;
use crate::config;
use crate::printer::{self, Exit};

/// Carries out `lineage`.
pub(crate) async fn lineage(
    file: Option<&Path>,
    pipeline: &str,
    key: &[String],
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(pipeline))?.remove(0);
    let found = lineage::lineage(&pipeline, key).await?;
    match output {
        Output::Json => printer::json_items("lineage", &items(&found))?,
        Output::Table => {
            let named = pipeline.content.key.iter().zip(key);
            let named: Vec<String> =
                named.map(|(name, value)| format!("{name} = {value}")).collect();
            printer::data(&format!("{}: {}", named.join(", "), summary(&found)));
            if let Some(row) = &found.main {
                printer::data(&format!("  {}", shown(row)));
            }
            if !found.rows.is_empty() {
                printer::data("");
                show(&found);
            }
        }
    }
    if found.agrees() {
        return Ok(Exit::Ok);
    }
    printer::warn(
        "main holds something else than its epochs say: was it written by another tool? \
         `alluvium doctor` looks for that; docs/runbook.md, \"Rebuild main from raw\"",
    );
    Ok(Exit::Unhealthy)
}

fn summary(found: &Lineage) -> String {
    let place = |row: &Said| {
        format!(
            "epoch {} (generation {}), row {} of {}",
            row.epoch,
            row.place["generation"],
            row.place["row"],
            text(&row.place["file"])
        )
    };
    match (found.current(), &found.base) {
        (Some(row), _) if row.place["op"] == UPSERT => format!("in main, from {}", place(row)),
        (Some(row), _) => format!("not in main: deleted by {}", place(row)),
        (None, Some(_)) => "in main, from the table that was adopted".to_owned(),
        (None, None) if found.rows.iter().any(|row| row.fate == Fate::Waiting) => {
            "not in main yet: its epochs wait".to_owned()
        }
        (None, None) if found.rows.iter().any(|row| row.fate == Fate::Superseded) => {
            "not in main: the newest snapshot does not have it".to_owned()
        }
        (None, None) if !found.rows.is_empty() => {
            "not in main: what said it was taken back".to_owned()
        }
        (None, None) => "no epoch ever named it".to_owned(),
    }
}

fn items(found: &Lineage) -> Vec<Value> {
    let item = |row: &Said| {
        let mut item = row.place.clone();
        item.insert("fate".to_owned(), json!(row.fate.as_str()));
        item.insert("values".to_owned(), json!(row.values));
        Value::Object(item)
    };
    found.rows.iter().map(item).collect()
}

fn show(found: &Lineage) {
    let lines = found
        .rows
        .iter()
        .enumerate()
        .map(|(at, row)| {
            // What was taken back was not there.
            let was_said = found.rows[at + 1..].iter().any(|row| row.fate != Fate::Revert);
            let before = found.rows.get(at + 1).filter(|_| was_said);
            vec![
                row.epoch.to_string(),
                row.fate.as_str().to_owned(),
                text(&row.place["op"]),
                row.place["generation"].to_string(),
                format!("{}:{}", text(&row.place["file"]), row.place["row"]),
                text(&row.place["ingested_at"]).chars().take(19).collect(),
                if row.place["op"] == UPSERT { changes(row, before) } else { String::new() },
            ]
        })
        .collect();
    let head = ["epoch", "fate", "op", "generation", "file:row", "read at", "it changed"];
    printer::table(&head, lines);
}

/// The columns that differ from the row before.
fn changes(row: &Said, before: Option<&Said>) -> String {
    let before = match before {
        None => return "first seen".to_owned(),
        Some(before) if before.place["op"] != UPSERT => return "back again".to_owned(),
        Some(before) => &before.values,
    };
    let changed: Map<String, Value> = row
        .values
        .iter()
        .filter(|(name, value)| before.get(*name) != Some(value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if changed.is_empty() { "nothing".to_owned() } else { shown(&changed) }
}

fn shown(row: &Map<String, Value>) -> String {
    row.iter().map(|(name, value)| format!("{name}={}", text(value))).collect::<Vec<_>>().join("  ")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
