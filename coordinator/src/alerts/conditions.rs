//! What is wrong now, out of the books and of what stands around: nothing here sends or remembers.

use std::collections::BTreeMap;

use alluvium_protocol::Epoch;
use alluvium_protocol::state::State;
use alluvium_protocol::task::Step;
use chrono::{DateTime, Duration, Timelike, Utc};
use uuid::Uuid;

use super::incidents::Incidents;
use super::{Condition, Found, Key, Kind};
use crate::book::{Book, Entry};

/// Workers may be away for so long while they are exchanged.
const NO_WORKERS_FOR: Duration = Duration::seconds(60);
/// Maintenance that failed so often in a row is worth a word.
const MAINTENANCE_FAILURES: u32 = 3;
/// So is what failed for so long, however seldom it is tried: a `run --once` each night tries once.
const MAINTENANCE_FAILS_FOR: Duration = Duration::hours(12);

/// What other processes and the queue say; `None`: they could not be asked.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// Processes whose disks run full, and how full.
    pub full_disks: Option<BTreeMap<String, String>>,
    /// Living workers; `None` where workers are no processes of their own, too.
    pub workers: Option<usize>,
    /// Messages that nobody understands.
    pub dead_letters: Option<usize>,
    /// Messages that nobody has in hand, by queue.
    pub queues: Vec<(String, usize)>,
    /// Tasks that workers say they have in hand; `None`: nobody knows.
    pub in_hand: Option<Vec<(Uuid, Step)>>,
}

/// Collects what one look finds.
struct Look<'a> {
    incidents: &'a mut Incidents,
    now: DateTime<Utc>,
    found: Found,
    seen: Vec<String>,
}

/// Looks at everything. `incidents` remembers since when things wait; `is_configured`: there is such a
/// pipeline, be it one that this process does not work on.
pub fn look(
    books: &[Book],
    around: &Around,
    is_configured: &dyn Fn(&str) -> bool,
    incidents: &mut Incidents,
    now: DateTime<Utc>,
) -> Found {
    let mut look = Look { incidents, now, found: Found::default(), seen: Vec::new() };
    for book in books {
        look.at_pipeline(book);
    }
    look.at_cluster(around);
    // Pipelines of another selection are not judged here; those that nobody has any more have no trouble.
    let known = |pipeline: &str| {
        pipeline.is_empty()
            || books.iter().any(|book| book.pipeline.id == pipeline)
            || !is_configured(pipeline)
    };
    let foreign: Vec<Key> = look
        .incidents
        .open
        .iter()
        .filter(|open| !known(&open.pipeline))
        .map(|open| Key { kind: open.kind, pipeline: open.pipeline.clone() })
        .collect();
    look.found.unknown.extend(foreign);
    let Look { incidents, found, seen, .. } = look;
    let is_judged = |name: &str| match name.split('/').nth(1) {
        Some(id) => books.iter().any(|book| book.pipeline.id == id && book.error.is_none()),
        None => true,
    };
    incidents.forget_unseen(|name| seen.iter().any(|seen| seen == name) || !is_judged(name));
    found
}

impl Look<'_> {
    fn since(&mut self, name: String) -> DateTime<Utc> {
        self.seen.push(name.clone());
        self.incidents.since(name, self.now)
    }

    fn add(
        &mut self,
        kind: Kind,
        pipeline: &str,
        subjects: BTreeMap<String, String>,
        help: String,
    ) {
        if !subjects.is_empty() {
            let key = Key { kind, pipeline: pipeline.to_owned() };
            self.found.conditions.push(Condition { key, subjects, help });
        }
    }

    fn unknown(&mut self, kind: Kind, pipeline: &str) {
        self.found.unknown.push(Key { kind, pipeline: pipeline.to_owned() });
    }

    fn at_pipeline(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        if let Some(error) = &book.error {
            let help = error.help.clone().unwrap_or_else(|| format!("`alluvium status {id}`"));
            let code = error.code.to_string();
            self.add(Kind::Broken, id, BTreeMap::from([(code, error.message.clone())]), help);
            // Nothing else can be judged.
            for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::Broken) {
                self.unknown(*kind, id);
            }
            return;
        }
        self.stopped(book);
        self.folders(book);
        self.arrivals(book);
        self.lag(book);
        self.maintenance(book);
        self.quarantine(book);
        match &book.hook {
            Some(hook) if hook.failures > 0 => {
                let text = hook.error.clone().unwrap_or_default();
                let help = "it is called again by itself; see `after_merge`".to_owned();
                self.add(Kind::Hook, id, BTreeMap::from([(id.to_owned(), text)]), help);
            }
            Some(hook) if !hook.is_known || hook.is_behind() => self.unknown(Kind::Hook, id),
            Some(_) | None => {}
        }
    }

    fn maintenance(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let name = format!("maintenance/{id}");
        let Some(failures) = book.maintenance_failures else {
            // Not tried yet by this process: what an earlier one saw still counts.
            self.seen.push(name);
            return self.unknown(Kind::Maintenance, id);
        };
        if failures == 0 {
            return;
        }
        let failing_for = self.now - self.since(name);
        let key = Key { kind: Kind::Maintenance, pipeline: id.to_owned() };
        let is_told = self.incidents.get(&key).is_some();
        if failures >= MAINTENANCE_FAILURES || failing_for >= MAINTENANCE_FAILS_FOR || is_told {
            let text = book.maintenance_error.clone().unwrap_or_default();
            let help = format!("`alluvium runs {id}` shows the attempts");
            self.add(Kind::Maintenance, id, BTreeMap::from([(id.to_owned(), text)]), help);
        }
    }

    fn stopped(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let mut by_kind: BTreeMap<Kind, BTreeMap<String, String>> = BTreeMap::new();
        for (epoch, entry) in &book.entries {
            if let Some(kind) = self.kind_of(book, *epoch, entry) {
                let subject = format!("epoch {epoch}");
                // What is tried again is still what it was, until it is at its end.
                let key = Key { kind, pipeline: id.to_owned() };
                let told = self.incidents.get(&key).and_then(|open| open.subjects.get(&subject));
                let text = match (&entry.error, told) {
                    (Some(error), _) => error.to_string(),
                    (None, Some(told)) => told.clone(),
                    (None, None) => "it is tried again".to_owned(),
                };
                by_kind.entry(kind).or_default().insert(subject, text);
            }
        }
        for (kind, subjects) in by_kind {
            let help = format!(
                "`alluvium epochs {id} --state blocked`; repair, then `alluvium retry {id} EPOCH`, or \
                 `alluvium skip {id} EPOCH`"
            );
            self.add(kind, id, subjects, help);
        }
    }

    /// An epoch that is tried again is still the trouble that it was, until it is at its end.
    fn kind_of(&self, book: &Book, epoch: Epoch, entry: &Entry) -> Option<Kind> {
        match entry.state {
            State::Blocked(_) if entry.late => Some(Kind::LateBlocked),
            State::Blocked(_) => Some(Kind::Blocked),
            State::Parked(_) => Some(Kind::Poison),
            // Empty content has nothing to wait for, even before main exists.
            State::Ingested if entry.is_empty && !book.has_main => None,
            state if state.is_end() => None,
            _ => [Kind::Blocked, Kind::LateBlocked, Kind::Poison].into_iter().find(|kind| {
                let key = Key { kind: *kind, pipeline: book.pipeline.id.clone() };
                let name = format!("epoch {epoch}");
                self.incidents.get(&key).is_some_and(|open| open.subjects.contains_key(&name))
            }),
        }
    }

    fn folders(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let changed = book
            .entries
            .iter()
            .filter_map(|(epoch, entry)| Some((format!("epoch {epoch}"), entry.changed.clone()?)));
        if book.compared_at.is_none() {
            self.unknown(Kind::FolderChanged, id);
        } else {
            let help = format!("`alluvium replay {id} EPOCH` reads a folder again");
            self.add(Kind::FolderChanged, id, changed.collect(), help);
        }
        let Some(most) = book.policy.incomplete.and_then(|most| Duration::from_std(most).ok())
        else {
            return;
        };
        let mut late = BTreeMap::new();
        for (epoch, entry) in &book.entries {
            if !matches!(entry.state, State::Incomplete | State::Empty) {
                continue;
            }
            let since = self.since(format!("incomplete/{id}/{epoch}"));
            if self.now - since > most {
                let why = entry.why.clone().unwrap_or_default();
                let text = format!("since {}: {why}", since.format("%Y-%m-%d %H:%M UTC"));
                late.insert(format!("epoch {epoch}"), text);
            }
        }
        let help = format!("ask the producer; or `alluvium skip {id} EPOCH`");
        self.add(Kind::FolderIncomplete, id, late, help);
    }

    fn arrivals(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let mut late = BTreeMap::new();
        let newest = book.last_arrival;
        let told = newest.map_or_else(
            || "nothing ever came".to_owned(),
            |at| format!("the last delivery came {}", at.format("%Y-%m-%d %H:%M UTC")),
        );
        if let Some(most) = book.policy.no_arrival.and_then(|most| Duration::from_std(most).ok()) {
            let since = match newest {
                Some(at) => at,
                None => self.since(format!("nothing/{id}")),
            };
            if self.now - since > most {
                late.insert("deliveries".to_owned(), told.clone());
            }
        }
        if let Some(time) = book.policy.arrive_by {
            let zone = book.policy.timezone;
            let here = self.now.with_timezone(&zone);
            let is_due = here.time().num_seconds_from_midnight() > time.num_seconds_from_midnight();
            let key = Key { kind: Kind::NothingArrived, pipeline: id.to_owned() };
            // Before today's time, what was missing yesterday is missing still.
            let day = match (is_due, self.incidents.get(&key)) {
                (true, _) => Some(here.date_naive()),
                (false, Some(_)) => here.date_naive().pred_opt(),
                (false, None) => None,
            };
            let came = newest.map(|at| at.with_timezone(&zone).date_naive());
            if let Some(day) = day.filter(|day| came.is_none_or(|came| came < *day)) {
                late.insert(format!("{day}"), format!("due by {time} {zone}; {told}"));
            }
        }
        let help = format!("look at {}, and ask the producer", book.pipeline.source);
        self.add(Kind::NothingArrived, id, late, help);
    }

    fn lag(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let Some(most) = book.policy.lag.and_then(|most| Duration::from_std(most).ok()) else {
            return;
        };
        let mut late = BTreeMap::new();
        let waiting = |state: State| {
            state.is_outstanding()
                || state.is_stopped()
                || matches!(state, State::Ready | State::Ingested)
        };
        for (epoch, entry) in book.entries.iter().filter(|(_, entry)| waiting(entry.state)) {
            let since = self.since(format!("waiting/{id}/{epoch}"));
            let waited = self.now - since;
            if waited > most {
                let minutes = waited.num_minutes();
                let text = format!("{}, for {minutes} minutes", entry.state.as_str());
                late.insert(format!("epoch {epoch}"), text);
            }
        }
        let help = format!("`alluvium plan {id}` says why; `alluvium status` shows workers");
        self.add(Kind::Lag, id, late, help);
    }

    fn quarantine(&mut self, book: &Book) {
        let id = book.pipeline.id.as_str();
        let Some(most) = book.policy.quarantine_share else { return };
        if book.refused.is_empty() {
            return self.unknown(Kind::Quarantine, id);
        }
        let mut bad = BTreeMap::new();
        for (epoch, (refused, read)) in &book.refused {
            let share = if *read == 0 { 0.0 } else { *refused as f64 / *read as f64 };
            if share > most {
                let text = format!("{refused} of {read} rows ({:.1} %)", share * 100.0);
                bad.insert(format!("epoch {epoch}"), text);
            }
        }
        let help = format!("`alluvium quarantine list {id}`");
        self.add(Kind::Quarantine, id, bad, help);
    }

    fn at_cluster(&mut self, around: &Around) {
        match &around.full_disks {
            Some(full) => {
                let help = "free disk below TMPDIR, or set another; `worker.disk_free`".to_owned();
                self.add(Kind::LowDisk, "", full.clone(), help);
            }
            None => self.unknown(Kind::LowDisk, ""),
        }
        match around.workers {
            Some(0) => {
                let since = self.since("no workers".to_owned());
                if self.now - since > NO_WORKERS_FOR {
                    let text = format!("since {}", since.format("%H:%M UTC"));
                    let subjects = BTreeMap::from([("workers".to_owned(), text)]);
                    let help = "`alluvium worker` starts one".to_owned();
                    self.add(Kind::NoWorkers, "", subjects, help);
                }
            }
            Some(_) => {}
            None => self.unknown(Kind::NoWorkers, ""),
        }
        match around.dead_letters {
            Some(0) => {}
            Some(count) => {
                let subjects =
                    BTreeMap::from([("queue".to_owned(), format!("{count} in the dead letters"))]);
                let help = "look at them in RabbitMQ, then purge the queue; no data is lost";
                self.add(Kind::DeadLetters, "", subjects, help.to_owned());
            }
            None => self.unknown(Kind::DeadLetters, ""),
        }
    }
}
