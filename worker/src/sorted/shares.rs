//! Rows as processes tell each other which they are.

use std::collections::HashMap;
use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::{Error, Result};
use alluvium_table::deletion::RowSet;
use alluvium_table::rows::Pick;
use alluvium_table::{LiveFile, Table};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as STANDARD;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::{LastRows, RUNS_AT_ONCE};
use crate::ground::columns_of;
use crate::search::{Search, comes};
use crate::winners::Rule;
use crate::{Permit, raw};

/// Rows of a file: a bitmap (<https://github.com/RoaringBitmap/RoaringFormatSpec>) in base 64.
pub(crate) fn text_of(rows: &RowSet) -> Result<String> {
    let mut rows = rows.clone();
    // Most follow one another.
    rows.optimize();
    let mut bytes = Vec::with_capacity(rows.serialized_size());
    rows.serialize_into(&mut bytes).map_err(Error::internal)?;
    Ok(STANDARD.encode(bytes))
}

/// The rows that such a text says.
pub(crate) fn rows_of(text: &str) -> Result<RowSet> {
    let bytes = STANDARD.decode(text).map_err(Error::internal)?;
    RowSet::deserialize_from(bytes.as_slice()).map_err(Error::internal)
}

/// The last rows of some keys.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct Share {
    pub(crate) keys: u64,
    pub(crate) upserts: u64,
    /// By the file's path, as [`text_of`] writes them.
    rows: Vec<(String, String)>,
}

impl LastRows {
    /// What to tell another process.
    pub(crate) fn to_share(&self) -> Result<Share> {
        let mut share = Share { keys: self.keys, upserts: self.upserts, rows: Vec::new() };
        for (file, rows) in self.runs.values().flatten().filter(|(_, rows)| !rows.is_empty()) {
            share.rows.push((file.path.clone(), text_of(rows)?));
        }
        Ok(share)
    }

    /// The rows of some shares, of these files.
    pub(crate) fn of_shares(
        raw: &Table,
        rule: &Rule,
        files: &[LiveFile],
        shares: Vec<Share>,
    ) -> Result<Self> {
        let mut all: HashMap<String, RowSet> = HashMap::new();
        let mut found = Self::none(raw, rule, files)?;
        for share in shares {
            found.keys += share.keys;
            found.upserts += share.upserts;
            for (path, rows) in share.rows {
                *all.entry(path).or_default() |= rows_of(&rows)?;
            }
        }
        for files in found.runs.values_mut() {
            files.retain_mut(|(file, rows)| {
                *rows = all.remove(&file.path).unwrap_or_default();
                !rows.is_empty()
            });
        }
        found.runs.retain(|_, files| !files.is_empty());
        match all.keys().next() {
            Some(path) => {
                Err(Error::internal(format!("{path} is in no partition of these epochs")))
            }
            None => Ok(found),
        }
    }

    /// Has the keys of these rows searched for.
    pub(crate) async fn search_for(&self, search: &mut Search<'_>, permit: &Permit) -> Result<()> {
        let names = [self.rule.key.clone(), vec![raw::OP.to_owned()]].concat();
        let columns = columns_of(&self.raw.schema(), &names)?;
        permit.begin("reads the keys of these epochs", Amount::rows(self.keys));
        let opening = self.runs.values().flatten().map(|(file, rows)| {
            let (raw, columns) = (self.raw.clone(), Arc::clone(&columns));
            let (file, pick) = (file.clone(), Pick::Only(rows.clone()));
            async move { raw.rows_of(&file, &columns, pick).await }
        });
        let opening: Vec<_> = opening.collect();
        let opened = futures::stream::iter(opening).buffer_unordered(RUNS_AT_ONCE);
        let mut rows = opened.try_flatten_unordered(RUNS_AT_ONCE);
        while let Some(batch) = rows.next().await {
            let batch = permit.counted(batch)?;
            search.add(&batch.columns()[..self.rule.key.len()], &comes(&batch)?).await?;
        }
        Ok(())
    }
}
