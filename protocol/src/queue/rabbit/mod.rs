//! RabbitMQ behind the queue seam: quorum queues, confirmed publishing, a supervisor of our own.
//!
//! ```text
//!  publish ─► publisher (one channel, confirms) ─► exchange `tasks` ─► lane queues ─► subscriptions
//!                  ▲ give back                        ▲                    │ delivery limit
//!                  └──────────► exchange `delay` ─────┘ after 10 s         └─► exchange `dead`
//! ```
//! One connection publishes, another consumes: an alarm of the broker stops the first one only, and
//! acknowledgements go on. The library's own recovery is off: it tells nobody which deliveries it lost, and
//! leaves some consumers without a word. Whoever meets an error drops its channel and makes another. All of it lives on a runtime
//! of its own ([`start_runtime`]), so that a merge at full CPU costs no heartbeat.
//!
//! Works on RabbitMQ 3.10 and is written for 4.x; `topology.rs` says what differs.

pub mod hello;
mod link;
mod notes;
#[cfg(test)]
mod peer;
mod publisher;
mod subscription;
#[cfg(test)]
mod tests;
mod topology;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{Lane, Message, Queue, Subscription, check_size};
use crate::{Code, Error, Result};
use link::Link;
use publisher::Publisher;
use subscription::RabbitSubscription;
use topology::Names;

pub use link::LinkState;

/// Where the broker is, and what is ours on it.
#[derive(Clone)]
pub struct RabbitSettings {
    /// `amqp://` or `amqps://`, with user and password.
    pub url: String,
    /// Begins the names of all queues and exchanges.
    pub name: String,
    /// Who connects, as the broker's own pages show it.
    pub client: String,
    /// The longest that a task may stay in hand; the broker takes it back after that.
    pub longest_task: Duration,
}

/// Whether the broker can be used, and how.
#[derive(Clone, Debug)]
pub struct RabbitHealth {
    /// The connection that publishes.
    pub publishing: LinkState,
    /// The connection that consumes.
    pub consuming: LinkState,
}

/// A quick answer is all that counting and probing wait for.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Threads of the runtime for connections and leases: one works, one is at hand.
const RUNTIME_THREADS: usize = 2;

/// The runtime for connections, leases and heartbeats; it lives as long as the process.
pub fn start_runtime() -> Result<Handle> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("alluvium-links")
        .enable_all()
        .build()
        .map_err(|e| Error::internal(format!("no runtime: {e}")))?;
    let handle = runtime.handle().clone();
    // Dropped inside another runtime it would panic; its threads end with the process.
    std::mem::forget(runtime);
    Ok(handle)
}

/// A queue on RabbitMQ. Cheap to clone.
#[derive(Clone)]
pub struct RabbitQueue {
    names: Names,
    publisher: Arc<Publisher>,
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    /// Apart: a queue of somebody else's making must not disturb ours.
    hearing: Arc<Link>,
    runtime: Handle,
    closed: CancellationToken,
}

impl RabbitQueue {
    /// A queue that connects when it is first used, and again whenever it must.
    pub fn new(settings: &RabbitSettings, runtime: Handle) -> Self {
        let names = Names::new(&settings.name, settings.longest_task);
        let closed = CancellationToken::new();
        let publishing = Link::new(settings, "publish", names.clone());
        let consuming = Link::new(settings, "consume", names.clone());
        let hearing = Link::new(settings, "notifications", names.clone());
        let publisher = Publisher::new(Arc::clone(&publishing), closed.clone(), runtime.clone());
        let publisher = Arc::new(publisher);
        Self { names, publisher, publishing, consuming, hearing, runtime, closed }
    }

    /// How the connections are. Before their first use they count as not connected.
    pub fn health(&self) -> RabbitHealth {
        RabbitHealth { publishing: self.publishing.state(), consuming: self.consuming.state() }
    }

    /// Connects both ways, or says why that cannot be done.
    pub async fn check(&self) -> Result<()> {
        let (publishing, consuming) = (Arc::clone(&self.publishing), Arc::clone(&self.consuming));
        let checked = self.runtime.spawn(async move {
            for link in [publishing, consuming] {
                let channel = link.channel().await?;
                let _ = channel.close(200, "checked".into()).await;
            }
            Ok(())
        });
        checked.await.map_err(Error::internal)?
    }

    /// Messages in a queue that nobody has in hand; zero when the queue is not there.
    async fn count(&self, queue: String) -> Result<usize> {
        let link = Arc::clone(&self.consuming);
        let counted = self.runtime.spawn(async move {
            let channel = link.channel().await?;
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
            let asked =
                channel.queue_declare(queue.as_str().into(), options, FieldTable::default());
            let found = match tokio::time::timeout(ASK_TIMEOUT, asked).await {
                Err(_) => return Err(Error::new(Code::QueueFailed, "the broker does not answer")),
                Ok(Err(error)) if topology::is_missing(&error) => 0,
                Ok(Err(error)) => return Err(failed("count messages", &error)),
                Ok(Ok(found)) => usize::try_from(found.message_count()).unwrap_or(usize::MAX),
            };
            let _ = channel.close(200, "counted".into()).await;
            Ok(found)
        });
        counted.await.map_err(Error::internal)?
    }

    /// Messages that were delivered too often and were set aside.
    pub async fn dead(&self) -> Result<usize> {
        self.count(self.names.dead_queue()).await
    }
}

#[async_trait]
impl Queue for RabbitQueue {
    async fn publish(&self, lane: Lane, message: Message) -> Result<()> {
        check_size(&message)?;
        self.publisher.publish(&self.names.tasks_exchange(), lane.as_str(), &message).await
    }

    fn subscribe(&self, lanes: &[Lane], ahead: u16) -> Box<dyn Subscription> {
        Box::new(RabbitSubscription::start(self, lanes, ahead))
    }

    async fn waiting(&self, lane: Lane) -> Result<usize> {
        self.count(self.names.queue(lane)).await
    }

    fn close(&self) {
        self.closed.cancel();
    }
}

/// The library's error in our words.
fn failed(doing: &str, error: &lapin::Error) -> Error {
    Error::new(Code::QueueFailed, format!("{doing}: {error}"))
}
