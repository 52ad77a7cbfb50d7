//! Metrics of this process, for Prometheus: every name, its unit and its labels, in one place.
//!
//! Labels are bounded: pipelines and steps of the configuration, never an epoch, a run or a path.
//! Counters count what this process did; gauges of the coordinator are set while it leads.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What [`text`] is written in.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds: from a claim of a lease to a merge that rewrites a large table.
const SECONDS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0, 3600.0];

/// Tries of one commit.
const ATTEMPTS: [f64; 6] = [1.0, 2.0, 3.0, 5.0, 10.0, 20.0];

type Labels = Vec<(&'static str, String)>;
type Values = Gauge<f64, AtomicU64>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// Every metric.
pub struct Metrics {
    registry: Registry,
    build: Family<Labels, Gauge>,
    steps: Family<Labels, Counter>,
    durations: Histograms,
    queue_waits: Histograms,
    lease_waits: Histograms,
    lease_lost: Counter,
    discovered: Family<Labels, Counter>,
    rows: Family<Labels, Counter>,
    commit_attempts: Histograms,
    conflicts: Family<Labels, Counter>,
    searched: Family<Labels, Counter>,
    requests: Family<Labels, Counter>,
    bytes_read: Counter,
    bytes_written: Counter,
    in_flight: Family<Labels, Gauge>,
    retries: Family<Labels, Counter>,
    processed: Family<Labels, Counter>,
    alerts: Family<Labels, Counter>,
    gauges: Vec<(&'static str, Family<Labels, Values>)>,
}

/// Gauges: name (without the prefix), and what it says.
const GAUGES: [(&str, &str); 19] = [
    ("epoch_lag_seconds", "Now less the newest epoch that is in main with all lower known ones"),
    ("oldest_waiting_seconds", "For how long the oldest epoch that is not in main has waited"),
    ("epochs", "Known epochs by state"),
    ("table_version", "Version of a table"),
    ("table_files", "Data files of a table"),
    ("table_small_files", "Data files of a table that gain by being written anew"),
    ("table_read_cost_ratio", "What a read costs beside one of all new files, estimated"),
    ("queue_messages", "Messages that nobody has in hand (ready) and that somebody has (unacked)"),
    (
        "queue_oldest_message_age_seconds",
        "For how long the oldest task that nobody has in hand waits",
    ),
    ("dlq_messages", "Messages that nobody could understand"),
    ("workers", "Living workers"),
    ("leading", "Whether this coordinator leads"),
    ("alerts_open", "Open incidents by kind"),
    ("worker_up", "Whether this worker takes tasks: 0 while it rests or drains"),
    ("worker_last_heartbeat_timestamp_seconds", "When others last heard of this process"),
    ("worker_cpu_ratio", "Processors that this process uses, 1 for a whole one"),
    ("worker_memory_bytes", "Memory of this process"),
    ("worker_disk_free_bytes", "Free disk for spilling"),
    ("worker_slots", "Tasks that this process can have in hand"),
];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

fn of_attempts() -> Histogram {
    Histogram::new(ATTEMPTS)
}

fn of(labels: &[(&'static str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("alluvium");
        let seconds = || Histograms::new_with_constructor(histogram as fn() -> Histogram);
        let gauges = GAUGES.map(|(name, _)| (name, Family::default())).to_vec();
        let metrics = Self {
            registry: Registry::default(),
            build: Family::default(),
            steps: Family::default(),
            durations: seconds(),
            queue_waits: seconds(),
            lease_waits: seconds(),
            lease_lost: Counter::default(),
            discovered: Family::default(),
            rows: Family::default(),
            commit_attempts: Histograms::new_with_constructor(of_attempts as fn() -> Histogram),
            conflicts: Family::default(),
            searched: Family::default(),
            requests: Family::default(),
            bytes_read: Counter::default(),
            bytes_written: Counter::default(),
            in_flight: Family::default(),
            retries: Family::default(),
            processed: Family::default(),
            alerts: Family::default(),
            gauges,
        };
        let r = &mut registry;
        r.register("build_info", "What runs", metrics.build.clone());
        r.register("steps", "Attempts that ended here, and how", metrics.steps.clone());
        r.register("step_duration_seconds", "Time of an attempt's work", metrics.durations.clone());
        r.register(
            "queue_wait_seconds",
            "Time of a task in its queue",
            metrics.queue_waits.clone(),
        );
        r.register("lease_wait_seconds", "Time to claim a lease", metrics.lease_waits.clone());
        r.register("lease_lost", "Tasks that another worker took over", metrics.lease_lost.clone());
        r.register("epochs_discovered", "Contents of epochs found", metrics.discovered.clone());
        r.register("rows_written", "Rows for raw, main and quarantine", metrics.rows.clone());
        r.register(
            "delta_commit_attempts",
            "Tries until a commit was made",
            metrics.commit_attempts.clone(),
        );
        r.register("delta_commit_conflicts", "Commits that lost a race", metrics.conflicts.clone());
        r.register(
            "searched_files",
            "Data files that keys were looked for in",
            metrics.searched.clone(),
        );
        r.register("storage_requests", "Requests to remote storage", metrics.requests.clone());
        r.register("bytes_read", "Bytes from remote storage", metrics.bytes_read.clone());
        r.register("bytes_written", "Bytes to remote storage", metrics.bytes_written.clone());
        r.register("steps_in_flight", "Tasks in hand", metrics.in_flight.clone());
        r.register("step_retries", "Attempts that are made again", metrics.retries.clone());
        r.register("epochs_processed", "Epochs that entered main", metrics.processed.clone());
        r.register("alerts_sent", "Alerts by sink and result", metrics.alerts.clone());
        for ((name, help), (_, gauge)) in GAUGES.iter().zip(&metrics.gauges) {
            r.register(*name, *help, gauge.clone());
        }
        Self { registry, ..metrics }
    }

    /// What this process was built from; `commit`: `unknown` where nobody knows.
    pub fn build(&self, version: &str, commit: &str) {
        self.build.get_or_create(&of(&[("version", version), ("commit", commit)])).set(1);
    }

    /// An attempt ended here, with `status`: `done` or the class of its error.
    pub fn step(&self, pipeline: &str, step: &str, status: &str, seconds: f64) {
        let labels = [("pipeline", pipeline), ("step", step), ("status", status)];
        self.steps.get_or_create(&of(&labels)).inc();
        self.durations.get_or_create(&of(&[("step", step)])).observe(seconds);
    }

    /// A task waited in its queue, and for its lease.
    pub fn waits(&self, step: &str, queue_seconds: f64, lease_seconds: f64) {
        let labels = of(&[("step", step)]);
        self.queue_waits.get_or_create(&labels).observe(queue_seconds.max(0.0));
        self.lease_waits.get_or_create(&labels).observe(lease_seconds.max(0.0));
    }

    /// A lease went to somebody else.
    pub fn lease_lost(&self) {
        self.lease_lost.inc();
    }

    /// A content of an epoch was found that is to be processed.
    pub fn discovered(&self, pipeline: &str) {
        self.discovered.get_or_create(&of(&[("pipeline", pipeline)])).inc();
    }

    /// Rows were written to `raw`, `main` or `quarantine`.
    pub fn rows(&self, pipeline: &str, table: &str, rows: u64) {
        self.rows.get_or_create(&of(&[("pipeline", pipeline), ("table", table)])).inc_by(rows);
    }

    /// A commit was made at last.
    pub fn committed(&self, step: &str, attempts: u64) {
        self.commit_attempts.get_or_create(&of(&[("step", step)])).observe(attempts as f64);
    }

    /// Commits lost races.
    pub fn conflicts(&self, pipeline: &str, step: &str, count: u64) {
        let labels = of(&[("pipeline", pipeline), ("step", step)]);
        self.conflicts.get_or_create(&labels).inc_by(count);
    }

    /// Keys were looked for in data files, in each by its side index (`index`) or in its columns (`columns`).
    pub fn searched(&self, by: &'static str, files: usize) {
        self.searched.get_or_create(&of(&[("by", by)])).inc_by(files as u64);
    }

    /// A request went to remote storage.
    pub fn request(&self, operation: &'static str, read: u64, written: u64) {
        self.requests.get_or_create(&of(&[("operation", operation)])).inc();
        self.bytes_read.inc_by(read);
        self.bytes_written.inc_by(written);
    }

    /// Tasks of a step came (1) or went (-1).
    pub fn in_flight(&self, step: &str, change: i64) {
        self.in_flight.get_or_create(&of(&[("step", step)])).inc_by(change);
    }

    /// An attempt is made again, because of `reason`: the code of what went wrong.
    pub fn retry(&self, step: &str, reason: &str) {
        self.retries.get_or_create(&of(&[("step", step), ("reason", reason)])).inc();
    }

    /// Epochs entered main.
    pub fn processed(&self, pipeline: &str, epochs: usize) {
        let labels = of(&[("pipeline", pipeline)]);
        self.processed.get_or_create(&labels).inc_by(epochs as u64);
    }

    /// An alert was sent, or could not be.
    pub fn alert(&self, sink: &str, result: &str) {
        self.alerts.get_or_create(&of(&[("sink", sink), ("result", result)])).inc();
    }

    /// Sets one of the gauges.
    pub fn set(&self, name: &'static str, labels: &[(&'static str, &str)], value: f64) {
        if let Some(family) = self.gauge(name) {
            family.get_or_create(&of(labels)).set(value);
        }
    }

    /// Forgets a gauge's values: they are no longer known here.
    pub fn clear(&self, name: &'static str) {
        if let Some(family) = self.gauge(name) {
            family.clear();
        }
    }

    fn gauge(&self, name: &'static str) -> Option<&Family<Labels, Values>> {
        let found = self.gauges.iter().find(|(known, _)| *known == name);
        debug_assert!(found.is_some(), "there is no gauge {name}");
        found.map(|(_, family)| family)
    }
}

/// This process's metrics.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(Metrics::new)
}

/// All of them, as Prometheus reads them.
pub fn text() -> String {
    let mut text = String::new();
    // A String takes everything.
    let _ = encode(&mut text, &metrics().registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_prefix_and_unit() {
        metrics().step("p", "merge", "done", 0.2);
        metrics().set("epoch_lag_seconds", &[("pipeline", "p")], 12.0);
        metrics().request("get", 10, 0);
        let text = text();
        for line in [
            r#"alluvium_steps_total{pipeline="p",step="merge",status="done"} 1"#,
            r#"alluvium_step_duration_seconds_bucket{le="0.25",step="merge"} 1"#,
            r#"alluvium_epoch_lag_seconds{pipeline="p"} 12.0"#,
            "alluvium_bytes_read_total 10",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
