//! The coordinator's loop.
//!
//! ```text
//!   discover ─► requests ─► plan ─► publish ─► wait: a result, a question, a timer, a stop
//!      ▲                                              │
//!      └──────────────────────────────────────────────┘ results ─► book, ledger, notices
//! ```
//! Owns: when each of these happens. The decisions themselves are pure ([`crate::sequencing`],
//! [`crate::readiness`], `protocol::retry`).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use alluvium_protocol::clock::ClockRef;
use alluvium_protocol::lease::Leases;
use alluvium_protocol::queue::{Delivery, Lane, Message, Queue, Subscription};
use alluvium_protocol::retry::{Judgement, Limits, delay, judge};
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::{FORMAT_MAJOR, Step, Task, TaskResults, Work, decode, encode};
use alluvium_protocol::{Code, Epoch, Error, Result, crash};
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::alerts::conditions::Around;
use crate::alerts::keeper::Keeper;
use crate::asking::Ask;
use crate::book::{Book, Entry, Outstanding};
use crate::discovering;
use crate::hooks::HookEnded;
use crate::notice::Notice;
use crate::pinning;
use crate::requests::Requests;
use crate::restoring::Restoring;
use crate::scribe::{Rows, Scribe, ScribeHandle};
use crate::sequencing::{Plan, plan, share};
use crate::tracing_runs as traces;
use crate::watching::WATCH_EVERY;

/// Outstanding tasks per worker slot: one at work, the others at hand.
const WINDOW_PER_SLOT: usize = 4;
/// The smallest window, so that a single slot still sees ingests run ahead.
const WINDOW_MIN: usize = 16;
/// Results fetched ahead: two of the ledger's batches.
const RESULTS_AHEAD: u16 = 1000;
/// Pause after a message that the queue did not take.
const PUBLISH_PAUSE: Duration = Duration::from_secs(1);

/// How the coordinator runs.
pub struct Settings {
    /// Worker slots that serve it; a cluster's number changes.
    pub slots: Arc<AtomicUsize>,
    /// Pause between discoveries.
    pub poll: Duration,
    /// Drain what is ready and stop.
    pub once: bool,
    /// Failures before an epoch is blocked.
    pub limits: Limits,
    /// The state folder.
    pub state: String,
    /// What other processes and the queue say, kept fresh by somebody else.
    pub around: Arc<Mutex<Around>>,
    /// Tells people what is wrong; `None`: nobody wants to be told.
    pub alerts: Option<Keeper>,
    /// Leases tell which tasks are worked on; `None`: tasks cannot get lost (one process).
    pub leases: Option<Arc<dyn Leases>>,
}

/// The coordinator.
pub struct Coordinator {
    pub(crate) settings: Settings,
    pub(crate) clock: ClockRef,
    pub(crate) queue: Arc<dyn Queue>,
    results: Box<dyn Subscription>,
    asks: mpsc::Receiver<Ask>,
    publish_not_before: Option<DateTime<Utc>>,
    /// Somebody asked for a discovery while tasks were being published.
    is_asked_to_look: bool,
    pub(crate) looked_for_lost: DateTime<Utc>,
    pub(crate) books: Vec<Book>,
    pub(crate) scribe: ScribeHandle,
    pub(crate) notices: mpsc::UnboundedSender<Notice>,
    pub(crate) stopping: CancellationToken,
    turn: usize,
    /// Requests that could not be carried out, by id.
    pub(crate) refused: Vec<(String, Error)>,
    /// Pipelines that merged something since the last look: others may wait for them.
    pub(crate) merged: Vec<String>,
    pub(crate) watched_at: DateTime<Utc>,
    /// When pipelines that something woke are listed.
    pub(crate) wake_due: Option<DateTime<Utc>>,
    pub(crate) hooks: (mpsc::UnboundedSender<HookEnded>, mpsc::UnboundedReceiver<HookEnded>),
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
    /// Pipelines that are paused.
    pub paused: Vec<String>,
}

impl Coordinator {
    /// A coordinator over these books.
    pub fn new(
        settings: Settings,
        clock: ClockRef,
        queue: Arc<dyn Queue>,
        books: Vec<Book>,
        notices: mpsc::UnboundedSender<Notice>,
        asks: mpsc::Receiver<Ask>,
        stopping: CancellationToken,
    ) -> Self {
        let scribe = Scribe::start(&settings.state, notices.clone());
        Self {
            looked_for_lost: clock.now(),
            results: queue.subscribe(&[Lane::Results], RESULTS_AHEAD),
            asks,
            publish_not_before: None,
            is_asked_to_look: false,
            settings,
            clock,
            queue,
            books,
            scribe,
            notices,
            stopping,
            turn: 0,
            refused: Vec::new(),
            merged: Vec::new(),
            watched_at: DateTime::UNIX_EPOCH,
            wake_due: None,
            hooks: mpsc::unbounded_channel(),
        }
    }

    /// Runs until it is told to stop, or, with `once`, until nothing more can be done.
    pub async fn run(mut self) -> Result<Outcome> {
        let ended = self.run_loop().await;
        self.watch_last().await;
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
            let now = self.clock.now();
            if now >= next_discovery {
                self.carry_out_requests().await;
                self.discover(Listed::WhoIsDue).await;
                let poll = chrono::Duration::from_std(self.settings.poll).unwrap_or_default();
                next_discovery = self.clock.now() + poll;
                is_fresh = true;
            } else if self.wake_due.is_some_and(|at| at <= now) {
                self.discover(Listed::WhoIsWoken).await;
            }
            self.publish().await?;
            self.watch().await;
            self.wake_followers();
            if std::mem::take(&mut self.is_asked_to_look) {
                next_discovery = self.clock.now();
            }
            if self.settings.once && self.is_drained() {
                if is_fresh {
                    return Ok(());
                }
                next_discovery = self.clock.now();
                continue;
            }
            let wake_at = self.next_timer(next_discovery);
            match self.wait(wake_at).await {
                Woken::Result(delivery) => {
                    self.take_results(delivery).await?;
                    is_fresh = false;
                }
                Woken::Asked(Ask::Look) => next_discovery = self.clock.now(),
                Woken::Asked(Ask::Wake(pipelines)) => self.wake(&pipelines),
                Woken::Hook(ended) => self.note_hook(ended),
                Woken::Asked(ask) => self.answer(ask),
                Woken::Stopped => {}
                Woken::Timer => {
                    self.find_lost_tasks().await?;
                    if self.wants_listing_now() {
                        // A settling folder wants its second listing.
                        self.discover(Listed::WhoIsDue).await;
                    }
                }
            }
        }
    }

    async fn wait(&mut self, wake_at: DateTime<Utc>) -> Woken {
        let pause = (wake_at - self.clock.now()).to_std().unwrap_or_default();
        tokio::select! {
            // Results first: what is asked is answered from what is known.
            biased;
            () = self.stopping.cancelled() => Woken::Stopped,
            Some(delivery) = self.results.next() => Woken::Result(delivery),
            Some(ask) = self.asks.recv() => Woken::Asked(ask),
            Some(ended) = self.hooks.1.recv() => Woken::Hook(ended),
            () = tokio::time::sleep(pause) => Woken::Timer,
        }
    }

    /// A settling folder wants its second listing, or a schedule's time has come.
    fn wants_listing_now(&self) -> bool {
        let now = self.clock.now();
        let settles = |at: DateTime<Utc>| at <= now;
        self.books.iter().any(|book| {
            book.entries.values().any(|entry| entry.settles_at.is_some_and(settles))
                || book.next_listing(now).is_some_and(|at| at <= now)
        })
    }

    async fn discover(&mut self, listed: Listed) {
        let now = self.clock.now();
        self.wake_due = None;
        let mut events = Vec::new();
        for book in &mut self.books {
            let is_due =
                listed == Listed::WhoIsDue && book.is_to_be_listed(now, self.settings.once);
            if is_due || book.is_woken {
                discovering::discover(book, now, &self.notices).await;
            }
            events.append(&mut book.events);
        }
        if !events.is_empty() {
            self.scribe.write(Rows { events, ..Rows::default() }, None).await;
        }
    }

    /// Publishes what may go out, shared fairly between the pipelines.
    async fn publish(&mut self) -> Result<()> {
        let now = self.clock.now();
        let limits = self.settings.limits;
        if self.publish_not_before.is_some_and(|at| at > now) {
            return Ok(());
        }
        self.publish_not_before = None;
        let window = WINDOW_MIN.max(WINDOW_PER_SLOT * self.settings.slots.load(Ordering::Relaxed));
        let outstanding: usize = self.books.iter().map(|book| book.outstanding.len()).sum();
        let free = window.saturating_sub(outstanding);
        let mut tasks: Vec<Vec<Work>> = Vec::with_capacity(self.books.len());
        for book in &mut self.books {
            let views = book.epoch_views();
            let mut plan =
                if book.error.is_some() { Plan::default() } else { plan(&book.view(&views), now) };
            plan.cleanup &= !(self.settings.once && book.cleaned_here);
            tasks.push(works_of(book, &plan, free, limits, now, &self.notices).await);
        }
        let wanted: Vec<usize> = tasks.iter().map(Vec::len).collect();
        let given = share(&wanted, free, self.turn);
        self.turn = (self.turn + 1) % self.books.len().max(1);
        let mut chosen = Vec::new();
        for (index, works) in tasks.into_iter().enumerate() {
            for work in works.into_iter().take(given[index]) {
                chosen.push(self.task_of(index, work, now)?);
            }
        }
        self.send(chosen, now).await
    }

    /// Publishes tasks side by side: a broker confirms many about as fast as one.
    async fn send(&mut self, chosen: Vec<Ready>, now: DateTime<Utc>) -> Result<()> {
        let sending = chosen.into_iter().map(|ready| {
            let queue = Arc::clone(&self.queue);
            async move {
                crash::point("task.before_publish")?;
                let sent = queue.publish(ready.lane, ready.message.clone()).await;
                crash::point("task.after_publish")?;
                Ok((ready, sent))
            }
        });
        let sending = futures::future::join_all(sending);
        tokio::pin!(sending);
        // A broker in an alarm may keep us waiting: questions and a stop do not wait with us.
        let mut woken = Vec::new();
        let sent = loop {
            tokio::select! {
                sent = &mut sending => break sent,
                Some(ask) = self.asks.recv() => match ask {
                    Ask::Look => self.is_asked_to_look = true,
                    Ask::Wake(pipelines) => woken.extend(pipelines),
                    ask => self.answer(ask),
                },
                () = self.stopping.cancelled() => return Ok(()),
            }
        };
        self.wake(&woken);
        for sent in sent {
            let (ready, sent): (Ready, Result<()>) = sent?;
            match sent {
                Ok(()) => self.note_sent(ready)?,
                Err(error) => {
                    tracing::warn!(%error, task = %ready.id, "a task was not taken; tried again");
                    let pause = chrono::Duration::from_std(PUBLISH_PAUSE).unwrap_or_default();
                    self.publish_not_before = Some(now + pause);
                }
            }
        }
        Ok(())
    }

    fn task_of(&self, index: usize, work: Work, now: DateTime<Utc>) -> Result<Ready> {
        let book = &self.books[index];
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
        let trace = traces::sent(book, &task);
        let body = encode(&task)?;
        let message = Message { id: id.to_string(), body, trace };
        Ok(Ready { index, id, lane: Lane::of(work.step()), message, work, attempt, at: now })
    }

    fn note_sent(&mut self, ready: Ready) -> Result<()> {
        let Ready { index, id, work, attempt, at, lane, message } = ready;
        let book = &mut self.books[index];
        let event = match work.step() {
            Step::Ingest => Some(Event::IngestPublished),
            Step::Merge => Some(Event::MergePublished),
            Step::Optimize | Step::Cleanup | Step::Restore | Step::Shard => None,
        };
        let epochs = work.epochs();
        traces::note_sent(book, &epochs, message.trace.as_deref());
        let outstanding = Outstanding { work, lane, attempt, published_at: at, alive_at: at };
        book.outstanding.insert(id, outstanding);
        if let Some(event) = event {
            for epoch in epochs {
                if let Some(entry) = book.entries.get_mut(&epoch) {
                    entry.apply(event)?;
                }
            }
        }
        Ok(())
    }

    async fn take_results(&mut self, delivery: Delivery) -> Result<()> {
        let found: TaskResults = match decode(&delivery.message.body) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "results that cannot be understood were set aside");
                return delivery.set_aside().await;
            }
        };
        let now = self.clock.now();
        let mut rows = Rows::default();
        for result in found.results {
            traces::result(&result, now);
            let of_one = self.settle(&result, now).await?;
            rows.processed.extend(of_one.processed);
            rows.events.extend(of_one.events);
        }
        // Acknowledged by the scribe, after the batch with these rows.
        self.scribe.write(rows, Some(delivery)).await;
        Ok(())
    }

    /// Nothing is out, nothing may go out, nothing waits for a timer.
    fn is_drained(&self) -> bool {
        let now = self.clock.now();
        self.books.iter().all(|book| {
            // What is due again and did not go out waits for something else, a blocked epoch for one.
            let is_settled = |entry: &Entry| {
                entry.settles_at.is_none()
                    && (entry.not_before.is_none_or(|at| at <= now) || entry.state.is_stopped())
            };
            let is_told = self.is_hook_done(book);
            let is_idle = book.markers.is_held() || book.entries.values().all(is_settled);
            book.outstanding.is_empty()
                && is_told
                && (book.error.is_some() || (book.restoring.is_none() && is_idle))
        })
    }

    fn next_timer(&self, next_discovery: DateTime<Utc>) -> DateTime<Utc> {
        let entries = self.books.iter().flat_map(|book| book.entries.values());
        let timers = entries.flat_map(|entry| [entry.not_before, entry.settles_at]).flatten();
        let timers = timers.chain(self.publish_not_before).chain(self.next_look_for_lost());
        let maintenance = self.books.iter().filter_map(|book| book.maintenance_not_before);
        let restoring = self.books.iter().filter_map(|book| book.restoring.as_ref()?.not_before);
        let now = self.clock.now();
        let listings = self.books.iter().filter_map(|book| book.next_listing(now));
        let watching = [self.watched_at + WATCH_EVERY].into_iter().chain(self.wake_due);
        let hooks = self.books.iter().filter_map(|book| book.hook.as_ref()?.not_before);
        let others = restoring.chain(listings).chain(watching).chain(hooks);
        let soonest = timers.chain(maintenance).chain(others).filter(|at| *at > now).min();
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
            if book.markers.is_held() {
                outcome.paused.push(book.pipeline.id.clone());
            }
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
                    // Another process may serve the other pipelines of this state; and what is asked
                    // after a rollback waits for it.
                    let is_next = |book: &Book| {
                        let restoring = book.restoring.as_ref();
                        restoring.is_none_or(|restoring| restoring.request == request.id)
                    };
                    let book = self.books.iter().find(|book| book.pipeline.id == request.pipeline);
                    if book.is_some_and(is_next) {
                        self.carry_out(&request).await;
                    }
                }
            }
            Err(error) => tracing::error!(%error, "requests cannot be read"),
        }
    }
}

/// Whose sources a discovery lists.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listed {
    WhoIsDue,
    WhoIsWoken,
}

/// What woke the loop.
enum Woken {
    Result(Delivery),
    Asked(Ask),
    Hook(HookEnded),
    Timer,
    Stopped,
}

/// A task about to be published.
struct Ready {
    index: usize,
    id: Uuid,
    lane: Lane,
    message: Message,
    work: Work,
    attempt: u32,
    at: DateTime<Utc>,
}

/// The plan as work, most urgent first, at most `most` pieces.
async fn works_of(
    book: &mut Book,
    plan: &Plan,
    most: usize,
    limits: Limits,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Vec<Work> {
    let mut works = Vec::new();
    works.extend(book.restoring.as_ref().filter(|_| plan.restore).map(Restoring::work));
    if let Some(epochs) = &plan.merge {
        works.push(Work::Merge { epochs: epochs.clone() });
    }
    for epoch in plan.ingests.iter().take(most) {
        match pinning::ingest_work(book, *epoch).await {
            Ok(work) => works.push(work),
            Err(error) => put_off(book, *epoch, error, limits, now, notices),
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

/// An epoch whose manifest cannot be read: asked for again after a pause while that may help, else
/// blocked.
fn put_off(
    book: &mut Book,
    epoch: Epoch,
    error: Error,
    limits: Limits,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) {
    let Some(entry) = book.entries.get_mut(&epoch) else { return };
    entry.failures += 1;
    match judge(&error, entry.failures, entry.crashes, limits) {
        Judgement::Retry | Judgement::GiveBack => {
            let pause = delay(entry.failures, epoch.value().unsigned_abs());
            entry.not_before = chrono::Duration::from_std(pause).ok().map(|pause| now + pause);
        }
        Judgement::Block | Judgement::Park => {
            discovering::stop(book, epoch, Step::Ingest, error, now, notices);
        }
    }
}
