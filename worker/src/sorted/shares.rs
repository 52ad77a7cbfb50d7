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

use super::{Chosen, KEPT_PART, LastRows, RUNS_AT_ONCE, Walk};
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

/// Deals out the last rows of files in shares, about as many rows of the files for each.
pub(crate) struct Dealer {
    found: LastRows,
    walk: Walk,
    /// What is to be dealt out next, and from where on.
    chosen: Option<(Chosen, usize)>,
    /// Rows of a share; how many were passed over when it ends.
    of_each: u64,
    end: u64,
    /// Shares to come.
    left: usize,
}

impl Dealer {
    /// One of so many shares at most. `None`: as for [`Walk::begin`].
    pub(crate) async fn begin(
        raw: &Table,
        rule: &Rule,
        (files, memory_bytes): (&[LiveFile], usize),
        shares_max: usize,
    ) -> Result<Option<Self>> {
        // What decides is read again by who searches.
        let found = LastRows::none(&raw.keeping(memory_bytes / KEPT_PART), rule, files)?;
        let Some(walk) = Walk::begin(&found, files, memory_bytes).await? else { return Ok(None) };
        let of_each = walk.of.div_ceil(shares_max as u64).max(1);
        Ok(Some(Self { found, walk, chosen: None, of_each, end: of_each, left: shares_max }))
    }

    /// The next share; `None`: there is no more, or a file was not in order.
    pub(crate) async fn next(&mut self, permit: &Permit) -> Result<Option<Share>> {
        while self.left > 0 {
            let Some((chosen, next)) = &mut self.chosen else {
                self.chosen = self.walk.next(permit).await?.map(|chosen| (chosen, 0));
                if self.chosen.is_none() {
                    self.left = 0;
                    let is_some = self.found.keys > 0 && self.is_sorted();
                    return is_some.then(|| self.found.take()).transpose();
                }
                continue;
            };
            while let Some((place, passed)) = chosen.places.get(*next) {
                if *passed >= self.end && self.left > 1 && self.found.keys > 0 {
                    self.left -= 1;
                    self.end = *passed + self.of_each;
                    return self.found.take().map(Some);
                }
                self.found.insert(&self.walk.runs, place, chosen.comes.value(*next))?;
                *next += 1;
            }
            self.chosen = None;
        }
        Ok(None)
    }

    /// The last share is dealt out.
    pub(crate) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The table with what was fetched of it.
    pub(crate) fn into_table(self) -> Table {
        self.found.raw.keep_no_more();
        self.found.raw
    }

    /// So far the files were in the order of their keys.
    pub(crate) fn is_sorted(&self) -> bool {
        self.walk.is_sorted()
    }
}

impl LastRows {
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
