//! `alluvium quarantine`: refused rows, why, and what can be done about them.

use std::collections::BTreeMap;
use std::path::Path;

use alluvium_coordinator::ledger::{Ledger, LedgerTable};
use alluvium_coordinator::requests::Verb;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::session::query_session;
use alluvium_table::{Table, query};
use alluvium_worker::quarantine;
use chrono::Utc;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};

use crate::cli::{OfEpoch, Output, QuarantineVerb};
use crate::commands::{act, repairs};
use crate::config::{self, Config};
use crate::printer::{self, Exit};

/// Memory for reading the quarantine.
const READ_BYTES: usize = 256 << 20;

/// Carries out `quarantine`.
pub(crate) async fn quarantine(file: Option<&Path>, verb: &QuarantineVerb) -> Result<Exit> {
    match verb {
        QuarantineVerb::List { pipeline, output } => {
            let config = config::load(file)?;
            list(&config, pipeline.as_deref(), output.output).await
        }
        QuarantineVerb::Show { pipeline, epoch, reason, limit, output } => {
            let config = config::load(file)?;
            let pipeline = config.select(Some(pipeline))?.remove(0);
            show(&pipeline, *epoch, reason.as_deref(), *limit, output.output).await
        }
        QuarantineVerb::Replay { of, rows: None } => act::on_epoch(file, Verb::Replay, of).await,
        QuarantineVerb::Replay { of, rows: Some(path) } => {
            let config = config::load(file)?;
            let pipeline = config.select(Some(&of.pipeline))?.remove(0);
            let repairs = repairs::read(&pipeline, of.epoch, path).await?;
            act::with_content(&config, pipeline, Verb::Replay, of, repairs).await
        }
        QuarantineVerb::Drop(of) => {
            let config = config::load(file)?;
            drop_rows(&config, of).await
        }
    }
}

/// Rows of a pipeline's quarantine, by SQL over `t`.
pub(super) async fn rows(pipeline: &Pipeline, sql: &str) -> Result<Vec<Value>> {
    let Some(table) = Table::open(&pipeline.quarantine).await? else { return Ok(Vec::new()) };
    let session = query_session(READ_BYTES);
    table.register(&session, "t", None).await?;
    query::rows(&session, sql).await
}

async fn list(config: &Config, name: Option<&str>, output: Output) -> Result<Exit> {
    let mut items = Vec::new();
    for pipeline in config.select(name)? {
        let sql = "SELECT _epoch AS epoch, reason, count(*) AS rows, \
                   count(DISTINCT _file) AS files, min(_quarantined_at) AS since, \
                   first_value(_file ORDER BY _file, _row) AS file, \
                   first_value(_row ORDER BY _file, _row) AS row \
                   FROM t GROUP BY 1, 2 ORDER BY 1, 2";
        for mut row in rows(&pipeline, sql).await? {
            let first =
                format!("row {} of {}", row["row"], row["file"].as_str().unwrap_or_default());
            row["pipeline"] = json!(pipeline.id);
            row["first"] = json!(first);
            if let Some(row) = row.as_object_mut() {
                row.remove("file");
                row.remove("row");
            }
            items.push(row);
        }
    }
    if output == Output::Table && items.is_empty() {
        printer::say("no row is in quarantine");
        return Ok(Exit::Ok);
    }
    let fields = ["pipeline", "epoch", "reason", "rows", "files", "first", "since"];
    printer::items(output, "quarantine", &items, &fields)?;
    if output == Output::Table {
        let first = &items[0];
        let of = format!("{} {}", first["pipeline"].as_str().unwrap_or_default(), first["epoch"]);
        printer::say(&format!(
            "look at them: alluvium quarantine show {of}\n\
             correct them: alluvium quarantine show {of} -o json > rows.json; then, with `content` corrected,\n\
             \x20             alluvium quarantine replay {of} --rows rows.json\n\
             what a reason means: alluvium quarantine --help"
        ));
    }
    Ok(Exit::Ok)
}

async fn show(
    pipeline: &Pipeline,
    epoch: Option<Epoch>,
    reason: Option<&str>,
    limit: Option<usize>,
    output: Output,
) -> Result<Exit> {
    let limit = limit.unwrap_or(if output == Output::Json { usize::MAX >> 1 } else { 20 });
    let mut conditions = vec!["TRUE".to_owned()];
    conditions.extend(epoch.map(|epoch| format!("_epoch = {epoch}")));
    conditions.extend(reason.map(|text| format!("reason = '{}'", text.replace('\'', "''"))));
    let sql = format!(
        "SELECT _epoch AS epoch, _file AS file, _row AS row, reason, row AS content, \
         _generation AS generation FROM t WHERE {} ORDER BY _epoch, _file, _row LIMIT {limit}",
        conditions.join(" AND ")
    );
    let items = rows(pipeline, &sql).await?;
    if output == Output::Json {
        let items: Vec<_> = items.iter().map(as_it_came).collect::<Result<_>>()?;
        return printer::json_items("quarantine-rows", &items).map(|()| Exit::Ok);
    }
    if items.is_empty() && limit > 0 {
        printer::say("no such row is in quarantine");
        return Ok(Exit::Ok);
    }
    let fields = ["epoch", "file", "row", "reason", "content"];
    printer::items(output, "quarantine-rows", &items, &fields)?;
    if items.len() == limit {
        printer::say(&format!("the first {limit}; `--limit` shows more"));
    }
    let of = match epoch {
        Some(epoch) => format!("{} {epoch}", pipeline.id),
        None => format!("{} EPOCH", pipeline.id),
    };
    printer::say(&format!(
        "correct them: alluvium quarantine show {of} -o json > rows.json; then, with `content` corrected,\n\
         \x20             alluvium quarantine replay {of} --rows rows.json"
    ));
    Ok(Exit::Ok)
}

/// A row for `-o json`: its content word for word, so that no number loses a digit on its way back.
fn as_it_came(item: &Value) -> Result<BTreeMap<String, Box<RawValue>>> {
    let raw = |(name, value): (&str, &Value)| {
        let content = match (name, value) {
            ("content", Value::String(text)) => RawValue::from_string(text.clone()).ok(),
            _ => None,
        };
        let value = match content {
            Some(content) => content,
            None => to_raw_value(value).map_err(Error::internal)?,
        };
        Ok((name.to_owned(), value))
    };
    item.as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| raw((name.as_str(), value)))
        .collect()
}

async fn drop_rows(config: &Config, of: &OfEpoch) -> Result<Exit> {
    let pipeline = config.select(Some(&of.pipeline))?.remove(0);
    let held = rows(&pipeline, &format!("SELECT 1 FROM t WHERE _epoch = {}", of.epoch)).await?;
    if held.is_empty() {
        let text = format!("no row of epoch {} is in quarantine", of.epoch);
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help(format!("`alluvium quarantine list {}`", pipeline.id)));
    }
    let question = format!("forget {} refused row(s) of epoch {}?", held.len(), of.epoch);
    if !printer::confirm(&question, of.yes)? {
        printer::say("nothing was changed");
        return Ok(Exit::Ok);
    }
    let dropped = quarantine::forget(&pipeline, of.epoch).await?;
    let by = std::env::var("USER").unwrap_or_else(|_| "unknown".to_owned());
    let row = json!({
        "at": Utc::now().to_rfc3339(), "by": by, "verb": "quarantine drop", "pipeline": pipeline.id,
        "epoch": of.epoch, "detail": format!("{dropped} row(s)"),
    });
    Ledger::open(&config.state).append(LedgerTable::AuditLog, vec![row]).await?;
    printer::say(&format!(
        "{dropped} refused row(s) are forgotten; earlier versions of the table have them"
    ));
    Ok(Exit::Ok)
}
