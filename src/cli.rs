//! The command line: verbs, arguments, help with examples. No verb does anything here.

use std::path::PathBuf;

use alluvium_protocol::Epoch;
use alluvium_protocol::state::State;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Where the demo goes unless somebody says otherwise.
pub(crate) const DEMO_FOLDER: &str = "alluvium-demo";

const OVERVIEW: &str = "Alluvium carries epoch folders from storage into Delta tables: exactly once \
in effect, in order, right under any crash.";

const EXAMPLES: &str = "\
Examples:
  alluvium demo                            see it work: sample epochs, processed, shown
  alluvium config reference > alluvium.toml
  alluvium run --once                      process what is ready, then stop (for cron)
  alluvium run                             keep watching
  alluvium coordinator, alluvium worker    the same on many processes, over RabbitMQ and Redis
  alluvium status                          what is fresh, what is red, and why
  alluvium query researchers \"SELECT count(*) FROM main\"
  alluvium explain AL-0301                 what an error code means, and what to do

Exit codes: 0 ok, 1 something failed or is blocked, 2 usage or configuration, 3 unhealthy,
4 a dependency cannot be reached, 5 conflict or locked, 130 interrupted.";

/// Version and commit.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("ALLUVIUM_COMMIT"), ")");

/// The whole command line.
#[derive(Parser)]
#[command(name = "alluvium", version = VERSION, about = OVERVIEW, after_help = EXAMPLES, arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
    /// The configuration file [default: ALLUVIUM_CONFIG, then ./alluvium.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How logs are written to stderr
    #[arg(long, global = true, value_enum, default_value = "human")]
    pub(crate) log_format: LogFormat,
    /// Which logs: error, warn, info, debug, or a filter [default: ALLUVIUM_LOG, then warn]
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For eyes.
    Human,
    /// One JSON object a line.
    Json,
}

/// A process that serves HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// At `cluster.listen`.
    Coordinator,
    /// At `worker.listen`.
    Worker,
}

/// A step that needs no epoch's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OneStep {
    /// Raw into main.
    Merge,
    /// Main's files.
    Optimize,
    /// What nothing names any more.
    Cleanup,
}

/// How results look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For eyes.
    Table,
    /// One JSON document.
    Json,
}

#[derive(Args)]
pub(crate) struct OutputArgument {
    /// How the result is printed
    #[arg(short = 'o', long = "output", value_enum, default_value = "table")]
    pub(crate) output: Output,
}

/// The verbs.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Write sample epochs, process them, show what happened; no configuration, no services
    Demo(Demo),
    /// Process epochs in this process: discovery, ingest, merge, optimize, cleanup
    Run {
        /// Drain what is ready and stop: 0 all merged, 1 something is blocked
        #[arg(long)]
        once: bool,
        /// Only this pipeline
        pipeline: Option<String>,
    },
    /// Decide what is to be done, for a cluster of workers; two of them do no harm
    #[command(after_help = COORDINATOR_EXAMPLES)]
    Coordinator {
        /// Drain what is ready and stop, as `run --once` does
        #[arg(long)]
        once: bool,
        /// Only this pipeline
        pipeline: Option<String>,
    },
    /// Work on the tasks of a coordinator, with as many others as you start
    Worker(WorkerArguments),
    /// Check everything that this configuration needs, and say what to do
    Doctor {
        #[command(flatten)]
        output: OutputArgument,
    },
    /// What is fresh, what is red, and why
    Status {
        /// Only this pipeline
        pipeline: Option<String>,
        /// Show it again every two seconds
        #[arg(long, short = 'w')]
        watch: bool,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Every epoch with its state
    Epochs {
        /// Only this pipeline
        pipeline: Option<String>,
        /// Only epochs in this state
        #[arg(long, value_parser = State::WORDS)]
        state: Option<String>,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Every attempt, newest first
    Runs {
        /// Only this pipeline
        pipeline: Option<String>,
        /// Only this epoch
        #[arg(long)]
        epoch: Option<Epoch>,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// What a run would do now, and why the rest waits
    Plan {
        /// Only this pipeline
        pipeline: Option<String>,
        /// List the files that a cleanup would delete now
        #[arg(long)]
        cleanup: bool,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Ask the process on this machine whether it is ready: exit 0 or 3 (for containers)
    Health {
        /// Which process
        #[arg(value_enum)]
        role: Role,
    },
    /// Living workers and coordinators, and what they have in hand
    Workers {
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Try a blocked or parked epoch again
    Retry(OfEpoch),
    /// Leave an epoch out: its content becomes empty
    Skip(OfEpoch),
    /// Read an epoch's folder again and make main as if it had always been so
    Replay(OfEpoch),
    /// Take an epoch's content out of main
    Undo(OfEpoch),
    /// Stop publishing tasks of a pipeline, until `resume`
    Pause {
        /// The pipeline
        pipeline: String,
    },
    /// Go on after `pause` or `rollback`: what waits merges, and what was asked for meanwhile is done
    Resume {
        /// The pipeline
        pipeline: String,
    },
    /// Take main back to an earlier point, in one commit, and pause the pipeline
    #[command(after_help = ROLLBACK_EXAMPLES)]
    Rollback(Rollback),
    /// Versions of main that cleanup must keep
    RollbackPoint {
        #[command(subcommand)]
        verb: PointVerb,
    },
    /// The columns of a pipeline's tables
    Schema {
        #[command(subcommand)]
        verb: SchemaVerb,
    },
    /// The tables of a pipeline
    Tables {
        #[command(subcommand)]
        verb: TablesVerb,
    },
    /// What people are told: open incidents, and a test of each sink
    Alerts {
        #[command(subcommand)]
        verb: AlertsVerb,
    },
    /// Run SQL over main, raw, quarantine and the ledger
    #[command(after_help = QUERY_EXAMPLES)]
    Query {
        /// The pipeline whose tables are meant
        pipeline: String,
        /// SQL; tables: main, raw, quarantine, processed_folders, step_events, audit_log
        sql: String,
        /// Main as it was at this version
        #[arg(long, value_name = "V", conflicts_with = "at_epoch")]
        at_version: Option<u64>,
        /// Main with the epochs up to this one only, as raw says them now
        #[arg(long, value_name = "EPOCH")]
        at_epoch: Option<Epoch>,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Where a key's value comes from: epoch, file and row, and what each epoch said of it
    #[command(after_help = LINEAGE_EXAMPLES)]
    Lineage {
        /// The pipeline
        pipeline: String,
        /// The key; for a key of several columns once for each, in their order
        #[arg(long = "key", value_name = "VALUE", required = true, allow_hyphen_values = true)]
        key: Vec<String>,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Refused rows: which, why, and what can be done about them
    #[command(after_help = QUARANTINE_HELP)]
    Quarantine {
        #[command(subcommand)]
        verb: QuarantineVerb,
    },
    /// What an error code means: what happened, what is still safe, what to do
    Explain {
        /// Such as AL-0301; without it all codes are listed
        code: Option<String>,
    },
    /// Check, show or document the configuration
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// The ledger: what people read about epochs
    Ledger {
        #[command(subcommand)]
        verb: LedgerVerb,
    },
    /// Every manual act
    Audit {
        #[command(subcommand)]
        verb: AuditVerb,
    },
    /// One step by itself, without queue, lock and ledger: for scripts/bench and for races in tests
    #[command(hide = true)]
    Step {
        /// Which; a merge takes all that raw holds and main does not
        #[arg(value_enum)]
        step: OneStep,
    },
    /// Measure the path of tasks through the queue, for scripts/bench
    #[command(hide = true)]
    BenchQueue {
        /// Tasks in the measurement of throughput
        #[arg(long, default_value_t = 20_000)]
        tasks: usize,
        /// Tasks one at a time
        #[arg(long, default_value_t = 500)]
        samples: usize,
    },
    /// The names of all crash points, for tests
    #[command(hide = true)]
    CrashPoints,
}

const COORDINATOR_EXAMPLES: &str = "\
Examples:
  alluvium coordinator                     needs [cluster] in the configuration
  alluvium coordinator --once              for cron, beside workers with --exit-when-idle
  alluvium status --watch                  in another window";

const WORKER_EXAMPLES: &str = "\
Examples:
  alluvium worker                          as many tasks at a time as there are processors
  alluvium worker --slots 1 --steps merge  for a machine with much memory
  alluvium worker --exit-when-idle         ends when there was nothing to do for a while
  alluvium worker --max-tasks 1            one task, then ends (a job of a batch system)

SIGTERM or Ctrl-C: takes no more tasks, finishes or gives back those in hand, exits 0.
Again: exits at once; others take over what it had.";

/// Steps that a worker can be told to serve.
const STEPS: [&str; 4] = ["ingest", "merge", "optimize", "cleanup"];

#[derive(Args)]
#[command(after_help = WORKER_EXAMPLES)]
pub(crate) struct WorkerArguments {
    /// Tasks at a time [default: worker.slots]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) slots: Option<u16>,
    /// Only tasks of these steps; optimize and cleanup share a queue, so that either means both
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = STEPS)]
    pub(crate) steps: Vec<String>,
    /// End when there was no task for this long
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "10")]
    pub(crate) exit_when_idle: Option<u64>,
    /// End after so many tasks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_tasks: Option<u64>,
}

const ROLLBACK_EXAMPLES: &str = "\
Examples:
  alluvium rollback researchers --to-epoch 1700172800 --dry-run   what would happen
  alluvium rollback researchers --to-epoch 1700172800             only epochs up to it stay in main
  alluvium rollback researchers --to-version 41                   the files of that version
  alluvium resume researchers                                     epochs that went merge again

`undo PIPELINE EPOCH` takes out one epoch and leaves later ones in.";

#[derive(Args)]
#[command(group = clap::ArgGroup::new("point").required(true).args(["to_epoch", "to_version"]))]
pub(crate) struct Rollback {
    /// The pipeline
    pub(crate) pipeline: String,
    /// Only epochs up to this one stay in main
    #[arg(long, value_name = "EPOCH")]
    pub(crate) to_epoch: Option<Epoch>,
    /// Main becomes what it was at this version
    #[arg(long, value_name = "V", value_parser = clap::value_parser!(i64).range(0..))]
    pub(crate) to_version: Option<i64>,
    /// Show what would happen, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgument,
}

#[derive(Subcommand)]
pub(crate) enum PointVerb {
    /// Keep a version: the newest, unless another is named
    Add {
        /// The pipeline
        pipeline: String,
        /// The point's name
        name: String,
        /// The version of main
        #[arg(long, value_name = "V", value_parser = clap::value_parser!(i64).range(0..))]
        version: Option<i64>,
    },
    /// All points, and whether their files are there
    List {
        /// The pipeline
        pipeline: String,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Forget a point: cleanup may take its files
    Remove {
        /// The pipeline
        pipeline: String,
        /// The point's name
        name: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum AlertsVerb {
    /// Open incidents, and what was not sent so far
    List {
        #[command(flatten)]
        output: OutputArgument,
    },
    /// The kinds of trouble that alerts are about
    Kinds {
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Send a test to a sink, and show its answer
    Test {
        /// The NAME of [alert.NAME]
        sink: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum SchemaVerb {
    /// Which columns raw and main were made with, and which came later, with which epoch
    History {
        /// The pipeline
        pipeline: String,
        #[command(flatten)]
        output: OutputArgument,
    },
}

#[derive(Subcommand)]
pub(crate) enum TablesVerb {
    /// State of the files of raw and main: small ones, deleted rows, what a read costs, what optimize would do
    #[command(after_help = HEALTH_EXAMPLES)]
    Health {
        /// The pipeline
        pipeline: String,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Versions of main, newest first: what made each, and which epochs it brought
    History {
        /// The pipeline
        pipeline: String,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        output: OutputArgument,
    },
}

const HEALTH_EXAMPLES: &str = "\
Examples:
  alluvium tables health researchers
  alluvium tables health researchers -o json

`read cost` is an estimate: 100% when all files are new and none has rows marked as deleted.
`overlap` says in how many files a key may be, on average: 1 when files do not overlap.";

const QUERY_EXAMPLES: &str = "\
Examples:
  alluvium query researchers \"SELECT count(*) FROM main\"
  alluvium query researchers \"SELECT * FROM main WHERE pguid = 'x'\" --at-epoch 1700086400
  alluvium query researchers \"SELECT _epoch, _op, count(*) FROM raw GROUP BY 1, 2 ORDER BY 1\"
  alluvium query researchers \"SELECT reason, row FROM quarantine\" -o json";

const QUARANTINE_HELP: &str = "\
Reasons: null_key (a NULL in the key), type:COLUMN (a value that does not fit), malformed (no row can be
read), select (`select` fails for it), expect:NAME (an expectation), duplicate_key (`on_duplicate`),
corrupt_file (a whole file that cannot be read). More: docs/rows.md

Examples:
  alluvium quarantine list                     how many, by epoch and reason
  alluvium quarantine show researchers 1700086400
  alluvium quarantine show researchers 1700086400 -o json > rows.json      to correct `content` in it, then
  alluvium quarantine replay researchers 1700086400 --rows rows.json
  alluvium quarantine replay researchers 1700086400    read the folder again: after it was delivered
                                               again, or the configuration was corrected
  alluvium quarantine drop researchers 1700086400      forget them";

#[derive(Subcommand)]
pub(crate) enum QuarantineVerb {
    /// How many rows, by epoch and reason
    List {
        /// Only this pipeline
        pipeline: Option<String>,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// The rows as they came, with file and position
    Show {
        /// The pipeline
        pipeline: String,
        /// Only this epoch
        epoch: Option<Epoch>,
        /// Only this reason
        #[arg(long)]
        reason: Option<String>,
        /// At most so many; without it 20 in a table, all as JSON
        #[arg(long)]
        limit: Option<usize>,
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Read the epoch's folder again: every row is judged anew
    Replay {
        #[command(flatten)]
        of: OfEpoch,
        /// Corrected rows: what `show -o json` prints, with another `content`
        #[arg(long, value_name = "FILE")]
        rows: Option<PathBuf>,
    },
    /// Forget an epoch's refused rows
    Drop(OfEpoch),
}

const LINEAGE_EXAMPLES: &str = "\
Examples:
  alluvium lineage researchers --key r-000042
  alluvium lineage visits --key r-000042 --key 7        key = [\"pguid\", \"site\"]

Exit code 3: main holds something else than its epochs say.";

#[derive(Args)]
#[command(after_help = DEMO_EXAMPLES)]
pub(crate) struct Demo {
    /// Rows in each epoch
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rows: u64,
    /// Epoch folders, the late and the incomplete one among them
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(4..=100_000))]
    pub(crate) epochs: u64,
    /// The same seed makes the same data
    #[arg(long, default_value_t = 7)]
    pub(crate) seed: u64,
    /// Where it all goes; with --data-only also s3://BUCKET/PREFIX of a configured storage
    #[arg(long, value_name = "DIR", default_value = DEMO_FOLDER)]
    pub(crate) out: PathBuf,
    /// Write the folders and the configuration only; process nothing
    #[arg(long)]
    pub(crate) data_only: bool,
}

const DEMO_EXAMPLES: &str = "\
Examples:
  alluvium demo
  alluvium demo --rows 1000000 --epochs 10 --out ./big";

#[derive(Args)]
pub(crate) struct OfEpoch {
    /// The pipeline
    pub(crate) pipeline: String,
    /// The epoch
    pub(crate) epoch: Epoch,
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Subcommand)]
pub(crate) enum ConfigVerb {
    /// Tell every problem at once
    Validate,
    /// Effective values and where each comes from
    Show {
        #[command(flatten)]
        output: OutputArgument,
    },
    /// Every setting, as a commented file
    Reference,
}

#[derive(Subcommand)]
pub(crate) enum LedgerVerb {
    /// Restore what the tables know and the ledger does not name
    Rebuild,
}

#[derive(Subcommand)]
pub(crate) enum AuditVerb {
    /// Newest first
    List {
        #[command(flatten)]
        output: OutputArgument,
    },
}
