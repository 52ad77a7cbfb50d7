//! Tasks that nobody has: their message, or its result, was lost with a broker or a queue.

use std::time::Duration;

use alluvium_protocol::Result;
use alluvium_protocol::state::Event;
use chrono::{DateTime, Utc};

use crate::run::Coordinator;

/// A task that was not seen for so long is published again. Longer than a lease lives: a worker that
/// was started anew has taken it up by then.
const LOST_AFTER: Duration = Duration::from_secs(20);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

fn chrono(time: Duration) -> chrono::Duration {
    chrono::Duration::from_std(time).unwrap_or_default()
}

impl Coordinator {
    /// When to look again; `None`: nothing can get lost.
    pub(crate) fn next_look_for_lost(&self) -> Option<DateTime<Utc>> {
        let is_out = self.books.iter().any(|book| !book.outstanding.is_empty());
        (self.settings.leases.is_some() && is_out)
            .then(|| self.looked_for_lost + chrono(LOOK_EVERY))
    }

    /// Moves epochs whose tasks are lost back, so that they are published again. A task that was not
    /// lost after all is done twice at most, and the second time finds its marker.
    pub(crate) async fn find_lost_tasks(&mut self) -> Result<()> {
        let Some(leases) = self.settings.leases.clone() else { return Ok(()) };
        let now = self.clock.now();
        if now - self.looked_for_lost < chrono(LOOK_EVERY) {
            return Ok(());
        }
        self.looked_for_lost = now;
        for book in &mut self.books {
            let mut lost = Vec::new();
            for (id, out) in &mut book.outstanding {
                if now - out.alive_at < chrono(LOST_AFTER) {
                    continue;
                }
                // What cannot be asked is not judged.
                let Ok(holder) = leases.holder(*id).await else { return Ok(()) };
                let Ok(waiting) = self.queue.waiting(out.lane).await else { return Ok(()) };
                if holder.is_some() || waiting > 0 {
                    out.alive_at = now;
                    continue;
                }
                lost.push(*id);
            }
            for id in lost {
                let Some(out) = book.outstanding.remove(&id) else { continue };
                tracing::warn!(task = %id, pipeline = book.pipeline.id, step = out.work.step().as_str(),
                    "a task was lost; it is published again");
                for epoch in out.work.epochs() {
                    let Some(entry) = book.entries.get_mut(&epoch) else { continue };
                    if entry.state.is_outstanding() {
                        entry.apply(Event::GaveBack)?;
                    }
                }
            }
        }
        Ok(())
    }
}
