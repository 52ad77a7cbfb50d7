//! The contract suite of the queue: every backend passes it, the in-process one first.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a contract suite fails by panicking")]

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::{Delivery, Lane, Queue};
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
    hides_a_message_in_hand(fresh().await).await;
    an_acknowledged_message_never_comes_back(fresh().await).await;
    a_dropped_delivery_comes_back_as_redelivered(fresh().await).await;
    a_message_given_back_comes_back_unmarked(fresh().await).await;
    many_receivers_share_and_nothing_is_lost(fresh().await).await;
    refuses_a_body_that_is_too_large(fresh().await).await;
    closing_wakes_receivers(fresh().await).await;
}

async fn next(queue: &Arc<dyn Queue>, lanes: &[Lane]) -> Delivery {
    let received = tokio::time::timeout(PATIENCE, queue.receive(lanes)).await;
    received.unwrap_or_else(|_| panic!("no message on {lanes:?}")).unwrap().unwrap()
}

async fn delivers_what_was_published(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Ingest, b"one".to_vec()).await.unwrap();
    let delivery = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(delivery.body, b"one");
    assert!(!delivery.redelivered);
    delivery.ack().await.unwrap();
}

async fn keeps_lanes_apart(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Merge, b"merge".to_vec()).await.unwrap();
    queue.publish(Lane::Results, b"result".to_vec()).await.unwrap();
    let delivery = next(&queue, &[Lane::Ingest, Lane::Results]).await;
    assert_eq!(delivery.body, b"result");
    delivery.ack().await.unwrap();
    let delivery = next(&queue, &Lane::TASKS).await;
    assert_eq!(delivery.body, b"merge");
    delivery.ack().await.unwrap();
}

async fn hides_a_message_in_hand(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Ingest, b"first".to_vec()).await.unwrap();
    queue.publish(Lane::Ingest, b"second".to_vec()).await.unwrap();
    let first = next(&queue, &[Lane::Ingest]).await;
    let second = next(&queue, &[Lane::Ingest]).await;
    assert_ne!(first.body, second.body);
    first.ack().await.unwrap();
    second.ack().await.unwrap();
}

async fn an_acknowledged_message_never_comes_back(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Ingest, b"done".to_vec()).await.unwrap();
    next(&queue, &[Lane::Ingest]).await.ack().await.unwrap();
    queue.publish(Lane::Ingest, b"sentinel".to_vec()).await.unwrap();
    let delivery = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(delivery.body, b"sentinel");
    delivery.ack().await.unwrap();
}

async fn a_dropped_delivery_comes_back_as_redelivered(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Ingest, b"held".to_vec()).await.unwrap();
    drop(next(&queue, &[Lane::Ingest]).await);
    let again = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(again.body, b"held");
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

async fn a_message_given_back_comes_back_unmarked(queue: Arc<dyn Queue>) {
    queue.publish(Lane::Ingest, b"later".to_vec()).await.unwrap();
    next(&queue, &[Lane::Ingest]).await.give_back().await.unwrap();
    let again = next(&queue, &[Lane::Ingest]).await;
    assert_eq!(again.body, b"later");
    assert!(!again.redelivered);
    again.ack().await.unwrap();
}

async fn many_receivers_share_and_nothing_is_lost(queue: Arc<dyn Queue>) {
    const MESSAGES: usize = 200;
    let receivers: Vec<_> = (0..4)
        .map(|_| {
            let queue = Arc::clone(&queue);
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while seen.len() < MESSAGES / 4 {
                    let delivery = next(&queue, &[Lane::Merge]).await;
                    seen.push(delivery.body.clone());
                    delivery.ack().await.unwrap();
                }
                seen
            })
        })
        .collect();
    for number in 0..MESSAGES {
        queue.publish(Lane::Merge, number.to_string().into_bytes()).await.unwrap();
    }
    let mut seen = BTreeSet::new();
    for receiver in receivers {
        seen.extend(receiver.await.unwrap());
    }
    assert_eq!(seen.len(), MESSAGES);
}

async fn refuses_a_body_that_is_too_large(queue: Arc<dyn Queue>) {
    assert!(queue.publish(Lane::Ingest, vec![b'x'; BODY_BYTES_MAX + 1]).await.is_err());
    queue.publish(Lane::Ingest, vec![b'x'; BODY_BYTES_MAX]).await.unwrap();
    next(&queue, &[Lane::Ingest]).await.ack().await.unwrap();
}

async fn closing_wakes_receivers(queue: Arc<dyn Queue>) {
    let waiting = {
        let queue = Arc::clone(&queue);
        tokio::spawn(async move { queue.receive(&[Lane::Ingest]).await.unwrap().is_none() })
    };
    tokio::task::yield_now().await;
    queue.close();
    assert!(tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap());
}
