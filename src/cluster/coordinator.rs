//! `alluvium coordinator`: leads or stands by, and answers over HTTP.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use alluvium_coordinator::alerts::conditions::Around;
use alluvium_coordinator::alerts::keeper::Keeper;
use alluvium_coordinator::api::{Api, DEAD, Lead, NotifyAccess, Surroundings, identity, router};
use alluvium_coordinator::asking::Ask;
use alluvium_coordinator::notify::{self, Said};
use alluvium_coordinator::run::{Coordinator, Outcome, Settings};
use alluvium_coordinator::standing::recall_processed;
use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::heartbeat::{Heartbeat, InHand};
use alluvium_protocol::queue::Queue;
use alluvium_protocol::retry::{CRASHES_MAX, Limits};
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_worker::slots::Duty;
use chrono::Utc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::listening::serve;
use super::vitals::Vitals;
use super::{Services, leading, prepare, required};
use crate::commands::run::{exit, summarize};
use crate::commands::signals::on_signals;
use crate::config::cluster::Cluster;
use crate::config::{self, Config};
use crate::embedded::{keeper, open_books};
use crate::printer::{self, Exit};
use crate::progress::{self, Totals};

/// Questions that wait for the loop.
const ASKS_MAX: usize = 64;
/// How often others are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(3);
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
        notify: NotifyAccess {
            token: config.notify.token.clone(),
            topics: Arc::new(config.notify.topics.clone()),
        },
        surroundings: Arc::new(services.clone()),
    };
    let _serving = AbortOnDropHandle::new(tokio::spawn(serve(cluster.listen, router(api))));
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
        let mut books = open_books(config, pipelines, self.once).await?;
        let ledger = alluvium_coordinator::ledger::Ledger::open(&config.state);
        for book in &mut books {
            recall_processed(book, &ledger).await;
        }
        let slots = Arc::new(AtomicUsize::new(0));
        let around = Arc::new(Mutex::new(Around::default()));
        let looking = look_around(self.services.clone(), Arc::clone(&slots), Arc::clone(&around));
        let _looking = AbortOnDropHandle::new(tokio::spawn(looking));
        let alerts = keeper(config)?;
        let _telling = alerts.as_ref().map(Keeper::start);
        let settings = Settings {
            around,
            alerts,
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
        let watching = progress::watch(receiver, None);
        let (asking, asks) = mpsc::channel(ASKS_MAX);
        let coordinator = Coordinator::new(settings, clock, queue, books, notices, asks, ending);
        self.lead.is_ours(asking.clone());
        let heard =
            Heard { topics: config.notify.topics.clone(), pipelines: config.pipelines.clone() };
        let heard = Arc::new(heard);
        let _hearing = config.notify.queue.as_ref().map(|queue| {
            let notes = self.services.queue.notes(queue);
            AbortOnDropHandle::new(tokio::spawn(hear(notes, asking, heard)))
        });
        let outcome = coordinator.run().await;
        let totals = watching.await.map_err(Error::internal)?;
        Ok((outcome?, totals))
    }
}

/// The window of tasks follows the living workers; alerts and metrics want to know, too.
async fn look_around(services: Services, slots: Arc<AtomicUsize>, around: Arc<Mutex<Around>>) {
    loop {
        let living = services.workers().await.ok();
        if let Some(living) = &living {
            let count = living.iter().filter(|process| process.resting.is_none());
            slots.store(count.map(|process| process.slots).sum(), Ordering::Relaxed);
        }
        let queues = services.queues().await.ok();
        let full = |process: &Heartbeat| {
            let why = process.resting.clone().filter(|why| why.contains("of disk are free"))?;
            Some((process.name.clone(), why))
        };
        let of_task = |task: &InHand| (task.task, task.step);
        let is_worker = |process: &&Heartbeat| process.role == "worker";
        let found = Around {
            full_disks: living.as_ref().map(|living| living.iter().filter_map(full).collect()),
            workers: living.as_ref().map(|living| living.iter().filter(is_worker).count()),
            dead_letters: queues.as_ref().and_then(|queues| {
                queues.iter().find(|(name, _)| name == DEAD).map(|(_, count)| *count)
            }),
            queues: queues.unwrap_or_default(),
            in_hand: living.as_ref().map(|living| {
                living.iter().flat_map(|process| &process.tasks).map(of_task).collect()
            }),
        };
        *around.lock().unwrap_or_else(PoisonError::into_inner) = found;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What storage says in a queue wakes the pipelines that it concerns.
async fn hear(mut notes: mpsc::Receiver<Vec<u8>>, asks: mpsc::Sender<Ask>, config: Arc<Heard>) {
    while let Some(body) = notes.recv().await {
        // Who may publish to the queue is RabbitMQ's affair; topics are checked all the same.
        match notify::read(&body, &config.topics).await {
            Ok((Said::Objects(objects), _)) => {
                let woken = notify::woken(&config.pipelines, &objects);
                let woken: Vec<String> = woken.into_iter().map(str::to_owned).collect();
                if !woken.is_empty() && asks.send(Ask::Wake(woken)).await.is_err() {
                    return;
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a notification in the queue was ignored"),
        }
    }
}

/// What a listener needs to know.
struct Heard {
    topics: Vec<String>,
    pipelines: Vec<Pipeline>,
}
