//! What is ours on the broker: names, queues, exchanges, and who declares them.
//!
//! Arguments of a queue cannot be changed once it is there, so names carry a version, and arguments
//! hold only what correctness needs; the rest is left to the operator's policies. A queue that is
//! there with other arguments is used as it is, and the difference is told. RabbitMQ before 3.12
//! ignores `x-consumer-timeout`: there, `consumer_timeout` of rabbitmq.conf counts (30 min by default).

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};

use super::failed;
use crate::Result;
use crate::queue::Lane;

/// Raised when arguments must change.
const VERSION: &str = "v1";
/// A backstop: poison is counted by leases, and parked long before.
const DELIVERY_LIMIT: i64 = 50;
/// The coordinator's window keeps far below; beyond it publishing is refused, nothing is dropped.
const QUEUE_MESSAGES_MAX: i64 = 100_000;
/// Pause of a message that was given back.
const DELAY: Duration = Duration::from_secs(10);

/// Names of everything that is ours on a broker.
#[derive(Clone, Debug)]
pub(super) struct Names {
    prefix: String,
    consumer_timeout: Duration,
}

impl Names {
    pub(super) fn new(name: &str, longest_task: Duration) -> Self {
        // Half as much again: the worker's own limit comes first.
        Self { prefix: format!("{name}.{VERSION}"), consumer_timeout: longest_task * 3 / 2 }
    }

    pub(super) fn queue(&self, lane: Lane) -> String {
        match lane {
            Lane::Results => format!("{}.results", self.prefix),
            _ => format!("{}.task.{}", self.prefix, lane.as_str()),
        }
    }

    pub(super) fn tasks_exchange(&self) -> String {
        format!("{}.tasks", self.prefix)
    }

    pub(super) fn delay_exchange(&self) -> String {
        format!("{}.delay", self.prefix)
    }

    pub(super) fn dead_queue(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    /// Declares all of it. Repeating it changes nothing.
    pub(super) async fn declare(&self, connection: &Connection) -> Result<()> {
        let channel = open(connection).await?;
        for (name, kind) in [
            (self.tasks_exchange(), ExchangeKind::Direct),
            (self.delay_exchange(), ExchangeKind::Fanout),
            (self.dead_queue(), ExchangeKind::Fanout),
        ] {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let declared = channel.exchange_declare(
                name.as_str().into(),
                kind,
                options,
                FieldTable::default(),
            );
            declared.await.map_err(|e| failed(&format!("declare exchange {name}"), &e))?;
        }
        let mut queues: Vec<(String, String, String, FieldTable)> = Vec::new();
        for lane in Lane::ALL {
            let mut arguments = self.arguments();
            set(&mut arguments, "x-delivery-limit", DELIVERY_LIMIT);
            if lane == Lane::Results {
                arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
            } else {
                let timeout = i64::try_from(self.consumer_timeout.as_millis()).unwrap_or(i64::MAX);
                set(&mut arguments, "x-consumer-timeout", timeout);
            }
            let exchange = self.tasks_exchange();
            queues.push((self.queue(lane), exchange, lane.as_str().to_owned(), arguments));
        }
        let mut delay = self.arguments();
        set(&mut delay, "x-message-ttl", i64::try_from(DELAY.as_millis()).unwrap_or(i64::MAX));
        // Back to the lane that the routing key names.
        text(&mut delay, "x-dead-letter-exchange", &self.tasks_exchange());
        queues.push((
            format!("{}.delay", self.prefix),
            self.delay_exchange(),
            String::new(),
            delay,
        ));
        let mut dead = FieldTable::default();
        text(&mut dead, "x-queue-type", "quorum");
        queues.push((self.dead_queue(), self.dead_queue(), String::new(), dead));
        let mut channel = channel;
        for (queue, exchange, key, arguments) in queues {
            channel = declare_queue(connection, channel, &queue, arguments).await?;
            let bound = channel.queue_bind(
                queue.as_str().into(),
                exchange.as_str().into(),
                key.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bound.await.map_err(|e| failed(&format!("bind queue {queue}"), &e))?;
        }
        let _ = channel.close(200, "declared".into()).await;
        Ok(())
    }

    /// Quorum; refused rather than dropped when full; dead letters at least once.
    fn arguments(&self) -> FieldTable {
        let mut arguments = FieldTable::default();
        text(&mut arguments, "x-queue-type", "quorum");
        text(&mut arguments, "x-overflow", "reject-publish");
        text(&mut arguments, "x-dead-letter-strategy", "at-least-once");
        text(&mut arguments, "x-dead-letter-exchange", &self.dead_queue());
        set(&mut arguments, "x-max-length", QUEUE_MESSAGES_MAX);
        arguments
    }
}

async fn open(connection: &Connection) -> Result<Channel> {
    connection.create_channel().await.map_err(|e| failed("open a channel", &e))
}

/// Declares a queue; one that is there with other arguments stays as it is.
async fn declare_queue(
    connection: &Connection,
    channel: Channel,
    queue: &str,
    arguments: FieldTable,
) -> Result<Channel> {
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    match channel.queue_declare(queue.into(), durable, arguments).await {
        Ok(_) => Ok(channel),
        Err(error) if is_other(&error) => {
            tracing::warn!(queue, %error, "a queue has other arguments than ours; used as it is");
            // The broker closed the channel with that.
            open(connection).await
        }
        Err(error) => Err(failed(&format!("declare queue {queue}"), &error)),
    }
}

fn set(table: &mut FieldTable, name: &str, value: i64) {
    table.insert(name.into(), AMQPValue::LongLongInt(value));
}

fn text(table: &mut FieldTable, name: &str, value: &str) {
    table.insert(name.into(), AMQPValue::LongString(value.into()));
}

fn is_code(error: &lapin::Error, code: u16) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => error.get_id() == code,
        _ => false,
    }
}

/// 404: the queue is not there.
pub(super) fn is_missing(error: &lapin::Error) -> bool {
    is_code(error, 404)
}

/// 406: it is there, with other arguments.
fn is_other(error: &lapin::Error) -> bool {
    is_code(error, 406)
}
