//! Rollback points: versions of main that a person named, so that cleanup keeps their files.
//!
//! They are table properties, so that losing the state folder loses none.

use alluvium_protocol::{Code, Error, Pipeline, Result, crash};
use alluvium_table::Table;
use alluvium_table::commit::{Change, CommitOutcome, Operation};
use alluvium_table::pause::Pauses;

use crate::ingest::COMMIT_PATIENCE;
use crate::merge::BASE_VERSION;
use crate::restore::files_to_bring_back;

/// The property of a point is this and its name; its value is the version.
const PREFIX: &str = "alluvium.rollback_point.";

/// A rollback point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its name.
    pub name: String,
    /// The version of main that it keeps.
    pub version: i64,
}

/// The points of a main table, by version.
pub fn points(main: &Table) -> Vec<Point> {
    let mut points: Vec<Point> = main
        .properties()
        .iter()
        .filter_map(|(key, value)| {
            let name = key.strip_prefix(PREFIX)?.to_owned();
            Some(Point { name, version: value.parse().ok()? })
        })
        .collect();
    points.sort_by(|a, b| (a.version, &a.name).cmp(&(b.version, &b.name)));
    points
}

/// Versions whose files and log entries must stay: an adopted base, and all rollback points.
pub fn kept_versions(main: &Table) -> Vec<u64> {
    let base = main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
    let named = points(main).into_iter().filter_map(|point| u64::try_from(point.version).ok());
    base.into_iter().chain(named).collect()
}

/// Names a version (the newest, if none is given) and sees to it that it can be read for good.
pub async fn add(
    main: &mut Table,
    pipeline: &Pipeline,
    name: &str,
    version: Option<i64>,
) -> Result<Point> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
        let text = format!("{name:?} is no name of a rollback point: letters, digits, _ and -");
        return Err(Error::new(Code::NotPossibleNow, text));
    }
    if let Some(known) = points(main).into_iter().find(|point| point.name == name) {
        if version.is_none_or(|version| version == known.version) {
            return Ok(known);
        }
        let text = format!("{name} is version {} already", known.version);
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help(format!("`alluvium rollback-point remove {} {name}`", pipeline.id)));
    }
    let newest = main.version();
    let version = version.unwrap_or(newest);
    if version > newest {
        let text = format!("{} has no version {version}; the newest is {newest}", main.uri());
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help(format!("`alluvium tables history {}` lists versions", pipeline.id)));
    }
    if version == newest {
        // Later cleanups of the log leave a shortcut to it.
        main.checkpoint().await?;
    } else {
        // Its files are there, and no cleanup that runs now takes them.
        files_to_bring_back(main, pipeline, version).await?;
    }
    let point = Point { name: name.to_owned(), version };
    change(main, pipeline, &point.name, Some(version)).await?;
    Ok(point)
}

/// Forgets a point: cleanup may take its files.
pub async fn remove(main: &mut Table, pipeline: &Pipeline, name: &str) -> Result<()> {
    if !points(main).iter().any(|point| point.name == name) {
        let known: Vec<String> = points(main).into_iter().map(|point| point.name).collect();
        let text = format!("{} has no rollback point {name:?}", pipeline.id);
        let help = if known.is_empty() {
            "there is none".to_owned()
        } else {
            format!("there are: {}", known.join(", "))
        };
        return Err(Error::new(Code::NotPossibleNow, text).with_help(help));
    }
    change(main, pipeline, name, None).await
}

async fn change(
    main: &mut Table,
    pipeline: &Pipeline,
    name: &str,
    version: Option<i64>,
) -> Result<()> {
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    loop {
        let held = points(main).into_iter().find(|point| point.name == name);
        if held.map(|point| point.version) == version {
            return Ok(());
        }
        let value = version.map(|version| version.to_string());
        let others = vec![main.change_properties(&[(format!("{PREFIX}{name}"), value)])?];
        crash::point("point.before_commit")?;
        let outcome = main
            .commit(Change {
                operation: Operation::Merge,
                adds: Vec::new(),
                removes: Vec::new(),
                others,
                markers: Vec::new(),
                info: serde_json::json!({
                    "pipeline": pipeline.id, "step": "rollback-point", "name": name, "version": version,
                }),
            })
            .await?;
        match outcome {
            CommitOutcome::Landed => crash::point("point.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => main.refresh().await?,
        }
    }
}
