//! What a change of the applied epochs does to main, by the rule of its mode.
//!
//! ```text
//!  upsert    keys of the changed epochs ─► each key's last row (winners)
//!  append    partitions of the changed epochs, written anew from raw
//!  snapshot  the rows of the highest epoch with content; main's other keys go
//!  scd2      keys of the changed epochs ─► all their versions
//! ```
//! Merge and restore differ in which epochs are applied afterwards, and in nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;

use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::{Epoch, Pipeline, Result};
use alluvium_table::spool::Spool;
use alluvium_table::{LiveFile, Table};

use crate::edit::{Edit, Editing, Winners};
use crate::ground::Ground;
use crate::search::Search;
use crate::sorted::LastRows;
use crate::winners::Rule;
use crate::{Permit, raw};

/// A change of what is applied, on exactly these snapshots.
pub(crate) struct Fold<'a> {
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) main: &'a Table,
    pub(crate) raw: &'a Table,
    /// Epochs whose content comes, goes, or is another.
    pub(crate) changed: &'a BTreeSet<Epoch>,
    /// Epochs that are applied afterwards.
    pub(crate) applied: &'a BTreeSet<Epoch>,
    /// The changed epochs lie above all others and take nothing back: they alone decide.
    pub(crate) is_fast: bool,
}

impl Fold<'_> {
    /// Computes and writes main's new files.
    pub(crate) async fn edit(&self, permit: &Permit) -> Result<Edit> {
        let rule = Rule::new(self.pipeline, self.raw);
        let mut edit = Edit::default();
        let (main, raw, pipeline) = (self.main, self.raw, self.pipeline);
        let ground = Ground { main, raw, rule: &rule, pipeline, permit };
        if pipeline.content.mode == Mode::Append {
            let coming = self.changed.intersection(self.applied).copied().collect();
            let added = ground.all_rows(&raw::files_of(raw, &coming).await?).await?;
            let target = pipeline.sizes.target_file_bytes;
            edit.replace_epochs(main, self.changed, added, target).await?;
            return Ok(edit);
        }
        let live = main.files().await?;
        edit.rows_before = live.iter().map(LiveFile::live_rows).sum();
        let new_search = |rows| Search::new(main, &rule, pipeline, live.clone(), permit, rows);
        let mut sorted = None;
        if self.is_fast && pipeline.content.mode == Mode::Upsert {
            let changes = raw::files_of(raw, self.changed).await?;
            if changes.is_empty() {
                // Main may not even have the key's columns so far.
                return Ok(edit);
            }
            let rows: u64 = changes.iter().filter_map(|file| file.rows).sum();
            let mut search = new_search(usize::try_from(rows).unwrap_or(0))?;
            let files = (changes.as_slice(), pipeline.sizes.memory_bytes);
            let last = LastRows::find(raw, &rule, files, None, &mut search, permit).await?;
            sorted = last.map(|last| (Winners::InRaw(Arc::new(last)), search));
        }
        let (winners, search) = match sorted {
            Some(found) => found,
            None => {
                let Some(rows) = self.computed(&ground).await? else { return Ok(edit) };
                let rows = Arc::new(rows.finish()?);
                let mut search = new_search(rows.rows())?;
                search.add_rows(&rows).await?;
                (Winners::Computed(rows), search)
            }
        };
        let editing = Editing { main, rule: &rule, pipeline, permit };
        editing.carry_out(&mut edit, winners, search).await?;
        Ok(edit)
    }

    /// The rows that decide; `None`: main stays as it is.
    async fn computed(&self, ground: &Ground<'_>) -> Result<Option<Spool>> {
        let (pipeline, raw) = (self.pipeline, self.raw);
        if pipeline.content.mode == Mode::Snapshot {
            let top = self.top().await?;
            let is_below = |epoch: &Epoch| top.as_ref().is_some_and(|(top, _)| epoch < top);
            if self.changed.iter().all(is_below) {
                // The newest snapshot stays what it is.
                return Ok(None);
            }
            let files = top.map(|(_, files)| files).unwrap_or_default();
            return ground.snapshot(&files).await.map(Some);
        }
        let changes = raw::files_of(raw, self.changed).await?;
        if changes.is_empty() {
            return Ok(None);
        }
        let applied = raw::files_of(raw, self.applied).await?;
        let rows = match pipeline.content.mode {
            // What main was adopted with has no place in this mode.
            Mode::Scd2 => ground.versions(&changes, &applied).await?,
            _ if self.is_fast => ground.last_rows(&changes).await?,
            _ => ground.reconciled(&changes, &applied).await?,
        };
        Ok(Some(rows))
    }

    /// The highest applied epoch that has content, with its files.
    async fn top(&self) -> Result<Option<(Epoch, Vec<LiveFile>)>> {
        top_of(self.raw, self.applied).await
    }
}

/// The highest of these epochs that has content, with its files.
pub(crate) async fn top_of(
    raw: &Table,
    applied: &BTreeSet<Epoch>,
) -> Result<Option<(Epoch, Vec<LiveFile>)>> {
    let mut files = raw::files_of(raw, applied).await?;
    files.retain(|file| !raw::is_all_reverts(file.stats.as_deref()));
    let top = files.iter().filter_map(raw::epoch_of).max();
    let Some(top) = top else { return Ok(None) };
    files.retain(|file| raw::epoch_of(file) == Some(top));
    Ok(Some((top, files)))
}
