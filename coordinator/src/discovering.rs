//! One discovery of one pipeline: listing, readiness, second listing, pinned manifest.
//!
//! Owns: the order of these effects, and what a listing does to the book. A folder that cannot be
//! used blocks its own epoch; a source that cannot be listed stops only its pipeline.

use std::collections::HashMap;

use alluvium_protocol::manifest::{Manifest, Object, Reason};
use alluvium_protocol::marker::Generation;
use alluvium_protocol::pipeline::Ready;
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::Step;
use alluvium_protocol::{Code, Epoch, Error, Result};
use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt};
use tokio::sync::mpsc;

use crate::book::{Book, Entry};
use crate::discovery::{Contents, Listing};
use crate::notice::Notice;
use crate::pinning::{Gathered, gather, note_gathered};
use crate::readiness::{self, Judgement, Quiet};

/// Processed folders compared with their manifests at each discovery, newest first: a bound on
/// the listings that watching for changes costs.
const CHANGE_CHECKS_MAX: usize = 50;
/// Pause between two such comparisons: each folder costs a listing.
const CHANGE_CHECK_EVERY: chrono::Duration = chrono::Duration::seconds(30);
/// Listings, or pinned manifests, under way at a time.
const AT_ONCE: usize = 16;

/// A folder that is complete: its content is to be pinned.
struct Complete {
    epoch: Epoch,
    folder: String,
    reason: Reason,
}

/// Discovers one pipeline.
pub async fn discover(
    book: &mut Book,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) {
    if let Err(error) = try_discover(book, now, notices).await {
        let is_news = book.told.as_ref() != Some(&error);
        book.error = Some(error.clone());
        book.told = Some(error.clone());
        if is_news {
            tracing::error!(pipeline = book.pipeline.id, %error, "pipeline cannot go on");
            let text = with_help(&error);
            let _ = notices.send(Notice::Warning { pipeline: book.pipeline.id.clone(), text });
        }
    }
}

fn with_help(error: &Error) -> String {
    match &error.help {
        Some(help) => format!("{error}; {help}"),
        None => error.to_string(),
    }
}

async fn try_discover(
    book: &mut Book,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<()> {
    if book.error.is_some() {
        book.read_tables().await?;
    }
    let listing = book.source.list().await?;
    book.listed_at = Some(now);
    book.is_woken = false;
    book.error = None;
    book.told = None;
    note_junk(book, &listing, notices);
    book.settled_folders = 0;
    for (epoch, name) in &listing.files {
        if !listing.folders.contains_key(epoch) && !book.is_settled(*epoch) {
            let error = not_a_folder(&book.pipeline.source, name);
            block(book, *epoch, error, now, notices);
        }
    }
    let mut seen = contents_of_folders(book, &listing).await;
    let mut complete = Vec::new();
    for (epoch, names) in &listing.folders {
        match look_at(book, *epoch, names, seen.remove(epoch), now, notices).await {
            Ok(found) => complete.extend(found),
            Err(error) => block_or_fail(book, *epoch, error, now, notices)?,
        }
    }
    let mut noted = Ok(());
    for (epoch, gathered) in gather_all(book, complete, now).await {
        let one = gathered.and_then(|gathered| note_gathered(book, epoch, gathered, now));
        if let Err(error) = one {
            // The others are pinned: they are noted before this discovery may fail.
            noted = noted.and(block_or_fail(book, epoch, error, now, notices));
        }
    }
    noted?;
    forget_vanished(book, &listing);
    look_for_changes(book, &listing, now, notices).await?;
    let (waiting, known) = (book.waiting(), book.entries.len());
    let pipeline = book.pipeline.id.clone();
    let _ = notices.send(Notice::Discovered { pipeline, waiting, known });
    Ok(())
}

/// Processed folders that are no longer what was read: told, and read again if that is wished.
async fn look_for_changes(
    book: &mut Book,
    listing: &Listing,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<()> {
    let settles = |entry: &Entry| entry.changed.is_some() && entry.settles_at.is_some();
    let is_due = book.compared_at.is_none_or(|at| now - at >= CHANGE_CHECK_EVERY)
        || book.entries.values().any(settles);
    if !is_due {
        return Ok(());
    }
    book.compared_at = Some(now);
    // Who still settles is found again below: nothing else waits for a second look at these.
    book.entries.values_mut().filter(|entry| entry.state.is_end()).for_each(|entry| {
        entry.settles_at = None;
    });
    let changes = mark_changes(book, listing).await;
    for change in changes.iter().filter(|change| change.is_new) {
        let text = change.text.clone();
        let _ = notices.send(Notice::Warning { pipeline: book.pipeline.id.clone(), text });
    }
    // A rollback gives out generations, too.
    if !book.policy.replay_changed || book.restoring.is_some() {
        return Ok(());
    }
    let mut complete = Vec::new();
    for Change { epoch, folder, contents, .. } in changes {
        // What lies below `start_from`, or what raw lost, cannot be taken back.
        if book.is_settled(epoch) || book.markers.is_lost(epoch) {
            continue;
        }
        let ready = book.pipeline.ready.clone();
        let entry = book.entry(epoch, State::Processed);
        match readiness::judge(&ready, &contents, entry.quiet.as_ref(), now) {
            Judgement::Open => {
                complete.push(Complete { epoch, folder, reason: Reason::Changed });
            }
            Judgement::Settling { until, quiet } => settle(entry, until, quiet),
            Judgement::Empty | Judgement::Incomplete { .. } => entry.quiet = None,
        }
    }
    for (epoch, gathered) in gather_all(book, complete, now).await {
        book.entry(epoch, State::Processed).quiet = None;
        match gathered.and_then(|gathered| note_gathered(book, epoch, gathered, now)) {
            Err(error) if error.class() != alluvium_protocol::Class::Permanent => {
                return Err(error);
            }
            // It stays told as changed, and what was read stays in main.
            Err(error) => tracing::warn!(%error, %epoch, "a changed folder is not read again"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// What concerns one folder blocks its epoch; what may pass stops this discovery.
fn block_or_fail(
    book: &mut Book,
    epoch: Epoch,
    error: Error,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<()> {
    if error.class() != alluvium_protocol::Class::Permanent {
        return Err(error);
    }
    block(book, epoch, error, now, notices);
    Ok(())
}

/// Lists the folders that are to be looked at, side by side: far storage takes its time for each.
async fn contents_of_folders(book: &Book, listing: &Listing) -> HashMap<Epoch, Result<Contents>> {
    let is_wanted = |epoch: &Epoch| match book.entries.get(epoch) {
        Some(entry) => wants_listing(entry.state),
        None => !book.is_settled(*epoch),
    };
    let mut listings = Vec::new();
    for (epoch, names) in &listing.folders {
        if let [name] = names.as_slice()
            && is_wanted(epoch)
        {
            let (epoch, source) = (*epoch, &book.source);
            listings.push(async move { (epoch, source.contents(name).await) }.boxed());
        }
    }
    futures::stream::iter(listings).buffer_unordered(AT_ONCE).collect().await
}

fn wants_listing(state: State) -> bool {
    match state {
        State::Empty | State::Incomplete => true,
        // A folder that changed since it blocked the epoch is tried again by itself.
        State::Blocked(Step::Ingest) => true,
        _ => false,
    }
}

/// Gathers and pins the content of complete folders, side by side.
async fn gather_all(
    book: &Book,
    complete: Vec<Complete>,
    now: DateTime<Utc>,
) -> Vec<(Epoch, Result<Gathered>)> {
    let mut gathering = Vec::with_capacity(complete.len());
    for Complete { epoch, folder, reason } in complete {
        let one = async move { (epoch, gather(book, epoch, &folder, reason, None, now).await) };
        gathering.push(one.boxed());
    }
    futures::stream::iter(gathering).buffered(AT_ONCE).collect().await
}

fn note_junk(book: &mut Book, listing: &Listing, notices: &mpsc::UnboundedSender<Notice>) {
    if book.junk.1 != listing.junk_count && listing.junk_count > 0 {
        let names: Vec<&str> = listing.junk.iter().map(String::as_str).collect();
        let text = format!(
            "{} name(s) in {} are no epochs and are left alone: {}",
            listing.junk_count,
            book.pipeline.source,
            names.join(", ")
        );
        let _ = notices.send(Notice::Warning { pipeline: book.pipeline.id.clone(), text });
    }
    book.junk = (listing.junk.clone(), listing.junk_count);
}

/// Something that is not a folder has an epoch's name.
pub(crate) fn not_a_folder(source: &str, name: &str) -> Error {
    let text = format!("{source}/{name} is a file; an epoch is a folder");
    let help = format!("move the file into a folder of that name, or away: `{name}/…`");
    Error::new(Code::EpochNotAFolder, text).with_help(help)
}

/// Several folders are one number.
pub(crate) fn ambiguous(epoch: Epoch, names: &[String]) -> Error {
    let text = format!("the folders {} are one epoch, {epoch}", names.join(" and "));
    let help = "keep one of them, move the other's files into it or away";
    Error::new(Code::AmbiguousFolder, text).with_help(help)
}

/// Looks at one epoch's folder and moves the book accordingly.
async fn look_at(
    book: &mut Book,
    epoch: Epoch,
    names: &[String],
    contents: Option<Result<Contents>>,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<Option<Complete>> {
    if book.is_settled(epoch) && !book.entries.contains_key(&epoch) {
        book.settled_folders += 1;
        return Ok(None);
    }
    let is_known = book.entries.contains_key(&epoch);
    let entry = book.entry(epoch, State::Incomplete);
    if !is_known {
        entry.waiting_since = Some(now);
    }
    if names.len() > 1 {
        return Err(ambiguous(epoch, names));
    }
    entry.folder = Some(names[0].clone());
    match contents.filter(|_| wants_listing(entry.state)) {
        // The source was listed a moment ago: what fails now is this folder's affair.
        Some(contents) => {
            examine(book, epoch, &names[0], &contents.map_err(unlistable)?, now, notices).await
        }
        None => Ok(None),
    }
}

pub(crate) fn unlistable(error: Error) -> Error {
    match error.code {
        Code::SourceUnreadable | Code::StorageUnavailable => {
            Error::new(Code::FileUnreadable, error.message)
                .with_help("repair the folder: it is looked at again by itself")
        }
        _ => error,
    }
}

/// A folder wants its second look. One second chance per discovery run: a folder that changed while it
/// was watched is found again later.
fn settle(entry: &mut Entry, until: DateTime<Utc>, quiet: Quiet) {
    if entry.quiet.as_ref().is_none_or(|earlier| *earlier == quiet) {
        entry.settles_at = Some(until);
    }
    entry.quiet = Some(quiet);
}

/// Judges a folder that is not pinned yet, or whose pinned content could not be read.
async fn examine(
    book: &mut Book,
    epoch: Epoch,
    folder: &str,
    contents: &Contents,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<Option<Complete>> {
    let state = book.entries[&epoch].state;
    if state.is_stopped() {
        return examine_blocked(book, epoch, contents, now).await;
    }
    let earlier = book.entries[&epoch].quiet.clone();
    let judgement = readiness::judge(&book.pipeline.ready, contents, earlier.as_ref(), now);
    let pipeline = book.pipeline.id.clone();
    let entry = book.entry(epoch, State::Incomplete);
    entry.settles_at = None;
    let (event, why) = match judgement {
        Judgement::Empty => (Event::FolderEmpty, "the folder has no data files".to_owned()),
        Judgement::Incomplete { why } => (Event::FolderIncomplete, why),
        Judgement::Settling { until, quiet } => {
            settle(entry, until, quiet);
            (Event::FolderIncomplete, "it is being watched for changes".to_owned())
        }
        Judgement::Open => {
            entry.quiet = None;
            let folder = folder.to_owned();
            return Ok(Some(Complete { epoch, folder, reason: Reason::Arrival }));
        }
    };
    entry.apply(event)?;
    if entry.why.as_ref() != Some(&why) {
        entry.why = Some(why.clone());
        let _ = notices.send(Notice::EpochWaits { pipeline, epoch, why });
    }
    Ok(None)
}

/// A blocked epoch whose folder is no longer what was pinned goes on with new content.
async fn examine_blocked(
    book: &mut Book,
    epoch: Epoch,
    contents: &Contents,
    now: DateTime<Utc>,
) -> Result<Option<Complete>> {
    if book.restoring.is_some() {
        // A rollback gives out generations, too.
        return Ok(None);
    }
    let generation = book.entries[&epoch].generation;
    let pinned = match generation {
        0 => None,
        generation => book.manifests.load(epoch, generation).await?,
    };
    // A person asked for empty content: the folder's files have no say.
    if pinned.as_ref().is_some_and(|pinned| pinned.manifest.reason.is_empty_content()) {
        return Ok(None);
    }
    let is_same =
        pinned.is_some_and(|pinned| is_as_read(&book.pipeline.ready, &pinned.manifest, contents));
    let is_changed = generation > 0 && !is_same;
    // Blocked before anything was pinned (two folders, a file): the cause may be gone.
    if !is_changed && generation > 0 {
        return Ok(None);
    }
    let entry = &book.entries[&epoch];
    match readiness::judge(&book.pipeline.ready, contents, entry.quiet.as_ref(), now) {
        Judgement::Open => {}
        Judgement::Settling { until, quiet } => {
            let entry = book.entry(epoch, State::Incomplete);
            entry.settles_at = None;
            settle(entry, until, quiet);
            return Ok(None);
        }
        Judgement::Empty | Judgement::Incomplete { .. } => return Ok(None),
    }
    let reason = if generation == 0 { Reason::Arrival } else { Reason::Changed };
    let folder = book.entries[&epoch].folder.clone().unwrap_or_default();
    Ok(Some(Complete { epoch, folder, reason }))
}

/// The folder still holds what was pinned. A producer's manifest may name only some of its files.
fn is_as_read(ready: &Ready, pinned: &Manifest, contents: &Contents) -> bool {
    let is_same = |a: &Object, b: &Object| a.name == b.name && a.size == b.size && a.etag == b.etag;
    let is_there = |a: &Object| contents.objects.iter().any(|b| is_same(a, b));
    let has_more = contents.objects.len() > pinned.objects.len();
    pinned.objects.iter().all(is_there) && (matches!(ready, Ready::Manifest(_)) || !has_more)
}

/// Blocks an epoch whose folder cannot be used; told once.
fn block(
    book: &mut Book,
    epoch: Epoch,
    error: Error,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) {
    let entry = book.entry(epoch, State::Incomplete);
    // What is pinned counts, be it a skip: the folder is only looked at, then.
    if entry.generation > 0 && !entry.state.is_stopped() {
        entry.changed = Some(error.to_string());
        return;
    }
    stop(book, epoch, Step::Ingest, error, now, notices);
}

/// Blocks an epoch at a step that has no result to say why; told once.
pub fn stop(
    book: &mut Book,
    epoch: Epoch,
    step: Step,
    error: Error,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) {
    let pipeline = book.pipeline.id.clone();
    let entry = book.entry(epoch, State::Incomplete);
    let is_news = entry.error.as_ref() != Some(&error);
    if entry.apply(Event::Blocked(step)).is_err() {
        return;
    }
    entry.settles_at = None;
    entry.error = Some(error.clone());
    let generation = entry.generation;
    crate::tracing_runs::ended(book, epoch, Some(&error), now);
    if is_news {
        book.events.push(serde_json::json!({
            "at": now.to_rfc3339(), "pipeline": pipeline, "epoch": epoch, "generation": generation,
            "step": step, "attempt": 0, "verdict": "blocked", "code": error.code,
            "message": error.message, "help": error.help,
        }));
        let _ = notices.send(Notice::EpochBlocked { pipeline, epoch, step, error });
    }
}

/// Epochs whose folder went away before anything was pinned are no epochs any more.
fn forget_vanished(book: &mut Book, listing: &Listing) {
    book.entries.retain(|epoch, entry| {
        let is_listed = listing.folders.contains_key(epoch) || listing.files.contains_key(epoch);
        let is_unpinned = entry.generation == 0
            && matches!(
                entry.state,
                State::Empty | State::Incomplete | State::Blocked(Step::Ingest)
            );
        is_listed || !is_unpinned
    });
}

/// A processed folder that no longer holds what was read.
pub(crate) struct Change {
    epoch: Epoch,
    folder: String,
    contents: Contents,
    /// It was not told so far.
    is_new: bool,
    /// What is told.
    pub(crate) text: String,
}

/// A processed folder beside what was read of it.
enum Compared {
    Same,
    /// A damaged manifest, a folder that cannot be listed: it is left to who asks for it again.
    Unknown,
    Changed(Contents, String),
}

async fn change_of(book: &Book, epoch: Epoch, folder: &str, generation: Generation) -> Compared {
    let Ok(Some(pinned)) = book.manifests.load(epoch, generation).await else {
        return Compared::Unknown;
    };
    if pinned.manifest.reason.is_empty_content() {
        return Compared::Same;
    }
    let Ok(contents) = book.source.contents(folder).await else { return Compared::Unknown };
    let id = &book.pipeline.id;
    if is_as_read(&book.pipeline.ready, &pinned.manifest, &contents) {
        return Compared::Same;
    }
    let text = match book.policy.replay_changed {
        _ if contents.objects.is_empty() => format!(
            "folder {folder} lost all its files; what was read stays: `alluvium undo {id} {epoch}` \
             takes it out of main"
        ),
        true => format!("folder {folder} changed after it was read; it is read again"),
        false => format!(
            "folder {folder} changed after it was read; `alluvium replay {id} {epoch}` reads it again"
        ),
    };
    Compared::Changed(contents, text)
}

/// Marks processed epochs whose folders changed; returns those that were not marked before and, where
/// they are to be read again, the others.
pub(crate) async fn mark_changes(book: &mut Book, listing: &Listing) -> Vec<Change> {
    for (epoch, names) in listing.folders.iter().filter(|(_, names)| names.len() > 1) {
        if let Some(entry) = book.entries.get_mut(epoch).filter(|e| e.state == State::Processed) {
            entry.changed = Some(ambiguous(*epoch, names).message);
        }
    }
    let is_wanted = |entry: &Entry| entry.changed.is_none() || book.policy.replay_changed;
    let candidates: Vec<(Epoch, String, Generation)> = book
        .entries
        .iter()
        .rev()
        .filter(|(_, entry)| entry.state == State::Processed && is_wanted(entry))
        .filter_map(|(epoch, entry)| {
            // Of two folders of one number neither is taken for the other.
            let [name] = listing.folders.get(epoch)?.as_slice() else { return None };
            // A rollback raises the generation, not the content.
            let content = book.markers.ingest.get(epoch).copied().unwrap_or(entry.generation);
            Some((*epoch, name.clone(), content))
        })
        .take(CHANGE_CHECKS_MAX)
        .collect();
    let mut comparing = Vec::with_capacity(candidates.len());
    for (epoch, folder, generation) in candidates {
        let book = &*book;
        let one = async move {
            let found = change_of(book, epoch, &folder, generation).await;
            (epoch, folder, found)
        };
        comparing.push(one.boxed());
    }
    let compared: Vec<_> = futures::stream::iter(comparing).buffered(AT_ONCE).collect().await;
    let mut found = Vec::new();
    for (epoch, folder, change) in compared {
        let entry = book.entry(epoch, State::Processed);
        let (contents, text) = match change {
            Compared::Changed(contents, text) => (contents, text),
            Compared::Same => {
                (entry.changed, entry.quiet) = (None, None);
                continue;
            }
            Compared::Unknown => continue,
        };
        let is_new = entry.changed.replace(text.clone()).is_none();
        found.push(Change { epoch, folder, contents, is_new, text });
    }
    found
}
