//! The coordinator's loop.
//!
//! ```text
//!   discover ─► requests ─► plan ─► publish ─► wait: a result, a timer, a stop
//!      ▲                                              │
//!      └──────────────────────────────────────────────┘ results ─► book, ledger, notices
//! ```
//! Owns: when each of these happens. The decisions themselves are pure ([`crate::sequencing`],
//! [`crate::readiness`], `protocol::retry`).

use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::clock::ClockRef;
use alluvium_protocol::queue::{Delivery, Lane, Queue};
use alluvium_protocol::retry::Limits;
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::{FORMAT_MAJOR, Step, Task, TaskResult, Work, decode, encode};
use alluvium_protocol::{Code, Epoch, Error, Result, crash};
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::book::Book;
use crate::discovering;
use crate::notice::Notice;
use crate::requests::Requests;
use crate::scribe::{Rows, Scribe, ScribeHandle};
use crate::sequencing::{Plan, plan, share};

/// Outstanding tasks per worker slot: one at work, the others at hand.
const WINDOW_PER_SLOT: usize = 4;
/// The smallest window, so that a single slot still sees ingests run ahead.
const WINDOW_MIN: usize = 16;

/// How the coordinator runs.
pub struct Settings {
    /// Worker slots that serve it.
    pub slots: usize,
    /// Pause between discoveries.
    pub poll: Duration,
    /// Drain what is ready and stop.
    pub once: bool,
    /// Failures before an epoch is blocked.
    pub limits: Limits,
    /// The state folder.
    pub state: String,
}

/// The coordinator.
pub struct Coordinator {
    pub(crate) settings: Settings,
    pub(crate) clock: ClockRef,
    queue: Arc<dyn Queue>,
    pub(crate) books: Vec<Book>,
    pub(crate) scribe: ScribeHandle,
    pub(crate) notices: mpsc::UnboundedSender<Notice>,
    stopping: CancellationToken,
    turn: usize,
    /// Requests that could not be carried out, by id.
    pub(crate) refused: Vec<(String, Error)>,
}

/// How a drained run ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Epochs that wait for a person.
    pub stopped: usize,
    /// The codes of pipelines whose source or tables cannot be used.
    pub broken: Vec<Code>,
    /// Requests that could not be carried out, by id.
    pub refused: Vec<(String, Error)>,
    /// Epochs whose folders are not complete, with the reason.
    pub incomplete: Vec<(String, Epoch, String)>,
}

impl Coordinator {
    /// A coordinator over these books.
    pub fn new(
        settings: Settings,
        clock: ClockRef,
        queue: Arc<dyn Queue>,
        books: Vec<Book>,
        notices: mpsc::UnboundedSender<Notice>,
        stopping: CancellationToken,
    ) -> Self {
        let scribe = Scribe::start(&settings.state, notices.clone());
        Self {
            settings,
            clock,
            queue,
            books,
            scribe,
            notices,
            stopping,
            turn: 0,
            refused: Vec::new(),
        }
    }

    /// Runs until it is told to stop, or, with `once`, until nothing more can be done.
    pub async fn run(mut self) -> Result<Outcome> {
        let ended = self.run_loop().await;
        // Results that are told are in the ledger before the process ends.
        self.scribe.finish().await;
        ended?;
        Ok(self.outcome())
    }

    async fn run_loop(&mut self) -> Result<()> {
        self.tell_ledger_of_the_past().await;
        let mut next_discovery = self.clock.now();
        // A drained run ends after a discovery that found nothing more to do.
        let mut is_fresh = false;
        loop {
            if self.stopping.is_cancelled() {
                return Ok(());
            }
            if self.clock.now() >= next_discovery {
                self.carry_out_requests().await;
                self.discover().await;
                let poll = chrono::Duration::from_std(self.settings.poll).unwrap_or_default();
                next_discovery = self.clock.now() + poll;
                is_fresh = true;
            }
            self.publish().await?;
            if self.settings.once && self.is_drained() {
                if is_fresh {
                    return Ok(());
                }
                next_discovery = self.clock.now();
                continue;
            }
            let wake_at = self.next_timer(next_discovery);
            if let Some(delivery) = self.wait(wake_at).await? {
                self.take_result(delivery).await?;
                is_fresh = false;
            } else if self.clock.now() < next_discovery {
                // A timer: a settling folder wants its second listing.
                self.discover().await;
            }
        }
    }

    async fn wait(&self, wake_at: DateTime<Utc>) -> Result<Option<Delivery>> {
        let pause = (wake_at - self.clock.now()).to_std().unwrap_or_default();
        tokio::select! {
            received = self.queue.receive(&[Lane::Results]) => received,
            () = tokio::time::sleep(pause) => Ok(None),
            () = self.stopping.cancelled() => Ok(None),
        }
    }

    async fn discover(&mut self) {
        let now = self.clock.now();
        let mut events = Vec::new();
        for book in &mut self.books {
            discovering::discover(book, now, &self.notices).await;
            events.append(&mut book.events);
        }
        if !events.is_empty() {
            self.scribe.write(Rows { events, ..Rows::default() }, None).await;
        }
    }

    /// Publishes what may go out, shared fairly between the pipelines.
    async fn publish(&mut self) -> Result<()> {
        let now = self.clock.now();
        let window = WINDOW_MIN.max(WINDOW_PER_SLOT * self.settings.slots);
        let outstanding: usize = self.books.iter().map(|book| book.outstanding.len()).sum();
        let free = window.saturating_sub(outstanding);
        let mut tasks: Vec<Vec<Work>> = Vec::with_capacity(self.books.len());
        for book in &mut self.books {
            let views = book.epoch_views();
            let mut plan =
                if book.error.is_some() { Plan::default() } else { plan(&book.view(&views), now) };
            plan.cleanup &= !(self.settings.once && book.cleaned_here);
            tasks.push(works_of(book, &plan, free, now, &self.notices).await);
        }
        let wanted: Vec<usize> = tasks.iter().map(Vec::len).collect();
        let given = share(&wanted, free, self.turn);
        self.turn = (self.turn + 1) % self.books.len().max(1);
        for (index, works) in tasks.into_iter().enumerate() {
            for work in works.into_iter().take(given[index]) {
                self.publish_one(index, work, now).await?;
            }
        }
        Ok(())
    }

    async fn publish_one(&mut self, index: usize, work: Work, now: DateTime<Utc>) -> Result<()> {
        let book = &mut self.books[index];
        let epochs = work.epochs();
        let failures = epochs.iter().map(|e| book.entries[e].failures + book.entries[e].crashes);
        let attempt = failures.max().unwrap_or(0) + 1;
        let salt = match work.step() {
            Step::Merge => epochs.iter().map(|e| book.entries[e].generation).sum(),
            _ => now.timestamp_micros(),
        };
        let id = Task::id_of(&book.pipeline.id, &work, salt);
        let task = Task {
            format: FORMAT_MAJOR,
            id,
            pipeline: book.pipeline.clone(),
            work: work.clone(),
            attempt,
            published_at: now,
        };
        let (lane, event) = match work.step() {
            Step::Ingest => (Lane::Ingest, Some(Event::IngestPublished)),
            Step::Merge => (Lane::Merge, Some(Event::MergePublished)),
            Step::Optimize | Step::Cleanup => (Lane::Maintenance, None),
        };
        let body = encode(&task)?;
        crash::point("task.before_publish")?;
        self.queue.publish(lane, body).await?;
        crash::point("task.after_publish")?;
        book.outstanding.insert(id, work);
        if let Some(event) = event {
            for epoch in epochs {
                if let Some(entry) = book.entries.get_mut(&epoch) {
                    entry.apply(event)?;
                }
            }
        }
        Ok(())
    }

    async fn take_result(&mut self, delivery: Delivery) -> Result<()> {
        let result: TaskResult = match decode(&delivery.body) {
            Ok(result) => result,
            Err(error) => {
                tracing::error!(%error, "a result that cannot be understood was set aside");
                return delivery.ack().await;
            }
        };
        let now = self.clock.now();
        let rows = self.settle(&result, now).await?;
        // Acknowledged by the scribe, after the batch with these rows.
        self.scribe.write(rows, Some(delivery)).await;
        Ok(())
    }

    /// Nothing is out, nothing may go out, nothing waits for a timer.
    fn is_drained(&self) -> bool {
        self.books.iter().all(|book| {
            book.outstanding.is_empty()
                && (book.error.is_some()
                    || book.markers.is_held()
                    || book.entries.values().all(|entry| {
                        entry.settles_at.is_none()
                            && (entry.not_before.is_none() || entry.state.is_stopped())
                    }))
        })
    }

    fn next_timer(&self, next_discovery: DateTime<Utc>) -> DateTime<Utc> {
        let entries = self.books.iter().flat_map(|book| book.entries.values());
        let timers = entries.flat_map(|entry| [entry.not_before, entry.settles_at]).flatten();
        let maintenance = self.books.iter().filter_map(|book| book.maintenance_not_before);
        let now = self.clock.now();
        let soonest = timers.chain(maintenance).filter(|at| *at > now).min();
        match soonest {
            Some(at) => at.min(next_discovery),
            // A drained run has no use for the poll; results and timers move it.
            None => next_discovery,
        }
    }

    fn outcome(&self) -> Outcome {
        let mut outcome = Outcome { refused: self.refused.clone(), ..Outcome::default() };
        for book in &self.books {
            outcome.broken.extend(book.error.as_ref().map(|error| error.code));
            for (epoch, entry) in &book.entries {
                match entry.state {
                    State::Blocked(_) | State::Parked(_) => outcome.stopped += 1,
                    State::Empty | State::Incomplete => {
                        let why = entry.why.clone().unwrap_or_default();
                        outcome.incomplete.push((book.pipeline.id.clone(), *epoch, why));
                    }
                    _ => {}
                }
            }
        }
        outcome
    }

    async fn carry_out_requests(&mut self) {
        let found = match Requests::open(&self.settings.state) {
            Ok(requests) => requests.open_ones().await,
            Err(error) => Err(error),
        };
        match found {
            Ok(requests) => {
                for request in requests {
                    // Another process may serve the other pipelines of this state.
                    if self.books.iter().any(|book| book.pipeline.id == request.pipeline) {
                        self.carry_out(&request).await;
                    }
                }
            }
            Err(error) => tracing::error!(%error, "requests cannot be read"),
        }
    }
}

/// The plan as work, most urgent first, at most `most` pieces.
async fn works_of(
    book: &mut Book,
    plan: &Plan,
    most: usize,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Vec<Work> {
    let mut works = Vec::new();
    if let Some(epochs) = &plan.merge {
        works.push(Work::Merge { epochs: epochs.clone() });
    }
    for epoch in plan.ingests.iter().take(most) {
        match discovering::ingest_work(book, *epoch).await {
            Ok(work) => works.push(work),
            Err(error) => discovering::stop(book, *epoch, Step::Ingest, error, now, notices),
        }
    }
    if plan.optimize {
        works.push(Work::Optimize);
    }
    if plan.cleanup {
        works.push(Work::Cleanup);
    }
    works
}
