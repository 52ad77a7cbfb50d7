//! Named crash points: one before and one after every external effect.
//!
//! Free unless asked for. `ALLUVIUM_CRASH=name:2` kills the process (SIGKILL, as `kill -9` does) the
//! second time the point is passed; `ALLUVIUM_FAIL=name:2` makes that passing return a transient
//! error instead, as if the effect had happened and its reply were lost; `name:2-9` the second to the
//! ninth time; `ALLUVIUM_STOP=name` stops the process there (SIGSTOP) until somebody lets it go on.
//! Tests walk [`POINTS`].

use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::{Code, Error, Result};

/// Every crash point, by the name used at its call site. A test compares the list with the source.
pub const POINTS: &[&str] = &[
    "manifest.before_store",
    "manifest.after_store",
    "request.after_carried_out",
    "task.before_publish",
    "task.after_publish",
    "task.after_claim",
    "result.before_publish",
    "result.after_publish",
    "task.after_ack",
    "table.after_create",
    "schema.before_commit",
    "schema.after_commit",
    "shard.after_plan",
    "shard.after_note",
    "shard.before_result",
    "shard.after_result",
    "ingest.after_read",
    "ingest.after_write",
    "quarantine.before_commit",
    "quarantine.after_commit",
    "ingest.before_commit",
    "ingest.after_commit",
    "merge.after_plan",
    "merge.after_write",
    "merge.before_commit",
    "merge.after_commit",
    "optimize.after_write",
    "optimize.before_commit",
    "optimize.after_commit",
    "cleanup.before_delete",
    "cleanup.after_delete",
    "checkpoint.before_write",
    "checkpoint.after_write",
    "restore.after_plan",
    "restore.before_commit",
    "restore.after_commit",
    "point.before_commit",
    "point.after_commit",
    "hold.before_commit",
    "hold.after_commit",
    "ledger.before_commit",
    "ledger.after_commit",
    "result.before_ack",
    "alerts.before_store",
    "alerts.after_store",
    "alert.before_send",
    "alert.after_send",
    "hook.before_call",
    "hook.after_call",
];

struct Armed {
    point: String,
    passings: RangeInclusive<u32>,
    passed: AtomicU32,
}

fn armed(variable: &str) -> Option<Armed> {
    let value = std::env::var(variable).ok()?;
    let (point, passings) = value.split_once(':').unwrap_or((&value, "1"));
    let (first, last) = passings.split_once('-').unwrap_or((passings, passings));
    let passings = first.parse().unwrap_or(1)..=last.parse().unwrap_or(1);
    Some(Armed { point: point.to_owned(), passings, passed: AtomicU32::new(0) })
}

fn is_due(armed: &Option<Armed>, point: &str) -> bool {
    armed.as_ref().is_some_and(|armed| {
        armed.point == point
            && armed.passings.contains(&(armed.passed.fetch_add(1, Ordering::SeqCst) + 1))
    })
}

/// Whom a stop is sent to: it stops the whole process in any case, but Linux hands it to the thread that is named, and so
/// before the call returns. Named by the process it waits until the first thread runs, and this one goes on meanwhile.
fn this_thread() -> Pid {
    let link = std::fs::read_link("/proc/thread-self").ok();
    let number = link.and_then(|link| link.file_name()?.to_str()?.parse().ok());
    number.and_then(Pid::from_raw).unwrap_or_else(getpid)
}

/// What a count is to be wrong by, for the tests of the checks: `ALLUVIUM_MISCOUNT=merge` makes it 1.
pub fn miscount(step: &'static str) -> u64 {
    static MISCOUNT: OnceLock<Option<String>> = OnceLock::new();
    let asked = MISCOUNT.get_or_init(|| std::env::var("ALLUVIUM_MISCOUNT").ok());
    u64::from(asked.as_deref() == Some(step))
}

/// Passes the crash point `point`: nothing, a kill, a stop, or a lost reply.
pub fn point(point: &'static str) -> Result<()> {
    static CRASH: OnceLock<Option<Armed>> = OnceLock::new();
    static FAIL: OnceLock<Option<Armed>> = OnceLock::new();
    static STOP: OnceLock<Option<Armed>> = OnceLock::new();
    debug_assert!(POINTS.contains(&point), "crash point {point} is not in POINTS");
    // The errors are of no use: a process that cannot send itself a signal goes on.
    if is_due(CRASH.get_or_init(|| armed("ALLUVIUM_CRASH")), point) {
        let _ = kill_process(getpid(), Signal::KILL);
    }
    if is_due(STOP.get_or_init(|| armed("ALLUVIUM_STOP")), point) {
        let _ = kill_process(this_thread(), Signal::STOP);
    }
    if is_due(FAIL.get_or_init(|| armed("ALLUVIUM_FAIL")), point) {
        return Err(Error::new(Code::StorageUnavailable, format!("injected failure at {point}")));
    }
    Ok(())
}
