//! The sections `[cluster]` and `[storage]`: where the services are.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use alluvium_table::store::{StorageOptions, is_option};
use toml::{Table, Value};

use super::build::Source;
use super::{Problem, value};

/// What a cluster's processes connect to.
#[derive(Clone)]
pub(crate) struct Cluster {
    /// RabbitMQ's URL, with its password.
    pub(crate) amqp: String,
    /// Redis's URL, with its password.
    pub(crate) redis: String,
    /// Begins the names of queues and keys.
    pub(crate) name: String,
    /// Where the coordinator listens.
    pub(crate) listen: SocketAddr,
    /// Where the verbs find it.
    pub(crate) api: String,
    /// What changes over HTTP must show.
    pub(crate) token: Option<String>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rest may hold passwords.
        f.debug_struct("Cluster").field("name", &self.name).field("api", &self.api).finish()
    }
}

/// `[cluster]`, when one of its services is set.
pub(super) fn build(source: &Source, problems: &mut Vec<Problem>) -> Option<Cluster> {
    let is_set = |key: &str| source.leaves.contains_key(&format!("cluster.{key}"));
    if !["amqp", "redis", "name", "listen", "api", "token"].into_iter().any(is_set) {
        return None;
    }
    let mut problem = |key: &str, text: String| {
        problems.push(Problem { path: format!("cluster.{key}"), text });
    };
    for (key, schemes) in [("amqp", ["amqp://", "amqps://"]), ("redis", ["redis://", "rediss://"])]
    {
        let text = source.text(&format!("cluster.{key}"));
        if !text.is_some_and(|text| schemes.iter().any(|scheme| text.starts_with(scheme))) {
            problem(key, format!("required for a cluster: a URL that begins with {}", schemes[0]));
        }
    }
    let name = source.text("cluster.name").unwrap_or_default();
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
        problem("name", "a name is letters, digits, _ and -".to_owned());
    }
    let listen = source.text("cluster.listen").unwrap_or_default();
    // Told as a problem by the setting's kind.
    let listen = listen.parse::<SocketAddr>().ok()?;
    let token = source.text("cluster.token");
    if !listen.ip().is_loopback() && token.is_none() {
        problem("token", format!("required, as `listen` opens {listen} to other machines"));
    }
    let api = source.text("cluster.api").unwrap_or_else(|| format!("http://{listen}"));
    Some(Cluster {
        amqp: source.text("cluster.amqp").unwrap_or_default(),
        redis: source.text("cluster.redis").unwrap_or_default(),
        name,
        listen,
        api: api.trim_end_matches('/').to_owned(),
        token,
    })
}

/// The variable that all OpenTelemetry tools know.
pub(super) fn otlp_of_environment() -> Option<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

/// Takes `[storage]` (for all locations) or `[[storage]]` (by prefix) out of the file.
pub(super) fn take_storage(
    table: &mut Table,
    base: &Path,
    problems: &mut Vec<Problem>,
) -> Vec<StorageOptions> {
    let sections = match table.remove("storage") {
        None => Vec::new(),
        Some(Value::Table(section)) => vec![section],
        Some(Value::Array(list)) if list.iter().all(Value::is_table) => {
            list.into_iter().filter_map(|item| item.as_table().cloned()).collect()
        }
        Some(_) => {
            let text = "expected a section [storage], or [[storage]] with `prefix`".to_owned();
            problems.push(Problem { path: "storage".to_owned(), text });
            Vec::new()
        }
    };
    sections.into_iter().map(|section| options_of(section, base, problems)).collect()
}

fn options_of(section: Table, base: &Path, problems: &mut Vec<Problem>) -> StorageOptions {
    let mut storage = StorageOptions::default();
    for (name, found) in section {
        let mut problem = |text: String| {
            problems.push(Problem { path: format!("storage.{name}"), text });
        };
        let text = match found {
            Value::String(text) => match value::expand(&text, base) {
                Ok(text) => text,
                Err(text) => {
                    problem(text);
                    continue;
                }
            },
            Value::Integer(number) => number.to_string(),
            Value::Boolean(flag) => flag.to_string(),
            _ => {
                problem("expected a text, a number, true or false".to_owned());
                continue;
            }
        };
        if name == "prefix" {
            storage.prefix = text.replace("s3a://", "s3://");
            continue;
        }
        let option = name.to_lowercase();
        if !is_option(&option) {
            problem(
                "unknown option; they are object_store's, such as aws_endpoint_url, aws_region, \
                     aws_access_key_id, aws_secret_access_key, timeout, max_retries"
                    .to_owned(),
            );
        } else if option == "aws_s3_allow_unsafe_rename" {
            problem("not possible: two writers would overwrite each other's commits".to_owned());
        }
        storage.options.insert(option, text);
    }
    allow_http(&mut storage.options);
    storage
}

/// Who writes an `http://` endpoint means it.
fn allow_http(options: &mut HashMap<String, String>) {
    let endpoint = ["aws_endpoint_url", "aws_endpoint", "endpoint_url", "endpoint"]
        .into_iter()
        .find_map(|name| options.get(name));
    if endpoint.is_some_and(|url| url.starts_with("http://")) {
        options.entry("aws_allow_http".to_owned()).or_insert_with(|| "true".to_owned());
    }
}

/// `[storage]` for `config show`, without its secrets.
pub(super) fn shown_storage(source: &Source) -> Vec<(String, (String, String))> {
    let mut shown = Vec::new();
    for (index, storage) in source.storage.iter().enumerate() {
        let section = match storage.prefix.as_str() {
            "" => "storage".to_owned(),
            prefix => format!("storage[{index}] {prefix}"),
        };
        for (name, text) in &storage.options {
            let is_secret = ["secret", "token", "key", "password"].iter().any(|w| name.contains(w));
            let text =
                if is_secret { "\"…\" (not shown)".to_owned() } else { format!("{text:?}") };
            shown.push((format!("{section}.{name}"), (text, source.file.display().to_string())));
        }
    }
    shown
}
