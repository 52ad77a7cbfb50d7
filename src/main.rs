//! Alluvium: epoch folders become Delta tables, exactly once in effect.
//!
//! The composition root: command line, configuration, telemetry, choice of backends, roles. The only
//! place that sees both coordinator and worker.

mod cli;
mod client;
mod cluster;
mod commands;
mod config;
mod embedded;
mod lock;
mod printer;
mod progress;
mod sample;
mod telemetry;

use std::process::ExitCode;

use alluvium_protocol::metrics::metrics;
use clap::Parser;

fn main() -> ExitCode {
    let arguments = match cli::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return printer::usage(&error),
    };
    let telemetry = match telemetry::start(&arguments) {
        Ok(telemetry) => telemetry,
        Err(error) => return printer::failure(&error),
    };
    metrics().build(env!("CARGO_PKG_VERSION"), env!("ALLUVIUM_COMMIT"));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = alluvium_protocol::Error::internal(format!("no runtime: {error}"));
            return printer::failure(&error);
        }
    };
    let ended = runtime.block_on(commands::run(arguments));
    telemetry.finish();
    match ended {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => printer::failure(&error),
    }
}
