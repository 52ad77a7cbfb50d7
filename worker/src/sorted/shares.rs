//! The last rows in shares, which other processes are given: each follows the one before in the order of keys.

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

use super::{LastRows, RUNS_AT_ONCE, Walk};
use crate::ground::columns_of;
use crate::search::{Search, comes};
use crate::winners::Rule;
use crate::{Permit, raw};

/// Some of them, as processes tell each other.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct Share {
    pub(crate) keys: u64,
    pub(crate) upserts: u64,
    /// By the file's path: a bitmap of rows (<https://github.com/RoaringBitmap/RoaringFormatSpec>), in base 64.
    rows: Vec<(String, String)>,
}

impl LastRows {
    /// The last rows of these files in so many shares at most, about as many rows in each, which follow one
    /// another in the order of keys.
    pub(crate) async fn in_shares(
        raw: &Table,
        rule: &Rule,
        (files, memory_bytes): (&[LiveFile], usize),
        shares_max: usize,
        permit: &Permit,
    ) -> Result<Option<Vec<Share>>> {
        let mut found = Self::none(raw, rule, files)?;
        let walk = Walk::begin(&found, files, memory_bytes).await?;
        let Some(mut walk) = walk else { return Ok(None) };
        // There are no more keys than rows.
        let of_each = walk.of.div_ceil(shares_max as u64).max(1);
        let mut shares = Vec::new();
        while let Some(chosen) = walk.next(permit).await? {
            for (at, place) in chosen.places.iter().enumerate() {
                if found.keys >= of_each && shares.len() + 1 < shares_max {
                    shares.push(found.take()?);
                }
                found.insert(&walk.runs, place, chosen.comes.value(at))?;
            }
        }
        shares.push(found.take()?);
        Ok(walk.is_sorted().then_some(shares))
    }

    /// Takes out what was found so far.
    fn take(&mut self) -> Result<Share> {
        let (keys, upserts) = (std::mem::take(&mut self.keys), std::mem::take(&mut self.upserts));
        let mut share = Share { keys, upserts, rows: Vec::new() };
        for (file, rows) in self.runs.values_mut().flatten().filter(|(_, rows)| !rows.is_empty()) {
            let mut rows = std::mem::take(rows);
            // Most follow one another.
            rows.optimize();
            let mut bytes = Vec::with_capacity(rows.serialized_size());
            rows.serialize_into(&mut bytes).map_err(Error::internal)?;
            share.rows.push((file.path.clone(), STANDARD.encode(bytes)));
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
                let bytes = STANDARD.decode(rows).map_err(Error::internal)?;
                let rows = RowSet::deserialize_from(bytes.as_slice()).map_err(Error::internal)?;
                *all.entry(path).or_default() |= rows;
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
