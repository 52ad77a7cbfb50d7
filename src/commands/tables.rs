//! `alluvium tables health`: the files of raw and main as readers and optimize see them.

use std::path::Path;

use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_table::schema::find_column;
use alluvium_table::upkeep::{BIN_FILES_MIN, Health, health, policy};
use alluvium_table::{LiveFile, Table};
use serde_json::{Value, json};

use crate::cli::Output;
use crate::config;
use crate::printer::{self, Exit};

const HEAD: [&str; 10] =
    ["table", "version", "files", "size", "rows", "deleted", "marked", "small", "cost", "overlap"];

/// Carries out `tables health`.
pub(crate) async fn of_files(file: Option<&Path>, pipeline: &str, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(pipeline))?.remove(0);
    let (mut items, mut rows, mut of_main) = (Vec::new(), Vec::new(), None);
    for (name, uri) in [("raw", &pipeline.raw), ("main", &pipeline.main)] {
        let Some(table) = Table::open(uri).await? else {
            printer::say(&format!("{uri} does not exist yet"));
            continue;
        };
        let files = table.files().await?;
        let schema = table.schema();
        let first = pipeline.cluster_by.first().or(pipeline.content.key.first());
        let key = first.and_then(|key| find_column(&schema, key));
        let key = key.map(|at| schema.field(at).name().as_str());
        let found = health(files.clone(), policy(&pipeline), key);
        rows.push(row(name, table.version(), &found));
        let mut item = serde_json::to_value(&found).map_err(Error::internal)?;
        item["table"] = name.into();
        item["uri"] = uri.as_str().into();
        item["version"] = table.version().into();
        if name == "main" {
            item["optimize"] = plan(&pipeline, &files, &found);
            of_main = Some(found);
        }
        items.push(item);
    }
    if output == Output::Json {
        printer::json_items("tables", &items)?;
        return Ok(Exit::Ok);
    }
    printer::table(&HEAD, rows);
    if let Some(main) = of_main {
        printer::say(&words(&pipeline, &main));
    }
    Ok(Exit::Ok)
}

fn row(name: &str, version: i64, health: &Health) -> Vec<String> {
    vec![
        name.to_owned(),
        version.to_string(),
        health.files.to_string(),
        size(health.bytes),
        health.rows.to_string(),
        health.deleted_rows.to_string(),
        health.marked_files.to_string(),
        health.small_files.to_string(),
        format!("{}%", health.read_cost),
        health.key_overlap.map_or_else(|| "-".to_owned(), |overlap| format!("{overlap:.1}")),
    ]
}

pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

fn is_due(pipeline: &Pipeline, health: &Health) -> bool {
    let many = pipeline.sizes.small_files.max(BIN_FILES_MIN) as u64;
    let is_worth_it =
        health.gaining_files >= many || health.read_cost >= pipeline.sizes.read_cost_max;
    pipeline.optimize && health.gaining_files > 0 && is_worth_it
}

/// What optimize would do now, for programs.
fn plan(pipeline: &Pipeline, files: &[LiveFile], health: &Health) -> Value {
    json!({
        "enabled": pipeline.optimize,
        "due": is_due(pipeline, health),
        "files": health.gaining_files,
        "bytes": health.gaining_bytes,
        "bins": health.gaining_bytes.div_ceil(pipeline.sizes.bin_bytes.max(1)),
        "of_files": files.len(),
        "read_cost_max": pipeline.sizes.read_cost_max,
        "small_files": pipeline.sizes.small_files,
    })
}

/// The same, for people.
fn words(pipeline: &Pipeline, health: &Health) -> String {
    let sizes = &pipeline.sizes;
    let gains = format!(
        "{} of main's files ({}) gain by being rewritten, {} of them full of deleted rows",
        health.gaining_files,
        size(health.gaining_bytes),
        health.worn_files
    );
    let limits = format!(
        "it begins with {} such files, or when a read costs {}%",
        sizes.small_files, sizes.read_cost_max
    );
    if !pipeline.optimize {
        return format!("{gains}; pipeline.{}.optimize.enabled is false", pipeline.id);
    }
    match is_due(pipeline, health) {
        true => format!("{gains}: optimize is due, and `alluvium run --once` carries it out"),
        false => format!("{gains}: optimize has nothing to do yet; {limits}"),
    }
}
