//! Where a step's pieces are laid out and what came of them is told: objects below the state folder, whose
//! names begin with the plan's.

use std::collections::BTreeSet;

use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::classify::foreign;
use alluvium_table::posted;
use alluvium_table::spool::Spool;
use alluvium_table::store::{StoreRef, object_store_at};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Job, Product};

/// Plans are below it, by pipeline.
pub(super) const SHARDS: &str = "shards";
const PLAN: &str = "plan.json";

/// How a piece ended.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Done(Box<Product>),
    Failed(Error),
}

/// The objects of one plan.
pub(crate) struct Board {
    store: StoreRef,
    /// Where the plans of the pipeline are.
    folder: Path,
    /// `shards/<pipeline>/<id>`
    plan: String,
    id: String,
}

impl Board {
    /// A new one.
    pub(super) fn of(pipeline: &Pipeline) -> Result<Self> {
        Self::at(pipeline, &format!("{SHARDS}/{}/{}", pipeline.id, Uuid::new_v4()))
    }

    /// The one with this plan, if it is one of the pipeline's.
    pub(super) fn at(pipeline: &Pipeline, plan: &str) -> Result<Self> {
        let folder = format!("{SHARDS}/{}", pipeline.id);
        let id = plan.strip_prefix(&folder).and_then(|rest| rest.strip_prefix('/'));
        let Some(id) = id.filter(|id| Uuid::parse_str(id).is_ok()) else {
            let text = format!("{plan:?} is no plan of {}", pipeline.id);
            return Err(Error::new(Code::MessageUnknown, text));
        };
        let (store, id) = (object_store_at(&pipeline.state)?, id.to_owned());
        Ok(Self { store, folder: Path::from(folder), plan: plan.to_owned(), id })
    }

    pub(super) fn plan(&self) -> &str {
        &self.plan
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}-{name}", self.plan))
    }

    /// The paths of its objects, and what their names say after its own.
    async fn objects(&self) -> Result<Vec<(Path, String)>> {
        let listed: Vec<_> = self
            .store
            .list(Some(&self.folder))
            .try_collect()
            .await
            .map_err(|e| foreign(format!("list {}", self.folder), &e))?;
        let own = |meta: ObjectMeta| {
            let name = meta.location.filename()?.strip_prefix(&self.id)?.strip_prefix('-')?;
            let name = name.to_owned();
            Some((meta.location, name))
        };
        Ok(listed.into_iter().filter_map(own).collect())
    }

    pub(super) async fn pin(&self, job: &Job) -> Result<()> {
        self.put(PLAN, serde_json::to_vec(job).map_err(Error::internal)?).await
    }

    /// The plan; `None`: nobody waits any more.
    pub(super) async fn job(&self) -> Result<Option<Job>> {
        self.get(PLAN).await
    }

    /// Pieces that ended.
    pub(super) async fn told(&self) -> Result<BTreeSet<usize>> {
        let number = |(_, name): &(Path, String)| name.strip_suffix(".json")?.parse().ok();
        Ok(self.objects().await?.iter().filter_map(number).collect())
    }

    pub(super) async fn has(&self, number: usize) -> Result<bool> {
        self.exists(&format!("{number}.json")).await
    }

    async fn exists(&self, name: &str) -> Result<bool> {
        match self.store.head(&self.path(name)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(foreign(format!("look for {}-{name}", self.plan), &error)),
        }
    }

    pub(super) async fn outcome(&self, number: usize) -> Result<Outcome> {
        let found = self.get(&format!("{number}.json")).await?;
        found.ok_or_else(|| Error::internal(format!("what piece {number} made is gone")))
    }

    /// Tells how a piece ended, unless that was told already: one of two that did it counts.
    pub(super) async fn tell(&self, number: usize, outcome: &Outcome) -> Result<()> {
        let body = serde_json::to_vec(outcome).map_err(Error::internal)?;
        self.put(&format!("{number}.json"), body).await
    }

    async fn put(&self, name: &str, body: Vec<u8>) -> Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let put = self.store.put_opts(&self.path(name), PutPayload::from(body), options).await;
        match put {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(foreign(format!("write {}-{name}", self.plan), &error)),
        }
    }

    async fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let doing = || format!("read {}-{name}", self.plan);
        let body = match self.store.get(&self.path(name)).await {
            Ok(found) => found.bytes().await.map_err(|e| foreign(doing(), &e))?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(foreign(doing(), &error)),
        };
        serde_json::from_slice(&body)
            .map(Some)
            .map_err(|e| Error::new(Code::MessageUnknown, format!("{}: {e}", doing())))
    }

    /// Keeps rows that a piece refused. Returns their place.
    pub(super) async fn keep(&self, rows: Spool) -> Result<Option<String>> {
        if rows.rows() == 0 {
            return Ok(None);
        }
        let name = format!("{}.arrow", Uuid::new_v4());
        posted::post(&rows.finish()?, &self.store, &self.path(&name)).await?;
        Ok(Some(name))
    }

    /// Adds rows that a piece kept.
    pub(super) async fn add_kept(&self, name: &str, rows: &mut Spool) -> Result<()> {
        posted::collect(&self.store, &self.path(name), rows).await
    }

    /// Deletes all of it, the plan first.
    pub(super) async fn clear(&self) -> Result<()> {
        let deleted = self.store.delete(&self.path(PLAN)).await;
        deleted.map_err(|e| foreign(format!("delete {}", self.plan), &e))?;
        self.clear_rest().await
    }

    /// Deletes what was told too late: somebody who waited is gone.
    pub(super) async fn clear_if_over(&self) -> Result<()> {
        if self.exists(PLAN).await? { Ok(()) } else { self.clear_rest().await }
    }

    async fn clear_rest(&self) -> Result<()> {
        let paths = self.objects().await?.into_iter().map(|(path, _)| Ok(path));
        let paths = futures::stream::iter(paths.collect::<Vec<_>>()).boxed();
        let deleted = self.store.delete_stream(paths).try_collect::<Vec<_>>().await;
        match deleted {
            // By two at once.
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(foreign(format!("delete {}", self.plan), &error)),
        }
    }

    /// Deletes what is older than any step that could still commit it.
    pub(super) async fn clear_old(pipeline: &Pipeline) -> Result<u64> {
        let doing = || format!("delete old pieces of {}", pipeline.id);
        let store = object_store_at(&pipeline.state)?;
        let oldest = chrono::Utc::now() - pipeline.sizes.vacuum_retention;
        let all = store.list(Some(&Path::from(format!("{SHARDS}/{}", pipeline.id))));
        let listed: Vec<_> = all.try_collect().await.map_err(|e| foreign(doing(), &e))?;
        let old = listed.into_iter().filter(|meta| meta.last_modified < oldest);
        let old: Vec<_> = old.map(|meta| Ok(meta.location)).collect();
        let deleted = store.delete_stream(futures::stream::iter(old).boxed());
        let deleted = deleted.try_collect::<Vec<_>>().await.map_err(|e| foreign(doing(), &e))?;
        Ok(deleted.len() as u64)
    }
}
