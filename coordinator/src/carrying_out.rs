//! How a request takes effect: by new content for an epoch, or by a commit on main.

use alluvium_protocol::manifest::Reason;
use alluvium_protocol::marker::{Markers, hold_app_id};
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::{Class, Code, Epoch, Error, Result, crash};
use alluvium_table::Table;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::pause::Pauses;

use crate::book::Book;
use crate::notice::Notice;
use crate::pinning::{pin, pin_folder};
use crate::requests::{Request, Requests, Verb};
use crate::restoring;
use crate::run::Coordinator;

/// How long a hold is tried against other writers of main.
const HOLD_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

impl Coordinator {
    /// Carries out one request and removes it. What cannot be done is told and removed; what may
    /// work later stays.
    pub(crate) async fn carry_out(&mut self, request: &Request) {
        let outcome = self.try_carry_out(request).await;
        let error = match outcome {
            // Carried out by its task, whose result removes the request.
            Ok(()) if request.verb == Verb::Rollback => return,
            Ok(()) => None,
            Err(error) if error.class() == Class::Permanent => Some(error),
            Err(error) => {
                tracing::warn!(%error, request = request.id, "a request waits");
                return;
            }
        };
        if let Some(error) = error {
            let text = format!("{} was refused: {error}", request.verb.as_str());
            let _ = self.notices.send(Notice::Warning { pipeline: request.pipeline.clone(), text });
            self.refused.push((request.id.clone(), error));
        }
        let done = match crash::point("request.after_carried_out") {
            Ok(()) => match Requests::open(&self.settings.state) {
                Ok(requests) => requests.done(&request.id).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            tracing::warn!(%error, request = request.id, "a request is carried out again");
        }
    }

    async fn try_carry_out(&mut self, request: &Request) -> Result<()> {
        let now = self.clock.now();
        let found = self.books.iter_mut().find(|book| book.pipeline.id == request.pipeline);
        let book = found.ok_or_else(|| {
            Error::new(Code::UnknownPipeline, format!("no pipeline {:?}", request.pipeline))
        })?;
        let epoch = || {
            request
                .epoch
                .ok_or_else(|| Error::new(Code::UnknownEpoch, "the request names no epoch"))
        };
        match request.verb {
            Verb::Pause => hold(book, true).await,
            Verb::Resume => hold(book, false).await,
            Verb::Rollback => restoring::begin(book, request),
            Verb::Retry => retry(book, epoch()?),
            Verb::Skip | Verb::Undo | Verb::Replay => {
                new_content(book, request, epoch()?, now).await
            }
        }
    }
}

fn retry(book: &mut Book, epoch: Epoch) -> Result<()> {
    match book.entries.get_mut(&epoch) {
        Some(entry) if entry.state.is_stopped() => entry.apply(Event::RetryAsked),
        // Not stopped: it is tried anyway.
        _ => Ok(()),
    }
}

async fn new_content(
    book: &mut Book,
    request: &Request,
    epoch: Epoch,
    now: chrono::DateTime<chrono::Utc>,
) -> Result<()> {
    if book.is_settled(epoch) {
        let text = format!("epoch {epoch} lies below the floor or `start_from`: it is settled");
        return Err(Error::new(Code::EpochSettled, text));
    }
    let known = book.entries.get(&epoch);
    let generation = known.map_or(0, |entry| entry.generation);
    let pinned = match book.manifests.load(epoch, generation).await {
        // What cannot be read answers no request; new content replaces it.
        Err(error) if error.code == Code::ManifestInvalid => None,
        loaded => loaded?,
    };
    if let Some(pinned) = pinned {
        let manifest = &pinned.manifest;
        // Carried out before, by a process that died before it removed the request.
        if manifest.request.as_deref() == Some(&request.id) {
            return Ok(());
        }
        // Already empty by request: nothing to take back.
        if request.verb != Verb::Replay && manifest.reason.is_empty_content() {
            return Ok(());
        }
    }
    let folder = match known.and_then(|entry| entry.folder.clone()) {
        Some(folder) => folder,
        None => match folder_of(book, epoch).await? {
            Some(folder) => folder,
            // A folder that went away, of an epoch that is known from the tables.
            None if known.is_some() => epoch.to_string(),
            None => {
                let text = format!("{} knows no epoch {epoch}", book.pipeline.id);
                return Err(Error::new(Code::UnknownEpoch, text));
            }
        },
    };
    let reason = match request.verb {
        Verb::Replay => Reason::Replay,
        Verb::Skip => Reason::Skip,
        _ => Reason::Undo,
    };
    book.entry(epoch, State::Incomplete);
    match request.verb {
        Verb::Replay => pin_folder(book, epoch, &folder, reason, Some(request), now).await,
        _ => pin(book, epoch, &folder, reason, Some(request), Vec::new(), now).await,
    }
}

async fn folder_of(book: &Book, epoch: Epoch) -> Result<Option<String>> {
    let listing = book.source.list().await?;
    Ok(listing.folders.get(&epoch).and_then(|names| names.first().cloned()))
}

/// Pauses or resumes by a marker in main: losing the state folder changes nothing.
async fn hold(book: &mut Book, wanted: bool) -> Result<()> {
    let Some(mut main) = Table::open(&book.pipeline.main).await? else {
        let text = format!("{} does not exist yet: there is nothing to pause", book.pipeline.main);
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help("pause after the first epoch, or do not start the pipeline"));
    };
    let id = book.pipeline.id.clone();
    let mut pauses = Pauses::for_at_most(HOLD_PATIENCE);
    loop {
        let markers = Markers::of_pipeline(&id, main.transactions());
        if markers.is_held() == wanted {
            book.markers.hold = markers.hold;
            return Ok(());
        }
        let marker = Marker { app_id: hold_app_id(&id), version: markers.hold + 1 };
        let change = Change {
            operation: Operation::Merge,
            adds: Vec::new(),
            removes: Vec::new(),
            others: Vec::new(),
            markers: vec![marker],
            info: serde_json::json!({"pipeline": id, "step": "hold", "hold": wanted}),
        };
        crash::point("hold.before_commit")?;
        match main.commit(change).await? {
            CommitOutcome::Landed => crash::point("hold.after_commit")?,
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => main.refresh().await?,
        }
    }
}
