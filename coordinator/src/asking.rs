//! What other parts of the process ask the coordinator's loop while it runs.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::run::Coordinator;
use crate::sequencing::plan;
use crate::standing::{EpochStanding, PipelineStanding, epochs_of, plan_items, standing_of};

/// A question or a nudge.
pub enum Ask {
    /// Discover now: somebody left a request, or files came.
    Look,
    /// Files came for these pipelines.
    Wake(Vec<String>),
    /// How do things stand?
    Stand(oneshot::Sender<Stand>),
    /// Which requests of this id are still open, and how did it end?
    Refusal(String, oneshot::Sender<Option<alluvium_protocol::Error>>),
}

/// How things stand at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Stand {
    /// When.
    pub at: DateTime<Utc>,
    /// Each pipeline.
    pub pipelines: Vec<PipelineStanding>,
    /// Each epoch.
    pub epochs: Vec<EpochStanding>,
    /// What is to be done, and why the rest waits.
    pub plan: Vec<Value>,
}

impl Coordinator {
    pub(crate) fn answer(&self, ask: Ask) {
        match ask {
            Ask::Look | Ask::Wake(_) => {}
            // Who asked may have left.
            Ask::Stand(reply) => drop(reply.send(self.stand())),
            Ask::Refusal(id, reply) => {
                let refused = self.refused.iter().find(|(refused, _)| *refused == id);
                drop(reply.send(refused.map(|(_, error)| error.clone())));
            }
        }
    }

    fn stand(&self) -> Stand {
        let now = self.clock.now();
        let mut stand =
            Stand { at: now, pipelines: Vec::new(), epochs: Vec::new(), plan: Vec::new() };
        for book in &self.books {
            let views = book.epoch_views();
            let plan = plan(&book.view(&views), now);
            let epochs = epochs_of(book, &plan);
            stand.plan.extend(plan_items(book, &plan, &epochs));
            stand.pipelines.push(standing_of(book, &plan));
            stand.epochs.extend(epochs);
        }
        stand
    }
}
