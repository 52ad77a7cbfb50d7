//! Results on their way to the coordinator. While one message is being confirmed, results that
//! come meanwhile gather for the next one: under load a broker writes a fraction of the messages,
//! and a single result waits for nobody.

use std::sync::Arc;

use alluvium_protocol::queue::{Lane, Message, Queue};
use alluvium_protocol::task::{BODY_BYTES_MAX, FORMAT_MAJOR, TaskResult, TaskResults, encode};
use alluvium_protocol::{Error, Result};
use tokio::sync::{mpsc, oneshot};

/// Results that wait for the message before.
const WAITING_MAX: usize = 1024;
/// Room in a message for what stands around the results.
const ENVELOPE_BYTES: usize = 64;

struct Answer {
    result: TaskResult,
    bytes: usize,
    reply: oneshot::Sender<Result<()>>,
}

/// Where slots hand their results in.
#[derive(Clone)]
pub(crate) struct Answers(mpsc::Sender<Answer>);

impl Answers {
    /// Starts; ends when the last handle is gone.
    pub(crate) fn start(queue: Arc<dyn Queue>) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        tokio::spawn(publish_all(queue, receiver));
        Self(sender)
    }

    /// Ok: the coordinator will get it.
    pub(crate) async fn publish(&self, result: TaskResult) -> Result<()> {
        let bytes = encode(&result)?.len();
        let (reply, confirmed) = oneshot::channel();
        let ended = || Error::internal("nobody publishes results any more");
        self.0.send(Answer { result, bytes, reply }).await.map_err(|_| ended())?;
        confirmed.await.map_err(|_| ended())?
    }
}

async fn publish_all(queue: Arc<dyn Queue>, mut answers: mpsc::Receiver<Answer>) {
    let mut next: Option<Answer> = None;
    loop {
        let Some(first) = (match next.take() {
            Some(answer) => Some(answer),
            None => answers.recv().await,
        }) else {
            return;
        };
        let mut bytes = ENVELOPE_BYTES + first.bytes;
        let mut batch = vec![first];
        while let Ok(answer) = answers.try_recv() {
            // One byte for the comma.
            bytes += answer.bytes + 1;
            if bytes > BODY_BYTES_MAX {
                next = Some(answer);
                break;
            }
            batch.push(answer);
        }
        let (results, replies): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|answer| (answer.result, answer.reply)).unzip();
        let published = publish(queue.as_ref(), results).await;
        for reply in replies {
            // Who gave up waiting publishes again.
            let _ = reply.send(published.clone());
        }
    }
}

async fn publish(queue: &dyn Queue, results: Vec<TaskResult>) -> Result<()> {
    let id = results.first().map(|result| format!("{}/{}", result.task, result.attempt));
    let trace = results.first().and_then(|result| result.trace.clone());
    let body = encode(&TaskResults { format: FORMAT_MAJOR, results })?;
    queue.publish(Lane::Results, Message { id: id.unwrap_or_default(), body, trace }).await
}
