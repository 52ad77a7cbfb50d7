//! The tables this process works on: opened once, brought forward at each use.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::{Table, TableSpec};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Snapshots by URI, and a commit turn per table.
#[derive(Default)]
pub struct Tables {
    snapshots: Mutex<HashMap<String, Table>>,
    turns: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

impl Tables {
    /// The newest snapshot, if the table exists.
    pub async fn open(&self, uri: &str) -> Result<Option<Table>> {
        let known = self.lock().get(uri).cloned();
        let table = match known {
            Some(mut table) => match table.refresh().await {
                Ok(()) => Some(table),
                // Deleted, or replaced by another table: look from scratch.
                Err(_) => Table::open(uri).await?,
            },
            None => Table::open(uri).await?,
        };
        match &table {
            Some(table) => self.remember(table),
            None => drop(self.lock().remove(uri)),
        }
        Ok(table)
    }

    /// The snapshot of this version, which somebody works on.
    ///
    /// # Errors
    /// `TableUnreadable`, among others: it is gone.
    pub async fn at(&self, uri: &str, version: i64) -> Result<Table> {
        match self.open(uri).await? {
            Some(newest) if newest.version() == version => return Ok(newest),
            _ => {}
        }
        let at = u64::try_from(version).map_err(Error::internal)?;
        let text = || format!("version {version} of {uri} is gone");
        Table::open_at(uri, Some(at))
            .await?
            .ok_or_else(|| Error::new(Code::TableUnreadable, text()))
    }

    /// The newest snapshot; the table is created when it does not exist.
    pub async fn open_or_create(
        &self,
        uri: &str,
        spec: impl FnOnce() -> TableSpec,
    ) -> Result<Table> {
        if let Some(table) = self.open(uri).await? {
            return Ok(table);
        }
        let table = Table::create_or_open(uri, &spec()).await?;
        self.remember(&table);
        Ok(table)
    }

    /// The newest snapshot that this process knows, without asking storage. Whoever holds the
    /// table's turn finds what the last holder committed.
    pub fn known(&self, uri: &str) -> Option<Table> {
        self.lock().get(uri).cloned()
    }

    /// Keeps a snapshot for the next use.
    pub fn remember(&self, table: &Table) {
        let mut snapshots = self.lock();
        let is_newer =
            snapshots.get(table.uri()).is_none_or(|known| known.version() <= table.version());
        if is_newer {
            snapshots.insert(table.uri().to_owned(), table.clone());
        }
    }

    /// Waits for this process's turn to commit to a table. It saves lost races between slots of one
    /// process and proves nothing: commits are compare-and-swap with or without it.
    pub async fn turn(&self, uri: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(uri.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Table>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The table was made, or adopted, by a pipeline.
pub fn is_ours(table: &Table) -> bool {
    table.properties().contains_key("alluvium.pipeline")
}
