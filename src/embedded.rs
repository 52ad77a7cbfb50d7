//! Embedded mode: coordinator and worker in one process, over the in-process queue and leases.

use std::sync::Arc;

use alluvium_coordinator::book::Book;
use alluvium_coordinator::ledger::Ledger;
use alluvium_coordinator::notice::Notice;
use alluvium_coordinator::run::{Coordinator, Outcome, Settings};
use alluvium_coordinator::standing::{recall_blocked, recall_cleanup};
use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::lease::memory::MemoryLeases;
use alluvium_protocol::queue::Queue;
use alluvium_protocol::queue::memory::MemoryQueue;
use alluvium_protocol::retry::Limits;
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_worker::Workshop;
use alluvium_worker::slots::Worker;
use alluvium_worker::tables::Tables;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// A task whose worker died so often is parked.
const CRASHES_MAX: u32 = 3;

/// Runs these pipelines until `stopping`, or with `once` until nothing more can be done.
pub(crate) async fn run(
    config: &Config,
    pipelines: Vec<Pipeline>,
    once: bool,
    notices: mpsc::UnboundedSender<Notice>,
    stopping: CancellationToken,
) -> Result<Outcome> {
    let clock: ClockRef = Arc::new(SystemClock);
    let mut books = Vec::with_capacity(pipelines.len());
    for pipeline in pipelines {
        let mut book = Book::open(pipeline).await?;
        let ledger = Ledger::open(&config.state);
        recall_cleanup(&mut book, &ledger).await;
        if !once {
            // A watching process does not try again what waits for a person.
            recall_blocked(&mut book, &ledger).await;
        }
        books.push(book);
    }
    let queue: Arc<dyn Queue> = Arc::new(MemoryQueue::default());
    let worker = Worker {
        name: format!("embedded-{}", std::process::id()),
        queue: Arc::clone(&queue),
        leases: Arc::new(MemoryLeases::new(Arc::clone(&clock))),
        workshop: Workshop { clock: Arc::clone(&clock), tables: Arc::new(Tables::default()) },
        stopping: stopping.clone(),
    };
    let mut slots = tokio::spawn(worker.run(config.slots));
    let settings = Settings {
        slots: config.slots,
        poll: config.poll,
        once,
        limits: Limits { attempts_max: config.attempts, crashes_max: CRASHES_MAX },
        state: config.state.clone(),
    };
    let coordinator =
        Coordinator::new(settings, clock, Arc::clone(&queue), books, notices, stopping);
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
