//! Publishing: one channel, every message persistent, mandatory and confirmed.
//!
//! Messages that were sent and not yet confirmed when the channel broke are sent again on the next
//! one: a copy is harmless, a lost message is not. Who waits for a confirmation gives up after
//! [`PUBLISH_TIMEOUT`]; its message may still arrive.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::failed;
use super::link::{Link, Pauses};
use crate::queue::Message;
use crate::{Code, Error, Result};

/// How long a publisher waits for the broker's word: a restart fits in, an alarm may not.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages sent ahead of their confirmations: a quorum queue confirms in batches.
const WINDOW: usize = 256;
/// Messages that wait to be sent.
const BACKLOG_MAX: usize = 1024;
/// Carries the W3C trace context, as other tools look for it.
pub(super) const TRACE_HEADER: &str = "traceparent";
/// Delivery mode of messages that survive a restart.
const PERSISTENT: u8 = 2;

struct Job {
    exchange: String,
    key: String,
    message: Message,
    reply: oneshot::Sender<Result<()>>,
}

/// Hands messages to the task that publishes.
#[derive(Clone)]
pub(super) struct Publisher(mpsc::Sender<Job>);

impl Publisher {
    pub(super) fn start(link: Arc<Link>, closed: CancellationToken, runtime: &Handle) -> Self {
        let (sender, receiver) = mpsc::channel(BACKLOG_MAX);
        runtime.spawn(async move {
            tokio::select! {
                () = run(link, receiver) => {}
                () = closed.cancelled() => {}
            }
        });
        Self(sender)
    }

    /// Ok: the broker has it, and a queue does.
    pub(super) async fn publish(
        &self,
        exchange: String,
        key: &str,
        message: Message,
    ) -> Result<()> {
        let closed = || Error::new(Code::QueueFailed, "the queue is closed");
        let (reply, answer) = oneshot::channel();
        let job = Job { exchange, key: key.to_owned(), message, reply };
        let sent = async {
            self.0.send(job).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())?
        };
        match tokio::time::timeout(PUBLISH_TIMEOUT, sent).await {
            Ok(published) => published,
            Err(_) => {
                let text = format!("the broker confirmed nothing for {PUBLISH_TIMEOUT:?}");
                Err(Error::new(Code::QueueFailed, text).with_help("`alluvium doctor`"))
            }
        }
    }
}

/// Publishes until nobody can ask any more.
async fn run(link: Arc<Link>, mut jobs: mpsc::Receiver<Job>) {
    let mut unsent: Vec<Job> = Vec::new();
    let mut pauses = Pauses::default();
    loop {
        if unsent.is_empty() {
            match jobs.recv().await {
                Some(job) => unsent.push(job),
                None => return,
            }
        }
        match open(&link).await {
            Ok(channel) => {
                pauses.reset();
                let is_over = pump(&link, &channel, &mut jobs, &mut unsent).await;
                let _ = channel.close(200, "published".into()).await;
                if is_over {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "cannot publish yet");
                pauses.wait().await;
            }
        }
        // Whoever stopped waiting publishes again by itself, if it still wants to.
        unsent.retain(|job| !job.reply.is_closed());
    }
}

async fn open(link: &Link) -> Result<Channel> {
    let channel = link.channel().await?;
    let confirmed = channel.confirm_select(ConfirmSelectOptions::default()).await;
    confirmed.map_err(|e| failed("ask for confirmations", &e))?;
    Ok(channel)
}

/// Sends and collects confirmations until the channel breaks (false; what is unconfirmed is in
/// `unsent`) or nobody can ask any more (true).
async fn pump(
    link: &Link,
    channel: &Channel,
    jobs: &mut mpsc::Receiver<Job>,
    unsent: &mut Vec<Job>,
) -> bool {
    let mut waiting = FuturesUnordered::new();
    let mut is_broken = false;
    let mut is_over = false;
    loop {
        let is_room = !is_broken && !is_over && waiting.len() < WINDOW;
        if is_room && let Some(job) = unsent.pop() {
            match send(channel, &job).await {
                Ok(confirm) => waiting.push(async move { (confirm.await, job) }),
                Err(error) => {
                    tracing::debug!(%error, "a message was not sent; it is sent again");
                    unsent.push(job);
                    is_broken = true;
                }
            }
            continue;
        }
        tokio::select! {
            biased;
            Some((confirmation, job)) = waiting.next(), if !waiting.is_empty() => {
                match confirmation {
                    Ok(confirmation) => {
                        let outcome = judge(&confirmation);
                        if matches!(confirmation, Confirmation::Ack(Some(_)))
                            && let Err(error) = link.declare().await
                        {
                            tracing::warn!(%error, "a queue is missing and cannot be declared");
                        }
                        let _ = job.reply.send(outcome);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "a message was not confirmed; it is sent again");
                        unsent.push(job);
                        is_broken = true;
                    }
                }
            }
            job = jobs.recv(), if is_room => match job {
                Some(job) => unsent.push(job),
                None => is_over = true,
            },
            else => return is_over,
        }
    }
}

async fn send(channel: &Channel, job: &Job) -> Result<lapin::PublisherConfirm> {
    let mut properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(job.message.id.as_str().into());
    if let Some(trace) = &job.message.trace {
        let mut headers = FieldTable::default();
        headers.insert(TRACE_HEADER.into(), AMQPValue::LongString(trace.as_str().into()));
        properties = properties.with_headers(headers);
    }
    let sent = channel.basic_publish(
        job.exchange.as_str().into(),
        job.key.as_str().into(),
        BasicPublishOptions { mandatory: true, ..Default::default() },
        &job.message.body,
        properties,
    );
    match tokio::time::timeout(PUBLISH_TIMEOUT, sent).await {
        Ok(sent) => sent.map_err(|e| failed("publish", &e)),
        Err(_) => Err(Error::new(Code::QueueFailed, "the broker takes nothing")),
    }
}

/// Only an acknowledgement of a message that found a queue counts.
fn judge(confirmation: &Confirmation) -> Result<()> {
    let why = match confirmation {
        Confirmation::Ack(None) => return Ok(()),
        Confirmation::Ack(Some(_)) => "the message found no queue",
        Confirmation::Nack(_) => "the queue is full",
        // Without confirmations nothing would be known of any message.
        Confirmation::NotRequested => "the broker was not asked for confirmations",
    };
    Err(Error::new(Code::QueueFailed, why))
}
