//! `alluvium rollback` and `rollback-point`: main back to an earlier point, and points that are kept.

use std::path::Path;

use alluvium_coordinator::ledger::{Ledger, LedgerTable};
use alluvium_coordinator::requests::Verb;
use alluvium_protocol::task::RestoreTo;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::Table;
use alluvium_worker::points::{self, points};
use alluvium_worker::restore::RestorePlan;
use chrono::Utc;
use serde_json::json;

use crate::cli::{Output, PointVerb, Rollback};
use crate::commands::act::{Act, carry_out};
use crate::config::{self, Config};
use crate::printer::{self, Exit};

/// Epochs that are named in a list.
const SHOWN: usize = 8;

/// Carries out `rollback`.
pub(crate) async fn rollback(file: Option<&Path>, asked: &Rollback) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(&asked.pipeline))?.remove(0);
    let to = match (asked.to_epoch, asked.to_version) {
        (Some(epoch), _) => RestoreTo::Epoch(epoch),
        (None, Some(version)) => RestoreTo::Version(version),
        (None, None) => return Err(Error::internal("clap asks for a point")),
    };
    let main = existing(&pipeline, &pipeline.main).await?;
    let raw = existing(&pipeline, &pipeline.raw).await?;
    let plan = RestorePlan::make(&main, &raw, &pipeline, to).await?;
    if asked.output.output == Output::Json {
        printer::json_items(
            "rollback",
            &[json!({
                "pipeline": pipeline.id, "version": plan.version, "takes_out": plan.out,
                "brings_back": plan.back, "files_added": plan.adds.len(),
                "files_removed": plan.removes.len(),
            })],
        )?;
    } else {
        show(&pipeline, &main, &plan);
    }
    if asked.dry_run {
        printer::say("nothing was changed (--dry-run)");
        return Ok(Exit::Ok);
    }
    let question = format!("take {} back, and pause it?", pipeline.id);
    if !printer::confirm(&question, asked.yes)? {
        printer::say("nothing was changed");
        return Ok(Exit::Ok);
    }
    let state = format!("at version {} of main", main.version());
    let act = Act { to: Some(to), ..Act::of(Verb::Rollback) };
    carry_out(&config, pipeline, act, &state).await
}

async fn existing(pipeline: &Pipeline, uri: &str) -> Result<Table> {
    let table = Table::open(uri).await?.ok_or_else(|| {
        let text = format!("{uri} does not exist yet: there is nothing to roll back");
        Error::new(Code::NotPossibleNow, text)
    })?;
    table.check_settings(pipeline)?;
    Ok(table)
}

fn show(pipeline: &Pipeline, main: &Table, plan: &RestorePlan) {
    let how = match plan.version {
        Some(version) => format!(
            "the files of version {version} come back: +{} files, -{} files",
            plan.adds.len(),
            plan.removes.len()
        ),
        None => "no version holds just that: the rows are computed from raw".to_owned(),
    };
    printer::say(&format!("{} is at version {}; {how}", pipeline.main, main.version()));
    if !plan.out.is_empty() {
        printer::say(&format!(
            "out of main: {} epoch(s): {}; they merge again after `alluvium resume {}`",
            plan.out.len(),
            list(&plan.out),
            pipeline.id
        ));
    }
    if !plan.back.is_empty() {
        let back = list(&plan.back);
        printer::say(&format!("back in main: {} epoch(s): {back}", plan.back.len()));
    }
}

fn list(epochs: &[Epoch]) -> String {
    let names: Vec<String> = epochs.iter().take(SHOWN).map(Epoch::to_string).collect();
    let more = if epochs.len() > SHOWN { " …" } else { "" };
    format!("{}{more}", names.join(", "))
}

/// Carries out `rollback-point`.
pub(crate) async fn point(file: Option<&Path>, verb: &PointVerb) -> Result<Exit> {
    let config = config::load(file)?;
    let of = |name: &str| config.select(Some(name)).map(|mut found| found.remove(0));
    match verb {
        PointVerb::Add { pipeline, name, version } => {
            let pipeline = of(pipeline)?;
            let mut main = existing(&pipeline, &pipeline.main).await?;
            let point = points::add(&mut main, &pipeline, name, *version).await?;
            let detail = format!("{name} = version {}", point.version);
            record(&config, "rollback-point add", &pipeline, &detail).await?;
            printer::say(&format!(
                "{name} is version {0} of {1}; cleanup keeps its files. Back to it: \
                 alluvium rollback {1} --to-version {0}",
                point.version, pipeline.id
            ));
        }
        PointVerb::Remove { pipeline, name } => {
            let pipeline = of(pipeline)?;
            let mut main = existing(&pipeline, &pipeline.main).await?;
            points::remove(&mut main, &pipeline, name).await?;
            record(&config, "rollback-point remove", &pipeline, name).await?;
            printer::say(&format!("{name} is forgotten; cleanup may take its files"));
        }
        PointVerb::List { pipeline, output } => {
            let pipeline = of(pipeline)?;
            let main = existing(&pipeline, &pipeline.main).await?;
            return list_points(&main, output.output).await;
        }
    }
    Ok(Exit::Ok)
}

async fn record(config: &Config, verb: &str, pipeline: &Pipeline, detail: &str) -> Result<()> {
    let by = std::env::var("USER").unwrap_or_else(|_| "unknown".to_owned());
    let row = json!({
        "at": Utc::now().to_rfc3339(), "by": by, "verb": verb, "pipeline": pipeline.id,
        "detail": detail,
    });
    Ledger::open(&config.state).append(LedgerTable::AuditLog, vec![row]).await
}

async fn list_points(main: &Table, output: Output) -> Result<Exit> {
    let mut items = Vec::new();
    for point in points(main) {
        let at = u64::try_from(point.version).ok();
        let files = match Table::open_at(main.uri(), at).await {
            Ok(Some(then)) => {
                let adds = then.adds().await?;
                let count = adds.len();
                match main.missing_of(&adds.values().collect::<Vec<_>>()).await?.len() {
                    0 => format!("all {count} there"),
                    missing => format!("{missing} MISSING for {count} files"),
                }
            }
            Ok(None) | Err(_) => "its log is MISSING".to_owned(),
        };
        items.push(json!({"name": point.name, "version": point.version, "files": files}));
    }
    let is_whole = items.iter().all(|item| !item["files"].to_string().contains("MISSING"));
    printer::items(output, "rollback-points", &items, &["name", "version", "files"])?;
    Ok(if is_whole { Exit::Ok } else { Exit::Unhealthy })
}
