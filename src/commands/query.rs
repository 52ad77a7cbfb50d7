//! `alluvium query`: SQL over a pipeline's tables and the ledger.

use std::path::Path;

use alluvium_coordinator::ledger::LedgerTable;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::session::query_session;
use alluvium_table::{Table, arrow, query as sql_query};
use alluvium_worker::as_of::{AsOf, as_of};
use alluvium_worker::quarantine;

use crate::cli::Output;
use crate::config;
use crate::printer::{self, Exit};

/// Memory of a query; joins and sorts beyond it spill or fail with a code.
const QUERY_BYTES: usize = 2 << 30;

/// As of when main is read.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) version: Option<u64>,
    pub(crate) epoch: Option<Epoch>,
}

/// Carries out `query`.
pub(crate) async fn query(
    file: Option<&Path>,
    pipeline: &str,
    sql: &str,
    at: At,
    output: Output,
) -> Result<Exit> {
    let config = config::load(file)?;
    let pipeline = config.select(Some(pipeline))?.remove(0);
    let session = query_session(QUERY_BYTES);
    let known = register(&session, &pipeline, at).await?;
    let batches = sql_query::batches(&session, sql)
        .await
        .map_err(|error| error.with_help(format!("tables that exist now: {}", known.join(", "))))?;
    match output {
        Output::Json => printer::json_items("query", &sql_query::to_json(&batches)?)?,
        Output::Table => {
            let shown = arrow::util::pretty::pretty_format_batches(&batches);
            printer::data(&shown.map_err(Error::internal)?.to_string());
        }
    }
    Ok(Exit::Ok)
}

async fn register(
    session: &SessionContext,
    pipeline: &Pipeline,
    at: At,
) -> Result<Vec<&'static str>> {
    let mut known = Vec::new();
    let version = match at.epoch {
        None => at.version,
        Some(epoch) => match as_of(session, "main", pipeline, epoch).await? {
            AsOf::Version(version) => Some(version),
            AsOf::Computed => {
                printer::say(&format!(
                    "no version of main holds just the epochs up to {epoch}: it is computed from raw"
                ));
                known.push("main");
                None
            }
        },
    };
    let newest = Table::open(&pipeline.main).await?.map(|table| table.version());
    if let Some(version) = version
        && newest.is_none_or(|newest| i64::try_from(version).unwrap_or(i64::MAX) > newest)
    {
        let text = match newest {
            Some(newest) => format!("main has no version {version}; the newest is {newest}"),
            None => "main does not exist yet".to_owned(),
        };
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help(format!("`alluvium tables history {}` lists versions", pipeline.id)));
    }
    let tables = [
        ("main", pipeline.main.clone(), version),
        ("raw", pipeline.raw.clone(), None),
        ("quarantine", pipeline.quarantine.clone(), None),
    ];
    let ledger = LedgerTable::ALL.map(|table| (table.name(), table.uri(&pipeline.state), None));
    for (name, uri, version) in tables.into_iter().chain(ledger) {
        if known.contains(&name) {
            continue;
        }
        if let Some(table) = Table::open_at(&uri, version).await? {
            table.register(session, name, None).await?;
            known.push(name);
        } else if name == "quarantine" {
            // Nothing was refused so far.
            quarantine::register_empty(session, name)?;
            known.push(name);
        }
    }
    Ok(known)
}
