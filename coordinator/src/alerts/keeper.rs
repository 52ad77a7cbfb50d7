//! The keeper: remembers open incidents and sends what is to be told, until it is taken.
//!
//! Incidents and outbox are one document below the state folder, written before anything is sent (if it
//! can be written at all) and after it was taken. A crash in between sends the same message, with the same id, again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::metrics::metrics;
use alluvium_protocol::{Error, Result, crash};
use alluvium_table::classify::foreign;
use alluvium_table::store::{StoreRef, object_store_at};
use chrono::{DateTime, Utc};
use object_store::{ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::conditions::{Around, look};
use super::incidents::{Incidents, event};
use super::sinks::Sink;
use super::{Change, Event, Incident, Kind};
use crate::book::Book;

/// Pause between two looks into the outbox.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The document.
const DOCUMENT: &str = "alerts/incidents.json";
/// A message that nobody took for so long is given up; it is in the log.
const GIVE_UP_AFTER: chrono::Duration = chrono::Duration::hours(24);
/// The pauses between attempts: 5 s, doubled up to this.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// A message that the receiver understands and does not want is given up after so many attempts.
const REFUSALS_MAX: u32 = 5;
/// Messages that wait at most: older ones go first, and are told in the log.
const OUTBOX_MAX: usize = 1000;

/// Incidents in one message: chats take some 28 kB.
const EVENTS_MAX: usize = 8;

/// What is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Open incidents.
    #[serde(flatten)]
    pub incidents: Incidents,
    /// Messages that nobody took so far.
    #[serde(default)]
    pub outbox: Vec<Pending>,
    /// The sinks that were told so far; `None`: an older version wrote this.
    #[serde(default)]
    pub sinks: Option<Vec<String>>,
}

/// A message to one sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Unique.
    pub id: String,
    /// The sink's name.
    pub sink: String,
    /// What it tells.
    pub events: Vec<Event>,
    /// Since when it waits.
    pub since: DateTime<Utc>,
    /// Failed attempts.
    pub attempts: u32,
    /// Not before then.
    pub not_before: DateTime<Utc>,
    /// The receiver takes others, and not this one: they do not wait for it.
    #[serde(default)]
    pub steps_aside: bool,
    /// What the receiver said last.
    #[serde(default)]
    pub error: Option<String>,
}

/// Reads what is stored below a state folder.
pub async fn read(state: &str) -> Result<Stored> {
    let store = object_store_at(state)?;
    let doing = || format!("read {DOCUMENT} below {state}");
    match store.get(&Path::from(DOCUMENT)).await {
        Ok(found) => {
            let body = found.bytes().await.map_err(|e| foreign(doing(), &e))?;
            Ok(serde_json::from_slice(&body).unwrap_or_else(|error| {
                tracing::error!(%error, "{DOCUMENT} cannot be understood; it is begun anew");
                Stored::default()
            }))
        }
        Err(object_store::Error::NotFound { .. }) => Ok(Stored::default()),
        Err(error) => Err(foreign(doing(), &error)),
    }
}

/// Keeps incidents and outbox. Clones share both.
#[derive(Clone)]
pub struct Keeper {
    store: StoreRef,
    state: String,
    source: String,
    sinks: Arc<Vec<Sink>>,
    /// All pipelines of the configuration: an incident of another one is over.
    pipelines: Arc<Vec<String>>,
    /// `None`: not read so far.
    held: Arc<Mutex<Option<Held>>>,
    /// One sends at a time: a message that is on its way is not sent by the last words, too.
    sending: Arc<Mutex<()>>,
}

/// The document in memory.
struct Held {
    stored: Stored,
    /// Storage does not have it: the disk may be full, which people want to be told.
    is_unwritten: bool,
}

impl Keeper {
    /// A keeper for these sinks and pipelines. `source` names this installation in messages.
    pub fn open(
        state: &str,
        source: String,
        sinks: Vec<Sink>,
        pipelines: Vec<String>,
    ) -> Result<Self> {
        let (store, state) = (object_store_at(state)?, state.to_owned());
        let held = Arc::new(Mutex::new(None));
        let (sinks, pipelines, sending) = (Arc::new(sinks), Arc::new(pipelines), Arc::default());
        Ok(Self { store, state, source, sinks, pipelines, held, sending })
    }

    /// Looks at everything and stores what is to be told; sends nothing. Err: it is kept in memory and
    /// sent all the same; only a crash before it can be stored would tell it twice.
    pub async fn look(&self, books: &[Book], around: &Around, now: DateTime<Utc>) -> Result<()> {
        let mut slot = self.held.lock().await;
        if slot.is_none() {
            *slot = Some(Held { stored: read(&self.state).await?, is_unwritten: false });
        }
        let Some(held) = slot.as_mut() else { return Ok(()) };
        let before = held.stored.clone();
        let is_configured = |id: &str| self.pipelines.iter().any(|known| known == id);
        let found = look(books, around, &is_configured, &mut held.stored.incidents, now);
        let events = held.stored.incidents.take(&found, now);
        show(&held.stored.incidents);
        self.introduce(&mut held.stored, &events, now);
        for sink in self.sinks.iter() {
            post(sink, &mut held.stored, &events, now);
        }
        cut(&mut held.stored);
        held.is_unwritten |= held.stored != before;
        self.write(held).await
    }

    async fn write(&self, held: &mut Held) -> Result<()> {
        if held.is_unwritten {
            self.store(&held.stored).await?;
            held.is_unwritten = false;
        }
        Ok(())
    }

    /// A sink that is new is told of what is open already; those that are gone are told nothing more.
    fn introduce(&self, stored: &mut Stored, events: &[Event], now: DateTime<Utc>) {
        let is_open = |incident: &&Incident| {
            let mut told = events.iter();
            told.all(|event| event.incident.id != incident.id)
        };
        let open: Vec<Event> = stored
            .incidents
            .open
            .iter()
            .filter(is_open)
            .map(|incident| event(Change::Opened, incident, now))
            .collect();
        let names = self.sinks.iter().map(|sink| sink.name.clone()).collect();
        let told: Option<Vec<String>> = stored.sinks.replace(names);
        let is_new = |sink: &&Sink| told.as_ref().is_some_and(|told| !told.contains(&sink.name));
        for sink in self.sinks.iter().filter(is_new) {
            post(sink, stored, &open, now);
        }
        let known = |pending: &Pending| self.sinks.iter().any(|sink| sink.name == pending.sink);
        for lost in stored.outbox.extract_if(.., |pending| !known(pending)) {
            tracing::warn!(sink = lost.sink, "a message to a sink that is no longer configured");
        }
    }

    async fn store(&self, stored: &Stored) -> Result<()> {
        let body = serde_json::to_vec_pretty(stored).map_err(Error::internal)?;
        crash::point("alerts.before_store")?;
        let put = self.store.put(&Path::from(DOCUMENT), body.into()).await;
        put.map_err(|e| foreign(format!("store {DOCUMENT} below {}", self.state), &e))?;
        crash::point("alerts.after_store")
    }

    /// Sends what is due, until the handle is dropped.
    pub fn start(&self) -> AbortOnDropHandle<()> {
        let keeper = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                if let Err(error) = keeper.send_due().await {
                    tracing::warn!(%error, "alerts that were sent are not noted; they are sent again");
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }))
    }

    /// Sends what is due, sinks side by side, each one's messages in order.
    async fn send_due(&self) -> Result<()> {
        let _turn = self.sending.lock().await;
        let now = Utc::now();
        let mut by_sink: HashMap<String, Vec<Pending>> = HashMap::new();
        for pending in self.held.lock().await.iter().flat_map(|held| &held.stored.outbox) {
            by_sink.entry(pending.sink.clone()).or_default().push(pending.clone());
        }
        let by_sink: HashMap<String, Vec<Pending>> = by_sink
            .into_iter()
            .map(|(sink, waiting)| (sink, due(waiting, now)))
            .filter(|(_, due)| !due.is_empty())
            .collect();
        if by_sink.is_empty() {
            return Ok(());
        }
        let sending = by_sink.into_iter().map(|(name, messages)| {
            let sink = self.sinks.iter().find(|sink| sink.name == name);
            deliver(sink, messages, &self.source, now)
        });
        let sent = futures::future::join_all(sending).await;
        let mut slot = self.held.lock().await;
        let Some(held) = slot.as_mut() else { return Ok(()) };
        let stored = &mut held.stored;
        for (id, left) in sent.into_iter().flatten() {
            match left {
                None => stored.outbox.retain(|pending| pending.id != id),
                Some(left) => {
                    if let Some(held) = stored.outbox.iter_mut().find(|held| held.id == id) {
                        *held = left;
                    }
                }
            }
        }
        held.is_unwritten = true;
        self.write(held).await
    }

    /// Sends what waits and is due, for at most so long: a process that ends tells what it found.
    pub async fn finish(&self, most: Duration) {
        let end = Utc::now() + most;
        let finishing = async {
            loop {
                let due = {
                    let held = self.held.lock().await;
                    let outbox = held.iter().flat_map(|held| &held.stored.outbox);
                    // A sink's first message that the others come after.
                    let mut first: HashMap<&str, DateTime<Utc>> = HashMap::new();
                    for pending in outbox.filter(|pending| !pending.steps_aside) {
                        first.entry(&pending.sink).or_insert(pending.not_before);
                    }
                    first.into_values().min()
                };
                let Some(due) = due.filter(|due| *due < end) else { return };
                tokio::time::sleep((due - Utc::now()).to_std().unwrap_or_default()).await;
                // What cannot be noted as sent was sent.
                let _ = self.send_due().await;
            }
        };
        let _ = tokio::time::timeout(most, finishing).await;
        let left =
            self.held.lock().await.iter().map(|held| held.stored.outbox.len()).sum::<usize>();
        if left > 0 {
            tracing::warn!("{left} alert(s) were not taken so far; the next process sends them");
        }
    }
}

/// Puts events into the outbox, as the sink groups them.
fn post(sink: &Sink, stored: &mut Stored, events: &[Event], now: DateTime<Utc>) {
    let wanted: Vec<Event> = events.iter().filter(|e| sink.wants(e)).cloned().collect();
    let groups: Vec<Vec<Event>> = match sink.groups() {
        true => wanted.chunks(EVENTS_MAX).map(<[Event]>::to_vec).collect(),
        false => wanted.into_iter().map(|event| vec![event]).collect(),
    };
    stored.outbox.extend(groups.into_iter().map(|events| Pending {
        id: Uuid::new_v4().to_string(),
        sink: sink.name.clone(),
        events,
        since: now,
        attempts: 0,
        not_before: now,
        steps_aside: false,
        error: None,
    }));
}

/// Gives up what waits longest when too much waits.
fn cut(stored: &mut Stored) {
    let excess = stored.outbox.len().saturating_sub(OUTBOX_MAX);
    for lost in stored.outbox.drain(..excess) {
        tracing::error!(sink = lost.sink, "too many alerts wait; one was given up");
    }
}

/// Those of a sink's messages that are due: up to one that waits for the receiver, which all others
/// come after. What the receiver refuses as such holds up nothing.
fn due(messages: Vec<Pending>, now: DateTime<Utc>) -> Vec<Pending> {
    let (mut due, mut aside) = (Vec::new(), Aside::default());
    for pending in messages {
        if pending.not_before > now && !pending.steps_aside {
            break;
        }
        if pending.not_before > now || aside.holds(&pending) {
            aside.add(&pending);
        } else {
            due.push(pending);
        }
    }
    due
}

/// Incidents of which a message stepped aside: what is told of them later comes later.
#[derive(Default)]
struct Aside(Vec<(Kind, String)>);

impl Aside {
    fn add(&mut self, pending: &Pending) {
        self.0.extend(pending.events.iter().map(|event| {
            let Incident { kind, pipeline, .. } = &event.incident;
            (*kind, pipeline.clone())
        }));
    }

    fn holds(&self, pending: &Pending) -> bool {
        pending.events.iter().any(|event| {
            let Incident { kind, pipeline, .. } = &event.incident;
            self.0.iter().any(|(held, of)| held == kind && of == pipeline)
        })
    }
}

/// Sends one sink's messages until one is not taken. What is left of each: `None` is done with.
async fn deliver(
    sink: Option<&Sink>,
    messages: Vec<Pending>,
    source: &str,
    now: DateTime<Utc>,
) -> Vec<(String, Option<Pending>)> {
    let mut ended = Vec::new();
    let Some(sink) = sink else {
        // Taken out of the configuration.
        return messages.into_iter().map(|pending| (pending.id, None)).collect();
    };
    let mut aside = Aside::default();
    for pending in messages {
        if aside.holds(&pending) {
            continue;
        }
        let sent = match crash::point("alert.before_send") {
            Ok(()) => sink.send(&pending.events, source).await,
            Err(error) => Err(error.into()),
        };
        let sent = match (sent, crash::point("alert.after_send")) {
            (Ok(_), Err(error)) => Err(error.into()),
            (sent, _) => sent,
        };
        let refusal = match sent {
            Ok(_) => {
                metrics().alert(&sink.name, "sent");
                ended.push((pending.id, None));
                continue;
            }
            Err(refusal) => refusal,
        };
        metrics().alert(&sink.name, "failed");
        tracing::warn!(error = %refusal.error, "an alert was not taken");
        let is_refused = refusal.is_of_message && pending.attempts + 1 >= REFUSALS_MAX;
        if refusal.is_final || is_refused || now - pending.since > GIVE_UP_AFTER {
            tracing::error!(sink = sink.name, error = %refusal.error, "an alert was given up");
            ended.push((pending.id, None));
            continue;
        }
        let doubled = Duration::from_secs(5 << pending.attempts.min(10)).min(PAUSE_MAX);
        let pause = refusal.after.unwrap_or(doubled).min(PAUSE_MAX);
        let not_before = Utc::now() + chrono::Duration::from_std(pause).unwrap_or_default();
        let left = Pending {
            attempts: pending.attempts + 1,
            not_before,
            steps_aside: refusal.is_of_message,
            error: Some(refusal.error.message),
            ..pending
        };
        aside.add(&left);
        ended.push((left.id.clone(), Some(left)));
        if !refusal.is_of_message {
            // The others would fail, too, and come after it.
            break;
        }
    }
    ended
}

fn show(incidents: &Incidents) {
    metrics().clear("alerts_open");
    for kind in Kind::ALL {
        let count = incidents.open.iter().filter(|open| open.kind == *kind).count();
        metrics().set("alerts_open", &[("kind", kind.as_str())], count as f64);
    }
}
