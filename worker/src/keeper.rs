//! Keeps a task's lease while the task runs, on a runtime of its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alluvium_protocol::lease::{Claim, Leases};
use alluvium_protocol::trace::{self, Part};
use chrono::Utc;
use opentelemetry::trace::SpanContext;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::slots::LEASE_TTL;

/// Three renewals fit into a lease's life: one may be lost, one late.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// A long task leaves a span so often: a killed worker's trace then tells how far it came.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// A task's lease, as it was claimed.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) leases: Arc<dyn Leases>,
    pub(crate) task: Uuid,
    pub(crate) owner: String,
    /// `None`: the lease could not be had so far. It only saves work. Whoever renews it may get another.
    fence: Arc<Mutex<Option<u64>>>,
}

impl Held {
    pub(crate) fn new(
        leases: &Arc<dyn Leases>,
        task: Uuid,
        owner: String,
        fence: Option<u64>,
    ) -> Self {
        Self { leases: Arc::clone(leases), task, owner, fence: Arc::new(Mutex::new(fence)) }
    }

    fn fence(&self) -> MutexGuard<'_, Option<u64>> {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renews it from now on; dropping the handle ends that. `lost` is cancelled when somebody else has it.
    pub(crate) fn keep(&self, lost: CancellationToken, runtime: &Handle) -> AbortOnDropHandle<()> {
        let span = trace::context_of(&tracing::Span::current());
        let keeper = Keeper { held: self.clone(), lost, span };
        AbortOnDropHandle::new(runtime.spawn(keeper.run()))
    }

    /// Gives it up, unless somebody else has it.
    pub(crate) async fn release(&self) {
        let Some(fence) = *self.fence() else { return };
        if let Err(error) = self.leases.release(self.task, &self.owner, fence).await {
            tracing::debug!(%error, task = %self.task, "a lease was not released; it runs out");
        }
    }
}

/// Renews one lease.
struct Keeper {
    held: Held,
    lost: CancellationToken,
    span: SpanContext,
}

impl Keeper {
    async fn run(self) {
        let mut checkpoint = (Instant::now(), Utc::now());
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            if !self.renew().await {
                self.lost.cancel();
                return;
            }
            if checkpoint.0.elapsed() >= CHECKPOINT_EVERY && self.span.is_valid() {
                let now = Utc::now();
                trace::below(&self.span, Part::new("checkpoint", checkpoint.1, now));
                checkpoint = (Instant::now(), now);
            }
        }
    }

    /// False: somebody else has the lease.
    async fn renew(&self) -> bool {
        let Held { leases, task, owner, .. } = &self.held;
        let fence = *self.held.fence();
        if let Some(fence) = fence {
            match leases.renew(*task, owner, fence, LEASE_TTL).await {
                Ok(true) => return true,
                Ok(false) => {}
                // The lease only saves work: go on without it.
                Err(error) => {
                    tracing::warn!(%error, %task, "could not renew a lease");
                    return true;
                }
            }
        }
        // Run out, forgotten by a Redis that was emptied, taken over, or never had.
        match leases.claim(*task, owner, LEASE_TTL, false).await {
            Ok(Claim::Held { fence: new, .. }) => {
                *self.held.fence() = Some(new);
                true
            }
            Ok(Claim::Taken { owner, .. }) => {
                tracing::warn!(%task, owner, "lost a lease; stops at a safe point");
                // It counted as a death of ours, and we live.
                if let Err(error) = leases.survived(*task).await {
                    tracing::debug!(%error, "could not say that this worker lives");
                }
                false
            }
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use alluvium_protocol::clock::SystemClock;
    use alluvium_protocol::lease::memory::MemoryLeases;

    use super::*;

    #[tokio::test]
    async fn a_lease_that_was_lost_and_claimed_anew_is_released() {
        let leases: Arc<dyn Leases> = Arc::new(MemoryLeases::new(Arc::new(SystemClock)));
        let (task, owner) = (Uuid::new_v4(), "w/0".to_owned());
        let claimed = leases.claim(task, &owner, LEASE_TTL, false).await.unwrap();
        let Claim::Held { fence, .. } = claimed else { panic!("somebody has it") };
        // As a Redis that was emptied.
        leases.release(task, &owner, fence).await.unwrap();
        let held = Held::new(&leases, task, owner, Some(fence));
        let (lost, span) = (CancellationToken::new(), SpanContext::empty_context());
        let keeper = Keeper { held: held.clone(), lost, span };
        assert!(keeper.renew().await && leases.holder(task).await.unwrap().is_some());
        held.release().await;
        assert_eq!(leases.holder(task).await.unwrap(), None);
    }
}
