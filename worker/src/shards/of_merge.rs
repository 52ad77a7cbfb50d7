//! A merge in pieces: each is a range of keys. It chooses the last row of each of its keys, looks for them in main, and
//! writes those that come; which rows of main go by that is put together by the step's worker, in one commit.
//!
//! Where a key may be in any of main's files, each range would read them all: they are searched file by file then,
//! once all rows are chosen ([`super::of_search`]); and so they are where files are to be written anew without the
//! rows that go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use alluvium_protocol::pipeline::{DeletionVectors, Mode};
use alluvium_protocol::task::Task;
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::deletion::RowSet;
use alluvium_table::keys::{Found, readings};
use alluvium_table::{Action, LiveFile, Table};
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::{Product, Shared, of_search, pieces_of};
use crate::checks::agree;
use crate::edit::{Edit, Editing, Winners};
use crate::folding::Fold;
use crate::search::Search;
use crate::sorted::{Cuts, LastRows, Share, rows_of, text_of};
use crate::tables::Tables;
use crate::winners::Rule;
use crate::{Permit, Workshop, raw};

/// Main is searched range by range while its row groups are read so often at most.
const READINGS_MAX: f64 = 3.0;
/// Deletion vectors read at a time.
const VECTORS_AT_ONCE: usize = 16;

/// Of what a merge is made, as processes tell each other.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Snapshots {
    main_version: i64,
    raw_version: i64,
    epochs: BTreeSet<Epoch>,
}

impl Snapshots {
    /// Main, raw, and raw's files of these epochs.
    pub(super) async fn open(
        &self,
        tables: &Tables,
        pipeline: &Pipeline,
    ) -> Result<(Table, Table, Vec<LiveFile>)> {
        let main = tables.at(&pipeline.main, self.main_version).await?;
        let raw = tables.at(&pipeline.raw, self.raw_version).await?;
        let changes = raw::files_of(&raw, &self.epochs).await?;
        Ok((main, raw, changes))
    }
}

/// What is to be merged, range by range.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    of: Snapshots,
    cuts: Cuts,
    ranges: usize,
    /// Each range is looked for in main, too.
    searches: bool,
}

/// What a range is of, beside its new files.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Findings {
    /// Rows of raw with its keys; `None`: they are not in the order of their keys.
    passed: Option<u64>,
    keys: u64,
    upserts: u64,
    /// Rows of main that go, where it was searched.
    going: Vec<Going>,
    /// Files that tell the changes row by row.
    feed: Vec<Action>,
    /// The rows that were chosen, where main was not searched.
    share: Option<Share>,
}

/// Rows of a file of main that go.
#[derive(Clone, Serialize, Deserialize)]
struct Going {
    path: String,
    rows_in_file: u64,
    /// As [`text_of`] writes them.
    rows: String,
    /// So many of them come again.
    coming: u64,
}

impl Job {
    pub(super) fn ranges(&self) -> usize {
        self.ranges
    }

    /// The ranges of a merge of these files of raw; `None`: it is too small for pieces, computed over all epochs, or
    /// needs what raw does not tell.
    async fn of(fold: &Fold<'_>, changed: &[LiveFile], permit: &Permit) -> Result<Option<Self>> {
        let Fold { pipeline, main, raw, is_fast, .. } = *fold;
        let content = &pipeline.content;
        let bytes = changed.iter().map(|file| file.size).sum();
        let ranges = pieces_of(bytes, pipeline, permit);
        let is_counted = changed.iter().all(|file| file.rows.is_some());
        if ranges < 2 || !is_fast || content.mode != Mode::Upsert || !is_counted {
            return Ok(None);
        }
        let rule = Rule::new(pipeline, raw);
        let files = (changed, pipeline.sizes.memory_bytes);
        let Some(cuts) = Cuts::choose(raw, &rule, files, ranges).await? else { return Ok(None) };
        let (ranges, ends) = cuts.ends()?;
        let marks = main.marks_rows() && pipeline.deletion_vectors != DeletionVectors::Off;
        let searches = marks && {
            let live = main.files().await?;
            readings(main, &live, &rule.key[0], &ends).await? <= READINGS_MAX
        };
        if !searches && (content.skip_unchanged || main.tells_changes()) {
            // Both need to see all that goes beside all that comes.
            return Ok(None);
        }
        let (main_version, raw_version) = (main.version(), raw.version());
        let of = Snapshots { main_version, raw_version, epochs: fold.changed.clone() };
        Ok(Some(Self { of, cuts, ranges, searches }))
    }

    pub(super) async fn carry_out(
        &self,
        tables: &Tables,
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let (main, raw, changes) = &self.of.open(tables, pipeline).await?;
        let rule = &Rule::new(pipeline, raw);
        let live = if self.searches { main.files().await? } else { Vec::new() };
        let is_first = live.is_empty();
        let mut search = Search::new(main, rule, pipeline, live, permit, 0)?;
        let files = (changes.as_slice(), pipeline.sizes.memory_bytes);
        let range = Some((&self.cuts, number));
        let last = LastRows::find(raw, rule, files, range, &mut search, permit).await?;
        let mut findings = Findings {
            passed: last.as_ref().map(LastRows::passed),
            keys: 0,
            upserts: 0,
            going: Vec::new(),
            feed: Vec::new(),
            share: None,
        };
        let Some(last) = last.map(Arc::new) else {
            return Ok(Product { of_merge: Some(findings), ..Product::default() });
        };
        let mut edit = Edit::default();
        if last.counts().0 > 0 {
            let editing = Editing { main, rule, pipeline, permit };
            let winners = Winners::InRaw(Arc::clone(&last));
            let written = editing.write(&mut edit, winners, search).await?;
            // Rows may go in another range.
            if !is_first {
                editing.tell(&mut edit, &written).await?;
            }
        }
        (findings.keys, findings.upserts) = (edit.keys, edit.upserts);
        for found in &edit.touched {
            findings.going.push(Going {
                path: found.file.path.clone(),
                rows_in_file: found.rows_in_file,
                rows: text_of(&found.rows)?,
                coming: found.coming,
            });
        }
        if !self.searches {
            findings.share = Some(last.to_share()?);
        }
        findings.feed = edit.feed;
        Ok(Product { of_merge: Some(findings), ..Product::of(edit.written) })
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
    let Fold { main, raw, pipeline, .. } = *fold;
    let Some(job) = Job::of(fold, changed, permit).await? else { return Ok(None) };
    let shared = Shared::begin(workshop, task, super::Job::Merge(job.clone()), permit).await?;
    let products = shared.gather().await;
    shared.end().await;
    let products: Vec<Product> = products?.into_iter().flatten().collect();
    let mut pieces = products.len() as u64;
    let live = main.files().await?;
    let rows_before = live.iter().map(LiveFile::live_rows).sum();
    let mut edit = Edit { rows_before, ..Edit::default() };
    let (mut passed, mut shares, mut going) = (Some(0), Vec::new(), BTreeMap::new());
    for product in products {
        let found = product.of_merge.ok_or_else(|| Error::internal("a piece of another step"))?;
        passed = passed.zip(found.passed).map(|(all, of_range)| all + of_range);
        edit.keys += found.keys;
        edit.upserts += found.upserts;
        edit.feed.extend(found.feed);
        edit.written.adds.extend(product.adds);
        edit.written.rows += product.rows;
        shares.extend(found.share);
        for of_file in found.going {
            let none = || (of_file.rows_in_file, RowSet::new(), 0);
            let (_, rows, coming) = going.entry(of_file.path).or_insert_with(none);
            *rows |= rows_of(&of_file.rows)?;
            *coming += of_file.coming;
        }
    }
    // Each row was in the range of its key, and none of them in two.
    if passed.is_none() || passed != changed.iter().map(|file| file.rows).sum() {
        tracing::info!(
            table = raw.uri(),
            "files are not in the order of their keys, or tell other ones: one worker sorts them"
        );
        return Ok(None);
    }
    agree("merge", "rows that come", edit.upserts, edit.written.rows, main.uri())?;
    if job.searches {
        edit.touched = with_deleted(fold, live, going).await?;
        edit.count_hits();
        let rule = &Rule::new(pipeline, raw);
        Editing { main, rule, pipeline, permit }.take_out(&mut edit).await?;
    } else {
        let job = of_search::Job::of(job.of, live.clone(), changed, pipeline);
        pieces +=
            of_search::in_pieces((workshop, task), (job, shares), live, &mut edit, permit).await?;
    }
    Ok(Some((edit, pieces)))
}

/// Files of main with the rows that go, and those that went before.
async fn with_deleted(
    fold: &Fold<'_>,
    live: Vec<LiveFile>,
    going: BTreeMap<String, (u64, RowSet, u64)>,
) -> Result<Vec<Found>> {
    let mut live: HashMap<String, LiveFile> =
        live.into_iter().map(|file| (file.path.clone(), file)).collect();
    let main = fold.main;
    let mut touched = Vec::with_capacity(going.len());
    for (path, (rows_in_file, rows, coming)) in going {
        let file = live.remove(&path).ok_or_else(|| Error::internal("a file of no snapshot"))?;
        touched.push(async move {
            let deleted = main.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
            Ok::<_, Error>(Found { file, rows_in_file, deleted, rows, coming })
        });
    }
    futures::stream::iter(touched).buffered(VECTORS_AT_ONCE).try_collect().await
}
