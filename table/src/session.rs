//! The memory that sorting, joining and querying may use: a DataFusion session with a spill pool.

use std::sync::Arc;

use deltalake::datafusion::execution::context::SessionContext;
use deltalake::datafusion::execution::session_state::{SessionState, SessionStateBuilder};
use deltalake::datafusion::prelude::SessionConfig;
use deltalake::delta_datafusion::create_session_state_with_spill_config;

/// Scratch space a session may fill before it gives up, in bytes: larger than any sensible task,
/// small enough that a runaway query ends before the disk does.
const SPILL_BYTES_MAX: u64 = 64 << 30;

/// A session for one task. `memory_bytes` bounds its working memory; beyond it sorts spill to disk.
///
/// One partition: the order of equal work is the same every time, and a pool shared by several
/// spilling consumers can stall (<https://github.com/delta-io/delta-rs/issues/4614>). Joins stay as
/// they are written: a hash join holds its left side in memory, and the guess which side is smaller
/// compares sizes in memory with sizes on disk.
pub fn work_session(memory_bytes: usize) -> SessionContext {
    let state = state(memory_bytes);
    let mut config = state.config().clone();
    let options = config.options_mut();
    options.execution.target_partitions = 1;
    options.optimizer.join_reordering = false;
    // A key is looked for in every file: what another writer's statistics leave out, NaN or the last
    // digits of a decimal, would make a row live twice.
    options.optimizer.enable_join_dynamic_filter_pushdown = false;
    // One sorter at a time has all the memory. What it merges its sorted runs with is set aside from
    // the beginning: nearly as much as the rows take, as their sort keys are copied.
    options.optimizer.repartition_sorts = false;
    options.execution.sort_spill_reservation_bytes = memory_bytes / 20 * 9;
    with_config(state, config)
}

/// A session for a person's query, on all processors.
pub fn query_session(memory_bytes: usize) -> SessionContext {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let state = state(memory_bytes);
    let mut config = state.config().clone();
    config.options_mut().execution.target_partitions = processors;
    with_config(state, config)
}

fn state(memory_bytes: usize) -> SessionState {
    create_session_state_with_spill_config(Some(memory_bytes), Some(SPILL_BYTES_MAX))
}

fn with_config(state: SessionState, mut config: SessionConfig) -> SessionContext {
    let options = config.options_mut();
    options.execution.planning_concurrency = 1;
    // Names in SQL are meant as they are written.
    options.sql_parser.enable_ident_normalization = false;
    let state = SessionStateBuilder::new_from_existing(state).with_config(config).build();
    SessionContext::new_with_state(state)
}

/// A column's name, quoted for SQL.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Names, quoted and with commas.
pub fn quoted_list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(quoted).collect::<Vec<_>>().join(", ")
}

/// A shared session.
pub type Session = Arc<SessionContext>;
