//! Consuming: one channel a lane, as many messages ahead as were asked for, and a supervisor that
//! makes every channel again that breaks, ends or falls silent.
//!
//! A subscription to several lanes may hold one message of each. While its holder works on one for
//! longer than [`BUSY_AFTER`], nothing is consumed: what the other lanes brought goes to others at once,
//! and nothing waits behind a long merge. Afterwards the lanes are consumed again one by one, each a turn
//! later than the last time, until one brings something: a backlog of one lane keeps no other waiting, and
//! few messages go back untouched (the broker counts that, and sets aside what came back too often).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use lapin::message::Delivery as AmqpDelivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    BasicRejectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Acker, Channel};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::link::{Link, Pauses};
use super::publisher::{Publisher, TRACE_HEADER};
use super::topology::Names;
use super::{ASK_TIMEOUT, RabbitQueue, failed};
use crate::queue::{Delivery, Lane, Message, Settle, Subscription};
use crate::{Code, Error, Result};

/// A holder that works this long lets the other lanes go.
const BUSY_AFTER: Duration = Duration::from_millis(200);
/// How often that is looked at.
const TICK: Duration = Duration::from_millis(100);
/// A lane that has a message brings it within this time.
const FIRST_WITHIN: Duration = Duration::from_millis(30);
/// Without a delivery on a lane for so long, the broker is asked whether there is one.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Without one for so long, the lane's consumer is made anew, whatever the broker says: RabbitMQ 3.10
/// may count a consumer of a queue that was deleted and made again, hand it messages (they are neither
/// ready nor acknowledged), and its channel lets none of them through.
const RENEW_AFTER: Duration = Duration::from_secs(30);

/// What the supervisor and the holder share.
#[derive(Default)]
struct Buffer {
    arrived: VecDeque<Arrived>,
    /// The living consumer of each lane; what others still bring, the broker has again.
    current: HashMap<Lane, u64>,
    heard_at: HashMap<Lane, Instant>,
    /// By the consumer that brought them.
    in_hand: HashMap<u64, usize>,
    busy_since: Option<Instant>,
    /// Of the message that was taken last.
    last: Option<Lane>,
    is_closed: bool,
}

/// A message that nobody took so far, and the consumer that brought it.
struct Arrived {
    lane: Lane,
    number: u64,
    delivery: AmqpDelivery,
}

struct Shared {
    buffer: Mutex<Buffer>,
    changed: Notify,
    came: Notify,
    settled: Notify,
    publisher: Arc<Publisher>,
    names: Names,
    runtime: Handle,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A consumer brings a message.
    fn arrive(&self, lane: Lane, number: u64, delivery: AmqpDelivery) {
        let mut buffer = self.lock();
        if buffer.current.get(&lane) != Some(&number) {
            return;
        }
        buffer.heard_at.insert(lane, Instant::now());
        buffer.arrived.push_back(Arrived { lane, number, delivery });
        drop(buffer);
        self.changed.notify_one();
        self.came.notify_one();
    }

    fn has_in_hand(&self, number: u64) -> bool {
        self.lock().in_hand.contains_key(&number)
    }

    /// The holder has a message, or can take one.
    fn has_any(&self) -> bool {
        let buffer = self.lock();
        !buffer.arrived.is_empty() || !buffer.in_hand.is_empty()
    }

    fn let_go(&self, number: u64) {
        let mut buffer = self.lock();
        if let Some(count) = buffer.in_hand.get_mut(&number) {
            *count = count.saturating_sub(1);
        }
        buffer.in_hand.retain(|_, count| *count > 0);
        if buffer.in_hand.is_empty() {
            buffer.busy_since = None;
            drop(buffer);
            self.settled.notify_one();
        }
    }
}

/// One consumer of some lanes.
pub(super) struct RabbitSubscription {
    shared: Arc<Shared>,
    left: CancellationToken,
}

impl RabbitSubscription {
    pub(super) fn start(queue: &RabbitQueue, lanes: &[Lane], ahead: u16) -> Self {
        let shared = Arc::new(Shared {
            buffer: Mutex::default(),
            changed: Notify::new(),
            came: Notify::new(),
            settled: Notify::new(),
            publisher: queue.publisher.clone(),
            names: queue.names.clone(),
            runtime: queue.runtime.clone(),
        });
        let left = CancellationToken::new();
        let supervisor = Supervisor {
            shared: Arc::clone(&shared),
            link: Arc::clone(&queue.consuming),
            lanes: lanes.to_vec(),
            ahead,
            left: left.clone(),
            closed: queue.closed.clone(),
        };
        queue.runtime.spawn(supervisor.run());
        Self { shared, left }
    }
}

impl Drop for RabbitSubscription {
    fn drop(&mut self) {
        self.left.cancel();
    }
}

#[async_trait]
impl Subscription for RabbitSubscription {
    async fn next(&mut self) -> Option<Delivery> {
        loop {
            // Registered before the look: what comes in between wakes us.
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let taken = {
                let mut buffer = self.shared.lock();
                if buffer.is_closed {
                    return None;
                }
                let taken = buffer.arrived.pop_front();
                if let Some(Arrived { lane, number, .. }) = &taken {
                    *buffer.in_hand.entry(*number).or_default() += 1;
                    buffer.busy_since.get_or_insert_with(Instant::now);
                    buffer.last = Some(*lane);
                }
                taken
            };
            if let Some(arrived) = taken {
                return Some(delivery_of(&self.shared, arrived));
            }
            changed.await;
        }
    }
}

fn delivery_of(shared: &Arc<Shared>, arrived: Arrived) -> Delivery {
    let Arrived { lane, number, delivery } = arrived;
    let headers = delivery.properties.headers().as_ref().map(FieldTable::inner);
    let header = |name: &str| headers.and_then(|headers| headers.get(name));
    let trace = match header(TRACE_HEADER) {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        _ => None,
    };
    let returns = match header("x-delivery-count") {
        Some(AMQPValue::LongLongInt(count)) => u32::try_from(*count).unwrap_or(0),
        Some(AMQPValue::LongInt(count)) => u32::try_from(*count).unwrap_or(0),
        _ => u32::from(delivery.redelivered),
    };
    let id = delivery.properties.message_id().as_ref().map(ToString::to_string);
    let message = Message { id: id.unwrap_or_default(), body: delivery.data, trace };
    let held = Held {
        shared: Arc::clone(shared),
        lane,
        number,
        copy: message.clone(),
        acker: delivery.acker,
        is_settled: false,
    };
    Delivery::new(message, delivery.redelivered, returns, Box::new(held))
}

struct Held {
    shared: Arc<Shared>,
    lane: Lane,
    number: u64,
    copy: Message,
    acker: Acker,
    is_settled: bool,
}

#[async_trait]
impl Settle for Held {
    async fn ack(mut self: Box<Self>) -> Result<()> {
        self.is_settled = true;
        match self.acker.ack(BasicAckOptions::default()).await {
            Ok(true) => Ok(()),
            // Its channel is gone: the broker has given the message to somebody else.
            Ok(false) => Ok(()),
            Err(error) => Err(failed("acknowledge", &error)),
        }
    }

    async fn set_aside(mut self: Box<Self>) -> Result<()> {
        self.is_settled = true;
        // Without requeue: to the dead letters.
        let refused = self.acker.reject(BasicRejectOptions { requeue: false }).await;
        refused.map(drop).map_err(|e| failed("set a message aside", &e))
    }

    async fn give_back(self: Box<Self>) -> Result<()> {
        // The copy first: a crash in between makes two of them, never none.
        let exchange = self.shared.names.delay_exchange();
        self.shared.publisher.publish(&exchange, self.lane.as_str(), &self.copy).await?;
        self.ack().await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.let_go(self.number);
        if !self.is_settled {
            let acker = self.acker.clone();
            self.shared.runtime.spawn(async move {
                let options = BasicNackOptions { requeue: true, ..Default::default() };
                let _ = acker.nack(options).await;
            });
        }
    }
}

/// Keeps the consumers of a subscription alive.
struct Supervisor {
    shared: Arc<Shared>,
    link: Arc<Link>,
    lanes: Vec<Lane>,
    ahead: u16,
    left: CancellationToken,
    closed: CancellationToken,
}

/// A consumer of one lane.
struct Arm {
    channel: Channel,
    /// As the broker calls it.
    tag: ShortString,
    number: u64,
    pump: tokio::task::AbortHandle,
    opened_at: Instant,
    asked_at: Instant,
}

/// A consumer ended: its lane, its number, and why.
type Ended = (Lane, u64, String);

impl Supervisor {
    async fn run(self) {
        let (sender, mut ended) = mpsc::unbounded_channel();
        let mut arms: HashMap<Lane, Arm> = HashMap::new();
        let mut pauses = Pauses::default();
        let mut next_number = 0;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let is_leaving = || self.left.is_cancelled() || self.closed.is_cancelled();
        // A holder of short tasks always has one: a lane more each time that it settles.
        let mut is_due = true;
        while !is_leaving() {
            let is_busy = self.is_busy();
            for lane in self.in_turn().into_iter().filter(|_| !is_busy) {
                if arms.contains_key(&lane) {
                    continue;
                }
                if !is_due && self.lanes.len() > 1 && self.shared.has_any() {
                    break;
                }
                next_number += 1;
                match self.open(lane, next_number, &sender).await {
                    Ok(arm) => {
                        pauses.reset();
                        arms.insert(lane, arm);
                        is_due = false;
                        self.wait_for_first().await;
                    }
                    Err(error) => {
                        tracing::debug!(%error, lane = lane.as_str(), "cannot consume yet");
                        pauses.wait().await;
                        break;
                    }
                }
            }
            tokio::select! {
                Some(end) = ended.recv() => self.bury(end, &mut arms),
                _ = tick.tick() => {
                    if is_busy {
                        self.leave_lanes(&mut arms).await;
                    }
                }
                () = self.shared.settled.notified() => is_due = true,
                () = self.left.cancelled() => {}
                () = self.closed.cancelled() => {}
            }
            if !is_busy {
                self.look_after(&mut arms).await;
            }
        }
        self.finish(arms).await;
    }

    /// The lanes, the one that had its turn last at the end.
    fn in_turn(&self) -> Vec<Lane> {
        let last = self.shared.lock().last;
        let mut lanes = self.lanes.clone();
        if let Some(at) = lanes.iter().position(|lane| Some(*lane) == last) {
            lanes.rotate_left(at + 1);
        }
        lanes
    }

    /// A lane that is consumed anew may bring a message at once.
    async fn wait_for_first(&self) {
        if self.lanes.len() == 1 {
            return;
        }
        let came = tokio::time::timeout(FIRST_WITHIN, async {
            while !self.shared.has_any() {
                self.shared.came.notified().await;
            }
        });
        let _ = came.await;
    }

    /// Consumers on which nothing came for a while: the broker is asked, and later not even asked.
    async fn look_after(&self, arms: &mut HashMap<Lane, Arm>) {
        for lane in &self.lanes {
            let Some(arm) = arms.get_mut(lane) else { continue };
            let silence = self.silence(*lane, arm);
            if silence > RENEW_AFTER {
                self.forget(*lane);
                if let Some(arm) = arms.remove(lane) {
                    close(arm, None).await;
                }
            } else if silence > SILENCE_MAX && arm.asked_at.elapsed() > SILENCE_MAX {
                arm.asked_at = Instant::now();
                if let Err(error) = self.probe(*lane, arm).await {
                    tracing::warn!(%error, "consumers fell silent; they are made anew");
                    return self.close_all(arms).await;
                }
            }
        }
    }

    /// For how long nothing came on a lane that nothing waits or is in hand of.
    fn silence(&self, lane: Lane, arm: &Arm) -> Duration {
        let buffer = self.shared.lock();
        let has_in_hand = buffer.in_hand.contains_key(&arm.number);
        if has_in_hand || buffer.arrived.iter().any(|arrived| arrived.lane == lane) {
            return Duration::ZERO;
        }
        let heard_at = buffer.heard_at.get(&lane).copied();
        heard_at.map_or(arm.opened_at, |at| at.max(arm.opened_at)).elapsed()
    }

    fn is_busy(&self) -> bool {
        let since = self.shared.lock().busy_since;
        self.lanes.len() > 1 && since.is_some_and(|since| since.elapsed() > BUSY_AFTER)
    }

    async fn open(
        &self,
        lane: Lane,
        number: u64,
        sender: &mpsc::UnboundedSender<Ended>,
    ) -> Result<Arm> {
        let channel = self.link.channel().await?;
        let queue = self.shared.names.queue(lane);
        let doing = format!("consume {queue}");
        let asked = channel.basic_qos(self.ahead, BasicQosOptions::default()).await;
        asked.map_err(|e| failed(&doing, &e))?;
        let consumed = channel.basic_consume(
            queue.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let mut consumer = match tokio::time::timeout(ASK_TIMEOUT, consumed).await {
            Ok(Ok(consumer)) => consumer,
            Ok(Err(error)) => {
                if super::topology::is_missing(&error) {
                    self.link.declare().await?;
                }
                return Err(failed(&doing, &error));
            }
            Err(_) => return Err(Error::new(Code::QueueFailed, "the broker does not answer")),
        };
        self.shared.lock().current.insert(lane, number);
        let tag = consumer.tag();
        let sender = sender.clone();
        let shared = Arc::clone(&self.shared);
        let pump = tokio::spawn(async move {
            let why = loop {
                match consumer.next().await {
                    Some(Ok(delivery)) => shared.arrive(lane, number, delivery),
                    Some(Err(error)) => break error.to_string(),
                    // The broker cancelled the consumer: its queue was deleted, or a timeout.
                    None => break "the broker ended the consumer".to_owned(),
                }
            };
            let _ = sender.send((lane, number, why));
        });
        let now = Instant::now();
        let pump = pump.abort_handle();
        Ok(Arm { channel, tag, number, pump, opened_at: now, asked_at: now })
    }

    /// A consumer ended: it is made anew at the next turn.
    fn bury(&self, (lane, number, why): Ended, arms: &mut HashMap<Lane, Arm>) {
        if arms.get(&lane).is_none_or(|arm| arm.number != number) {
            return;
        }
        tracing::debug!(lane = lane.as_str(), why, "a consumer ended; it is made anew");
        self.forget(lane);
        if let Some(arm) = arms.remove(&lane) {
            // Open or not: a message in hand was given back by the broker, or stays with us.
            tokio::spawn(close(arm, Some(Arc::clone(&self.shared))));
        }
    }

    /// Drops what arrived on a lane and nobody took.
    fn forget(&self, lane: Lane) {
        let mut buffer = self.shared.lock();
        buffer.current.remove(&lane);
        buffer.arrived.retain(|arrived| arrived.lane != lane);
    }

    /// Consumes nothing more. Channels of messages in hand stay open until these are settled.
    async fn leave_lanes(&self, arms: &mut HashMap<Lane, Arm>) {
        for (lane, arm) in arms.drain() {
            self.forget(lane);
            if self.shared.has_in_hand(arm.number) {
                let cancelled =
                    arm.channel.basic_cancel(arm.tag.clone(), BasicCancelOptions::default());
                if let Err(error) = cancelled.await {
                    tracing::debug!(%error, "a consumer was not cancelled; its channel is closed later");
                }
                tokio::spawn(close(arm, Some(Arc::clone(&self.shared))));
            } else {
                close(arm, None).await;
            }
        }
    }

    async fn close_all(&self, arms: &mut HashMap<Lane, Arm>) {
        for (lane, arm) in arms.drain() {
            self.forget(lane);
            close(arm, None).await;
        }
    }

    /// The broker answers, knows the consumer, and holds nothing that it should have been given.
    async fn probe(&self, lane: Lane, arm: &Arm) -> Result<()> {
        use lapin::options::QueueDeclareOptions;
        let queue = self.shared.names.queue(lane);
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let asked =
            arm.channel.queue_declare(queue.as_str().into(), passive, FieldTable::default());
        let found = tokio::time::timeout(ASK_TIMEOUT, asked).await;
        let found = found
            .map_err(|_| Error::new(Code::QueueFailed, "the broker does not answer"))?
            .map_err(|e| failed("look at a queue", &e))?;
        if found.consumer_count() == 0 {
            let text = format!("{queue} has no consumer, not even this one");
            return Err(Error::new(Code::QueueFailed, text));
        }
        if found.message_count() > 0 && !self.silence(lane, arm).is_zero() {
            let text = format!("{} message(s) wait in {queue}", found.message_count());
            return Err(Error::new(Code::QueueFailed, text));
        }
        Ok(())
    }

    /// Leaves: idle channels at once, the others when their messages are settled.
    async fn finish(&self, mut arms: HashMap<Lane, Arm>) {
        self.leave_lanes(&mut arms).await;
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_waiters();
        self.shared.changed.notify_one();
    }
}

/// Closes a channel; with `until`, after what it brought is settled.
async fn close(arm: Arm, until: Option<Arc<Shared>>) {
    if let Some(shared) = until {
        while shared.has_in_hand(arm.number) {
            tokio::time::sleep(TICK).await;
        }
    }
    let _ = arm.channel.close(200, "left".into()).await;
    arm.pump.abort();
}
