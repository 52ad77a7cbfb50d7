//! Traces: one per run of an epoch, with ids that every process can compute.
//!
//! ```text
//!  run <pipeline>                       made last, by the coordinator; its id is known from the start
//!  ├─ epoch discovered
//!  ├─ publish ingest   (attempt 1)      PRODUCER, by the coordinator; its context travels as `traceparent`
//!  │   ├─ queue wait                    by the worker
//!  │   └─ process ingest                CONSUMER, links to the publish; by the worker
//!  │       ├─ lease wait · read · write · delta.commit
//!  │       └─ result                    by the coordinator
//!  └─ publish merge    (attempt 2)      links to attempt 1
//! ```
//! Spans that are not ended die with their process, so nothing long is one span: the root is made
//! when the run has ended, and long tasks leave `checkpoint` spans. Without a tracer all of this does
//! nothing.

use std::cell::Cell;
use std::time::SystemTime;

use chrono::{DateTime, Utc};
use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue, global};
use sha2::{Digest, Sha256};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::marker::Generation;
use crate::task::Task;
use crate::{Epoch, Error};

pub use opentelemetry::trace::SpanKind as Kind;

/// The instrumentation scope of all our spans.
const SCOPE: &str = "alluvium";

/// The run of one epoch's content through its steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The pipeline.
    pub pipeline: String,
    /// The epoch.
    pub epoch: Epoch,
    /// The content's generation.
    pub generation: Generation,
}

impl Run {
    /// The trace and root span of the run.
    pub fn context(&self) -> SpanContext {
        let name = format!("alluvium/{}/{}/{}", self.pipeline, self.epoch, self.generation);
        let hash: [u8; 32] = Sha256::digest(name.as_bytes()).into();
        let mut trace = [0; 16];
        trace.copy_from_slice(&hash[..16]);
        let mut span = [0; 8];
        span.copy_from_slice(&hash[16..24]);
        remote(TraceId::from_bytes(trace), SpanId::from_bytes(span))
    }

    fn attributes(&self) -> Vec<KeyValue> {
        vec![
            KeyValue::new("alluvium.pipeline", self.pipeline.clone()),
            KeyValue::new("alluvium.epoch", self.epoch.value()),
            KeyValue::new("alluvium.generation", self.generation),
        ]
    }

    /// Says that a part of the run took place. Returns the part's own context.
    pub fn part(&self, part: Part<'_>) -> SpanContext {
        emit(&self.context(), self.attributes(), part)
    }

    /// Ends the run: makes its root.
    pub fn end(&self, started_at: DateTime<Utc>, ended_at: DateTime<Utc>, error: Option<&Error>) {
        let context = self.context();
        NEXT_IDS.set(Some((context.trace_id(), context.span_id())));
        let tracer = global::tracer(SCOPE);
        let builder = tracer
            .span_builder(format!("run {}", self.pipeline))
            .with_start_time(started_at)
            .with_attributes(self.attributes());
        let mut span = builder.start_with_context(&tracer, &Context::new());
        NEXT_IDS.set(None);
        mark(&mut span, error);
        span.end_with_timestamp(ended_at.into());
    }
}

thread_local! {
    static NEXT_IDS: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// The ids that the next root on this thread must have; the id generator asks.
pub fn next_ids() -> Option<(TraceId, SpanId)> {
    NEXT_IDS.get()
}

/// A span that is over when it is told of.
pub struct Part<'a> {
    /// Its name, without ids.
    pub name: String,
    /// Who it is towards others.
    pub kind: SpanKind,
    /// When it began.
    pub from: DateTime<Utc>,
    /// When it ended.
    pub to: DateTime<Utc>,
    /// More facts.
    pub attributes: Vec<KeyValue>,
    /// What it follows from.
    pub links: Vec<SpanContext>,
    /// How it failed.
    pub error: Option<&'a Error>,
}

impl Part<'_> {
    /// A part without more to say.
    pub fn new(name: impl Into<String>, from: DateTime<Utc>, to: DateTime<Utc>) -> Self {
        Self {
            name: name.into(),
            kind: SpanKind::Internal,
            from,
            to: to.max(from),
            attributes: Vec::new(),
            links: Vec::new(),
            error: None,
        }
    }
}

/// Says that something took place below `parent`.
pub fn below(parent: &SpanContext, part: Part<'_>) -> SpanContext {
    emit(parent, Vec::new(), part)
}

fn emit(parent: &SpanContext, mut attributes: Vec<KeyValue>, part: Part<'_>) -> SpanContext {
    let tracer = global::tracer(SCOPE);
    attributes.extend(part.attributes);
    let links = part.links.into_iter().map(|to| Link::new(to, Vec::new(), 0)).collect();
    let builder = tracer
        .span_builder(part.name)
        .with_kind(part.kind)
        .with_start_time(SystemTime::from(part.from))
        .with_attributes(attributes)
        .with_links(links);
    let parent = Context::new().with_remote_span_context(parent.clone());
    let mut span = builder.start_with_context(&tracer, &parent);
    mark(&mut span, part.error);
    let context = span.span_context().clone();
    span.end_with_timestamp(part.to.into());
    context
}

fn mark(span: &mut impl opentelemetry::trace::Span, error: Option<&Error>) {
    if let Some(error) = error {
        span.set_attribute(KeyValue::new("error.type", error.code.as_str()));
        span.set_status(Status::error(error.message.clone()));
    }
}

fn remote(trace: TraceId, span: SpanId) -> SpanContext {
    SpanContext::new(trace, span, TraceFlags::SAMPLED, true, TraceState::default())
}

/// The context as a W3C `traceparent`; `None`: there is no tracer.
pub fn traceparent(context: &SpanContext) -> Option<String> {
    context.is_valid().then(|| {
        let flags = context.trace_flags().to_u8();
        format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id())
    })
}

/// Reads a W3C `traceparent` (<https://www.w3.org/TR/trace-context/>); `None`: it is not one.
pub fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    if version.len() != 2 || version == "ff" || trace.len() != 32 || span.len() != 16 {
        return None;
    }
    let context = remote(TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    context.is_valid().then_some(context)
}

/// The span of an attempt at a task. Spans and logs made inside it belong to it.
pub fn process_span(task: &Task, sent: Option<&SpanContext>, queue: &str) -> tracing::Span {
    let step = task.work.step().as_str();
    let epochs = task.work.epochs();
    let epoch = epochs.first().map(|epoch| epoch.value());
    let trace_id = sent.map(|sent| sent.trace_id().to_string());
    let span = tracing::info_span!(
        target: "alluvium::task",
        "process",
        otel.name = format!("process {queue}"),
        otel.kind = "consumer",
        trace_id = trace_id,
        alluvium.pipeline = task.pipeline.id,
        alluvium.epoch = epoch,
        // As i64: other widths would arrive as texts.
        alluvium.epochs = epochs.len() as i64,
        alluvium.step = step,
        alluvium.attempt = i64::from(task.attempt),
        messaging.system = "rabbitmq",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.message.id = %task.id,
        otel.status_code = tracing::field::Empty,
        otel.status_message = tracing::field::Empty,
        error.type = tracing::field::Empty,
    );
    if let Some(sent) = sent {
        // Before it is entered: afterwards the parent is fixed.
        let _ = span.set_parent(Context::new().with_remote_span_context(sent.clone()));
        span.add_link(sent.clone());
    }
    span
}

/// A span for a part of a task's work. Outside of a task (the ledger, a query) there is none: it would
/// be a trace of its own that nobody asked for.
#[macro_export]
macro_rules! part_of_task {
    ($($fields:tt)*) => {
        match tracing::Span::current().is_none() {
            true => tracing::Span::none(),
            false => tracing::info_span!(target: "alluvium::task", $($fields)*),
        }
    };
}

/// The context of a span of ours; not valid without a tracer.
pub fn context_of(span: &tracing::Span) -> SpanContext {
    span.context().span().span_context().clone()
}

/// Notes on a span how its work failed.
pub fn fail(span: &tracing::Span, error: &Error) {
    span.record("otel.status_code", "ERROR");
    span.record("otel.status_message", error.message.as_str());
    span.record("error.type", error.code.as_str());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_computes_the_same_context() {
        let run = Run { pipeline: "p".to_owned(), epoch: Epoch::new(7).unwrap(), generation: 1 };
        let text = traceparent(&run.context()).unwrap();
        assert_eq!(traceparent(&run.clone().context()).unwrap(), text);
        let other = Run { generation: 2, ..run.clone() };
        assert_ne!(other.context().trace_id(), run.context().trace_id());
        let parsed = parse(&text).unwrap();
        assert_eq!(parsed.trace_id(), run.context().trace_id());
        assert_eq!(parsed.span_id(), run.context().span_id());
    }

    #[test]
    fn what_is_no_traceparent_is_none() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(parse(good).is_some());
        for bad in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-zzf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
