//! `alluvium doctor`: everything that this configuration needs, checked, with what to do about it.

use std::path::Path;
use std::time::Instant;

use alluvium_protocol::queue::Queue;
use alluvium_protocol::queue::rabbit::hello;
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::Table;
use alluvium_table::keys::cache;
use alluvium_table::race::race;
use chrono::Utc;
use serde_json::{Value, json};

use super::tables::size;
use crate::cli::Output;
use crate::client;
use crate::cluster::{Services, storage_roots};
use crate::config::cluster::Cluster;
use crate::config::{self, Config};
use crate::printer::{self, Exit};

/// Clocks that differ by more make waits and retention hard to read.
const SKEW_MAX_SECONDS: f64 = 5.0;
/// How long an alarm may take to be told.
const ALARM_PATIENCE: std::time::Duration = std::time::Duration::from_millis(300);
/// Commits of a table that are looked at.
const COMMITS_MAX: i64 = 100;
/// The first RabbitMQ on which a queue can say how long a task may take.
const TIMEOUT_BY_QUEUE: (u32, u32) = (3, 12);

/// One thing that was checked.
struct Finding {
    what: String,
    verdict: Outcome,
    text: String,
}

enum Outcome {
    Good,
    Look(String),
    Bad(Box<Error>),
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn good(&mut self, what: impl Into<String>, text: impl Into<String>) {
        self.0.push(Finding { what: what.into(), verdict: Outcome::Good, text: text.into() });
    }

    fn look(&mut self, what: impl Into<String>, text: impl Into<String>, help: &str) {
        let verdict = Outcome::Look(help.to_owned());
        self.0.push(Finding { what: what.into(), verdict, text: text.into() });
    }

    fn bad(&mut self, what: impl Into<String>, error: Error) {
        let text = error.message.clone();
        self.0.push(Finding { what: what.into(), verdict: Outcome::Bad(Box::new(error)), text });
    }
}

/// Carries out `doctor`. Exit 0: nothing is wrong; 2 configuration; 4 a dependency; 3 anything else.
pub(crate) async fn doctor(file: Option<&Path>, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    let mut findings = Findings::default();
    let pipelines = config.pipelines.len();
    findings.good("configuration", format!("{}, {pipelines} pipeline(s)", config.file.display()));
    for uri in storage_roots(&config) {
        let what = format!("storage of {uri}");
        match race(&uri).await {
            Ok(()) => findings.good(what, "of 8 writers at once exactly one wins, 5 times"),
            Err(error) => findings.bad(what, error),
        }
    }
    check_cache(&config, &mut findings);
    if let Some(cluster) = &config.cluster {
        check_cluster(&config, cluster, &mut findings).await;
    }
    for pipeline in &config.pipelines {
        check_source(pipeline, &mut findings).await;
        for (name, uri) in [("raw", &pipeline.raw), ("main", &pipeline.main)] {
            check_table(pipeline, name, uri, &mut findings).await;
        }
    }
    print(&findings, output)
}

fn check_cache(config: &Config, findings: &mut Findings) {
    let Some(folder) = &config.cache else { return };
    let what = format!("indexes of keys in {}", folder.display());
    match cache::keep(folder, config.cache_size) {
        Ok(()) => {
            let (held, most) = (cache::bytes_in(folder), config.cache_size);
            findings.good(what, format!("{} of {} at most", size(held), size(most)));
        }
        Err(error) => findings.look(
            what,
            error.to_string(),
            "set `worker.cache` to a folder that only this user may write to: without indexes each merge reads keys",
        ),
    }
}

async fn check_cluster(config: &Config, cluster: &Cluster, findings: &mut Findings) {
    check_broker(cluster, findings).await;
    let services = match Services::of(cluster, "doctor") {
        Ok(services) => services,
        Err(error) => return findings.bad("cluster", error),
    };
    match services.queue.check().await {
        Ok(()) => {
            // An alarm is told right after a connection is made.
            tokio::time::sleep(ALARM_PATIENCE).await;
            match services.queue.health().publishing.blocked {
                Some(reason) => findings.bad(
                    "queues",
                    Error::new(Code::QueueFailed, format!("RabbitMQ takes no messages: {reason}"))
                        .with_help(
                            "free memory or disk of the broker: `rabbitmq-diagnostics alarms`",
                        ),
                ),
                None => findings.good("queues", format!("{}.v1.*, declared", cluster.name)),
            }
        }
        Err(error) => findings.bad("queues", error),
    }
    match services.queue.dead().await {
        Ok(0) => findings.good("dead letters", "none"),
        Ok(count) => findings.look(
            "dead letters",
            format!("{count} message(s) in {}.v1.dead", cluster.name),
            "they were delivered too often; their tasks were published again. Purge the queue after a look",
        ),
        // Told above.
        Err(_) => {}
    }
    check_redis(&services, findings).await;
    match client::items(config, "queues", &[]).await {
        Ok(Some(_)) => findings.good("coordinator", format!("answers at {}", cluster.api)),
        Ok(None) => findings.look(
            "coordinator",
            format!("none answers at {}", cluster.api),
            "start one: `alluvium coordinator`",
        ),
        Err(error) => findings.look("coordinator", error.message, "`alluvium explain AL-0507`"),
    }
    let living = services.leases.beats().await.unwrap_or_default();
    let workers = living.iter().filter(|process| process.role == "worker").count();
    match workers {
        0 => findings.look("workers", "none is alive", "start one: `alluvium worker`"),
        count => findings.good("workers", format!("{count} alive")),
    }
    services.queue.close();
}

async fn check_broker(cluster: &Cluster, findings: &mut Findings) {
    let version = match hello::version(&cluster.amqp).await {
        Ok(version) => version,
        Err(error) => {
            let help = "check `amqp` in [cluster], and that RabbitMQ runs";
            return findings.bad("RabbitMQ", error.with_help(help));
        }
    };
    let Some(version) = version else {
        return findings.look(
            "RabbitMQ",
            "its version is not known over TLS",
            "3.12 or newer is needed for tasks above 30 minutes",
        );
    };
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let pair = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if pair < TIMEOUT_BY_QUEUE {
        findings.look(
            "RabbitMQ",
            format!("{version}: takes tasks back after `consumer_timeout` of rabbitmq.conf, 30 minutes by default"),
            "use 3.12 or newer; or set `consumer_timeout = 64800000` in rabbitmq.conf. A task that is taken back runs twice at most",
        );
    } else {
        findings.good("RabbitMQ", version);
    }
    check_policies(cluster, findings).await;
}

/// A policy can turn at-least-once dead letters into at-most-once ones, and shorten the time of tasks.
async fn check_policies(cluster: &Cluster, findings: &mut Findings) {
    let what = "policies of RabbitMQ";
    let Ok(url) = reqwest::Url::parse(&cluster.amqp) else { return };
    let host = url.host_str().unwrap_or_default();
    let vhost = match url.path().trim_start_matches('/') {
        "" => "%2F",
        vhost => vhost,
    };
    let asked = format!("http://{host}:15672/api/queues/{vhost}");
    let decoded = |text: &str| percent_decoded(text);
    let found = async {
        let client = reqwest::Client::builder()
            .timeout(std::time::Duration::from_secs(3))
            .no_proxy()
            .build()?;
        let user = decoded(url.username());
        let password = url.password().map(decoded);
        let response = client.get(&asked).basic_auth(user, password).send().await?;
        response.error_for_status()?.json::<Vec<Value>>().await
    };
    let queues = match found.await {
        Ok(queues) => queues,
        Err(_) => {
            return findings.look(
                what,
                format!("not checked: no management API at {host}:15672"),
                "a policy must not set `overflow` or `delivery-limit` for our queues; `rabbitmqctl list_policies`",
            );
        }
    };
    let prefix = format!("{}.v1.", cluster.name);
    let ours = queues.iter().filter(|q| q["name"].as_str().is_some_and(|n| n.starts_with(&prefix)));
    let mut is_good = true;
    for queue in ours {
        let policy = &queue["effective_policy_definition"];
        for key in [
            "overflow",
            "delivery-limit",
            "message-ttl",
            "expires",
            "max-length",
            "consumer-timeout",
        ] {
            if !policy[key].is_null() {
                is_good = false;
                findings.look(
                    what,
                    format!(
                        "{} sets {key} = {} for {}",
                        queue["policy"], policy[key], queue["name"]
                    ),
                    "exclude our queues from it, unless you mean it",
                );
            }
        }
    }
    if is_good {
        findings.good(what, "none changes our queues");
    }
}

fn percent_decoded(text: &str) -> String {
    // The URL type encodes; a query pair is decoded by it, too.
    reqwest::Url::parse(&format!("x:/?{}", text.replace('+', "%2B").replace('&', "%26")))
        .ok()
        .and_then(|url| url.query_pairs().next().map(|(name, _)| name.into_owned()))
        .unwrap_or_else(|| text.to_owned())
}

async fn check_redis(services: &Services, findings: &mut Findings) {
    let began = Instant::now();
    match services.leases.time().await {
        Ok(theirs) => {
            let took = began.elapsed();
            findings.good("Redis", format!("answers in {:.1} ms", took.as_secs_f64() * 1000.0));
            let skew = (Utc::now() - theirs).num_milliseconds() as f64 / 1000.0;
            if skew.abs() > SKEW_MAX_SECONDS {
                findings.look(
                    "clock",
                    format!("differs from Redis' by {skew:.1} s"),
                    "let NTP set both; nothing is decided by clocks, but waits and times are hard to read",
                );
            } else {
                findings.good("clock", format!("within {:.1} s of Redis'", skew.abs()));
            }
        }
        Err(error) => {
            findings.bad(
                "Redis",
                error.with_help("check `redis` in [cluster]; work goes on without it"),
            );
        }
    }
}

async fn check_source(pipeline: &Pipeline, findings: &mut Findings) {
    let what = format!("source of {}", pipeline.id);
    let listed = match alluvium_coordinator::discovery::Source::open(pipeline) {
        Ok(source) => source.list().await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(listing) if listing.folders.is_empty() => findings.look(
            what,
            format!("{} holds no epoch folder", pipeline.source),
            "epoch folders are folders whose names are numbers",
        ),
        Ok(listing) => findings.good(what, format!("{} epoch folder(s)", listing.folders.len())),
        Err(error) => findings.bad(what, error),
    }
}

async fn check_table(pipeline: &Pipeline, name: &str, uri: &str, findings: &mut Findings) {
    let what = format!("{name} of {}", pipeline.id);
    let table = match Table::open(uri).await {
        Ok(Some(table)) => table,
        Ok(None) => return findings.good(what, "not there yet; the first epoch makes it"),
        Err(error) => return findings.bad(what, error),
    };
    if let Err(error) = table.check_settings(pipeline).and_then(|()| table.check_writable(true)) {
        return findings.bad(what, error);
    }
    let version = table.version();
    let history = match table.history(version - COMMITS_MAX).await {
        Ok(history) => history,
        Err(error) => return findings.bad(what, error),
    };
    // What the library commits for us carries no marker: the table's making, and new columns.
    let foreign = history.iter().find(|commit| {
        commit.info.is_null()
            && !commit.markers.iter().any(|(app, _)| app.starts_with("alluvium/"))
            && !["CREATE TABLE", "ADD COLUMN"].contains(&commit.operation.as_str())
    });
    match foreign {
        Some(commit) if !(pipeline.adopt && commit.version == 0) => findings.look(
            what,
            format!(
                "version {} is not ours: {} by {}",
                commit.version, commit.operation, commit.engine
            ),
            "let nothing else write raw and main: another writer's commit is not in any epoch",
        ),
        _ => findings.good(what, format!("version {version}, can be written")),
    }
}

fn print(findings: &Findings, output: Output) -> Result<Exit> {
    let word = |outcome: &Outcome| match outcome {
        Outcome::Good => "ok",
        Outcome::Look(_) => "look",
        Outcome::Bad(_) => "BAD",
    };
    let help = |outcome: &Outcome| match outcome {
        Outcome::Good => None,
        Outcome::Look(help) => Some(help.clone()),
        Outcome::Bad(error) => {
            Some(error.help.clone().unwrap_or_else(|| format!("`alluvium explain {}`", error.code)))
        }
    };
    match output {
        Output::Json => {
            let items: Vec<Value> = findings
                .0
                .iter()
                .map(|f| {
                    let code = match &f.verdict {
                        Outcome::Bad(error) => Some(error.code),
                        _ => None,
                    };
                    json!({"what": f.what, "verdict": word(&f.verdict).to_lowercase(), "text": f.text,
                           "help": help(&f.verdict), "code": code})
                })
                .collect();
            printer::json_items("doctor", &items)?;
        }
        Output::Table => {
            let rows = findings
                .0
                .iter()
                .map(|f| vec![word(&f.verdict).to_owned(), f.what.clone(), f.text.clone()]);
            printer::table(&["", "what", "found"], rows.collect());
            for finding in &findings.0 {
                if let Some(help) = help(&finding.verdict) {
                    printer::say(&format!("{}: {help}", finding.what));
                }
            }
        }
    }
    let worst = findings.0.iter().filter_map(|finding| match &finding.verdict {
        Outcome::Bad(error) => Some(error.code),
        _ => None,
    });
    Ok(match worst.map(printer::exit_of).next() {
        None => Exit::Ok,
        Some(Exit::Unreachable) => Exit::Unreachable,
        Some(Exit::Usage) => Exit::Usage,
        Some(_) => Exit::Unhealthy,
    })
}
