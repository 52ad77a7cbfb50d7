//! The in-process twin of the leases.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
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
    leases: Mutex<(u64, HashMap<Uuid, Lease>)>,
}

impl MemoryLeases {
    /// No leases yet.
    pub fn new(clock: ClockRef) -> Self {
        Self { clock, leases: Mutex::default() }
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
        let mut guard = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let (last_fence, leases) = &mut *guard;
        if let Some(lease) = leases.get_mut(&task)
            && lease.until > now
        {
            if lease.owner == owner {
                lease.until = now + ttl;
                return Ok(Claim::Held { fence: lease.fence });
            }
            if !take_over {
                let remaining = (lease.until - now).to_std().unwrap_or_default();
                return Ok(Claim::Taken { owner: lease.owner.clone(), remaining });
            }
        }
        // One counter for all tasks: larger than every earlier fence, and nothing to keep per task.
        *last_fence += 1;
        let fence = *last_fence;
        leases.retain(|_, lease| lease.until > now);
        leases.insert(task, Lease { owner: owner.to_owned(), fence, until: now + ttl });
        Ok(Claim::Held { fence })
    }

    async fn renew(&self, task: Uuid, owner: &str, fence: u64, ttl: Duration) -> Result<bool> {
        let now = self.clock.now();
        let mut guard = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        match guard.1.get_mut(&task) {
            Some(lease) if lease.owner == owner && lease.fence == fence && lease.until > now => {
                lease.until = now + ttl;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    async fn release(&self, task: Uuid, owner: &str, fence: u64) -> Result<()> {
        let mut guard = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.1.get(&task).is_some_and(|lease| lease.owner == owner && lease.fence == fence) {
            guard.1.remove(&task);
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
