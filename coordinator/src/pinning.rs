//! Pinning: a complete folder's second listing, stored as the manifest of the epoch's next generation.
//!
//! Owns: which content a generation gets, and what that does to the book. Never: decides whether a
//! folder is complete.

use std::collections::{BTreeMap, BTreeSet};

use alluvium_protocol::manifest::{Manifest, Object, Reason, Repairs};
use alluvium_protocol::marker::Generation;
use alluvium_protocol::metrics::metrics;
use alluvium_protocol::pipeline::{Format, Ready};
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::Work;
use alluvium_protocol::{Code, Epoch, Error, Result};
use chrono::{DateTime, Utc};

use crate::book::Book;
use crate::manifests::Pinned;
use crate::readiness;
use crate::requests::Request;

/// What a complete folder gave.
pub(crate) enum Gathered {
    /// Its content is pinned.
    Pinned(Box<Pinned>),
    /// Files that the producer's manifest names are not there yet.
    Missing(String),
}

/// Makes the second listing and pins it as the epoch's content at the next generation.
pub async fn pin_folder(
    book: &mut Book,
    epoch: Epoch,
    folder: &str,
    reason: Reason,
    request: Option<&Request>,
    now: DateTime<Utc>,
) -> Result<()> {
    let gathered = gather(book, epoch, folder, reason, request, now).await?;
    note_gathered(book, epoch, gathered, now)
}

/// The effects of [`pin_folder`], without the book's part in it.
pub(crate) async fn gather(
    book: &Book,
    epoch: Epoch,
    folder: &str,
    reason: Reason,
    request: Option<&Request>,
    now: DateTime<Utc>,
) -> Result<Gathered> {
    let produced = match &book.pipeline.ready {
        Ready::Manifest(name) => match book.source.read(folder, name).await {
            Ok(body) => Some((name.clone(), body)),
            Err(error) if request.is_some() => {
                return Err(Error::new(Code::NotPossibleNow, error.message));
            }
            Err(error) => return Err(error),
        },
        Ready::Marker(_) | Ready::Quiet(_) => None,
    };
    // Begun after the sign of completeness was seen: it sees every file that was there before it.
    let contents = book.source.contents(folder).await?;
    if book.pipeline.content.format != Format::Delta
        && contents.others.iter().any(|name| name.starts_with("_delta_log/"))
    {
        let text = format!(
            "{folder} is a Delta table: some of its files may be dead, and only its log tells"
        );
        let help = format!("set format = \"delta\" in pipeline.{}", book.pipeline.id);
        return Err(Error::new(Code::FileUnreadable, text).with_help(help));
    }
    let objects = match produced {
        None => contents.objects,
        Some((name, body)) => {
            let place = format!("{}/{folder}/{name}", book.pipeline.source);
            match readiness::select(&body, &contents, &place)? {
                Some(objects) => objects,
                None if request.is_some() => {
                    let text = format!("files that {place} names are not there");
                    return Err(Error::new(Code::NotPossibleNow, text));
                }
                None => return Ok(Gathered::Missing(readiness::not_there_yet(&name))),
            }
        }
    };
    if objects.is_empty() {
        let (id, text) = (&book.pipeline.id, format!("{folder} has no data files"));
        return Err(Error::new(Code::NotPossibleNow, text).with_help(format!(
            "deliver its files; or take what it said before out of main: `alluvium undo {id} {epoch}`"
        )));
    }
    let pinned = store(book, epoch, folder, reason, request, objects, now).await?;
    Ok(Gathered::Pinned(Box::new(pinned)))
}

pub(crate) fn note_gathered(
    book: &mut Book,
    epoch: Epoch,
    gathered: Gathered,
    now: DateTime<Utc>,
) -> Result<()> {
    match gathered {
        Gathered::Pinned(pinned) => note_pinned(book, epoch, *pinned, now),
        Gathered::Missing(why) => {
            book.entry(epoch, State::Incomplete).why = Some(why);
            Ok(())
        }
    }
}

/// Pins content and moves the epoch to `Ready`.
pub async fn pin(
    book: &mut Book,
    epoch: Epoch,
    folder: &str,
    reason: Reason,
    request: Option<&Request>,
    objects: Vec<Object>,
    now: DateTime<Utc>,
) -> Result<()> {
    let pinned = store(book, epoch, folder, reason, request, objects, now).await?;
    note_pinned(book, epoch, pinned, now)
}

/// Stores the manifest of the next generation, or finds who took it.
async fn store(
    book: &Book,
    epoch: Epoch,
    folder: &str,
    reason: Reason,
    request: Option<&Request>,
    objects: Vec<Object>,
    now: DateTime<Utc>,
) -> Result<Pinned> {
    let known = book.entries.get(&epoch).map_or(0, |entry| entry.generation);
    let repairs = repairs_of(book, epoch, known, &objects, request).await?;
    let mut manifest = Manifest {
        pipeline: book.pipeline.id.clone(),
        epoch,
        generation: known.max(book.markers.generation(epoch)) + 1,
        folder: folder.to_owned(),
        reason,
        request: request.map(|request| request.id.clone()),
        pinned_at: now,
        objects,
        repairs,
    };
    loop {
        let pinned = book.manifests.store(manifest.clone()).await?;
        // The generation went to somebody else's content. An arrival can do with that; what a
        // person asked for comes after it.
        if request.is_none() || pinned.manifest.request == manifest.request {
            return Ok(pinned);
        }
        manifest.generation += 1;
    }
}

/// Rows that somebody corrected: those of the generation before, of files that are the same, and the
/// ones that are asked for now.
async fn repairs_of(
    book: &Book,
    epoch: Epoch,
    before: Generation,
    objects: &[Object],
    request: Option<&Request>,
) -> Result<Repairs> {
    let mut repairs = Repairs::new();
    let mut changed: BTreeSet<String> = BTreeSet::new();
    let mut generation = before;
    while generation > 0 {
        // A manifest that cannot be read has no say; nor has one that is empty by request. A rollback
        // raises the generation without one.
        let loaded = book.manifests.load(epoch, generation).await;
        generation -= 1;
        let Ok(loaded) = loaded else { break };
        let Some(pinned) = loaded else { continue };
        if !pinned.manifest.reason.is_empty_content() {
            let was = pinned.manifest.objects;
            let is_same = |file: &String| {
                let now = objects.iter().find(|object| object.name == *file);
                let then = was.iter().find(|object| object.name == *file);
                now.zip(then).is_some_and(|(a, b)| {
                    a.size == b.size
                        && a.etag == b.etag
                        && (a.etag.is_some() || a.modified == b.modified)
                })
            };
            repairs = pinned.manifest.repairs;
            let held = count_of(&repairs);
            repairs.retain(|file, _| is_same(file));
            let dropped = held - count_of(&repairs);
            if dropped > 0 && !objects.is_empty() {
                tracing::warn!(
                    "{} {epoch}: {dropped} corrected row(s) no longer apply: their files changed",
                    book.pipeline.id
                );
            }
            changed =
                was.iter().map(|object| object.name.clone()).filter(|f| !is_same(f)).collect();
            break;
        }
    }
    for (file, rows) in request.into_iter().flat_map(|request| &request.repairs) {
        // They were made from other content: at their places there is somebody else's row now.
        if changed.contains(file) {
            tracing::warn!(
                "{} {epoch}: {file} changed since its rows were read: its corrections are left out",
                book.pipeline.id
            );
            continue;
        }
        let held = repairs.entry(file.clone()).or_default();
        for (row, content) in rows {
            match content {
                None => drop(held.remove(row)),
                content => drop(held.insert(*row, content.clone())),
            }
        }
    }
    repairs
        .retain(|file, rows| !rows.is_empty() && objects.iter().any(|object| object.name == *file));
    Ok(repairs)
}

fn count_of(repairs: &Repairs) -> usize {
    repairs.values().map(BTreeMap::len).sum()
}

fn note_pinned(book: &mut Book, epoch: Epoch, pinned: Pinned, now: DateTime<Utc>) -> Result<()> {
    let entry = book.entry(epoch, State::Incomplete);
    entry.apply(Event::ContentPinned)?;
    entry.generation = pinned.manifest.generation;
    entry.manifest_hash = Some(pinned.hash);
    entry.folder = Some(pinned.manifest.folder);
    entry.is_empty = pinned.manifest.reason.is_empty_content();
    entry.waiting_since = None;
    entry.why = None;
    entry.settles_at = None;
    entry.changed = None;
    entry.found_at = Some(now);
    entry.last_sent = None;
    book.last_arrival = Some(now);
    metrics().discovered(&book.pipeline.id);
    crate::tracing_runs::found(book, epoch, now);
    Ok(())
}

/// The ingest task of a pinned epoch.
pub async fn ingest_work(book: &mut Book, epoch: Epoch) -> Result<Work> {
    let known = book.entries.get(&epoch);
    let generation = known.map_or(0, |entry| entry.generation);
    let hash = match known.and_then(|entry| entry.manifest_hash.clone()) {
        Some(hash) => hash,
        None => {
            let pinned = book.manifests.load(epoch, generation).await?.ok_or_else(|| {
                let text =
                    format!("the manifest of epoch {epoch}, generation {generation}, is gone");
                Error::new(Code::StorageUnavailable, text)
            })?;
            if let Some(entry) = book.entries.get_mut(&epoch) {
                entry.manifest_hash = Some(pinned.hash.clone());
            }
            pinned.hash
        }
    };
    Ok(Work::Ingest {
        epoch,
        generation,
        manifest: Manifest::path(&book.pipeline.id, epoch, generation),
        manifest_hash: hash,
    })
}
