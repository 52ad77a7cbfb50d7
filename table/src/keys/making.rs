//! Side indexes that a scan makes by the way, out of the keys that it reads anyhow.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::cache::Cache;
use super::side::Entry;

/// Memory of an entry while the index is made, bytes.
const ENTRY_BYTES: u64 = size_of::<Entry>() as u64;

/// The index of one data file in the making: its row groups come in any order.
pub(super) struct Making {
    cache: &'static Cache,
    name: u128,
    rows: u64,
    room: Arc<Semaphore>,
    held: Mutex<Held>,
}

struct Held {
    /// Row groups that are to come.
    left: usize,
    state: State,
}

enum State {
    /// No row group has come.
    Begun,
    /// The entries so far, and the memory that all of them take.
    Taken(Vec<Entry>, OwnedSemaphorePermit),
    /// There was no memory: another scan may make it, unless the file is too large for that.
    Dropped,
}

impl Making {
    /// An index for `rows` rows in so many row groups; `room` counts kibibytes.
    pub(super) fn new(
        cache: &'static Cache,
        (name, rows, groups): (u128, u64, usize),
        room: Arc<Semaphore>,
    ) -> Self {
        let held = Mutex::new(Held { left: groups, state: State::Begun });
        Self { cache, name, rows, room, held }
    }

    /// A row group's keys are wanted: to be taken when it is read. Returns whether there is memory.
    pub(super) fn begin(&self) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Begun = held.state {
            let kibibytes = u32::try_from(self.rows * ENTRY_BYTES / 1024 + 1).unwrap_or(u32::MAX);
            let room = Arc::clone(&self.room).try_acquire_many_owned(kibibytes);
            let rows = usize::try_from(self.rows).unwrap_or(usize::MAX);
            held.state = match room {
                Ok(room) => State::Taken(Vec::with_capacity(rows), room),
                Err(_) => {
                    tracing::debug!(self.rows, "no memory for a side index");
                    State::Dropped
                }
            };
        }
        matches!(held.state, State::Taken(..))
    }

    /// Where a key's row is, to be given to [`Self::take`].
    pub(super) fn entry(&self, key: &[u8], row: u64) -> Entry {
        // Rows of such files are counted before: they fit.
        self.cache.key().entry(key, row as u32)
    }

    /// Takes a row group's keys; with the last one the index is kept.
    pub(super) fn take(&self, mut entries: Vec<Entry>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.left -= 1;
        let is_last = held.left == 0;
        if let State::Taken(taken, _) = &mut held.state {
            taken.append(&mut entries);
        }
        if is_last
            && let State::Taken(taken, room) = std::mem::replace(&mut held.state, State::Dropped)
        {
            drop(held);
            self.cache.store(self.name, self.rows, taken);
            drop(room);
        }
    }
}
