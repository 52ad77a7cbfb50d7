//! What concerns watching: `[alert.*]`, `[notify]`, and the wishes of pipelines beside their data.

use std::collections::BTreeMap;
use std::time::Duration;

use alluvium_coordinator::alerts::Kind;
use alluvium_coordinator::alerts::sinks::{
    Sink, SinkKind, check_address, check_mail_url, check_url,
};
use alluvium_coordinator::hooks::{Call, Hook};
use alluvium_coordinator::policy::Policy;
use alluvium_coordinator::triggers::Schedule;
use chrono::NaiveTime;
use chrono_tz::Tz;
use toml::Value;

use super::Problem;
use super::build::Source;
use super::value::{duration_of, share_of};

/// Who may notify of new objects, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notify {
    /// What a webhook shows.
    pub(crate) token: Option<String>,
    /// Topics of SNS.
    pub(crate) topics: Vec<String>,
    /// A queue of RabbitMQ.
    pub(crate) queue: Option<String>,
}

/// The values of one named section.
struct Section<'a> {
    source: &'a Source,
    kind: &'static str,
    name: &'a str,
}

impl Section<'_> {
    fn get(&self, key: &str) -> Option<Value> {
        let Self { kind, name, .. } = self;
        self.source.value(&format!("{kind}.{name}.{key}"), &format!("{kind}.*.{key}"))
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key)?.as_str().map(str::to_owned)
    }

    fn list(&self, key: &str) -> Vec<String> {
        list_of(self.get(key))
    }

    fn duration(&self, key: &str) -> Option<Duration> {
        duration_of(&self.text(key)?)
    }

    fn problem(&self, key: &str, text: impl Into<String>) -> Problem {
        Problem { path: format!("{}.{}.{key}", self.kind, self.name), text: text.into() }
    }
}

fn list_of(value: Option<Value>) -> Vec<String> {
    let list = value.and_then(|value| value.as_array().cloned()).unwrap_or_default();
    list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

pub(super) fn notify(source: &Source) -> Notify {
    Notify {
        token: source.text("notify.token"),
        topics: list_of(source.value("notify.topics", "notify.topics")),
        queue: source.text("notify.queue"),
    }
}

/// The configured sinks.
pub(super) fn sinks(
    source: &Source,
    pipelines: &[String],
    problems: &mut Vec<Problem>,
) -> Vec<Sink> {
    let mut sinks = Vec::new();
    for name in &source.alerts {
        let section = Section { source, kind: "alert", name };
        sinks.extend(sink(&section, pipelines, problems));
    }
    sinks
}

fn sink(section: &Section<'_>, pipelines: &[String], problems: &mut Vec<Problem>) -> Option<Sink> {
    let kind = match section.text("type").as_deref() {
        Some("log") => SinkKind::Log,
        Some("webhook") => SinkKind::Webhook,
        Some("slack") => SinkKind::Slack,
        Some("teams") => SinkKind::Teams,
        Some("pagerduty") => SinkKind::PagerDuty,
        Some("email") => SinkKind::Email,
        // A wrong word is told by the setting's kind.
        Some(_) => return None,
        None => {
            problems.push(section.problem("type", "required; for example `type = \"slack\"`"));
            return None;
        }
    };
    let url = section.text("url").unwrap_or_default();
    // A variable that is not set is told already.
    let is_told = problems.iter().any(|problem| problem.path == section.problem("url", "").path);
    match kind {
        SinkKind::Log => {}
        _ if is_told => {}
        SinkKind::PagerDuty if url.is_empty() => {}
        SinkKind::Email => {
            if !["smtp://", "smtps://"].iter().any(|scheme| url.starts_with(scheme)) {
                let text = "required: smtp://USER:PASSWORD@HOST:587?tls=required, or smtps://…";
                problems.push(section.problem("url", text));
            }
            if let Err(text) = check_mail_url(&url) {
                problems.push(section.problem("url", text));
            }
            let from: Vec<String> = section.text("from").into_iter().collect();
            for (key, addresses) in [("from", from), ("to", section.list("to"))] {
                if addresses.is_empty() {
                    problems.push(section.problem(key, "required for email"));
                }
                let wrong = addresses.iter().filter_map(|text| check_address(text).err());
                problems.extend(wrong.map(|text| section.problem(key, text)));
            }
        }
        _ => {
            let checked = match url.is_empty() {
                true => Err("required: where the alerts go".to_owned()),
                false => check_url(&url),
            };
            problems.extend(checked.err().map(|text| section.problem("url", text)));
        }
    }
    if kind == SinkKind::PagerDuty && section.get("key").is_none() {
        problems.push(section.problem("key", "required: the routing key of the service"));
    }
    let words = section.list("kinds");
    let find = |word: &String| Kind::ALL.iter().copied().find(|kind| kind.as_str() == word);
    for word in words.iter().filter(|word| find(word).is_none()) {
        let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
        let text = format!("no kind {word:?}; there are {}", known.join(", "));
        problems.push(section.problem("kinds", text));
    }
    let only = section.list("pipelines");
    for name in only.iter().filter(|name| !pipelines.contains(name)) {
        problems.push(section.problem("pipelines", format!("there is no pipeline {name:?}")));
    }
    Some(Sink {
        name: section.name.to_owned(),
        kind,
        url,
        key: section.text("key"),
        from: section.text("from").unwrap_or_default(),
        to: section.list("to"),
        kinds: words.iter().filter_map(find).collect(),
        pipelines: only,
    })
}

/// What teams want of their pipelines.
pub(super) fn policies(
    source: &Source,
    names: &[String],
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, Policy> {
    let mut policies = BTreeMap::new();
    for name in names {
        let section = Section { source, kind: "pipeline", name };
        policies.insert(name.clone(), policy(&section, names, problems));
    }
    policies
}

fn policy(section: &Section<'_>, names: &[String], problems: &mut Vec<Problem>) -> Policy {
    let zone = section.text("timezone").unwrap_or_default();
    for key in ["alert.lag", "alert.no_arrival", "alert.incomplete", "after_merge.deadline"] {
        if section.duration(key).is_some_and(|limit| limit.is_zero()) {
            problems.push(
                section.problem(key, "expected more than no time; leave it out for no limit"),
            );
        }
    }
    let timezone = zone.parse::<Tz>().unwrap_or_else(|_| {
        let text = format!("no time zone {zone:?}; expected a name such as \"Europe/Berlin\"");
        problems.push(section.problem("timezone", text));
        Tz::UTC
    });
    let schedule = section.text("schedule").and_then(|text| {
        let parsed = Schedule::parse(&text, timezone);
        parsed.map_err(|why| problems.push(section.problem("schedule", why))).ok()
    });
    let after = section.list("after");
    for other in &after {
        if other == section.name {
            problems.push(section.problem("after", "a pipeline cannot follow itself"));
        } else if !names.contains(other) {
            problems.push(section.problem("after", format!("there is no pipeline {other:?}")));
        }
    }
    let arrive_by = section.text("alert.arrive_by").and_then(|text| {
        let parsed = NaiveTime::parse_from_str(&text, "%H:%M");
        let told = |_| {
            problems.push(section.problem("alert.arrive_by", "expected a time such as \"06:30\""))
        };
        parsed.map_err(told).ok()
    });
    Policy {
        schedule,
        after,
        hook: hook(section, problems),
        lag: section.duration("alert.lag"),
        no_arrival: section.duration("alert.no_arrival"),
        arrive_by,
        timezone,
        incomplete: section.duration("alert.incomplete"),
        replay_changed: section.text("on_changed").as_deref() == Some("replay"),
        quarantine_share: section.text("alert.quarantine_share").as_deref().and_then(share_of),
    }
}

fn hook(section: &Section<'_>, problems: &mut Vec<Problem>) -> Option<Hook> {
    let (url, command) = (section.text("after_merge.url"), section.list("after_merge.command"));
    let call = match (url, command.is_empty()) {
        (None, true) => {
            if section.source.leaves.contains_key(&section.problem("after_merge.deadline", "").path)
            {
                let text = "it calls nobody: set after_merge.url or after_merge.command";
                problems.push(section.problem("after_merge", text));
            }
            return None;
        }
        (Some(_), false) => {
            problems.push(section.problem("after_merge", "either url or command, not both"));
            return None;
        }
        (Some(url), true) => {
            if let Err(text) = check_url(&url) {
                problems.push(section.problem("after_merge.url", text));
            }
            Call::Url(url)
        }
        (None, false) => Call::Command(command),
    };
    let deadline = section.duration("after_merge.deadline").unwrap_or(Duration::from_secs(60));
    Some(Hook { call, deadline })
}
