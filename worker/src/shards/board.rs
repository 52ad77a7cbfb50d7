//! Where a step's pieces are laid out and what came of them is told: objects below the state folder, whose
//! names begin with the plan's.

use std::collections::BTreeSet;
use std::ops::Range;

use alluvium_protocol::task::Task;
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
/// There once no piece is to be begun any more.
const CLOSED: &str = "closed";
/// Objects written, read or deleted at a time.
const AT_ONCE: usize = 16;

/// How a piece ended.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Done(Box<Product>),
    Failed(Error),
    /// So many workers died at it.
    Deadly(u32),
}

/// The objects of one plan.
pub(crate) struct Board {
    store: StoreRef,
    /// Where the plans of the pipeline are.
    folder: Path,
    /// `shards/<pipeline>/<step's task>-<id>`
    plan: String,
    /// What the names of its objects begin with.
    prefix: String,
    /// The notes, where it was laid out here.
    own_notes: Vec<Vec<u8>>,
}

/// How long a UUID is as text.
const UUID_LENGTH: usize = 36;

impl Board {
    /// A new one, for this step.
    pub(super) fn new(task: &Task) -> Result<Self> {
        let pipeline = &task.pipeline;
        Self::at(pipeline, &format!("{SHARDS}/{}/{}-{}", pipeline.id, task.id, Uuid::new_v4()))
    }

    /// The one with this plan, if it is one of the pipeline's.
    pub(super) fn at(pipeline: &Pipeline, plan: &str) -> Result<Self> {
        let folder = format!("{SHARDS}/{}", pipeline.id);
        let name = plan.strip_prefix(&folder).and_then(|rest| rest.strip_prefix('/'));
        let is_plan = |name: &&str| {
            let (task, id) = name.split_at_checked(UUID_LENGTH).unwrap_or_default();
            [Some(task), id.strip_prefix('-')]
                .iter()
                .all(|part| part.is_some_and(|id| Uuid::parse_str(id).is_ok()))
        };
        let Some(name) = name.filter(is_plan) else {
            let text = format!("{plan:?} is no plan of {}", pipeline.id);
            return Err(Error::new(Code::MessageUnknown, text));
        };
        let (store, prefix) = (object_store_at(&pipeline.state)?, format!("{name}-"));
        let (folder, plan) = (Path::from(folder), plan.to_owned());
        Ok(Self { store, folder, plan, prefix, own_notes: Vec::new() })
    }

    pub(super) fn plan(&self) -> &str {
        &self.plan
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}-{name}", self.plan))
    }

    /// The paths of objects whose names begin with `prefix`, and what follows it there.
    async fn objects(&self, prefix: &str) -> Result<Vec<(Path, String)>> {
        let listed: Vec<_> = self
            .store
            .list(Some(&self.folder))
            .try_collect()
            .await
            .map_err(|e| foreign(format!("list {}", self.folder), &e))?;
        let own = |meta: ObjectMeta| {
            let name = meta.location.filename()?.strip_prefix(prefix)?.to_owned();
            Some((meta.location, name))
        };
        Ok(listed.into_iter().filter_map(own).collect())
    }

    /// Lays out a plan.
    pub(super) async fn pin(&self, job: &Job) -> Result<()> {
        self.put(PLAN, serde_json::to_vec(job).map_err(Error::internal)?).await
    }

    /// Puts the next note beside it, for a piece that needs one.
    pub(super) async fn note(&mut self, note: &impl Serialize) -> Result<()> {
        let note = serde_json::to_vec(note).map_err(Error::internal)?;
        self.put(&format!("{}.note", self.own_notes.len()), note.clone()).await?;
        self.own_notes.push(note);
        Ok(())
    }

    /// These notes.
    pub(super) async fn notes<T: DeserializeOwned>(&self, of: Range<usize>) -> Result<Vec<T>> {
        if let Some(own) = self.own_notes.get(of.clone()).filter(|own| !own.is_empty()) {
            let read = |note: &Vec<u8>| serde_json::from_slice(note).map_err(Error::internal);
            return own.iter().map(read).collect();
        }
        let gets = of.map(|number| async move {
            let note = self.get(&format!("{number}.note")).await?;
            // Whoever waited for the piece is gone.
            note.ok_or_else(|| Error::new(Code::LeaseLost, "nobody waits for this piece any more"))
        });
        futures::stream::iter(gets).buffered(AT_ONCE).try_collect().await
    }

    /// No piece is to be begun from now on.
    pub(super) async fn close(&self) -> Result<()> {
        self.put(CLOSED, Vec::new()).await
    }

    pub(super) async fn is_closed(&self) -> Result<bool> {
        self.exists(CLOSED).await
    }

    /// The plan; `None`: nobody waits any more.
    pub(super) async fn job(&self) -> Result<Option<Job>> {
        self.get(PLAN).await
    }

    /// Pieces that ended.
    pub(super) async fn told(&self) -> Result<BTreeSet<usize>> {
        let number = |(_, name): &(Path, String)| name.strip_suffix(".json")?.parse().ok();
        Ok(self.objects(&self.prefix).await?.iter().filter_map(number).collect())
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

    /// `None`: it is gone. Somebody else has the step now.
    pub(super) async fn outcome(&self, number: usize) -> Result<Option<Outcome>> {
        self.get(&format!("{number}.json")).await
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
        match posted::collect(&self.store, &self.path(name), rows).await {
            Err(_) if !self.exists(PLAN).await? => {
                Err(Error::new(Code::LeaseLost, "another worker has the step now"))
            }
            added => added,
        }
    }

    /// Deletes all of it, the plan first.
    pub(super) async fn clear(&self) -> Result<()> {
        self.delete(vec![self.path(PLAN)]).await?;
        self.clear_rest().await
    }

    /// Deletes what was told too late: somebody who waited is gone.
    pub(super) async fn clear_if_over(&self) -> Result<()> {
        if self.exists(PLAN).await? { Ok(()) } else { self.clear_rest().await }
    }

    async fn clear_rest(&self) -> Result<()> {
        let objects = self.objects(&self.prefix).await?;
        self.delete(objects.into_iter().map(|(path, _)| path).collect()).await
    }

    /// Deletes other plans of the same step.
    pub(super) async fn clear_others(&self) -> Result<()> {
        let of_step = &self.prefix[..=UUID_LENGTH];
        let objects = self.objects(of_step).await?.into_iter();
        let own = &self.prefix[of_step.len()..];
        let others = objects.filter(|(_, name)| !name.starts_with(own));
        self.delete(others.map(|(path, _)| path).collect()).await
    }

    async fn delete(&self, paths: Vec<Path>) -> Result<()> {
        delete(&self.store, paths).await.map(drop)
    }

    /// Deletes what is older than any step that could still commit it. Returns how many objects.
    pub(super) async fn clear_old(pipeline: &Pipeline) -> Result<u64> {
        let store = object_store_at(&pipeline.state)?;
        let oldest = chrono::Utc::now() - pipeline.sizes.vacuum_retention;
        let folder = Path::from(format!("{SHARDS}/{}", pipeline.id));
        let listed: Vec<_> = store
            .list(Some(&folder))
            .try_collect()
            .await
            .map_err(|e| foreign(format!("list {folder}"), &e))?;
        let old = listed.into_iter().filter(|meta| meta.last_modified < oldest);
        delete(&store, old.map(|meta| meta.location).collect()).await
    }
}

/// Deletes objects. Returns how many were there: others may do the same.
async fn delete(store: &StoreRef, paths: Vec<Path>) -> Result<u64> {
    let paths = futures::stream::iter(paths.into_iter().map(Ok)).boxed();
    let mut deleting = store.delete_stream(paths);
    let mut deleted = 0;
    while let Some(object) = deleting.next().await {
        match object {
            Ok(_) => deleted += 1,
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(foreign("delete old pieces of a step", &error)),
        }
    }
    Ok(deleted)
}
