//! When a pipeline's source is listed: at every poll, or by a schedule; earlier when something wakes it.
//!
//! Nothing here says that there is anything to do: a wake that is lost or doubled changes only when the
//! next listing happens.

use std::str::FromStr;

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use croner::Cron;

use crate::book::Book;

/// A cron expression in a time zone.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    zone: Tz,
}

impl Schedule {
    /// Reads an expression of five fields (minute, hour, day, month, weekday), six with seconds first,
    /// or `@hourly` and its like. Err: why it is none.
    pub fn parse(text: &str, zone: Tz) -> Result<Self, String> {
        let cron = Cron::from_str(text).map_err(|error| error.to_string())?;
        let schedule = Self { cron, zone };
        match schedule.next_after(Utc::now()) {
            Some(_) => Ok(schedule),
            None => Err("it never comes".to_owned()),
        }
    }

    /// The next moment after `now`. A time of day that the clock jumps over comes right after the jump (of
    /// a time that comes every so many minutes that hour's are left out); one that it repeats comes once.
    pub fn next_after(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let next = self.cron.find_next_occurrence(&now.with_timezone(&self.zone), false).ok()?;
        Some(next.with_timezone(&Utc))
    }
}

impl Book {
    /// The source is to be listed now: it is polled, its time has come, something woke it, or a folder
    /// wants its second look.
    pub(crate) fn is_to_be_listed(&self, now: DateTime<Utc>, once: bool) -> bool {
        let Some(next) = self.next_listing(now) else { return true };
        let settles = |at: DateTime<Utc>| at <= now;
        once || self.is_woken
            || self.error.is_some()
            || next <= now
            || self.entries.values().any(|entry| entry.settles_at.is_some_and(settles))
    }

    /// When the schedule asks for the next listing; `None`: there is no schedule.
    pub(crate) fn next_listing(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let schedule = self.policy.schedule.as_ref()?;
        // A process that was just started looks at once: it may have missed a time.
        let Some(listed_at) = self.listed_at else { return Some(now) };
        Some(schedule.next_after(listed_at).unwrap_or(DateTime::<Utc>::MAX_UTC))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(text: &str, zone: Tz, from: &str, count: usize) -> Vec<String> {
        let schedule = Schedule::parse(text, zone).unwrap();
        let mut now: DateTime<Utc> = from.parse().unwrap();
        let mut found = Vec::new();
        for _ in 0..count {
            now = schedule.next_after(now).unwrap();
            found.push(now.format("%m-%d %H:%M").to_string());
        }
        found
    }

    #[test]
    fn a_local_hour_follows_daylight_saving() {
        // Berlin goes to summer time on 2027-03-28 at 02:00 and back on 2027-10-31 at 03:00.
        let berlin = Tz::Europe__Berlin;
        let spring = times("0 6 * * *", berlin, "2027-03-26T12:00:00Z", 3);
        assert_eq!(spring, ["03-27 05:00", "03-28 04:00", "03-29 04:00"]);
        let autumn = times("0 6 * * *", berlin, "2027-10-29T12:00:00Z", 3);
        assert_eq!(autumn, ["10-30 04:00", "10-31 05:00", "11-01 05:00"]);
    }

    #[test]
    fn an_hour_that_is_skipped_or_repeated_runs_once() {
        let berlin = Tz::Europe__Berlin;
        let spring = times("30 2 * * *", berlin, "2027-03-27T12:00:00Z", 2);
        assert_eq!(spring.len(), 2);
        assert!(spring[0].starts_with("03-28 01:"), "{spring:?}");
        assert_eq!(spring[1], "03-29 00:30");
        let autumn = times("30 2 * * *", berlin, "2027-10-30T12:00:00Z", 2);
        assert_eq!(autumn[0], "10-31 00:30");
        assert_eq!(autumn[1], "11-01 01:30");
    }

    #[test]
    fn nonsense_and_never_are_refused() {
        for text in ["", "61 * * * *", "0 0 30 2 *", "every day"] {
            assert!(Schedule::parse(text, Tz::UTC).is_err(), "{text}");
        }
    }
}
