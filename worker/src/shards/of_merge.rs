//! A merge in pieces: each looks for the epochs' keys in some of main's files, and writes some of the rows that
//! come: those between two places in the order of their keys.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::task::Task;
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::write::Written;
use alluvium_table::{Add, LiveFile, Table};
use serde::{Deserialize, Serialize};

use super::{Product, Shared, pieces_of};
use crate::edit::{Edit, Editing, Gone, Winners};
use crate::folding::Fold;
use crate::search::Search;
use crate::sorted::LastRows;
use crate::tables::Tables;
use crate::winners::Rule;
use crate::{Permit, Workshop, raw};

/// Some of main's files each, and a share of the rows.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    main_version: i64,
    raw_version: i64,
    epochs: BTreeSet<Epoch>,
    /// Rows of the epochs in raw: no fewer than there are keys.
    rows: u64,
    /// Paths of main's files.
    pub(crate) parts: Vec<Vec<String>>,
}

/// What a piece does to main, beside its new files.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Findings {
    /// Raw's files were not in the order of their keys, and nothing was done.
    is_unsorted: bool,
    keys: u64,
    upserts: u64,
    hits: u64,
    updated: u64,
    marked: Vec<Add>,
    /// Files that go, with their rows.
    gone: Vec<(String, u64)>,
}

impl Job {
    /// The pieces of a merge of these files of raw; `None`: it is too small for them, or needs to see all
    /// that goes beside all that comes.
    pub(crate) async fn of(fold: &Fold<'_>, changed: &[LiveFile]) -> Result<Option<Self>> {
        let Fold { pipeline, main, raw, is_fast, .. } = *fold;
        let content = &pipeline.content;
        let bytes = changed.iter().map(|file| file.size).sum();
        let pieces = pieces_of(bytes, pipeline);
        let is_plain = is_fast && content.mode == Mode::Upsert && !content.skip_unchanged;
        if pieces < 2 || !is_plain || main.tells_changes() {
            return Ok(None);
        }
        let mut live = main.files().await?;
        live.sort_by(|one, other| {
            other.size.cmp(&one.size).then_with(|| one.path.cmp(&other.path))
        });
        let mut parts = vec![Vec::new(); pieces];
        // Dealt out there and back: about as much for each.
        for (at, file) in live.into_iter().enumerate() {
            let (round, place) = (at / pieces, at % pieces);
            let part = if round % 2 == 0 { place } else { pieces - 1 - place };
            parts[part].push(file.path);
        }
        Ok(Some(Self {
            main_version: main.version(),
            raw_version: raw.version(),
            epochs: fold.changed.clone(),
            rows: changed.iter().filter_map(|file| file.rows).sum(),
            parts,
        }))
    }

    /// Which rows a piece writes, counted in the order of their keys.
    fn share(&self, number: usize) -> Range<u64> {
        let pieces = self.parts.len() as u64;
        let place = |number: u64| {
            let place = u128::from(self.rows) * u128::from(number) / u128::from(pieces);
            u64::try_from(place).unwrap_or(u64::MAX)
        };
        let next = number as u64 + 1;
        place(next - 1)..if next == pieces { u64::MAX } else { place(next) }
    }

    pub(super) async fn carry_out(
        &self,
        tables: &Tables,
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let main = &tables.at(&pipeline.main, self.main_version).await?;
        let raw = tables.at(&pipeline.raw, self.raw_version).await?;
        let rule = &Rule::new(pipeline, &raw);
        let changes = raw::files_of(&raw, &self.epochs).await?;
        let part: HashSet<&String> = self.parts[number].iter().collect();
        let mut live = main.files().await?;
        live.retain(|file| part.contains(&file.path));
        let rows = usize::try_from(self.rows).unwrap_or(0);
        let mut search = Search::new(main, rule, pipeline, live, permit, rows)?;
        let share = self.share(number);
        let mut edit = Edit::default();
        let last = LastRows::find(&raw, rule, &changes, share, &mut search, permit).await?;
        let is_unsorted = last.is_none();
        if let Some(last) = last {
            let editing = Editing { main, rule, pipeline, permit };
            editing.carry_out(&mut edit, Winners::InRaw(Arc::new(last)), search).await?;
        }
        let of_merge = Some(Findings {
            is_unsorted,
            keys: edit.keys,
            upserts: edit.upserts,
            hits: edit.hits,
            updated: edit.updated,
            marked: edit.marked,
            gone: edit.gone.into_iter().map(|gone| (gone.file.path, gone.rows)).collect(),
        });
        Ok(Product { of_merge, ..Product::of(edit.written) })
    }
}

/// Has the pieces done. `None`: they cannot be, as raw's files are in another order.
pub(crate) async fn in_pieces(
    workshop: &Workshop,
    task: &Task,
    (job, main): (Job, &Table),
    permit: &Permit,
) -> Result<Option<Edit>> {
    let shared = Shared::begin(workshop, task, super::Job::Merge(job), permit).await?;
    let products = shared.gather(true).await;
    shared.end().await;
    let live = main.files().await?;
    let mut edit = Edit::default();
    edit.rows_before = live.iter().map(LiveFile::live_rows).sum();
    let live: HashMap<String, LiveFile> =
        live.into_iter().map(|file| (file.path.clone(), file)).collect();
    for product in products?.into_iter().flatten() {
        let found = product.of_merge.ok_or_else(|| Error::internal("a piece of another step"))?;
        if found.is_unsorted {
            return Ok(None);
        }
        edit.keys += found.keys;
        edit.upserts += found.upserts;
        edit.hits += found.hits;
        edit.updated += found.updated;
        edit.marked.extend(found.marked);
        for (path, rows) in found.gone {
            let file = live.get(&path).ok_or_else(|| Error::internal("a file of no snapshot"))?;
            edit.gone.push(Gone { file: file.clone(), rows });
        }
        let Written { adds, rows } = &mut edit.written;
        adds.extend(product.adds);
        *rows += product.rows;
    }
    Ok(Some(edit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_rows_once() {
        for (rows, pieces) in [(0, 2), (1, 3), (10, 3), (1 << 40, 64)] {
            let parts = vec![Vec::new(); pieces];
            let epochs = BTreeSet::new();
            let job = Job { main_version: 0, raw_version: 0, epochs, rows, parts };
            let shares: Vec<Range<u64>> = (0..pieces).map(|number| job.share(number)).collect();
            assert_eq!((shares[0].start, shares[pieces - 1].end), (0, u64::MAX));
            assert!(shares.windows(2).all(|two| two[0].end == two[1].start));
        }
    }
}
