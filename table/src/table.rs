//! One Delta table at one version, with its transactions.

use std::collections::HashMap;
use std::sync::Arc;

use alluvium_protocol::pipeline::{IGNORE, PARTITION_BY};
use alluvium_protocol::{Code, Error, Pipeline, Result, crash};
use deltalake::arrow::datatypes::{Schema, SchemaRef};
use deltalake::kernel::transaction::CommitProperties;
use deltalake::kernel::{Add, Snapshot, StructType};
use deltalake::logstore::LogStoreRef;
use deltalake::operations::create::CreateBuilder;
use deltalake::protocol::SaveMode;
use deltalake::{DeltaTable, TableProperty};

use crate::classify::{foreign, is_of_storage};
use crate::kept::Kept;
use crate::schema;
use crate::store::{Place, StoreRef, log_store_at, place_of};
use crate::transactions::Transactions;

/// The property of a table whose commits tell their changes row by row.
pub const CHANGE_FEED: &str = "delta.enableChangeDataFeed";

/// The property of a table in which rows may be marked as deleted.
pub const DELETION_VECTORS: &str = "delta.enableDeletionVectors";

/// A table's snapshot and the store below it. Cheap to clone; a clone is a snapshot that stays.
///
/// The snapshot is the library's lazy one: protocol, metadata and the names of log files, but no
/// list of data files. Opening and committing so cost the same however many files there are; who
/// needs the list asks for it ([`Table::files`]).
#[derive(Clone)]
pub struct Table {
    pub(crate) uri: String,
    pub(crate) log_store: LogStoreRef,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) transactions: Transactions,
    pub(crate) kept: Option<Arc<Kept>>,
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

impl Table {
    /// Opens the newest version. `None`: there is no table at `uri`. Any failure to find that out
    /// is an error: an unreadable table is never taken for a missing one.
    pub async fn open(uri: &str) -> Result<Option<Self>> {
        Self::open_at(uri, None).await
    }

    /// Opens one version, or the newest.
    pub async fn open_at(uri: &str, version: Option<u64>) -> Result<Option<Self>> {
        let log_store = log_store_at(uri)?;
        if let Place::Local(path) = place_of(uri)?
            && !is_folder(&path.join("_delta_log"), uri)?
        {
            return Ok(None);
        }
        let exists = log_store.is_delta_table_location().await;
        if !exists.map_err(|e| foreign(format!("open {uri}"), &e))? {
            return Ok(None);
        }
        let snapshot = Snapshot::try_new(log_store.as_ref(), version)
            .await
            .map_err(|e| unreadable(uri, &e))?;
        let mut transactions = Transactions::default();
        transactions.advance(&log_store, snapshot.version()).await?;
        Ok(Some(Self {
            uri: uri.to_owned(),
            log_store,
            snapshot: Arc::new(snapshot),
            transactions,
            kept: None,
        }))
    }

    /// Creates the table, or opens the one that somebody else just created.
    pub async fn create_or_open(uri: &str, spec: &TableSpec) -> Result<Self> {
        if let Some(table) = Self::open(uri).await? {
            return Ok(table);
        }
        if let Place::Local(path) = place_of(uri)? {
            std::fs::create_dir_all(&path)
                .map_err(|e| foreign(format!("create folder {}", path.display()), &e))?;
        }
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
        self.snapshot = self.snapshot_at(None).await?;
        self.transactions.advance(&self.log_store, self.snapshot.version()).await
    }

    /// This snapshot brought forward to `version`, or to the newest.
    pub(crate) async fn snapshot_at(&self, version: Option<u64>) -> Result<Arc<Snapshot>> {
        let engine = self.log_store.engine(None);
        let updated = Arc::clone(&self.snapshot).update(engine, version).await;
        updated.map_err(|e| unreadable(&self.uri, &e))
    }

    /// The table's URI, as it was given.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// What tells it from other tables that were at this place.
    pub fn id(&self) -> &str {
        self.snapshot.metadata().id()
    }

    /// The snapshot's version.
    pub fn version(&self) -> i64 {
        i64::try_from(self.snapshot.version()).unwrap_or(i64::MAX)
    }

    /// App id and version of every `txn` action.
    pub fn transactions(&self) -> impl Iterator<Item = (&str, i64)> {
        self.transactions.iter()
    }

    /// The version of one app id's newest transaction.
    pub fn transaction(&self, app_id: &str) -> Option<i64> {
        self.transactions.version(app_id)
    }

    /// When the app id's newest transaction was written, milliseconds since 1970.
    pub fn transaction_time(&self, app_id: &str) -> Option<i64> {
        self.transactions.updated(app_id)
    }

    /// The table's columns, partition columns included.
    pub fn schema(&self) -> SchemaRef {
        schema::plain(&self.snapshot.arrow_schema())
    }

    /// Columns that the files' folders are named after.
    pub fn partition_columns(&self) -> Vec<String> {
        self.snapshot.metadata().partition_columns().to_vec()
    }

    /// Commits are to tell their changes row by row.
    pub fn tells_changes(&self) -> bool {
        self.is_on(CHANGE_FEED)
    }

    /// Rows may be marked as deleted: readers and writers of the protocol know such marks, and the
    /// table's property allows new ones.
    pub fn marks_rows(&self) -> bool {
        self.knows_marks() && self.is_on(DELETION_VECTORS)
    }

    fn is_on(&self, property: &str) -> bool {
        let properties = self.snapshot.metadata().configuration();
        properties.get(property).is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }

    /// The table's properties.
    pub fn properties(&self) -> HashMap<String, String> {
        self.snapshot.metadata().configuration().clone()
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

    /// The error for `adopt` without a table.
    pub fn nothing_to_adopt(pipeline: &Pipeline) -> Error {
        let text = format!("adopt = true, and there is no table at {}", pipeline.main);
        let help = format!(
            "correct `main` of pipeline.{}; or, to begin with an empty table, remove `adopt`",
            pipeline.id
        );
        Error::new(Code::TableUnreadable, text).with_help(help)
    }

    /// Refuses a table that was made with other content-defining settings.
    pub fn check_settings(&self, pipeline: &Pipeline) -> Result<()> {
        let properties = self.properties();
        let is_main = self.uri == pipeline.main && properties.contains_key("alluvium.pipeline");
        let wanted = match is_main {
            true => pipeline.main_properties(),
            false => pipeline.content_properties().to_vec(),
        };
        for (name, wanted) in wanted {
            let none = String::new();
            let is_of_main = name == IGNORE || name == PARTITION_BY;
            let held = properties.get(name).or(is_of_main.then_some(&none));
            let Some(found) = held.filter(|found| **found != wanted) else { continue };
            let setting = name.trim_start_matches("alluvium.");
            let text = format!(
                "{} was made with {setting} = {found:?}, the configuration says {wanted:?}",
                self.uri
            );
            let setting = if name == IGNORE { "columns.ignore" } else { setting };
            let help = match is_of_main {
                true => format!(
                    "set {setting} back; or rebuild main from raw: move main's folder away, then \
                     `alluvium run --once`"
                ),
                false => format!(
                    "set {setting} back; or rebuild: move the folders of raw and main away, then \
                     `alluvium run --once`"
                ),
            };
            return Err(Error::new(Code::SettingsMismatch, text).with_help(help));
        }
        self.check_declared(pipeline)
    }

    /// A declared column must have its type, or a narrower one that can be widened.
    fn check_declared(&self, pipeline: &Pipeline) -> Result<()> {
        let schema = self.schema();
        for column in &pipeline.content.declared {
            let declared = schema::parse_type(&column.kind);
            let declared = declared.map_err(|e| Error::new(Code::ConfigInvalid, e))?;
            let Some(at) = schema::find_column(&schema, &column.name) else { continue };
            let held = schema.field(at).data_type();
            if schema::widens_to(held, &declared) {
                continue;
            }
            let text = format!(
                "column {:?} of {} is of type {held}, the configuration declares {}",
                column.name, self.uri, column.kind
            );
            let help = format!(
                "set the type back in [pipeline.{}.columns]; or rebuild: move the folders of raw and \
                 main away, then `alluvium run --once`",
                pipeline.id
            );
            return Err(Error::new(Code::SettingsMismatch, text).with_help(help));
        }
        Ok(())
    }

    /// The store whose root is the table.
    pub fn store(&self) -> StoreRef {
        self.log_store.object_store(None)
    }

    /// A handle for the library's own operations (vacuum, add columns).
    pub(crate) async fn handle(&self) -> Result<DeltaTable> {
        let mut table = DeltaTable::new(Arc::clone(&self.log_store));
        let version = self.snapshot.version();
        table.load_version(version).await.map_err(|e| unreadable(&self.uri, &e))?;
        Ok(table)
    }
}

/// The library takes a local log that it may not read for one that is not there.
fn is_folder(path: &std::path::Path, uri: &str) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(true),
        Ok(_) => {
            let text = format!("{} is not a folder", path.display());
            Err(Error::new(Code::TableUnreadable, text))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(foreign(format!("open {uri}"), &error)),
    }
}

fn unreadable(uri: &str, cause: &deltalake::DeltaTableError) -> Error {
    let mut error = foreign(format!("open table {uri}"), cause);
    // The library prints two of its structures here, and no word of what is wrong.
    if error.message.contains("contiguous commit files") {
        let text =
            format!("open table {uri}: commit files are missing in the middle of its _delta_log");
        return Error::new(Code::TableUnreadable, text)
            .with_help("restore the missing files from a backup");
    }
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
