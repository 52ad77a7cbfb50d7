//! `alluvium status | epochs | plan`: how things stand, changing nothing.

use std::path::Path;

use alluvium_coordinator::standing::{PipelineStanding, Standing};
use alluvium_protocol::{Epoch, Error, Result};
use alluvium_table::Table;
use chrono::Utc;
use serde_json::{Value, json};

use crate::cli::Output;
use crate::config;
use crate::printer::{self, Exit};

async fn standings(file: Option<&Path>, pipeline: Option<&str>) -> Result<Vec<Standing>> {
    let config = config::load(file)?;
    let mut standings = Vec::new();
    for pipeline in config.select(pipeline)? {
        standings.push(Standing::read(pipeline, Utc::now()).await?);
    }
    Ok(standings)
}

/// One line a pipeline; exit 3 when one is blocked or broken.
pub(crate) async fn status(
    file: Option<&Path>,
    pipeline: Option<&str>,
    output: Output,
) -> Result<Exit> {
    let standings = standings(file, pipeline).await?;
    let pipelines: Vec<PipelineStanding> = standings.iter().map(Standing::pipeline).collect();
    match output {
        Output::Json => {
            let items = pipelines.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
            printer::json_items("status", &items.map_err(Error::internal)?)?;
        }
        Output::Table => {
            let rows = pipelines.iter().map(status_row).collect();
            printer::table(&["pipeline", "health", "fresh to", "epochs", "main"], rows);
            for pipeline in &pipelines {
                tell_why(pipeline);
            }
        }
    }
    let is_red = pipelines.iter().any(|p| ["blocked", "broken"].contains(&p.health));
    Ok(if is_red { Exit::Unhealthy } else { Exit::Ok })
}

fn status_row(p: &PipelineStanding) -> Vec<String> {
    let epochs: Vec<String> = p.epochs.iter().map(|(state, n)| format!("{n} {state}")).collect();
    let main = match p.main_version {
        Some(version) => format!("version {version}, {} files", p.main_files),
        None if p.error.is_some() => "unknown".to_owned(),
        None => "not there yet".to_owned(),
    };
    vec![
        p.pipeline.clone(),
        p.health.to_owned(),
        p.fresh_to.map_or_else(|| "-".to_owned(), with_time),
        if epochs.is_empty() { "none".to_owned() } else { epochs.join(", ") },
        main,
    ]
}

fn tell_why(p: &PipelineStanding) {
    for why in &p.why {
        printer::say(&format!("{}: {why}", p.pipeline));
    }
    if p.junk > 0 {
        let names = p.junk_names.join(", ");
        printer::say(&format!("{}: {} name(s) left alone: {names}", p.pipeline, p.junk));
    }
    if p.settled_folders > 0 {
        let count = p.settled_folders;
        printer::say(&format!("{}: {count} folder(s) below `start_from` or the floor", p.pipeline));
    }
    if p.health == "blocked" {
        let text = format!("{}: see `alluvium epochs {} --state blocked`", p.pipeline, p.pipeline);
        printer::say(&text);
    }
}

/// Epochs are often times of delivery; others stay numbers.
fn with_time(epoch: Epoch) -> String {
    const YEAR_2000: i64 = 946_684_800;
    const YEAR_2100: i64 = 4_102_444_800;
    let value = epoch.value();
    if !(YEAR_2000..YEAR_2100).contains(&value) {
        return value.to_string();
    }
    match chrono::DateTime::from_timestamp(value, 0) {
        Some(at) => format!("{value} ({})", at.format("%Y-%m-%d %H:%M")),
        None => value.to_string(),
    }
}

/// Every epoch.
pub(crate) async fn epochs(
    file: Option<&Path>,
    pipeline: Option<&str>,
    state: Option<&str>,
    output: Output,
) -> Result<Exit> {
    let standings = standings(file, pipeline).await?;
    let epochs = standings.iter().flat_map(Standing::epochs);
    let epochs: Vec<_> =
        epochs.filter(|epoch| state.is_none_or(|state| epoch.state == state)).collect();
    if output == Output::Json {
        let items = epochs.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
        printer::json_items("epochs", &items.map_err(Error::internal)?)?;
        return Ok(tell_broken(&standings));
    }
    let rows = epochs
        .iter()
        .map(|epoch| {
            let code = epoch.code.as_ref().map(|code| format!("{code}: ")).unwrap_or_default();
            let note = epoch.note.clone().unwrap_or_default();
            vec![
                epoch.pipeline.clone(),
                with_time(epoch.epoch),
                epoch.state.clone(),
                epoch.generation.to_string(),
                epoch.processed_at.clone().map(short_time).unwrap_or_default(),
                format!("{code}{note}"),
            ]
        })
        .collect();
    printer::table(&["pipeline", "epoch", "state", "generation", "merged at", "note"], rows);
    Ok(tell_broken(&standings))
}

/// Pipelines whose source or tables cannot be used: a list without them is not the whole truth.
fn tell_broken(standings: &[Standing]) -> Exit {
    let broken: Vec<&Error> = standings.iter().filter_map(|s| s.book.error.as_ref()).collect();
    for error in &broken {
        printer::tell_error(error);
    }
    if broken.is_empty() { Exit::Ok } else { Exit::Unhealthy }
}

fn short_time(text: String) -> String {
    text.split('.').next().unwrap_or(&text).trim_end_matches('Z').replace('T', " ")
}

/// What a run would do now.
pub(crate) async fn plan(
    file: Option<&Path>,
    pipeline: Option<&str>,
    output: Output,
) -> Result<Exit> {
    let standings = standings(file, pipeline).await?;
    let mut items: Vec<Value> = Vec::new();
    for standing in &standings {
        let id = &standing.book.pipeline.id;
        let mut add = |action: &str, epoch: Option<String>, why: &str| {
            items.push(json!({"pipeline": id, "action": action, "epoch": epoch, "why": why}));
        };
        if let Some(error) = &standing.book.error {
            add("nothing", None, &error.to_string());
            continue;
        }
        for epoch in &standing.plan.ingests {
            add("ingest, then merge", Some(epoch.to_string()), "complete and not in raw");
        }
        for epoch in standing.plan.merge.iter().flatten() {
            add("merge", Some(epoch.to_string()), "in raw and not in main");
        }
        if standing.plan.optimize {
            add("optimize", None, "small files of main");
        }
        if standing.plan.cleanup {
            add("cleanup", None, "due");
        }
        for epoch in standing.epochs() {
            let is_due = standing.plan.ingests.contains(&epoch.epoch);
            let is_next = epoch.state == "ready" && !is_due;
            if is_next
                || ["incomplete", "empty", "blocked", "parked"].contains(&epoch.state.as_str())
            {
                let otherwise =
                    if is_next { "lower epochs go first" } else { epoch.state.as_str() };
                let why = epoch.note.clone().unwrap_or_else(|| otherwise.to_owned());
                add("wait", Some(epoch.epoch.to_string()), &why);
            }
        }
        for wait in standing.plan.waits.iter().filter(|wait| wait.epoch.is_none()) {
            add("wait", None, &wait.why);
        }
    }
    let is_broken = standings.iter().any(|standing| standing.book.error.is_some());
    let exit = if is_broken { Exit::Unhealthy } else { Exit::Ok };
    if output == Output::Json {
        printer::json_items("plan", &items)?;
        return Ok(exit);
    }
    if items.is_empty() {
        printer::say("nothing to do: every epoch is in main");
        return Ok(Exit::Ok);
    }
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let rows = items
        .iter()
        .map(|item| ["pipeline", "action", "epoch", "why"].map(|name| text(&item[name])).to_vec())
        .collect();
    printer::table(&["pipeline", "action", "epoch", "why"], rows);
    Ok(exit)
}

/// Files that a cleanup would delete now.
pub(crate) async fn cleanup_plan(
    file: Option<&Path>,
    pipeline: Option<&str>,
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    let mut items: Vec<Value> = Vec::new();
    for pipeline in config.select(pipeline)? {
        for uri in [&pipeline.raw, &pipeline.main, &pipeline.quarantine] {
            let Some(table) = Table::open(uri).await? else { continue };
            for path in alluvium_worker::cleanup::dry_run(&table, &pipeline).await? {
                items.push(json!({"pipeline": pipeline.id, "table": uri, "file": path}));
            }
        }
    }
    if output == Output::Json {
        printer::json_items("cleanup", &items)?;
        return Ok(Exit::Ok);
    }
    if items.is_empty() {
        printer::say("a cleanup would delete nothing now");
        return Ok(Exit::Ok);
    }
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let rows = items
        .iter()
        .map(|item| ["pipeline", "table", "file"].map(|name| text(&item[name])).to_vec())
        .collect();
    printer::table(&["pipeline", "table", "file"], rows);
    Ok(Exit::Ok)
}
