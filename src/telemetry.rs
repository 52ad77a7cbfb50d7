//! Logs to stderr, for eyes or machines; traces over OTLP when an endpoint is set.
//!
//! Exporting never holds work up: spans go through a bounded buffer to a thread of its own, and what
//! cannot be sent is dropped and counted.

use std::io::IsTerminal;
use std::time::Duration;

use alluvium_protocol::trace;
use alluvium_protocol::{Code, Error, Result};
use opentelemetry::trace::{SpanId, TraceId, TracerProvider};
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracerProvider};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::cli::{Arguments, LogFormat, Verb};
use crate::config;

/// The last spans may take so long at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// One export; a dead collector costs this much of the exporter's own time.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Spans around tasks are always there for the log lines in them: they carry the trace id.
const TASK_SPANS: &str = "alluvium::task=info";

/// Traces of this process, if any.
pub(crate) struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Sends what is left.
    pub(crate) fn finish(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Starts logging, and tracing for the verbs that work. A filter that cannot be read falls back to
/// warnings.
pub(crate) fn start(arguments: &Arguments) -> Result<Telemetry> {
    let filter =
        arguments.log.clone().or_else(|| std::env::var("ALLUVIUM_LOG").ok()).unwrap_or_else(|| {
            "warn,deltalake_core=off,buoyant_kernel=off,lapin=off,opentelemetry=error".to_owned()
        });
    let mut filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("warn"));
    if let Ok(spans) = TASK_SPANS.parse() {
        filter = filter.add_directive(spans);
    }
    let role = match arguments.verb {
        Verb::Run { .. } => Some("alluvium"),
        Verb::Coordinator { .. } => Some("alluvium-coordinator"),
        Verb::Worker(_) => Some("alluvium-worker"),
        _ => None,
    };
    // A configuration with problems is told by the verb itself.
    let endpoint = role.and_then(|role| {
        let config = config::load(arguments.config.as_deref()).ok()?;
        Some((config.otlp?, role))
    });
    let provider = match endpoint {
        Some((endpoint, role)) => Some(provider(&endpoint, role)?),
        None => None,
    };
    let traces = provider.as_ref().map(|provider| {
        let ours = Targets::new().with_target("alluvium", LevelFilter::INFO);
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("alluvium"))
            .with_location(false)
            .with_threads(false)
            .with_filter(ours)
    });
    let logs = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let logs = match arguments.log_format {
        LogFormat::Human => logs.with_target(false).with_filter(filter).boxed(),
        LogFormat::Json => {
            crate::printer::talk_to_machines();
            logs.json().flatten_event(true).with_filter(filter).boxed()
        }
    };
    tracing_subscriber::registry().with(traces).with(logs).init();
    // A panic in a task ends the task with a code and its text; only its place is left to tell.
    std::panic::set_hook(Box::new(|panic| match std::thread::current().name() {
        Some("main") => tracing::error!(%panic, "a panic"),
        _ => tracing::debug!(%panic, "a panic in a task"),
    }));
    Ok(Telemetry(provider))
}

fn provider(endpoint: &str, role: &'static str) -> Result<SdkTracerProvider> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Code::ConfigInvalid, format!("traces cannot go to {endpoint}: {e}"))
            .with_help("set `otlp` in [telemetry] to a URL such as http://127.0.0.1:4317")
    };
    // The exporter's connection lives on the runtime that it is made in.
    let links = crate::cluster::links()?;
    let entered = links.enter();
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|e| failed(&e))?;
    drop(entered);
    let resource = Resource::builder()
        .with_service_name(role)
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", crate::cluster::process_name()),
        ])
        .build();
    let provider = SdkTracerProvider::builder()
        .with_id_generator(Ids(RandomIdGenerator::default()))
        .with_resource(resource)
        .with_batch_exporter(exporter)
        .build();
    global::set_tracer_provider(provider.clone());
    Ok(provider)
}

/// Random ids, but for the roots of runs: those are computed.
#[derive(Debug)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        trace::next_ids().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        trace::next_ids().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}
