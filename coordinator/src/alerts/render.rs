//! How events look in each sink: pure functions from events to bodies.
//!
//! Formats: CloudEvents 1.0 (structured JSON), Slack blocks, Teams adaptive cards over Workflows,
//! PagerDuty Events API v2.

use serde_json::{Value, json};

use super::{Change, Event, Incident};

/// Subjects named in one message; the rest is a number.
const SHOWN: usize = 10;
/// Slack's limit for a section is 3,000 characters, PagerDuty's for a summary 1,024.
const SECTION_MAX: usize = 2800;
const SUMMARY_MAX: usize = 1000;

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// One line of several events.
pub(super) fn summary(events: &[Event]) -> String {
    match events {
        [one] => one.title(),
        many => format!(
            "{} and {} more",
            many.first().map(Event::title).unwrap_or_default(),
            many.len().saturating_sub(1)
        ),
    }
}

/// The lines below an event's title.
pub(super) fn lines(event: &Event) -> Vec<String> {
    let Incident { subjects, help, opened_at, .. } = &event.incident;
    if event.change == Change::Resolved {
        let minutes = (event.at - *opened_at).num_minutes();
        return vec![format!(
            "it began {} ({minutes} min)",
            opened_at.format("%Y-%m-%d %H:%M UTC")
        )];
    }
    let mut lines: Vec<String> =
        subjects.iter().take(SHOWN).map(|(name, text)| format!("{name}: {text}")).collect();
    if subjects.len() > SHOWN {
        lines.push(format!("and {} more", subjects.len() - SHOWN));
    }
    if !help.is_empty() {
        lines.push(format!("→ {help}"));
    }
    lines
}

/// Everything as plain text.
pub(super) fn text(events: &[Event]) -> String {
    let parts: Vec<String> = events
        .iter()
        .map(|event| format!("{}\n{}", event.title(), lines(event).join("\n")))
        .collect();
    parts.join("\n\n")
}

/// A CloudEvent. `source` names this installation.
pub(super) fn cloud_event(event: &Event, source: &str) -> Value {
    let Incident { id, kind, pipeline, opened_at, subjects, help, .. } = &event.incident;
    json!({
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": format!("io.alluvium.alert.{}.v1", event.change.as_str()),
        "time": event.at.to_rfc3339(),
        "subject": format!("{}/{}", kind.as_str(), pipeline),
        "datacontenttype": "application/json",
        "data": {
            "incident": id,
            "kind": kind.as_str(),
            "severity": kind.severity().as_str(),
            "title": event.title(),
            "pipeline": pipeline,
            "opened_at": opened_at.to_rfc3339(),
            "resolved": event.change == Change::Resolved,
            "subjects": subjects,
            "help": help,
        },
    })
}

/// Slack's blocks.
pub(super) fn slack(events: &[Event]) -> Value {
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let mut blocks = Vec::new();
    for event in events.iter().take(20) {
        let mark = match event.change {
            Change::Resolved => ":white_check_mark:",
            Change::Test => ":wave:",
            Change::Opened | Change::Grew => match event.incident.kind.severity() {
                super::Severity::Critical => ":red_circle:",
                super::Severity::Warning => ":warning:",
            },
        };
        let body = escape(&lines(event).join("\n"));
        let text = format!("{mark} *{}*\n{}", escape(&event.title()), cut(&body, SECTION_MAX));
        blocks.push(json!({"type": "section", "text": {"type": "mrkdwn", "text": text}}));
    }
    json!({"text": escape(&summary(events)), "blocks": blocks})
}

/// An adaptive card for a Teams workflow.
pub(super) fn teams(events: &[Event]) -> Value {
    let mut body = Vec::new();
    for event in events.iter().take(20) {
        let color = match event.change {
            Change::Resolved => "Good",
            Change::Test => "Accent",
            Change::Opened | Change::Grew => "Attention",
        };
        body.push(json!({
            "type": "TextBlock", "text": event.title(), "weight": "Bolder", "size": "Medium",
            "color": color, "wrap": true,
        }));
        let facts: Vec<Value> = event
            .incident
            .subjects
            .iter()
            .take(SHOWN)
            .filter(|_| event.change != Change::Resolved)
            .map(|(name, text)| json!({"title": name, "value": cut(text, 200)}))
            .collect();
        if facts.is_empty() {
            let text = lines(event).join("\n\n");
            body.push(json!({"type": "TextBlock", "text": text, "wrap": true}));
        } else {
            body.push(json!({"type": "FactSet", "facts": facts}));
            let help = &event.incident.help;
            body.push(json!({"type": "TextBlock", "text": help, "wrap": true, "isSubtle": true}));
        }
    }
    json!({
        "type": "message",
        "attachments": [{
            "contentType": "application/vnd.microsoft.card.adaptive",
            "contentUrl": null,
            "content": {
                "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
                "type": "AdaptiveCard", "version": "1.4", "body": body,
            },
        }],
    })
}

/// A PagerDuty event; what resolves has the key of what triggered.
pub(super) fn pager_duty(event: &Event, key: &str, source: &str) -> Value {
    let Incident { kind, pipeline, subjects, help, id, .. } = &event.incident;
    let action = if event.change == Change::Resolved { "resolve" } else { "trigger" };
    // The same when the incidents of before are forgotten: what is triggered again can be resolved.
    let of = if event.change == Change::Test { id } else { pipeline };
    let dedup = format!("alluvium/{source}/{}/{of}", kind.as_str());
    json!({
        "routing_key": key,
        "event_action": action,
        "dedup_key": cut(&dedup, 250),
        "client": "Alluvium",
        "payload": {
            "summary": cut(&event.title(), SUMMARY_MAX),
            "source": source,
            "severity": if event.change == Change::Test { "info" } else { kind.severity().as_str() },
            "timestamp": event.at.to_rfc3339(),
            "component": pipeline,
            "class": kind.as_str(),
            "custom_details": {"subjects": subjects, "help": help},
        },
    })
}

/// HTML of a mail.
pub(super) fn html(events: &[Event]) -> String {
    let escape = |text: &str| {
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
    };
    let parts: Vec<String> = events
        .iter()
        .map(|event| {
            let items: Vec<String> =
                lines(event).iter().map(|line| format!("<li>{}</li>", escape(line))).collect();
            format!("<h3>{}</h3><ul>{}</ul>", escape(&event.title()), items.concat())
        })
        .collect();
    format!("<html><body>{}</body></html>", parts.concat())
}
