//! Pauses between attempts of one process at one thing: the only place that names `backoff`.
//!
//! Retries of *tasks* are the coordinator's, by a pure function (`alluvium_protocol::retry`).

use std::time::Duration;

use backoff::backoff::Backoff;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

const PAUSE_MAX: Duration = Duration::from_millis(500);
/// An attempt may take longer than all patience: so many are made in any case.
const PAUSES_MIN: u32 = 3;

/// Growing pauses with jitter, until the time is up.
pub struct Pauses {
    patience: Duration,
    asked: u32,
    /// Since the first pause was asked for.
    backoff: Option<ExponentialBackoff>,
}

impl Pauses {
    /// Pauses from about 5 ms to 500 ms, for at most `patience` after the first attempt; but some in any case.
    pub fn for_at_most(patience: Duration) -> Self {
        Self { patience, asked: 0, backoff: None }
    }

    /// Waits for the next attempt. `false`: the time is up.
    pub async fn wait(&mut self) -> bool {
        self.asked += 1;
        let backoff = self.backoff.get_or_insert_with(|| {
            ExponentialBackoffBuilder::new()
                .with_initial_interval(Duration::from_millis(5))
                .with_randomization_factor(0.5)
                .with_multiplier(1.6)
                .with_max_interval(PAUSE_MAX)
                .with_max_elapsed_time(Some(self.patience))
                .build()
        });
        match backoff.next_backoff() {
            Some(pause) => tokio::time::sleep(pause).await,
            None if self.asked <= PAUSES_MIN => tokio::time::sleep(PAUSE_MAX).await,
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn attempts_that_take_longer_than_all_patience_are_made_again() {
        let mut pauses = Pauses::for_at_most(Duration::ZERO);
        for _ in 0..PAUSES_MIN {
            assert!(pauses.wait().await);
        }
        assert!(!pauses.wait().await);
    }
}
