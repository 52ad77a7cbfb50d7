//! What a worker's result does to the book, and what the ledger is told about it.

use alluvium_protocol::metrics::metrics;
use alluvium_protocol::retry::{Judgement, delay, judge};
use alluvium_protocol::state::{Event, State};
use alluvium_protocol::task::{Report, Step, TaskResult, Verdict, Work};
use alluvium_protocol::{Class, Code, Epoch, Error, Result};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::book::Book;
use crate::discovering;
use crate::notice::Notice;
use crate::rebuild;
use crate::run::Coordinator;
use crate::scribe::Rows;

/// After a failed optimize or cleanup, maintenance rests so long.
const MAINTENANCE_REST: std::time::Duration = std::time::Duration::from_secs(60);

impl Coordinator {
    /// Moves the book by one result and returns the ledger's rows.
    pub(crate) async fn settle(&mut self, result: &TaskResult, now: DateTime<Utc>) -> Result<Rows> {
        let limits = self.settings.limits;
        let Some(book) = self.books.iter_mut().find(|book| book.pipeline.id == result.pipeline)
        else {
            return Ok(Rows::default());
        };
        let is_ours = book.outstanding.remove(&result.task).is_some();
        let is_known = |epoch: &Epoch| book.entries.contains_key(epoch);
        if !is_ours && !result.work.epochs().iter().all(is_known) {
            tracing::warn!(task = %result.task, "a result of epochs that nobody knows was ignored");
            return Ok(Rows::default());
        }
        if let Work::Restore { request, .. } = &result.work {
            let events = events(book, result, now);
            self.restored(result, request, now).await?;
            return Ok(Rows { events, ..Rows::default() });
        }
        let mut rows = Rows::default();
        match &result.verdict {
            Verdict::Done(report) => {
                let merged = done(book, result, report, is_ours, now, &self.notices)?;
                if !merged.is_empty() {
                    metrics().processed(&result.pipeline, merged.len());
                    let version = report.main_version;
                    book.hook.iter_mut().for_each(|hook| hook.note(version, &merged));
                    self.merged.push(result.pipeline.clone());
                }
                for epoch in &merged {
                    book.processed.insert(*epoch, now.to_rfc3339());
                    crate::tracing_runs::ended(book, *epoch, None, now);
                }
                rows.processed = rebuild::rows_of(book, &merged, report, now).await;
                let notice = notice_of(book, result, report, &merged);
                let _ = self.notices.send(notice);
            }
            Verdict::Failed(error) => {
                if is_ours {
                    for notice in failed(book, result, error, limits, now)? {
                        let _ = self.notices.send(notice);
                    }
                }
            }
        }
        // After the move: an attempt's row says what became of it.
        rows.events = events(book, result, now);
        Ok(rows)
    }

    /// Epochs that main has and the ledger does not name: a crash, a deleted ledger. Their rows are
    /// restored from the tables' logs.
    pub(crate) async fn tell_ledger_of_the_past(&mut self) {
        let state = self.settings.state.clone();
        for book in &self.books {
            if book.error.is_some() {
                continue;
            }
            match rebuild::missing(book, &state).await {
                Ok(processed) if processed.is_empty() => {}
                Ok(processed) => {
                    self.scribe.write(Rows { processed, events: Vec::new() }, None).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "the ledger cannot be compared with the tables")
                }
            }
        }
    }
}

/// Applies a success. Returns the epochs that are now in main.
fn done(
    book: &mut Book,
    result: &TaskResult,
    report: &Report,
    is_ours: bool,
    now: DateTime<Utc>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> Result<Vec<Epoch>> {
    match &result.work {
        Work::Ingest { epoch, .. } => {
            for (epoch, generation) in &report.generations {
                book.markers.ingest.insert(*epoch, *generation);
            }
            book.versions.0 = report.raw_version.or(book.versions.0);
            if !report.already {
                let counts = (report.rows_quarantined, report.rows_read);
                book.refused.insert(*epoch, counts);
            }
            let target = book.markers.ingest.get(epoch).copied().unwrap_or(0);
            if let Some(entry) = book.entries.get_mut(epoch)
                && is_ours
                && entry.state == State::Ingesting
                && target >= entry.generation
            {
                entry.apply(Event::IngestDone)?;
                entry.bytes = report.bytes_written;
            }
            Ok(Vec::new())
        }
        Work::Merge { epochs } if report.held => {
            // Paused after the task went out: the epochs wait for `resume`.
            book.markers.hold += i64::from(!book.markers.is_held());
            for epoch in epochs {
                if let Some(entry) = book.entries.get_mut(epoch)
                    && entry.state == State::Merging
                {
                    entry.apply(Event::GaveBack)?;
                }
            }
            Ok(Vec::new())
        }
        Work::Merge { epochs } => {
            for (epoch, generation) in &report.generations {
                book.markers.merge.insert(*epoch, *generation);
            }
            book.has_main |= report.main_version.is_some();
            note_main(book, report);
            let mut merged = Vec::new();
            for epoch in epochs {
                let is_done = book.markers.is_applied(*epoch) && !book.markers.needs_merge(*epoch);
                let Some(entry) = book.entries.get_mut(epoch) else { continue };
                if entry.state != State::Merging {
                    continue;
                }
                if is_done {
                    let empty = entry.is_empty;
                    entry.apply(Event::MergeDone { empty })?;
                    merged.push(*epoch);
                    continue;
                }
                // Asked for and not done: the table was adopted meanwhile, or raw lost it.
                let text = format!("epoch {epoch} is settled, or raw no longer holds it");
                let error = Error::new(Code::EpochSettled, text);
                discovering::stop(book, *epoch, Step::Merge, error, now, notices);
            }
            Ok(merged)
        }
        Work::Optimize => {
            note_main(book, report);
            book.maintenance_failures = Some(0);
            if report.already {
                book.small_files_left = book.main_files.main_small_files;
            }
            Ok(Vec::new())
        }
        Work::Cleanup => {
            book.maintenance_failures = Some(0);
            book.cleaned_at = Some(now);
            book.cleaned_here = true;
            Ok(Vec::new())
        }
        // Taken by `restored`; pieces of steps have no results here.
        Work::Restore { .. } | Work::Shard { .. } => Ok(Vec::new()),
    }
}

fn note_main(book: &mut Book, report: &Report) {
    book.versions.1 = report.main_version.or(book.versions.1);
    if !report.already || report.main.main_files > 0 {
        book.main_files = report.main;
        book.small_files_left = book.small_files_left.min(report.main.main_small_files);
    }
}

fn failed(
    book: &mut Book,
    result: &TaskResult,
    error: &Error,
    limits: alluvium_protocol::retry::Limits,
    now: DateTime<Utc>,
) -> Result<Vec<Notice>> {
    let step = result.work.step();
    let pipeline = book.pipeline.id.clone();
    let epochs = result.work.epochs();
    if matches!(step, Step::Optimize | Step::Cleanup) {
        // Maintenance never holds data back: it rests and is due again later.
        let rest = chrono::Duration::from_std(MAINTENANCE_REST).unwrap_or_default();
        book.maintenance_not_before = Some(now + rest);
        if step == Step::Optimize {
            book.small_files_left = book.main_files.main_small_files;
        }
        if error.class() == Class::Stopping {
            return Ok(Vec::new());
        }
        book.maintenance_failures = Some(book.maintenance_failures.unwrap_or(0) + 1);
        book.maintenance_error = Some(error.to_string());
        return Ok(vec![Notice::Retrying { pipeline, step, epochs, error: error.clone() }]);
    }
    let mut notices = Vec::new();
    let mut is_told = false;
    for epoch in epochs.iter().copied() {
        let Some(entry) = book.entries.get_mut(&epoch) else { continue };
        let is_at_this_step = match step {
            Step::Ingest => entry.state == State::Ingesting,
            _ => entry.state == State::Merging,
        };
        // A person may have asked for newer content, which is being read.
        let is_of_older = matches!(&result.work, Work::Ingest { generation, .. } if *generation < entry.generation);
        if !is_at_this_step || is_of_older {
            continue;
        }
        match error.class() {
            // What leases counted may be more than came to our ears.
            Class::Crash => entry.crashes = (entry.crashes + 1).max(result.deaths),
            Class::Transient => entry.failures += 1,
            Class::Permanent | Class::Stopping => {}
        }
        entry.error = Some(error.clone());
        match judge(error, entry.failures, entry.crashes, limits) {
            Judgement::GiveBack => entry.apply(Event::GaveBack)?,
            Judgement::Retry => {
                entry.apply(Event::Failed)?;
                let failures = entry.failures + entry.crashes;
                let pause = delay(failures, epoch.value().unsigned_abs());
                entry.not_before = chrono::Duration::from_std(pause).ok().map(|p| now + p);
                if !is_told {
                    metrics().retry(step.as_str(), error.code.as_str());
                    let (pipeline, error) = (pipeline.clone(), error.clone());
                    let epochs = epochs.clone();
                    notices.push(Notice::Retrying { pipeline, step, epochs, error });
                    is_told = true;
                }
            }
            Judgement::Block => {
                entry.apply(Event::Blocked(step))?;
                // The folder is examined again at the next discovery and pinned anew.
                if error.code != Code::FolderChanged {
                    let (pipeline, error) = (pipeline.clone(), error.clone());
                    notices.push(Notice::EpochBlocked { pipeline, epoch, step, error });
                }
            }
            Judgement::Park => {
                entry.apply(Event::Poisoned)?;
                let (pipeline, error) = (pipeline.clone(), error.clone());
                notices.push(Notice::EpochBlocked { pipeline, epoch, step, error });
            }
        }
    }
    Ok(notices)
}

fn notice_of(book: &Book, result: &TaskResult, report: &Report, merged: &[Epoch]) -> Notice {
    let pipeline = result.pipeline.clone();
    let report = Box::new(report.clone());
    match &result.work {
        Work::Ingest { epoch, .. } => Notice::EpochIngested { pipeline, epoch: *epoch, report },
        Work::Merge { .. } => {
            let is_late = |epoch: &&Epoch| book.entries.get(epoch).is_some_and(|e| e.late);
            let late = merged.iter().filter(is_late).copied().collect();
            Notice::EpochsMerged { pipeline, epochs: merged.to_vec(), late, report }
        }
        Work::Optimize | Work::Cleanup | Work::Restore { .. } | Work::Shard { .. } => {
            Notice::Maintained { pipeline, step: result.work.step(), report }
        }
    }
}

/// One row of `step_events` per epoch of the attempt (one without an epoch for maintenance).
fn events(book: &Book, result: &TaskResult, now: DateTime<Utc>) -> Vec<Value> {
    let none = Report::default();
    let (error, report) = match &result.verdict {
        Verdict::Done(report) => (None, report.as_ref()),
        Verdict::Failed(error) => (Some(error), &none),
    };
    let verdict_of = |epoch: Option<Epoch>| {
        let state = epoch.and_then(|epoch| book.entries.get(&epoch)).map(|entry| entry.state);
        match (error, state) {
            (None, _) => "done",
            (Some(_), Some(State::Blocked(_))) => "blocked",
            (Some(_), Some(State::Parked(_))) => "parked",
            (Some(error), _) if error.class() == Class::Stopping => "gave_back",
            (Some(_), _) => "failed",
        }
    };
    let epochs = result.work.epochs();
    let subjects: Vec<Option<Epoch>> =
        if epochs.is_empty() { vec![None] } else { epochs.into_iter().map(Some).collect() };
    // Counts of a merge concern its group: they stand in the row of its first epoch only.
    let first = subjects.first().copied().flatten();
    let row = |(index, epoch): (usize, Option<Epoch>)| {
        let beside = first.filter(|_| index > 0 && error.is_none());
        let message = match error {
            Some(error) => Some(error.message.clone()),
            None if !report.columns_left_out.is_empty() => {
                Some(format!("left out new column(s) {}", report.columns_left_out.join(", ")))
            }
            None => beside.map(|first| format!("in one commit with epoch {first}")),
        };
        let count = |value: u64| if index == 0 { value } else { 0 };
        let generation = epoch.and_then(|epoch| book.entries.get(&epoch)).map(|e| e.generation);
        json!({
            "at": now.to_rfc3339(),
            "pipeline": result.pipeline,
            "epoch": epoch,
            "generation": generation,
            "step": result.work.step(),
            "attempt": result.attempt,
            "verdict": verdict_of(epoch),
            "code": error.map(|e| e.code),
            "message": message,
            "help": error.and_then(|e| e.help.clone()),
            "published_at": result.published_at.to_rfc3339(),
            "duration_ms": (result.finished_at - result.started_at).num_milliseconds(),
            "worker": result.worker,
            "task": result.task,
            "raw_version": report.raw_version,
            "main_version": report.main_version,
            "rows_read": count(report.rows_read),
            "rows_written": count(report.rows_written),
            "rows_quarantined": count(report.rows_quarantined),
            "rows_inserted": count(report.rows_inserted),
            "rows_updated": count(report.rows_updated),
            "rows_deleted": count(report.rows_deleted),
            "bytes_written": count(report.bytes_written),
            "reconciled": report.reconciled,
            "expectations": expectations(report),
            "rows_filtered": count(report.rows_filtered),
        })
    };
    subjects.into_iter().enumerate().map(row).collect()
}

/// Rows for which each expectation did not hold, as a JSON object; NULL: the step has none.
fn expectations(report: &Report) -> Option<String> {
    let by_name: serde_json::Map<String, Value> =
        report.expectations.iter().map(|(name, failed)| (name.clone(), json!(failed))).collect();
    (!by_name.is_empty()).then(|| Value::Object(by_name).to_string())
}
