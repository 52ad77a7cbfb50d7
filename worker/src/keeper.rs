//! Keeps a task's lease while the task runs, on a runtime of its own.

use std::sync::Arc;
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
    /// `None`: the lease could not be had so far. It only saves work.
    pub(crate) fence: Option<u64>,
}

impl Held {
    /// Renews it from now on; dropping the handle ends that. `lost` is cancelled when somebody else has it.
    pub(crate) fn keep(&self, lost: CancellationToken, runtime: &Handle) -> AbortOnDropHandle<()> {
        let span = trace::context_of(&tracing::Span::current());
        let keeper = Keeper { held: self.clone(), lost, span };
        AbortOnDropHandle::new(runtime.spawn(keeper.run()))
    }

    /// Gives it up, unless somebody else has it.
    pub(crate) async fn release(&self) {
        let Some(fence) = self.fence else { return };
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
    async fn run(mut self) {
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
    async fn renew(&mut self) -> bool {
        let Held { leases, task, owner, fence } = &mut self.held;
        if let Some(fence) = *fence {
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
                *fence = Some(new);
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
