//! A store that reads a commit of a Delta log once: commits never change, and every look at a table
//! goes through all of them since its last checkpoint.
//!
//! What was read is kept for a minute only: somebody may move a table away and build it anew in its
//! place.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

/// How long a commit is remembered.
const KEPT: Duration = Duration::from_secs(60);
/// All that is remembered, in bytes; the oldest go first.
const BYTES_MAX: usize = 32 << 20;
/// Digits of a commit's name.
const VERSION_DIGITS: usize = 20;

struct Commit {
    read_at: Instant,
    meta: ObjectMeta,
    body: Bytes,
}

#[derive(Default)]
struct Commits {
    by_path: HashMap<Path, Commit>,
    oldest_first: VecDeque<Path>,
    bytes: usize,
}

/// The same store, with a memory for commits.
pub(crate) struct LogCache {
    store: Arc<dyn ObjectStore>,
    commits: Mutex<Commits>,
}

impl LogCache {
    pub(crate) fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, commits: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Commits> {
        self.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recall(&self, location: &Path) -> Option<GetResult> {
        let commits = self.lock();
        let commit = commits.by_path.get(location).filter(|c| c.read_at.elapsed() < KEPT)?;
        Some(whole(commit.meta.clone(), commit.body.clone()))
    }

    fn remember(&self, meta: ObjectMeta, body: Bytes) {
        let mut commits = self.lock();
        let location = meta.location.clone();
        commits.bytes += body.len();
        let commit = Commit { read_at: Instant::now(), meta, body };
        match commits.by_path.insert(location.clone(), commit) {
            Some(before) => commits.bytes -= before.body.len(),
            None => commits.oldest_first.push_back(location),
        }
        while commits.bytes > BYTES_MAX {
            let Some(oldest) = commits.oldest_first.pop_front() else { break };
            if let Some(gone) = commits.by_path.remove(&oldest) {
                commits.bytes -= gone.body.len();
            }
        }
    }
}

/// `…/_delta_log/00000000000000000007.json`
fn is_commit(location: &Path) -> bool {
    let mut parts = location.as_ref().rsplit('/');
    let name = parts.next().unwrap_or_default();
    let is_version = name.strip_suffix(".json").is_some_and(|version| {
        version.len() == VERSION_DIGITS && version.bytes().all(|byte| byte.is_ascii_digit())
    });
    is_version && parts.next() == Some("_delta_log")
}

/// Nothing but the whole object is asked for.
fn is_plain(options: &GetOptions) -> bool {
    options.range.is_none()
        && options.if_match.is_none()
        && options.if_none_match.is_none()
        && options.if_modified_since.is_none()
        && options.if_unmodified_since.is_none()
        && options.version.is_none()
        && !options.head
}

fn whole(meta: ObjectMeta, body: Bytes) -> GetResult {
    let range = 0..meta.size;
    GetResult {
        payload: GetResultPayload::Stream(stream::once(async move { Ok(body) }).boxed()),
        meta,
        range,
        attributes: object_store::Attributes::default(),
    }
}

impl std::fmt::Debug for LogCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LogCache").field(&self.store).finish()
    }
}

impl std::fmt::Display for LogCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods, reason = "a forgotten method would lose what the store can")]
impl ObjectStore for LogCache {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.store.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if !is_commit(location) || !is_plain(&options) {
            return self.store.get_opts(location, options).await;
        }
        if let Some(found) = self.recall(location) {
            return Ok(found);
        }
        let found = self.store.get_opts(location, options).await?;
        let meta = found.meta.clone();
        let body = found.bytes().await?;
        self.remember(meta.clone(), body.clone());
        Ok(whole(meta, body))
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.store.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    #[tokio::test]
    async fn a_commit_is_read_once_and_other_objects_each_time() {
        let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let cache = LogCache::new(Arc::clone(&inner));
        for (name, is_kept) in [
            ("t/_delta_log/00000000000000000007.json", true),
            ("t/_delta_log/_last_checkpoint", false),
            ("t/00000000000000000007.json", false),
        ] {
            let at = Path::from(name);
            inner.put(&at, "first".into()).await.unwrap();
            let read = || async { cache.get(&at).await.unwrap().bytes().await.unwrap() };
            assert_eq!(read().await, "first");
            inner.put(&at, "second".into()).await.unwrap();
            assert_eq!(read().await, if is_kept { "first" } else { "second" }, "{name}");
        }
        assert!(cache.get(&Path::from("t/_delta_log/00000000000000000008.json")).await.is_err());
    }
}
