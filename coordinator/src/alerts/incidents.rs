//! From what is wrong now to what people are told: a pure function, tested as a story.

use std::collections::BTreeMap;

use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Change, Event, Found, Incident, Key};

/// An incident that keeps growing is told again at most this often.
const GROWS_EVERY: Duration = Duration::minutes(5);

/// Open incidents, and since when things wait; stored with the outbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incidents {
    /// The open ones.
    pub open: Vec<Incident>,
    /// When something that may become an incident was seen first, by name.
    #[serde(default)]
    pub first_seen: BTreeMap<String, DateTime<Utc>>,
}

impl Incidents {
    /// The open incident of a key.
    pub fn get(&self, key: &Key) -> Option<&Incident> {
        self.open.iter().find(|open| open.kind == key.kind && open.pipeline == key.pipeline)
    }

    /// Since when a thing has been seen; now, if it is new. What is not asked for in one look is
    /// forgotten by [`Incidents::forget_unseen`].
    pub fn since(&mut self, name: String, now: DateTime<Utc>) -> DateTime<Utc> {
        *self.first_seen.entry(name).or_insert(now)
    }

    /// Keeps only these first sightings.
    pub fn forget_unseen(&mut self, is_seen: impl Fn(&str) -> bool) {
        self.first_seen.retain(|name, _| is_seen(name));
    }

    /// Takes a look in, and returns what people are to be told.
    pub fn take(&mut self, found: &Found, now: DateTime<Utc>) -> Vec<Event> {
        let mut events = Vec::new();
        for condition in &found.conditions {
            let key = &condition.key;
            let at = self
                .open
                .iter()
                .position(|open| open.kind == key.kind && open.pipeline == key.pipeline);
            let Some(at) = at else {
                let incident = Incident {
                    id: Uuid::new_v4().to_string(),
                    kind: key.kind,
                    pipeline: key.pipeline.clone(),
                    opened_at: now,
                    told_at: now,
                    subjects: condition.subjects.clone(),
                    told: condition.subjects.keys().cloned().collect(),
                    help: condition.help.clone(),
                };
                events.push(event(Change::Opened, &incident, now));
                self.open.push(incident);
                continue;
            };
            let incident = &mut self.open[at];
            incident.subjects.clone_from(&condition.subjects);
            incident.help.clone_from(&condition.help);
            let has_news = incident.subjects.keys().any(|name| !incident.told.contains(name));
            if has_news && now - incident.told_at >= GROWS_EVERY {
                incident.told_at = now;
                let news: Vec<String> = incident.subjects.keys().cloned().collect();
                incident.told.extend(news);
                incident.told.sort();
                incident.told.dedup();
                events.push(event(Change::Grew, incident, now));
            }
        }
        let is_there = |open: &Incident| {
            let is_key = |key: &Key| key.kind == open.kind && key.pipeline == open.pipeline;
            found.conditions.iter().any(|condition| is_key(&condition.key))
                || found.unknown.iter().any(is_key)
        };
        for over in self.open.iter().filter(|open| !is_there(open)) {
            events.push(event(Change::Resolved, over, now));
        }
        self.open.retain(is_there);
        events
    }
}

/// What people are to be told of an incident.
pub(super) fn event(change: Change, incident: &Incident, now: DateTime<Utc>) -> Event {
    Event { id: Uuid::new_v4().to_string(), change, at: now, incident: incident.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alerts::{Condition, Kind};

    fn key() -> Key {
        Key { kind: Kind::Blocked, pipeline: "p".to_owned() }
    }

    fn found(subjects: &[&str]) -> Found {
        let subjects = subjects.iter().map(|name| ((*name).to_owned(), "why".to_owned())).collect();
        let condition = Condition { key: key(), subjects, help: "do".to_owned() };
        Found { conditions: vec![condition], unknown: Vec::new() }
    }

    fn at(minute: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + Duration::minutes(minute)
    }

    fn changes(events: &[Event]) -> Vec<Change> {
        events.iter().map(|event| event.change).collect()
    }

    #[test]
    fn a_night_of_failures_is_one_alert_and_one_recovery() {
        let mut incidents = Incidents::default();
        let mut told = Vec::new();
        for minute in 0..500 {
            told.extend(incidents.take(&found(&["7"]), at(minute)));
        }
        told.extend(incidents.take(&Found::default(), at(500)));
        assert_eq!(changes(&told), [Change::Opened, Change::Resolved]);
        assert_eq!(told[0].incident.id, told[1].incident.id);
        assert!(incidents.open.is_empty());
    }

    #[test]
    fn growth_is_told_once_and_not_too_often() {
        let mut incidents = Incidents::default();
        assert_eq!(changes(&incidents.take(&found(&["1"]), at(0))), [Change::Opened]);
        assert!(incidents.take(&found(&["1", "2"]), at(1)).is_empty());
        let told = incidents.take(&found(&["1", "2", "3"]), at(6));
        assert_eq!(changes(&told), [Change::Grew]);
        assert_eq!(told[0].incident.subjects.len(), 3);
        // Fewer, and an old one again: no news.
        assert!(incidents.take(&found(&["3"]), at(20)).is_empty());
        assert!(incidents.take(&found(&["1"]), at(30)).is_empty());
    }

    #[test]
    fn what_cannot_be_judged_stays_open() {
        let mut incidents = Incidents::default();
        incidents.take(&found(&["1"]), at(0));
        let unknown = Found { conditions: Vec::new(), unknown: vec![key()] };
        assert!(incidents.take(&unknown, at(1)).is_empty());
        assert_eq!(incidents.open.len(), 1);
    }
}
