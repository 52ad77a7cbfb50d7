//! Pauses between attempts of one process at one thing: the only place that names `backoff`.
//!
//! Retries of *tasks* are the coordinator's, by a pure function (`alluvium_protocol::retry`).

use std::time::{Duration, Instant};

use backoff::backoff::Backoff;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

/// Growing pauses with jitter, until the time is up.
pub struct Pauses(ExponentialBackoff);

impl Pauses {
    /// Pauses from about 5 ms to 500 ms, for at most `patience` in all.
    pub fn for_at_most(patience: Duration) -> Self {
        Self(
            ExponentialBackoffBuilder::new()
                .with_initial_interval(Duration::from_millis(5))
                .with_randomization_factor(0.5)
                .with_multiplier(1.6)
                .with_max_interval(Duration::from_millis(500))
                .with_max_elapsed_time(Some(patience))
                .build(),
        )
    }

    /// Waits for the next attempt. `false`: the time is up.
    pub async fn wait(&mut self) -> bool {
        match self.0.next_backoff() {
            Some(pause) => {
                tokio::time::sleep(pause).await;
                true
            }
            None => false,
        }
    }

    /// When the first pause was asked for.
    pub fn began(&self) -> Instant {
        self.0.start_time
    }
}
