//! Every setting, once: validation, defaults and `config reference` are made from this table.

use alluvium_protocol::pipeline::{Declared, Expectation};
use alluvium_table::query::check_expression;
use alluvium_table::schema::parse_type;
use alluvium_table::select::check_select;

use super::value::{bytes_of, duration_of, ratio_of, share_of};

/// What a setting holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Any text.
    Text,
    /// Any text, also an empty one.
    Literal,
    /// A text that is never printed: it may hold a password.
    Secret,
    /// A path or URI; relative ones start at the configuration file.
    Location,
    /// ADDRESS:PORT.
    Address,
    /// `0.5%`.
    Percent,
    /// `50%`, `300%`.
    Ratio,
    /// One character between fields.
    Delimiter,
    /// One SELECT, of one row at a time.
    Select,
    /// A table of column names and types.
    Columns,
    /// A regular expression that a whole name must match.
    Pattern,
    /// A whole number within bounds.
    Number(i64, i64),
    /// true or false.
    Flag,
    /// `60s`, `5m`, `12h`, `7d`.
    Duration,
    /// `64KiB`, `128MiB`, `2GiB`.
    Size,
    /// A list of texts, not empty.
    Names,
    /// A list of tables with name, sql and action.
    Expectations,
    /// One of these words.
    OneOf(&'static [&'static str]),
}

/// One setting.
pub(crate) struct Setting {
    /// Dotted path; `*` stands for a pipeline's name.
    pub(crate) path: &'static str,
    /// What it holds.
    pub(crate) kind: Kind,
    /// The default in TOML; `None`: none, see `note`.
    pub(crate) default: Option<&'static str>,
    /// Shown where there is no default: `required`, or what happens without it.
    pub(crate) without: &'static str,
    /// An example in TOML, for the reference.
    pub(crate) example: &'static str,
    /// What it does, in a sentence or two.
    pub(crate) doc: &'static str,
}

macro_rules! settings {
    ($($path:literal, $kind:expr, $default:expr, $without:literal, $example:literal, $doc:literal;)*) => {
        /// All settings, in the order of the reference.
        pub(crate) const SETTINGS: &[Setting] = &[$(Setting {
            path: $path, kind: $kind, default: $default, without: $without, example: $example, doc: $doc,
        },)*];
    };
}

const MOST: i64 = 1_000_000;

settings! {
    "state.uri", Kind::Location, None, "`_alluvium` beside this file", r#""./lake/_alluvium""#,
        "Ledger, manifests and requests. Losing it loses no data: it is rebuilt from the tables.";
    "worker.slots", Kind::Number(1, 256), None, "the number of processors", "4",
        "Tasks that one process works on at a time.";
    "worker.memory", Kind::Size, Some(r#""512MiB""#), "", r#""1GiB""#,
        "Working memory of one task; sorts spill to disk beyond it.";
    "worker.grace", Kind::Duration, Some(r#""60s""#), "", r#""5m""#,
        "How long a stopping worker may finish the tasks in hand before it gives them back.";
    "worker.disk_free", Kind::Size, Some(r#""256MiB""#), "", r#""5GiB""#,
        "A worker with less free disk for spilling takes no new task until there is more.";
    "worker.cache", Kind::Location, None, "`cache` in `state.uri` if that is a folder, else $XDG_CACHE_HOME/alluvium", r#""/var/cache/alluvium""#,
        "A folder of this machine for indexes of keys (`merge.index`). It may be deleted at any time.";
    "worker.cache_size", Kind::Size, Some(r#""2GiB""#), "", r#""20GiB""#,
        "What `worker.cache` may take (16 bytes for each row of main); what was not used for longest is deleted.";
    "worker.listen", Kind::Address, None, "no metrics of workers over HTTP", r#""127.0.0.1:8461""#,
        "Where a worker (or `run`) serves /metrics for Prometheus, /livez and /readyz.";
    "run.poll", Kind::Duration, Some(r#""10s""#), "", r#""60s""#,
        "Pause between two listings of a source.";
    "run.attempts", Kind::Number(1, 100), Some("3"), "", "5",
        "Attempts of a task that fails for a passing reason, before its epoch is blocked.";
    "cluster.amqp", Kind::Secret, None, "no cluster: `alluvium run` does it all", r#""amqp://${AMQP_USER}:${AMQP_PASSWORD}@127.0.0.1:5672/%2f""#,
        "RabbitMQ. Setting it and `redis` makes a cluster: `alluvium coordinator`, `alluvium worker`.";
    "cluster.redis", Kind::Secret, None, "no cluster", r#""redis://127.0.0.1:6379/0""#,
        "Redis, for leases and heartbeats.";
    "cluster.name", Kind::Text, Some(r#""alluvium""#), "", r#""alluvium_test""#,
        "Begins the names of queues and Redis keys; clusters that share a broker need different ones.";
    "cluster.listen", Kind::Address, Some(r#""127.0.0.1:8460""#), "", r#""0.0.0.0:8460""#,
        "Where the coordinator's HTTP API listens.";
    "cluster.api", Kind::Text, None, "`listen`", r#""http://coordinator:8460""#,
        "Where `status`, `retry` and the other verbs find the coordinator.";
    "cluster.token", Kind::Secret, None, "whoever reaches `listen` may; that must be this machine only", r#""${ALLUVIUM_TOKEN}""#,
        "Whoever changes something over HTTP must show it.";
    "notify.token", Kind::Secret, None, "only this machine may notify", r#""${ALLUVIUM_NOTIFY_TOKEN}""#,
        "Storage that posts to /api/v1/notify shows it: `Authorization: Bearer …`, or `?token=…`.";
    "notify.topics", Kind::Names, None, "no topics of SNS", r#"["arn:aws:sns:eu-central-1:123456789012:incoming"]"#,
        "SNS topics that may notify; their messages are signed, and their subscription is confirmed.";
    "notify.queue", Kind::Text, None, "no queue", r#""alluvium_notify""#,
        "Queue (and fanout exchange) of RabbitMQ to which storage publishes its events.";
    "telemetry.otlp", Kind::Text, None, "OTEL_EXPORTER_OTLP_ENDPOINT, or no traces", r#""http://127.0.0.1:4317""#,
        "Where traces go, as OTLP over gRPC.";
    "alert.*.type", Kind::OneOf(&["log", "webhook", "slack", "teams", "pagerduty", "email"]), None, "every alert needs one", r#""slack""#,
        "Where alerts go; [alert.NAME] may stand there several times.";
    "alert.*.url", Kind::Secret, None, "not for log; PagerDuty's own", r#""${SLACK_WEBHOOK}""#,
        "Webhook, Slack webhook, Teams workflow, or smtp://USER:PASSWORD@HOST:587?tls=required (smtps://…).";
    "alert.*.key", Kind::Secret, None, "webhooks are not signed", r#""${PAGERDUTY_KEY}""#,
        "PagerDuty's routing key; or what signs a webhook: sha256 HMAC of `timestamp.body`.";
    "alert.*.from", Kind::Text, None, "only for email", r#""alluvium@example.com""#,
        "Sender of mails.";
    "alert.*.to", Kind::Names, None, "only for email", r#"["data-team@example.com"]"#,
        "Receivers of mails.";
    "alert.*.kinds", Kind::Names, None, "all kinds", r#"["blocked", "lag", "no_workers"]"#,
        "Only these kinds of trouble; `alluvium alerts kinds` lists them.";
    "alert.*.pipelines", Kind::Names, None, "all pipelines", r#"["researchers"]"#,
        "Only these pipelines (and what concerns the whole cluster).";
    "pipeline.*.source", Kind::Location, None, "required", r#""./incoming-data""#,
        "Holds the epoch folders: folders whose names are numbers.";
    "pipeline.*.raw", Kind::Location, None, "required", r#""./lake/raw""#,
        "Delta table with every row that came, by epoch.";
    "pipeline.*.main", Kind::Location, None, "required", r#""./lake/main""#,
        "Delta table with the current row of each key: the one that people read.";
    "pipeline.*.quarantine", Kind::Location, None, "raw's path with `_quarantine`", r#""./lake/quarantine""#,
        "Delta table with refused rows and the reason.";
    "pipeline.*.key", Kind::Names, None, "required", r#"["pguid"]"#,
        "Columns that identify a row (none with mode = \"append\"). Kept in the tables: changing it means rebuilding them.";
    "pipeline.*.mode", Kind::OneOf(&["upsert", "append", "snapshot", "scd2"]), Some(r#""upsert""#), "", r#""scd2""#,
        "What main is: the current row of each key; every row (no key); the rows of the highest epoch; or every version of each key. Kept in the tables.";
    "pipeline.*.format", Kind::OneOf(&["parquet", "delta", "csv", "json"]), Some(r#""parquet""#), "", r#""json""#,
        "Format of the data files; csv and json (an object on each line) also as .gz and .zst; delta: each folder is a Delta table.";
    "pipeline.*.csv.delimiter", Kind::Delimiter, Some(r#"",""#), "", r#"";""#,
        "Between two fields of CSV.";
    "pipeline.*.csv.header", Kind::Flag, Some("true"), "", "false",
        "The first line of a CSV file names its columns; without one they are the declared ones, or c1, c2, …";
    "pipeline.*.csv.null", Kind::Literal, Some("\"\""), "", r#""\\N""#,
        "The text that means NULL in CSV; an empty field, without it.";
    "pipeline.*.select", Kind::Select, None, "rows enter as they come", r#""SELECT id, CAST(price AS DECIMAL(12,2)) AS price FROM incoming WHERE id <> ''""#,
        "SQL over each row as it came: projection, renaming, typing, filter. All else speaks of its result.";
    "pipeline.*.columns", Kind::Columns, None, "columns are as the files have them", r#"{ pguid = "string", amount = "decimal(12,2)" }"#,
        "Declared columns and their types, as [pipeline.NAME.columns]; they stand first. Types: string, boolean, byte, short, int, long, float, double, date, timestamp, timestamp_ntz, binary, decimal(P,S), array<T>, map<K,V>, struct<a:T>.";
    "pipeline.*.on_mismatch", Kind::OneOf(&["fail", "quarantine"]), Some(r#""fail""#), "", r#""quarantine""#,
        "A value that does not fit its column's type, or a line that is no row: blocks its epoch, or its row is refused.";
    "pipeline.*.on_corrupt_file", Kind::OneOf(&["fail", "quarantine"]), Some(r#""fail""#), "", r#""quarantine""#,
        "A file that cannot be read: blocks its epoch, or is named in quarantine while the others land.";
    "pipeline.*.gate.rows_min", Kind::Ratio, None, "no bound; `50%` with mode = \"snapshot\"", r#""50%""#,
        "An epoch with fewer rows, as a share of the median of the ten epochs before it, is held.";
    "pipeline.*.gate.rows_max", Kind::Ratio, None, "no bound", r#""300%""#,
        "An epoch with more rows than this share is held.";
    "pipeline.*.gate.refused_max", Kind::Ratio, None, "no bound", r#""10%""#,
        "An epoch of which a larger share of rows is refused is held.";
    "pipeline.*.partition_by", Kind::Names, None, "main is not partitioned", r#"["country"]"#,
        "Columns that main's folders are named after. Kept in main: changing it means rebuilding main from raw.";
    "pipeline.*.change_feed", Kind::Flag, Some("false"), "", "true",
        "Main tells its changes row by row (Delta's change data feed).";
    "pipeline.*.files.include", Kind::Pattern, None, "all files", r#"".*\\.parquet""#,
        "Only files whose path within the folder matches. Hidden (`_x`, `.x`), empty and `.crc` files never count.";
    "pipeline.*.files.exclude", Kind::Pattern, None, "no files", r#"".*\\.tmp""#,
        "No files whose path within the folder matches.";
    "pipeline.*.ready.quiet", Kind::Duration, None, "`60s`, when no other sign is set", r#""60s""#,
        "A folder is complete when two listings at least this far apart are equal.";
    "pipeline.*.ready.marker", Kind::Text, None, "not used", r#""_SUCCESS""#,
        "A folder is complete when it holds a file of this name.";
    "pipeline.*.ready.manifest", Kind::Text, None, "not used", r#""manifest.json""#,
        "A folder is complete when the files that this JSON file lists are there; only they are read.";
    "pipeline.*.delete_when", Kind::Text, None, "no row is a delete", r#""op = 'D'""#,
        "SQL over the incoming row; true makes it a delete of its key.";
    "pipeline.*.sequence_by", Kind::Text, None, "file name, then position in the file", r#""updated_at""#,
        "Column that orders rows of one key within an epoch; the largest wins, NULL is lowest.";
    "pipeline.*.columns.ignore", Kind::Names, None, "all columns enter main", r#"["op"]"#,
        "Columns that stay in raw and do not enter main. Kept in main: changing it means rebuilding main from raw.";
    "pipeline.*.schema", Kind::OneOf(&["evolve", "freeze", "fail"]), Some(r#""evolve""#), "", r#""fail""#,
        "A column that the tables do not have is added to them, is left out and named, or blocks its epoch.";
    "pipeline.*.on_changed", Kind::OneOf(&["alert", "replay"]), Some(r#""alert""#), "", r#""replay""#,
        "A processed folder whose files changed is an alert, or is read again by itself.";
    "pipeline.*.on_duplicate", Kind::OneOf(&["last", "quarantine", "fail"]), Some(r#""last""#), "", r#""quarantine""#,
        "Rows of an epoch whose key comes again later in it: they stay in raw, are refused, or block the epoch. The last one decides.";
    "pipeline.*.expect", Kind::Expectations, None, "nothing is expected", r#"[{ name = "paid", sql = "amount >= 0", action = "quarantine" }]"#,
        "What must be true of every row (false and NULL are not); also as [[pipeline.NAME.expect]]. Action: `warn` counts, `quarantine` refuses the row, `fail` blocks the epoch.";
    "pipeline.*.order", Kind::OneOf(&["sequential", "arrival"]), Some(r#""sequential""#), "", r#""arrival""#,
        "`sequential`: epoch n+1 merges after n. `arrival`: as they come. The result is the same.";
    "pipeline.*.on_block", Kind::OneOf(&["stop", "continue"]), Some(r#""stop""#), "", r#""continue""#,
        "Whether a blocked epoch stops later merges of its pipeline (sequential order).";
    "pipeline.*.hold_for_earlier", Kind::Duration, Some(r#""0s""#), "", r#""2h""#,
        "How long later epochs wait for a lower folder that is not complete (sequential order).";
    "pipeline.*.start_from", Kind::Number(0, i64::MAX), None, "all epochs", "1700000000",
        "Epochs below this number are not processed.";
    "pipeline.*.adopt", Kind::Flag, Some("false"), "", "true",
        "Build on a main table that exists already: it becomes the base. Needs `start_from`; lower epochs count as done.";
    "pipeline.*.merge.batch_epochs", Kind::Number(1, 1000), Some("100"), "", "20",
        "Most waiting epochs that one merge takes together.";
    "pipeline.*.merge.skip_unchanged", Kind::Flag, Some("false"), "", "true",
        "Rows that are as main has them are left alone: no rewrite, no change in the feed. Costs a comparison with main's rows.";
    "pipeline.*.merge.deletion_vectors", Kind::OneOf(&["auto", "off", "upgrade"]), Some(r#""auto""#), "", r#""off""#,
        "Rows of main that go are marked as deleted where the table knows such marks, as those made here do; `off`: their files are written anew; `upgrade`: a table that does not know them learns them.";
    "pipeline.*.merge.index", Kind::OneOf(&["auto", "always", "off"]), Some(r#""auto""#), "", r#""off""#,
        "A worker keeps an index of the keys of data files in `worker.cache`, so that a merge need not read them: of files that are scanned again (`auto`), or of all.";
    "pipeline.*.merge.batch_bytes", Kind::Size, Some(r#""64MiB""#), "", r#""256MiB""#,
        "Most raw bytes that one merge takes together (a single epoch may be larger). Their keys must fit `memory`.";
    "pipeline.*.optimize.enabled", Kind::Flag, Some("true"), "", "false",
        "Whether small and worn files of main are rewritten into larger ones sorted by key.";
    "pipeline.*.optimize.small_files", Kind::Number(2, MOST), Some("20"), "", "50",
        "So many files below a quarter of the target size, or with a tenth of their rows marked as deleted, make an optimize.";
    "pipeline.*.optimize.cluster_by", Kind::Names, None, "the key", r#"["country", "since"]"#,
        "Optimize orders rows by this column, or by several of them along a Z-order curve, for readers who ask for them.";
    "pipeline.*.optimize.read_cost", Kind::Ratio, Some(r#""225%""#), "", r#""300%""#,
        "A read of main may cost so much of what it costs when all files are new; beyond, files with rows marked as deleted are rewritten, full of them or not.";
    "pipeline.*.optimize.target_file_size", Kind::Size, Some(r#""128MiB""#), "", r#""64MiB""#,
        "Data files of raw and main are cut at about this size.";
    "pipeline.*.optimize.bin_size", Kind::Size, Some(r#""512MiB""#), "", r#""256MiB""#,
        "Most bytes that one optimize commit rewrites (two files at least).";
    "pipeline.*.shard_size", Kind::Size, Some(r#""1GiB""#), "", r#""256MiB""#,
        "An ingest or a merge of more bytes is done in pieces of about this size by all workers that have time, and so are several bins of an optimize.";
    "pipeline.*.schedule", Kind::Text, None, "the source is listed at every poll", r#""0 6 * * MON-FRI""#,
        "Cron expression (minute hour day month weekday, or seconds first): the source is listed at these times only, and when something wakes it.";
    "pipeline.*.timezone", Kind::Text, Some(r#""UTC""#), "", r#""Europe/Berlin""#,
        "Time zone of `schedule` and `alert.arrive_by`, with its daylight saving.";
    "pipeline.*.after", Kind::Names, None, "it follows no other", r#"["orders"]"#,
        "Pipelines after whose merges this one's source is listed at once.";
    "pipeline.*.after_merge.url", Kind::Secret, None, "nothing is called", r#""http://127.0.0.1:9000/refresh""#,
        "Called (POST) with main's new version after a merge, at least once for the newest one.";
    "pipeline.*.after_merge.command", Kind::Names, None, "nothing is called", r#"["./refresh-cache", "--all"]"#,
        "The same as a program, which gets the JSON on stdin; it starts in the coordinator's folder.";
    "pipeline.*.after_merge.deadline", Kind::Duration, Some(r#""60s""#), "", r#""10m""#,
        "After so long the call counts as failed; it is made again, and somebody is told.";
    "pipeline.*.alert.lag", Kind::Duration, None, "no alert", r#""2h""#,
        "An epoch that is complete and not in main for so long is an alert.";
    "pipeline.*.alert.no_arrival", Kind::Duration, None, "no alert", r#""26h""#,
        "Nothing new for so long is an alert.";
    "pipeline.*.alert.arrive_by", Kind::Text, None, "no alert", r#""06:30""#,
        "Nothing new on a day by this time (of `timezone`) is an alert.";
    "pipeline.*.alert.incomplete", Kind::Duration, Some(r#""24h""#), "", r#""2h""#,
        "A folder that is not complete for so long is an alert.";
    "pipeline.*.alert.quarantine_share", Kind::Percent, Some(r#""5%""#), "", r#""0.5%""#,
        "An epoch of which more rows are refused is an alert.";
    "pipeline.*.cleanup.enabled", Kind::Flag, Some("true"), "", "false",
        "Whether files that nothing refers to any more are deleted.";
    "pipeline.*.cleanup.every", Kind::Duration, Some(r#""24h""#), "", r#""7d""#,
        "Pause between two cleanups.";
    "pipeline.*.cleanup.retention", Kind::Duration, Some(r#""168h""#), "", r#""30d""#,
        "Age after which unreferenced files go: readers of older versions need them so long.";
}

impl Kind {
    /// Checks a value; Err says what was expected.
    pub(crate) fn check(self, value: &toml::Value) -> Result<(), String> {
        let found = || match value {
            _ if self == Self::Secret => "found something else".to_owned(),
            toml::Value::String(text) => format!("found {text:?}"),
            other => format!("found {other}"),
        };
        let expected = |what: &str| Err(format!("expected {what}; {}", found()));
        match self {
            // Only a shell knows it: a folder of this name would be made.
            Self::Location if value.as_str().is_some_and(|text| text.starts_with("~")) => {
                expected("a path without `~`; \"${HOME}/…\" is understood")
            }
            Self::Text | Self::Secret | Self::Location => match value.as_str() {
                Some(text) if !text.is_empty() => Ok(()),
                Some(_) => Err("expected a text in quotes that is not empty".to_owned()),
                None => expected("a text in quotes"),
            },
            Self::Literal => match value.as_str() {
                Some(_) => Ok(()),
                None => expected("a text in quotes"),
            },
            Self::Percent => match value.as_str().and_then(share_of) {
                Some(_) => Ok(()),
                None => expected("a percentage such as \"0.5%\""),
            },
            Self::Ratio => match value.as_str().and_then(ratio_of) {
                Some(_) => Ok(()),
                None => expected("a percentage such as \"50%\" or \"300%\""),
            },
            Self::Delimiter => match value.as_str().map(str::as_bytes) {
                Some([byte]) if byte.is_ascii() && !matches!(byte, b'\n' | b'\r' | b'"') => Ok(()),
                _ => expected("one ASCII character such as \";\" or \"\\t\""),
            },
            Self::Select => match value.as_str() {
                Some(text) => check_select(text).map(drop),
                None => expected("SQL in quotes"),
            },
            Self::Columns => match value.as_table() {
                Some(_) => Ok(()),
                None => expected("columns and types such as { amount = \"decimal(12,2)\" }"),
            },
            Self::Address => match value.as_str().map(str::parse::<std::net::SocketAddr>) {
                Some(Ok(_)) => Ok(()),
                _ => expected("ADDRESS:PORT such as \"127.0.0.1:8460\""),
            },
            Self::Pattern => match value.as_str().map(regex::Regex::new) {
                Some(Ok(_)) => Ok(()),
                Some(Err(error)) => Err(format!("not a regular expression: {error}")),
                None => expected("a regular expression in quotes"),
            },
            Self::Number(least, most) => match value.as_integer() {
                Some(number) if (least..=most).contains(&number) => Ok(()),
                _ if most == i64::MAX => expected(&format!("a whole number from {least}")),
                _ => expected(&format!("a whole number from {least} to {most}")),
            },
            Self::Flag => value.as_bool().map_or_else(|| expected("true or false"), |_| Ok(())),
            Self::Duration => match value.as_str().and_then(duration_of) {
                Some(_) => Ok(()),
                None => expected("a duration such as \"60s\", \"5m\", \"12h\" or \"7d\""),
            },
            Self::Size => match value.as_str().and_then(bytes_of) {
                Some(_) => Ok(()),
                None => expected("a size such as \"64KiB\", \"128MiB\" or \"2GiB\""),
            },
            Self::Expectations => expectations(value).map(drop),
            Self::Names => {
                let names = value.as_array().map(|list| {
                    !list.is_empty()
                        && list.iter().all(|name| name.as_str().is_some_and(|n| !n.is_empty()))
                });
                if names == Some(true) {
                    Ok(())
                } else {
                    expected("a list of texts that are not empty, such as [\"id\", \"site\"]")
                }
            }
            Self::OneOf(words) => match value.as_str() {
                Some(word) if words.contains(&word) => Ok(()),
                _ => {
                    let list: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                    expected(&list.join(" or "))
                }
            },
        }
    }
}

/// What is wrong with declared columns: name and text.
pub(crate) fn column_problems(columns: &toml::Table) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for (name, kind) in columns {
        let wrong = match kind.as_str() {
            Some(kind) => parse_type(kind).err(),
            None => Some("expected a type in quotes, such as \"decimal(12,2)\"".to_owned()),
        };
        let is_again = seen.contains(&name.to_lowercase());
        let again = is_again.then(|| "it stands there twice (case does not count)".to_owned());
        problems.extend(wrong.or(again).map(|text| (name.clone(), text)));
        seen.push(name.to_lowercase());
    }
    problems
}

/// Declared columns, in their order.
pub(crate) fn declared(value: &toml::Value) -> Vec<Declared> {
    let columns = value.as_table().into_iter().flatten();
    let column = |(name, kind): (&String, &toml::Value)| {
        Some(Declared { name: name.clone(), kind: kind.as_str()?.to_owned() })
    };
    columns.filter_map(column).collect()
}

/// Reads a list of expectations; Err says what was expected.
pub(crate) fn expectations(value: &toml::Value) -> Result<Vec<Expectation>, String> {
    let example = r#"{ name = "paid", sql = "amount >= 0", action = "quarantine" }"#;
    let list =
        value.as_array().ok_or_else(|| format!("expected a list of tables such as {example}"))?;
    let mut found: Vec<Expectation> = Vec::new();
    for item in list {
        let keys = item.as_table().into_iter().flat_map(|table| table.keys());
        if let Some(key) =
            keys.into_iter().find(|key| !["name", "sql", "action"].contains(&key.as_str()))
        {
            return Err(format!(
                "unknown setting {key:?}; an expectation has name, sql and action"
            ));
        }
        let item: Expectation = item.clone().try_into().map_err(|error: toml::de::Error| {
            format!("{}; expected a table such as {example}", error.message())
        })?;
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if item.name.is_empty() || !item.name.chars().all(is_name) {
            return Err(format!("{:?} is no name: lower-case letters, digits and _", item.name));
        }
        if found.iter().any(|known| known.name == item.name) {
            return Err(format!("two expectations are called {:?}", item.name));
        }
        check_expression(&item.sql).map_err(|error| format!("{}: {}", item.name, error.message))?;
        found.push(item);
    }
    Ok(found)
}

/// The setting that stands for a path such as `pipeline.orders.key`.
pub(crate) fn find(path: &[String]) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| matches(setting.path, path, false))
}

/// The path leads to a table that holds settings.
pub(crate) fn is_section(path: &[String]) -> bool {
    SETTINGS.iter().any(|setting| matches(setting.path, path, true))
}

fn matches(pattern: &str, path: &[String], only_start: bool) -> bool {
    let parts: Vec<&str> = pattern.split('.').collect();
    let fits = parts.iter().zip(path).all(|(part, name)| *part == "*" || part == name);
    fits && if only_start { path.len() < parts.len() } else { path.len() == parts.len() }
}

/// Names that could follow a path, for suggestions.
pub(crate) fn siblings(path: &[String]) -> Vec<&'static str> {
    let mut names: Vec<&str> = SETTINGS
        .iter()
        .filter(|setting| matches(setting.path, path, true))
        .filter_map(|setting| setting.path.split('.').nth(path.len()))
        .filter(|name| *name != "*")
        .collect();
    names.dedup();
    names
}
