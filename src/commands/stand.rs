//! `alluvium status | epochs | plan | workers`: how things stand, changing nothing.

use std::path::Path;

use alluvium_coordinator::standing::{EpochStanding, PipelineStanding, Standing};
use alluvium_protocol::heartbeat::Heartbeat;
use alluvium_protocol::{Code, Epoch, Error, Result};
use alluvium_table::Table;
use chrono::Utc;
use serde_json::{Value, json};

use crate::cli::Output;
use crate::client;
use crate::config::{self, Config};
use crate::printer::{self, Exit};

/// Pause between two pictures of `status --watch`.
const WATCH_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

async fn standings(config: &Config, pipeline: Option<&str>) -> Result<Vec<Standing>> {
    let mut standings = Vec::new();
    for pipeline in config.select(pipeline)? {
        standings.push(Standing::read(pipeline, Utc::now()).await?);
    }
    Ok(standings)
}

fn of(pipeline: Option<&str>) -> [(&'static str, Option<String>); 1] {
    [("pipeline", pipeline.map(str::to_owned))]
}

async fn pipelines(config: &Config, pipeline: Option<&str>) -> Result<Vec<PipelineStanding>> {
    config.select(pipeline)?;
    match client::typed(config, "status", &of(pipeline)).await? {
        Some(found) => Ok(found),
        None => {
            let standings = standings(config, pipeline).await?;
            Ok(standings.iter().map(Standing::pipeline).collect())
        }
    }
}

/// One line a pipeline; exit 3 when one is blocked or broken.
pub(crate) async fn status(
    file: Option<&Path>,
    pipeline: Option<&str>,
    watch: bool,
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    loop {
        let pipelines = pipelines(&config, pipeline).await?;
        let shown_at = watch.then(Utc::now);
        match output {
            Output::Json => {
                let items =
                    pipelines.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
                printer::json_items("status", &items.map_err(Error::internal)?)?;
            }
            Output::Table => {
                if let Some(at) = shown_at {
                    printer::begin_screen(&format!("{}; Ctrl-C ends", at.format("%H:%M:%S UTC")));
                }
                show(&config, &pipelines).await?;
            }
        }
        let is_red = pipelines.iter().any(|p| ["blocked", "broken"].contains(&p.health.as_str()));
        if !watch {
            return Ok(if is_red { Exit::Unhealthy } else { Exit::Ok });
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
        }
    }
}

async fn show(config: &Config, pipelines: &[PipelineStanding]) -> Result<()> {
    let rows = pipelines.iter().map(status_row).collect();
    printer::table(&["pipeline", "health", "fresh to", "epochs", "main"], rows);
    for pipeline in pipelines {
        tell_why(pipeline);
    }
    if config.cluster.is_none() {
        return Ok(());
    }
    let Ok(Some(workers)) = client::typed::<Heartbeat>(config, "workers", &[]).await else {
        return Ok(());
    };
    let working: Vec<&Heartbeat> = workers.iter().filter(|w| w.role == "worker").collect();
    if working.is_empty() {
        printer::warn("no worker is alive: `alluvium worker` starts one");
        return Ok(());
    }
    printer::table(&WORKER_HEAD, working.into_iter().map(worker_row).collect());
    Ok(())
}

const WORKER_HEAD: [&str; 7] = ["name", "role", "version", "in hand", "cpu", "memory", "disk free"];

fn worker_row(worker: &Heartbeat) -> Vec<String> {
    let now = Utc::now();
    let tasks: Vec<String> = worker
        .tasks
        .iter()
        .map(|task| {
            let first = task.epochs.first().map(|e| format!(" {e}")).unwrap_or_default();
            let more = match task.epochs.len() {
                0 | 1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            let since = (now - task.since).num_seconds().max(0);
            let what = format!("{} {}{first}{more} ({since} s)", task.step.as_str(), task.pipeline);
            match task.progress.doing.as_str() {
                "" => what,
                _ => format!("{what}\n  {}", task.progress),
            }
        })
        .collect();
    let in_hand = match (&worker.resting, tasks.is_empty()) {
        (Some(why), true) => format!("rests: {why}"),
        (None, true) if worker.slots == 0 => String::new(),
        (None, true) => format!("idle, {} slot(s)", worker.slots),
        (_, false) => tasks.join("\n"),
    };
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    vec![
        worker.name.clone(),
        worker.role.clone(),
        worker.version.clone(),
        in_hand,
        format!("{:.0} %", worker.cpu * 100.0),
        mib(worker.memory_bytes),
        mib(worker.disk_free_bytes),
    ]
}

/// Living workers and coordinators.
pub(crate) async fn workers(file: Option<&Path>, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    let Some(cluster) = &config.cluster else {
        let text =
            format!("{} has no [cluster]: `alluvium run` is its own worker", config.file.display());
        return Err(Error::new(Code::NotPossibleNow, text));
    };
    let Some(found) = client::typed::<Heartbeat>(&config, "workers", &[]).await? else {
        return Err(Error::new(
            Code::CoordinatorUnreachable,
            format!("nobody answers at {}", cluster.api),
        ));
    };
    if output == Output::Json {
        let items = found.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
        printer::json_items("workers", &items.map_err(Error::internal)?)?;
        return Ok(Exit::Ok);
    }
    if found.is_empty() {
        printer::say("nobody is alive: `alluvium worker` starts a worker");
    }
    printer::table(&WORKER_HEAD, found.iter().map(worker_row).collect());
    Ok(Exit::Ok)
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
    let config = config::load(file)?;
    let mut broken = Vec::new();
    let mut epochs: Vec<EpochStanding> =
        match client::typed(&config, "epochs", &of(pipeline)).await? {
            Some(found) => {
                let pipelines = pipelines(&config, pipeline).await?;
                broken.extend(pipelines.into_iter().filter_map(|p| p.error));
                found
            }
            None => {
                let standings = standings(&config, pipeline).await?;
                broken.extend(standings.iter().filter_map(|s| s.book.error.clone()));
                standings.iter().flat_map(Standing::epochs).collect()
            }
        };
    epochs.retain(|epoch| state.is_none_or(|state| epoch.state == state));
    if output == Output::Json {
        let items = epochs.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
        printer::json_items("epochs", &items.map_err(Error::internal)?)?;
        return Ok(tell_broken(&broken));
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
    Ok(tell_broken(&broken))
}

/// Pipelines whose source or tables cannot be used: a list without them is not the whole truth.
fn tell_broken(broken: &[Error]) -> Exit {
    for error in broken {
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
    let config = config::load(file)?;
    config.select(pipeline)?;
    let items: Vec<Value> = match client::items(&config, "plan", &of(pipeline)).await? {
        Some(items) => items,
        None => {
            let standings = standings(&config, pipeline).await?;
            standings.iter().flat_map(Standing::plan_items).collect()
        }
    };
    let is_broken = items.iter().any(|item| item["action"] == "nothing");
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
