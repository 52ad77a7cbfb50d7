//! What a team wants of a pipeline beside its data: when it is looked at, and when somebody is told.
//!
//! Nothing here says what a row means, so none of it travels in tasks.

use std::time::Duration;

use chrono::NaiveTime;
use chrono_tz::Tz;

use crate::hooks::Hook;
use crate::triggers::Schedule;

/// One pipeline's wishes.
#[derive(Clone, Debug)]
pub struct Policy {
    /// When its source is listed; `None`: at every poll.
    pub schedule: Option<Schedule>,
    /// Pipelines after whose merges it is looked at, too.
    pub after: Vec<String>,
    /// Called after each merge.
    pub hook: Option<Hook>,
    /// The oldest waiting epoch may be this old.
    pub lag: Option<Duration>,
    /// Pause between two deliveries.
    pub no_arrival: Option<Duration>,
    /// Something arrives every day until this time.
    pub arrive_by: Option<NaiveTime>,
    /// Where that time is.
    pub timezone: Tz,
    /// A folder is complete within this time.
    pub incomplete: Option<Duration>,
    /// Of an epoch's rows, 0 to 1, so many may be refused.
    pub quarantine_share: Option<f64>,
    /// A processed folder that changes is read again by itself.
    pub replay_changed: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            schedule: None,
            after: Vec::new(),
            hook: None,
            lag: None,
            no_arrival: None,
            arrive_by: None,
            timezone: Tz::UTC,
            incomplete: None,
            quarantine_share: None,
            replay_changed: false,
        }
    }
}
