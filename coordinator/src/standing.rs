//! How things stand, for people: read from tables, manifests and a listing, changing nothing.

use std::collections::BTreeMap;

use alluvium_protocol::pipeline::Ready;
use alluvium_protocol::state::State;
use alluvium_protocol::task::Step;
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::book::{Book, Entry};
use crate::discovering::{ambiguous, mark_changes, not_a_folder, unlistable};
use crate::discovery::{Contents, Listing};
use crate::ledger::{Ledger, LedgerTable};
use crate::readiness::{self, Judgement};
use crate::sequencing::{Plan, plan};

/// One epoch, as people see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EpochStanding {
    /// The pipeline.
    pub pipeline: String,
    /// The epoch.
    pub epoch: Epoch,
    /// The folder's name.
    pub folder: String,
    /// The word for its state.
    pub state: String,
    /// Which content of it counts.
    pub generation: i64,
    /// It came after a higher one.
    pub late: bool,
    /// When it was merged.
    pub processed_at: Option<String>,
    /// Why it waits, is blocked, or should be looked at.
    pub note: Option<String>,
    /// The code of its last error.
    pub code: Option<String>,
    /// The step at which it stopped.
    pub stopped_at: Option<String>,
}

/// One pipeline, as people see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PipelineStanding {
    /// The pipeline.
    pub pipeline: String,
    /// `fresh`, `behind`, `blocked`, `broken`, `paused` or `empty`.
    pub health: String,
    /// The newest epoch with all lower known epochs applied.
    pub fresh_to: Option<Epoch>,
    /// Epochs by state.
    pub epochs: BTreeMap<String, usize>,
    /// Raw's version.
    pub raw_version: Option<i64>,
    /// Main's version.
    pub main_version: Option<i64>,
    /// Main's data files.
    pub main_files: u64,
    /// Those of them that gain by being written anew.
    pub main_small_files: u64,
    /// What a read of main costs, in percent of what it costs when all files are new: an estimate.
    pub main_read_cost: u32,
    /// Names in the source that are no epochs.
    pub junk: usize,
    /// The first few of these names.
    pub junk_names: Vec<String>,
    /// Folders below `start_from` or the floor.
    pub settled_folders: usize,
    /// What stops it, or holds it up.
    pub why: Vec<String>,
    /// What stops it, when its source or tables cannot be used.
    pub error: Option<Error>,
}

/// A pipeline's book, brought up to the source without pinning anything.
pub struct Standing {
    /// The book.
    pub book: Book,
    /// The plan from here.
    pub plan: Plan,
}

impl Standing {
    /// Reads everything that says how a pipeline stands.
    pub async fn read(pipeline: Pipeline, now: DateTime<Utc>) -> Result<Self> {
        let ledger = Ledger::open(&pipeline.state);
        let mut book = Book::open(pipeline).await?;
        if book.error.is_none() {
            match book.source.list().await {
                Ok(listing) => look(&mut book, &listing, now).await,
                Err(error) => book.error = Some(error),
            }
        }
        recall_processed(&mut book, &ledger).await;
        recall_blocked(&mut book, &ledger).await;
        let views = book.epoch_views();
        let plan = plan(&book.view(&views), now);
        Ok(Self { book, plan })
    }

    /// Its epochs, ascending.
    pub fn epochs(&self) -> Vec<EpochStanding> {
        epochs_of(&self.book, &self.plan)
    }

    /// The whole pipeline.
    pub fn pipeline(&self) -> PipelineStanding {
        standing_of(&self.book, &self.plan)
    }

    /// What a run would do now.
    pub fn plan_items(&self) -> Vec<Value> {
        plan_items(&self.book, &self.plan, &self.epochs())
    }
}

/// A pipeline's epochs, ascending.
pub fn epochs_of(book: &Book, plan: &Plan) -> Vec<EpochStanding> {
    let mut found = Vec::new();
    for (epoch, entry) in &book.entries {
        let waits = plan.waits.iter().find(|wait| wait.epoch == Some(*epoch));
        let stopped_at = match entry.state {
            State::Blocked(step) | State::Parked(step) => Some(step.as_str().to_owned()),
            _ => None,
        };
        let error = entry.error.as_ref().filter(|_| entry.state.is_stopped());
        let note = error
            .map(|e| e.message.clone())
            .or_else(|| entry.changed.clone())
            .or_else(|| entry.why.clone())
            .or_else(|| waits.map(|wait| wait.why.clone()));
        found.push(EpochStanding {
            pipeline: book.pipeline.id.clone(),
            epoch: *epoch,
            folder: entry.folder.clone().unwrap_or_else(|| epoch.to_string()),
            state: word_of(book, entry).to_owned(),
            generation: entry.generation,
            late: entry.late,
            processed_at: book.processed.get(epoch).filter(|_| entry.state.is_end()).cloned(),
            note,
            code: error.map(|e| e.code.to_string()),
            stopped_at,
        });
    }
    found
}

/// Empty content has nothing to wait for, even before main exists.
fn word_of(book: &Book, entry: &Entry) -> &'static str {
    match entry.state {
        State::Ingested if entry.is_empty && !book.has_main => State::Skipped.as_str(),
        state => state.as_str(),
    }
}

/// A whole pipeline.
pub fn standing_of(book: &Book, plan: &Plan) -> PipelineStanding {
    let mut epochs: BTreeMap<String, usize> = BTreeMap::new();
    let mut fresh_to = None;
    let mut is_whole = true;
    for (epoch, entry) in &book.entries {
        let word = word_of(book, entry);
        *epochs.entry(word.to_owned()).or_default() += 1;
        is_whole &= ["processed", "skipped"].contains(&word);
        if is_whole {
            fresh_to = Some(*epoch);
        }
    }
    let count = |names: &[&str]| names.iter().filter_map(|name| epochs.get(*name)).sum::<usize>();
    let health = if book.error.is_some() || book.lost_epochs() > 0 {
        "broken"
    } else if book.markers.is_held() {
        "paused"
    } else if count(&["blocked", "parked"]) > 0 {
        "blocked"
    } else if count(&["ready", "ingested", "ingesting", "merging"]) > 0 {
        "behind"
    } else if book.entries.is_empty() {
        "empty"
    } else {
        "fresh"
    };
    let mut why: Vec<String> = Vec::new();
    if let Some(error) = &book.error {
        why.push(match &error.help {
            Some(help) => format!("{error}; {help}"),
            None => error.to_string(),
        });
    }
    let lost = book.lost_epochs();
    if lost > 0 {
        why.push(format!(
                "{lost} epoch(s) of main are not in {}, or in an older state: they cannot be undone, and no \
                 older one can be reconciled; restore raw, or see `alluvium explain AL-0405`",
                book.pipeline.raw
            ));
    }
    for wait in &plan.waits {
        why.push(match wait.epoch {
            Some(epoch) => format!("epoch {epoch}: {}", wait.why),
            None => wait.why.clone(),
        });
    }
    PipelineStanding {
        pipeline: book.pipeline.id.clone(),
        health: health.to_owned(),
        fresh_to,
        epochs,
        raw_version: book.versions.0,
        main_version: book.versions.1,
        main_files: book.main_files.main_files,
        main_small_files: book.main_files.main_small_files,
        main_read_cost: book.main_files.main_read_cost,
        junk: book.junk.1,
        junk_names: book.junk.0.iter().cloned().collect(),
        settled_folders: book.settled_folders,
        why,
        error: book.error.clone(),
    }
}

/// What a run would do now, and why the rest waits.
pub fn plan_items(book: &Book, plan: &Plan, epochs: &[EpochStanding]) -> Vec<Value> {
    let id = &book.pipeline.id;
    let mut items: Vec<Value> = Vec::new();
    let mut add = |action: &str, epoch: Option<String>, why: &str| {
        items.push(json!({"pipeline": id, "action": action, "epoch": epoch, "why": why}));
    };
    if let Some(error) = &book.error {
        add("nothing", None, &error.to_string());
        return items;
    }
    for epoch in &plan.ingests {
        add("ingest, then merge", Some(epoch.to_string()), "complete and not in raw");
    }
    for epoch in plan.merge.iter().flatten() {
        add("merge", Some(epoch.to_string()), "in raw and not in main");
    }
    if plan.optimize {
        add("optimize", None, "small files of main");
    }
    if plan.cleanup {
        add("cleanup", None, "due");
    }
    for epoch in epochs {
        let is_due = plan.ingests.contains(&epoch.epoch);
        let is_next = epoch.state == "ready" && !is_due;
        if is_next || ["incomplete", "empty", "blocked", "parked"].contains(&epoch.state.as_str()) {
            let otherwise = match is_next {
                true if book.markers.is_held() => "the pipeline is paused",
                true => "lower epochs go first",
                false => epoch.state.as_str(),
            };
            let why = epoch.note.clone().unwrap_or_else(|| otherwise.to_owned());
            add("wait", Some(epoch.epoch.to_string()), &why);
        }
    }
    for wait in plan.waits.iter().filter(|wait| wait.epoch.is_none()) {
        add("wait", None, &wait.why);
    }
    items
}

/// Places folders that nothing is pinned of, by one listing each, and compares the newest others.
async fn look(book: &mut Book, listing: &Listing, now: DateTime<Utc>) {
    book.junk = (listing.junk.clone(), listing.junk_count);
    for (epoch, name) in &listing.files {
        if !listing.folders.contains_key(epoch) && !book.is_settled(*epoch) {
            let error = not_a_folder(&book.pipeline.source, name);
            show_blocked(book, *epoch, error);
        }
    }
    for (epoch, names) in &listing.folders {
        let is_known = book.entries.contains_key(epoch);
        if !is_known && book.is_settled(*epoch) {
            book.settled_folders += 1;
            continue;
        }
        let folder = names[0].clone();
        let ready = book.pipeline.ready.clone();
        let contents = if is_known { None } else { Some(book.source.contents(&folder).await) };
        let entry = book.entry(*epoch, State::Incomplete);
        entry.folder = Some(folder);
        let contents = match contents {
            None => continue,
            Some(Ok(contents)) => contents,
            Some(Err(error)) => {
                show_blocked(book, *epoch, unlistable(error));
                continue;
            }
        };
        entry.waiting_since = Some(now);
        if names.len() > 1 {
            show_blocked(book, *epoch, ambiguous(*epoch, names));
            continue;
        }
        let (state, why) = match readiness::judge(&ready, &contents, None, now) {
            Judgement::Empty => (State::Empty, Some("the folder has no data files".to_owned())),
            Judgement::Incomplete { why } => (State::Incomplete, Some(why)),
            Judgement::Settling { .. } => {
                (State::Incomplete, Some("a run watches whether it changes".to_owned()))
            }
            Judgement::Open => match incomplete_by_manifest(book, *epoch, &contents).await {
                Ok(None) => (State::Ready, None),
                Ok(why) => (State::Incomplete, why),
                Err(error) => {
                    show_blocked(book, *epoch, error);
                    continue;
                }
            },
        };
        let entry = book.entry(*epoch, State::Incomplete);
        (entry.state, entry.why) = (state, why);
    }
    mark_changes(book, listing).await;
}

/// Why the producer's manifest does not let the folder in yet. An error: it never will.
async fn incomplete_by_manifest(
    book: &Book,
    epoch: Epoch,
    contents: &Contents,
) -> Result<Option<String>> {
    let Ready::Manifest(name) = &book.pipeline.ready else { return Ok(None) };
    let known = book.entries.get(&epoch).and_then(|entry| entry.folder.clone());
    let folder = known.unwrap_or_else(|| epoch.to_string());
    let place = format!("{}/{folder}/{name}", book.pipeline.source);
    let body = book.source.read(&folder, name).await?;
    let selected = readiness::select(&body, contents, &place)?;
    Ok(selected.is_none().then(|| readiness::not_there_yet(name)))
}

/// Shows what a run would block, unless content is pinned already.
fn show_blocked(book: &mut Book, epoch: Epoch, error: Error) {
    let entry = book.entry(epoch, State::Incomplete);
    if entry.generation > 0 {
        entry.changed = Some(error.to_string());
        return;
    }
    entry.state = State::Blocked(Step::Ingest);
    entry.error = Some(error);
}

/// When epochs were merged, by the ledger's word. One that cannot be read takes times away, nothing
/// else.
pub async fn recall_processed(book: &mut Book, ledger: &Ledger) {
    let id = book.pipeline.id.replace('\'', "''");
    let sql = format!(
        "SELECT epoch, max(processed_at) AS at FROM t WHERE pipeline = '{id}' GROUP BY epoch"
    );
    let rows = ledger.select(LedgerTable::ProcessedFolders, &sql).await.unwrap_or_default();
    for row in &rows {
        let epoch = row["epoch"].as_i64().and_then(Epoch::new);
        if let (Some(epoch), Some(at)) = (epoch, row["at"].as_str()) {
            book.processed.insert(epoch, at.to_owned());
        }
    }
}

/// When the pipeline was last cleaned up, by the ledger's word.
pub async fn recall_cleanup(book: &mut Book, ledger: &Ledger) {
    let id = book.pipeline.id.replace('\'', "''");
    let sql = format!(
        "SELECT max(at) AS at FROM t \
         WHERE pipeline = '{id}' AND step = 'cleanup' AND verdict = 'done'"
    );
    let rows = ledger.select(LedgerTable::StepEvents, &sql).await.unwrap_or_default();
    let at = rows.first().and_then(|row| row["at"].as_str()).map(DateTime::parse_from_rfc3339);
    book.cleaned_at = at.and_then(std::result::Result::ok).map(|at| at.with_timezone(&Utc));
}

/// The ledger's word about epochs that wait for a person: an epoch whose last event blocked it.
pub async fn recall_blocked(book: &mut Book, ledger: &Ledger) {
    let id = book.pipeline.id.replace('\'', "''");
    let sql = format!(
        "SELECT epoch, generation, verdict, step, code, message, help FROM (SELECT *, row_number() OVER \
         (PARTITION BY epoch ORDER BY at DESC) AS rank FROM t \
         WHERE pipeline = '{id}' AND epoch IS NOT NULL) WHERE rank = 1 AND verdict IN ('blocked', 'parked')"
    );
    let rows = ledger.select(LedgerTable::StepEvents, &sql).await.unwrap_or_default();
    for row in &rows {
        recall(book, row);
    }
}

fn recall(book: &mut Book, row: &Value) {
    let Some(epoch) = row["epoch"].as_i64().and_then(Epoch::new) else { return };
    let Some(entry) = book.entries.get_mut(&epoch) else { return };
    let code = row["code"].as_str().and_then(alluvium_protocol::Code::parse);
    let step = match row["step"].as_str() {
        Some("ingest") => Step::Ingest,
        Some("merge") => Step::Merge,
        _ => return,
    };
    let is_still_there = match step {
        Step::Ingest => entry.state == State::Ready,
        _ => entry.state == State::Ingested,
    };
    let is_same_content = row["generation"].as_i64() == Some(entry.generation);
    let Some(code) = code.filter(|_| is_still_there && is_same_content) else { return };
    if code == alluvium_protocol::Code::FolderChanged {
        return;
    }
    let message = row["message"].as_str().unwrap_or("").to_owned();
    let help = row["help"].as_str().map(str::to_owned);
    let is_parked = row["verdict"] == "parked";
    entry.state = if is_parked { State::Parked(step) } else { State::Blocked(step) };
    entry.error = Some(Error { code, message, help });
}
