//! The book: what one pipeline's coordinator knows, in memory.
//!
//! Rebuilt at every start from markers, manifests and listings (and, in watch mode, from the
//! ledger's word about blocked epochs). Losing it loses nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use alluvium_protocol::manifest::Reason;
use alluvium_protocol::marker::{EpochMarker, Generation, Markers, epoch_app_id};
use alluvium_protocol::queue::Lane;
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::{MainFiles, Step, Work};
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::{Table, upkeep};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::discovery::Source;
use crate::hooks::HookState;
use crate::manifests::Manifests;
use crate::policy::Policy;
use crate::readiness::Quiet;
use crate::restoring::Restoring;
use crate::sequencing::{EpochView, PipelineView};

/// What is known of one epoch.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The folder's name, once one was seen.
    pub folder: Option<String>,
    /// Where the epoch stands.
    pub state: State,
    /// The newest generation that was asked for.
    pub generation: Generation,
    /// Why it is blocked, or failed last.
    pub error: Option<Error>,
    /// Failed attempts of the present step.
    pub failures: u32,
    /// Workers that died at the present step.
    pub crashes: u32,
    /// The next attempt waits until then.
    pub not_before: Option<DateTime<Utc>>,
    /// Since when the folder is known and not complete.
    pub waiting_since: Option<DateTime<Utc>>,
    /// Why the folder is not complete.
    pub why: Option<String>,
    /// Listings for `quiet`.
    pub quiet: Option<Quiet>,
    /// When the folder will be quiet if nothing changes.
    pub settles_at: Option<DateTime<Utc>>,
    /// The folder is not what was read.
    pub changed: Option<String>,
    /// Bytes in raw.
    pub bytes: u64,
    /// Content that is empty by request.
    pub is_empty: bool,
    /// It came after a higher epoch was in main.
    pub late: bool,
    /// SHA-256 of its manifest, once known.
    pub manifest_hash: Option<String>,
    /// When its present content was found; the run's beginning.
    pub found_at: Option<DateTime<Utc>>,
    /// The trace context of the last attempt.
    pub last_sent: Option<String>,
}

impl Entry {
    fn new(state: State, generation: Generation) -> Self {
        Self {
            folder: None,
            state,
            generation,
            error: None,
            failures: 0,
            crashes: 0,
            not_before: None,
            waiting_since: None,
            why: None,
            quiet: None,
            settles_at: None,
            changed: None,
            bytes: 0,
            is_empty: false,
            late: false,
            manifest_hash: None,
            found_at: None,
            last_sent: None,
        }
    }

    /// Moves the state machine; an illegal move is a bug that stops the epoch, not the process.
    pub fn apply(&mut self, event: Event) -> Result<()> {
        self.state = self.state.after(event).map_err(Error::internal)?;
        if !matches!(event, Event::Failed | Event::GaveBack | Event::Blocked(_)) {
            self.not_before = None;
        }
        if matches!(event, Event::ContentPinned | Event::RetryAsked | Event::IngestDone) {
            self.failures = 0;
            self.crashes = 0;
            self.error = None;
        }
        Ok(())
    }

    fn view(&self) -> EpochView {
        EpochView {
            state: self.state,
            bytes: self.bytes,
            not_before: self.not_before,
            waiting_since: self.waiting_since,
            is_empty: self.is_empty,
        }
    }
}

/// A task that is out.
#[derive(Clone, Debug)]
pub struct Outstanding {
    /// What is to be done.
    pub work: Work,
    /// Where it was published.
    pub lane: Lane,
    /// Which attempt it is.
    pub attempt: u32,
    /// When it was published.
    pub published_at: DateTime<Utc>,
    /// When it was last seen: published, waiting in its lane, or held by a worker.
    pub alive_at: DateTime<Utc>,
}

/// One pipeline's book.
pub struct Book {
    /// The definition.
    pub pipeline: Pipeline,
    /// Its source.
    pub source: Source,
    /// Its manifests.
    pub manifests: Manifests,
    /// Markers of raw and main, as last read or reported.
    pub markers: Markers,
    /// Epochs above the floor, or known from markers.
    pub entries: BTreeMap<Epoch, Entry>,
    /// Tasks that are out.
    pub outstanding: HashMap<Uuid, Outstanding>,
    /// Main exists.
    pub has_main: bool,
    /// Main's data files, and those that an optimize would write anew.
    pub main_files: MainFiles,
    /// Small files at which optimize had nothing more to do.
    pub small_files_left: u64,
    /// Maintenance rests until then.
    pub maintenance_not_before: Option<DateTime<Utc>>,
    /// When processed folders were last compared with their manifests.
    pub compared_at: Option<DateTime<Utc>>,
    /// When cleanup last ended.
    pub cleaned_at: Option<DateTime<Utc>>,
    /// Names in the source that are no epochs: the first few, and how many.
    pub junk: (BTreeSet<String>, usize),
    /// Folders below `start_from` or the floor, not processed.
    pub settled_folders: usize,
    /// The error that people were told.
    pub told: Option<Error>,
    /// A cleanup ended in this process: a drained run makes at most one.
    pub cleaned_here: bool,
    /// The source cannot be listed, or the tables cannot be used.
    pub error: Option<Error>,
    /// Versions of raw and main, where they exist.
    pub versions: (Option<i64>, Option<i64>),
    /// When epochs were merged, as the ledger or this process knows.
    pub processed: BTreeMap<Epoch, String>,
    /// What a team wants of it beside its data.
    pub policy: Policy,
    /// How its hook stands, where there is one.
    pub hook: Option<HookState>,
    /// Failures of maintenance in a row; `None`: none ended in this process.
    pub maintenance_failures: Option<u32>,
    /// What the last one of them said.
    pub maintenance_error: Option<String>,
    /// Ingests since the last look, and the newest one: rows refused, rows read.
    pub refused: BTreeMap<Epoch, (u64, u64)>,
    /// When content came last.
    pub last_arrival: Option<DateTime<Utc>>,
    /// Something says that there is news in the source.
    pub is_woken: bool,
    /// When the source was listed last.
    pub listed_at: Option<DateTime<Utc>>,
    /// A rollback that was asked for.
    pub restoring: Option<Restoring>,
    /// Rows for `step_events` that no result stands behind: blocks found in discovery.
    pub events: Vec<serde_json::Value>,
}

impl Book {
    /// Reads tables and manifests. A table that cannot be used is noted, not fatal: other
    /// pipelines go on.
    pub async fn open(pipeline: Pipeline) -> Result<Self> {
        let mut book = Self {
            source: Source::open(&pipeline)?,
            manifests: Manifests::open(&pipeline)?,
            markers: Markers::default(),
            entries: BTreeMap::new(),
            outstanding: HashMap::new(),
            has_main: false,
            main_files: MainFiles::default(),
            small_files_left: 0,
            maintenance_not_before: None,
            compared_at: None,
            cleaned_at: None,
            junk: (BTreeSet::new(), 0),
            settled_folders: 0,
            told: None,
            cleaned_here: false,
            error: None,
            versions: (None, None),
            policy: Policy::default(),
            hook: None,
            maintenance_failures: None,
            maintenance_error: None,
            refused: BTreeMap::new(),
            last_arrival: None,
            is_woken: false,
            listed_at: None,
            restoring: None,
            events: Vec::new(),
            processed: BTreeMap::new(),
            pipeline,
        };
        if let Err(error) = book.read_tables().await {
            book.error = Some(error);
        }
        Ok(book)
    }

    /// Reads markers and manifests anew and places every epoch that is not out at work.
    pub async fn read_tables(&mut self) -> Result<()> {
        let id = self.pipeline.id.clone();
        // Main first: what it has applied is then in this snapshot of raw, too, or was lost.
        let main = Table::open(&self.pipeline.main).await?;
        let raw = Table::open(&self.pipeline.raw).await?;
        for table in [&raw, &main].into_iter().flatten() {
            table.check_settings(&self.pipeline)?;
        }
        let of = |table: &Option<Table>| {
            table.as_ref().map(|t| Markers::of_pipeline(&id, t.transactions())).unwrap_or_default()
        };
        self.markers = Markers::joined(of(&raw), of(&main));
        let is_ours =
            main.as_ref().is_some_and(|t| t.properties().contains_key("alluvium.pipeline"));
        if main.is_some() && !is_ours && !self.pipeline.adopt {
            return Err(Table::not_ours(&self.pipeline));
        }
        if main.is_none() && self.pipeline.adopt {
            return Err(Table::nothing_to_adopt(&self.pipeline));
        }
        self.has_main = is_ours;
        self.last_arrival = raw.as_ref().and_then(|raw| newest_ingest(&self.markers, &id, raw));
        self.versions = (raw.as_ref().map(Table::version), main.as_ref().map(Table::version));
        if let Some(main) = &main {
            let health = upkeep::health(main.files().await?, upkeep::policy(&self.pipeline), None);
            self.main_files = health.counts();
        }
        let contents = contents_of(raw.as_ref()).await?;
        let pinned = self.manifests.newest().await?;
        let epochs: BTreeSet<Epoch> = self
            .markers
            .ingest
            .keys()
            .chain(self.markers.merge.keys())
            .chain(self.markers.wanted.keys())
            .chain(pinned.keys())
            .copied()
            .collect();
        let emptied = self.emptied(raw.as_ref(), &contents).await?;
        for epoch in epochs {
            let content = contents.get(&epoch).copied().unwrap_or_default();
            let is_empty = emptied.contains(&epoch);
            self.place(epoch, pinned.get(&epoch).copied(), content, is_empty).await?;
        }
        Ok(())
    }

    async fn place(
        &mut self,
        epoch: Epoch,
        pinned: Option<Generation>,
        content: RawContent,
        is_empty: bool,
    ) -> Result<()> {
        if self.is_settled(epoch) && !self.markers.is_applied(epoch) {
            return Ok(());
        }
        let found = State::from_tables(epoch, &self.markers, pinned, is_empty);
        let Some(state) = found else { return Ok(()) };
        // Content that waits for its ingest keeps its generation, also below what a rollback wants.
        let generation = match (state, pinned) {
            (State::Ready, Some(pinned)) => pinned,
            _ => self.markers.generation(epoch).max(pinned.unwrap_or(0)),
        };
        let highest = self.markers.highest_applied();
        let entry = self.entries.entry(epoch).or_insert_with(|| Entry::new(state, generation));
        if entry.state.is_outstanding() || (entry.state.is_stopped() && !state.is_end()) {
            return Ok(());
        }
        entry.state = state;
        if entry.generation != generation {
            entry.manifest_hash = None;
        }
        entry.generation = generation;
        entry.bytes = content.bytes;
        entry.is_empty = is_empty;
        entry.late = !state.is_end() && highest.is_some_and(|highest| highest > epoch);
        if state == State::Ready && entry.folder.is_none() {
            // One that cannot be read blocks its epoch when its ingest is due, not the pipeline.
            if let Ok(Some(loaded)) = self.manifests.load(epoch, generation).await {
                entry.is_empty = loaded.manifest.reason.is_empty_content();
                entry.folder = Some(loaded.manifest.folder);
            }
        }
        Ok(())
    }

    /// Ingested epochs without rows because somebody asked for that: so say their manifests or, where
    /// these are lost, raw's commits. A folder may hold no rows, too.
    async fn emptied(
        &self,
        raw: Option<&Table>,
        contents: &BTreeMap<Epoch, RawContent>,
    ) -> Result<BTreeSet<Epoch>> {
        let (mut emptied, mut unknown) = (BTreeSet::new(), BTreeSet::new());
        let has_rows = |epoch: &Epoch| contents.get(epoch).is_some_and(|content| content.has_rows);
        for (epoch, generation) in &self.markers.ingest {
            if has_rows(epoch) {
                continue;
            }
            match self.manifests.load(*epoch, *generation).await {
                Ok(Some(pinned)) if !pinned.manifest.reason.is_empty_content() => {}
                Ok(Some(_)) => drop(emptied.insert(*epoch)),
                Ok(None) | Err(_) => drop(unknown.insert(*epoch)),
            }
        }
        let (Some(raw), false) = (raw, unknown.is_empty()) else { return Ok(emptied) };
        for commit in raw.history(0).await? {
            let reason = serde_json::from_value::<Reason>(commit.info["reason"].clone()).ok();
            for (app_id, _) in &commit.markers {
                let epoch = unknown.iter().copied().find(|epoch| {
                    *app_id == epoch_app_id(&self.pipeline.id, *epoch, EpochMarker::Ingest)
                });
                // The newest commit of an epoch comes first.
                let Some(epoch) = epoch else { continue };
                unknown.remove(&epoch);
                if reason.is_none_or(Reason::is_empty_content) {
                    emptied.insert(epoch);
                }
            }
        }
        // The log no longer reaches back: mostly somebody asked for it.
        emptied.extend(unknown);
        Ok(emptied)
    }

    /// The entry of an epoch, made when it is new.
    pub fn entry(&mut self, epoch: Epoch, state: State) -> &mut Entry {
        let highest = self.markers.highest_applied();
        self.entries.entry(epoch).or_insert_with(|| {
            let mut entry = Entry::new(state, 0);
            entry.late = highest.is_some_and(|highest| highest > epoch);
            entry
        })
    }

    /// The epoch lies below `start_from` or at the floor: its story is over, or never began.
    pub fn is_settled(&self, epoch: Epoch) -> bool {
        self.pipeline.start_from.is_some_and(|start| epoch.value() < start)
            || self.markers.is_settled(epoch)
    }

    /// The same book, with a team's wishes.
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.hook = policy.hook.as_ref().map(|_| HookState::default());
        self.policy = policy;
        self
    }

    /// What sequencing sees. `epochs` keeps the views alive.
    pub fn view<'a>(&'a self, epochs: &'a BTreeMap<Epoch, EpochView>) -> PipelineView<'a> {
        let is_out =
            |steps: &[Step]| self.outstanding.values().any(|out| steps.contains(&out.work.step()));
        PipelineView {
            pipeline: &self.pipeline,
            epochs,
            is_rewriting: is_out(&[Step::Merge, Step::Optimize, Step::Restore]),
            is_cleaning: is_out(&[Step::Cleanup]),
            is_held: self.markers.is_held(),
            wants_restore: self.restoring.as_ref().map(|restoring| restoring.not_before),
            has_raw: self.versions.0.is_some(),
            has_main: self.has_main,
            small_files: self.main_files.main_small_files,
            read_cost: self.main_files.main_read_cost,
            small_files_left: self.small_files_left,
            maintenance_not_before: self.maintenance_not_before,
            cleaned_at: self.cleaned_at,
        }
    }

    /// Every epoch as sequencing sees it.
    pub fn epoch_views(&self) -> BTreeMap<Epoch, EpochView> {
        self.entries.iter().map(|(epoch, entry)| (*epoch, entry.view())).collect()
    }

    /// Epochs that main has and raw no longer holds.
    pub fn lost_epochs(&self) -> usize {
        self.markers.merge.keys().filter(|epoch| self.markers.is_lost(**epoch)).count()
    }

    /// Epochs that wait for work of ours.
    pub fn waiting(&self) -> usize {
        let is_waiting = |e: &&Entry| {
            matches!(e.state, State::Ready | State::Ingested) || e.state.is_outstanding()
        };
        self.entries.values().filter(is_waiting).count()
    }
}

/// When an ingest's marker landed last.
fn newest_ingest(markers: &Markers, id: &str, raw: &Table) -> Option<DateTime<Utc>> {
    let times = markers
        .ingest
        .keys()
        .filter_map(|epoch| raw.transaction_time(&epoch_app_id(id, *epoch, EpochMarker::Ingest)));
    times.max().and_then(DateTime::from_timestamp_millis)
}

/// What raw holds of an epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawContent {
    /// Bytes of its files.
    pub bytes: u64,
    /// Rows in them.
    pub rows: u64,
    /// At least one row is not a revert.
    pub has_rows: bool,
}

/// Raw's partitions by epoch, from the statistics of their files. No table: no partitions.
pub async fn contents_of(raw: Option<&Table>) -> Result<BTreeMap<Epoch, RawContent>> {
    let mut contents: BTreeMap<Epoch, RawContent> = BTreeMap::new();
    let Some(raw) = raw else { return Ok(contents) };
    for file in raw.files().await? {
        let value = file.partition.get("_epoch").cloned().flatten();
        let Some(epoch) = value.and_then(|text| text.parse::<Epoch>().ok()) else { continue };
        let content = contents.entry(epoch).or_default();
        content.bytes += file.size;
        content.rows += file.rows.unwrap_or(0);
        content.has_rows |= !is_all_reverts(file.stats.as_deref());
    }
    Ok(contents)
}

fn is_all_reverts(stats: Option<&str>) -> bool {
    let parsed = stats.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    parsed.is_some_and(|stats| {
        stats["minValues"]["_op"] == "revert" && stats["maxValues"]["_op"] == "revert"
    })
}
