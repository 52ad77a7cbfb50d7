//! A merge in pieces. The step's worker chooses the last row of each key, in the order of keys, and deals them out:
//! each piece writes a share of these rows, and is begun while the next is dealt. The first pieces, which others are
//! asked for last, look for all of the keys in some of main's files each.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::task::Task;
use alluvium_protocol::{Epoch, Error, Pipeline, Result, crash};
use alluvium_table::write::Written;
use alluvium_table::{Add, LiveFile};
use serde::{Deserialize, Serialize};

use super::{Board, Product, Shared, pieces_of};
use crate::checks::agree;
use crate::edit::{Edit, Editing, Gone, Winners};
use crate::folding::Fold;
use crate::search::Search;
use crate::sorted::{Dealer, LastRows, Share};
use crate::tables::Tables;
use crate::winners::Rule;
use crate::{Permit, Workshop, raw};

/// What is to be searched, and written.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    main_version: i64,
    raw_version: i64,
    epochs: BTreeSet<Epoch>,
    /// At most; which rows are whose is in the notes, a [`Share`] each.
    shares: usize,
    /// Paths of main's files; each part is looked through for all keys, so that there are no more of them than
    /// pay.
    parts: Vec<Vec<String>>,
}

/// What a piece does to main, beside its new files.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Findings {
    keys: u64,
    upserts: u64,
    hits: u64,
    updated: u64,
    marked: Vec<Add>,
    /// Files that go, with their rows.
    gone: Vec<(String, u64)>,
}

impl Job {
    pub(super) fn pieces(&self) -> usize {
        self.parts.len() + self.shares
    }

    /// The keys were read where the shares are dealt, and are searched for there.
    pub(super) fn in_turn(&self) -> Vec<usize> {
        let parts = self.parts.len();
        (0..parts).chain((parts..self.pieces()).rev()).collect()
    }

    /// The pieces of a merge of these files of raw, and who deals out their rows; `None`: it is too small for
    /// them, needs to see all that goes beside all that comes, or raw's files are too many for this memory or have rows
    /// that somebody else deleted.
    async fn of(
        fold: &Fold<'_>,
        changed: &[LiveFile],
        permit: &Permit,
    ) -> Result<Option<(Self, Dealer)>> {
        let Fold { pipeline, main, raw, is_fast, .. } = *fold;
        let content = &pipeline.content;
        let bytes: u64 = changed.iter().map(|file| file.size).sum();
        let shares = pieces_of(bytes, pipeline, permit);
        let is_plain = is_fast && content.mode == Mode::Upsert && !content.skip_unchanged;
        if shares < 2 || !is_plain || main.tells_changes() {
            return Ok(None);
        }
        let rule = Rule::new(pipeline, raw);
        let memory = pipeline.sizes.memory_bytes;
        let dealer = Dealer::begin(raw, &rule, (changed, memory), shares).await?;
        let Some(dealer) = dealer else { return Ok(None) };
        let mut live = main.files().await?;
        let in_main: u64 = live.iter().map(|file| file.size).sum();
        // To read the keys of the epochs once more pays where as much of main is left to others.
        let searching = usize::try_from(in_main / bytes.max(1)).unwrap_or(shares).clamp(1, shares);
        live.sort_by(|one, other| {
            other.size.cmp(&one.size).then_with(|| one.path.cmp(&other.path))
        });
        let mut parts = vec![Vec::new(); searching.min(live.len())];
        let searching = parts.len();
        // Dealt out there and back: about as much for each.
        for (at, file) in live.into_iter().enumerate() {
            let (round, place) = (at / searching, at % searching);
            let part = if round % 2 == 0 { place } else { searching - 1 - place };
            parts[part].push(file.path);
        }
        let (main_version, raw_version) = (main.version(), raw.version());
        let epochs = fold.changed.clone();
        Ok(Some((Self { main_version, raw_version, epochs, shares, parts }, dealer)))
    }

    pub(super) async fn carry_out(
        &self,
        (tables, board): (&Tables, &Board),
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let main = &tables.at(&pipeline.main, self.main_version).await?;
        let raw = &match board.own_table() {
            Some(own) => own.clone(),
            None => tables.at(&pipeline.raw, self.raw_version).await?,
        };
        let rule = &Rule::new(pipeline, raw);
        let changes = raw::files_of(raw, &self.epochs).await?;
        let (mut search, share);
        if let Some(part) = self.parts.get(number) {
            let part: HashSet<&String> = part.iter().collect();
            let mut live = main.files().await?;
            live.retain(|file| part.contains(&file.path));
            search = Search::new(main, rule, pipeline, live, permit, 0)?;
            let all = board.notes(0..self.shares).await?;
            let all = LastRows::of_shares(raw, rule, &changes, all)?;
            all.search_for(&mut search, permit).await?;
            share = Vec::new();
        } else {
            search = Search::new(main, rule, pipeline, Vec::new(), permit, 0)?;
            let number = number - self.parts.len();
            share = board.notes(number..number + 1).await?;
        }
        let last = LastRows::of_shares(raw, rule, &changes, share)?;
        let (keys, upserts) = last.counts();
        search.count_only(keys, upserts);
        let mut edit = Edit::default();
        let editing = Editing { main, rule, pipeline, permit };
        editing.carry_out(&mut edit, Winners::InRaw(Arc::new(last)), search).await?;
        let of_merge = Some(Findings {
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

/// Has a merge of these files of raw done in pieces: what becomes of main, and how many pieces. `None`: it is
/// none for pieces, or the files are in another order than that of their keys.
pub(crate) async fn in_pieces(
    workshop: &Workshop,
    task: &Task,
    (fold, changed): (&Fold<'_>, &[LiveFile]),
    permit: &Permit,
) -> Result<Option<(Edit, u64)>> {
    let main = fold.main;
    let Some((job, dealer)) = Job::of(fold, changed, permit).await? else { return Ok(None) };
    let mut shared =
        Shared::lay_out(workshop, task, super::Job::Merge(job.clone()), permit).await?;
    let dealt = deal(&mut shared, job, dealer, permit).await;
    let gathered = match dealt {
        Ok(Some(counted)) => shared.gather().await.map(|products| Some((counted, products))),
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    shared.end().await;
    let Some(((keys, upserts), products)) = gathered? else { return Ok(None) };
    let pieces = products.len() as u64;
    let live = main.files().await?;
    let mut edit = Edit::default();
    edit.rows_before = live.iter().map(LiveFile::live_rows).sum();
    let live: HashMap<String, LiveFile> =
        live.into_iter().map(|file| (file.path.clone(), file)).collect();
    for product in products.into_iter().flatten() {
        let found = product.of_merge.ok_or_else(|| Error::internal("a piece of another step"))?;
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
    // Each share was written once.
    agree("merge", "keys of the epochs", keys, edit.keys, main.uri())?;
    agree("merge", "rows that come", upserts, edit.upserts, main.uri())?;
    Ok(Some((edit, pieces)))
}

/// Deals out the rows: each share is begun while the next is found. Keys, and rows that come, of all of them;
/// `None`: the files are in another order.
async fn deal(
    shared: &mut Shared<'_>,
    mut job: Job,
    mut dealer: Dealer,
    permit: &Permit,
) -> Result<Option<(u64, u64)>> {
    let (mut keys, mut upserts, mut shares) = (0, 0, 0);
    let parts = job.parts.len();
    let mut is_asked = true;
    while let Some(share) = dealer.next(permit).await? {
        keys += share.keys;
        upserts += share.upserts;
        shared.note(&share).await?;
        crash::point("shard.after_note")?;
        let is_begun_here = parts == 0 && dealer.is_over();
        is_asked = is_asked && !is_begun_here && shared.ask(parts + shares).await;
        shares += 1;
    }
    if !dealer.is_sorted() {
        return Ok(None);
    }
    if parts > 1 {
        // Who searches reads all notes of the plan.
        for _ in shares..job.shares {
            shared.note(&Share::default()).await?;
        }
    }
    // From the other end; the first one is begun here.
    for part in (1..parts).rev() {
        is_asked = is_asked && shared.ask(part).await;
    }
    job.shares = shares;
    shared.becomes(super::Job::Merge(job));
    shared.keep_table(dealer.into_table());
    Ok(Some((keys, upserts)))
}
