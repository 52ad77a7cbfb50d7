//! Progress for people: one line per change, and a moving line where stderr is a terminal.

use std::sync::Arc;
use std::time::Duration;

use alluvium_coordinator::notice::Notice;
use alluvium_protocol::heartbeat::InHand;
use alluvium_protocol::task::{Report, Step};
use alluvium_protocol::{Code, Epoch};
use alluvium_worker::slots::Duty;
use chrono::Utc;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::printer;

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    /// Epochs that entered raw.
    pub(crate) ingested: usize,
    /// Epochs that entered main.
    pub(crate) merged: usize,
    /// Rows that main gained, changed, lost.
    pub(crate) inserted: u64,
    /// Rows of main with new values.
    pub(crate) updated: u64,
    /// Rows that main lost.
    pub(crate) deleted: u64,
    /// Rows refused.
    pub(crate) quarantined: u64,
}

/// Pause between two looks at tasks in hand, for the moving line.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Where there is none, a task that takes so long is worth a line, and another one each time.
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Prints notices until their sender is gone, and how far the tasks of `duty` are; returns what happened
/// in all.
pub(crate) fn watch(
    mut notices: mpsc::UnboundedReceiver<Notice>,
    duty: Option<Arc<Duty>>,
) -> JoinHandle<Totals> {
    tokio::spawn(async move {
        let bar = moving_line();
        let mut totals = Totals::default();
        let every = if bar.is_hidden() { TELL_EVERY } else { LOOK_EVERY };
        let mut looks = tokio::time::interval_at(Instant::now() + every, every);
        let in_hand = || duty.iter().flat_map(|duty| duty.tasks()).collect::<Vec<InHand>>();
        loop {
            let notice = tokio::select! {
                notice = notices.recv() => notice,
                _ = looks.tick() => {
                    if bar.is_hidden() {
                        in_hand().iter().filter_map(long_line).for_each(|line| printer::say(&line));
                    } else {
                        bar.set_message(moving_text(totals, &in_hand()));
                    }
                    continue;
                }
            };
            let Some(notice) = notice else { break };
            count(&notice, &mut totals);
            bar.set_message(moving_text(totals, &in_hand()));
            if let Some((is_warning, line)) = line_of(&notice) {
                bar.suspend(|| if is_warning { printer::warn(&line) } else { printer::say(&line) });
            }
        }
        bar.finish_and_clear();
        totals
    })
}

fn moving_text(totals: Totals, tasks: &[InHand]) -> String {
    let counts = format!("{} in raw, {} in main", totals.ingested, totals.merged);
    tasks.iter().fold(counts, |text, task| format!("{text} · {}", in_hand_line(task)))
}

/// A task that has been in hand for long.
fn long_line(task: &InHand) -> Option<String> {
    let since = (Utc::now() - task.since).to_std().ok()?;
    (since >= TELL_EVERY).then(|| format!("{}, {} s so far", in_hand_line(task), since.as_secs()))
}

/// `p 17 merge, looks for keys in main: 45 % (2250000 of 5000000 rows)`.
fn in_hand_line(task: &InHand) -> String {
    let epochs = list(&task.epochs);
    let space = if epochs.is_empty() { "" } else { " " };
    let comma = if task.progress.doing.is_empty() { "" } else { ", " };
    let InHand { pipeline, step, progress, .. } = task;
    format!("{pipeline}{space}{epochs} {}{comma}{progress}", step.as_str())
}

fn moving_line() -> ProgressBar {
    if !printer::is_lively() {
        return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    }
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar.set_style(ProgressStyle::default_spinner());
    bar
}

fn count(notice: &Notice, totals: &mut Totals) {
    match notice {
        Notice::EpochIngested { report, .. } => {
            totals.ingested += 1;
            totals.quarantined += report.rows_quarantined;
        }
        Notice::EpochsMerged { epochs, report, .. } => {
            totals.merged += epochs.len();
            totals.inserted += report.rows_inserted;
            totals.updated += report.rows_updated;
            totals.deleted += report.rows_deleted;
        }
        _ => {}
    }
}

/// The line of a notice, and whether it needs attention.
fn line_of(notice: &Notice) -> Option<(bool, String)> {
    match notice {
        Notice::Discovered { .. } => None,
        Notice::EpochIngested { pipeline, epoch, report } => {
            let refused = match report.rows_quarantined {
                0 => String::new(),
                rows => format!(", {rows} refused into quarantine"),
            };
            let failed: Vec<String> = report
                .expectations
                .iter()
                .filter(|(_, failed)| *failed > 0)
                .map(|(name, failed)| format!(", {name} does not hold for {failed}"))
                .collect();
            let left_out = match report.columns_left_out.as_slice() {
                [] => String::new(),
                names => format!(", left out new column(s) {}", names.join(", ")),
            };
            let told = format!("{}{left_out}", failed.concat());
            let read = report.rows_read;
            Some((!told.is_empty(), format!("{pipeline} {epoch}  read {read} rows{refused}{told}")))
        }
        Notice::EpochsMerged { pipeline, epochs, late, report } => {
            Some((false, merged_line(pipeline, epochs, late, report)))
        }
        Notice::Maintained { pipeline, step, report } => {
            let line = match step {
                Step::Optimize if report.files_removed == 0 => return None,
                Step::Optimize => format!(
                    "{pipeline}  optimized: {} small files became {}",
                    report.files_removed, report.files_added
                ),
                _ if report.files_removed == 0 => return None,
                _ => format!("{pipeline}  cleaned up: {} old files deleted", report.files_removed),
            };
            Some((false, line))
        }
        Notice::RolledBack { pipeline, epochs } => Some((
            true,
            format!(
                "{pipeline}  rolled back: {} epoch(s) left main; they merge again after `alluvium resume \
                 {pipeline}`",
                epochs.len()
            ),
        )),
        Notice::Retrying { pipeline, step, epochs, error } => {
            let of = list(epochs);
            Some((true, format!("{pipeline} {of} {} is tried again: {error}", step.as_str())))
        }
        Notice::EpochBlocked { pipeline, epoch, step, error } => {
            let help = error.help.as_ref().map(|help| format!("\n  help: {help}"));
            // Trying again passes no gate.
            let then = match error.code {
                Code::GateClosed => String::new(),
                _ => format!(
                    "\n  then: alluvium retry {pipeline} {epoch}   (or `run --once`; `skip` leaves the \
                     epoch out)"
                ),
            };
            let line = format!(
                "{pipeline} {epoch} is blocked at {}: {error}{}{then}",
                step.as_str(),
                help.unwrap_or_default(),
            );
            Some((true, line))
        }
        Notice::EpochWaits { pipeline, epoch, why } => {
            Some((false, format!("{pipeline} {epoch}  not complete: {why}")))
        }
        Notice::Warning { pipeline, text } if pipeline.is_empty() => Some((true, text.clone())),
        Notice::Warning { pipeline, text } => Some((true, format!("{pipeline}  {text}"))),
    }
}

fn merged_line(pipeline: &str, epochs: &[Epoch], late: &[Epoch], report: &Report) -> String {
    if report.already {
        return format!("{pipeline} {}  was merged before", list(epochs));
    }
    let late = if late.is_empty() { "" } else { " (late: reconciled with newer epochs)" };
    format!(
        "{pipeline} {}  merged: +{} rows, ~{} changed, -{} deleted{late}",
        list(epochs),
        report.rows_inserted,
        report.rows_updated,
        report.rows_deleted,
    )
}

fn list(epochs: &[Epoch]) -> String {
    match epochs {
        [] => String::new(),
        [one] => one.to_string(),
        [first, .., last] => format!("{first}…{last} ({} epochs)", epochs.len()),
    }
}
