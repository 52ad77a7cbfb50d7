//! An epoch's rows as a table that can be read more than once: files in order, each row with its
//! place, values in the types of their columns, rows that cannot be content set aside.
//!
//! ```text
//!  file ─► pieces ─► repairs in their places ─► `select` ─► types of raw ─► key ─► table `incoming`
//!             │ malformed                          │            │ type:c      │ null_key
//!             └────────────────────────────────────┴────────────┴─────────────┴─► aside
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use alluvium_protocol::pipeline::OnBad;
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions,
    StringArray,
};
use alluvium_table::arrow::compute::{filter, filter_record_batch, not, or};
use alluvium_table::arrow::datatypes::{
    DataType, Field, Int64Type, Schema, SchemaRef, TimestampNanosecondType,
};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::catalog::TableProvider;
use alluvium_table::datafusion::catalog::streaming::StreamingTable;
use alluvium_table::datafusion::datasource::empty::EmptyTable;
use alluvium_table::datafusion::error::{DataFusionError, Result as SqlResult};
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::datafusion::execution::{SendableRecordBatchStream, TaskContext};
use alluvium_table::datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use alluvium_table::datafusion::physical_plan::streaming::PartitionStream;
use alluvium_table::floats::with_one_zero;
use alluvium_table::schema::find_column;
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::Permit;
use crate::aside::{Aside, AsideRef, CAME, MALFORMED, NULL_KEY, SELECT, line_as_json, texts_of};
use crate::raw::{FILE, ROW};
use crate::selecting::Selection;
use crate::source::{Piece, SourceFile};
use crate::typing::{fits_whole, has_nanoseconds, shown, typed};

const MISFIT_HELP: &str = "deliver the folder again with the table's type (a narrower one is fine); or \
                           refuse such rows: on_mismatch = \"quarantine\", then `alluvium retry`";

/// Files read at a time, while their row groups are small: on object storage most of it is waiting.
const FILES_AT_ONCE: usize = 16;
/// Memory for row groups beyond which no more files are read at a time than there are processors.
const HELD_BYTES: u64 = 64 << 20;

const CORRECTION_HELP: &str = "correct it again: `alluvium quarantine replay PIPELINE EPOCH --rows FILE`; \
                               \"content\": null in the file takes the correction back";

/// Repaired rows: file, position, and the row as JSON text.
pub type Repairs = BTreeMap<String, BTreeMap<i64, String>>;

/// How the rows of a folder are to be read.
pub struct Reading {
    /// The key's columns.
    pub key: Vec<String>,
    /// Values of these columns decide between rows: none may change where Delta keeps less of it.
    pub exact: Vec<String>,
    /// Those of them whose type nobody declared: text that came to be a number must look like one.
    pub written: Vec<String>,
    /// Text columns of these are main's folders: Delta takes an empty text there for NULL.
    pub partitions: Vec<String>,
    /// What files have, and `select` is over; without it nothing is asked.
    pub selection: Option<Selection>,
    /// The data columns.
    pub columns: SchemaRef,
    /// What becomes of values that do not fit.
    pub on_mismatch: OnBad,
    /// Rows that somebody corrected.
    pub repairs: Repairs,
    /// Asked for before each piece.
    pub permit: Permit,
}

/// Rows of one epoch, ready to be read.
pub struct Incoming {
    folder: String,
    files: Vec<SourceFile>,
    reading: Arc<Reading>,
    /// The data columns and the place.
    schema: SchemaRef,
}

impl Incoming {
    /// The rows of `files`, read so.
    pub fn new(folder: &str, files: Vec<SourceFile>, reading: Reading) -> Self {
        let mut fields: Vec<Field> =
            reading.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
        fields.push(Field::new(FILE, DataType::Utf8, true));
        fields.push(Field::new(ROW, DataType::Int64, true));
        let schema = Arc::new(Schema::new(fields));
        Self { folder: folder.to_owned(), files, reading: Arc::new(reading), schema }
    }

    /// The epoch's folder.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// The columns of the rows as they are read, their places last.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The data columns, as they are read.
    pub(crate) fn columns(&self) -> &SchemaRef {
        &self.reading.columns
    }

    /// What `select` is over.
    pub(crate) fn selects_from(&self) -> Option<&SchemaRef> {
        self.reading.selection.as_ref().map(Selection::input)
    }

    /// Rows of all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// Some row can be read. Without one there are perhaps no columns to speak of.
    pub fn has_content(&self) -> bool {
        !self.reading.repairs.is_empty() || self.files.iter().any(|file| file.good_rows() > 0)
    }

    /// Reading may find something that blocks the epoch.
    pub fn may_block(&self) -> bool {
        let Reading { selection, columns, on_mismatch, .. } = self.reading.as_ref();
        let fits = |file: &SourceFile| {
            file.malformed().is_none()
                && !file.is_text()
                && file.schema.fields().iter().all(|field| {
                    let at = find_column(columns, field.name());
                    at.is_none_or(|at| fits_whole(field.data_type(), columns.field(at).data_type()))
                })
        };
        *on_mismatch == OnBad::Fail && (selection.is_some() || !self.files.iter().all(fits))
    }

    /// Registers the rows as table `name`. Each reading starts from the files; refused rows go to
    /// `aside` at each, so read once with any one of them.
    pub fn register(&self, session: &SessionContext, name: &str, aside: &AsideRef) -> Result<()> {
        self.register_as(session, name, aside, &self.schema)
    }

    /// The same, with each row as it came in the column [`CAME`], where that is something else.
    pub fn register_with_came(
        &self,
        session: &SessionContext,
        name: &str,
        aside: &AsideRef,
    ) -> Result<()> {
        let is_plain =
            self.reading.selection.is_none() && !self.files.iter().any(SourceFile::is_text);
        if is_plain {
            return self.register(session, name, aside);
        }
        let mut fields = self.schema.fields().to_vec();
        fields.push(Arc::new(Field::new(CAME, DataType::Utf8, true)));
        self.register_as(session, name, aside, &Arc::new(Schema::new(fields)))
    }

    /// All partitions are read at once, and each file that is read holds a row group in memory.
    fn files_at_once(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let largest = self.files.iter().map(SourceFile::held_bytes).max().unwrap_or(0);
        let room = usize::try_from(HELD_BYTES / largest.max(1)).unwrap_or(FILES_AT_ONCE);
        room.clamp(processors, FILES_AT_ONCE.max(processors))
    }

    fn register_as(
        &self,
        session: &SessionContext,
        name: &str,
        aside: &AsideRef,
        schema: &SchemaRef,
    ) -> Result<()> {
        let file_rows = |file: &SourceFile| FileRows {
            folder: self.folder.clone(),
            file: file.clone(),
            reading: Arc::clone(&self.reading),
            schema: Arc::clone(schema),
            aside: Arc::clone(aside),
        };
        let of_each = self.files.len().div_ceil(self.files_at_once()).max(1);
        let files = self.files.chunks(of_each).map(|files| files.iter().map(file_rows).collect());
        let partitions: Vec<Arc<dyn PartitionStream>> =
            files.map(|files| Arc::new(FilesRows(files)) as Arc<dyn PartitionStream>).collect();
        let doing = "read the folder";
        let table: Arc<dyn TableProvider> = match partitions.is_empty() {
            // A streaming table without partitions makes DataFusion 55 panic when columns are left out.
            true => Arc::new(EmptyTable::new(Arc::clone(schema))),
            false => {
                let table = StreamingTable::try_new(Arc::clone(schema), partitions);
                Arc::new(table.map_err(|e| foreign(doing, &e))?)
            }
        };
        session.register_table(name, table).map_err(|e| foreign(doing, &e))?;
        Ok(())
    }
}

#[derive(Clone)]
struct FileRows {
    folder: String,
    file: SourceFile,
    reading: Arc<Reading>,
    schema: SchemaRef,
    aside: AsideRef,
}

impl std::fmt::Debug for FileRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rows of {}/{}", self.folder, self.file.name)
    }
}

/// The rows of one file after the other's; at least one.
#[derive(Debug)]
struct FilesRows(Vec<FileRows>);

impl PartitionStream for FilesRows {
    fn schema(&self) -> &SchemaRef {
        &self.0[0].schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let rows = futures::stream::iter(self.0.clone()).flat_map(|file| file.batches());
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(self.schema()), rows))
    }
}

impl FileRows {
    fn batches(&self) -> BoxStream<'static, SqlResult<RecordBatch>> {
        let this = self.clone();
        let read_as = match &self.reading.selection {
            Some(selection) => selection.input(),
            None => &self.reading.columns,
        };
        let pieces = match self.first_pieces(read_as) {
            Ok(first) => {
                let first = futures::stream::iter(first.into_iter().map(Ok));
                first.chain(self.file.pieces(&self.folder, read_as)).boxed()
            }
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        };
        let batches = pieces.map(move |piece| {
            let made = this.reading.permit.check().and(piece).and_then(|piece| this.take(piece));
            made.map_err(|error| DataFusionError::External(Box::new(error)))
        });
        batches.boxed()
    }
}

/// Rows on their way, with what they came from.
struct Rows {
    batch: RecordBatch,
    places: Int64Array,
    came: RecordBatch,
    /// `came` holds lines of JSON.
    are_lines: bool,
    /// Somebody put them in the file's rows' places.
    are_corrections: bool,
}

impl Rows {
    /// Takes the rows out for which `refused` is true.
    fn take_out(&mut self, refused: &BooleanArray) -> Result<Self> {
        let out = self.filtered(refused)?;
        *self = self.filtered(&not(refused).map_err(Error::internal)?)?;
        Ok(out)
    }

    fn as_they_came(&self) -> Result<Vec<String>> {
        if !self.are_lines {
            return texts_of(&self.came);
        }
        let lines = self.came.column(0).as_string::<i32>();
        Ok(lines.iter().map(|line| line.unwrap_or_default().to_owned()).collect())
    }

    fn filtered(&self, keep: &BooleanArray) -> Result<Self> {
        let batch = filter_record_batch(&self.batch, keep).map_err(Error::internal)?;
        let came = filter_record_batch(&self.came, keep).map_err(Error::internal)?;
        let places = filter(&self.places, keep).map_err(Error::internal)?;
        let places = places.as_primitive::<Int64Type>().clone();
        Ok(Self { batch, places, came, ..*self })
    }
}

impl FileRows {
    fn repairs(&self) -> Option<&BTreeMap<i64, String>> {
        self.reading.repairs.get(&self.file.name)
    }

    fn is_repaired(&self, place: i64) -> bool {
        self.repairs().is_some_and(|repairs| repairs.contains_key(&place))
    }

    /// What is known before the file's rows are read: malformed lines, and rows that were corrected.
    fn first_pieces(&self, read_as: &SchemaRef) -> Result<Option<Piece>> {
        if let Some(malformed) = self.file.malformed() {
            for batch in malformed.batches()? {
                let batch = batch?;
                let lines = batch.column(0).as_string::<i32>();
                let places = batch.column(1).as_primitive::<Int64Type>();
                for (line, place) in lines.iter().zip(places.values()) {
                    self.set_aside_line(*place, line.unwrap_or_default())?;
                }
            }
        }
        let Some(repairs) = self.repairs() else { return Ok(None) };
        self.file.corrections(repairs, read_as).map(Some)
    }

    fn place(&self, row: i64) -> String {
        format!("{}/{}, row {row}", self.folder, self.file.name)
    }

    fn set_aside_line(&self, place: i64, line: &str) -> Result<()> {
        if self.is_repaired(place) {
            return Ok(());
        }
        if self.reading.on_mismatch == OnBad::Fail {
            let text = format!("{} cannot be read: {}", self.place(place), shown_line(line));
            return Err(Error::new(Code::RowMalformed, text).with_help(
                "deliver the file again; or set on_mismatch = \"quarantine\", then `alluvium retry`",
            ));
        }
        self.lock().push(&self.file.name, &[place], MALFORMED, vec![line_as_json(line)])
    }

    /// A line with a value of the wrong shape, an object where a number belongs.
    fn set_aside_misfit(
        &self,
        (place, line, column): &(i64, String, String),
        is_correction: bool,
    ) -> Result<()> {
        if self.is_repaired(*place) && !is_correction {
            return Ok(());
        }
        if self.reading.on_mismatch == OnBad::Fail {
            let text = format!(
                "{}, column {column:?}: the value does not fit its type: {}",
                self.place(*place),
                shown_line(line)
            );
            let (text, help) = match is_correction {
                true => (format!("corrected row: {text}"), CORRECTION_HELP),
                false => (text, MISFIT_HELP),
            };
            return Err(Error::new(Code::ColumnTypeMismatch, text).with_help(help));
        }
        let columns = &self.reading.columns;
        let spelt = find_column(columns, column).map(|at| columns.field(at).name().as_str());
        let reason = format!("type:{}", spelt.unwrap_or(column));
        self.lock().push(&self.file.name, &[*place], &reason, vec![line.clone()])
    }

    /// A piece as rows of the table `incoming`.
    fn take(&self, piece: Piece) -> Result<RecordBatch> {
        for misfit in &piece.misfits {
            self.set_aside_misfit(misfit, piece.are_corrections)?;
        }
        let mut rows = self.unrepaired(piece)?;
        self.check_exact(&rows)?;
        if let Some(selection) = &self.reading.selection {
            self.fit(&mut rows, selection.input())?;
            self.select(&mut rows, selection)?;
            self.check_exact(&rows)?;
        }
        self.fit(&mut rows, &self.reading.columns)?;
        rows.batch = self.with_one_zero(rows.batch)?;
        rows.batch = self.without_empty_partitions(rows.batch)?;
        if let Some(refused) = self.null_keys(&rows.batch)? {
            let out = rows.take_out(&refused)?;
            self.set_aside(&out, NULL_KEY)?;
        }
        self.with_places(&rows)
    }

    /// The piece without rows that were corrected, unless it holds these.
    fn unrepaired(&self, piece: Piece) -> Result<Rows> {
        let (are_lines, are_corrections) = (piece.lines.is_some(), piece.are_corrections);
        let came = match piece.lines {
            None => piece.rows.clone(),
            Some(lines) => RecordBatch::try_from_iter([("line", Arc::new(lines) as ArrayRef)])
                .map_err(Error::internal)?,
        };
        let rows =
            Rows { batch: piece.rows, places: piece.places, came, are_lines, are_corrections };
        if self.repairs().is_none() || are_corrections {
            return Ok(rows);
        }
        let keep: Vec<bool> =
            rows.places.values().iter().map(|at| !self.is_repaired(*at)).collect();
        rows.filtered(&BooleanArray::from(keep))
    }

    /// Gives values their types; what does not fit is refused, or an error.
    fn fit(&self, rows: &mut Rows, columns: &SchemaRef) -> Result<()> {
        // Text formats and paths have nothing but text, and corrected rows come as text.
        let is_text = self.file.is_text() || rows.are_lines;
        let exact =
            self.reading.exact.iter().filter(|name| !is_text && !self.file.is_constant(name));
        let strict: Vec<&str> = exact.map(String::as_str).collect();
        let written =
            self.reading.written.iter().filter(|name| is_text && !self.file.is_constant(name));
        let written: Vec<&str> = written.map(String::as_str).collect();
        let found = typed(&rows.batch, columns, &strict, &written)?;
        if self.reading.on_mismatch == OnBad::Fail
            && let Some((name, misfit)) = found.misfits.first()
        {
            let row = (0..misfit.len()).find(|at| misfit.value(*at)).unwrap_or_default();
            return Err(self.misfit(rows, columns, name, row));
        }
        rows.batch = found.rows;
        let mut gone = BooleanArray::from(vec![false; rows.places.len()]);
        for (name, misfit) in &found.misfits {
            // A row is refused once, for its first column.
            let new = alluvium_table::arrow::compute::and_not(misfit, &gone);
            let new = new.map_err(Error::internal)?;
            self.set_aside(&rows.filtered(&new)?, &format!("type:{name}"))?;
            gone = or(&gone, misfit).map_err(Error::internal)?;
        }
        if !found.misfits.is_empty() {
            rows.take_out(&gone)?;
        }
        Ok(())
    }

    fn misfit(&self, rows: &Rows, columns: &SchemaRef, name: &str, row: usize) -> Error {
        let at = find_column(rows.batch.schema_ref(), name);
        let value = at.map_or_else(String::new, |at| shown(rows.batch.column(at), row));
        let found = at.map_or(&DataType::Null, |at| rows.batch.column(at).data_type());
        let wanted = columns.field_with_name(name).map_or(&DataType::Null, |f| f.data_type());
        let text = format!(
            "{}, column {name:?}: {value} ({found}) does not fit its type, {wanted}",
            self.place(rows.places.value(row))
        );
        let (text, help) = match rows.are_corrections {
            true => (format!("corrected row: {text}"), CORRECTION_HELP),
            false => (text, MISFIT_HELP),
        };
        Error::new(Code::ColumnTypeMismatch, text).with_help(help)
    }

    fn select(&self, rows: &mut Rows, selection: &Selection) -> Result<()> {
        let before = rows.places.len();
        let failed = selection.failing(&rows.batch);
        if let Some((failed, why)) = failed {
            if self.reading.on_mismatch == OnBad::Fail {
                let row = (0..failed.len()).find(|at| failed.value(*at)).unwrap_or_default();
                let text = format!("{}: select: {why}", self.place(rows.places.value(row)));
                return Err(Error::new(Code::SelectInvalid, text).with_help(
                    "correct `select`; or refuse such rows: on_mismatch = \"quarantine\", then `alluvium retry`",
                ));
            }
            let out = rows.take_out(&failed)?;
            self.set_aside(&out, SELECT)?;
        }
        let refused = before - rows.places.len();
        if let Some(keep) = selection.kept(&rows.batch)? {
            *rows = rows.filtered(&keep)?;
        }
        rows.batch = selection.project(&rows.batch)?;
        self.lock().filtered += (before - refused - rows.places.len()) as u64;
        Ok(())
    }

    fn set_aside(&self, rows: &Rows, reason: &str) -> Result<()> {
        let texts = rows.as_they_came()?;
        self.lock().push(&self.file.name, rows.places.values(), reason, texts)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Aside> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_places(&self, rows: &Rows) -> Result<RecordBatch> {
        let mut columns: Vec<ArrayRef> = rows.batch.columns().to_vec();
        let names = vec![&self.file.name; rows.places.len()];
        columns.push(Arc::new(StringArray::from_iter_values(names)));
        columns.push(Arc::new(rows.places.clone()));
        if self.schema.fields().len() > columns.len() {
            columns.push(Arc::new(StringArray::from(rows.as_they_came()?)));
        }
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(Error::internal)
    }

    /// Delta keeps microseconds: two keys may not become one, nor an order vanish, by cutting.
    fn check_exact(&self, rows: &Rows) -> Result<()> {
        for name in &self.reading.exact {
            let Some(at) = find_column(rows.batch.schema_ref(), name) else { continue };
            let column = rows.batch.column(at);
            let cut = if let Some(times) = column.as_primitive_opt::<TimestampNanosecondType>() {
                times.iter().position(|time| time.is_some_and(|time| time % 1000 != 0))
            } else if let (Some(texts), true) = (column.as_string_opt::<i32>(), self.is_time(name))
            {
                texts.iter().position(|text| text.is_some_and(has_nanoseconds))
            } else {
                None
            };
            if let Some(row) = cut {
                let text = format!(
                    "{}/{}, column {name:?}, row {}: the time has nanoseconds and Delta keeps \
                     microseconds, which would change what the column decides",
                    self.folder,
                    self.file.name,
                    rows.places.value(row)
                );
                return Err(Error::new(Code::ColumnTypeMismatch, text)
                    .with_help("write the column in microseconds, or as a 64-bit integer"));
            }
        }
        Ok(())
    }

    fn is_time(&self, name: &str) -> bool {
        let columns = &self.reading.columns;
        let kind = find_column(columns, name).map(|at| columns.field(at).data_type());
        kind.is_some_and(|kind| matches!(kind, DataType::Timestamp(..)))
    }

    /// Columns that decide know one zero and one NaN.
    fn with_one_zero(&self, batch: RecordBatch) -> Result<RecordBatch> {
        let mut columns = batch.columns().to_vec();
        let schema = batch.schema();
        for at in self.reading.exact.iter().filter_map(|name| find_column(&schema, name)) {
            columns[at] = with_one_zero(&columns[at]);
        }
        let rows = batch.num_rows();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(schema, columns, &options).map_err(Error::internal)
    }

    /// What every reader will see: a partition's empty text is NULL in the log.
    fn without_empty_partitions(&self, batch: RecordBatch) -> Result<RecordBatch> {
        let schema = batch.schema();
        let mut columns = batch.columns().to_vec();
        for at in self.reading.partitions.iter().filter_map(|name| find_column(&schema, name)) {
            if let Some(values) = columns[at].as_string_opt::<i32>() {
                let values = values.iter().map(|value| value.filter(|text| !text.is_empty()));
                columns[at] = Arc::new(values.collect::<StringArray>());
            }
        }
        let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(schema, columns, &rows).map_err(Error::internal)
    }

    /// True for each row with a NULL in the key; `None`: no such row.
    fn null_keys(&self, batch: &RecordBatch) -> Result<Option<BooleanArray>> {
        let mut refused: Option<BooleanArray> = None;
        for name in &self.reading.key {
            let Some(at) = find_column(batch.schema_ref(), name) else { continue };
            let column = batch.column(at);
            if column.null_count() == 0 {
                continue;
            }
            let nulls = alluvium_table::arrow::compute::is_null(column).map_err(Error::internal)?;
            refused = Some(match refused {
                Some(known) => or(&known, &nulls).map_err(Error::internal)?,
                None => nulls,
            });
        }
        Ok(refused)
    }
}

fn shown_line(line: &str) -> String {
    let mut text: String = line.chars().take(100).collect();
    if text.len() < line.len() {
        text.push('…');
    }
    format!("{text:?}")
}
