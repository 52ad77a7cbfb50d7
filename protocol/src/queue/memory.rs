//! The in-process twin of the queue: what embedded mode runs on.
//!
//! Owns: waiting messages, and those in hand until they are settled. A dropped delivery comes back
//! marked as redelivered, as after a lost connection.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use super::{Delivery, Lane, Message, Queue, Settle, Subscription, check_size};
use crate::{Code, Error, Result};

/// Messages that one lane holds at most; the coordinator's window keeps far below it.
const LANE_MESSAGES_MAX: usize = 100_000;

/// A message given back is seen again after this pause.
const GIVE_BACK_PAUSE: Duration = Duration::from_millis(200);

struct Waiting {
    message: Message,
    redelivered: bool,
    returns: u32,
}

#[derive(Default)]
struct Lanes {
    waiting: HashMap<Lane, VecDeque<Waiting>>,
    is_closed: bool,
}

#[derive(Default)]
struct Shared {
    lanes: Mutex<Lanes>,
    changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_back(&self, lane: Lane, message: Waiting) {
        self.lock().waiting.entry(lane).or_default().push_back(message);
        self.changed.notify_waiters();
    }
}

/// A queue in this process's memory.
#[derive(Clone, Default)]
pub struct MemoryQueue(Arc<Shared>);

#[async_trait]
impl Queue for MemoryQueue {
    async fn publish(&self, lane: Lane, message: Message) -> Result<()> {
        check_size(&message)?;
        let mut lanes = self.0.lock();
        if lanes.is_closed {
            return Err(Error::new(Code::QueueFailed, "the queue is closed"));
        }
        let waiting = lanes.waiting.entry(lane).or_default();
        if waiting.len() >= LANE_MESSAGES_MAX {
            return Err(Error::new(Code::QueueFailed, "the lane is full"));
        }
        waiting.push_back(Waiting { message, redelivered: false, returns: 0 });
        drop(lanes);
        self.0.changed.notify_waiters();
        Ok(())
    }

    fn subscribe(&self, lanes: &[Lane], _ahead: u16) -> Box<dyn Subscription> {
        // Nothing is fetched ahead: a message is in hand when it is taken.
        Box::new(MemorySubscription { queue: self.clone(), lanes: lanes.to_vec() })
    }

    async fn waiting(&self, lane: Lane) -> Result<usize> {
        Ok(self.0.lock().waiting.get(&lane).map_or(0, VecDeque::len))
    }

    fn close(&self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_waiters();
    }
}

struct MemorySubscription {
    queue: MemoryQueue,
    lanes: Vec<Lane>,
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Option<Delivery> {
        loop {
            // Registered before the look: a message that comes in between wakes us.
            let changed = self.queue.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = self.queue.take(&self.lanes) {
                return found;
            }
            changed.await;
        }
    }
}

impl MemoryQueue {
    /// `Some(None)`: closed. `None`: nothing is waiting.
    fn take(&self, lanes: &[Lane]) -> Option<Option<Delivery>> {
        let mut all = self.0.lock();
        if all.is_closed {
            return Some(None);
        }
        for lane in lanes {
            let Some(waiting) = all.waiting.get_mut(lane).and_then(VecDeque::pop_front) else {
                continue;
            };
            let (redelivered, returns) = (waiting.redelivered, waiting.returns);
            let message = waiting.message.clone();
            let held = Held { shared: Arc::clone(&self.0), lane: *lane, message: Some(waiting) };
            return Some(Some(Delivery::new(message, redelivered, returns, Box::new(held))));
        }
        None
    }
}

struct Held {
    shared: Arc<Shared>,
    lane: Lane,
    message: Option<Waiting>,
}

#[async_trait]
impl Settle for Held {
    async fn ack(mut self: Box<Self>) -> Result<()> {
        self.message = None;
        Ok(())
    }

    async fn set_aside(mut self: Box<Self>) -> Result<()> {
        // Where one process writes and reads there is nobody to look at it.
        self.message = None;
        Ok(())
    }

    async fn give_back(mut self: Box<Self>) -> Result<()> {
        // Dropped during the pause, it comes back at once.
        tokio::time::sleep(GIVE_BACK_PAUSE).await;
        if let Some(message) = self.message.take() {
            self.shared.put_back(self.lane, Waiting { redelivered: false, ..message });
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            let returns = message.returns + 1;
            self.shared.put_back(self.lane, Waiting { redelivered: true, returns, ..message });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::contract;

    #[tokio::test]
    async fn the_in_process_queue_keeps_the_contract() {
        contract::all(|| async { Arc::new(MemoryQueue::default()) as Arc<dyn Queue> }).await;
    }
}
