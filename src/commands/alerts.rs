//! `alluvium alerts list | kinds | test`: open incidents, and whether a sink takes what it is sent.

use std::path::Path;

use alluvium_coordinator::alerts::incidents::Incidents;
use alluvium_coordinator::alerts::keeper::read;
use alluvium_coordinator::alerts::{Change, Event, Incident, Kind};
use alluvium_protocol::{Code, Error, Result};
use chrono::Utc;
use serde_json::json;
use uuid::Uuid;

use crate::cli::{AlertsVerb, Output};
use crate::config::{self, Config};
use crate::printer::{self, Exit};

/// Carries out `alerts`.
pub(crate) async fn alerts(file: Option<&Path>, verb: &AlertsVerb) -> Result<Exit> {
    match verb {
        AlertsVerb::Kinds { output } => kinds(output.output),
        AlertsVerb::List { output } => list(&config::load(file)?, output.output).await,
        AlertsVerb::Test { sink } => test(&config::load(file)?, sink).await,
    }
}

fn kinds(output: Output) -> Result<Exit> {
    let items: Vec<_> = Kind::ALL
        .iter()
        .map(|kind| {
            json!({"kind": kind.as_str(), "severity": kind.severity().as_str(), "when": kind.title()})
        })
        .collect();
    printer::items(output, "alert-kinds", &items, &["kind", "severity", "when"])?;
    Ok(Exit::Ok)
}

async fn list(config: &Config, output: Output) -> Result<Exit> {
    let stored = read(&config.state).await?;
    let Incidents { open, .. } = &stored.incidents;
    let items: Vec<_> = open
        .iter()
        .map(|incident| {
            let waiting = stored.outbox.iter().filter(|pending| {
                pending.events.iter().any(|event| event.incident.id == incident.id)
            });
            let waiting: Vec<&str> = waiting.map(|pending| pending.sink.as_str()).collect();
            let concerns: Vec<&str> = incident.subjects.keys().map(String::as_str).collect();
            json!({
                "since": incident.opened_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                "kind": incident.kind.as_str(),
                "severity": incident.kind.severity().as_str(),
                "pipeline": incident.pipeline,
                "concerns": concerns.join(", "),
                "not sent to": waiting.join(", "),
                "help": incident.help,
            })
        })
        .collect();
    if config.sinks.is_empty() {
        printer::warn("no [alert.NAME] is configured: nobody is told, and nothing is kept here");
    }
    if items.is_empty() && output == Output::Table {
        printer::say("no incident is open");
    } else {
        let head = ["since", "kind", "severity", "pipeline", "concerns", "not sent to"];
        printer::items(output, "alerts", &items, &head)?;
    }
    for pending in stored.outbox.iter().filter(|pending| pending.error.is_some()) {
        let error = pending.error.as_deref().unwrap_or_default();
        printer::warn(&format!("{} did not take an alert: {error}", pending.sink));
    }
    Ok(Exit::Ok)
}

async fn test(config: &Config, name: &str) -> Result<Exit> {
    let Some(sink) = config.sinks.iter().find(|sink| sink.name == name) else {
        let known: Vec<&str> = config.sinks.iter().map(|sink| sink.name.as_str()).collect();
        let text = format!("{} has no [alert.{name}]", config.file.display());
        let help = if known.is_empty() {
            "`alluvium config reference` shows how one looks".to_owned()
        } else {
            format!("there are: {}", known.join(", "))
        };
        return Err(Error::new(Code::NotPossibleNow, text).with_help(help));
    };
    let now = Utc::now();
    let incident = Incident {
        id: Uuid::new_v4().to_string(),
        kind: Kind::Blocked,
        pipeline: String::new(),
        opened_at: now,
        told_at: now,
        subjects: [("test".to_owned(), "sent by `alluvium alerts test`".to_owned())].into(),
        told: Vec::new(),
        help: "nothing is to be done".to_owned(),
    };
    let test = Event { id: Uuid::new_v4().to_string(), change: Change::Test, at: now, incident };
    let mut events = vec![test];
    let answer = sink.send(&events, &config.source()).await.map_err(|refusal| refusal.error)?;
    printer::say(&format!("{name} took it: {answer}"));
    // A pager would ring on.
    if let Some(event) = events.first_mut() {
        event.change = Change::Resolved;
    }
    if sink.kind == alluvium_coordinator::alerts::sinks::SinkKind::PagerDuty {
        sink.send(&events, &config.source()).await.map_err(|refusal| refusal.error)?;
    }
    Ok(Exit::Ok)
}
