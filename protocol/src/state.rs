//! The state of an epoch: one machine, drawn here, tested over the full product.
//!
//! ```text
//!            files come                pin a manifest            publish
//!  Empty ◄──────────────► Incomplete ──────────────────► Ready ───────────► Ingesting
//!    │                        │   ContentPinned            ▲ ◄── Failed ───────┤ │
//!    └────────────────────────┴───────────────────────────►│     GaveBack      │ │ IngestDone
//!                                                          │                   │ ▼
//!   ContentPinned leads here from everywhere               │    publish    Ingested ◄─── Failed,
//!   (replay, undo, skip, a changed folder)                 │  ┌───────────────┘          GaveBack
//!                                                          │  ▼                              │
//!  Processed, Skipped ◄─────────────── MergeDone ──────────┼─ Merging ───────────────────────┘
//!                                                          │
//!  Blocked ◄── Blocked (permanent, attempts exhausted) ────┤ from any unfinished state
//!  Parked  ◄── Poisoned (its workers die) ─────────────────┘ from Ingesting, Merging
//!     └── RetryAsked ──► Ready, or Ingested when it stopped at the merge
//! ```
//! Nothing here is stored: the machine is rebuilt from markers and a listing at every start.

use serde::{Deserialize, Serialize};

use crate::marker::{Generation, Markers};
use crate::{Epoch, task::Step};

/// Where an epoch stands, and who moves it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "step")]
pub enum State {
    /// The folder holds no data file. Files move it on.
    Empty,
    /// The folder is still being written. Its marker file, manifest or quiet moves it on.
    Incomplete,
    /// Its manifest is pinned. The coordinator publishes its ingest.
    Ready,
    /// A worker's result moves it on.
    Ingesting,
    /// Raw holds it. The coordinator publishes its merge when its turn comes.
    Ingested,
    /// A worker's result moves it on.
    Merging,
    /// Its content is in main. An end; only new content moves it on.
    Processed,
    /// Its content is empty because somebody asked for that. An end, as above.
    Skipped,
    /// It failed at this step and waits for a person, a changed folder or the next `run --once`.
    Blocked(Step),
    /// Its workers died at this step. It waits for a person.
    Parked(Step),
}

/// What happens to an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A listing found no data files.
    FolderEmpty,
    /// A listing found files, but not the sign that they are all.
    FolderIncomplete,
    /// A manifest of new content was stored, or raw holds content that main lacks.
    ContentPinned,
    /// The ingest task was published.
    IngestPublished,
    /// Raw holds the epoch.
    IngestDone,
    /// A merge task with this epoch was published.
    MergePublished,
    /// Main has it applied.
    MergeDone {
        /// The content is empty by request (undo, skip).
        empty: bool,
    },
    /// The attempt failed and will be made again.
    Failed,
    /// The task was given back without an attempt.
    GaveBack,
    /// The failure is final until something changes.
    Blocked(Step),
    /// Too many workers died.
    Poisoned,
    /// A person asks for another try.
    RetryAsked,
}

/// A transition that the drawing does not have: a bug in the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an epoch cannot go on from {state:?} with {event:?}")]
pub struct IllegalTransition {
    /// The state it was in.
    pub state: State,
    /// The event that does not fit.
    pub event: Event,
}

impl State {
    /// The next state, or [`IllegalTransition`].
    pub fn after(self, event: Event) -> Result<Self, IllegalTransition> {
        use Event as E;
        use State as S;
        let next = match (self, event) {
            (_, E::ContentPinned) => S::Ready,
            (S::Empty | S::Incomplete, E::FolderEmpty) => S::Empty,
            (S::Empty | S::Incomplete, E::FolderIncomplete) => S::Incomplete,
            (S::Ready, E::IngestPublished) => S::Ingesting,
            (S::Ingesting, E::IngestDone) => S::Ingested,
            (S::Ingesting, E::Failed | E::GaveBack) => S::Ready,
            (S::Ingesting, E::Poisoned) => S::Parked(Step::Ingest),
            (S::Ingested, E::MergePublished) => S::Merging,
            (S::Merging, E::MergeDone { empty: false }) => S::Processed,
            (S::Merging, E::MergeDone { empty: true }) => S::Skipped,
            (S::Merging, E::Failed | E::GaveBack) => S::Ingested,
            (S::Merging, E::Poisoned) => S::Parked(Step::Merge),
            (
                S::Empty
                | S::Incomplete
                | S::Ready
                | S::Ingesting
                | S::Ingested
                | S::Merging
                | S::Blocked(_),
                E::Blocked(step),
            ) => S::Blocked(step),
            (S::Blocked(Step::Merge) | S::Parked(Step::Merge), E::RetryAsked) => S::Ingested,
            (S::Blocked(_) | S::Parked(_), E::RetryAsked) => S::Ready,
            _ => return Err(IllegalTransition { state: self, event }),
        };
        Ok(next)
    }

    /// What the tables and the newest manifest say about an epoch, before anything else is known.
    /// `pinned` is the newest manifest's generation; `None`: nothing is known, a listing decides.
    pub fn from_tables(
        epoch: Epoch,
        markers: &Markers,
        pinned: Option<Generation>,
        is_empty: bool,
    ) -> Option<Self> {
        let ingested = markers.ingest.get(&epoch).copied().unwrap_or(0);
        // A rollback may want more than the generation of content that is pinned and not in raw.
        let is_behind = |pinned| pinned > ingested && ingested > 0 && !markers.is_lost(epoch);
        if pinned.is_some_and(|pinned| pinned > markers.generation(epoch) || is_behind(pinned)) {
            return Some(Self::Ready);
        }
        if markers.needs_merge(epoch) {
            return Some(Self::Ingested);
        }
        if markers.is_applied(epoch) || (ingested == 0 && markers.is_settled(epoch)) {
            return Some(if is_empty { Self::Skipped } else { Self::Processed });
        }
        None
    }

    /// An end of the epoch's story (until new content is asked for).
    pub fn is_end(self) -> bool {
        matches!(self, Self::Processed | Self::Skipped)
    }

    /// Stopped until somebody does something.
    pub fn is_stopped(self) -> bool {
        matches!(self, Self::Blocked(_) | Self::Parked(_))
    }

    /// A task of the epoch is out.
    pub fn is_outstanding(self) -> bool {
        matches!(self, Self::Ingesting | Self::Merging)
    }

    /// The words that people read.
    pub const WORDS: [&str; 10] = [
        "empty",
        "incomplete",
        "ready",
        "ingesting",
        "ingested",
        "merging",
        "processed",
        "skipped",
        "blocked",
        "parked",
    ];

    /// The word people read.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Incomplete => "incomplete",
            Self::Ready => "ready",
            Self::Ingesting => "ingesting",
            Self::Ingested => "ingested",
            Self::Merging => "merging",
            Self::Processed => "processed",
            Self::Skipped => "skipped",
            Self::Blocked(_) => "blocked",
            Self::Parked(_) => "parked",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 12] = [
        State::Empty,
        State::Incomplete,
        State::Ready,
        State::Ingesting,
        State::Ingested,
        State::Merging,
        State::Processed,
        State::Skipped,
        State::Blocked(Step::Ingest),
        State::Blocked(Step::Merge),
        State::Parked(Step::Ingest),
        State::Parked(Step::Merge),
    ];

    const EVENTS: [Event; 14] = [
        Event::FolderEmpty,
        Event::FolderIncomplete,
        Event::ContentPinned,
        Event::IngestPublished,
        Event::IngestDone,
        Event::MergePublished,
        Event::MergeDone { empty: false },
        Event::MergeDone { empty: true },
        Event::Failed,
        Event::GaveBack,
        Event::Blocked(Step::Ingest),
        Event::Blocked(Step::Merge),
        Event::Poisoned,
        Event::RetryAsked,
    ];

    /// One letter for each state; `.` for an illegal pair.
    fn letter(state: State) -> char {
        match state {
            State::Empty => 'e',
            State::Incomplete => 'i',
            State::Ready => 'r',
            State::Ingesting => 'I',
            State::Ingested => 'd',
            State::Merging => 'M',
            State::Processed => 'p',
            State::Skipped => 's',
            State::Blocked(Step::Ingest) => 'b',
            State::Blocked(_) => 'B',
            State::Parked(Step::Ingest) => 'k',
            State::Parked(_) => 'K',
        }
    }

    #[test]
    fn the_full_product_is_as_drawn() {
        // Columns as in EVENTS: empty, incomplete, pinned, ingest out, ingested, merge out,
        // merged, merged empty, failed, given back, blocked at ingest, at merge, poisoned, retry.
        let expected = [
            "e i r . . . . . . . b B . .", // Empty
            "e i r . . . . . . . b B . .", // Incomplete
            ". . r I . . . . . . b B . .", // Ready
            ". . r . d . . . r r b B k .", // Ingesting
            ". . r . . M . . . . b B . .", // Ingested
            ". . r . . . p s d d b B K .", // Merging
            ". . r . . . . . . . . . . .", // Processed
            ". . r . . . . . . . . . . .", // Skipped
            ". . r . . . . . . . b B . r", // Blocked at ingest
            ". . r . . . . . . . b B . d", // Blocked at merge
            ". . r . . . . . . . . . . r", // Parked at ingest
            ". . r . . . . . . . . . . d", // Parked at merge
        ];
        for (state, row) in STATES.into_iter().zip(expected) {
            let found: Vec<String> = EVENTS
                .into_iter()
                .map(|event| state.after(event).map_or('.', letter).to_string())
                .collect();
            assert_eq!(found.join(" "), row, "{state:?}");
        }
    }

    #[test]
    fn no_state_is_without_an_exit() {
        for state in STATES {
            assert!(State::WORDS.contains(&state.as_str()));
            assert!(EVENTS.into_iter().any(|e| state.after(e).is_ok_and(|next| next != state)));
        }
    }

    #[test]
    fn the_tables_tell_where_an_epoch_stands() {
        let epoch = Epoch::new(7).unwrap();
        let markers = |ingest: Option<i64>, merge: Option<i64>, wanted: Option<i64>| {
            let mut markers = Markers::default();
            ingest.map(|g| markers.ingest.insert(epoch, g));
            merge.map(|g| markers.merge.insert(epoch, g));
            wanted.map(|g| markers.wanted.insert(epoch, g));
            markers
        };
        let of = |m: &Markers, pinned| State::from_tables(epoch, m, pinned, false);
        assert_eq!(of(&markers(None, None, None), None), None);
        assert_eq!(of(&markers(None, None, None), Some(1)), Some(State::Ready));
        assert_eq!(of(&markers(Some(1), None, None), Some(1)), Some(State::Ingested));
        assert_eq!(of(&markers(Some(1), Some(1), None), Some(1)), Some(State::Processed));
        assert_eq!(of(&markers(Some(1), Some(1), None), Some(2)), Some(State::Ready));
        assert_eq!(of(&markers(Some(1), Some(1), Some(2)), None), Some(State::Ingested));
        assert_eq!(of(&markers(Some(1), Some(1), Some(3)), Some(2)), Some(State::Ready));
        assert_eq!(of(&markers(Some(1), Some(2), None), Some(2)), Some(State::Processed));
        let mut settled = Markers { floor: Some(epoch), ..Markers::default() };
        assert_eq!(of(&settled, None), Some(State::Processed));
        settled.floor = None;
        assert_eq!(of(&settled, None), None);
    }
}
