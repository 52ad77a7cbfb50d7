//! `alluvium run`: the whole job in one process.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use alluvium_coordinator::run::Outcome;
use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_worker::slots::{Duty, Orders};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cluster::listening::serve_metrics;
use crate::commands::signals::on_signals;
use crate::config::{self, Config};
use crate::printer::{self, Exit, exit_of};
use crate::progress::{self, Totals};
use crate::{embedded, lock};

/// Carries out `run`.
pub(crate) async fn run(file: Option<&Path>, pipeline: Option<&str>, once: bool) -> Result<Exit> {
    let config = config::load(file)?;
    let pipelines = config.select(pipeline)?;
    if config.cluster.is_some() {
        let text = format!("{} has a section [cluster]", config.file.display());
        return Err(Error::new(Code::NotPossibleNow, text).with_help(
            "start `alluvium coordinator` and `alluvium worker`; or take [cluster] out to run in one process",
        ));
    }
    let stopping = CancellationToken::new();
    let lost = stopping.child_token();
    let lock = lock::take(&config.state, lost.clone()).await?;
    let _serving = config.listen.map(|at| serve_metrics(at, None));
    let was_interrupted = on_signals(stopping.clone())?;
    if !once {
        printer::say(&format!(
            "watching {} pipeline(s) every {:?}; Ctrl-C stops at the next safe point",
            pipelines.len(),
            config.poll
        ));
    }
    let driven = drive(&config, pipelines, once, lost.clone()).await;
    if lost.is_cancelled() && !stopping.is_cancelled() {
        let text = format!("{} was taken over by another process", config.state);
        return Err(Error::new(Code::StateLocked, text));
    }
    lock.release().await;
    let (outcome, totals) = driven?;
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
    let (draining, stopping) = (stopping.clone(), stopping);
    let duty = Arc::new(Duty::under(Orders { draining, stopping, ..Orders::default() }));
    let watching = progress::watch(receiver, Some(Arc::clone(&duty)));
    let outcome = embedded::run(config, pipelines, once, sender, duty).await;
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

pub(crate) fn summarize(outcome: &Outcome, totals: Totals) {
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
    for pipeline in &outcome.paused {
        printer::say(&format!(
            "  {pipeline} is paused, nothing is merged: alluvium resume {pipeline}"
        ));
    }
}
