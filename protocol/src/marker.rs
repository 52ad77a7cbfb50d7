//! Markers: the Delta `txn` actions that prove what a table holds.
//!
//! A marker lands in the commit it speaks of, or neither does. Its version is a generation, except
//! for `maintenance` (a counter), `floor` (an epoch) and `hold` (odd = paused).
//!
//! ```text
//! alluvium/<pipeline id>/<epoch>/ingest   in raw     epoch's content at this generation is in raw
//! alluvium/<pipeline id>/<epoch>/merge    in main    that content is applied
//! alluvium/<pipeline id>/<epoch>/wanted   in main    below this generation merge does not count
//! alluvium/<pipeline id>/maintenance      in both    counts optimize and cleanup commits
//! alluvium/<pipeline id>/floor            in main    epochs at or below it are settled
//! alluvium/<pipeline id>/hold             in main    odd: the pipeline is paused
//! alluvium/<pipeline id>/request/<id>     in main    this restore was carried out
//! ```

use std::collections::{BTreeMap, BTreeSet};

use crate::Epoch;

/// How often an epoch's content was asked for; the first content is 1, and 0 means never.
pub type Generation = i64;

/// What an epoch's marker speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochMarker {
    /// Raw holds the epoch's content.
    Ingest,
    /// Main has it applied.
    Merge,
    /// A merge below this generation does not count.
    Wanted,
}

impl EpochMarker {
    fn suffix(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Merge => "merge",
            Self::Wanted => "wanted",
        }
    }
}

/// The app id of an epoch's marker.
pub fn epoch_app_id(pipeline: &str, epoch: Epoch, marker: EpochMarker) -> String {
    format!("alluvium/{pipeline}/{epoch}/{}", marker.suffix())
}

/// The app id of the counter of maintenance commits.
pub fn maintenance_app_id(pipeline: &str) -> String {
    format!("alluvium/{pipeline}/maintenance")
}

/// The app id of the floor: epochs at or below it are settled.
pub fn floor_app_id(pipeline: &str) -> String {
    format!("alluvium/{pipeline}/floor")
}

/// The app id of the hold: an odd version pauses the pipeline.
pub fn hold_app_id(pipeline: &str) -> String {
    format!("alluvium/{pipeline}/hold")
}

/// The app id of a request that was carried out by a commit on main.
pub fn request_app_id(pipeline: &str, request: &str) -> String {
    format!("alluvium/{pipeline}/request/{request}")
}

/// The markers of one pipeline in one table (or in raw and main together), read from the table's
/// `txn` actions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Markers {
    /// Generation that raw holds, by epoch.
    pub ingest: BTreeMap<Epoch, Generation>,
    /// Generation that main has merged, by epoch.
    pub merge: BTreeMap<Epoch, Generation>,
    /// Generation that a merge must reach to count, by epoch.
    pub wanted: BTreeMap<Epoch, Generation>,
    /// Maintenance commits so far.
    pub maintenance: i64,
    /// The highest settled epoch.
    pub floor: Option<Epoch>,
    /// The version of the hold marker.
    pub hold: i64,
}

impl Markers {
    /// Picks the markers of `pipeline` out of a table's transactions (app id to version).
    pub fn of_pipeline<'a>(
        pipeline: &str,
        transactions: impl IntoIterator<Item = (&'a str, i64)>,
    ) -> Self {
        let mut markers = Self::default();
        let prefix = format!("alluvium/{pipeline}/");
        for (app_id, version) in transactions {
            let Some(rest) = app_id.strip_prefix(&prefix) else { continue };
            match rest.split_once('/') {
                Some((epoch, kind)) => {
                    let Ok(epoch) = epoch.parse::<Epoch>() else { continue };
                    match kind {
                        "ingest" => drop(markers.ingest.insert(epoch, version)),
                        "merge" => drop(markers.merge.insert(epoch, version)),
                        "wanted" => drop(markers.wanted.insert(epoch, version)),
                        _ => {}
                    }
                }
                None if rest == "maintenance" => markers.maintenance = version,
                None if rest == "floor" => markers.floor = Epoch::new(version),
                None if rest == "hold" => markers.hold = version,
                None => {}
            }
        }
        markers
    }

    /// Raw's markers (ingest) with main's (all others).
    pub fn joined(raw: Self, main: Self) -> Self {
        Self { ingest: raw.ingest, ..main }
    }

    /// The pipeline is paused.
    pub fn is_held(&self) -> bool {
        self.hold % 2 == 1
    }

    /// The epoch's content counts in main.
    pub fn is_applied(&self, epoch: Epoch) -> bool {
        let wanted = self.wanted.get(&epoch).copied().unwrap_or(0);
        self.merge.get(&epoch).is_some_and(|merge| *merge >= wanted)
    }

    /// The epochs whose content counts in main.
    pub fn applied(&self) -> BTreeSet<Epoch> {
        self.merge.keys().copied().filter(|epoch| self.is_applied(*epoch)).collect()
    }

    /// The highest epoch whose content counts in main.
    pub fn highest_applied(&self) -> Option<Epoch> {
        self.merge.keys().rev().copied().find(|epoch| self.is_applied(*epoch))
    }

    /// The generation a merge of the epoch must write: the larger of ingest and wanted.
    pub fn merge_target(&self, epoch: Epoch) -> Generation {
        let ingest = self.ingest.get(&epoch).copied().unwrap_or(0);
        ingest.max(self.wanted.get(&epoch).copied().unwrap_or(0))
    }

    /// Raw holds content that main lacks.
    pub fn needs_merge(&self, epoch: Epoch) -> bool {
        self.ingest.contains_key(&epoch)
            && self.merge.get(&epoch).is_none_or(|merge| *merge < self.merge_target(epoch))
    }

    /// Main has the epoch and raw holds it no longer, or holds an older content (a restored backup):
    /// what main says of it cannot be computed again.
    pub fn is_lost(&self, epoch: Epoch) -> bool {
        let Some(merge) = self.merge.get(&epoch) else { return false };
        let is_behind = !self.ingest.contains_key(&epoch) || *merge > self.merge_target(epoch);
        is_behind && !self.is_settled(epoch)
    }

    /// The highest generation any marker of the epoch names.
    pub fn generation(&self, epoch: Epoch) -> Generation {
        let merge = self.merge.get(&epoch).copied().unwrap_or(0);
        merge.max(self.merge_target(epoch))
    }

    /// The epoch lies at or below the floor: its story is over.
    pub fn is_settled(&self, epoch: Epoch) -> bool {
        self.floor.is_some_and(|floor| epoch <= floor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers(pairs: &[(&str, i64)]) -> Markers {
        Markers::of_pipeline("p", pairs.iter().copied())
    }

    fn epoch(value: i64) -> Epoch {
        Epoch::new(value).unwrap()
    }

    #[test]
    fn a_merge_below_wanted_is_not_applied() {
        let mut seen = markers(&[("alluvium/p/7/merge", 1)]);
        assert!(seen.is_applied(epoch(7)));
        seen.wanted.insert(epoch(7), 2);
        assert!(!seen.is_applied(epoch(7)));
        assert!(!seen.applied().contains(&epoch(7)));
    }

    #[test]
    fn an_epoch_needs_a_merge_when_raw_or_wanted_is_ahead() {
        let seen = markers(&[("alluvium/p/1/ingest", 1)]);
        assert!(seen.needs_merge(epoch(1)));
        let seen = markers(&[("alluvium/p/1/ingest", 1), ("alluvium/p/1/merge", 1)]);
        assert!(!seen.needs_merge(epoch(1)));
        let seen = markers(&[("alluvium/p/1/ingest", 2), ("alluvium/p/1/merge", 1)]);
        assert!(seen.needs_merge(epoch(1)));
        assert_eq!(seen.merge_target(epoch(1)), 2);
    }

    #[test]
    fn an_epoch_is_lost_when_raw_is_behind_main() {
        let seen = markers(&[("alluvium/p/1/merge", 2)]);
        assert!(seen.is_lost(epoch(1)) && !seen.is_lost(epoch(2)));
        let mut seen = markers(&[("alluvium/p/1/merge", 2), ("alluvium/p/1/ingest", 1)]);
        assert!(seen.is_lost(epoch(1)));
        // A wanted marker raises what the merge writes, not what raw holds.
        seen.wanted.insert(epoch(1), 2);
        assert!(!seen.is_lost(epoch(1)));
        let seen = markers(&[("alluvium/p/1/merge", 2), ("alluvium/p/1/ingest", 2)]);
        assert!(!seen.is_lost(epoch(1)));
        let seen = markers(&[("alluvium/p/1/merge", 2), ("alluvium/p/floor", 1)]);
        assert!(!seen.is_lost(epoch(1)));
    }

    #[test]
    fn other_pipelines_and_foreign_transactions_are_not_ours() {
        let seen = markers(&[
            ("alluvium/pp/1/merge", 1),
            ("spark", 7),
            ("alluvium/p/x/merge", 1),
            ("alluvium/p/floor", 12),
            ("alluvium/p/hold", 3),
            ("alluvium/p/maintenance", 4),
        ]);
        assert!(seen.merge.is_empty());
        assert_eq!(seen.floor, Some(epoch(12)));
        assert!(seen.is_settled(epoch(12)) && !seen.is_settled(epoch(13)));
        assert!(seen.is_held());
        assert_eq!(seen.maintenance, 4);
    }
}
