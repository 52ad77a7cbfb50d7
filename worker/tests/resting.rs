//! A worker that is to rest takes no more tasks, however many wait.

use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::clock::{ClockRef, SystemClock};
use alluvium_protocol::lease::memory::MemoryLeases;
use alluvium_protocol::queue::memory::MemoryQueue;
use alluvium_protocol::queue::{Lane, Message, Queue};
use alluvium_worker::Workshop;
use alluvium_worker::slots::{Duty, Orders, Worker};
use alluvium_worker::tables::Tables;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_rests_leaves_the_backlog_to_others() {
    let lane = Lane::TASKS[0];
    let clock: ClockRef = Arc::new(SystemClock);
    let queue = MemoryQueue::default();
    let duty = Arc::new(Duty::under(Orders::default()));
    let worker = Worker {
        name: "w".to_owned(),
        queue: Arc::new(queue.clone()),
        leases: Arc::new(MemoryLeases::new(Arc::clone(&clock))),
        workshop: Workshop { clock, tables: Arc::new(Tables::default()) },
        keeping: tokio::runtime::Handle::current(),
        lanes: vec![lane],
        is_alone: true,
        duty: Arc::clone(&duty),
    };
    let working = tokio::spawn(worker.run(1));
    // Set aside one by one: nobody understands them. There is always another.
    let messages = queue.clone();
    let publishing = tokio::spawn(async move {
        for number in 0.. {
            let message = Message::new(format!("m{number}"), b"?".to_vec());
            messages.publish(lane, message).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    duty.rest(Some("the disk is full".to_owned()));
    let grew = async {
        while queue.waiting(lane).await.unwrap() < 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), grew).await.expect("it takes no more");
    duty.rest(None);
    let took = async {
        while queue.waiting(lane).await.unwrap() > 50 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), took).await.expect("it goes on");
    publishing.abort();
    duty.orders.draining.cancel();
    working.await.unwrap().unwrap();
}
