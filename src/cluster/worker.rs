//! `alluvium worker`: tasks of a coordinator, as many at a time as it has slots.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::queue::{Lane, Queue};
use alluvium_protocol::{Code, Error, Result};
use alluvium_worker::Workshop;
use alluvium_worker::slots::{Duty, Orders, Worker};
use alluvium_worker::tables::Tables;
use chrono::Utc;

use super::listening::serve_metrics;
use super::vitals::{Limits, Vitals};
use super::{Services, prepare, required};
use crate::cli::WorkerArguments;
use crate::commands::signals::on_signals;
use crate::config;
use crate::printer::{self, Exit};

/// After the grace period a task has so long to reach a safe point.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Carries out `worker`.
pub(crate) async fn run(file: Option<&Path>, arguments: &WorkerArguments) -> Result<Exit> {
    let config = config::load(file)?;
    let services = Services::of(required(&config)?, "worker")?;
    let slots = arguments.slots.map_or(config.slots, usize::from);
    let duty = Arc::new(Duty::under(Orders {
        tasks_max: arguments.max_tasks.and_then(|most| usize::try_from(most).ok()),
        idle_max: arguments.exit_when_idle.map(Duration::from_secs),
        ..Orders::default()
    }));
    on_signals(duty.orders.draining.clone())?;
    tokio::select! {
        ready = prepare(&config, &services) => ready?,
        () = duty.orders.draining.cancelled() => return Ok(Exit::Ok),
    }
    let memory = config.pipelines.iter().map(|p| p.sizes.memory_bytes).max().unwrap_or(0);
    let limits = Limits { disk_free: config.disk_free, memory_free: memory as u64 };
    let vitals = Vitals {
        role: "worker",
        leases: services.leases.clone(),
        slots,
        duty: Arc::clone(&duty),
        limits: Some(limits),
        started_at: Utc::now(),
        state: config.state.clone(),
    };
    let _beating = vitals.start(&services.links);
    let _serving = config.listen.map(|at| serve_metrics(at, Some(services.clone())));
    let lanes = lanes_of(&arguments.steps);
    let names: Vec<&str> = lanes.iter().map(|lane| lane.as_str()).collect();
    printer::say(&format!(
        "worker {} serves {} with {slots} slot(s); SIGTERM drains it",
        services.name,
        names.join(", ")
    ));
    config.keep_side_indexes();
    let clock: ClockRef = Arc::new(SystemClock);
    let worker = Worker {
        name: services.name.clone(),
        queue: Arc::new(services.queue.clone()),
        leases: Arc::new(services.leases.clone()),
        workshop: Workshop { clock, tables: Arc::new(Tables::default()) },
        keeping: services.links.clone(),
        lanes,
        is_alone: false,
        duty: Arc::clone(&duty),
    };
    let mut running = tokio::spawn(worker.run(slots));
    tokio::select! {
        ended = &mut running => ended.map_err(Error::internal)??,
        () = expired(&duty, config.grace) => {
            let names: Vec<String> = duty.tasks().iter().map(|t| t.task.to_string()).collect();
            printer::warn(&format!("gave up waiting for task(s) {}", names.join(", ")));
        }
    }
    let consuming = services.queue.health().consuming;
    services.queue.close();
    services.leases.gone(&services.name).await;
    if let Some(error) = consuming.error.filter(|_| consuming.connections == 0) {
        return Err(Error::new(Code::QueueFailed, error)
            .with_help("check `amqp` in [cluster], then `alluvium doctor`"));
    }
    printer::say("drained: every task in hand was finished or given back");
    Ok(Exit::Ok)
}

/// Ends when a drain took too long: after the grace period tasks go back at their next safe point.
async fn expired(duty: &Duty, grace: Duration) {
    duty.orders.draining.cancelled().await;
    tokio::time::sleep(grace).await;
    duty.orders.stopping.cancel();
    tokio::time::sleep(STOP_PATIENCE).await;
}

fn lanes_of(steps: &[String]) -> Vec<Lane> {
    let is_asked =
        |names: &[&str]| steps.is_empty() || names.iter().any(|n| steps.iter().any(|s| s == n));
    // Pieces of large steps are every worker's.
    let lanes = [
        (Lane::Ingest, &["ingest"][..]),
        (Lane::Merge, &["merge"]),
        (Lane::Maintenance, &["optimize", "cleanup"]),
        (Lane::Shard, &["ingest", "merge", "optimize", "cleanup"]),
    ];
    lanes.into_iter().filter(|(_, names)| is_asked(names)).map(|(lane, _)| lane).collect()
}
