//! From checked values to the resolved configuration: defaults, cross-checks, absolute paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use alluvium_protocol::Pipeline;
use alluvium_protocol::pipeline::{
    Content, Csv, DeletionVectors, Format, Gates, Mode, NewColumns, OnBad, OnBlock, OnDuplicate,
    Order, Ready, SideIndex, Sizes, same_name,
};
use alluvium_table::store::{Place, StorageOptions, place_of};
use toml::Value;

use super::settings::{Kind, SETTINGS, declared, expectations};
use super::value::{bytes_of, duration_of, ratio_of};
use super::{Config, Problem, cluster, watch};

/// Vacuum below this would delete files of tasks that still run.
const RETENTION_MIN: Duration = Duration::from_secs(3600);

/// The file's values.
pub(super) struct Source {
    pub(super) leaves: BTreeMap<String, Value>,
    /// Names of the alerts.
    pub(super) alerts: Vec<String>,
    pub(super) origins: BTreeMap<String, String>,
    pub(super) base: PathBuf,
    pub(super) file: PathBuf,
    pub(super) storage: Vec<StorageOptions>,
}

impl Source {
    /// The value of a setting: set, or its default.
    pub(super) fn value(&self, path: &str, pattern: &str) -> Option<Value> {
        if let Some(value) = self.leaves.get(path) {
            return Some(value.clone());
        }
        let setting = SETTINGS.iter().find(|setting| setting.path == pattern)?;
        let text = setting.default?;
        format!("value = {text}").parse::<toml::Table>().ok()?.remove("value")
    }

    /// The text of a setting that is no pipeline's.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        self.value(path, path)?.as_str().map(str::to_owned)
    }

    fn of<'a>(&'a self, name: &'a str) -> Section<'a> {
        Section { source: self, name }
    }

    fn location(&self, text: &str) -> String {
        if text.contains("://") {
            return text.to_owned();
        }
        let joined = self.base.join(Path::new(text));
        let mut clean = PathBuf::new();
        for part in joined.components() {
            match part {
                std::path::Component::CurDir => {}
                std::path::Component::ParentDir => drop(clean.pop()),
                other => clean.push(other),
            }
        }
        clean.display().to_string()
    }
}

/// One pipeline's values.
struct Section<'a> {
    source: &'a Source,
    name: &'a str,
}

impl Section<'_> {
    fn path(&self, key: &str) -> String {
        format!("pipeline.{}.{key}", self.name)
    }

    fn get(&self, key: &str) -> Option<Value> {
        self.source.value(&self.path(key), &format!("pipeline.*.{key}"))
    }

    fn ratio(&self, key: &str) -> Option<u64> {
        self.text(key).as_deref().and_then(ratio_of)
    }

    fn on_bad(&self, key: &str) -> OnBad {
        match self.text(key).as_deref() {
            Some("quarantine") => OnBad::Quarantine,
            _ => OnBad::Fail,
        }
    }

    fn format(&self) -> Format {
        match self.text("format").as_deref() {
            Some("delta") => Format::Delta,
            Some("json") => Format::Json,
            Some("csv") => {
                let delimiter = self.text("csv.delimiter");
                let delimiter = delimiter.as_deref().and_then(|text| text.bytes().next());
                Format::Csv(Csv {
                    delimiter: delimiter.unwrap_or(b','),
                    header: self.flag("csv.header"),
                    null: self.text("csv.null").unwrap_or_default(),
                })
            }
            _ => Format::Parquet,
        }
    }

    fn mode(&self) -> Mode {
        match self.text("mode").as_deref() {
            Some("append") => Mode::Append,
            Some("snapshot") => Mode::Snapshot,
            Some("scd2") => Mode::Scd2,
            _ => Mode::Upsert,
        }
    }

    fn gates(&self) -> Gates {
        // A snapshot that was cut off would empty main.
        let least = (self.mode() == Mode::Snapshot).then_some(5000);
        Gates {
            rows_min: self.ratio("gate.rows_min").or(least).filter(|least| *least > 0),
            rows_max: self.ratio("gate.rows_max"),
            refused_max: self.ratio("gate.refused_max"),
        }
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key)?.as_str().map(str::to_owned)
    }

    fn location(&self, key: &str) -> Option<String> {
        self.text(key).map(|text| self.source.location(&text))
    }

    fn number(&self, key: &str) -> Option<i64> {
        self.get(key)?.as_integer()
    }

    fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(|value| value.as_bool()).unwrap_or(false)
    }

    fn duration(&self, key: &str) -> Duration {
        self.text(key).as_deref().and_then(duration_of).unwrap_or_default()
    }

    fn bytes(&self, key: &str) -> u64 {
        self.text(key).as_deref().and_then(bytes_of).unwrap_or(1)
    }
}

/// Where side indexes are kept; `None`: nowhere.
fn cache(source: &Source, state: &str, problems: &mut Vec<Problem>) -> Option<PathBuf> {
    if let Some(text) = source.text("worker.cache") {
        let Ok(Place::Local(folder)) = place_of(&source.location(&text)) else {
            let text = "must be a folder of this machine; for example `/var/cache/alluvium`";
            problems.push(Problem { path: "worker.cache".to_owned(), text: text.to_owned() });
            return None;
        };
        return Some(folder);
    }
    if let Ok(Place::Local(folder)) = place_of(state) {
        return Some(folder.join("cache"));
    }
    let of_user = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = of_user("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| of_user("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.filter(|folder| folder.is_absolute()).map(|folder| folder.join("alluvium"))
}

/// Builds the configuration, or returns all problems, those found before included.
pub(super) fn build(
    source: &Source,
    names: &[String],
    mut problems: Vec<Problem>,
) -> Result<Config, Vec<Problem>> {
    if names.is_empty() {
        let text = "no pipeline is configured; add [pipeline.NAME] with source, raw, main and key";
        problems.push(Problem { path: "pipeline".to_owned(), text: text.to_owned() });
    }
    let state = match source.leaves.get("state.uri").and_then(Value::as_str) {
        Some(text) => source.location(text),
        None => source.location("_alluvium"),
    };
    let memory = source.value("worker.memory", "worker.memory");
    let memory = memory.as_ref().and_then(Value::as_str).and_then(bytes_of).unwrap_or(512 << 20);
    let mut pipelines = Vec::new();
    for name in names {
        check_pipeline(source, name, &mut problems);
        pipelines.push(pipeline(source, name, &state, memory));
    }
    check_collisions(&pipelines, &state, &mut problems);
    let is_remote = |uri: &String| matches!(place_of(uri), Ok(Place::Remote(_)));
    if !source.leaves.contains_key("state.uri")
        && pipelines.iter().any(|p| is_remote(&p.main) || is_remote(&p.raw))
    {
        let text = "required, as tables are not on this machine; for example \
                    `uri = \"s3://bucket/_alluvium\"`";
        problems.push(Problem { path: "state.uri".to_owned(), text: text.to_owned() });
    }
    let cache = cache(source, &state, &mut problems);
    if source.leaves.contains_key("worker.cache") {
        check_cache(cache.as_deref(), &pipelines, &mut problems);
    }
    let cluster = cluster::build(source, &mut problems);
    let sinks = watch::sinks(source, names, &mut problems);
    let policies = watch::policies(source, names, &mut problems);
    if !problems.is_empty() {
        problems.sort_by(|a, b| a.path.cmp(&b.path));
        problems.dedup();
        return Err(problems);
    }
    let number = |path: &str| source.value(path, path).and_then(|value| value.as_integer());
    let processors = std::thread::available_parallelism().map_or(2, usize::from);
    let slots = number("worker.slots").and_then(|n| usize::try_from(n).ok()).unwrap_or(processors);
    let text = |path: &str| source.text(path);
    let duration = |path: &str| text(path).as_deref().and_then(duration_of).unwrap_or_default();
    Ok(Config {
        slots,
        poll: duration("run.poll"),
        grace: duration("worker.grace"),
        disk_free: text("worker.disk_free").as_deref().and_then(bytes_of).unwrap_or(0),
        otlp: text("telemetry.otlp").or_else(cluster::otlp_of_environment),
        cache: cache.filter(|_| pipelines.iter().any(|p| p.side_index != SideIndex::Off)),
        cache_size: text("worker.cache_size").as_deref().and_then(bytes_of).unwrap_or(0),
        listen: text("worker.listen").and_then(|text| text.parse().ok()),
        notify: watch::notify(source),
        sinks,
        policies,
        cluster,
        storage: source.storage.clone(),
        attempts: number("run.attempts").and_then(|n| u32::try_from(n).ok()).unwrap_or(3),
        effective: effective(source, names, &state, slots),
        state,
        pipelines,
        file: source.file.clone(),
    })
}

fn check_pipeline(source: &Source, name: &str, problems: &mut Vec<Problem>) {
    let section = source.of(name);
    let mut problem = |key: &str, text: String| {
        let path = format!("pipeline.{name}{}{key}", if key.is_empty() { "" } else { "." });
        problems.push(Problem { path, text });
    };
    let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !is_name {
        problem(
            "",
            "a name is lower-case letters, digits and _, and begins with a letter".to_owned(),
        );
    }
    for setting in SETTINGS.iter().filter(|setting| setting.without == "required") {
        let key = setting.path.trim_start_matches("pipeline.*.");
        // Whether there must be a key depends on the mode.
        if key != "key" && section.get(key).is_none() {
            problem(key, format!("required; for example `{key} = {}`", setting.example));
        }
    }
    for key in ["source", "raw", "main", "quarantine"] {
        if let Some(text) = section.location(key)
            && let Err(error) = place_of(&text)
        {
            problem(key, error.message);
        }
    }
    for key in ["ready.marker", "ready.manifest"] {
        if section.text(key).is_some_and(|name| name.contains('/')) {
            problem(key, "the name of a file in the epoch's folder, without a path".to_owned());
        }
    }
    let signs = ["ready.quiet", "ready.marker", "ready.manifest"];
    let set: Vec<&str> = signs.into_iter().filter(|key| section.get(key).is_some()).collect();
    if set.len() > 1 {
        problem("ready", format!("exactly one of quiet, marker, manifest; found {}", set.len()));
    }
    if section.flag("adopt") && section.number("start_from").is_none() {
        let text = "needs `start_from = EPOCH`: lower epochs are in the adopted table already";
        problem("adopt", text.to_owned());
    }
    let is_short = section.duration("cleanup.retention") < RETENTION_MIN;
    if is_short && std::env::var_os("ALLUVIUM_TEST_SHORT_RETENTION").is_none() {
        let text = "at least 1h: a shorter retention deletes files of tasks that still run";
        problem("cleanup.retention", text.to_owned());
    }
    check_mode(&section, &mut problem);
    if let Some(condition) = section.text("delete_when")
        && let Err(error) = alluvium_table::query::check_expression(&condition)
    {
        problem("delete_when", error.message);
    }
    for name in names_of(section.get("columns.ignore")) {
        let keys = names_of(section.get("key"));
        if keys.iter().any(|key| same_name(key, &name)) {
            problem("columns.ignore", format!("{name:?} is a column of the key: main needs it"));
        }
        if name.contains(',') {
            problem("columns.ignore", format!("{name:?}: a name with a comma cannot be kept"));
        }
    }
    let own = ["_epoch", "_op", "_file", "_row", "_generation", "_ingested_at"];
    let keys = section.get("key").and_then(|value| value.as_array().cloned()).unwrap_or_default();
    for (index, key) in keys.iter().filter_map(Value::as_str).enumerate() {
        let is_again = |other: &Value| other.as_str().is_some_and(|o| same_name(o, key));
        if keys.iter().take(index).any(is_again) {
            problem("key", format!("{key:?} stands there twice"));
        }
        if own.contains(&key) || key.contains(',') {
            problem("key", format!("{key:?} cannot be a key column"));
        }
    }
}

/// Settings that contradict the mode, the format or each other.
fn check_mode(section: &Section<'_>, problem: &mut impl FnMut(&str, String)) {
    let mode = section.text("mode").unwrap_or_default();
    let is_set = |key: &str| section.source.leaves.contains_key(&section.path(key));
    if mode == "append" {
        for key in ["key", "delete_when", "sequence_by", "on_duplicate", "merge.skip_unchanged"] {
            if is_set(key) {
                problem(key, "mode = \"append\" keeps every row: it knows no key".to_owned());
            }
        }
    } else if !is_set("key") {
        problem("key", "required; for example `key = [\"pguid\"]`".to_owned());
    }
    if mode != "upsert" && section.flag("adopt") {
        problem("adopt", format!("a table can be adopted with mode = \"upsert\", not {mode:?}"));
    }
    for key in ["csv.delimiter", "csv.header", "csv.null"] {
        if is_set(key) && section.text("format").as_deref() != Some("csv") {
            problem(key, "only with format = \"csv\"".to_owned());
        }
    }
    let ignored = names_of(section.get("columns.ignore"));
    let partitions = names_of(section.get("partition_by"));
    for (at, name) in partitions.iter().enumerate() {
        if partitions[..at].iter().any(|other| same_name(other, name)) {
            problem("partition_by", format!("{name:?} stands there twice"));
        }
        if ignored.iter().any(|other| same_name(other, name)) {
            problem(
                "partition_by",
                format!("{name:?} does not enter main: columns.ignore names it"),
            );
        }
        if name.contains(',') || name.starts_with('_') {
            problem("partition_by", format!("{name:?} cannot be a partition column"));
        }
    }
}

/// Two pipelines that write one table would undo each other; what lies in a table's folder and is not
/// the table's, cleanup would delete.
fn check_collisions(pipelines: &[Pipeline], state: &str, problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<PathBuf, String> = BTreeMap::new();
    for pipeline in pipelines {
        let tables = [
            ("raw", &pipeline.raw),
            ("main", &pipeline.main),
            ("quarantine", &pipeline.quarantine),
        ];
        for (key, uri) in tables {
            let path = format!("pipeline.{}.{key}", pipeline.id);
            let place = real_place(uri);
            if uri.is_empty() {
                continue;
            }
            if place == real_place(state) {
                let text = "is the state folder; a table needs a folder of its own".to_owned();
                problems.push(Problem { path: path.clone(), text });
            }
            if place == real_place(&pipeline.source) {
                let text = "is the source; a table needs a folder of its own".to_owned();
                problems.push(Problem { path: path.clone(), text });
            }
            if let Some(other) = seen.insert(place, path.clone()) {
                let text = format!("names the same table as {other}; each needs its own");
                problems.push(Problem { path, text });
            }
        }
    }
    let sources =
        pipelines.iter().map(|p| (real_place(&p.source), format!("pipeline.{}.source", p.id)));
    let tables = seen.clone().into_iter();
    for (place, path) in sources.chain(tables).chain([(real_place(state), "state.uri".to_owned())])
    {
        let outer = seen.iter().find(|(table, _)| place != **table && place.starts_with(table));
        if let Some((_, table)) = outer {
            let text = format!("lies inside the folder of {table}, where cleanup would delete it");
            problems.push(Problem { path, text });
        }
    }
}

/// Files that come and go are no epochs, and no table's.
fn check_cache(cache: Option<&Path>, pipelines: &[Pipeline], problems: &mut Vec<Problem>) {
    let Some(cache) = cache.map(|folder| real_place(&folder.to_string_lossy())) else { return };
    let places = pipelines.iter().flat_map(|p| {
        let places = [
            ("source", &p.source),
            ("raw", &p.raw),
            ("main", &p.main),
            ("quarantine", &p.quarantine),
        ];
        places.map(|(key, uri)| (real_place(uri), format!("pipeline.{}.{key}", p.id)))
    });
    for (place, path) in places.filter(|(place, _)| cache.starts_with(place)) {
        // An empty location is a problem of its own.
        if !place.as_os_str().is_empty() {
            let text = format!("lies inside {path}; the cache needs a folder of its own");
            problems.push(Problem { path: "worker.cache".to_owned(), text });
        }
    }
}

/// Where a location really is: without scheme, and with the links of the part that exists followed.
fn real_place(uri: &str) -> PathBuf {
    let path = match place_of(uri) {
        Ok(Place::Local(path)) => path,
        Ok(Place::Remote(url)) => return PathBuf::from(url.as_str()),
        Err(_) => return PathBuf::from(uri),
    };
    let mut rest = Vec::new();
    let mut existing = path.as_path();
    loop {
        if let Ok(real) = existing.canonicalize() {
            return rest.into_iter().rev().fold(real, |place, part| place.join(part));
        }
        match (existing.parent(), existing.file_name()) {
            (Some(parent), Some(name)) => {
                rest.push(name.to_owned());
                existing = parent;
            }
            _ => return path,
        }
    }
}

fn pipeline(source: &Source, name: &str, state: &str, memory: u64) -> Pipeline {
    let section = source.of(name);
    let raw = section.location("raw").unwrap_or_default();
    let quarantine = section
        .location("quarantine")
        .unwrap_or_else(|| format!("{}_quarantine", raw.trim_end_matches('/')));
    let ready = if let Some(marker) = section.text("ready.marker") {
        Ready::Marker(marker)
    } else if let Some(manifest) = section.text("ready.manifest") {
        Ready::Manifest(manifest)
    } else {
        let quiet = section.text("ready.quiet").as_deref().and_then(duration_of);
        Ready::Quiet(quiet.unwrap_or(Duration::from_secs(60)))
    };
    let is_arrival = section.text("order").as_deref() == Some("arrival");
    let goes_on = section.text("on_block").as_deref() == Some("continue");
    let size = |value: Option<i64>| value.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
    Pipeline {
        id: name.to_owned(),
        source: section.location("source").unwrap_or_default(),
        main: section.location("main").unwrap_or_default(),
        quarantine,
        raw,
        state: state.to_owned(),
        content: Content {
            key: names_of(section.get("key")),
            sequence_by: section.text("sequence_by"),
            delete_when: section.text("delete_when"),
            expectations: section
                .get("expect")
                .and_then(|value| expectations(&value).ok())
                .unwrap_or_default(),
            new_columns: match section.text("schema").as_deref() {
                Some("freeze") => NewColumns::Freeze,
                Some("fail") => NewColumns::Fail,
                _ => NewColumns::Evolve,
            },
            ignore: names_of(section.get("columns.ignore")),
            on_duplicate: match section.text("on_duplicate").as_deref() {
                Some("quarantine") => OnDuplicate::Quarantine,
                Some("fail") => OnDuplicate::Fail,
                _ => OnDuplicate::Last,
            },
            format: section.format(),
            mode: section.mode(),
            declared: section.get("columns").as_ref().map(declared).unwrap_or_default(),
            select: section.text("select"),
            on_mismatch: section.on_bad("on_mismatch"),
            on_corrupt_file: section.on_bad("on_corrupt_file"),
            gates: section.gates(),
            partition_by: names_of(section.get("partition_by")),
            change_feed: section.flag("change_feed"),
            skip_unchanged: section.flag("merge.skip_unchanged"),
        },
        order: if is_arrival { Order::Arrival } else { Order::Sequential },
        on_block: if goes_on { OnBlock::Continue } else { OnBlock::Stop },
        hold_for_earlier: section.duration("hold_for_earlier"),
        ready,
        include: section.text("files.include"),
        exclude: section.text("files.exclude"),
        start_from: section.number("start_from"),
        adopt: section.flag("adopt"),
        deletion_vectors: match section.text("merge.deletion_vectors").as_deref() {
            Some("off") => DeletionVectors::Off,
            Some("upgrade") => DeletionVectors::Upgrade,
            _ => DeletionVectors::Auto,
        },
        side_index: match section.text("merge.index").as_deref() {
            Some("off") => SideIndex::Off,
            Some("always") => SideIndex::Always,
            _ => SideIndex::Auto,
        },
        optimize: section.flag("optimize.enabled"),
        cluster_by: names_of(section.get("optimize.cluster_by")),
        cleanup_every: section.flag("cleanup.enabled").then(|| section.duration("cleanup.every")),
        sizes: Sizes {
            target_file_bytes: section.bytes("optimize.target_file_size"),
            batch_epochs: size(section.number("merge.batch_epochs")),
            batch_bytes: section.bytes("merge.batch_bytes"),
            small_files: size(section.number("optimize.small_files")),
            read_cost_max: section
                .ratio("optimize.read_cost")
                .and_then(|hundredths| u32::try_from(hundredths / 100).ok())
                .unwrap_or(u32::MAX),
            bin_bytes: section.bytes("optimize.bin_size"),
            shard_bytes: section.bytes("shard_size"),
            vacuum_retention: section.duration("cleanup.retention"),
            memory_bytes: usize::try_from(memory).unwrap_or(usize::MAX),
        },
    }
}

fn names_of(value: Option<Value>) -> Vec<String> {
    let list = value.and_then(|value| value.as_array().cloned()).unwrap_or_default();
    list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Every setting's effective value with its origin.
fn effective(
    source: &Source,
    names: &[String],
    state: &str,
    slots: usize,
) -> BTreeMap<String, (String, String)> {
    let mut effective = BTreeMap::new();
    for setting in SETTINGS {
        let paths: Vec<String> = if setting.path.starts_with("alert.") {
            source.alerts.iter().map(|name| setting.path.replace('*', name)).collect()
        } else if setting.path.contains('*') {
            names.iter().map(|name| setting.path.replace('*', name)).collect()
        } else {
            vec![setting.path.to_owned()]
        };
        for path in paths {
            let shown = match source.leaves.get(&path) {
                Some(value) => {
                    let origin = source.origins.get(&path).cloned();
                    let value = match (setting.kind, value.as_str()) {
                        (Kind::Secret, _) => "\"…\" (not shown)".to_owned(),
                        (Kind::Location, Some(text)) => format!("{:?}", source.location(text)),
                        _ => value.to_string(),
                    };
                    (value, origin.unwrap_or_else(|| source.file.display().to_string()))
                }
                None => {
                    let value = match (setting.path, setting.default) {
                        ("state.uri", _) => format!("{state:?}"),
                        ("worker.slots", _) => slots.to_string(),
                        (_, Some(default)) => default.to_owned(),
                        (_, None) => continue,
                    };
                    (value, "default".to_owned())
                }
            };
            effective.insert(path, shown);
        }
    }
    effective.extend(cluster::shown_storage(source));
    effective
}
