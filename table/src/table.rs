//! One Delta table at one version, with its transactions.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Pipeline, Result, crash};
use deltalake::arrow::datatypes::{Schema, SchemaRef};
use deltalake::kernel::transaction::CommitProperties;
use deltalake::kernel::{Add, Remove, StructType};
use deltalake::logstore::LogStoreRef;
use deltalake::operations::create::CreateBuilder;
use deltalake::protocol::SaveMode;
use deltalake::table::state::DeltaTableState;
use deltalake::{DeltaTable, TableProperty};

use crate::classify::{foreign, is_of_storage};
use crate::store::{StoreRef, local_path, log_store_at};
use crate::transactions::Transactions;
use crate::{scan, schema};

/// A table's snapshot and the store below it. Cheap to clone; a clone is a snapshot that stays.
#[derive(Clone)]
pub struct Table {
    pub(crate) uri: String,
    pub(crate) log_store: LogStoreRef,
    pub(crate) state: DeltaTableState,
    pub(crate) transactions: Transactions,
}

/// What a new table looks like.
pub struct TableSpec {
    /// Arrow types as [`schema::delta_type`] makes them.
    pub schema: SchemaRef,
    /// Columns that the files' folders are named after.
    pub partition_by: Vec<String>,
    /// Table properties.
    pub properties: Vec<(String, String)>,
}

impl LiveFile {
    /// Rows that readers see: without those a deletion vector marks.
    pub fn live_rows(&self) -> Option<u64> {
        let deleted = self.remove.deletion_vector.as_ref().map_or(0, |dv| dv.cardinality);
        Some(self.rows?.saturating_sub(u64::try_from(deleted).unwrap_or(0)))
    }
}

/// A live data file.
#[derive(Clone, Debug)]
pub struct LiveFile {
    /// Path as the log spells it, decoded.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Rows, where the statistics tell.
    pub rows: Option<u64>,
    /// Value by partition column.
    pub partition: HashMap<String, Option<String>>,
    /// The action that removes it.
    pub remove: Remove,
    /// The statistics, as the log has them (JSON).
    pub stats: Option<String>,
}

impl Table {
    /// Opens the newest version. `None`: there is no table at `uri`. Any failure to find that out
    /// is an error: an unreadable table is never taken for a missing one.
    pub async fn open(uri: &str) -> Result<Option<Self>> {
        Self::open_at(uri, None).await
    }

    /// Opens one version, or the newest.
    pub async fn open_at(uri: &str, version: Option<u64>) -> Result<Option<Self>> {
        let log_store = log_store_at(uri)?;
        let log = local_path(uri)?.join("_delta_log");
        match std::fs::metadata(&log) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                let text = format!("{} is not a folder", log.display());
                return Err(Error::new(Code::TableUnreadable, text));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(foreign(format!("open {uri}"), &error)),
        }
        let exists = log_store.is_delta_table_location().await;
        if !exists.map_err(|e| foreign(format!("open {uri}"), &e))? {
            return Ok(None);
        }
        let state = DeltaTableState::try_new(log_store.as_ref(), version)
            .await
            .map_err(|e| unreadable(uri, &e))?;
        let mut transactions = Transactions::default();
        transactions.advance(&log_store, state.version()).await?;
        Ok(Some(Self { uri: uri.to_owned(), log_store, state, transactions }))
    }

    /// Creates the table, or opens the one that somebody else just created.
    pub async fn create_or_open(uri: &str, spec: &TableSpec) -> Result<Self> {
        if let Some(table) = Self::open(uri).await? {
            return Ok(table);
        }
        let path = local_path(uri)?;
        std::fs::create_dir_all(&path)
            .map_err(|e| foreign(format!("create folder {}", path.display()), &e))?;
        let columns = StructType::try_from_arrow_schema(&spec.schema)?;
        let configuration: HashMap<String, Option<String>> =
            spec.properties.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        let created = CreateBuilder::new()
            .with_log_store(log_store_at(uri)?)
            .with_save_mode(SaveMode::ErrorIfExists)
            .with_columns(columns.fields().cloned())
            .with_partition_columns(spec.partition_by.clone())
            .with_raise_if_key_not_exists(false)
            .with_configuration(configuration)
            .with_configuration_property(TableProperty::CheckpointInterval, Some("20"))
            .with_commit_properties(CommitProperties::default().with_max_retries(0))
            .await;
        // Another process may have been faster, or our reply was lost: what is there decides.
        crash::point("table.after_create")?;
        match Self::open(uri).await? {
            Some(table) => Ok(table),
            None => Err(match created {
                Err(error) => foreign(format!("create table {uri}"), &error),
                Ok(_) => Error::new(Code::TableUnreadable, format!("{uri} vanished")),
            }),
        }
    }

    /// Brings the snapshot to the newest version.
    pub async fn refresh(&mut self) -> Result<()> {
        self.state
            .update(self.log_store.as_ref(), None)
            .await
            .map_err(|e| unreadable(&self.uri, &e))?;
        self.transactions.advance(&self.log_store, self.state.version()).await
    }

    /// The table's URI, as it was given.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The snapshot's version.
    pub fn version(&self) -> i64 {
        i64::try_from(self.state.version()).unwrap_or(i64::MAX)
    }

    /// Version by app id, of all `txn` actions.
    pub fn transactions(&self) -> &HashMap<String, i64> {
        self.transactions.versions()
    }

    /// When the app id's newest transaction was written, milliseconds since 1970.
    pub fn transaction_time(&self, app_id: &str) -> Option<i64> {
        self.transactions.updated(app_id)
    }

    /// The table's columns, partition columns included.
    pub fn schema(&self) -> SchemaRef {
        schema::plain(&self.state.snapshot().arrow_schema())
    }

    /// Columns that the files' folders are named after.
    pub fn partition_columns(&self) -> Vec<String> {
        self.state.metadata().partition_columns().to_vec()
    }

    /// The table's properties.
    pub fn properties(&self) -> HashMap<String, String> {
        self.state.metadata().configuration().clone()
    }

    /// The error for a main table that exists and that no pipeline made.
    pub fn not_ours(pipeline: &Pipeline) -> Error {
        let text = format!("{} exists, and no pipeline made it", pipeline.main);
        let help = format!(
            "to build on it set `adopt = true` and `start_from = EPOCH` in pipeline.{}; or name \
             another folder as `main`",
            pipeline.id
        );
        Error::new(Code::TableNotOurs, text).with_help(help)
    }

    /// Refuses a table that was made with other content-defining settings.
    pub fn check_settings(&self, pipeline: &Pipeline) -> Result<()> {
        let properties = self.properties();
        for (name, wanted) in pipeline.content_properties() {
            let Some(found) = properties.get(name).filter(|found| **found != wanted) else {
                continue;
            };
            let setting = name.trim_start_matches("alluvium.");
            let text = format!(
                "{} was made with {setting} = {found:?}, the configuration says {wanted:?}",
                self.uri
            );
            let help = format!(
                "set {setting} back; or rebuild: move the folders of raw and main away, then \
                 `alluvium run --once`"
            );
            return Err(Error::new(Code::SettingsMismatch, text).with_help(help));
        }
        Ok(())
    }

    /// The store whose root is the table.
    pub fn store(&self) -> StoreRef {
        self.log_store.object_store(None)
    }

    /// All live data files.
    pub fn files(&self) -> Result<Vec<LiveFile>> {
        self.files_where(|_| true)
    }

    /// The live files whose partition values pass.
    pub fn files_where(
        &self,
        mut keep: impl FnMut(&HashMap<String, Option<String>>) -> bool,
    ) -> Result<Vec<LiveFile>> {
        let mut files = Vec::new();
        let is_partitioned = !self.state.metadata().partition_columns().is_empty();
        for view in self.state.log_data().iter() {
            let partition =
                if is_partitioned { view.partition_values_map() } else { HashMap::new() };
            if !keep(&partition) {
                continue;
            }
            let remove = view.remove_action(true);
            files.push(LiveFile {
                path: remove.path.clone(),
                size: u64::try_from(view.size()).unwrap_or(0),
                rows: view.num_records().map(|rows| rows as u64),
                partition,
                remove,
                stats: view.stats(),
            });
        }
        Ok(files)
    }

    /// The file is one of these URLs, as scans with a file column tell them.
    pub fn is_file_url(&self, file: &LiveFile, urls: &BTreeSet<String>) -> bool {
        let root = self.log_store.root_url();
        [file.path.clone(), scan::encoded(&file.path)].iter().any(|path| {
            urls.contains(path) || root.join(path).is_ok_and(|url| urls.contains(url.as_str()))
        })
    }

    /// A handle for the library's own operations (vacuum, add columns).
    pub(crate) async fn handle(&self) -> Result<DeltaTable> {
        let mut table = DeltaTable::new(Arc::clone(&self.log_store));
        let version = self.state.version();
        table.load_version(version).await.map_err(|e| unreadable(&self.uri, &e))?;
        Ok(table)
    }
}

fn unreadable(uri: &str, cause: &deltalake::DeltaTableError) -> Error {
    let mut error = foreign(format!("open table {uri}"), cause);
    if error.code == Code::StorageUnavailable && !is_of_storage(cause) {
        error.code = Code::TableUnreadable;
    }
    error
}

/// The columns as Delta types.
trait FromArrowSchema: Sized {
    fn try_from_arrow_schema(schema: &Schema) -> Result<Self>;
}

impl FromArrowSchema for StructType {
    fn try_from_arrow_schema(schema: &Schema) -> Result<Self> {
        use deltalake::kernel::engine::arrow_conversion::TryIntoKernel;
        let converted: std::result::Result<StructType, _> = schema.try_into_kernel();
        converted.map_err(|e| Error::new(Code::TableUnreadable, e.to_string()))
    }
}

/// The sum of sizes of added files.
pub fn bytes_of(adds: &[Add]) -> u64 {
    adds.iter().map(|add| u64::try_from(add.size).unwrap_or(0)).sum()
}
