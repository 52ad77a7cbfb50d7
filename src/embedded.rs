//! Embedded mode: coordinator and worker in one process, over the in-process queue and leases.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use alluvium_coordinator::alerts::conditions::Around;
use alluvium_coordinator::alerts::keeper::Keeper;
use alluvium_coordinator::book::Book;
use alluvium_coordinator::ledger::Ledger;
use alluvium_coordinator::notice::Notice;
use alluvium_coordinator::run::{Coordinator, Outcome, Settings};
use alluvium_coordinator::standing::{recall_blocked, recall_cleanup};
use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::lease::memory::MemoryLeases;
use alluvium_protocol::metrics::metrics;
use alluvium_protocol::queue::memory::MemoryQueue;
use alluvium_protocol::queue::{Lane, Queue};
use alluvium_protocol::retry::{CRASHES_MAX, Limits};
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_worker::Workshop;
use alluvium_worker::slots::{Duty, Worker};
use alluvium_worker::tables::Tables;
use sysinfo::System;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::vitals;
use crate::config::Config;

/// Pause between two looks at the disk.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Opens the books of these pipelines.
pub(crate) async fn open_books(
    config: &Config,
    pipelines: Vec<Pipeline>,
    once: bool,
) -> Result<Vec<Book>> {
    let mut books = Vec::with_capacity(pipelines.len());
    for pipeline in pipelines {
        let policy = config.policies.get(&pipeline.id).cloned().unwrap_or_default();
        let mut book = Book::open(pipeline).await?.with_policy(policy);
        let ledger = Ledger::open(&config.state);
        recall_cleanup(&mut book, &ledger).await;
        if !once {
            // A watching process does not try again what waits for a person.
            recall_blocked(&mut book, &ledger).await;
        }
        books.push(book);
    }
    Ok(books)
}

/// Who tells people what is wrong; `None`: no `[alert.*]` is configured.
pub(crate) fn keeper(config: &Config) -> Result<Option<Keeper>> {
    if config.sinks.is_empty() {
        return Ok(None);
    }
    let source = config.source();
    let pipelines = config.select(None)?.into_iter().map(|pipeline| pipeline.id).collect();
    Keeper::open(&config.state, source, config.sinks.clone(), pipelines).map(Some)
}

/// One process: only itself and its disk can be looked at.
fn look_around(
    (disk_free, slots): (u64, usize),
    around: Arc<Mutex<Around>>,
    duty: Arc<Duty>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut system = System::new();
        loop {
            vitals::Used::now(&mut system).show(slots);
            let is_up = !duty.orders.draining.is_cancelled();
            metrics().set("worker_up", &[], f64::from(u8::from(is_up)));
            let full = vitals::full_disk(disk_free).map(|why| ("this process".to_owned(), why));
            let found =
                Around { full_disks: Some(full.into_iter().collect()), ..Around::default() };
            *around.lock().unwrap_or_else(PoisonError::into_inner) = found;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }))
}

/// Runs these pipelines until `stopping`, or with `once` until nothing more can be done.
pub(crate) async fn run(
    config: &Config,
    pipelines: Vec<Pipeline>,
    once: bool,
    notices: mpsc::UnboundedSender<Notice>,
    duty: Arc<Duty>,
) -> Result<Outcome> {
    let stopping = duty.orders.stopping.clone();
    config.keep_side_indexes();
    let clock: ClockRef = Arc::new(SystemClock);
    let books = open_books(config, pipelines, once).await?;
    let queue: Arc<dyn Queue> = Arc::new(MemoryQueue::default());
    let worker = Worker {
        name: format!("embedded-{}", std::process::id()),
        queue: Arc::clone(&queue),
        leases: Arc::new(MemoryLeases::new(Arc::clone(&clock))),
        workshop: Workshop { clock: Arc::clone(&clock), tables: Arc::new(Tables::default()) },
        // One process: what starves renewals starves the work, too.
        keeping: tokio::runtime::Handle::current(),
        lanes: Lane::TASKS.to_vec(),
        is_alone: config.slots == 1,
        duty,
    };
    let around = Arc::new(Mutex::new(Around::default()));
    let duty = Arc::clone(&worker.duty);
    let _looking = look_around((config.disk_free, config.slots), Arc::clone(&around), duty);
    let mut slots = tokio::spawn(worker.run(config.slots));
    let alerts = keeper(config)?;
    let _telling = alerts.as_ref().map(Keeper::start);
    let settings = Settings {
        around,
        alerts,
        slots: Arc::new(AtomicUsize::new(config.slots)),
        poll: config.poll,
        once,
        limits: Limits { attempts_max: config.attempts, crashes_max: CRASHES_MAX },
        state: config.state.clone(),
        leases: None,
    };
    // Nobody asks: verbs of other processes look at the tables.
    let (_asking, asks) = mpsc::channel(1);
    let coordinator =
        Coordinator::new(settings, clock, Arc::clone(&queue), books, notices, asks, stopping);
    let coordinating = coordinator.run();
    tokio::pin!(coordinating);
    tokio::select! {
        outcome = &mut coordinating => {
            queue.close();
            slots.await.map_err(Error::internal)??;
            outcome
        }
        // Idle slots stop first when the process is told to stop; an error of theirs ends it.
        ended = &mut slots => {
            ended.map_err(Error::internal)??;
            coordinating.await
        }
    }
}
