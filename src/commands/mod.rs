//! The verbs, one file each (small ones share).

mod act;
mod alerts;
mod bench_queue;
mod configuration;
mod demo;
mod doctor;
mod explain;
mod health;
mod history;
mod lineage;
mod quarantine;
mod query;
mod repairs;
mod rollback;
pub(crate) mod run;
mod schema;
pub(crate) mod signals;
mod stand;
mod step;
mod tables;

use alluvium_coordinator::requests::Verb as Asked;
use alluvium_protocol::{Result, crash};
use alluvium_table::store::be_brief;

use crate::cli::{Arguments, AuditVerb, ConfigVerb, LedgerVerb, SchemaVerb, TablesVerb, Verb};
use crate::cluster;
use crate::printer::{self, Exit};

/// A person waits for the answer, and nothing is written but by somebody else.
fn is_a_look(verb: &Verb) -> bool {
    matches!(
        verb,
        Verb::Status { .. }
            | Verb::Epochs { .. }
            | Verb::Plan { .. }
            | Verb::Runs { .. }
            | Verb::Query { .. }
            | Verb::Doctor { .. }
            | Verb::Health { .. }
            | Verb::Workers { .. }
            | Verb::Audit { .. }
            | Verb::Tables { .. }
            | Verb::Schema { .. }
            | Verb::Lineage { .. }
    )
}

/// Carries out the command line.
pub(crate) async fn run(arguments: Arguments) -> Result<Exit> {
    let file = arguments.config.as_deref();
    if is_a_look(&arguments.verb) {
        be_brief();
    }
    match arguments.verb {
        Verb::Demo(demo) => demo::demo(file, &demo).await,
        Verb::Run { once, pipeline } => run::run(file, pipeline.as_deref(), once).await,
        Verb::Coordinator { once, pipeline } => {
            cluster::coordinator::run(file, pipeline.as_deref(), once).await
        }
        Verb::Worker(worker) => cluster::worker::run(file, &worker).await,
        Verb::Doctor { output } => doctor::doctor(file, output.output).await,
        Verb::Health { role } => health::health(file, role).await,
        Verb::Workers { output } => stand::workers(file, output.output).await,
        Verb::Status { pipeline, watch, output } => {
            stand::status(file, pipeline.as_deref(), watch, output.output).await
        }
        Verb::Epochs { pipeline, state, output } => {
            stand::epochs(file, pipeline.as_deref(), state.as_deref(), output.output).await
        }
        Verb::Plan { pipeline, cleanup: true, output } => {
            stand::cleanup_plan(file, pipeline.as_deref(), output.output).await
        }
        Verb::Plan { pipeline, cleanup: false, output } => {
            stand::plan(file, pipeline.as_deref(), output.output).await
        }
        Verb::Runs { pipeline, epoch, limit, output } => {
            history::runs(file, pipeline.as_deref(), epoch, limit, output.output).await
        }
        Verb::Retry(of) => act::on_epoch(file, Asked::Retry, &of).await,
        Verb::Skip(of) => act::on_epoch(file, Asked::Skip, &of).await,
        Verb::Replay(of) => act::on_epoch(file, Asked::Replay, &of).await,
        Verb::Undo(of) => act::on_epoch(file, Asked::Undo, &of).await,
        Verb::Pause { pipeline } => act::on_pipeline(file, Asked::Pause, &pipeline).await,
        Verb::Resume { pipeline } => act::on_pipeline(file, Asked::Resume, &pipeline).await,
        Verb::Alerts { verb } => alerts::alerts(file, &verb).await,
        Verb::Rollback(rollback) => rollback::rollback(file, &rollback).await,
        Verb::RollbackPoint { verb } => rollback::point(file, &verb).await,
        Verb::Schema { verb: SchemaVerb::History { pipeline, output } } => {
            schema::history(file, &pipeline, output.output).await
        }
        Verb::Tables { verb: TablesVerb::Health { pipeline, output } } => {
            tables::of_files(file, &pipeline, output.output).await
        }
        Verb::Tables { verb: TablesVerb::History { pipeline, limit, output } } => {
            history::of_table(file, &pipeline, limit, output.output).await
        }
        Verb::Query { pipeline, sql, at_version, at_epoch, output } => {
            let at = query::At { version: at_version, epoch: at_epoch };
            query::query(file, &pipeline, &sql, at, output.output).await
        }
        Verb::Lineage { pipeline, key, output } => {
            lineage::lineage(file, &pipeline, &key, output.output).await
        }
        Verb::Quarantine { verb } => quarantine::quarantine(file, &verb).await,
        Verb::Explain { code } => explain::explain(code.as_deref()),
        Verb::Config { verb: ConfigVerb::Validate } => configuration::validate(file),
        Verb::Config { verb: ConfigVerb::Show { output } } => {
            configuration::show(file, output.output)
        }
        Verb::Config { verb: ConfigVerb::Reference } => configuration::reference(),
        Verb::Ledger { verb: LedgerVerb::Rebuild } => history::rebuild(file).await,
        Verb::Audit { verb: AuditVerb::List { output } } => {
            history::audit(file, output.output).await
        }
        Verb::Step { step } => step::step(file, step).await,
        Verb::BenchQueue { tasks, samples } => bench_queue::bench_queue(file, tasks, samples).await,
        Verb::CrashPoints => {
            printer::data(&crash::POINTS.join("\n"));
            Ok(Exit::Ok)
        }
    }
}
