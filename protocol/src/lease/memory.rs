//! The in-process twin of the leases.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Claim, Leases};
use crate::Result;
use crate::clock::ClockRef;

struct Lease {
    owner: String,
    fence: u64,
    until: DateTime<Utc>,
}

/// Leases in this process's memory, by the clock given.
pub struct MemoryLeases {
    clock: ClockRef,
    leases: Mutex<Leased>,
}

#[derive(Default)]
struct Leased {
    // One counter for all tasks: larger than every earlier fence, and nothing to keep per task.
    last_fence: u64,
    by_task: HashMap<Uuid, Lease>,
    deaths: HashMap<Uuid, u32>,
}

impl MemoryLeases {
    /// No leases yet.
    pub fn new(clock: ClockRef) -> Self {
        Self { clock, leases: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Leased> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Leases for MemoryLeases {
    async fn claim(
        &self,
        task: Uuid,
        owner: &str,
        ttl: Duration,
        take_over: bool,
    ) -> Result<Claim> {
        let now = self.clock.now();
        let mut leased = self.lock();
        let mut deaths = leased.deaths.get(&task).copied().unwrap_or(0);
        if let Some(lease) = leased.by_task.get_mut(&task)
            && lease.until > now
        {
            if lease.owner == owner {
                lease.until = now + ttl;
                return Ok(Claim::Held { fence: lease.fence, deaths });
            }
            if !take_over {
                let remaining = (lease.until - now).to_std().unwrap_or_default();
                return Ok(Claim::Taken { owner: lease.owner.clone(), remaining });
            }
            deaths += 1;
            leased.deaths.insert(task, deaths);
        }
        leased.last_fence += 1;
        let fence = leased.last_fence;
        leased.by_task.retain(|_, lease| lease.until > now);
        leased.by_task.insert(task, Lease { owner: owner.to_owned(), fence, until: now + ttl });
        Ok(Claim::Held { fence, deaths })
    }

    async fn renew(&self, task: Uuid, owner: &str, fence: u64, ttl: Duration) -> Result<bool> {
        let now = self.clock.now();
        match self.lock().by_task.get_mut(&task) {
            Some(lease) if lease.owner == owner && lease.fence == fence && lease.until > now => {
                lease.until = now + ttl;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    async fn survived(&self, task: Uuid) -> Result<()> {
        if let Some(deaths) = self.lock().deaths.get_mut(&task) {
            *deaths = deaths.saturating_sub(1);
        }
        Ok(())
    }

    async fn holder(&self, task: Uuid) -> Result<Option<String>> {
        let now = self.clock.now();
        let leased = self.lock();
        let lease = leased.by_task.get(&task).filter(|lease| lease.until > now);
        Ok(lease.map(|lease| lease.owner.clone()))
    }

    async fn release(&self, task: Uuid, owner: &str, fence: u64) -> Result<()> {
        let mut leased = self.lock();
        let is_ours = |lease: &Lease| lease.owner == owner && lease.fence == fence;
        if leased.by_task.get(&task).is_some_and(is_ours) {
            leased.by_task.remove(&task);
            leased.deaths.remove(&task);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::lease::contract::{self, Fixture};

    #[tokio::test]
    async fn the_in_process_leases_keep_the_contract() {
        contract::all(|| async {
            let clock = Arc::new(ManualClock::new(DateTime::UNIX_EPOCH));
            let leases = Arc::new(MemoryLeases::new(clock.clone()));
            let pass = Box::new(move |time| {
                clock.advance(chrono::Duration::from_std(time).unwrap());
            });
            Fixture { leases, pass }
        })
        .await;
    }
}
