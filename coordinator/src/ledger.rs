//! The ledger: what people read about epochs, as append-only Delta tables below the state folder.
//!
//! A projection, never the truth: it can be deleted at any time and rebuilt from the tables' logs.
//! Each batch is one commit with a marker of its own, so that a lost reply does not double it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::marker::Generation;
use alluvium_protocol::{Epoch, Error, Result, crash};
use alluvium_table::arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use alluvium_table::arrow::json::ReaderBuilder;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::pause::Pauses;
use alluvium_table::session::query_session;
use alluvium_table::write::FileWriter;
use alluvium_table::{Table, TableSpec, query};
use serde_json::Value;
use uuid::Uuid;

/// How long one batch is tried against other writers.
const APPEND_PATIENCE: Duration = Duration::from_secs(30);
/// Memory for reading the ledger.
const READ_BYTES: usize = 256 << 20;

/// The ledger's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerTable {
    /// One row per epoch and generation that is in main.
    ProcessedFolders,
    /// One row per attempt and epoch.
    StepEvents,
    /// One row per manual act.
    AuditLog,
}

impl LedgerTable {
    /// All tables.
    pub const ALL: [Self; 3] = [Self::ProcessedFolders, Self::StepEvents, Self::AuditLog];

    /// The name in SQL and below `ledger/`.
    pub fn name(self) -> &'static str {
        match self {
            Self::ProcessedFolders => "processed_folders",
            Self::StepEvents => "step_events",
            Self::AuditLog => "audit_log",
        }
    }

    /// The table's URI.
    pub fn uri(self, state: &str) -> String {
        format!("{}/ledger/{}", state.trim_end_matches('/'), self.name())
    }

    fn schema(self) -> SchemaRef {
        let text = |name| Field::new(name, DataType::Utf8, true);
        let number = |name| Field::new(name, DataType::Int64, true);
        let flag = |name| Field::new(name, DataType::Boolean, true);
        let instant = |name| {
            let kind = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
            Field::new(name, kind, true)
        };
        let fields = match self {
            Self::ProcessedFolders => vec![
                text("pipeline"),
                text("epoch_folder"),
                number("epoch"),
                number("generation"),
                text("state"),
                instant("processed_at"),
                text("reason"),
                flag("late"),
                number("raw_version"),
                number("main_version"),
                number("rows_read"),
                number("rows_in_raw"),
                number("rows_quarantined"),
                flag("rebuilt"),
            ],
            Self::StepEvents => vec![
                instant("at"),
                text("pipeline"),
                number("epoch"),
                number("generation"),
                text("step"),
                number("attempt"),
                text("verdict"),
                text("code"),
                text("message"),
                text("help"),
                instant("published_at"),
                number("duration_ms"),
                text("worker"),
                text("task"),
                number("raw_version"),
                number("main_version"),
                number("rows_read"),
                number("rows_written"),
                number("rows_quarantined"),
                number("rows_inserted"),
                number("rows_updated"),
                number("rows_deleted"),
                number("bytes_written"),
                flag("reconciled"),
                text("expectations"),
                number("rows_filtered"),
            ],
            Self::AuditLog => vec![
                instant("at"),
                text("by"),
                text("verb"),
                text("pipeline"),
                number("epoch"),
                text("request"),
                text("detail"),
            ],
        };
        Arc::new(Schema::new(fields))
    }
}

/// Reads and appends.
pub struct Ledger {
    state: String,
    /// Names this writer in markers.
    writer: String,
    batches: i64,
    /// What `processed_folders` names; as of which version.
    processed: BTreeSet<(String, Epoch, Generation)>,
    processed_version: Option<i64>,
}

impl Ledger {
    /// The ledger below `state`.
    pub fn open(state: &str) -> Self {
        Self {
            state: state.to_owned(),
            writer: Uuid::new_v4().to_string(),
            batches: 0,
            processed: BTreeSet::new(),
            processed_version: None,
        }
    }

    /// Appends rows (JSON objects by column name) in one commit.
    pub async fn append(&mut self, to: LedgerTable, mut rows: Vec<Value>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let uri = to.uri(&self.state);
        let spec = TableSpec {
            schema: to.schema(),
            partition_by: Vec::new(),
            // Writers come and go: their markers may go after a week.
            properties: vec![(
                "delta.setTransactionRetentionDuration".to_owned(),
                "interval 7 days".to_owned(),
            )],
        };
        let mut table = Table::create_or_open(&uri, &spec).await?;
        with_columns(&mut table, &spec.schema).await?;
        self.batches += 1;
        let marker = Marker {
            app_id: format!("alluvium/ledger/{}/{}", self.writer, to.name()),
            version: self.batches,
        };
        let mut pauses = Pauses::for_at_most(APPEND_PATIENCE);
        crash::point("ledger.before_commit")?;
        loop {
            if table.transaction(&marker.app_id) == Some(marker.version) {
                break;
            }
            if to == LedgerTable::ProcessedFolders {
                self.learn(&table).await?;
                rows.retain(|row| identity(row).is_none_or(|id| !self.processed.contains(&id)));
                if rows.is_empty() {
                    return Ok(());
                }
            }
            match self.commit(&mut table, to, &rows, marker.clone()).await? {
                CommitOutcome::Landed => break,
                CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
                CommitOutcome::Lost(_) => table.refresh().await?,
            }
        }
        if to == LedgerTable::ProcessedFolders {
            self.processed.extend(rows.iter().filter_map(identity));
            self.processed_version = Some(table.version());
        }
        crash::point("ledger.after_commit")?;
        if let Err(error) = table.checkpoint_if_due().await {
            tracing::warn!(%error, "no checkpoint of the ledger; the next one makes up for it");
        }
        Ok(())
    }

    async fn commit(
        &self,
        table: &mut Table,
        to: LedgerTable,
        rows: &[Value],
        marker: Marker,
    ) -> Result<CommitOutcome> {
        let mut decoder =
            ReaderBuilder::new(to.schema()).build_decoder().map_err(Error::internal)?;
        decoder.serialize(rows).map_err(Error::internal)?;
        let mut writer = FileWriter::new(table, u64::MAX)?;
        while let Some(batch) = decoder.flush().map_err(Error::internal)? {
            writer.write(&batch).await?;
        }
        let written = writer.finish().await?;
        let change = Change {
            operation: Operation::Append,
            adds: written.adds,
            removes: Vec::new(),
            others: Vec::new(),
            markers: vec![marker],
            info: serde_json::json!({"step": "ledger"}),
        };
        table.commit(change).await
    }

    /// What `processed_folders` names.
    pub async fn processed(&mut self) -> Result<&BTreeSet<(String, Epoch, Generation)>> {
        match Table::open(&LedgerTable::ProcessedFolders.uri(&self.state)).await? {
            Some(table) => self.learn(&table).await?,
            None => {
                self.processed.clear();
                self.processed_version = None;
            }
        }
        Ok(&self.processed)
    }

    async fn learn(&mut self, table: &Table) -> Result<()> {
        if self.processed_version == Some(table.version()) {
            return Ok(());
        }
        let session = query_session(READ_BYTES);
        table.register(&session, "t", None).await?;
        let rows =
            query::rows(&session, "SELECT DISTINCT pipeline, epoch, generation FROM t").await?;
        self.processed = rows.iter().filter_map(identity).collect();
        self.processed_version = Some(table.version());
        Ok(())
    }

    /// Reads rows by SQL over one table, which the statement calls `t`. No table: no rows.
    pub async fn select(&self, from: LedgerTable, sql: &str) -> Result<Vec<Value>> {
        let Some(table) = Table::open(&from.uri(&self.state)).await? else {
            return Ok(Vec::new());
        };
        let session = query_session(READ_BYTES);
        table.register(&session, "t", None).await?;
        query::rows(&session, sql).await
    }

    /// Attempts, newest first.
    pub async fn runs(
        &self,
        pipeline: Option<&str>,
        epoch: Option<Epoch>,
        limit: usize,
    ) -> Result<Vec<Value>> {
        let mut conditions = vec!["TRUE".to_owned()];
        conditions.extend(pipeline.map(|id| format!("pipeline = '{}'", id.replace('\'', "''"))));
        conditions.extend(epoch.map(|epoch| format!("epoch = {epoch}")));
        let sql = format!(
            "SELECT * FROM t WHERE {} ORDER BY at DESC, epoch DESC LIMIT {limit}",
            conditions.join(" AND ")
        );
        self.select(LedgerTable::StepEvents, &sql).await
    }

    /// Manual acts, newest first.
    pub async fn audit(&self) -> Result<Vec<Value>> {
        self.select(LedgerTable::AuditLog, "SELECT * FROM t ORDER BY at DESC").await
    }
}

/// An earlier version made the table with fewer columns.
async fn with_columns(table: &mut Table, schema: &Schema) -> Result<()> {
    let mut pauses = Pauses::for_at_most(APPEND_PATIENCE);
    loop {
        let held = table.schema();
        let lacks = |field: &&Arc<Field>| held.index_of(field.name()).is_err();
        let missing: Fields = schema.fields().iter().filter(lacks).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        match table.add_columns(&missing, serde_json::Value::Null).await? {
            CommitOutcome::Landed => {}
            CommitOutcome::Lost(error) if !pauses.wait().await => return Err(error),
            CommitOutcome::Lost(_) => table.refresh().await?,
        }
    }
}

fn identity(row: &Value) -> Option<(String, Epoch, Generation)> {
    let pipeline = row["pipeline"].as_str()?.to_owned();
    Some((pipeline, Epoch::new(row["epoch"].as_i64()?)?, row["generation"].as_i64()?))
}
