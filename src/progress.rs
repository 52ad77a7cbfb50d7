//! Progress for people: one line per change, and a moving line where stderr is a terminal.

use alluvium_coordinator::notice::Notice;
use alluvium_protocol::task::{Report, Step};
use alluvium_protocol::{Code, Epoch};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

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

/// Prints notices until their sender is gone; returns what happened in all.
pub(crate) fn watch(mut notices: mpsc::UnboundedReceiver<Notice>) -> JoinHandle<Totals> {
    tokio::spawn(async move {
        let bar = moving_line();
        let mut totals = Totals::default();
        while let Some(notice) = notices.recv().await {
            count(&notice, &mut totals);
            bar.set_message(format!("{} in raw, {} in main", totals.ingested, totals.merged));
            if let Some((is_warning, line)) = line_of(&notice) {
                bar.suspend(|| if is_warning { printer::warn(&line) } else { printer::say(&line) });
            }
        }
        bar.finish_and_clear();
        totals
    })
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
