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
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::spool::Spool;
use alluvium_table::{LiveFile, Table};

use crate::edit::{Edit, Editing, Winners, paths};
use crate::ground::Ground;
use crate::ingest::table_names;
use crate::search::Search;
use crate::sorted::LastRows;
use crate::winners::{self, Rule, Scope};
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
    pub(crate) async fn edit(&self, session: &SessionContext, permit: &Permit) -> Result<Edit> {
        let rule = Rule::new(self.pipeline, self.raw);
        let mut edit = Edit::default();
        let (main, raw, pipeline) = (self.main, self.raw, self.pipeline);
        if pipeline.content.mode == Mode::Append {
            self.register_rows(session, "added").await?;
            let target = pipeline.sizes.target_file_bytes;
            edit.replace_epochs(session, main, &rule, self.changed, target).await?;
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
            let last = LastRows::find(raw, &rule, &changes, &mut search, permit).await?;
            sorted = last.map(|last| (Winners::InRaw(Arc::new(last)), search));
        }
        let (winners, search) = match sorted {
            Some(found) => found,
            None => {
                let Some(rows) = self.by_sql(session, &rule, permit).await? else {
                    return Ok(edit);
                };
                let rows = Arc::new(rows.finish()?);
                let mut search = new_search(rows.rows())?;
                search.add_rows(&rows).await?;
                (Winners::Computed(rows), search)
            }
        };
        let editing = Editing { session, main, rule: &rule, pipeline, permit };
        editing.carry_out(&mut edit, winners, search).await?;
        Ok(edit)
    }

    /// The rows that decide, in no order; `None`: main stays as it is.
    async fn by_sql(
        &self,
        session: &SessionContext,
        rule: &Rule,
        permit: &Permit,
    ) -> Result<Option<Spool>> {
        let (pipeline, main, raw) = (self.pipeline, self.main, self.raw);
        if pipeline.content.mode == Mode::Snapshot {
            return self.of_snapshot(session, rule).await;
        }
        let changes = raw::files_of(raw, self.changed).await?;
        if changes.is_empty() {
            return Ok(None);
        }
        raw.register(session, "changes", Some(&paths(&changes))).await?;
        if self.is_fast && pipeline.content.mode != Mode::Scd2 {
            return winners::compute(session, rule, &Scope::Fast).await.map(Some);
        }
        let ground = Ground { session, main, raw, rule, pipeline, permit };
        let applied = raw::files_of(raw, self.applied).await?;
        let scope = ground.register(&changes, &applied).await?;
        let rows = match pipeline.content.mode {
            // What main was adopted with has no place in this mode.
            Mode::Scd2 => winners::collect(session, &rule.version_rows()).await?,
            _ => winners::compute(session, rule, &scope).await?,
        };
        Ok(Some(rows))
    }

    /// The rows of the newest snapshot, and deletes of main's other keys.
    async fn of_snapshot(&self, session: &SessionContext, rule: &Rule) -> Result<Option<Spool>> {
        let top = self.top().await?;
        let is_below = |epoch: &Epoch| top.as_ref().is_some_and(|(top, _)| epoch < top);
        if self.changed.iter().all(is_below) {
            // The newest snapshot stays what it is.
            return Ok(None);
        }
        self.main.register(session, "main", None).await?;
        if let Some((_, files)) = &top {
            self.raw.register(session, "top", Some(&paths(files))).await?;
        }
        let main_key = table_names(self.main, &self.pipeline.content.key);
        let sql = rule.snapshot_rows(top.is_some(), &main_key);
        let rows = winners::collect(session, &sql).await?;
        session.deregister_table("main").map_err(|e| foreign("read main", &e))?;
        Ok(Some(rows))
    }

    /// The changed epochs' rows that are to be in main, as table `name`, if there are any.
    async fn register_rows(&self, session: &SessionContext, name: &str) -> Result<()> {
        let coming: BTreeSet<Epoch> = self.changed.intersection(self.applied).copied().collect();
        let files = raw::files_of(self.raw, &coming).await?;
        if files.is_empty() {
            return Ok(());
        }
        self.raw.register(session, name, Some(&paths(&files))).await
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
