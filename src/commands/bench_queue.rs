//! Hidden: measures the path of a task through the queue, for `scripts/bench queue`.
//!
//! Stands in for a coordinator: publishes optimize tasks for a table that is not there (workers find
//! nothing to do) and takes the results. Workers are real ones, started beside it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alluvium_protocol::queue::{Lane, Message, Queue, Subscription};
use alluvium_protocol::task::{FORMAT_MAJOR, Task, TaskResults, Work, decode, encode};
use alluvium_protocol::{Error, Pipeline, Result};
use chrono::Utc;
use futures::StreamExt;
use serde_json::json;
use uuid::Uuid;

use crate::cluster::{Services, required};
use crate::config;
use crate::printer::{self, Exit};

/// Publishes under way at a time.
const PUBLISHES: usize = 256;
/// Results fetched ahead, as the coordinator does.
const RESULTS_AHEAD: u16 = 1000;
/// A result that does not come ends the measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// Before anything is counted.
const WARM_UP: usize = 200;

/// Carries out `bench-queue`.
pub(crate) async fn bench_queue(file: Option<&Path>, tasks: usize, samples: usize) -> Result<Exit> {
    let config = config::load(file)?;
    let services = Services::of(required(&config)?, "bench")?;
    let queue: Arc<dyn Queue> = Arc::new(services.queue.clone());
    let mut results = queue.subscribe(&[Lane::Results], RESULTS_AHEAD);
    let pipeline = config.select(None)?.remove(0);
    through(&queue, results.as_mut(), &pipeline, WARM_UP).await?;
    let mut waits = Vec::with_capacity(samples);
    for _ in 0..samples {
        let began = Instant::now();
        queue.publish(Lane::Maintenance, message(&pipeline)?).await?;
        let (_, came_at) = take(results.as_mut()).await?;
        waits.push((came_at - began).as_secs_f64() * 1000.0);
    }
    waits.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = (waits.len().saturating_sub(1)) as f64 * share;
        waits.get(index.round() as usize).copied()
    };
    let began = Instant::now();
    through(&queue, results.as_mut(), &pipeline, tasks).await?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = message(&pipeline)?.body.len();
    printer::data(
        &json!({
            "tool": "alluvium", "tasks": tasks, "seconds": seconds,
            "tasks_per_second": tasks as f64 / seconds, "samples": samples,
            "idle_ms_median": at(0.5), "idle_ms_p99": at(0.99), "message_bytes": bytes,
        })
        .to_string(),
    );
    Ok(Exit::Ok)
}

/// Publishes so many tasks and takes their results.
async fn through(
    queue: &Arc<dyn Queue>,
    results: &mut dyn Subscription,
    pipeline: &Pipeline,
    tasks: usize,
) -> Result<()> {
    let messages = (0..tasks).map(|_| message(pipeline)).collect::<Result<Vec<_>>>()?;
    let sender = Arc::clone(queue);
    let publishing = tokio::spawn(async move {
        let sending = messages.into_iter().map(|message| {
            let sender = Arc::clone(&sender);
            async move { sender.publish(Lane::Maintenance, message).await }
        });
        let mut sent = futures::stream::iter(sending).buffer_unordered(PUBLISHES);
        while let Some(sent) = sent.next().await {
            sent?;
        }
        Ok::<(), Error>(())
    });
    let mut taken = 0;
    while taken < tasks {
        taken += take(results).await?.0;
    }
    publishing.await.map_err(Error::internal)?
}

/// Takes a message; how many results it held, and when it came: acknowledging it is not part of the wait.
async fn take(results: &mut dyn Subscription) -> Result<(usize, Instant)> {
    match tokio::time::timeout(PATIENCE, results.next()).await {
        Ok(Some(delivery)) => {
            let came_at = Instant::now();
            let found: TaskResults = decode(&delivery.message.body)?;
            delivery.ack().await?;
            Ok((found.results.len(), came_at))
        }
        Ok(None) => Err(Error::internal("the queue was closed")),
        Err(_) => Err(Error::internal("no result came; does a worker run?")),
    }
}

fn message(pipeline: &Pipeline) -> Result<Message> {
    let task = Task {
        format: FORMAT_MAJOR,
        id: Uuid::new_v4(),
        pipeline: pipeline.clone(),
        work: Work::Optimize,
        attempt: 1,
        published_at: Utc::now(),
    };
    Ok(Message::new(task.id.to_string(), encode(&task)?))
}
