//! `alluvium run`: the whole job in one process.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alluvium_coordinator::run::Outcome;
use alluvium_protocol::{Error, Pipeline, Result};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config};
use crate::printer::{self, Exit, exit_of};
use crate::progress::{self, Totals};
use crate::{embedded, lock};

/// Carries out `run`.
pub(crate) async fn run(file: Option<&Path>, pipeline: Option<&str>, once: bool) -> Result<Exit> {
    let config = config::load(file)?;
    let pipelines = config.select(pipeline)?;
    let _lock = lock::take(&config.state)?;
    let stopping = CancellationToken::new();
    let was_interrupted = stop_on_signals(stopping.clone())?;
    if !once {
        printer::say(&format!(
            "watching {} pipeline(s) every {:?}; Ctrl-C stops at the next safe point",
            pipelines.len(),
            config.poll
        ));
    }
    let (outcome, totals) = drive(&config, pipelines, once, stopping).await?;
    if was_interrupted.load(Ordering::SeqCst) {
        printer::say("stopped; nothing is half-written, the next run goes on");
        return Ok(Exit::Interrupted);
    }
    if once {
        summarize(&outcome, totals);
    }
    Ok(exit(&outcome))
}

/// Runs and prints progress.
pub(crate) async fn drive(
    config: &Config,
    pipelines: Vec<Pipeline>,
    once: bool,
    stopping: CancellationToken,
) -> Result<(Outcome, Totals)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let watching = progress::watch(receiver);
    let outcome = embedded::run(config, pipelines, once, sender, stopping).await;
    let totals = watching.await.map_err(Error::internal)?;
    Ok((outcome?, totals))
}

/// How a drained run's outcome ends the process.
pub(crate) fn exit(outcome: &Outcome) -> Exit {
    let broken = || outcome.broken.iter().map(|code| exit_of(*code));
    if broken().any(|exit| exit == Exit::Conflict) {
        return Exit::Conflict;
    }
    if outcome.stopped > 0 {
        return Exit::Failed;
    }
    broken().next().unwrap_or(Exit::Ok)
}

fn summarize(outcome: &Outcome, totals: Totals) {
    let mut line = match totals.merged {
        0 => "nothing new to merge".to_owned(),
        merged => format!(
            "{merged} epoch(s) merged: +{} rows, ~{} changed, -{} deleted",
            totals.inserted, totals.updated, totals.deleted
        ),
    };
    if totals.quarantined > 0 {
        line.push_str(&format!("; {} row(s) in quarantine", totals.quarantined));
    }
    if outcome.stopped > 0 {
        line.push_str(&format!(
            "; {} epoch(s) BLOCKED: `alluvium epochs --state blocked`",
            outcome.stopped
        ));
    }
    if !outcome.broken.is_empty() {
        line.push_str(&format!(
            "; {} pipeline(s) cannot go on: `alluvium status`",
            outcome.broken.len()
        ));
    }
    printer::say(&line);
    for (pipeline, epoch, why) in &outcome.incomplete {
        printer::say(&format!("  left alone: {pipeline} {epoch}: {why}"));
    }
}

/// SIGINT and SIGTERM stop at the next safe point; a second one is the system's.
fn stop_on_signals(stopping: CancellationToken) -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let was_interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&was_interrupted);
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::internal)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        flag.store(true, Ordering::SeqCst);
        stopping.cancel();
        // Again: do not wait for the safe point.
        let _ = tokio::signal::ctrl_c().await;
        std::process::exit(Exit::Interrupted as i32);
    });
    Ok(was_interrupted)
}
