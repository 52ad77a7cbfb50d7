//! Data files of a table: written before any commit names them, under names used once.

use std::num::NonZeroU64;
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result, part_of_task};
use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use deltalake::arrow::error::ArrowError;
use deltalake::datafile::writer::{DeltaWriter, WriterConfig};
use deltalake::datafusion::execution::SendableRecordBatchStream;
use deltalake::kernel::{Action, Add, AddCDCFile};
use deltalake::parquet::basic::{Compression, ZstdLevel};
use deltalake::parquet::file::properties::{EnabledStatistics, WriterProperties};
use deltalake::parquet::schema::types::ColumnPath;
use deltalake::table::config::TablePropertiesExt;
use futures::{Stream, StreamExt};
use object_store::prefix::PrefixStore;
use tracing::Instrument;

use crate::classify::foreign;
use crate::session::quoted;
use crate::store::StoreRef;
use crate::width::BATCH_ROWS;
use crate::{Table, schema};

/// Smallest and largest values of these tell readers to pass over rows that they seek: NaN is in no
/// statistics, and the log writes them with the digits of a double.
fn misleads(kind: &DataType) -> bool {
    match kind {
        DataType::Float16 | DataType::Float32 | DataType::Float64 => true,
        DataType::Decimal128(precision, _) => *precision > 15,
        _ => false,
    }
}

/// The paths of such columns: this one, or parts of its structures. Nothing is told of lists and maps.
fn misleading_parts(field: &Field, within: &[String], found: &mut Vec<Vec<String>>) {
    let path = [within, &[field.name().clone()]].concat();
    match field.data_type() {
        DataType::Struct(parts) => {
            parts.iter().for_each(|part| misleading_parts(part, &path, found));
        }
        kind if misleads(kind) => found.push(path),
        _ => {}
    }
}

/// A row group is in memory while it is written, several times over while it is sent: it ends with so many rows,
/// or bytes.
const GROUP_ROWS_MAX: usize = 256 << 10;

/// How finely a file is cut.
#[derive(Clone, Copy)]
struct Grain {
    /// Bytes of a row group.
    group_bytes: usize,
    /// Rows of a page.
    page_rows: usize,
    /// Smallest and largest values: of pages, too, or of row groups only.
    statistics: EnabledStatistics,
    /// Of the key's columns those of pages are told, whatever their type.
    finds_keys: bool,
}

/// For tables that people read.
const COARSE: Grain = Grain {
    group_bytes: 8 << 20,
    page_rows: 20_000,
    statistics: EnabledStatistics::Page,
    finds_keys: false,
};
/// For runs that a merge reads side by side, and a piece of it in part: a range of keys, by what is told of pages.
const FINE: Grain = Grain {
    group_bytes: 4 << 20,
    page_rows: 4_096,
    statistics: EnabledStatistics::Chunk,
    finds_keys: true,
};
/// Of so many columns the log has statistics, where they are named.
const IN_LOG_MAX: usize = 32;

/// A dictionary that grows larger is given up: to look up each value in it costs more than it saves.
const DICTIONARY_BYTES_MAX: usize = 128 << 10;

/// The columns of a pipeline's table that identify its rows.
fn key_of(table: &Table) -> Vec<String> {
    let schema = table.schema();
    let properties = table.properties();
    let names = properties.get("alluvium.key").map_or("", String::as_str).split(',');
    let found = names.filter_map(|name| schema::find_column(&schema, name));
    found.map(|at| schema.field(at).name().clone()).collect()
}

/// Writes rows as data files that are cut at about the target size.
pub struct FileWriter {
    writer: DeltaWriter,
    schema: SchemaRef,
    uri: String,
    rows: u64,
}

impl FileWriter {
    /// A writer of files for `table`.
    pub fn new(table: &Table, target_file_bytes: u64) -> Result<Self> {
        Self::with_schema(table, table.schema(), target_file_bytes)
    }

    /// A writer of files that `table` can name when its columns are these.
    pub fn with_schema(table: &Table, schema: SchemaRef, target_file_bytes: u64) -> Result<Self> {
        Self::in_store(table, table.store(), schema, (target_file_bytes, COARSE))
    }

    /// A writer of files for `table` of which a merge reads many at a time, or parts.
    pub fn of_runs(table: &Table, target_file_bytes: u64) -> Result<Self> {
        Self::in_store(table, table.store(), table.schema(), (target_file_bytes, FINE))
    }

    fn in_store(
        table: &Table,
        store: StoreRef,
        schema: SchemaRef,
        (target_file_bytes, grain): (u64, Grain),
    ) -> Result<Self> {
        let level = ZstdLevel::try_new(1).map_err(Error::internal)?;
        let mut properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(level))
            .set_max_row_group_row_count(Some(GROUP_ROWS_MAX))
            .set_max_row_group_bytes(Some(grain.group_bytes))
            .set_data_page_row_count_limit(grain.page_rows)
            .set_statistics_enabled(grain.statistics)
            .set_dictionary_page_size_limit(DICTIONARY_BYTES_MAX);
        let (misleading, sound): (Vec<_>, Vec<_>) =
            schema.fields().iter().partition(|field| misleads(field.data_type()));
        let mut silent = Vec::new();
        schema.fields().iter().for_each(|field| misleading_parts(field, &[], &mut silent));
        for path in silent {
            let column = ColumnPath::new(path);
            properties = properties.set_column_statistics_enabled(column, EnabledStatistics::None);
        }
        let (key, mut in_log) = (key_of(table), None);
        if grain.finds_keys {
            for name in &key {
                let column = ColumnPath::new(vec![name.clone()]);
                let of_pages = EnabledStatistics::Page;
                properties = properties.set_column_statistics_enabled(column, of_pages);
            }
            // They mislead in the log only.
            if misleading.iter().any(|field| key.contains(field.name())) {
                let names = sound.iter().map(|field| quoted(field.name()));
                in_log = Some(names.take(IN_LOG_MAX).collect());
            }
        }
        if let [key] = key.as_slice() {
            // No two rows have the same: a dictionary of it is the column itself.
            let column = ColumnPath::new(vec![key.clone()]);
            properties = properties.set_column_dictionary_enabled(column, false);
        }
        let properties = properties.build();
        let config = WriterConfig::new(
            schema.clone(),
            table.partition_columns(),
            Some(properties),
            NonZeroU64::new(target_file_bytes),
            Some(BATCH_ROWS),
            table.snapshot.table_properties().num_indexed_cols(),
            in_log,
        );
        let writer = DeltaWriter::new(store, config);
        Ok(Self { writer, schema, uri: table.uri().to_owned(), rows: 0 })
    }

    /// Writes rows; columns are found by name.
    pub async fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let batch = schema::conform(batch, &self.schema).map_err(|e| self.misfit(batch, &e))?;
        self.rows += batch.num_rows() as u64;
        let written = self.writer.write(&batch).await;
        // Parts of files that wait to be sent get their turn: each is as large as a row group.
        tokio::task::yield_now().await;
        written.map_err(|e| foreign(format!("write a data file of {}", self.uri), &e))
    }

    fn misfit(&self, batch: &RecordBatch, error: &ArrowError) -> Error {
        let is_null = |field: &Field| {
            let at = schema::find_column(batch.schema_ref(), field.name());
            !field.is_nullable() && at.is_none_or(|at| batch.column(at).null_count() > 0)
        };
        let fields = self.schema.fields();
        match fields.iter().find(|field| is_null(field)) {
            Some(field) => {
                let text = format!(
                    "{}: column {:?} is NOT NULL there, and a row has no value",
                    self.uri,
                    field.name()
                );
                Error::new(Code::ColumnTypeMismatch, text).with_help(
                    "refuse such rows with an expectation (docs/rows.md), or drop NOT NULL of the column there",
                )
            }
            None => Error::new(Code::ColumnTypeMismatch, format!("{}: {error}", self.uri)),
        }
    }

    /// Writes a whole stream. On an error what was begun is taken back.
    pub async fn write_all(self, stream: SendableRecordBatchStream) -> Result<Written> {
        let doing = format!("compute rows for {}", self.uri);
        self.write_rows(stream.map(move |batch| batch.map_err(|e| foreign(&doing, &e)))).await
    }

    /// The same of rows that have no DataFusion behind them.
    pub async fn write_rows(
        self,
        rows: impl Stream<Item = Result<RecordBatch>> + Unpin,
    ) -> Result<Written> {
        let span = part_of_task!("delta.write", delta.table = self.uri);
        self.write_stream(rows).instrument(span).await
    }

    async fn write_stream(
        mut self,
        mut rows: impl Stream<Item = Result<RecordBatch>> + Unpin,
    ) -> Result<Written> {
        while let Some(batch) = rows.next().await {
            match batch {
                // A writer that failed cannot be asked anything more, not even to give up.
                Ok(batch) => self.write(&batch).await?,
                Err(error) => {
                    self.abort().await;
                    return Err(error);
                }
            }
        }
        self.finish().await
    }

    /// Closes the files.
    pub async fn finish(self) -> Result<Written> {
        let uri = self.uri;
        let adds = self.writer.close().await;
        let adds = adds.map_err(|e| foreign(format!("finish a data file of {uri}"), &e))?;
        Ok(Written { adds, rows: self.rows })
    }

    /// Gives up: open files are taken back, finished ones wait for cleanup.
    pub async fn abort(self) {
        if let Err(error) = self.writer.abort().await {
            tracing::warn!(table = self.uri, %error, "left files behind; cleanup deletes them");
        }
    }
}

/// The column of change files that says what happened to a row.
pub const CHANGE_TYPE: &str = "_change_type";
/// The folder of change files in a table.
const CHANGE_FOLDER: &str = "_change_data";

/// Writes change files: rows with the table's columns and [`CHANGE_TYPE`].
pub struct ChangeWriter(FileWriter);

impl ChangeWriter {
    /// A writer of change files for `table`.
    pub fn new(table: &Table) -> Result<Self> {
        let mut fields = table.schema().fields().to_vec();
        fields.push(Arc::new(Field::new(CHANGE_TYPE, DataType::Utf8, true)));
        let store: StoreRef = Arc::new(PrefixStore::new(table.store(), CHANGE_FOLDER));
        let schema = Arc::new(Schema::new(fields));
        FileWriter::in_store(table, store, schema, (u64::MAX, COARSE)).map(Self)
    }

    /// Writes all rows. Returns the actions that name the files.
    pub async fn write_rows(
        self,
        rows: impl Stream<Item = Result<RecordBatch>> + Unpin,
    ) -> Result<Vec<Action>> {
        let written = self.0.write_rows(rows).await?;
        let action = |add: Add| {
            Action::Cdc(AddCDCFile {
                path: format!("{CHANGE_FOLDER}/{}", add.path),
                size: add.size,
                partition_values: add.partition_values,
                data_change: false,
                tags: None,
            })
        };
        Ok(written.adds.into_iter().map(action).collect())
    }
}

/// Files that no commit names yet.
#[derive(Debug, Default)]
pub struct Written {
    /// Their actions.
    pub adds: Vec<Add>,
    /// Their rows.
    pub rows: u64,
}
