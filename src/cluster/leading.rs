//! Which coordinator leads. Thrift, not safety: two that both believe to lead publish the same tasks
//! under the same ids, and the tables do not change twice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use alluvium_protocol::lease::redis::RedisLeases;
use alluvium_protocol::lease::{Claim, Leases};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

/// How long a dead leader is waited for.
const LEAD_TTL: Duration = Duration::from_secs(6);
/// Three renewals fit in.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// How often one that stands by looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Without an answer of Redis for so long, one that stands by leads: doing it twice harms nobody,
/// not doing it does.
const LEAD_WITHOUT_REDIS_AFTER: Duration = Duration::from_secs(15);

/// The lead, kept until it is dropped or lost.
pub(crate) struct Leadership {
    leases: Arc<RedisLeases>,
    id: Uuid,
    name: String,
    fence: Option<u64>,
    _kept: AbortOnDropHandle<()>,
}

/// The lease's id: one for each cluster.
fn id_of(cluster: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{cluster}/leader").as_bytes())
}

/// Waits until this process leads. `None`: it is told to stop first. `told` hears who leads meanwhile.
pub(crate) async fn lead(
    leases: &RedisLeases,
    cluster: &str,
    name: &str,
    links: &Handle,
    lost: CancellationToken,
    stopping: &CancellationToken,
    mut told: impl FnMut(Option<String>),
) -> Option<Leadership> {
    let leases = Arc::new(leases.clone());
    let id = id_of(cluster);
    let mut silent_since: Option<Instant> = None;
    let fence = loop {
        match leases.claim(id, name, LEAD_TTL, false).await {
            Ok(Claim::Held { fence, .. }) => break Some(fence),
            Ok(Claim::Taken { owner, .. }) => {
                silent_since = None;
                told(Some(owner));
            }
            Err(error) => {
                let since = *silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() > LEAD_WITHOUT_REDIS_AFTER {
                    tracing::warn!(%error, "leads without a lease");
                    break None;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stopping.cancelled() => return None,
        }
    };
    let keeping = keep(Arc::clone(&leases), id, name.to_owned(), fence, lost);
    let kept = AbortOnDropHandle::new(links.spawn(keeping));
    Some(Leadership { leases, id, name: name.to_owned(), fence, _kept: kept })
}

async fn keep(
    leases: Arc<RedisLeases>,
    id: Uuid,
    name: String,
    mut fence: Option<u64>,
    lost: CancellationToken,
) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        let is_renewed = match fence {
            Some(fence) => leases.renew(id, &name, fence, LEAD_TTL).await,
            None => Ok(false),
        };
        match is_renewed {
            Ok(true) => {}
            Ok(false) => match leases.claim(id, &name, LEAD_TTL, false).await {
                Ok(Claim::Held { fence: new, .. }) => fence = Some(new),
                Ok(Claim::Taken { owner, .. }) => {
                    tracing::warn!(owner, "another coordinator leads now; stands by");
                    lost.cancel();
                    return;
                }
                Err(error) => tracing::debug!(%error, "leads on without a lease"),
            },
            Err(error) => tracing::debug!(%error, "leads on without a lease"),
        }
    }
}

impl Leadership {
    /// Gives the lead up, so that another one need not wait.
    pub(crate) async fn give_up(self) {
        if let Some(fence) = self.fence
            && let Err(error) = self.leases.release(self.id, &self.name, fence).await
        {
            tracing::debug!(%error, "the lead was not given up; it runs out");
        }
    }
}
