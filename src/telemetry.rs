//! Logs to stderr, for eyes or machines. Traces come with the cluster.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::cli::{Arguments, LogFormat};

/// Starts logging. A filter that cannot be read falls back to warnings.
pub(crate) fn start(arguments: &Arguments) {
    let filter = arguments
        .log
        .clone()
        .or_else(|| std::env::var("ALLUVIUM_LOG").ok())
        .unwrap_or_else(|| "warn,deltalake_core=off,buoyant_kernel=off".to_owned());
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("warn"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Human => logs.with_target(false).init(),
        LogFormat::Json => {
            crate::printer::talk_to_machines();
            logs.json().flatten_event(true).init();
        }
    }
    // A panic in a task ends the task with a code and its text; only its place is left to tell.
    std::panic::set_hook(Box::new(|panic| match std::thread::current().name() {
        Some("main") => tracing::error!(%panic, "a panic"),
        _ => tracing::debug!(%panic, "a panic in a task"),
    }));
}
