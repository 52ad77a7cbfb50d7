//! Which tasks may go out now: pure functions of what is known, tested as tables.
//!
//! Rules: ingests run ahead of merges, up to a limit. One rewriting task per main at a time. In
//! `sequential` order a merge takes the lowest unmerged epochs without a gap; in `arrival` order it
//! takes what is there. Late epochs merge in a group of their own, so that the newer ones keep the
//! cheap path. Whatever does not go out says why.

use std::collections::BTreeMap;
use std::time::Duration;

use alluvium_protocol::pipeline::{OnBlock, Order};
use alluvium_protocol::state::State;
use alluvium_protocol::{Epoch, Pipeline};
use chrono::{DateTime, Utc};
use serde::Serialize;

/// Epochs in raw that wait for their merge, at most: beyond, ingests wait.
pub const LOOKAHEAD_EPOCHS: usize = 400;

/// What sequencing knows of an epoch.
#[derive(Clone, Debug)]
pub struct EpochView {
    /// Where it stands.
    pub state: State,
    /// Bytes in raw, once ingested.
    pub bytes: u64,
    /// Not before this moment (a retry's pause).
    pub not_before: Option<DateTime<Utc>>,
    /// Since when it is known to be incomplete.
    pub waiting_since: Option<DateTime<Utc>>,
    /// Its content is empty by request.
    pub is_empty: bool,
}

/// What sequencing knows of a pipeline.
pub struct PipelineView<'a> {
    /// Its definition.
    pub pipeline: &'a Pipeline,
    /// All epochs that are not below the floor.
    pub epochs: &'a BTreeMap<Epoch, EpochView>,
    /// A merge, optimize or restore is out.
    pub is_rewriting: bool,
    /// A cleanup is out.
    pub is_cleaning: bool,
    /// A person paused it.
    pub is_held: bool,
    /// A rollback was asked for; it may go out from this moment on.
    pub wants_restore: Option<Option<DateTime<Utc>>>,
    /// Raw exists.
    pub has_raw: bool,
    /// Main exists.
    pub has_main: bool,
    /// Small files of main.
    pub small_files: u64,
    /// What a read of main costs, in percent of a table's that is all new.
    pub read_cost: u32,
    /// Small files at which the last optimize found nothing more to do or failed.
    pub small_files_left: u64,
    /// When maintenance may run again after a failure.
    pub maintenance_not_before: Option<DateTime<Utc>>,
    /// When the last cleanup ended.
    pub cleaned_at: Option<DateTime<Utc>>,
}

/// What may go out now, most urgent first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The rollback that was asked for.
    pub restore: bool,
    /// The next merge.
    pub merge: Option<Vec<Epoch>>,
    /// Ingests, lowest epoch first.
    pub ingests: Vec<Epoch>,
    /// Main has small files enough.
    pub optimize: bool,
    /// A cleanup is due.
    pub cleanup: bool,
    /// Why something that waits does not go out.
    pub waits: Vec<Wait>,
}

/// Why something waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// The epoch that waits; `None`: the whole pipeline.
    pub epoch: Option<Epoch>,
    /// A sentence for people.
    pub why: String,
}

/// Plans one pipeline.
pub fn plan(view: &PipelineView<'_>, now: DateTime<Utc>) -> Plan {
    let mut plan = Plan::default();
    if let Some(not_before) = view.wants_restore {
        // Alone with the table: no merge lands beside it, no cleanup takes what it brings back.
        let is_due = not_before.is_none_or(|moment| moment <= now);
        plan.restore = is_due && !view.is_rewriting && !view.is_cleaning;
        let why = "a rollback goes first".to_owned();
        plan.waits.push(Wait { epoch: None, why });
        return plan;
    }
    if view.is_held {
        let why = format!("paused; `alluvium resume {}`", view.pipeline.id);
        plan.waits.push(Wait { epoch: None, why });
        return plan;
    }
    plan_ingests(view, now, &mut plan);
    plan_merge(view, now, &mut plan);
    plan_maintenance(view, now, &mut plan);
    plan
}

fn is_due(epoch: &EpochView, now: DateTime<Utc>) -> bool {
    epoch.not_before.is_none_or(|moment| moment <= now)
}

fn plan_ingests(view: &PipelineView<'_>, now: DateTime<Utc>, plan: &mut Plan) {
    // Without rows there is nothing in raw that waits.
    let is_ahead = |epoch: &&EpochView| match epoch.state {
        State::Ingesting => true,
        State::Ingested => !epoch.is_empty,
        _ => false,
    };
    let ahead = view.epochs.values().filter(is_ahead).count();
    let mut in_raw = view.epochs.iter().filter(|(_, epoch)| epoch.state == State::Ingested);
    let lowest_in_raw = in_raw.next().map(|(number, _)| *number);
    // The first epoch makes raw's columns: alone, so that its types do not depend on a race.
    let most = if view.has_raw { LOOKAHEAD_EPOCHS } else { 1 };
    let mut room = most.saturating_sub(ahead);
    // An epoch that is compared with those before it is read after them.
    let gates = view.pipeline.content.gates;
    let is_compared = gates.rows_min.is_some() || gates.rows_max.is_some();
    let is_one_out = view.epochs.values().any(|epoch| epoch.state == State::Ingesting);
    if is_compared {
        room = room.min(usize::from(!is_one_out));
    }
    for (number, epoch) in view.epochs {
        if epoch.state != State::Ready || !is_due(epoch, now) {
            continue;
        }
        // Those in raw may wait for this one: it has room, else none is made.
        let goes_first = view.has_raw && lowest_in_raw.is_some_and(|lowest| *number < lowest);
        let is_alone = !is_one_out && plan.ingests.is_empty();
        if room == 0 && !(goes_first && (is_alone || !is_compared)) {
            let why = if is_compared {
                "it is compared with the epochs before it, which are read first".to_owned()
            } else if view.has_raw {
                format!("{LOOKAHEAD_EPOCHS} epochs in raw wait for their merge")
            } else {
                "the first epoch makes the raw table, alone".to_owned()
            };
            plan.waits.push(Wait { epoch: Some(*number), why });
            return;
        }
        room = room.saturating_sub(1);
        plan.ingests.push(*number);
    }
}

fn plan_merge(view: &PipelineView<'_>, now: DateTime<Utc>, plan: &mut Plan) {
    if view.is_rewriting {
        return;
    }
    let mut candidates = Vec::new();
    for (number, epoch) in view.epochs {
        match gate(view, epoch, now) {
            Gate::Take => candidates.push(*number),
            Gate::Pass => {}
            Gate::Stop(why) => {
                if has_waiting_above(view, *number) {
                    plan.waits.push(Wait { epoch: Some(*number), why });
                }
                break;
            }
        }
    }
    let group = group(view, &candidates);
    let has_rows = group.iter().any(|number| !view.epochs[number].is_empty);
    if group.is_empty() || (!view.has_main && !has_rows) {
        return;
    }
    plan.merge = Some(group);
}

/// What an epoch means for the merge of those above it.
enum Gate {
    Take,
    Pass,
    Stop(String),
}

fn gate(view: &PipelineView<'_>, epoch: &EpochView, now: DateTime<Utc>) -> Gate {
    let is_sequential = view.pipeline.order == Order::Sequential;
    let id = &view.pipeline.id;
    match epoch.state {
        State::Ingested if is_due(epoch, now) => Gate::Take,
        State::Processed | State::Skipped => Gate::Pass,
        _ if !is_sequential => Gate::Pass,
        State::Ingested => Gate::Stop("its merge failed and is tried again shortly".to_owned()),
        State::Ready | State::Ingesting | State::Merging => {
            Gate::Stop("later epochs merge after it".to_owned())
        }
        State::Empty | State::Incomplete => {
            if is_held_for(view.pipeline.hold_for_earlier, epoch.waiting_since, now) {
                Gate::Stop("later epochs wait for it (`hold_for_earlier`)".to_owned())
            } else {
                Gate::Pass
            }
        }
        State::Blocked(_) | State::Parked(_) if view.pipeline.on_block == OnBlock::Continue => {
            Gate::Pass
        }
        State::Blocked(_) => Gate::Stop(format!(
            "blocked; later epochs merge after it: repair it, then `alluvium retry {id} EPOCH`, \
             or `alluvium skip {id} EPOCH`"
        )),
        State::Parked(_) => Gate::Stop(format!(
            "parked; its workers died: `alluvium retry {id} EPOCH` or `alluvium skip {id} EPOCH`"
        )),
    }
}

fn is_held_for(hold: Duration, since: Option<DateTime<Utc>>, now: DateTime<Utc>) -> bool {
    let Ok(hold) = chrono::Duration::from_std(hold) else { return true };
    since.is_some_and(|since| now < since + hold)
}

fn has_waiting_above(view: &PipelineView<'_>, number: Epoch) -> bool {
    use std::ops::Bound::{Excluded, Unbounded};
    view.epochs
        .range((Excluded(number), Unbounded))
        .any(|(_, epoch)| matches!(epoch.state, State::Ready | State::Ingesting | State::Ingested))
}

/// The first group of the candidates: late epochs among themselves, newer ones among themselves,
/// bounded in number and bytes (a first epoch of any size goes). Empty content costs nothing and
/// does not count: before main exists it must not wait in a full group of its own.
fn group(view: &PipelineView<'_>, candidates: &[Epoch]) -> Vec<Epoch> {
    let highest_done = view
        .epochs
        .iter()
        .filter(|(_, epoch)| epoch.state.is_end())
        .map(|(number, _)| *number)
        .next_back();
    let is_late = |number: &Epoch| highest_done.is_some_and(|highest| *number < highest);
    let sizes = &view.pipeline.sizes;
    let mut group: Vec<Epoch> = Vec::new();
    let mut full_ones = 0;
    let mut bytes = 0;
    for number in candidates {
        let epoch = &view.epochs[number];
        bytes += epoch.bytes;
        full_ones += usize::from(!epoch.is_empty);
        let is_other_kind = group.first().is_some_and(|first| is_late(first) != is_late(number));
        let is_full =
            full_ones > sizes.batch_epochs || (full_ones > 1 && bytes > sizes.batch_bytes);
        if !group.is_empty() && (is_other_kind || is_full) {
            break;
        }
        group.push(*number);
    }
    group
}

fn plan_maintenance(view: &PipelineView<'_>, now: DateTime<Utc>, plan: &mut Plan) {
    if !view.has_main || view.maintenance_not_before.is_some_and(|moment| moment > now) {
        return;
    }
    // A merge that waits goes first; once it is out, the main table is taken.
    let is_free = !view.is_rewriting && plan.merge.is_none();
    let threshold = view.pipeline.sizes.small_files as u64;
    let is_dear = view.read_cost >= view.pipeline.sizes.read_cost_max;
    plan.optimize = view.pipeline.optimize
        && is_free
        && (view.small_files >= threshold.max(2) || is_dear)
        && view.small_files > view.small_files_left;
    plan.cleanup = !view.is_cleaning
        && view.pipeline.cleanup_every.is_some_and(|every| {
            let every = chrono::Duration::from_std(every).unwrap_or(chrono::Duration::MAX);
            view.cleaned_at.is_none_or(|at| now - at >= every)
        });
}

/// Shares the window's free places fairly: one for each pipeline in turn, starting after the one
/// that was served last. `wanted` holds how many tasks each pipeline could publish.
pub fn share(wanted: &[usize], free: usize, first: usize) -> Vec<usize> {
    let mut given = vec![0; wanted.len()];
    let mut left = free;
    while left > 0 {
        let before = left;
        for offset in 0..wanted.len() {
            let index = (first + offset) % wanted.len();
            if left > 0 && given[index] < wanted[index] {
                given[index] += 1;
                left -= 1;
            }
        }
        if left == before {
            break;
        }
    }
    given
}

#[cfg(test)]
mod tests;
