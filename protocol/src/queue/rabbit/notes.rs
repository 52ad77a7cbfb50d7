//! Notifications that storage puts into a queue of its own: taken as they come, never waited for.

use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use tokio::sync::mpsc;

use super::link::Pauses;
use super::{RabbitQueue, failed};
use crate::Result;

/// Notifications that wait to be looked at; more stay on the broker.
const AHEAD: u16 = 100;

impl RabbitQueue {
    /// Takes what comes to `queue`, until the receiver is dropped. Queue and a fanout exchange of the
    /// same name are declared: some storage servers publish and declare nothing.
    pub fn notes(&self, queue: &str) -> mpsc::Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel(usize::from(AHEAD));
        let (listening, name) = (self.clone(), queue.to_owned());
        self.runtime.spawn(async move {
            let mut pauses = Pauses::default();
            while !sender.is_closed() && !listening.closed.is_cancelled() {
                if let Err(error) = listening.take_notes(&name, &sender, &mut pauses).await {
                    tracing::warn!(%error, queue = name, "notifications are not heard; polling goes on");
                }
                pauses.wait().await;
            }
        });
        receiver
    }

    async fn take_notes(
        &self,
        queue: &str,
        sender: &mpsc::Sender<Vec<u8>>,
        pauses: &mut Pauses,
    ) -> Result<()> {
        let channel = self.hearing.channel().await?;
        declare(&channel, queue).await?;
        let qos = channel.basic_qos(AHEAD, BasicQosOptions::default()).await;
        qos.map_err(|e| failed("ask for notifications", &e))?;
        let consumer = channel.basic_consume(
            queue.into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let mut consumer = consumer.await.map_err(|e| failed("ask for notifications", &e))?;
        pauses.reset();
        loop {
            let delivery = tokio::select! {
                delivery = consumer.next() => delivery,
                () = sender.closed() => return Ok(()),
                () = self.closed.cancelled() => return Ok(()),
            };
            let Some(delivery) = delivery else { return Ok(()) };
            let delivery = delivery.map_err(|e| failed("take a notification", &e))?;
            if sender.send(delivery.data).await.is_err() {
                return Ok(());
            }
            let acked = delivery.acker.ack(BasicAckOptions::default()).await;
            acked.map_err(|e| failed("acknowledge a notification", &e))?;
        }
    }
}

async fn declare(channel: &Channel, queue: &str) -> Result<()> {
    let doing = |e: lapin::Error| failed(&format!("declare queue {queue}"), &e);
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let none = FieldTable::default;
    let exchange = channel.exchange_declare(queue.into(), ExchangeKind::Fanout, durable, none());
    exchange.await.map_err(doing)?;
    let mut arguments = none();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), durable, arguments).await.map_err(doing)?;
    let bound = channel.queue_bind(
        queue.into(),
        queue.into(),
        "".into(),
        QueueBindOptions::default(),
        none(),
    );
    bound.await.map_err(doing)
}
