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
    let mut brought = Brought::new();
    for (name, uri) in [("raw", &pipeline.raw), ("main", &pipeline.main)] {
        let Some(table) = Table::open(uri).await? else { continue };
        let mut commits = table.history(0).await?;
        commits.reverse();
        items.extend(changes(name, &commits, &mut brought));
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

/// By column and type: the epoch that brought it into raw. Main gets it with some later merge.
type Brought = BTreeMap<(String, String), Option<i64>>;

/// What each commit changed in the columns, by the epoch that wanted it, oldest first.
fn changes(table: &str, commits: &[CommitRecord], brought: &mut Brought) -> Vec<Value> {
    let mut held: Option<BTreeMap<String, String>> = None;
    let mut items = Vec::new();
    for (at, commit) in commits.iter().enumerate() {
        let Some(columns) = &commit.columns else { continue };
        let now: BTreeMap<String, String> = columns.iter().cloned().collect();
        // A commit that does not say so itself is followed by the one that needed it.
        let own = commit.info["epoch"].as_i64();
        let own = own.or_else(|| commits[at..].iter().find_map(first_epoch));
        let mut by_epoch: BTreeMap<Option<i64>, Vec<(&str, &String, &String)>> = BTreeMap::new();
        for (name, kind) in columns {
            let word = match held.as_ref().map(|before| before.get(name)) {
                None => "made with",
                Some(None) => "added",
                Some(Some(earlier)) if earlier != kind => "now",
                Some(Some(_)) => continue,
            };
            let epoch = *brought.entry((name.clone(), kind.clone())).or_insert(own);
            let epoch = if held.is_none() { own } else { epoch };
            by_epoch.entry(epoch).or_default().push((word, name, kind));
        }
        let before = held.iter().flatten();
        let gone = before.filter(|(name, _)| !now.contains_key(*name)).map(|(n, k)| ("gone", n, k));
        by_epoch.entry(own).or_default().extend(gone);
        for (epoch, some) in by_epoch.into_iter().filter(|(_, some)| !some.is_empty()) {
            items.push(json!({
                "table": table,
                "version": commit.version,
                "at": commit.at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                "epoch": epoch,
                "change": said(&some),
            }));
        }
        held = Some(now);
    }
    items
}

/// `added a long, b text; gone c long`.
fn said(changes: &[(&str, &String, &String)]) -> String {
    let words = ["made with", "added", "gone", "now"].into_iter().filter_map(|word| {
        let some = changes.iter().filter(|(of, _, _)| *of == word);
        let some: Vec<String> = some.map(|(_, name, kind)| format!("{name} {kind}")).collect();
        (!some.is_empty()).then(|| format!("{word} {}", some.join(", ")))
    });
    words.collect::<Vec<_>>().join("; ")
}

fn first_epoch(commit: &CommitRecord) -> Option<i64> {
    commit.info["epochs"].as_array()?.first()?["epoch"].as_i64()
}
