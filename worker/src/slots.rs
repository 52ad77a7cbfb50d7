//! A worker's slots: each takes a task, does it, answers, and only then acknowledges.
//!
//! ```text
//!  next ─► claim the lease ─► execute ─► publish the result ─► acknowledge ─► release
//!              │ taken           │ lease lost    (confirmed)
//!              └─────────────────┴─► give back: a held lease is never a reason to acknowledge
//! ```
//! Nothing that fails here ends a slot: a task whose message, lease or result was lost comes again,
//! and then finds its marker.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use alluvium_protocol::heartbeat::{InHand, Progress};
use alluvium_protocol::lease::{Claim, Leases};
use alluvium_protocol::metrics::metrics;
use alluvium_protocol::queue::{Delivery, Lane, Queue};
use alluvium_protocol::retry::CRASHES_MAX;
use alluvium_protocol::task::{
    Step, Task, TaskResult, Verdict, Work, decode, is_of_another_version,
};
use alluvium_protocol::trace::{self, Part};
use alluvium_protocol::{Class, Code, Error, Result, crash};
use chrono::{DateTime, Utc};
use futures::FutureExt;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::answers::Answers;
use crate::keeper::Held;
use crate::meter::Meter;
use crate::{Permit, Team, Workshop, shards};

/// How long a lease lives without renewal. A dead worker's task waits at most this long.
pub(crate) const LEASE_TTL: Duration = Duration::from_secs(15);
/// A task that came back so often is poison even if no lease counted its dead workers.
const RETURNS_MAX: u32 = 20;
/// A resting worker looks again after this pause.
const REST: Duration = Duration::from_secs(2);

/// A worker: slots that share queue, leases and tables.
#[derive(Clone)]
pub struct Worker {
    /// Who claims leases; unique per process.
    pub name: String,
    /// Tasks come from here, results go there.
    pub queue: Arc<dyn Queue>,
    /// Who works on what.
    pub leases: Arc<dyn Leases>,
    /// What the steps need.
    pub workshop: Workshop,
    /// Where leases are renewed: a runtime that no work keeps busy.
    pub keeping: Handle,
    /// The lanes that it serves.
    pub lanes: Vec<Lane>,
    /// No other slot, here or elsewhere, takes tasks.
    pub is_alone: bool,
    /// What it has in hand, and how it is to end.
    pub duty: Arc<Duty>,
}

/// How long a worker is to work.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    /// Take no more tasks; those in hand may end.
    pub draining: CancellationToken,
    /// Tasks in hand end at their next safe point and go back.
    pub stopping: CancellationToken,
    /// Drain after so many tasks.
    pub tasks_max: Option<usize>,
    /// Drain after so long without a task.
    pub idle_max: Option<Duration>,
}

/// What a worker's slots share about their work.
#[derive(Default)]
pub struct Duty {
    /// How long to work.
    pub orders: Orders,
    begun: AtomicUsize,
    in_hand: Mutex<HashMap<usize, (InHand, Arc<Meter>)>>,
    resting: Mutex<Option<String>>,
}

impl Duty {
    /// A duty under these orders.
    pub fn under(orders: Orders) -> Self {
        Self { orders, ..Self::default() }
    }

    /// Tasks in hand.
    pub fn tasks(&self) -> Vec<InHand> {
        let in_hand = self.in_hand.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |(task, meter): &(InHand, Arc<Meter>)| {
            let progress = meter.progress();
            InHand { progress, ..task.clone() }
        };
        in_hand.values().map(told).collect()
    }

    /// Why no tasks are taken at the moment.
    pub fn resting(&self) -> Option<String> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes no tasks for this reason, or takes them again.
    pub fn rest(&self, why: Option<String>) {
        *self.resting.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn note(&self, slot: usize, task: Option<(InHand, Arc<Meter>)>) {
        let mut in_hand = self.in_hand.lock().unwrap_or_else(PoisonError::into_inner);
        match task {
            Some(task) => in_hand.insert(slot, task),
            None => in_hand.remove(&slot),
        };
    }

    /// One more task may begin.
    fn begin(&self) -> bool {
        let begun = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        match self.orders.tasks_max {
            Some(most) if begun >= most => {
                self.orders.draining.cancel();
                begun == most
            }
            _ => true,
        }
    }
}

/// A task on its way through a slot.
struct Attempt {
    task: Task,
    held: Held,
    deaths: u32,
    received_at: DateTime<Utc>,
    claimed_at: DateTime<Utc>,
    redelivered: bool,
    meter: Arc<Meter>,
}

impl Worker {
    /// Runs `slots` slots until the queue closes or the worker drains.
    pub async fn run(self, slots: usize) -> Result<()> {
        let mut running = JoinSet::new();
        let answers = Answers::start(Arc::clone(&self.queue));
        for slot in 0..slots {
            let (worker, answers) = (self.clone(), answers.clone());
            running.spawn(async move { worker.run_slot(slot, &answers).await });
        }
        while let Some(ended) = running.join_next().await {
            ended.map_err(|e| Error::internal(format!("a slot ended: {e}")))?;
        }
        Ok(())
    }

    async fn run_slot(&self, slot: usize, answers: &Answers) {
        let mut rests_since: Option<Instant> = None;
        while !self.duty.orders.draining.is_cancelled() {
            if self.duty.resting().is_some() {
                let rested = rests_since.get_or_insert_with(Instant::now).elapsed();
                let is_idle = self.duty.tasks().is_empty();
                if is_idle && self.duty.orders.idle_max.is_some_and(|most| rested >= most) {
                    self.duty.orders.draining.cancel();
                }
                // Unsubscribed: tasks go to others meanwhile.
                tokio::select! {
                    () = tokio::time::sleep(REST) => {}
                    () = self.duty.orders.draining.cancelled() => {}
                }
                continue;
            }
            rests_since = None;
            if self.take_tasks(slot, answers).await.is_none() {
                return;
            }
        }
    }

    /// Takes tasks until the worker rests (Some) or is to end (None).
    async fn take_tasks(&self, slot: usize, answers: &Answers) -> Option<()> {
        let mut subscription = self.queue.subscribe(&self.lanes, 1);
        let mut idle_since = Instant::now();
        loop {
            if self.duty.resting().is_some() {
                return Some(());
            }
            let left =
                self.duty.orders.idle_max.map(|most| most.saturating_sub(idle_since.elapsed()));
            let delivery = tokio::select! {
                biased;
                () = self.duty.orders.draining.cancelled() => return None,
                delivery = subscription.next() => delivery?,
                () = tokio::time::sleep(left.unwrap_or(REST).min(REST)) => {
                    // Others may be at work on what makes the next tasks.
                    if left.is_some_and(|left| left <= REST) {
                        match self.duty.tasks().is_empty() {
                            true => self.duty.orders.draining.cancel(),
                            false => idle_since = Instant::now(),
                        }
                    }
                    continue;
                }
            };
            if !self.duty.begin() {
                drop(delivery);
                return None;
            }
            if let Err(error) = self.handle(slot, delivery, answers).await {
                tracing::warn!(%error, "a task comes again: its message was not settled");
            }
            self.duty.note(slot, None);
            idle_since = Instant::now();
        }
    }

    async fn handle(&self, slot: usize, delivery: Delivery, answers: &Answers) -> Result<()> {
        let received_at = self.workshop.clock.now();
        let task: Task = match decode(&delivery.message.body) {
            Ok(task) => task,
            Err(error) => {
                if is_of_another_version(&delivery.message.body) {
                    tracing::warn!(%error, "gave back a message of another version");
                    return delivery.give_back().await;
                }
                tracing::error!(%error, "set a message aside that nobody can understand");
                return delivery.set_aside().await;
            }
        };
        let owner = format!("{}/{slot}", self.name);
        let (fence, deaths) = match self.claim(&task, &owner, delivery.redelivered).await {
            Ok(Claim::Held { fence, deaths }) => (Some(fence), deaths),
            Ok(Claim::Taken { owner, .. }) => {
                tracing::debug!(task = %task.id, owner, "somebody else works on a task; gave it back");
                return delivery.give_back().await;
            }
            Err(error) => {
                tracing::warn!(%error, task = %task.id, "works without a lease");
                (None, 0)
            }
        };
        let meter = Arc::new(Meter::default());
        self.duty.note(slot, Some((in_hand(&task, received_at), Arc::clone(&meter))));
        let _counted = InFlight::of(task.work.step());
        let claimed_at = self.workshop.clock.now();
        let redelivered = delivery.redelivered;
        let held = Held::new(&self.leases, task.id, owner, fence);
        let mut attempt =
            Attempt { task, held, deaths, received_at, claimed_at, redelivered, meter };
        let sent = delivery.message.trace.as_deref().and_then(trace::parse);
        let lane = Lane::of(attempt.task.work.step());
        let span = trace::process_span(&attempt.task, sent.as_ref(), lane.as_str());
        if let Some(sent) = &sent {
            tell_waits(&attempt, sent, &span);
        }
        count_waits(&attempt);
        let outcome = self.attempt(&mut attempt, delivery, answers).instrument(span).await;
        attempt.held.release().await;
        outcome
    }

    /// A redelivered task falls to us: the broker says that its worker is gone.
    async fn claim(&self, task: &Task, owner: &str, redelivered: bool) -> Result<Claim> {
        let mut take_over = redelivered;
        if let Work::Shard { of, .. } = &task.work
            && redelivered
            && let Some(lead) = self.leases.holder(*of).await?
        {
            // Whoever has the step does pieces without their messages: one that only came back untouched says
            // nothing of it.
            take_over = self.leases.holder(task.id).await? != Some(lead);
        }
        self.leases.claim(task.id, owner, LEASE_TTL, take_over).await
    }

    /// Executes and answers, inside the attempt's span.
    async fn attempt(
        &self,
        attempt: &mut Attempt,
        delivery: Delivery,
        answers: &Answers,
    ) -> Result<()> {
        let verdict = if let Some(error) = poison(attempt, delivery.returns) {
            Verdict::Failed(error)
        } else {
            // An injected failure here is the task's own, like any other before the effect.
            match crash::point("task.after_claim") {
                Ok(()) => self.execute(attempt).await,
                Err(error) => Verdict::Failed(error),
            }
        };
        if let Verdict::Failed(error) = &verdict {
            trace::fail(&tracing::Span::current(), error);
            if error.code == Code::LeaseLost {
                metrics().lease_lost();
                // Who has the lease answers. Ours comes back later, in case that one dies.
                return delivery.give_back().await;
            }
        }
        if attempt.task.work.step() == Step::Shard {
            return self.settle_piece(attempt, &verdict, delivery).await;
        }
        self.answer(attempt, verdict, delivery, answers).await
    }

    /// Who has the step waits for its pieces, not the coordinator: what a piece made is told already.
    async fn settle_piece(
        &self,
        attempt: &Attempt,
        verdict: &Verdict,
        delivery: Delivery,
    ) -> Result<()> {
        self.count(attempt, verdict);
        if let Verdict::Failed(error) = verdict {
            tracing::warn!(%error, task = %attempt.task.id, "could not do a piece of a step");
            if matches!(error.class(), Class::Transient | Class::Stopping) {
                return delivery.give_back().await;
            }
            shards::give_up(&attempt.task, error, attempt.deaths).await?;
        }
        delivery.ack().await
    }

    fn count(&self, attempt: &Attempt, verdict: &Verdict) {
        let took = self.workshop.clock.now() - attempt.claimed_at;
        count(&attempt.task, verdict, took.as_seconds_f64());
    }

    /// Executes with the lease renewed beside it.
    async fn execute(&self, attempt: &mut Attempt) -> Verdict {
        let permit = Permit {
            stopping: self.duty.orders.stopping.clone(),
            lease_lost: CancellationToken::new(),
            meter: Arc::clone(&attempt.meter),
            team: (!self.is_alone).then(|| Team {
                queue: Arc::clone(&self.queue),
                leases: Arc::clone(&self.leases),
                owner: attempt.held.owner.clone(),
                keeping: self.keeping.clone(),
            }),
        };
        let _kept = attempt.held.keep(permit.lease_lost.clone(), &self.keeping);
        let work = AssertUnwindSafe(self.workshop.execute(&attempt.task, &permit)).catch_unwind();
        match work.await {
            Ok(Ok(report)) => Verdict::Done(Box::new(report)),
            Ok(Err(error)) => {
                if error.code == Code::TaskPoison {
                    // At a piece of it.
                    attempt.deaths = attempt.deaths.max(CRASHES_MAX);
                }
                Verdict::Failed(error)
            }
            Err(panic) => Verdict::Failed(panicked(panic.as_ref())),
        }
    }

    /// Publishes the result and acknowledges last. A failure in between redelivers the task, which
    /// then finds its marker.
    async fn answer(
        &self,
        attempt: &Attempt,
        verdict: Verdict,
        delivery: Delivery,
        answers: &Answers,
    ) -> Result<()> {
        let task = &attempt.task;
        self.count(attempt, &verdict);
        let result = TaskResult {
            task: task.id,
            pipeline: task.pipeline.id.clone(),
            work: task.work.clone(),
            attempt: task.attempt,
            worker: attempt.held.owner.clone(),
            deaths: attempt.deaths,
            published_at: task.published_at,
            started_at: attempt.claimed_at,
            finished_at: self.workshop.clock.now(),
            trace: trace::traceparent(&trace::context_of(&tracing::Span::current())),
            verdict,
        };
        if let Err(error) = crash::point("result.before_publish") {
            tracing::debug!(%error, "the result was lost; the task comes again");
            drop(delivery);
            return Ok(());
        }
        match answers.publish(result).await {
            // Nobody listens any more; the next process finds the marker.
            Err(_) if self.duty.orders.stopping.is_cancelled() => return Ok(()),
            published => published?,
        }
        if let Err(error) = crash::point("result.after_publish") {
            tracing::debug!(%error, "not acknowledged; the task comes again");
            drop(delivery);
            return Ok(());
        }
        delivery.ack().await?;
        let _ = crash::point("task.after_ack");
        Ok(())
    }
}

/// A task in hand, as long as it lives.
struct InFlight(Step);

impl InFlight {
    fn of(step: Step) -> Self {
        metrics().in_flight(step.as_str(), 1);
        Self(step)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        metrics().in_flight(self.0.as_str(), -1);
    }
}

fn count_waits(attempt: &Attempt) {
    let queue = attempt.received_at - attempt.task.published_at;
    let lease = attempt.claimed_at - attempt.received_at;
    let step = attempt.task.work.step().as_str();
    metrics().waits(step, queue.as_seconds_f64(), lease.as_seconds_f64());
}

fn count(task: &Task, verdict: &Verdict, seconds: f64) {
    let (pipeline, step) = (&task.pipeline.id, task.work.step());
    let word = match verdict {
        Verdict::Done(_) => "done",
        Verdict::Failed(error) => match error.class() {
            Class::Transient => "transient",
            Class::Permanent => "permanent",
            Class::Crash => "crash",
            Class::Stopping => "stopping",
        },
    };
    metrics().step(pipeline, step.as_str(), word, seconds);
    let Verdict::Done(report) = verdict else { return };
    metrics().conflicts(pipeline, step.as_str(), report.conflicts);
    if report.already {
        return;
    }
    if !matches!(step, Step::Cleanup | Step::Shard) {
        metrics().committed(step.as_str(), report.conflicts + 1);
    }
    match step {
        Step::Ingest => {
            metrics().rows(pipeline, "raw", report.rows_written);
            metrics().rows(pipeline, "quarantine", report.rows_quarantined);
        }
        Step::Merge => metrics().rows(pipeline, "main", report.rows_written),
        Step::Optimize | Step::Cleanup | Step::Restore | Step::Shard => {}
    }
}

fn in_hand(task: &Task, since: DateTime<Utc>) -> InHand {
    InHand {
        task: task.id,
        pipeline: task.pipeline.id.clone(),
        step: task.work.step(),
        epochs: task.work.epochs(),
        since,
        progress: Progress::default(),
    }
}

/// Waiting in the queue and for the lease, apart from work. Clocks of two machines may differ: a
/// wait is never shown as negative.
fn tell_waits(attempt: &Attempt, sent: &opentelemetry::trace::SpanContext, span: &tracing::Span) {
    trace::below(sent, Part::new("queue wait", attempt.task.published_at, attempt.received_at));
    let process = trace::context_of(span);
    if process.is_valid() {
        trace::below(&process, Part::new("lease wait", attempt.received_at, attempt.claimed_at));
    }
    if attempt.redelivered {
        tracing::info!(parent: span, "previous_attempt_lost");
    }
}

/// Why a task must not be tried again: its workers die.
fn poison(attempt: &Attempt, returns: u32) -> Option<Error> {
    let text = if attempt.deaths >= CRASHES_MAX {
        format!("{} workers died at this task", attempt.deaths)
    } else if returns >= RETURNS_MAX {
        format!("the task came back unfinished {returns} times")
    } else {
        return None;
    };
    Some(Error::new(Code::TaskPoison, text))
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    Error::new(Code::TaskPoison, format!("the worker panicked: {text}"))
}
