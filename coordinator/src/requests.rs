//! What people ask for: small files below the state folder, carried out by whichever coordinator
//! runs, deleted when the effect is durable. Carrying one out twice changes nothing more.

use std::str::FromStr;

use alluvium_protocol::manifest::Repairs;
use alluvium_protocol::task::RestoreTo;
use alluvium_protocol::{Code, Epoch, Error, Result};
use alluvium_table::classify::foreign;
use alluvium_table::store::{StoreRef, object_store_at};
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};

use crate::standing::EpochStanding;

/// A thing that a person can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Try a blocked or parked epoch again.
    Retry,
    /// Leave an epoch out: empty content.
    Skip,
    /// Read an epoch's folder again.
    Replay,
    /// Take an epoch's content back: empty content.
    Undo,
    /// Stop publishing tasks of a pipeline.
    Pause,
    /// Go on.
    Resume,
    /// Take main back to an earlier point, and pause.
    Rollback,
}

impl Verb {
    /// The word people type.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Skip => "skip",
            Self::Replay => "replay",
            Self::Undo => "undo",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Rollback => "rollback",
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Unique; the manifest that answers it carries it.
    pub id: String,
    /// What is asked for.
    pub verb: Verb,
    /// Of which pipeline.
    pub pipeline: String,
    /// Of which epoch, where the verb concerns one.
    pub epoch: Option<Epoch>,
    /// The point, of a rollback.
    #[serde(default)]
    pub to: Option<RestoreTo>,
    /// Corrected rows, of a replay.
    #[serde(default, skip_serializing_if = "Repairs::is_empty")]
    pub repairs: Repairs,
    /// Who asks.
    pub by: String,
    /// When.
    pub at: DateTime<Utc>,
}

/// The requests of one state folder.
pub struct Requests {
    store: StoreRef,
}

impl Requests {
    /// The requests below `state`.
    pub fn open(state: &str) -> Result<Self> {
        Ok(Self { store: object_store_at(state)? })
    }

    /// Stores a request.
    pub async fn ask(&self, request: &Request) -> Result<()> {
        let body = serde_json::to_vec_pretty(request).map_err(Error::internal)?;
        let stored = self.store.put(&Self::path(&request.id), body.into()).await;
        stored.map(drop).map_err(|e| foreign("store the request", &e))
    }

    /// All open requests, oldest first. An unreadable one is told and passed over.
    pub async fn open_ones(&self) -> Result<Vec<Request>> {
        let found: Vec<_> = self
            .store
            .list(Some(&Path::from("requests")))
            .try_collect()
            .await
            .map_err(|e| foreign("list the requests", &e))?;
        let mut requests: Vec<Request> = Vec::new();
        for meta in found {
            let doing = || format!("read the request {}", meta.location);
            let body = match self.store.get(&meta.location).await {
                Ok(found) => found.bytes().await.map_err(|e| foreign(doing(), &e))?,
                // Another coordinator has just carried it out.
                Err(object_store::Error::NotFound { .. }) => continue,
                Err(error) => return Err(foreign(doing(), &error)),
            };
            match serde_json::from_slice(&body) {
                Ok(request) => requests.push(request),
                Err(error) => {
                    tracing::error!(%error, file = %meta.location, "delete this request: nobody can carry it out")
                }
            }
        }
        requests.sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
        Ok(requests)
    }

    /// The request was not carried out yet.
    pub async fn is_open(&self, id: &str) -> Result<bool> {
        match self.store.head(&Self::path(id)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(foreign("look at the request", &error)),
        }
    }

    /// Removes a request that was carried out.
    pub async fn done(&self, id: &str) -> Result<()> {
        match self.store.delete(&Self::path(id)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(foreign(format!("remove the request {id}"), &error)),
        }
    }

    fn path(id: &str) -> Path {
        Path::from(format!("requests/{id}.json"))
    }
}

impl FromStr for Verb {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [
            Self::Retry,
            Self::Skip,
            Self::Replay,
            Self::Undo,
            Self::Pause,
            Self::Resume,
            Self::Rollback,
        ];
        all.into_iter()
            .find(|verb| verb.as_str() == text)
            .ok_or_else(|| Error::new(Code::MessageUnknown, format!("no verb {text:?}")))
    }
}

/// The epoch exists and the act makes sense, by a list of the pipeline's epochs. Returns its state.
pub fn check_act(id: &str, epochs: &[EpochStanding], verb: Verb, epoch: Epoch) -> Result<String> {
    let Some(found) = epochs.iter().find(|found| found.epoch == epoch) else {
        return Err(Error::new(Code::UnknownEpoch, format!("{id} knows no epoch {epoch}"))
            .with_help(format!("`alluvium epochs {id}` lists them")));
    };
    let refuse = |why: &str, help: String| {
        Err(Error::new(Code::NotPossibleNow, format!("epoch {epoch} {why}")).with_help(help))
    };
    match (verb, found.state.as_str()) {
        (Verb::Replay, "empty" | "incomplete") => {
            refuse("is not complete: it is read when it is", format!("`alluvium plan {id}`"))
        }
        (Verb::Undo, "empty" | "incomplete") => refuse(
            "was never read: there is nothing to undo",
            format!("`alluvium skip {id} {epoch}` leaves it out"),
        ),
        _ => Ok(found.state.clone()),
    }
}
