//! The live data files of a snapshot, read from the log when somebody asks.

use std::collections::HashMap;
use std::path::PathBuf;

use alluvium_protocol::Result;
use deltalake::kernel::{Add, Remove};
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, path::Path};
use serde_json::Value;

use crate::Table;
use crate::classify::foreign;
use crate::store::{Place, place_of};

/// Files looked for at a time.
const LOOKS_AT_ONCE: usize = 16;

/// A live data file.
#[derive(Clone, Debug)]
pub struct LiveFile {
    /// Path as the log spells it, decoded.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Rows, where the statistics tell.
    pub rows: Option<u64>,
    /// Value by partition column.
    pub partition: HashMap<String, Option<String>>,
    /// The action that removes it.
    pub remove: Remove,
    /// The statistics, as the log has them (JSON).
    pub stats: Option<String>,
    /// When it was written, milliseconds since 1970.
    pub modified: i64,
}

impl LiveFile {
    /// The file that an action names.
    pub fn of(add: &Add) -> Self {
        let stats = add.stats.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok());
        Self {
            path: add.path.clone(),
            size: u64::try_from(add.size).unwrap_or(0),
            rows: stats.and_then(|stats| stats["numRecords"].as_u64()),
            partition: add.partition_values.clone(),
            remove: Remove {
                path: add.path.clone(),
                data_change: true,
                deletion_timestamp: None,
                extended_file_metadata: Some(true),
                partition_values: Some(add.partition_values.clone()),
                size: Some(add.size),
                deletion_vector: add.deletion_vector.clone(),
                tags: None,
                base_row_id: None,
                default_row_commit_version: None,
            },
            stats: add.stats.clone(),
            modified: add.modification_time,
        }
    }

    /// Rows that readers see: without those a deletion vector marks.
    pub fn live_rows(&self) -> Option<u64> {
        let deleted = self.remove.deletion_vector.as_ref().map_or(0, |dv| dv.cardinality);
        Some(self.rows?.saturating_sub(u64::try_from(deleted).unwrap_or(0)))
    }
}

impl LiveFile {
    /// The path has no letters that a URL writes in another way.
    pub fn has_plain_path(&self) -> bool {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "_-=./".contains(letter);
        self.path.chars().all(is_plain)
    }
}

impl Table {
    /// Where a data file is on this machine, to be read page by page; `None`: it is fetched.
    pub(crate) fn local_path(&self, file: &LiveFile) -> Result<Option<PathBuf>> {
        let Place::Local(root) = place_of(&self.uri)? else { return Ok(None) };
        Ok(file.has_plain_path().then(|| root.join(&file.path)))
    }
}

/// Where a file is that the log names: its path is the object's already, `%` and all.
pub(crate) fn path_of(path: &str) -> Path {
    Path::parse(path).unwrap_or_else(|_| Path::from(path))
}

impl Table {
    /// All live data files. The log is replayed: the newest checkpoint and the commits above it.
    pub async fn files(&self) -> Result<Vec<LiveFile>> {
        self.files_where(|_| true).await
    }

    /// The actions that made the live files, by path: what a restore adds again.
    pub async fn adds(&self) -> Result<HashMap<String, Add>> {
        let doing = || format!("list the files of {}", self.uri);
        let is_partitioned = !self.snapshot.metadata().partition_columns().is_empty();
        let mut views = self.snapshot.file_views(self.log_store.as_ref(), None);
        let mut adds = HashMap::new();
        while let Some(view) = views.try_next().await.map_err(|e| foreign(doing(), &e))? {
            let add = Add {
                path: view.path().to_string(),
                partition_values: if is_partitioned {
                    view.partition_values_map()
                } else {
                    HashMap::new()
                },
                size: view.size(),
                modification_time: view.modification_time(),
                data_change: true,
                stats: view.stats(),
                tags: None,
                deletion_vector: view.deletion_vector_descriptor(),
                base_row_id: None,
                default_row_commit_version: None,
                clustering_provider: None,
            };
            adds.insert(add.path.clone(), add);
        }
        Ok(adds)
    }

    /// Rows of these files by their own footers: what storage holds, whatever the log says.
    pub async fn rows_in_files(&self, adds: &[Add]) -> Result<u64> {
        let mut reading = Vec::with_capacity(adds.len());
        for add in adds {
            let size = u64::try_from(add.size).unwrap_or(0);
            let footer = async move {
                let footer = self.read_footer(&add.path, size).await?;
                Ok(u64::try_from(footer.file_metadata().num_rows()).unwrap_or(0))
            };
            reading.push(footer.boxed());
        }
        let counts = futures::stream::iter(reading).buffered(LOOKS_AT_ONCE);
        counts.try_fold(0, |sum, rows| async move { Ok(sum + rows) }).await
    }

    /// Those of these files, by their path below the table, that storage no longer holds.
    pub async fn missing_files(&self, paths: Vec<String>) -> Result<Vec<String>> {
        let store = self.store();
        let mut looks = Vec::with_capacity(paths.len());
        for path in paths {
            let store = std::sync::Arc::clone(&store);
            let look = async move {
                let at = path_of(&path);
                match store.head(&at).await {
                    Ok(_) => Ok(None),
                    Err(object_store::Error::NotFound { .. }) => Ok(Some(path)),
                    Err(error) => Err(foreign(format!("look for {path}"), &error)),
                }
            };
            looks.push(look.boxed());
        }
        let found = futures::stream::iter(looks).buffered(LOOKS_AT_ONCE);
        found.try_filter_map(|missing| async move { Ok(missing) }).try_collect().await
    }

    /// The live files whose partition values pass.
    pub async fn files_where(
        &self,
        mut keep: impl FnMut(&HashMap<String, Option<String>>) -> bool,
    ) -> Result<Vec<LiveFile>> {
        let doing = || format!("list the files of {}", self.uri);
        let is_partitioned = !self.snapshot.metadata().partition_columns().is_empty();
        let mut views = self.snapshot.file_views(self.log_store.as_ref(), None);
        let mut files = Vec::new();
        while let Some(view) = views.try_next().await.map_err(|e| foreign(doing(), &e))? {
            let partition =
                if is_partitioned { view.partition_values_map() } else { HashMap::new() };
            if !keep(&partition) {
                continue;
            }
            let remove = view.remove_action(true);
            files.push(LiveFile {
                path: remove.path.clone(),
                size: u64::try_from(view.size()).unwrap_or(0),
                rows: view.num_records().map(|rows| rows as u64),
                partition,
                remove,
                stats: view.stats(),
                modified: view.modification_time(),
            });
        }
        Ok(files)
    }
}
