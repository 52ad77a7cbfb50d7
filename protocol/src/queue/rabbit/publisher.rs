//! Publishing: one channel, every message persistent, mandatory and confirmed.
//!
//! A message that was sent and not confirmed when the channel broke is sent again on the next one: a
//! copy is harmless, a lost message is not. Who waits for a confirmation gives up after
//! [`PUBLISH_TIMEOUT`]; its message may still arrive.

use std::sync::Arc;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::failed;
use super::link::{Link, Pauses};
use crate::queue::Message;
use crate::{Code, Error, Result};

/// How long a publisher waits for the broker's word: a restart fits in, an alarm may not.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages sent ahead of their confirmations: a quorum queue confirms in batches.
const WINDOW: usize = 256;
/// Carries the W3C trace context, as other tools look for it.
pub(super) const TRACE_HEADER: &str = "traceparent";
/// Delivery mode of messages that survive a restart.
const PERSISTENT: u8 = 2;

/// Publishes on one channel, which is made again when it breaks.
pub(super) struct Publisher {
    link: Arc<Link>,
    runtime: Handle,
    closed: CancellationToken,
    channel: Mutex<Option<Arc<Channel>>>,
    window: Semaphore,
}

impl Publisher {
    pub(super) fn new(link: Arc<Link>, closed: CancellationToken, runtime: Handle) -> Self {
        let window = Semaphore::new(WINDOW);
        Self { link, runtime, closed, channel: Mutex::new(None), window }
    }

    /// Ok: the broker has it, and a queue does.
    pub(super) async fn publish(&self, exchange: &str, key: &str, message: &Message) -> Result<()> {
        tokio::select! {
            () = self.closed.cancelled() => {
                Err(Error::new(Code::QueueFailed, "the queue is closed"))
            }
            published = self.until_confirmed(exchange, key, message) => published,
            () = tokio::time::sleep(PUBLISH_TIMEOUT) => {
                // Half-open connections look like this: the next message tries another one.
                self.drop_channel(None).await;
                let text = format!("the broker confirmed nothing for {PUBLISH_TIMEOUT:?}");
                Err(Error::new(Code::QueueFailed, text).with_help("`alluvium doctor`"))
            }
        }
    }

    /// Sends until the broker says something about the message.
    async fn until_confirmed(&self, exchange: &str, key: &str, message: &Message) -> Result<()> {
        let _place = self.window.acquire().await.map_err(Error::internal)?;
        let mut pauses = Pauses::default();
        loop {
            let channel = match self.channel().await {
                Ok(channel) => channel,
                Err(error) => {
                    tracing::debug!(%error, "cannot publish yet");
                    pauses.wait().await;
                    continue;
                }
            };
            match send(&channel, exchange, key, message).await {
                Ok(confirmation) => {
                    if matches!(confirmation, Confirmation::Ack(Some(_))) {
                        self.declare().await;
                    }
                    return judge(&confirmation);
                }
                Err(error) => {
                    tracing::debug!(%error, "a message was not confirmed; it is sent again");
                    self.drop_channel(Some(&channel)).await;
                }
            }
        }
    }

    async fn channel(&self) -> Result<Arc<Channel>> {
        let mut current = self.channel.lock().await;
        if let Some(channel) = &*current
            && channel.status().connected()
        {
            return Ok(Arc::clone(channel));
        }
        let link = Arc::clone(&self.link);
        let opened = self.runtime.spawn(async move {
            let channel = link.channel().await?;
            let confirmed = channel.confirm_select(ConfirmSelectOptions::default()).await;
            confirmed.map_err(|e| failed("ask for confirmations", &e))?;
            Ok::<_, Error>(Arc::new(channel))
        });
        let opened = opened.await.map_err(Error::internal)??;
        *current = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// Forgets this channel, or whichever there is.
    async fn drop_channel(&self, broken: Option<&Arc<Channel>>) {
        let mut current = self.channel.lock().await;
        let is_it = match (&*current, broken) {
            (Some(current), Some(broken)) => Arc::ptr_eq(current, broken),
            (current, None) => current.is_some(),
            (None, Some(_)) => false,
        };
        if is_it {
            *current = None;
        }
    }

    /// A queue is missing: everything is declared anew.
    async fn declare(&self) {
        let link = Arc::clone(&self.link);
        let declared = self.runtime.spawn(async move { link.declare().await });
        if let Ok(Err(error)) = declared.await {
            tracing::warn!(%error, "a queue is missing and cannot be declared");
        }
    }
}

async fn send(
    channel: &Channel,
    exchange: &str,
    key: &str,
    message: &Message,
) -> Result<Confirmation> {
    let mut properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(message.id.as_str().into());
    if let Some(trace) = &message.trace {
        let mut headers = FieldTable::default();
        headers.insert(TRACE_HEADER.into(), AMQPValue::LongString(trace.as_str().into()));
        properties = properties.with_headers(headers);
    }
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let body = &message.body;
    let sent = channel.basic_publish(exchange.into(), key.into(), options, body, properties).await;
    let confirm = sent.map_err(|e| failed("publish", &e))?;
    confirm.await.map_err(|e| failed("publish", &e))
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
