//! `alluvium schema history`: which columns a pipeline's tables have, since when, and through whom.

use std::collections::BTreeMap;
use std::path::Path;

use alluvium_protocol::Result;
use alluvium_table::Table;
use alluvium_table::history::CommitRecord;
use serde_json::{Value, json};

use crate::cli::Output;
use crate::config;
use crate::printer::{self, Exit};

/// Carries out `schema history`.
pub(crate) async fn history(file: Option<&Path>, pipeline: &str, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(pipeline))?.remove(0);
    let mut items = Vec::new();
    for (name, uri) in [("raw", &pipeline.raw), ("main", &pipeline.main)] {
        let Some(table) = Table::open(uri).await? else { continue };
        let mut commits = table.history(0).await?;
        commits.reverse();
        items.extend(changes(name, &commits));
    }
    if items.is_empty() && output == Output::Table {
        printer::say("there is no table yet, or its log no longer reaches back to a change");
        return Ok(Exit::Ok);
    }
    printer::items(
        output,
        "schema-history",
        &items,
        &["table", "version", "at", "epoch", "change"],
    )?;
    Ok(Exit::Ok)
}

/// What each commit changed in the columns, oldest first.
fn changes(table: &str, commits: &[CommitRecord]) -> Vec<Value> {
    let mut held: Option<BTreeMap<String, String>> = None;
    let mut items = Vec::new();
    for (at, commit) in commits.iter().enumerate() {
        let Some(columns) = &commit.columns else { continue };
        let now: BTreeMap<String, String> = columns.iter().cloned().collect();
        let mut said = Vec::new();
        match &held {
            None => said.push(format!("made with {}", list(columns.iter().map(|(n, k)| (n, k))))),
            Some(before) => {
                let added = now.iter().filter(|(name, _)| !before.contains_key(*name));
                let gone = before.iter().filter(|(name, _)| !now.contains_key(*name));
                let other = now.iter().filter(|(name, kind)| {
                    before.get(*name).is_some_and(|earlier| earlier != *kind)
                });
                for (word, some) in
                    [("added", list(added)), ("gone", list(gone)), ("now", list(other))]
                {
                    if !some.is_empty() {
                        said.push(format!("{word} {some}"));
                    }
                }
            }
        }
        held = Some(now);
        if !said.is_empty() {
            items.push(json!({
                "table": table,
                "version": commit.version,
                "at": commit.at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                // A change is a commit of its own, right before the one that needs it.
                "epoch": commits[at..].iter().find_map(first_epoch),
                "change": said.join("; "),
            }));
        }
    }
    items
}

fn first_epoch(commit: &CommitRecord) -> Option<i64> {
    commit.info["epochs"].as_array()?.first()?["epoch"].as_i64()
}

fn list<'a>(columns: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    columns.map(|(name, kind)| format!("{name} {kind}")).collect::<Vec<_>>().join(", ")
}
