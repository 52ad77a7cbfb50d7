//! What the coordinator adds to the trace of an epoch's run: its beginning, each attempt, its end.

use alluvium_protocol::task::{Task, TaskResult, Verdict};
use alluvium_protocol::trace::{self, Kind, Part, Run};
use alluvium_protocol::{Epoch, Error};
use chrono::{DateTime, Utc};
use opentelemetry::KeyValue;

use crate::book::Book;

fn run_of(book: &Book, epoch: Epoch) -> Run {
    let generation = book.entries.get(&epoch).map_or(0, |entry| entry.generation);
    Run { pipeline: book.pipeline.id.clone(), epoch, generation }
}

/// New content was pinned: the trace is there from now on.
pub(crate) fn found(book: &Book, epoch: Epoch, now: DateTime<Utc>) {
    let Some(entry) = book.entries.get(&epoch) else { return };
    let since = entry.waiting_since.unwrap_or(now);
    let mut part = Part::new("epoch discovered", since, now);
    part.attributes = vec![KeyValue::new("alluvium.late", entry.late)];
    run_of(book, epoch).part(part);
}

/// An attempt is about to be published. Returns its context, for the message.
pub(crate) fn sent(book: &Book, task: &Task) -> Option<String> {
    let epochs = task.work.epochs();
    let first = epochs.first()?;
    let step = task.work.step().as_str();
    let entry = book.entries.get(first)?;
    let mut part = Part::new(format!("publish {step}"), task.published_at, Utc::now());
    part.kind = Kind::Producer;
    part.attributes = vec![
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.operation.name", "publish"),
        KeyValue::new("messaging.operation.type", "send"),
        KeyValue::new("messaging.message.id", task.id.to_string()),
        KeyValue::new("alluvium.step", step),
        KeyValue::new("alluvium.attempt", i64::from(task.attempt)),
        KeyValue::new("alluvium.epochs", epochs.len() as i64),
    ];
    if let Some(error) = &entry.error {
        part.attributes.push(KeyValue::new("alluvium.retry.reason", error.code.as_str()));
    }
    part.links.extend(entry.last_sent.as_deref().and_then(trace::parse));
    let context = run_of(book, *first).part(part);
    // The other epochs of a common merge find it from their own traces.
    for epoch in epochs.iter().skip(1) {
        let mut beside = Part::new(format!("publish {step}"), task.published_at, Utc::now());
        beside.attributes = vec![KeyValue::new("alluvium.in_commit_with", first.value())];
        beside.links.push(context.clone());
        run_of(book, *epoch).part(beside);
    }
    trace::traceparent(&context)
}

/// Remembers the attempt: the next one links to it.
pub(crate) fn note_sent(book: &mut Book, epochs: &[Epoch], context: Option<&str>) {
    for epoch in epochs {
        if let Some(entry) = book.entries.get_mut(epoch) {
            entry.last_sent = context.map(str::to_owned);
        }
    }
}

/// A result arrived; it belongs below the attempt that made it.
pub(crate) fn result(result: &TaskResult, now: DateTime<Utc>) {
    let Some(processed) = result.trace.as_deref().and_then(trace::parse) else { return };
    let mut part = Part::new("result", result.finished_at, now);
    if let Verdict::Failed(error) = &result.verdict {
        part.error = Some(error);
    }
    part.links.push(processed.clone());
    trace::below(&processed, part);
}

/// The run is over: merged, or stopped until somebody helps.
pub(crate) fn ended(book: &Book, epoch: Epoch, error: Option<&Error>, now: DateTime<Utc>) {
    let Some(entry) = book.entries.get(&epoch) else { return };
    if entry.generation == 0 {
        return;
    }
    run_of(book, epoch).end(entry.found_at.unwrap_or(now), now, error);
}
