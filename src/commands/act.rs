//! `alluvium retry | skip | replay | undo | pause | resume`: manual acts, asked, recorded, done.

use std::path::Path;

use alluvium_coordinator::api::{Asked, record};
use alluvium_coordinator::requests::{Request, Requests, Verb, check_act};
use alluvium_coordinator::standing::{EpochStanding, Standing};
use alluvium_protocol::manifest::Repairs;
use alluvium_protocol::task::RestoreTo;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use chrono::Utc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cli::OfEpoch;
use crate::commands::run::{drive, exit};
use crate::config::{self, Config};
use crate::printer::{self, Exit};
use crate::{client, lock};

/// An act on one epoch.
pub(crate) async fn on_epoch(file: Option<&Path>, verb: Verb, of: &OfEpoch) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(&of.pipeline))?.remove(0);
    with_content(&config, pipeline, verb, of, Repairs::new()).await
}

/// An act on one epoch, some of whose rows were corrected.
pub(crate) async fn with_content(
    config: &Config,
    pipeline: Pipeline,
    verb: Verb,
    of: &OfEpoch,
    repairs: Repairs,
) -> Result<Exit> {
    let filter = [("pipeline", Some(of.pipeline.clone()))];
    let state = match client::typed::<EpochStanding>(config, "epochs", &filter).await? {
        Some(epochs) => check_act(&pipeline.id, &epochs, verb, of.epoch)?,
        None => {
            let standing = Standing::read(pipeline.clone(), Utc::now()).await?;
            if !repairs.is_empty() {
                check_same(&standing, of.epoch)?;
            }
            check(&standing, verb, of.epoch)?
        }
    };
    if verb != Verb::Retry {
        let question = question(verb, &of.pipeline, of.epoch, &state);
        if !printer::confirm(&question, of.yes)? {
            printer::say("nothing was changed");
            return Ok(Exit::Ok);
        }
    }
    let act = Act { verb, epoch: Some(of.epoch), to: None, repairs };
    carry_out(config, pipeline, act, &state).await
}

/// Corrections were made from what was read: at their places the folder must still have these rows.
fn check_same(standing: &Standing, epoch: Epoch) -> Result<()> {
    let entry = standing.book.entries.get(&epoch);
    let Some(why) = entry.and_then(|entry| entry.changed.as_ref()) else { return Ok(()) };
    let id = &standing.book.pipeline.id;
    let text = format!("epoch {epoch} is no longer what the rows were read from: {why}");
    Err(Error::new(Code::RepairUnknown, text).with_help(format!(
        "`alluvium replay {id} {epoch}`, then correct what `alluvium quarantine show {id} {epoch} -o json` prints"
    )))
}

/// An act on a whole pipeline.
pub(crate) async fn on_pipeline(file: Option<&Path>, verb: Verb, name: &str) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(name))?.remove(0);
    if config.cluster.is_some() {
        return carry_out(&config, pipeline, Act::of(verb), "as it was").await;
    }
    let standing = Standing::read(pipeline.clone(), Utc::now()).await?;
    if !standing.book.has_main {
        let text = format!("{name} has no main table yet: there is nothing to pause or resume");
        return Err(Error::new(Code::NotPossibleNow, text));
    }
    let state = if standing.book.markers.is_held() { "paused" } else { "running" };
    carry_out(&config, pipeline, Act::of(verb), state).await
}

/// The epoch exists and the act makes sense. Returns its state, for the record.
fn check(standing: &Standing, verb: Verb, epoch: Epoch) -> Result<String> {
    let id = &standing.book.pipeline.id;
    if let Some(error) = &standing.book.error {
        return Err(error.clone());
    }
    if standing.book.is_settled(epoch) {
        let text = format!("epoch {epoch} lies below `start_from` or the floor: it is settled");
        return Err(Error::new(Code::EpochSettled, text));
    }
    check_act(id, &standing.epochs(), verb, epoch)
}

fn question(verb: Verb, pipeline: &str, epoch: Epoch, state: &str) -> String {
    match verb {
        Verb::Replay => format!(
            "{pipeline} {epoch} ({state}): read its folder again and make main as if it had always \
             been so?"
        ),
        _ => {
            format!("{pipeline} {epoch} ({state}): take its content out of main, and leave it out?")
        }
    }
}

/// What is asked for.
pub(crate) struct Act {
    pub(crate) verb: Verb,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) to: Option<RestoreTo>,
    pub(crate) repairs: Repairs,
}

impl Act {
    /// An act on a whole pipeline.
    pub(crate) fn of(verb: Verb) -> Self {
        Self { verb, epoch: None, to: None, repairs: Repairs::new() }
    }
}

/// Asks the coordinator, or leaves the request and carries it out here if nobody else runs.
pub(crate) async fn carry_out(
    config: &Config,
    pipeline: Pipeline,
    act: Act,
    state: &str,
) -> Result<Exit> {
    let Act { verb, epoch, to, repairs } = act;
    let by = std::env::var("USER").unwrap_or_else(|_| "unknown".to_owned());
    if let Some(cluster) = &config.cluster {
        let id = pipeline.id.clone();
        let asked =
            Asked { verb, pipeline: id, epoch, to, repairs: repairs.clone(), by: by.clone() };
        match client::ask(config, cluster, &asked).await {
            Ok(outcome) => {
                let of = epoch.map(|epoch| format!(" {epoch}")).unwrap_or_default();
                let (verb, id) = (verb.as_str(), &pipeline.id);
                printer::say(&format!(
                    "{id}{of}: {verb} {outcome}; `alluvium epochs {id}` shows how it goes on"
                ));
                return Ok(Exit::Ok);
            }
            Err(error) if error.code == Code::CoordinatorUnreachable => {
                printer::say(&error.message);
            }
            Err(error) => return Err(error),
        }
    }
    let request = Request {
        id: Uuid::new_v4().to_string(),
        verb,
        pipeline: pipeline.id.clone(),
        epoch,
        to,
        repairs,
        by,
        at: Utc::now(),
    };
    Requests::open(&config.state)?.ask(&request).await?;
    record(&config.state, &request, &format!("it was {state}")).await?;
    if config.cluster.is_some() {
        printer::say("asked; the next coordinator that runs carries it out");
        return Ok(Exit::Ok);
    }
    let taken = match lock::take(&config.state, CancellationToken::new()).await {
        Ok(taken) => taken,
        Err(error) if error.code == Code::StateLocked => {
            printer::say(&format!("asked; {}: it carries it out at its next poll", error.message));
            return Ok(Exit::Ok);
        }
        Err(error) => return Err(error),
    };
    let (outcome, _) =
        drive(config, vec![pipeline.clone()], true, CancellationToken::new()).await?;
    taken.release().await;
    if let Some((_, error)) = outcome.refused.iter().find(|(id, _)| *id == request.id) {
        return Err(error.clone());
    }
    tell(config, &pipeline, verb, epoch).await?;
    Ok(match verb {
        Verb::Pause | Verb::Resume | Verb::Rollback => Exit::Ok,
        _ => exit(&outcome),
    })
}

/// Says how it ended, from the tables.
async fn tell(
    config: &Config,
    pipeline: &Pipeline,
    verb: Verb,
    epoch: Option<Epoch>,
) -> Result<()> {
    let standing = Standing::read(pipeline.clone(), Utc::now()).await?;
    let id = &pipeline.id;
    match epoch {
        None => {
            let waiting = standing
                .epochs()
                .iter()
                .filter(|e| ["ready", "ingested"].contains(&e.state.as_str()))
                .count();
            let text = if standing.book.markers.is_held() {
                format!("{id} is paused; `alluvium resume {id}` goes on")
            } else if waiting > 0 {
                format!("{id} goes on; {waiting} epoch(s) wait: `alluvium plan {id}` says for what")
            } else {
                format!("{id} goes on; everything that is complete is in main")
            };
            printer::say(&text);
        }
        Some(epoch) => {
            let epochs = standing.epochs();
            let found = epochs.iter().find(|found| found.epoch == epoch);
            let state = found.map_or("unknown", |found| found.state.as_str());
            let held =
                if standing.book.markers.is_held() { " (the pipeline is paused)" } else { "" };
            let is_end = ["processed", "skipped"].contains(&state);
            let done = if is_end { "done" } else { "asked for, not done" };
            printer::say(&format!("{id} {epoch}: {} {done}, it is {state}{held}", verb.as_str()));
        }
    }
    tracing::debug!(state = config.state, "told how it ended");
    Ok(())
}
