//! How this process is: processor, memory, disk. Sent as a heartbeat every few seconds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::heartbeat::Heartbeat;
use alluvium_protocol::lease::redis::RedisLeases;
use alluvium_protocol::metrics::metrics;
use alluvium_worker::slots::Duty;
use chrono::{DateTime, Utc};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use super::{host, process_name};

/// Pause between two heartbeats.
const BEAT_EVERY: Duration = Duration::from_secs(2);
/// Without a word for so long a process counts as gone.
const BEAT_TTL: Duration = Duration::from_secs(10);

/// What a worker may use up before it rests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Free disk, bytes.
    pub(crate) disk_free: u64,
    /// Free memory of the machine, bytes.
    pub(crate) memory_free: u64,
}

/// A process that tells how it is.
pub(crate) struct Vitals {
    pub(crate) role: &'static str,
    pub(crate) leases: RedisLeases,
    pub(crate) slots: usize,
    pub(crate) duty: Arc<Duty>,
    pub(crate) limits: Option<Limits>,
    pub(crate) started_at: DateTime<Utc>,
    /// Keeps the cluster's name ours.
    pub(crate) state: String,
}

impl Vitals {
    /// Begins; dropping the handle ends it.
    pub(crate) fn start(self, links: &Handle) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(links.spawn(self.run()))
    }

    async fn run(self) {
        let mut system = System::new();
        loop {
            let heartbeat = self.look(&mut system);
            let Heartbeat { cpu, memory_bytes, disk_free_bytes, slots, .. } = heartbeat;
            Used { cpu, memory_bytes, disk_free_bytes }.show(slots);
            if let Some(limits) = self.limits {
                let own = if self.duty.tasks().is_empty() { memory_bytes } else { 0 };
                self.duty.rest(reason_to_rest(&system, limits, own));
            }
            let sent = self.leases.beat(&heartbeat, BEAT_TTL).await;
            if self.role == "worker" {
                metrics().set("worker_up", &[], f64::from(u8::from(heartbeat.resting.is_none())));
                if sent.is_ok() {
                    let at = heartbeat.at.timestamp_millis() as f64 / 1000.0;
                    metrics().set("worker_last_heartbeat_timestamp_seconds", &[], at);
                }
            }
            // Nobody hears it: nothing is lost.
            if let Err(error) = sent {
                tracing::debug!(%error, "a heartbeat was not sent");
            }
            let _ = self.leases.belongs_to(&self.state).await;
            tokio::time::sleep(BEAT_EVERY).await;
        }
    }

    fn look(&self, system: &mut System) -> Heartbeat {
        let used = Used::now(system);
        let is_draining = self.duty.orders.draining.is_cancelled();
        let draining = is_draining.then(|| "it drains".to_owned());
        Heartbeat {
            name: process_name(),
            role: self.role.to_owned(),
            host: host(),
            process: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started_at,
            at: Utc::now(),
            slots: self.slots,
            resting: draining.or_else(|| self.duty.resting()),
            tasks: self.duty.tasks(),
            cpu: used.cpu,
            memory_bytes: used.memory_bytes,
            disk_free_bytes: used.disk_free_bytes,
        }
    }
}

/// What this process uses, and what is free.
pub(crate) struct Used {
    cpu: f64,
    memory_bytes: u64,
    disk_free_bytes: u64,
}

impl Used {
    /// Since the last look at the same `system`, as far as processors are concerned.
    pub(crate) fn now(system: &mut System) -> Self {
        let pid = Pid::from_u32(std::process::id());
        let what = ProcessRefreshKind::nothing().with_cpu().with_memory();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, what);
        system.refresh_memory();
        let process = system.process(pid);
        Self {
            cpu: process.map_or(0.0, |process| f64::from(process.cpu_usage()) / 100.0),
            memory_bytes: process.map_or(0, sysinfo::Process::memory),
            disk_free_bytes: disk_free(&std::env::temp_dir()),
        }
    }

    /// For Prometheus.
    pub(crate) fn show(&self, slots: usize) {
        metrics().set("worker_cpu_ratio", &[], self.cpu);
        metrics().set("worker_memory_bytes", &[], self.memory_bytes as f64);
        metrics().set("worker_disk_free_bytes", &[], self.disk_free_bytes as f64);
        metrics().set("worker_slots", &[], slots as f64);
    }
}

/// Where sorts spill to; nothing can be said: plenty.
fn disk_free(folder: &PathBuf) -> u64 {
    rustix::fs::statvfs(folder).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize)
}

/// Why spilling may fail soon, if it may.
pub(crate) fn full_disk(least: u64) -> Option<String> {
    let free = disk_free(&std::env::temp_dir());
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    (free < least)
        .then(|| format!("{} of disk are free, worker.disk_free is {}", mib(free), mib(least)))
}

/// `own`: memory of this process that a task would use again, as none is in hand.
fn reason_to_rest(system: &System, limits: Limits, own: u64) -> Option<String> {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    if let Some(why) = full_disk(limits.disk_free) {
        return Some(why);
    }
    // In a container its own limit counts, not the machine's memory.
    // What it counts as used holds the page cache, which gives way.
    let of_container = system.cgroup_limits().map(|of| of.total_memory.saturating_sub(of.rss));
    let free = of_container.unwrap_or(u64::MAX).min(system.available_memory());
    // Zero: the system does not say.
    (free > 0 && free.saturating_add(own) < limits.memory_free).then(|| {
        format!("{} of memory are free, a task may use {}", mib(free), mib(limits.memory_free))
    })
}
