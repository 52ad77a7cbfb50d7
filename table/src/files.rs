//! The live data files of a snapshot, read from the log when somebody asks.

use std::collections::{BTreeSet, HashMap};

use alluvium_protocol::Result;
use deltalake::kernel::Remove;
use futures::TryStreamExt;

use crate::classify::foreign;
use crate::{Table, scan};

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
}

impl LiveFile {
    /// Rows that readers see: without those a deletion vector marks.
    pub fn live_rows(&self) -> Option<u64> {
        let deleted = self.remove.deletion_vector.as_ref().map_or(0, |dv| dv.cardinality);
        Some(self.rows?.saturating_sub(u64::try_from(deleted).unwrap_or(0)))
    }
}

impl Table {
    /// All live data files. The log is replayed: the newest checkpoint and the commits above it.
    pub async fn files(&self) -> Result<Vec<LiveFile>> {
        self.files_where(|_| true).await
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
            });
        }
        Ok(files)
    }

    /// The file is one of these URLs, as scans with a file column tell them.
    pub fn is_file_url(&self, file: &LiveFile, urls: &BTreeSet<String>) -> bool {
        let root = self.log_store.root_url();
        [file.path.clone(), scan::encoded(&file.path)].iter().any(|path| {
            urls.contains(path) || root.join(path).is_ok_and(|url| urls.contains(url.as_str()))
        })
    }
}
