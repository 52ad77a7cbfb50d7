//! `alluvium runs | audit list | tables history | ledger rebuild`: what was, and the ledger's restoration.

use std::path::Path;

use alluvium_coordinator::book::Book;
use alluvium_coordinator::ledger::Ledger;
use alluvium_coordinator::rebuild;
use alluvium_protocol::{Epoch, Result};
use alluvium_table::Table;
use alluvium_table::history::CommitRecord;
use alluvium_worker::points::points;
use serde_json::{Value, json};

use crate::cli::Output;
use crate::printer::{self, Exit};
use crate::{client, config};

/// Every attempt, newest first.
pub(crate) async fn runs(
    file: Option<&Path>,
    pipeline: Option<&str>,
    epoch: Option<Epoch>,
    limit: usize,
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    config.select(pipeline)?;
    let filter = [
        ("pipeline", pipeline.map(str::to_owned)),
        ("epoch", epoch.map(|epoch| epoch.to_string())),
        ("limit", Some(limit.to_string())),
    ];
    let rows = match client::items(&config, "runs", &filter).await? {
        Some(rows) => rows,
        None => Ledger::open(&config.state).runs(pipeline, epoch, limit).await?,
    };
    if output == Output::Json {
        printer::json_items("runs", &rows)?;
        return Ok(Exit::Ok);
    }
    if rows.is_empty() {
        printer::say("no attempts are known; `alluvium run --once` makes some");
        return Ok(Exit::Ok);
    }
    let lines = rows
        .iter()
        .map(|row| {
            let message = match (row["code"].as_str(), row["message"].as_str()) {
                (Some(code), Some(message)) => format!("{code}: {message}"),
                (None, Some(message)) => message.to_owned(),
                (_, None) => counts(row),
            };
            vec![
                time(&row["at"]),
                text(&row["pipeline"]),
                text(&row["epoch"]),
                text(&row["step"]),
                text(&row["attempt"]),
                text(&row["verdict"]),
                format!("{} ms", text(&row["duration_ms"])),
                message,
            ]
        })
        .collect();
    let head = ["at", "pipeline", "epoch", "step", "attempt", "verdict", "took", "what"];
    printer::table(&head, lines);
    Ok(Exit::Ok)
}

fn counts(row: &Value) -> String {
    let number = |name: &str| row[name].as_i64().unwrap_or(0);
    match row["step"].as_str() {
        Some("ingest") => {
            format!("{} rows read, {} refused", number("rows_read"), number("rows_quarantined"))
        }
        Some("merge") => format!(
            "+{} ~{} -{}",
            number("rows_inserted"),
            number("rows_updated"),
            number("rows_deleted")
        ),
        _ => String::new(),
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn time(value: &Value) -> String {
    let text = text(value);
    text.split('.').next().unwrap_or(&text).trim_end_matches('Z').replace('T', " ")
}

/// Every manual act, newest first.
pub(crate) async fn audit(file: Option<&Path>, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    let rows = match client::items(&config, "audit", &[]).await? {
        Some(rows) => rows,
        None => Ledger::open(&config.state).audit().await?,
    };
    if output == Output::Json {
        printer::json_items("audit", &rows)?;
        return Ok(Exit::Ok);
    }
    let names = ["by", "verb", "pipeline", "epoch", "detail"];
    let lines = rows
        .iter()
        .map(|row| {
            let rest = names.iter().map(|name| text(&row[*name]));
            std::iter::once(time(&row["at"])).chain(rest).collect()
        })
        .collect();
    printer::table(&["at", "by", "verb", "pipeline", "epoch", "detail"], lines);
    Ok(Exit::Ok)
}

/// Versions of main, newest first.
pub(crate) async fn of_table(
    file: Option<&Path>,
    pipeline: &str,
    limit: usize,
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(pipeline))?.remove(0);
    let Some(main) = Table::open(&pipeline.main).await? else {
        printer::say(&format!("{} does not exist yet", pipeline.main));
        return Ok(Exit::Ok);
    };
    let points = points(&main);
    let oldest = main.version() - i64::try_from(limit).unwrap_or(i64::MAX) + 1;
    let items: Vec<Value> = main
        .history(oldest)
        .await?
        .iter()
        .map(|commit| {
            let names: Vec<&str> = points
                .iter()
                .filter(|point| point.version == commit.version)
                .map(|point| point.name.as_str())
                .collect();
            json!({
                "version": commit.version,
                "at": commit.at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                "operation": commit.operation,
                "by": if commit.info.is_null() { commit.engine.as_str() } else { "alluvium" },
                "step": commit.info["step"],
                "epochs": epochs_of(commit),
                "what": what_of(commit),
                "point": names.join(", "),
            })
        })
        .collect();
    printer::items(
        output,
        "versions",
        &items,
        &["version", "at", "by", "step", "epochs", "what", "point"],
    )?;
    Ok(Exit::Ok)
}

fn epochs_of(commit: &CommitRecord) -> String {
    let listed = commit.info["epochs"].as_array().or(commit.info["taken_out"].as_array());
    let epochs: Vec<String> = listed
        .into_iter()
        .flatten()
        .map(|epoch| text(if epoch.is_object() { &epoch["epoch"] } else { epoch }))
        .collect();
    match epochs.as_slice() {
        [first, .., last] if epochs.len() > 3 => format!("{first} … {last} ({})", epochs.len()),
        few => few.join(", "),
    }
}

fn what_of(commit: &CommitRecord) -> String {
    let info = &commit.info;
    let number = |name: &str| info[name].as_i64().unwrap_or(0);
    match info["step"].as_str() {
        Some("merge") => {
            let (new, gone) = (number("rows_inserted"), number("rows_deleted"));
            format!("+{new} ~{} -{gone}", number("rows_updated"))
        }
        Some("restore") => match info["version"].as_i64() {
            Some(version) => format!("back to version {version}"),
            None => "computed from raw".to_owned(),
        },
        Some("hold") if info["hold"] == true => "paused".to_owned(),
        Some("hold") => "resumed".to_owned(),
        Some("rollback-point") if info["version"].is_null() => {
            format!("{} forgotten", text(&info["name"]))
        }
        Some("rollback-point") => format!("{} = {}", text(&info["name"]), text(&info["version"])),
        _ => String::new(),
    }
}

/// Restores what the tables know and the ledger does not name.
pub(crate) async fn rebuild(file: Option<&Path>) -> Result<Exit> {
    let config = config::load(file)?;
    for pipeline in config.pipelines {
        let book = Book::open(pipeline).await?;
        if let Some(error) = book.error {
            return Err(error);
        }
        let rows = rebuild::rebuild(&book, &config.state).await?;
        printer::say(&format!("{}: {rows} epoch(s) restored", book.pipeline.id));
    }
    Ok(Exit::Ok)
}
