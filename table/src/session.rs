//! The memory that sorting, joining and querying may use: a DataFusion session with a spill pool.

use std::sync::Arc;

use deltalake::datafusion::execution::context::SessionContext;
use deltalake::datafusion::execution::session_state::SessionStateBuilder;
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
    session(memory_bytes, 1, false)
}

/// A session for a person's query, on all processors.
pub fn query_session(memory_bytes: usize) -> SessionContext {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    session(memory_bytes, processors, true)
}

fn session(memory_bytes: usize, partitions: usize, reorder_joins: bool) -> SessionContext {
    let state = create_session_state_with_spill_config(Some(memory_bytes), Some(SPILL_BYTES_MAX));
    let mut config = state.config().clone();
    let options = config.options_mut();
    options.execution.target_partitions = partitions;
    options.execution.planning_concurrency = 1;
    options.optimizer.join_reordering = reorder_joins;
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
