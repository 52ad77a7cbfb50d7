//! When a failed task is tried again: pure functions of (error, attempt, limits, seed).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Class, Error};

/// How often a task may fail before its epoch is blocked or parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Attempts that may fail with a transient error, the first included.
    pub attempts_max: u32,
    /// Workers that may die while they hold the task.
    pub crashes_max: u32,
}

/// Workers that may die at one task before it is parked.
pub const CRASHES_MAX: u32 = 3;

/// What becomes of a failed task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Publish it again after [`delay`].
    Retry,
    /// Block the epoch: a person, a changed folder or the next `run --once` helps.
    Block,
    /// Park the epoch: its workers die.
    Park,
    /// Publish it again at once; the attempt does not count.
    GiveBack,
}

/// Judges a failure. `failures` counts this one; `crashes` counts dead workers.
pub fn judge(error: &Error, failures: u32, crashes: u32, limits: Limits) -> Judgement {
    match error.class() {
        Class::Stopping => Judgement::GiveBack,
        Class::Permanent => Judgement::Block,
        Class::Crash if crashes >= limits.crashes_max => Judgement::Park,
        Class::Crash => Judgement::Retry,
        Class::Transient if failures >= limits.attempts_max => Judgement::Block,
        Class::Transient => Judgement::Retry,
    }
}

/// Longest pause before the first retry; it doubles with each further one.
const DELAY_FIRST: Duration = Duration::from_millis(500);
/// No pause is longer: by then a person has been told.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// The pause before the next attempt: full jitter between half and all of an exponential step.
///
/// `failures` is at least 1. With any seed: 0.25–0.5 s, 0.5–1 s, 1–2 s, … 30–60 s.
pub fn delay(failures: u32, seed: u64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let step = DELAY_FIRST.saturating_mul(1 << doublings).min(DELAY_MAX);
    let share = 0.5 + 0.5 * (scramble(seed ^ u64::from(failures)) as f64 / u64::MAX as f64);
    step.mul_f64(share)
}

/// A pause between nothing and `step`, from the operating system's randomness: for connections, where
/// nobody needs to repeat it.
pub fn jitter(step: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u64_pair().1;
    step.mul_f64(random as f64 / u64::MAX as f64)
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): spreads a seed over all bits.
fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    const LIMITS: Limits = Limits { attempts_max: 3, crashes_max: 3 };

    #[test]
    fn the_class_decides() {
        let cases = [
            (Code::StorageUnavailable, 1, 0, Judgement::Retry),
            (Code::StorageUnavailable, 2, 0, Judgement::Retry),
            (Code::StorageUnavailable, 3, 0, Judgement::Block),
            (Code::KeyColumnMissing, 1, 0, Judgement::Block),
            (Code::TaskPoison, 1, 2, Judgement::Retry),
            (Code::TaskPoison, 1, 3, Judgement::Park),
            (Code::Stopping, 9, 9, Judgement::GiveBack),
        ];
        for (code, failures, crashes, expected) in cases {
            let error = Error::new(code, "x");
            assert_eq!(judge(&error, failures, crashes, LIMITS), expected, "{code} {failures}");
        }
    }

    #[test]
    fn delays_grow_stay_bounded_and_repeat_for_a_seed() {
        for seed in 0..200 {
            for failures in 1..40 {
                let pause = delay(failures, seed);
                let step = DELAY_FIRST.saturating_mul(1 << (failures - 1).min(16)).min(DELAY_MAX);
                assert!(pause >= step / 2 && pause <= step, "{failures} {seed}: {pause:?}");
                assert_eq!(pause, delay(failures, seed));
            }
        }
    }
}
