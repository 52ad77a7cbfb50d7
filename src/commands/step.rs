//! Hidden: one of the worker's own steps without discovery, queue, lock and ledger, so that a merge stands
//! beside a MERGE of another tool (`scripts/bench merge`), and two processes race (`tests/races.py`).

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use alluvium_protocol::clock::SystemClock;
use alluvium_protocol::marker::Markers;
use alluvium_protocol::task::{FORMAT_MAJOR, Task, Work};
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::Table;
use alluvium_worker::{Permit, Workshop};
use chrono::Utc;
use serde_json::json;
use uuid::Uuid;

use crate::cli::OneStep;
use crate::config;
use crate::printer::{self, Exit};

/// Carries out `step`.
pub(crate) async fn step(file: Option<&Path>, step: OneStep) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(None)?.remove(0);
    let raw = Table::open(&pipeline.raw).await?.ok_or_else(|| {
        Error::new(Code::NotPossibleNow, format!("there is no raw table at {}", pipeline.raw))
    })?;
    let markers = Markers::of_pipeline(&pipeline.id, raw.transactions());
    let epochs = markers.ingest.keys().copied().collect();
    let work = match step {
        OneStep::Merge => Work::Merge { epochs },
        OneStep::Optimize => Work::Optimize,
        OneStep::Cleanup => Work::Cleanup,
    };
    let task = Task {
        format: FORMAT_MAJOR,
        id: Uuid::new_v4(),
        pipeline,
        work,
        attempt: 1,
        published_at: Utc::now(),
    };
    config.keep_side_indexes();
    let workshop = Workshop { clock: Arc::new(SystemClock), tables: Arc::default() };
    let began = Instant::now();
    let report = workshop.execute(&task, &Permit::unlimited()).await?;
    let seconds = began.elapsed().as_secs_f64();
    let report = serde_json::to_value(report).map_err(Error::internal)?;
    printer::data(&json!({ "seconds": seconds, "report": report }).to_string());
    Ok(Exit::Ok)
}
