//! The configuration: one file for every role, read whole, all problems told at once.
//!
//! Layers, later ones win: defaults, the file, `ALLUVIUM_SECTION__KEY` variables.

mod build;
pub(crate) mod cluster;
pub(crate) mod reference;
pub(crate) mod settings;
pub(crate) mod value;
pub(crate) mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use alluvium_coordinator::alerts::sinks::Sink;
use alluvium_coordinator::policy::Policy;
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::keys;
use alluvium_table::store::{self, StorageOptions};
use toml::{Table, Value};

use settings::{Kind, column_problems, find, is_section, siblings};

/// The resolved configuration.
#[derive(Debug)]
pub(crate) struct Config {
    /// The state folder.
    pub(crate) state: String,
    /// Tasks at a time.
    pub(crate) slots: usize,
    /// Pause between listings.
    pub(crate) poll: std::time::Duration,
    /// Attempts before a block.
    pub(crate) attempts: u32,
    /// How long a stopping worker may finish.
    pub(crate) grace: std::time::Duration,
    /// Free disk below which a worker takes no task, in bytes.
    pub(crate) disk_free: u64,
    /// Where side indexes are kept; `None`: nowhere.
    pub(crate) cache: Option<PathBuf>,
    /// What they may take, bytes.
    pub(crate) cache_size: u64,
    /// Where a worker serves its metrics.
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// RabbitMQ, Redis and the API; `None`: embedded.
    pub(crate) cluster: Option<cluster::Cluster>,
    /// Where traces go.
    pub(crate) otlp: Option<String>,
    /// Who may notify of new objects.
    pub(crate) notify: watch::Notify,
    /// Where alerts go.
    pub(crate) sinks: Vec<Sink>,
    /// What teams want of pipelines beside their data, by name.
    pub(crate) policies: BTreeMap<String, Policy>,
    /// Options of object stores.
    pub(crate) storage: Vec<StorageOptions>,
    /// Pipelines by name.
    pub(crate) pipelines: Vec<Pipeline>,
    /// Effective values and where each comes from, for `config show`.
    pub(crate) effective: BTreeMap<String, (String, String)>,
    /// The file.
    pub(crate) file: PathBuf,
}

impl Config {
    /// From now on this process keeps side indexes. Without a folder for them keys are read.
    pub(crate) fn keep_side_indexes(&self) {
        let Some(folder) = &self.cache else { return };
        if let Err(error) = keys::cache::keep(folder, self.cache_size) {
            let folder = folder.display();
            tracing::warn!(%error, %folder, "no indexes of keys are kept: set `worker.cache`");
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Dotted key path.
    pub(crate) path: String,
    /// What is wrong, and what would be right.
    pub(crate) text: String,
}

/// Where the configuration file is looked for without `--config`.
const FILE_NAME: &str = "alluvium.toml";

/// Finds the file: `--config`, `ALLUVIUM_CONFIG`, `./alluvium.toml`.
pub(crate) fn locate(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        if path.is_file() {
            return Ok(path.to_owned());
        }
        let text = format!("there is no file {}", path.display());
        return Err(
            Error::new(Code::ConfigNotFound, text).with_help("check the path of `--config`")
        );
    }
    if let Ok(path) = std::env::var("ALLUVIUM_CONFIG") {
        if Path::new(&path).is_file() {
            return Ok(path.into());
        }
        let text = format!("ALLUVIUM_CONFIG names {path}, which is not a file");
        return Err(Error::new(Code::ConfigNotFound, text));
    }
    let path = PathBuf::from(FILE_NAME);
    if path.is_file() {
        return Ok(path);
    }
    let here = std::env::current_dir().map_or_else(|_| ".".to_owned(), |d| d.display().to_string());
    Err(Error::new(Code::ConfigNotFound, format!("there is no {FILE_NAME} in {here}")).with_help(
        "start with `alluvium demo`, write one with `alluvium config reference > alluvium.toml`, \
         or name one with `--config FILE`",
    ))
}

/// Reads, checks and resolves the configuration.
pub(crate) fn load(given: Option<&Path>) -> Result<Config> {
    let file = locate(given)?;
    let text = std::fs::read_to_string(&file).map_err(|error| {
        Error::new(Code::ConfigNotFound, format!("{} cannot be read: {error}", file.display()))
    })?;
    let config = parse(&text, &file, std::env::vars()).map_err(|problems| {
        let list: Vec<String> =
            problems.iter().map(|p| format!("\n  {}: {}", p.path, p.text)).collect();
        let count = if problems.len() == 1 { "1 problem" } else { "problems" };
        let text = format!("{} in {}:{}", count, file.display(), list.concat());
        Error::new(Code::ConfigInvalid, text)
            .with_help("correct it, then `alluvium config validate`; all settings: `alluvium config reference`")
    })?;
    store::configure(config.storage.clone());
    Ok(config)
}

/// Resolves the configuration from its text and the environment.
pub(crate) fn parse(
    text: &str,
    file: &Path,
    environment: impl Iterator<Item = (String, String)>,
) -> std::result::Result<Config, Vec<Problem>> {
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        vec![Problem { path: file.display().to_string(), text: error.to_string() }]
    })?;
    let mut problems = Vec::new();
    let mut origins: BTreeMap<String, String> = BTreeMap::new();
    let base = base_of(file);
    apply_environment(&mut table, environment, &mut origins);
    let mut leaves: BTreeMap<String, Value> = BTreeMap::new();
    let storage = cluster::take_storage(&mut table, &base, &mut problems);
    walk(&mut Vec::new(), &Value::Table(table.clone()), &mut leaves, &mut problems);
    for (path, value) in &mut leaves {
        expand_all(path, value, &base, &mut problems);
    }
    for (path, value) in &leaves {
        let parts: Vec<String> = path.split('.').map(str::to_owned).collect();
        let Some(setting) = find(&parts) else { continue };
        if let (Kind::Columns, Value::Table(columns)) = (setting.kind, value) {
            for (name, text) in column_problems(columns) {
                problems.push(Problem { path: format!("{path}.{name}"), text });
            }
        } else if let Err(text) = setting.kind.check(value) {
            problems.push(Problem { path: path.clone(), text });
        }
    }
    let names_of = |section: &str| match table.get(section) {
        Some(Value::Table(named)) => named.keys().cloned().collect(),
        _ => Vec::new(),
    };
    let (names, alerts): (Vec<String>, Vec<String>) = (names_of("pipeline"), names_of("alert"));
    let source = build::Source { leaves, alerts, origins, base, file: file.to_owned(), storage };
    build::build(&source, &names, problems).map_err(|mut problems| {
        for problem in &mut problems {
            if let Some(origin) = source.origins.get(&problem.path) {
                problem.text = format!("{} (it comes from the {origin})", problem.text);
            }
        }
        problems
    })
}

fn base_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// `ALLUVIUM_SECTION__KEY=value`; the value is TOML where it parses as such, text otherwise.
fn apply_environment(
    table: &mut Table,
    environment: impl Iterator<Item = (String, String)>,
    origins: &mut BTreeMap<String, String>,
) {
    for (name, text) in environment {
        let Some(rest) = name.strip_prefix("ALLUVIUM_").filter(|rest| rest.contains("__")) else {
            continue;
        };
        let path: Vec<String> = rest.split("__").map(str::to_lowercase).collect();
        let parsed = format!("value = {text}").parse::<Table>().ok();
        let value = parsed.and_then(|mut t| t.remove("value")).unwrap_or(Value::String(text));
        insert(table, &path, value);
        origins.insert(path.join("."), format!("environment variable {name}"));
    }
}

/// Puts a value at a path; what stands in the way is replaced.
fn insert(table: &mut Table, path: &[String], value: Value) {
    match path {
        [] => {}
        [last] => drop(table.insert(last.clone(), value)),
        [first, rest @ ..] => {
            let mut inner = match table.remove(first) {
                Some(Value::Table(inner)) => inner,
                _ => Table::new(),
            };
            insert(&mut inner, rest, value);
            table.insert(first.clone(), Value::Table(inner));
        }
    }
}

/// Collects leaves by path; unknown keys become problems with a suggestion.
fn walk(
    path: &mut Vec<String>,
    value: &Value,
    leaves: &mut BTreeMap<String, Value>,
    problems: &mut Vec<Problem>,
) {
    let dotted = path.join(".");
    if find(path).is_some_and(|setting| setting.kind == Kind::Columns)
        && let Value::Table(table) = value
    {
        // `ignore` is a list of columns, and itself none, unless it has a type like one.
        let mut columns = table.clone();
        if columns.get("ignore").is_some_and(|value| !value.is_str())
            && let Some(ignore) = columns.remove("ignore")
        {
            leaves.insert(format!("{dotted}.ignore"), ignore);
        }
        if !columns.is_empty() {
            leaves.insert(dotted, Value::Table(columns));
        }
        return;
    }
    if find(path).is_some() {
        leaves.insert(dotted, value.clone());
        return;
    }
    let is_known = path.is_empty() || is_section(path);
    match value {
        Value::Table(table) if is_known => {
            for (name, inner) in table {
                path.push(name.clone());
                walk(path, inner, leaves, problems);
                path.pop();
            }
        }
        _ if is_known => {
            let text = format!("expected a section with {}", siblings(path).join(", "));
            problems.push(Problem { path: dotted, text });
        }
        _ => problems.push(Problem { path: dotted, text: unknown(path) }),
    }
}

fn unknown(path: &[String]) -> String {
    let Some((name, parent)) = path.split_last() else { return String::new() };
    let candidates = siblings(parent);
    let best = candidates
        .iter()
        .map(|candidate| (strsim::jaro_winkler(candidate, name), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, candidate)) if likeness > 0.75 => {
            format!("unknown setting; did you mean `{candidate}`?")
        }
        _ => format!("unknown setting; known here: {}", candidates.join(", ")),
    }
}

fn expand_all(path: &str, value: &mut Value, base: &Path, problems: &mut Vec<Problem>) {
    match value {
        Value::String(text) => match value::expand(text, base) {
            Ok(expanded) => *text = expanded,
            Err(text) => problems.push(Problem { path: path.to_owned(), text }),
        },
        Value::Array(list) => {
            for item in list {
                expand_all(path, item, base, problems);
            }
        }
        _ => {}
    }
}

impl Config {
    /// Names this installation in messages to the outside.
    pub(crate) fn source(&self) -> String {
        let name = self.cluster.as_ref().map_or("alluvium", |cluster| cluster.name.as_str());
        format!("/{name}/{}", alluvium_protocol::pipeline::short_hash(self.state.as_bytes()))
    }

    /// The pipelines asked for, or all.
    pub(crate) fn select(&self, name: Option<&str>) -> Result<Vec<Pipeline>> {
        let Some(name) = name else { return Ok(self.pipelines.clone()) };
        match self.pipelines.iter().find(|pipeline| pipeline.id == name) {
            Some(pipeline) => Ok(vec![pipeline.clone()]),
            None => {
                let names: Vec<&str> = self.pipelines.iter().map(|p| p.id.as_str()).collect();
                let text = format!("there is no pipeline {name:?} in {}", self.file.display());
                Err(Error::new(Code::UnknownPipeline, text)
                    .with_help(format!("the configuration has: {}", names.join(", "))))
            }
        }
    }
}

#[cfg(test)]
mod tests;
