//! The in-process twin of the queue: what embedded mode runs on.
//!
//! Owns: waiting messages, and those in hand until they are settled. A dropped delivery comes back
//! marked as redelivered, as after a lost connection.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::{Delivery, Lane, Queue, Settle};
use crate::task::BODY_BYTES_MAX;
use crate::{Code, Error, Result};

/// Messages that one lane holds at most; the coordinator's window keeps far below it.
const LANE_MESSAGES_MAX: usize = 100_000;

#[derive(Clone)]
struct Waiting {
    body: Vec<u8>,
    redelivered: bool,
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
    async fn publish(&self, lane: Lane, body: Vec<u8>) -> Result<()> {
        if body.len() > BODY_BYTES_MAX {
            let text = format!("a body of {} bytes; the limit is {BODY_BYTES_MAX}", body.len());
            return Err(Error::new(Code::QueueFailed, text));
        }
        let mut lanes = self.0.lock();
        if lanes.is_closed {
            return Err(Error::new(Code::QueueFailed, "the queue is closed"));
        }
        let waiting = lanes.waiting.entry(lane).or_default();
        if waiting.len() >= LANE_MESSAGES_MAX {
            return Err(Error::new(Code::QueueFailed, "the lane is full"));
        }
        waiting.push_back(Waiting { body, redelivered: false });
        drop(lanes);
        self.0.changed.notify_waiters();
        Ok(())
    }

    async fn receive(&self, lanes: &[Lane]) -> Result<Option<Delivery>> {
        loop {
            // Registered before the look: a message that comes in between wakes us.
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = self.take(lanes) {
                return Ok(found);
            }
            changed.await;
        }
    }

    fn close(&self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_waiters();
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
            let Some(message) = all.waiting.get_mut(lane).and_then(VecDeque::pop_front) else {
                continue;
            };
            let redelivered = message.redelivered;
            let body = message.body.clone();
            let held = Held { shared: Arc::clone(&self.0), lane: *lane, message: Some(message) };
            return Some(Some(Delivery::new(body, redelivered, Box::new(held))));
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

    async fn give_back(mut self: Box<Self>) -> Result<()> {
        if let Some(message) = self.message.take() {
            self.shared.put_back(self.lane, Waiting { redelivered: false, ..message });
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            self.shared.put_back(self.lane, Waiting { redelivered: true, ..message });
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
