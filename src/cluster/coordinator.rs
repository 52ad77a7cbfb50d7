//! `alluvium coordinator`: leads or stands by, and answers over HTTP.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use alluvium_coordinator::api::{Api, Lead, Surroundings, identity, router};
use alluvium_coordinator::run::{Coordinator, Outcome, Settings};
use alluvium_coordinator::standing::recall_processed;
use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::queue::Queue;
use alluvium_protocol::retry::{CRASHES_MAX, Limits};
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_worker::slots::Duty;
use chrono::Utc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::vitals::Vitals;
use super::{Services, leading, prepare, required};
use crate::commands::run::{exit, summarize};
use crate::commands::signals::on_signals;
use crate::config::cluster::Cluster;
use crate::config::{self, Config};
use crate::embedded::open_books;
use crate::printer::{self, Exit};
use crate::progress::{self, Totals};

/// Questions that wait for the loop.
const ASKS_MAX: usize = 64;
/// The address may still be another coordinator's: it is free when that one ends.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);
/// How often living slots are counted.
const COUNT_EVERY: Duration = Duration::from_secs(3);
/// Pause after a failure that ended the loop.
const RESTART_PAUSE: Duration = Duration::from_secs(2);

/// Carries out `coordinator`.
pub(crate) async fn run(file: Option<&Path>, pipeline: Option<&str>, once: bool) -> Result<Exit> {
    let config = config::load(file)?;
    let cluster = required(&config)?.clone();
    let pipelines = config.select(pipeline)?;
    let services = Services::of(&cluster, "coordinator")?;
    let stopping = CancellationToken::new();
    on_signals(stopping.clone())?;
    tokio::select! {
        ready = prepare(&config, &services) => ready?,
        () = stopping.cancelled() => return Ok(Exit::Ok),
    }
    if once {
        // Who waits for the end wants to know at once.
        services.queue.check().await?;
    }
    let vitals = Vitals {
        role: "coordinator",
        leases: services.leases.clone(),
        slots: 0,
        duty: Arc::new(Duty::default()),
        limits: None,
        started_at: Utc::now(),
        state: config.state.clone(),
    };
    let _beating = vitals.start(&services.links);
    let lead = Lead::default();
    let api = Api {
        lead: lead.clone(),
        state: config.state.clone(),
        pipelines: Arc::new(config.pipelines.clone()),
        identity: identity(&cluster.name, &config.state),
        token: cluster.token.clone(),
        surroundings: Arc::new(services.clone()),
    };
    let _serving = AbortOnDropHandle::new(tokio::spawn(serve(cluster.clone(), api)));
    printer::say(&format!(
        "coordinator {} for {} pipeline(s), API at {}; Ctrl-C ends it",
        services.name,
        pipelines.len(),
        cluster.api
    ));
    let role = Role { config: &config, cluster: &cluster, services: &services, lead, once };
    let ended = role.run(pipelines, &stopping).await;
    services.leases.gone(&services.name).await;
    let ended = ended?;
    services.queue.close();
    Ok(match ended {
        Some((outcome, totals)) if once => {
            summarize(&outcome, totals);
            exit(&outcome)
        }
        _ => {
            printer::say("stopped; workers finish what they have, the next coordinator goes on");
            Exit::Ok
        }
    })
}

struct Role<'a> {
    config: &'a Config,
    cluster: &'a Cluster,
    services: &'a Services,
    lead: Lead,
    once: bool,
}

impl Role<'_> {
    /// Leads whenever it can, until it is told to stop or, with `once`, everything is drained.
    async fn run(
        &self,
        pipelines: Vec<Pipeline>,
        stopping: &CancellationToken,
    ) -> Result<Option<(Outcome, Totals)>> {
        let Services { leases, links, name, .. } = self.services;
        while !stopping.is_cancelled() {
            let ending = stopping.child_token();
            let mut shown = None;
            let told = |other: Option<String>| {
                if other != shown {
                    let who = other.as_deref().unwrap_or("nobody");
                    printer::say(&format!("stands by; {who} leads"));
                    self.lead.is_of(other.clone());
                    shown = other;
                }
            };
            let led = leading::lead(
                leases,
                &self.cluster.name,
                name,
                links,
                ending.clone(),
                stopping,
                told,
            );
            let Some(leadership) = led.await else { return Ok(None) };
            printer::say(&format!("{name} leads"));
            let ended = self.coordinate(pipelines.clone(), ending).await;
            self.lead.is_of(None);
            leadership.give_up().await;
            match ended {
                Ok(ended) if self.once => return Ok(Some(ended)),
                Ok(_) => {}
                Err(error) if self.once => return Err(error),
                Err(error) => {
                    printer::tell_error(&error);
                    tokio::select! {
                        () = tokio::time::sleep(RESTART_PAUSE) => {}
                        () = stopping.cancelled() => {}
                    }
                }
            }
        }
        Ok(None)
    }

    async fn coordinate(
        &self,
        pipelines: Vec<Pipeline>,
        ending: CancellationToken,
    ) -> Result<(Outcome, Totals)> {
        let config = self.config;
        let mut books = open_books(&config.state, pipelines, self.once).await?;
        let ledger = alluvium_coordinator::ledger::Ledger::open(&config.state);
        for book in &mut books {
            recall_processed(book, &ledger).await;
        }
        let slots = Arc::new(AtomicUsize::new(0));
        let counting = count_slots(self.services.clone(), Arc::clone(&slots));
        let _counting = AbortOnDropHandle::new(tokio::spawn(counting));
        let settings = Settings {
            slots,
            poll: config.poll,
            once: self.once,
            limits: Limits { attempts_max: config.attempts, crashes_max: CRASHES_MAX },
            state: config.state.clone(),
            leases: Some(Arc::new(self.services.leases.clone())),
        };
        let clock: ClockRef = Arc::new(SystemClock);
        let queue: Arc<dyn Queue> = Arc::new(self.services.queue.clone());
        let (notices, receiver) = mpsc::unbounded_channel();
        let watching = progress::watch(receiver);
        let (asking, asks) = mpsc::channel(ASKS_MAX);
        let coordinator = Coordinator::new(settings, clock, queue, books, notices, asks, ending);
        self.lead.is_ours(asking);
        let outcome = coordinator.run().await;
        let totals = watching.await.map_err(Error::internal)?;
        Ok((outcome?, totals))
    }
}

/// The window of tasks follows the living workers.
async fn count_slots(services: Services, slots: Arc<AtomicUsize>) {
    loop {
        if let Ok(living) = services.workers().await {
            let count = living.iter().filter(|process| process.resting.is_none());
            slots.store(count.map(|process| process.slots).sum(), Ordering::Relaxed);
        }
        tokio::time::sleep(COUNT_EVERY).await;
    }
}

/// Serves the API for as long as the process lives.
async fn serve(cluster: Cluster, api: Api) {
    let mut is_told = false;
    loop {
        match tokio::net::TcpListener::bind(cluster.listen).await {
            Ok(listener) => {
                if let Err(error) = axum::serve(listener, router(api.clone())).await {
                    tracing::warn!(%error, "the API ended; it is started anew");
                }
            }
            Err(error) if !is_told => {
                is_told = true;
                printer::warn(&format!("cannot listen at {} yet: {error}", cluster.listen));
            }
            Err(_) => {}
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
    }
}
