//! A search of main in pieces, for rows that were chosen and written before: each piece looks for all of the keys in some of
//! main's files, and takes the rows that go out of them.

use std::collections::{HashMap, HashSet};

use alluvium_protocol::task::Task;
use alluvium_protocol::{Error, Pipeline, Result, crash};
use alluvium_table::write::Written;
use alluvium_table::{Add, LiveFile};
use serde::{Deserialize, Serialize};

use super::of_merge::Snapshots;
use super::{Board, Product, Shared};
use crate::checks::agree;
use crate::edit::{Edit, Editing, Gone};
use crate::search::Search;
use crate::sorted::{LastRows, Share};
use crate::tables::Tables;
use crate::winners::Rule;
use crate::{Permit, Workshop};

/// What is to be searched.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    of: Snapshots,
    /// The rows that were chosen are in so many notes, a [`Share`] each.
    shares: usize,
    /// Paths of main's files.
    pub(super) parts: Vec<Vec<String>>,
}

/// What a piece does to main, beside its new files.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Findings {
    keys: u64,
    hits: u64,
    updated: u64,
    marked: Vec<Add>,
    /// Files that go, with their rows.
    gone: Vec<(String, u64)>,
}

impl Job {
    /// The search of these files of main for keys that are in these files of raw.
    pub(super) fn of(
        of: Snapshots,
        mut live: Vec<LiveFile>,
        changed: &[LiveFile],
        pipeline: &Pipeline,
    ) -> Self {
        let of_all = |files: &[LiveFile]| files.iter().map(|file| file.size).sum::<u64>();
        // To read all keys of the epochs once more pays where as much of main is left to others.
        let of_each = of_all(changed).max(pipeline.sizes.shard_bytes).max(1);
        let parts = usize::try_from(of_all(&live) / of_each).unwrap_or(super::PIECES_MAX);
        let count = parts.clamp(1, super::PIECES_MAX).min(live.len());
        live.sort_by(|one, other| {
            other.size.cmp(&one.size).then_with(|| one.path.cmp(&other.path))
        });
        let mut parts = vec![Vec::new(); count];
        // Dealt out there and back: about as much for each.
        for (at, file) in live.into_iter().enumerate() {
            let (round, place) = (at / count, at % count);
            let part = if round % 2 == 0 { place } else { count - 1 - place };
            parts[part].push(file.path);
        }
        Self { of, shares: 0, parts }
    }

    pub(super) async fn carry_out(
        &self,
        (tables, board): (&Tables, &Board),
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let (main, raw, changes) = &self.of.open(tables, pipeline).await?;
        let rule = &Rule::new(pipeline, raw);
        let part: HashSet<&String> = self.parts[number].iter().collect();
        let mut live = main.files().await?;
        live.retain(|file| part.contains(&file.path));
        let mut search = Search::new(main, rule, pipeline, live, permit, 0)?;
        let shares: Vec<Share> = board.notes(0..self.shares).await?;
        let chosen = LastRows::of_shares(raw, rule, changes, shares)?;
        chosen.search_for(&mut search, permit).await?;
        let mut edit = Edit::default();
        edit.take(search.finish().await?);
        // They were written before.
        edit.upserts = 0;
        Editing { main, rule, pipeline, permit }.take_out(&mut edit).await?;
        let of_search = Some(Findings {
            keys: edit.keys,
            hits: edit.hits,
            updated: edit.updated,
            marked: edit.marked,
            gone: edit.gone.into_iter().map(|gone| (gone.file.path, gone.rows)).collect(),
        });
        Ok(Product { of_search, ..Product::of(edit.written) })
    }
}

/// Has the rows taken out that go by these shares of rows. Returns how many pieces that were.
pub(super) async fn in_pieces(
    (workshop, task): (&Workshop, &Task),
    (mut job, shares): (Job, Vec<Share>),
    live: Vec<LiveFile>,
    edit: &mut Edit,
    permit: &Permit,
) -> Result<u64> {
    if job.parts.is_empty() {
        return Ok(0);
    }
    job.shares = shares.len();
    let mut shared = Shared::lay_out(workshop, task, super::Job::Search(job), permit).await?;
    let gathered = async {
        for share in &shares {
            shared.note(share).await?;
            crash::point("shard.after_note")?;
        }
        shared.ask_all().await;
        shared.gather().await
    };
    let gathered = gathered.await;
    shared.end().await;
    let live: HashMap<String, LiveFile> =
        live.into_iter().map(|file| (file.path.clone(), file)).collect();
    let mut pieces = 0;
    for product in gathered?.into_iter().flatten() {
        let found = product.of_search.ok_or_else(|| Error::internal("a piece of another step"))?;
        agree("merge", "keys that were looked for", edit.keys, found.keys, &task.pipeline.main)?;
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
        pieces += 1;
    }
    Ok(pieces)
}
