//! A worker's slots: each takes a task, does it, answers, and only then acknowledges.
//!
//! ```text
//!  receive ─► claim the lease ─► execute ─► publish the result ─► acknowledge ─► release
//!                 │ taken                        (confirmed)
//!                 └─► give back: a held lease is never a reason to acknowledge
//! ```

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::lease::{Claim, Leases};
use alluvium_protocol::queue::{Delivery, Lane, Queue};
use alluvium_protocol::task::{FORMAT_MAJOR, Task, TaskResult, Verdict, decode, encode};
use alluvium_protocol::{Code, Error, Result, crash};
use chrono::{DateTime, Utc};
use futures::FutureExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{Permit, Workshop};

/// How long a lease lives without renewal. A dead worker's task waits at most this long.
const LEASE_TTL: Duration = Duration::from_secs(15);
/// Three renewals fit into a lease's life: one may be lost, one late.
const LEASE_RENEW_EVERY: Duration = Duration::from_secs(5);
/// A message that came too early is looked at again after this pause.
const GIVE_BACK_PAUSE: Duration = Duration::from_millis(200);

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
    /// Set when the process is to stop.
    pub stopping: CancellationToken,
}

impl Worker {
    /// Runs `slots` slots until the queue closes or the process stops. A task in hand at that time
    /// ends at its next safe point and goes back.
    pub async fn run(self, slots: usize) -> Result<()> {
        let mut running = JoinSet::new();
        for _ in 0..slots {
            let worker = self.clone();
            running.spawn(async move { worker.run_slot().await });
        }
        while let Some(ended) = running.join_next().await {
            ended.map_err(|e| Error::internal(format!("a slot ended: {e}")))??;
        }
        Ok(())
    }

    async fn run_slot(&self) -> Result<()> {
        loop {
            let received = tokio::select! {
                received = self.queue.receive(&Lane::TASKS) => received?,
                () = self.stopping.cancelled() => return Ok(()),
            };
            let Some(delivery) = received else { return Ok(()) };
            self.handle(delivery).await?;
        }
    }

    async fn handle(&self, delivery: Delivery) -> Result<()> {
        let task: Task = match decode(&delivery.body) {
            Ok(task) => task,
            Err(error) => {
                // Perhaps a newer worker understands it.
                tracing::warn!(%error, "gave back a message of another format");
                tokio::time::sleep(GIVE_BACK_PAUSE).await;
                return delivery.give_back().await;
            }
        };
        let claim = self.leases.claim(task.id, &self.name, LEASE_TTL, delivery.redelivered).await?;
        let Claim::Held { fence } = claim else {
            tokio::time::sleep(GIVE_BACK_PAUSE).await;
            return delivery.give_back().await;
        };
        // An injected failure here is the task's own, like any other before the effect.
        let started_at = self.workshop.clock.now();
        let verdict = match crash::point("task.after_claim") {
            Ok(()) => self.execute(&task, fence).await,
            Err(error) => Verdict::Failed(error),
        };
        let outcome = self.answer(&task, started_at, verdict, delivery).await;
        self.leases.release(task.id, &self.name, fence).await?;
        outcome
    }

    /// Executes with the lease renewed beside it.
    async fn execute(&self, task: &Task, fence: u64) -> Verdict {
        let lease_lost = CancellationToken::new();
        let permit = Permit { stopping: self.stopping.clone(), lease_lost: lease_lost.clone() };
        let work = AssertUnwindSafe(self.workshop.execute(task, &permit)).catch_unwind();
        let renewal = self.keep_lease(task, fence, &lease_lost);
        let ended = tokio::select! {
            ended = work => ended,
            never = renewal => match never {},
        };
        match ended {
            Ok(Ok(report)) => Verdict::Done(Box::new(report)),
            Ok(Err(error)) => Verdict::Failed(error),
            Err(panic) => Verdict::Failed(panicked(panic.as_ref())),
        }
    }

    async fn keep_lease(
        &self,
        task: &Task,
        fence: u64,
        lease_lost: &CancellationToken,
    ) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(LEASE_RENEW_EVERY).await;
            match self.leases.renew(task.id, &self.name, fence, LEASE_TTL).await {
                Ok(true) => {}
                Ok(false) => lease_lost.cancel(),
                // The lease only saves work: go on without it.
                Err(error) => tracing::warn!(%error, task = %task.id, "could not renew a lease"),
            }
        }
    }

    /// Publishes the result and acknowledges last. A failure in between redelivers the task, which
    /// then finds its marker.
    async fn answer(
        &self,
        task: &Task,
        started_at: DateTime<Utc>,
        verdict: Verdict,
        delivery: Delivery,
    ) -> Result<()> {
        let now = self.workshop.clock.now();
        let result = TaskResult {
            format: FORMAT_MAJOR,
            task: task.id,
            pipeline: task.pipeline.id.clone(),
            work: task.work.clone(),
            attempt: task.attempt,
            worker: self.name.clone(),
            published_at: task.published_at,
            started_at,
            finished_at: now,
            verdict,
        };
        let body = encode(&result)?;
        if let Err(error) = crash::point("result.before_publish") {
            tracing::debug!(%error, "the result was lost; the task comes again");
            drop(delivery);
            return Ok(());
        }
        match self.queue.publish(Lane::Results, body).await {
            // Nobody listens any more; the next process finds the marker.
            Err(_) if self.stopping.is_cancelled() => return Ok(()),
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

fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    Error::new(Code::TaskPoison, format!("the worker panicked: {text}"))
}
