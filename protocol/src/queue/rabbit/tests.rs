//! RabbitMQ for real, and a scripted peer for what a real one does not do on demand.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::peer::{self, OnConsume, OnPublish, Script};
use super::{RabbitQueue, RabbitSettings};
use crate::queue::{Lane, Message, Queue, contract};

/// More than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn queue_at(url: &str) -> RabbitQueue {
    let settings = RabbitSettings {
        url: url.to_owned(),
        name: format!("test-{}", uuid::Uuid::new_v4()),
        client: "contract".to_owned(),
        longest_task: Duration::from_secs(60),
    };
    RabbitQueue::new(&settings, Handle::current())
}

fn hello() -> Message {
    Message::new("1", b"hello".to_vec())
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("within the time of this test")
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_keeps_the_contract() {
    let url = std::env::var("ALLUVIUM_TEST_AMQP")
        .expect("ALLUVIUM_TEST_AMQP is not set: `scripts/test rust` starts a RabbitMQ");
    contract::all(|| async { Arc::new(queue_at(&url)) as Arc<dyn Queue> }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_one_lane_keeps_no_other_waiting_and_little_comes_back() {
    let url = std::env::var("ALLUVIUM_TEST_AMQP").expect("ALLUVIUM_TEST_AMQP");
    let queue = queue_at(&url);
    let lanes = [Lane::Ingest, Lane::Merge, Lane::Maintenance, Lane::Shard];
    for (lane, count) in [(Lane::Ingest, 12), (Lane::Merge, 2), (Lane::Shard, 2)] {
        for _ in 0..count {
            queue.publish(lane, Message::new(lane.as_str(), Vec::new())).await.unwrap();
        }
    }
    let mut subscription = queue.subscribe(&lanes, 1);
    let mut taken = Vec::new();
    for _ in 0..10 {
        let delivery = soon(subscription.next()).await.unwrap();
        assert!(delivery.returns < 5, "{} came back too often", delivery.message.id);
        // A long task.
        tokio::time::sleep(Duration::from_millis(400)).await;
        taken.push(delivery.message.id.clone());
        delivery.ack().await.unwrap();
    }
    let count = |lane: Lane| taken.iter().filter(|id| *id == lane.as_str()).count();
    assert_eq!((count(Lane::Merge), count(Lane::Shard)), (2, 2), "{taken:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_library_still_reads_the_end_of_a_consumer_as_the_end_of_its_stream() {
    // What `Supervisor` rests on: `None`, not an error, when the broker cancels (RabbitMQ 4.3).
    use futures::StreamExt;
    use lapin::options::BasicConsumeOptions;
    use lapin::types::FieldTable;
    let script = Script { consume: |_| OnConsume::Cancel, ..Script::quiet() };
    let peer = peer::start(script, 10).await;
    let properties = lapin::ConnectionProperties::default();
    let connection = lapin::Connection::connect(&peer.url, properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions::default();
    let consumed = channel.basic_consume("q".into(), "".into(), options, FieldTable::default());
    let mut consumer = consumed.await.unwrap();
    assert!(soon(consumer.next()).await.is_none());
    assert!(channel.status().connected());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_the_broker_ends_is_made_anew() {
    let script = Script {
        consume: |count| if count == 0 { OnConsume::Cancel } else { OnConsume::Deliver },
        ..Script::quiet()
    };
    let peer = peer::start(script, 10).await;
    let queue = queue_at(&peer.url);
    let mut subscription = queue.subscribe(&[Lane::Ingest], 1);
    let delivery = soon(subscription.next()).await.unwrap();
    assert_eq!(delivery.message.body, b"hello");
    delivery.ack().await.unwrap();
    assert_eq!(peer.seen.lock().unwrap().consumed, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_the_broker_forgot_is_made_anew() {
    // Nothing comes and nothing is told: RabbitMQ 3.10 now and then, when a queue is deleted and made
    // again. The peer says that the queue has no consumer.
    let script = Script {
        consume: |count| if count == 0 { OnConsume::Nothing } else { OnConsume::Deliver },
        ..Script::quiet()
    };
    let peer = peer::start(script, 10).await;
    let queue = queue_at(&peer.url);
    let mut subscription = queue.subscribe(&[Lane::Results], 1);
    let delivery = soon(subscription.next()).await.unwrap();
    delivery.ack().await.unwrap();
    assert_eq!(peer.seen.lock().unwrap().consumed, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_the_broker_closes_is_made_anew() {
    let script = Script {
        consume: |count| if count < 2 { OnConsume::CloseChannel } else { OnConsume::Deliver },
        ..Script::quiet()
    };
    let peer = peer::start(script, 10).await;
    let queue = queue_at(&peer.url);
    let mut subscription = queue.subscribe(&[Lane::Ingest], 1);
    let delivery = soon(subscription.next()).await.unwrap();
    delivery.ack().await.unwrap();
    assert_eq!(peer.seen.lock().unwrap().consumed, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_refused_or_finds_no_queue_was_not_published() {
    let script = Script {
        publish: |count| [OnPublish::Nack, OnPublish::Return, OnPublish::Ack][count],
        ..Script::quiet()
    };
    let peer = peer::start(script, 10).await;
    let queue = queue_at(&peer.url);
    let refused = soon(queue.publish(Lane::Ingest, hello())).await.unwrap_err();
    assert!(refused.message.contains("full"), "{refused}");
    let returned = soon(queue.publish(Lane::Ingest, hello())).await.unwrap_err();
    assert!(returned.message.contains("no queue"), "{returned}");
    soon(queue.publish(Lane::Ingest, hello())).await.unwrap();
    assert_eq!(peer.seen.lock().unwrap().published, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_falls_silent_is_left_and_the_message_is_sent_again() {
    let script = Script {
        publish: |count| if count == 0 { OnPublish::FallSilent } else { OnPublish::Ack },
        ..Script::quiet()
    };
    let peer = peer::start(script, 1).await;
    let queue = queue_at(&peer.url);
    soon(queue.publish(Lane::Ingest, hello())).await.unwrap();
    let seen = peer.seen.lock().unwrap();
    assert_eq!((seen.published, seen.connections), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_of_the_broker_is_told() {
    // Brokers tell it to those who publish. From then on the library sends nothing on this connection.
    let script = Script { publish: |_| OnPublish::Block, ..Script::quiet() };
    let peer = peer::start(script, 10).await;
    let queue = queue_at(&peer.url);
    soon(queue.publish(Lane::Ingest, hello())).await.unwrap();
    soon(async {
        while queue.health().publishing.blocked.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(queue.health().publishing.blocked.as_deref(), Some("low on memory"));
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_are_declared_with_what_correctness_needs() {
    let peer = peer::start(Script::quiet(), 10).await;
    queue_at(&peer.url).check().await.unwrap();
    let has =
        |payload: &[u8], text: &str| payload.windows(text.len()).any(|w| w == text.as_bytes());
    let seen = peer.seen.lock().unwrap();
    let of = |name: &str| seen.declared.iter().find(|payload| has(payload, name)).unwrap();
    for name in [".task.ingest", ".task.merge", ".task.maintenance"] {
        for argument in
            ["quorum", "x-delivery-limit", "x-consumer-timeout", "at-least-once", "reject-publish"]
        {
            assert!(has(of(name), argument), "{name} {argument}");
        }
    }
    assert!(has(of(".results"), "x-single-active-consumer"));
    assert!(has(of(".v1.delay"), "x-message-ttl"));
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_an_error_in_time() {
    let queue = queue_at("amqp://guest:guest@127.0.0.1:1/%2f");
    let error = soon(queue.check()).await.unwrap_err();
    assert!(error.message.contains("127.0.0.1:1"), "{error}");
}
