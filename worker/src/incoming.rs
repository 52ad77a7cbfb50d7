//! An epoch's rows as a table that can be read more than once: files in order, each row with its
//! place, rows with a NULL in the key set aside.

use std::sync::{Arc, Mutex, PoisonError};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray,
};
use alluvium_table::arrow::compute::{filter_record_batch, not};
use alluvium_table::arrow::datatypes::{
    DataType, Field, Float32Type, Float64Type, Schema, SchemaRef, TimestampNanosecondType,
};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::catalog::streaming::StreamingTable;
use alluvium_table::datafusion::error::DataFusionError;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::datafusion::execution::{SendableRecordBatchStream, TaskContext};
use alluvium_table::datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use alluvium_table::datafusion::physical_plan::streaming::PartitionStream;
use alluvium_table::schema::{conform, find_column};
use alluvium_table::spool::Spool;
use futures::StreamExt;

use crate::raw::{FILE, ROW};
use crate::source::{SourceFile, read_error};

/// The last column of refused rows: why.
pub const REASON: &str = "_alluvium_reason";
/// Why a row is in quarantine: a NULL in its key.
pub const NULL_KEY: &str = "null_key";

/// Rows of one epoch, ready to be read.
pub struct Incoming {
    folder: String,
    files: Vec<SourceFile>,
    key: Vec<String>,
    exact: Vec<String>,
    schema: SchemaRef,
}

/// Rows that were refused, in the order of reading, and the first error of a file.
pub struct Aside {
    /// Rows with `_file`, `_row` and [`REASON`], as they came.
    refused: Spool,
    /// DataFusion passes errors on as text: the coded one waits here.
    pub error: Option<Error>,
}

/// Shared between the streams of one reading.
pub type AsideRef = Arc<Mutex<Aside>>;

impl Aside {
    /// Keeps refused rows.
    pub fn keep(&mut self, rows: &RecordBatch) -> Result<()> {
        let rows = conform(rows, self.refused.schema()).map_err(Error::internal)?;
        self.refused.push(rows)
    }

    /// All that were kept.
    pub fn take(&mut self) -> Spool {
        let none = Spool::new(Arc::clone(self.refused.schema()));
        std::mem::replace(&mut self.refused, none)
    }
}

impl Incoming {
    /// The rows of `files` with the data columns `columns`. Values of the columns `exact` decide
    /// between rows: none may change where Delta keeps less of it.
    pub fn new(
        folder: &str,
        files: Vec<SourceFile>,
        key: &[String],
        exact: Vec<String>,
        columns: Vec<Field>,
    ) -> Self {
        let mut fields = columns;
        fields.push(Field::new(FILE, DataType::Utf8, true));
        fields.push(Field::new(ROW, DataType::Int64, true));
        let schema = Arc::new(Schema::new(fields));
        Self { folder: folder.to_owned(), files, key: key.to_vec(), exact, schema }
    }

    /// The epoch's folder.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// The columns of the rows as they are read, their places last.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Rows of all files, by their footers.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// A place for what one reading sets aside.
    pub fn aside(&self) -> AsideRef {
        let reason = Arc::new(Field::new(REASON, DataType::Utf8, true));
        let fields = self.schema.fields().iter().cloned().chain([reason]);
        let schema = Schema::new(fields.collect::<Vec<_>>());
        Arc::new(Mutex::new(Aside { refused: Spool::new(Arc::new(schema)), error: None }))
    }

    /// Registers the rows as table `name`. Each reading starts from the files; refused rows go to
    /// `aside` at each, so read once with any one of them.
    pub fn register(&self, session: &SessionContext, name: &str, aside: &AsideRef) -> Result<()> {
        let partitions: Vec<Arc<dyn PartitionStream>> = self
            .files
            .iter()
            .map(|file| {
                Arc::new(FileRows {
                    folder: self.folder.clone(),
                    file: file.clone(),
                    key: self.key.clone(),
                    exact: self.exact.clone(),
                    schema: Arc::clone(&self.schema),
                    aside: Arc::clone(aside),
                }) as Arc<dyn PartitionStream>
            })
            .collect();
        let table = StreamingTable::try_new(Arc::clone(&self.schema), partitions);
        let table = table.map_err(|e| foreign("read the folder", &e))?;
        session
            .register_table(name, Arc::new(table))
            .map_err(|e| foreign("read the folder", &e))?;
        Ok(())
    }
}

/// The coded error of a reading, or the given one.
pub fn first_error(aside: &AsideRef, other: Error) -> Error {
    aside.lock().unwrap_or_else(PoisonError::into_inner).error.take().unwrap_or(other)
}

struct FileRows {
    folder: String,
    file: SourceFile,
    key: Vec<String>,
    exact: Vec<String>,
    schema: SchemaRef,
    aside: AsideRef,
}

impl std::fmt::Debug for FileRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rows of {}/{}", self.folder, self.file.name)
    }
}

impl PartitionStream for FileRows {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let reading = Reading {
            place: format!("{}/{}", self.folder, self.file.name),
            folder: self.folder.clone(),
            name: self.file.name.clone(),
            key: self.key.clone(),
            exact: self.exact.clone(),
            schema: Arc::clone(&self.schema),
            aside: Arc::clone(&self.aside),
            next_row: 0,
        };
        let stream = match self.file.rows() {
            Ok(batches) => {
                let scan = batches.scan(reading, |reading, batch| {
                    let made = match batch {
                        Ok(batch) => reading.take(&batch),
                        Err(error) => Err(read_error(&reading.folder, &reading.name, &error)),
                    };
                    let made = made.map_err(|error| reading.note(error));
                    futures::future::ready(Some(made))
                });
                scan.boxed()
            }
            Err(error) => {
                let error = read_error(&self.folder, &self.file.name, &error);
                let error = reading.note(error);
                futures::stream::once(async move { Err(error) }).boxed()
            }
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream))
    }
}

struct Reading {
    place: String,
    folder: String,
    name: String,
    key: Vec<String>,
    exact: Vec<String>,
    schema: SchemaRef,
    aside: AsideRef,
    next_row: i64,
}

impl Reading {
    /// The batch with its rows' places, refused rows set aside.
    fn take(&mut self, batch: &RecordBatch) -> Result<RecordBatch> {
        let rows = batch.num_rows();
        let first = self.next_row;
        self.next_row += i64::try_from(rows).map_err(Error::internal)?;
        self.check_exact(batch, first)?;
        let mut batch = conform(batch, &self.schema).map_err(|error| {
            Error::new(Code::ColumnTypeMismatch, format!("{}: {error}", self.place))
        })?;
        batch = self.with_one_zero(self.with_places(batch, first)?)?;
        match self.null_keys(&batch) {
            None => Ok(batch),
            Some(refused) => {
                let keep = not(&refused).map_err(Error::internal)?;
                let aside = filter_record_batch(&batch, &refused).map_err(Error::internal)?;
                let reasons: ArrayRef =
                    Arc::new(StringArray::from(vec![NULL_KEY; aside.num_rows()]));
                let mut shared = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
                let columns = aside.columns().iter().cloned().chain([reasons]).collect();
                let schema = Arc::clone(shared.refused.schema());
                let aside = RecordBatch::try_new(schema, columns).map_err(Error::internal)?;
                shared.refused.push(aside)?;
                filter_record_batch(&batch, &keep).map_err(Error::internal)
            }
        }
    }

    fn with_places(&self, batch: RecordBatch, first: i64) -> Result<RecordBatch> {
        let rows = batch.num_rows();
        let mut columns: Vec<ArrayRef> = batch.columns().to_vec();
        let last = columns.len() - 1;
        let positions = first..first + i64::try_from(rows).map_err(Error::internal)?;
        columns[last - 1] = Arc::new(StringArray::from_iter_values(vec![&self.name; rows]));
        columns[last] = Arc::new(Int64Array::from_iter_values(positions));
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(Error::internal)
    }

    /// Delta keeps microseconds: two keys may not become one, nor an order vanish, by cutting.
    fn check_exact(&self, batch: &RecordBatch, first: i64) -> Result<()> {
        for name in &self.exact {
            let Some(at) = find_column(batch.schema_ref(), name) else { continue };
            let column = batch.column(at).as_primitive_opt::<TimestampNanosecondType>();
            let Some(values) = column else { continue };
            let is_cut = |value: Option<i64>| value.is_some_and(|value| value % 1000 != 0);
            if let Some(row) = values.iter().position(is_cut) {
                let text = format!(
                    "{}, column {name:?}, row {}: the time has nanoseconds and Delta keeps \
                     microseconds, which would change what the column decides",
                    self.place,
                    first + row as i64
                );
                return Err(Error::new(Code::ColumnTypeMismatch, text)
                    .with_help("write the column in microseconds, or as a 64-bit integer"));
            }
        }
        Ok(())
    }

    /// Floating-point numbers that decide know one zero and one NaN: SQL's sorting, grouping and
    /// joining disagree about more.
    fn with_one_zero(&self, batch: RecordBatch) -> Result<RecordBatch> {
        let double = |value: f64| if value.is_nan() { f64::NAN } else { value + 0.0 };
        let single = |value: f32| if value.is_nan() { f32::NAN } else { value + 0.0 };
        let mut columns = batch.columns().to_vec();
        for at in self.exact.iter().filter_map(|name| find_column(&self.schema, name)) {
            if let Some(values) = columns[at].as_primitive_opt::<Float64Type>() {
                columns[at] = Arc::new(values.unary::<_, Float64Type>(double));
            } else if let Some(values) = columns[at].as_primitive_opt::<Float32Type>() {
                columns[at] = Arc::new(values.unary::<_, Float32Type>(single));
            }
        }
        RecordBatch::try_new(batch.schema(), columns).map_err(Error::internal)
    }

    /// True for each row with a NULL in the key; `None`: no such row.
    fn null_keys(&self, batch: &RecordBatch) -> Option<BooleanArray> {
        let mut refused: Option<Vec<bool>> = None;
        for name in &self.key {
            let at = find_column(&self.schema, name)?;
            let column = batch.column(at);
            if column.null_count() == 0 {
                continue;
            }
            let flags = refused.get_or_insert_with(|| vec![false; batch.num_rows()]);
            for (row, flag) in flags.iter_mut().enumerate() {
                *flag |= column.is_null(row);
            }
        }
        refused.map(BooleanArray::from)
    }

    fn note(&self, error: Error) -> DataFusionError {
        let text = error.to_string();
        let mut shared = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        shared.error.get_or_insert(error);
        DataFusionError::Execution(text)
    }
}
