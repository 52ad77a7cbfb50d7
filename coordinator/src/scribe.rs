//! The scribe: writes the ledger beside the loop, in batches, and acknowledges results after the
//! batch that holds them.
//!
//! Sequencing never waits for it. A ledger that cannot be written costs history, not data: it is
//! told, and rebuilt later.

use std::time::Duration;

use alluvium_protocol::queue::Delivery;
use alluvium_protocol::{Error, Result};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::ledger::{Ledger, LedgerTable};
use crate::notice::Notice;

/// Results that wait for one commit at most.
const BATCH_RESULTS_MAX: usize = 500;
/// Longest wait of a result for its batch.
const BATCH_WAIT: Duration = Duration::from_millis(1000);
/// Results that may queue up behind a slow ledger before the loop waits.
const BACKLOG_MAX: usize = 10_000;

/// Rows for the ledger.
#[derive(Default)]
pub struct Rows {
    /// For `processed_folders`.
    pub processed: Vec<Value>,
    /// For `step_events`.
    pub events: Vec<Value>,
}

struct Entry {
    rows: Rows,
    delivery: Option<Delivery>,
}

/// The running scribe.
pub struct ScribeHandle {
    entries: Option<mpsc::Sender<Entry>>,
    task: Option<JoinHandle<()>>,
}

/// Writes the ledger.
pub struct Scribe {
    ledger: Ledger,
    notices: mpsc::UnboundedSender<Notice>,
    is_failing: bool,
}

impl Scribe {
    /// Starts the scribe of a state folder. Its failures are told and never stop the process.
    pub fn start(state: &str, notices: mpsc::UnboundedSender<Notice>) -> ScribeHandle {
        let (sender, receiver) = mpsc::channel(BACKLOG_MAX);
        let scribe = Self { ledger: Ledger::open(state), notices, is_failing: false };
        let task = tokio::spawn(scribe.run(receiver));
        ScribeHandle { entries: Some(sender), task: Some(task) }
    }

    async fn run(mut self, mut entries: mpsc::Receiver<Entry>) {
        while let Some(first) = entries.recv().await {
            let mut batch = vec![first];
            let deadline = tokio::time::sleep(BATCH_WAIT);
            tokio::pin!(deadline);
            while batch.len() < BATCH_RESULTS_MAX {
                tokio::select! {
                    next = entries.recv() => match next {
                        Some(entry) => batch.push(entry),
                        None => break,
                    },
                    () = &mut deadline => break,
                }
            }
            self.write(batch).await;
        }
    }

    async fn write(&mut self, batch: Vec<Entry>) {
        let mut rows = Rows::default();
        let mut deliveries = Vec::new();
        for entry in batch {
            rows.processed.extend(entry.rows.processed);
            rows.events.extend(entry.rows.events);
            deliveries.extend(entry.delivery);
        }
        match self.append(rows).await {
            Ok(()) => self.is_failing = false,
            Err(error) => self.tell(&error),
        }
        // Acknowledged even when the ledger failed: the tables hold the truth, and a result that
        // comes again would only fail again. The next start restores the rows.
        for delivery in deliveries {
            let acknowledged = match alluvium_protocol::crash::point("result.before_ack") {
                Ok(()) => delivery.ack().await,
                Err(error) => Err(error),
            };
            if let Err(error) = acknowledged {
                tracing::debug!(%error, "a result was not acknowledged; it comes again");
            }
        }
    }

    async fn append(&mut self, rows: Rows) -> Result<()> {
        self.ledger.append(LedgerTable::StepEvents, rows.events).await?;
        self.ledger.append(LedgerTable::ProcessedFolders, rows.processed).await
    }

    fn tell(&mut self, error: &Error) {
        tracing::error!(%error, "the ledger cannot be written; data goes on");
        if !self.is_failing {
            let text = format!(
                "the ledger cannot be written ({error}); data goes on, and the next start restores \
                 what is missing"
            );
            let _ = self.notices.send(Notice::Warning { pipeline: String::new(), text });
        }
        self.is_failing = true;
    }
}

impl ScribeHandle {
    /// Hands rows over, with the result to acknowledge after them.
    pub async fn write(&self, rows: Rows, delivery: Option<Delivery>) {
        if let Some(entries) = &self.entries {
            // The scribe ends only after this sender is gone.
            let _ = entries.send(Entry { rows, delivery }).await;
        }
    }

    /// Waits until everything handed over is written.
    pub async fn finish(&mut self) {
        self.entries = None;
        if let Some(task) = self.task.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the scribe ended early");
        }
    }
}
