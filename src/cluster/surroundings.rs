//! What the coordinator's API tells of other processes and of the queues.

use alluvium_coordinator::api::{DEAD, Surroundings};
use alluvium_protocol::heartbeat::Heartbeat;
use alluvium_protocol::queue::{Lane, Queue};
use alluvium_protocol::{Code, Error, Result};
use async_trait::async_trait;

use super::Services;

#[async_trait]
impl Surroundings for Services {
    async fn workers(&self) -> Result<Vec<Heartbeat>> {
        self.leases.beats().await
    }

    async fn queues(&self) -> Result<Vec<(String, usize)>> {
        let mut queues = Vec::new();
        for lane in Lane::ALL {
            queues.push((lane.as_str().to_owned(), self.queue.waiting(lane).await?));
        }
        queues.push((DEAD.to_owned(), self.queue.dead().await?));
        Ok(queues)
    }

    async fn ready(&self) -> Result<()> {
        let health = self.queue.health();
        for link in [health.publishing, health.consuming] {
            let text = match (link.blocked, link.is_connected) {
                (Some(reason), _) => format!("RabbitMQ takes no messages: {reason}"),
                // Not used so far, or lost.
                (None, false) => match link.error {
                    Some(error) => format!("RabbitMQ cannot be reached: {error}"),
                    None => continue,
                },
                (None, true) => continue,
            };
            return Err(Error::new(Code::QueueFailed, text));
        }
        Ok(())
    }
}
