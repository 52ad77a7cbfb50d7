//! Beside the loop's work: gauges, alerts, hooks, and pipelines that follow others.

use std::time::Duration;

use alluvium_protocol::metrics::metrics;
use alluvium_protocol::queue::Lane;
use alluvium_protocol::state::State;
use chrono::{DateTime, TimeDelta, Utc};

use crate::alerts::conditions::Around;
use crate::api::DEAD;
use crate::book::Book;
use crate::hooks::{self, HookEnded};
use crate::run::Coordinator;
use crate::sequencing::Plan;
use crate::standing::standing_of;

/// Pause between two looks.
pub(crate) const WATCH_EVERY: TimeDelta = TimeDelta::seconds(5);
/// Wakes within this time share a discovery: a delivery of a thousand files is one.
const WAKE_EVERY: TimeDelta = TimeDelta::seconds(1);
/// A process that ends tries so long to send what it has to tell.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// A drained run calls a failing hook so often.
const HOOK_ATTEMPTS: u32 = 3;
/// Epochs in this range are taken for seconds since 1970 (2001 to 2096).
const UNIX_SECONDS: std::ops::Range<i64> = 1_000_000_000..4_000_000_000;
/// And in this one for milliseconds.
const UNIX_MILLIS: std::ops::Range<i64> = 1_000_000_000_000..4_000_000_000_000;

/// Gauges that only who leads can set.
const OF_LEADER: [&str; 13] = [
    "epoch_lag_seconds",
    "oldest_waiting_seconds",
    "epochs",
    "table_version",
    "table_files",
    "table_small_files",
    "table_read_cost_ratio",
    "leading",
    "alerts_open",
    "queue_messages",
    "queue_oldest_message_age_seconds",
    "dlq_messages",
    "workers",
];

impl Coordinator {
    /// Looks at everything, now and then.
    pub(crate) async fn watch(&mut self) {
        let now = self.clock.now();
        for book in &mut self.books {
            hooks::begin(book, now, &self.hooks.0).await;
        }
        if now - self.watched_at < WATCH_EVERY {
            return;
        }
        self.watched_at = now;
        let around = self.around();
        for book in &self.books {
            show(book, now);
        }
        metrics().set("leading", &[], 1.0);
        self.show_queues(&around, now);
        if let Some(count) = around.dead_letters {
            metrics().set("dlq_messages", &[("queue", DEAD)], count as f64);
        }
        if let Some(count) = around.workers {
            metrics().set("workers", &[], count as f64);
        }
        self.tell(now).await;
        for book in &mut self.books {
            // The newest one says how things are now.
            while book.refused.len() > 1 {
                book.refused.pop_first();
            }
        }
    }

    fn show_queues(&self, around: &Around, now: DateTime<Utc>) {
        for name in ["queue_messages", "queue_oldest_message_age_seconds"] {
            metrics().clear(name);
        }
        for (queue, ready) in around.queues.iter().filter(|(queue, _)| queue != DEAD) {
            let labels = |state| [("queue", queue.as_str()), ("state", state)];
            metrics().set("queue_messages", &labels("ready"), *ready as f64);
            // Nobody holds results for longer than it takes to note them.
            let Some(lane) = Lane::TASKS.into_iter().find(|lane| lane.as_str() == queue) else {
                continue;
            };
            let Some(in_hand) = &around.in_hand else { continue };
            let unacked = in_hand.iter().filter(|(_, step)| Lane::of(*step) == lane).count();
            metrics().set("queue_messages", &labels("unacked"), unacked as f64);
            let waiting =
                self.books.iter().flat_map(|book| &book.outstanding).filter(|(id, out)| {
                    out.lane == lane && in_hand.iter().all(|(task, _)| task != *id)
                });
            let oldest = waiting.map(|(_, out)| out.published_at).min();
            let age = oldest.map_or(0.0, |at| (now - at).as_seconds_f64());
            let queue = [("queue", queue.as_str())];
            metrics().set("queue_oldest_message_age_seconds", &queue, age);
        }
    }

    async fn tell(&self, now: DateTime<Utc>) {
        let Some(keeper) = &self.settings.alerts else { return };
        if let Err(error) = keeper.look(&self.books, &self.around(), now).await {
            tracing::error!(%error, "alerts cannot be kept; data goes on");
        }
    }

    fn around(&self) -> Around {
        let held = self.settings.around.lock();
        held.unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Before the process ends, or another one leads.
    pub(crate) async fn watch_last(&mut self) {
        if self.settings.once {
            self.tell(self.clock.now()).await;
            if let Some(keeper) = &self.settings.alerts {
                // Who is told to stop does not wait for a receiver.
                tokio::select! {
                    () = keeper.finish(LAST_WORDS) => {}
                    () = self.stopping.cancelled() => {}
                }
            }
        }
        for name in OF_LEADER {
            metrics().clear(name);
        }
    }

    /// Pipelines that follow one that merged something are listed at once.
    pub(crate) fn wake_followers(&mut self) {
        let merged = std::mem::take(&mut self.merged);
        let follows = |book: &&Book| book.policy.after.iter().any(|name| merged.contains(name));
        let followers: Vec<String> =
            self.books.iter().filter(follows).map(|book| book.pipeline.id.clone()).collect();
        self.wake(&followers);
    }

    /// Something came for these pipelines: they are listed soon, the others when they are due.
    pub(crate) fn wake(&mut self, pipelines: &[String]) {
        let now = self.clock.now();
        for book in self.books.iter_mut().filter(|book| pipelines.contains(&book.pipeline.id)) {
            book.is_woken = true;
            let at = book.listed_at.map_or(now, |listed| now.max(listed + WAKE_EVERY));
            self.wake_due = Some(self.wake_due.map_or(at, |due| due.min(at)));
        }
    }

    pub(crate) fn note_hook(&mut self, ended: HookEnded) {
        let now = self.clock.now();
        if let Some(book) = self.books.iter_mut().find(|book| ended.is_of(book)) {
            hooks::end(book, ended, now);
        }
    }

    /// A drained run waits for its hooks, within reason.
    pub(crate) fn is_hook_done(&self, book: &Book) -> bool {
        book.hook.as_ref().is_none_or(|hook| {
            !hook.is_running && (!hook.is_behind() || hook.failures >= HOOK_ATTEMPTS)
        })
    }
}

fn show(book: &Book, now: DateTime<Utc>) {
    let id = [("pipeline", book.pipeline.id.as_str())];
    let of = |name, value| [id[0], (name, value)];
    let standing = standing_of(book, &Plan::default());
    let lag = standing.fresh_to.map(|epoch| epoch.value()).and_then(|epoch| {
        if UNIX_SECONDS.contains(&epoch) {
            Some(now.timestamp() - epoch)
        } else if UNIX_MILLIS.contains(&epoch) {
            Some(now.timestamp() - epoch / 1000)
        } else {
            None
        }
    });
    if let Some(lag) = lag {
        metrics().set("epoch_lag_seconds", &id, lag as f64);
    }
    let waiting = book.entries.values().filter(|entry| {
        !entry.state.is_end() && !matches!(entry.state, State::Empty | State::Incomplete)
    });
    let oldest = waiting.filter_map(|entry| entry.found_at).min();
    let waited = oldest.map_or(0.0, |at| (now - at).as_seconds_f64());
    metrics().set("oldest_waiting_seconds", &id, waited);
    for state in State::WORDS {
        let count = standing.epochs.get(state).copied().unwrap_or(0);
        metrics().set("epochs", &of("state", state), count as f64);
    }
    for (table, version) in [("raw", standing.raw_version), ("main", standing.main_version)] {
        if let Some(version) = version {
            metrics().set("table_version", &of("table", table), version as f64);
        }
    }
    let main = of("table", "main");
    metrics().set("table_files", &main, standing.main_files as f64);
    metrics().set("table_small_files", &main, standing.main_small_files as f64);
    metrics().set("table_read_cost_ratio", &main, f64::from(standing.main_read_cost) / 100.0);
}
