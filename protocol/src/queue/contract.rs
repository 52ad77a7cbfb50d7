//! The contract suite of the queue: every backend passes it, the in-process one first.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a contract suite fails by panicking")]

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::{Delivery, Lane, Message, Queue, Subscription};
use crate::task::BODY_BYTES_MAX;

/// A real broker may take a while; a message that comes is there long before.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the whole suite, each claim on an empty queue that `fresh` makes.
pub async fn all<F, Made>(fresh: F)
where
    F: Fn() -> Made,
    Made: Future<Output = Arc<dyn Queue>>,
{
    delivers_what_was_published(fresh().await).await;
    keeps_lanes_apart(fresh().await).await;
    a_message_set_aside_never_comes_back(fresh().await).await;
    carries_the_id_and_the_trace(fresh().await).await;
    hides_a_message_in_hand(fresh().await).await;
    an_acknowledged_message_never_comes_back(fresh().await).await;
    a_dropped_delivery_comes_back_as_redelivered(fresh().await).await;
    a_message_given_back_comes_back_unmarked(fresh().await).await;
    a_busy_subscriber_holds_no_other_message_back(fresh().await).await;
    counts_what_waits(fresh().await).await;
    many_receivers_share_and_nothing_is_lost(fresh().await).await;
    refuses_a_body_that_is_too_large(fresh().await).await;
    closing_wakes_receivers(fresh().await).await;
}

/// Subscribes, takes one message, and leaves.
async fn next(queue: &Arc<dyn Queue>, lanes: &[Lane]) -> Delivery {
    next_of(queue.subscribe(lanes, 1).as_mut()).await
}

async fn next_of(subscription: &mut dyn Subscription) -> Delivery {
    let received = tokio::time::timeout(PATIENCE, subscription.next()).await;
    received.unwrap_or_else(|_| panic!("no message")).unwrap()
}

async fn publish(queue: &Arc<dyn Queue>, lane: Lane, text: &str) {
    queue.publish(lane, Message::new(text, text.as_bytes().to_vec())).await.unwrap();
}

async fn delivers_what_was_published(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "one").await;
    let delivery = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(delivery.message.body, b"one");
    assert!(!delivery.redelivered);
    delivery.ack().await.unwrap();
}

async fn keeps_lanes_apart(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Merge, "merge").await;
    publish(&queue, Lane::Results, "result").await;
    let delivery = next(&queue, &[Lane::Ingest, Lane::Results]).await;
    assert_eq!(delivery.message.body, b"result");
    delivery.ack().await.unwrap();
    let delivery = next(&queue, &Lane::TASKS).await;
    assert_eq!(delivery.message.body, b"merge");
    delivery.ack().await.unwrap();
}

async fn hides_a_message_in_hand(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "first").await;
    publish(&queue, Lane::Ingest, "second").await;
    let first = next(&queue, &[Lane::Ingest]).await;
    let second = next(&queue, &[Lane::Ingest]).await;
    assert_ne!(first.message.body, second.message.body);
    first.ack().await.unwrap();
    second.ack().await.unwrap();
}

async fn an_acknowledged_message_never_comes_back(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "done").await;
    next(&queue, &[Lane::Ingest]).await.ack().await.unwrap();
    publish(&queue, Lane::Ingest, "sentinel").await;
    let delivery = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(delivery.message.body, b"sentinel");
    delivery.ack().await.unwrap();
}

async fn a_dropped_delivery_comes_back_as_redelivered(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "held").await;
    drop(next(&queue, &[Lane::Ingest]).await);
    let again = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(again.message.body, b"held");
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

async fn a_message_given_back_comes_back_unmarked(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "later").await;
    next(&queue, &[Lane::Ingest]).await.give_back().await.unwrap();
    let again = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(again.message.body, b"later");
    assert!(!again.redelivered);
    again.ack().await.unwrap();
}

async fn a_message_set_aside_never_comes_back(queue: Arc<dyn Queue>) {
    publish(&queue, Lane::Ingest, "garbage").await;
    next(&queue, &[Lane::Ingest]).await.set_aside().await.unwrap();
    publish(&queue, Lane::Ingest, "sentinel").await;
    let delivery = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(delivery.message.body, b"sentinel");
    delivery.ack().await.unwrap();
}

async fn carries_the_id_and_the_trace(queue: Arc<dyn Queue>) {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let sent = Message { id: "7".to_owned(), body: b"x".to_vec(), trace: Some(trace.to_owned()) };
    queue.publish(Lane::Merge, sent.clone()).await.unwrap();
    let delivery = next(&queue, &[Lane::Merge]).await;
    assert_eq!(delivery.message, sent);
    delivery.give_back().await.unwrap();
    let again = next(&queue, &[Lane::Merge]).await;
    assert_eq!(again.message, sent);
    again.ack().await.unwrap();
}

async fn a_busy_subscriber_holds_no_other_message_back(queue: Arc<dyn Queue>) {
    let mut busy = queue.subscribe(&Lane::TASKS, 1);
    publish(&queue, Lane::Ingest, "long").await;
    let long = next_of(busy.as_mut()).await;
    // Comes while `busy` is the only one there, and at work.
    publish(&queue, Lane::Merge, "other").await;
    publish(&queue, Lane::Ingest, "third").await;
    let mut idle = queue.subscribe(&Lane::TASKS, 1);
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        let delivery = next_of(idle.as_mut()).await;
        seen.insert(String::from_utf8(delivery.message.body.clone()).unwrap());
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, BTreeSet::from(["other".to_owned(), "third".to_owned()]));
    long.ack().await.unwrap();
    // And it takes part again afterwards.
    drop(idle);
    publish(&queue, Lane::Merge, "last").await;
    next_of(busy.as_mut()).await.ack().await.unwrap();
}

async fn counts_what_waits(queue: Arc<dyn Queue>) {
    for text in ["a", "b", "c"] {
        publish(&queue, Lane::Maintenance, text).await;
    }
    // Brokers count a moment later.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while queue.waiting(Lane::Maintenance).await.unwrap() != 3 {
        assert!(tokio::time::Instant::now() < deadline, "3 messages do not count as 3");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(queue.waiting(Lane::Merge).await.unwrap(), 0);
}

async fn many_receivers_share_and_nothing_is_lost(queue: Arc<dyn Queue>) {
    const MESSAGES: usize = 200;
    let seen = Arc::new(std::sync::Mutex::new(BTreeSet::new()));
    let receivers: Vec<_> = (0..4)
        .map(|_| {
            let (queue, seen) = (Arc::clone(&queue), Arc::clone(&seen));
            tokio::spawn(async move {
                let mut subscription = queue.subscribe(&[Lane::Merge], 1);
                while let Some(delivery) = subscription.next().await {
                    seen.lock().unwrap().insert(delivery.message.body.clone());
                    delivery.ack().await.unwrap();
                }
            })
        })
        .collect();
    for number in 0..MESSAGES {
        publish(&queue, Lane::Merge, &number.to_string()).await;
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while seen.lock().unwrap().len() < MESSAGES {
        assert!(tokio::time::Instant::now() < deadline, "messages are missing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    queue.close();
    for receiver in receivers {
        tokio::time::timeout(PATIENCE, receiver).await.unwrap().unwrap();
    }
}

async fn refuses_a_body_that_is_too_large(queue: Arc<dyn Queue>) {
    let of = |bytes: usize| Message::new("large", vec![b'x'; bytes]);
    assert!(queue.publish(Lane::Ingest, of(BODY_BYTES_MAX + 1)).await.is_err());
    queue.publish(Lane::Ingest, of(BODY_BYTES_MAX)).await.unwrap();
    next(&queue, &[Lane::Ingest]).await.ack().await.unwrap();
}

async fn closing_wakes_receivers(queue: Arc<dyn Queue>) {
    let mut subscription = queue.subscribe(&[Lane::Ingest], 1);
    let waiting = tokio::spawn(async move { subscription.next().await.is_none() });
    tokio::task::yield_now().await;
    queue.close();
    assert!(tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap());
}
