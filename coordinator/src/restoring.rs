//! A rollback on its way: asked for, published as a task, and what its result does to the book.

use alluvium_protocol::retry::{Limits, delay};
use alluvium_protocol::task::{Report, RestoreTo, TaskResult, Verdict, Work};
use alluvium_protocol::{Class, Code, Error, Result};
use chrono::{DateTime, Utc};

use crate::book::Book;
use crate::notice::Notice;
use crate::requests::{Request, Requests};
use crate::run::Coordinator;

/// A rollback that was asked for and is not done.
#[derive(Clone, Debug)]
pub struct Restoring {
    /// The request's id.
    pub request: String,
    /// The point.
    pub to: RestoreTo,
    /// Failed attempts.
    pub failures: u32,
    /// The next attempt waits until then.
    pub not_before: Option<DateTime<Utc>>,
}

impl Restoring {
    /// What is to be done.
    pub fn work(&self) -> Work {
        Work::Restore { to: self.to, request: self.request.clone() }
    }
}

/// Notes the request; the loop publishes it when nobody else rewrites main.
pub(crate) fn begin(book: &mut Book, request: &Request) -> Result<()> {
    let to = request.to.ok_or_else(|| {
        Error::new(Code::NotPossibleNow, "a rollback names an epoch or a version")
    })?;
    if !book.has_main {
        let text =
            format!("{} does not exist yet: there is nothing to roll back", book.pipeline.main);
        return Err(Error::new(Code::NotPossibleNow, text));
    }
    if book.restoring.is_none() {
        let id = request.id.clone();
        book.restoring = Some(Restoring { request: id, to, failures: 0, not_before: None });
    }
    Ok(())
}

impl Coordinator {
    /// Takes the result of a restore: the tables are read anew, and the request is removed.
    pub(crate) async fn restored(
        &mut self,
        result: &TaskResult,
        request: &str,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let limits = self.settings.limits;
        let Some(book) = self.books.iter_mut().find(|book| book.pipeline.id == result.pipeline)
        else {
            return Ok(());
        };
        let refused = match &result.verdict {
            Verdict::Done(report) => {
                note_restored(book, report).await;
                let (pipeline, epochs) = (result.pipeline.clone(), report.taken_out.clone());
                let _ = self.notices.send(Notice::RolledBack { pipeline, epochs });
                None
            }
            Verdict::Failed(error) => match failed(book, error, limits, now) {
                Some(error) => Some(error),
                None => return Ok(()),
            },
        };
        if book.restoring.as_ref().is_some_and(|restoring| restoring.request == request) {
            book.restoring = None;
        }
        if let Some(error) = refused {
            let text = format!("rollback was refused: {error}");
            let _ = self.notices.send(Notice::Warning { pipeline: result.pipeline.clone(), text });
            self.refused.push((request.to_owned(), error));
        }
        // Left behind by a failure, it is carried out again, and finds its marker.
        let done = match Requests::open(&self.settings.state) {
            Ok(requests) => requests.done(request).await,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            tracing::warn!(%error, request, "a rollback is looked at again");
        }
        Ok(())
    }
}

async fn note_restored(book: &mut Book, report: &Report) {
    for epoch in &report.taken_out {
        book.processed.remove(epoch);
    }
    let version = report.main_version;
    book.hook.iter_mut().for_each(|hook| hook.note_rollback(version, &report.taken_out));
    if let Err(error) = book.read_tables().await {
        // Nothing goes out until the next discovery has read them.
        book.error = Some(error);
    }
}

/// The error that ends the rollback, or `None`: it is tried again.
fn failed(book: &mut Book, error: &Error, limits: Limits, now: DateTime<Utc>) -> Option<Error> {
    let restoring = book.restoring.as_mut()?;
    match error.class() {
        Class::Permanent => return Some(error.clone()),
        Class::Stopping => return None,
        Class::Transient | Class::Crash => restoring.failures += 1,
    }
    if restoring.failures >= limits.attempts_max {
        return Some(error.clone());
    }
    let pause = delay(restoring.failures, 0);
    restoring.not_before = chrono::Duration::from_std(pause).ok().map(|pause| now + pause);
    None
}
