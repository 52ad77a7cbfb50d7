//! Text files: CSV and JSON lines, compressed or not, read once into rows that can be read again.
//!
//! Values stay as they came. Their types are decided later, value by value; here only what types the
//! values would allow.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek, Write};
use std::rc::Rc;
use std::sync::Arc;

use alluvium_protocol::manifest::Object;
use alluvium_protocol::pipeline::{Csv, Declared, Format, same_name};
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, Int64Builder, RecordBatch, StringBuilder,
};
use alluvium_table::arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use alluvium_table::classify::foreign;
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::store::StoreRef;
use alluvium_table::width::{BATCH_BYTES, BATCH_ROWS};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};

use super::csv::{Seen, Watched, Window, is_well_quoted};
use super::folders;
use super::json::{self, JsonKind};
use super::parquet::{PinnedReader, read_error};
use super::{Piece, WHOLE_BYTES_MAX};
use crate::raw::ROW;

/// The column with a line as it came.
const LINE: &str = "line";

/// A text file, read.
pub(super) struct TextFile {
    /// Rows: the columns as text (CSV) or the line (JSON), and the position last.
    rows: Spooled,
    /// Lines that are no rows, with their positions.
    malformed: Spooled,
    kinds: Vec<(String, Kinds)>,
    is_json: bool,
}

impl TextFile {
    /// Fetches and reads the file.
    pub(super) async fn open(
        store: &StoreRef,
        folder: &str,
        object: &Object,
        format: &Format,
        declared: &[Declared],
    ) -> Result<Self> {
        let reader = PinnedReader::new(store, folder, object, false)?;
        let fetched = fetch(&reader, object.size).await;
        let fetched = fetched.map_err(|error| match error {
            Fetching::Of(error) => read_error(folder, &object.name, &error),
            Fetching::Disk(error) => error,
        })?;
        let place = format!("{folder}/{}", object.name);
        let name = object.name.clone();
        let format = format.clone();
        let declared = Headings::new(declared, &object.name);
        let reading = tokio::task::spawn_blocking(move || {
            let input = decompressed(fetched.reader()?, &name);
            let input = input.map_err(|e| unreadable(&place, &e))?;
            match format {
                Format::Csv(csv) => read_csv(input, &csv, &declared, &place),
                _ => read_json(input, &place),
            }
        });
        reading.await.map_err(Error::internal)?
    }

    /// Names and the types that the values of this file allow.
    pub(super) fn schema(&self) -> SchemaRef {
        let fields = self.kinds.iter().map(|(name, kind)| Field::new(name, kind.kind(), true));
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }

    pub(super) fn kinds(&self) -> &[(String, Kinds)] {
        &self.kinds
    }

    pub(super) fn is_json(&self) -> bool {
        self.is_json
    }

    /// Rows, the malformed ones included.
    pub(super) fn rows(&self) -> u64 {
        (self.rows.rows() + self.malformed.rows()) as u64
    }

    pub(super) fn malformed(&self) -> Option<&Spooled> {
        (self.malformed.rows() > 0).then_some(&self.malformed)
    }

    /// The rows, in order; nested values of JSON with the types of `columns`.
    pub(super) fn pieces(&self, columns: &SchemaRef) -> BoxStream<'static, Result<Piece>> {
        let batches = match self.rows.batches() {
            Ok(batches) => batches,
            Err(error) => return futures::stream::once(async move { Err(error) }).boxed(),
        };
        let decoding = self.is_json.then(|| self.decoding(columns));
        let pieces = batches.map(move |batch| piece_of(&batch?, decoding.as_ref()));
        futures::stream::iter(pieces).boxed()
    }

    fn decoding(&self, columns: &SchemaRef) -> json::Decoding {
        let kinds = self.kinds.iter().filter_map(|(name, kind)| match kind {
            Kinds::Json(kind) => Some((name.as_str(), kind)),
            Kinds::Csv(_) => None,
        });
        json::Decoding::new(kinds, columns)
    }
}

fn piece_of(batch: &RecordBatch, decoding: Option<&json::Decoding>) -> Result<Piece> {
    let last = batch.num_columns() - 1;
    let places = batch.column(last).as_primitive::<Int64Type>().clone();
    let Some(decoding) = decoding else {
        let columns: Vec<usize> = (0..last).collect();
        let rows = batch.project(&columns).map_err(Error::internal)?;
        return Ok(Piece {
            rows,
            places,
            lines: None,
            misfits: Vec::new(),
            are_corrections: false,
        });
    };
    let lines = batch.column(0).as_string::<i32>().clone();
    let texts: Vec<&str> = (0..lines.len()).map(|at| lines.value(at)).collect();
    decoding.piece(&texts, lines.clone(), places)
}

/// What a file's bytes are in.
enum Fetched {
    Memory(Bytes),
    /// Without a name: when the process is killed, it is gone.
    Disk(File),
}

impl Fetched {
    fn reader(self) -> Result<Box<dyn BufRead + Send>> {
        Ok(match self {
            Self::Memory(bytes) => Box::new(Cursor::new(bytes)),
            Self::Disk(mut file) => {
                file.rewind().map_err(|e| foreign("read fetched bytes", &e))?;
                Box::new(BufReader::with_capacity(1 << 18, file))
            }
        })
    }
}

enum Fetching {
    Of(alluvium_table::parquet::errors::ParquetError),
    Disk(Error),
}

async fn fetch(reader: &PinnedReader, size: u64) -> Result<Fetched, Fetching> {
    let mut chunks = reader.whole().await.map_err(Fetching::Of)?;
    let external = |e: object_store::Error| Fetching::Of(e.into());
    let disk = |e: std::io::Error| Fetching::Disk(foreign("keep fetched bytes", &e));
    if size <= WHOLE_BYTES_MAX {
        let mut body = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        while let Some(chunk) = chunks.try_next().await.map_err(external)? {
            body.extend_from_slice(&chunk);
        }
        return Ok(Fetched::Memory(body.into()));
    }
    let mut file = tempfile::tempfile().map_err(disk)?;
    while let Some(chunk) = chunks.try_next().await.map_err(external)? {
        file.write_all(&chunk).map_err(disk)?;
    }
    Ok(Fetched::Disk(file))
}

fn decompressed(
    input: Box<dyn BufRead + Send>,
    name: &str,
) -> std::io::Result<Box<dyn BufRead + Send>> {
    let name = name.to_ascii_lowercase();
    let plain: Box<dyn Read + Send> = if name.ends_with(".gz") {
        Box::new(flate2::bufread::MultiGzDecoder::new(input))
    } else if name.ends_with(".zst") {
        Box::new(zstd::stream::read::Decoder::with_buffer(input)?)
    } else {
        return Ok(input);
    };
    Ok(Box::new(BufReader::with_capacity(1 << 16, plain)))
}

fn unreadable(place: &str, error: &dyn std::fmt::Display) -> Error {
    Error::new(Code::FileUnreadable, format!("read {place}: {error}"))
        .with_help("deliver the file again whole; the changed folder is picked up by itself")
}

/// Lines, or fields of rows, on their way into a spool.
struct Collector {
    columns: Vec<StringBuilder>,
    places: Int64Builder,
    /// Of values that were not put into the spool so far.
    bytes: usize,
    schema: SchemaRef,
    spool: Spool,
}

impl Collector {
    fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut fields: Vec<Field> =
            names.into_iter().map(|name| Field::new(name, DataType::Utf8, true)).collect();
        let columns = fields.iter().map(|_| StringBuilder::new()).collect();
        fields.push(Field::new(ROW, DataType::Int64, true));
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let spool = Spool::new(Arc::clone(&schema));
        Self { columns, places: Int64Builder::new(), bytes: 0, schema, spool }
    }

    fn add<'a>(
        &mut self,
        place: i64,
        values: impl IntoIterator<Item = Option<&'a str>>,
    ) -> Result<()> {
        for (column, value) in self.columns.iter_mut().zip(values) {
            column.append_option(value);
            self.bytes += value.map_or(0, str::len);
        }
        self.places.append_value(place);
        match self.places.values_slice().len() >= BATCH_ROWS || self.bytes >= BATCH_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        let mut columns: Vec<ArrayRef> =
            self.columns.iter_mut().map(|column| Arc::new(column.finish()) as ArrayRef).collect();
        columns.push(Arc::new(self.places.finish()) as ArrayRef);
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        self.spool.push(batch.map_err(Error::internal)?)
    }

    fn finish(mut self) -> Result<Spooled> {
        if !self.places.values_slice().is_empty() {
            self.flush()?;
        }
        self.spool.finish()
    }
}

/// What the columns of a CSV file without a header are called.
#[derive(Default)]
struct Headings {
    declared: Vec<String>,
    /// Those that the file's path does not give.
    own: Vec<String>,
}

impl Headings {
    fn new(declared: &[Declared], file: &str) -> Self {
        let declared: Vec<String> = declared.iter().map(|column| column.name.clone()).collect();
        let path = folders::columns_of(file);
        let is_own = |name: &&String| !path.iter().any(|(field, _)| same_name(field.name(), name));
        let own = declared.iter().filter(is_own).cloned().collect();
        Self { declared, own }
    }

    /// The declared names, whatever number of fields the first record has: it may be one that is cut
    /// off. Where none are declared, or single ones by their place, `c1`, `c2` and so on.
    fn names(&self, fields: usize) -> Vec<String> {
        let is_place = |name: &String| {
            name.strip_prefix('c').is_some_and(|n| n.bytes().all(|byte| byte.is_ascii_digit()))
        };
        if self.declared.len() == fields {
            self.declared.clone()
        } else if self.own.iter().all(is_place) {
            (1..=fields).map(|n| format!("c{n}")).collect()
        } else {
            self.own.clone()
        }
    }
}

fn read_csv(
    input: Box<dyn BufRead + Send>,
    csv: &Csv,
    declared: &Headings,
    place: &str,
) -> Result<TextFile> {
    let window = Rc::new(RefCell::new(Window::default()));
    let mut reader = ::csv::ReaderBuilder::new()
        .delimiter(csv.delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(Watched { input, window: Rc::clone(&window) });
    let mut record = ::csv::ByteRecord::new();
    let failed = |e: ::csv::Error| unreadable(place, &e);
    // The bytes that the last record was read from.
    let mut line = Vec::new();
    let mut next = |record: &mut ::csv::ByteRecord, line: &mut Vec<u8>| {
        let begin = reader.position().byte();
        let has_row = reader.read_byte_record(record).map_err(failed)?;
        window.borrow_mut().take(begin, reader.position().byte(), line);
        Ok::<bool, Error>(has_row)
    };
    let mut has_row = next(&mut record, &mut line)?;
    let mut names: Vec<String> = Vec::new();
    if has_row && csv.header {
        for field in &record {
            let name = std::str::from_utf8(field).map_err(|e| unreadable(place, &e))?;
            names.push(name.trim().trim_start_matches('\u{feff}').to_owned());
        }
        if let Some(empty) = names.iter().position(String::is_empty) {
            return Err(unreadable(
                place,
                &format!("column {} has no name in the header", empty + 1),
            ));
        }
        if !is_well_quoted(&line, csv.delimiter) {
            return Err(unreadable(place, &"a quote in the header is not closed"));
        }
        has_row = next(&mut record, &mut line)?;
    } else if has_row {
        names = declared.names(record.len());
    }
    let mut kinds: Vec<Seen> = names.iter().map(|_| Seen::default()).collect();
    let mut rows = Collector::new(names.iter().map(String::as_str));
    let mut malformed = Collector::new([LINE]);
    let mut at = 0;
    while has_row {
        let fields: Option<Vec<&str>> =
            record.iter().map(|field| std::str::from_utf8(field).ok()).collect();
        let is_row = |fields: &Vec<&str>| {
            fields.len() == names.len() && is_well_quoted(&line, csv.delimiter)
        };
        match fields.filter(is_row) {
            Some(fields) => {
                let values: Vec<Option<&str>> =
                    fields.into_iter().map(|value| (value != csv.null).then_some(value)).collect();
                for (kind, value) in kinds.iter_mut().zip(&values) {
                    value.iter().for_each(|value| kind.add(value));
                }
                rows.add(at, values)?;
            }
            None => {
                let came = String::from_utf8_lossy(&line);
                malformed.add(at, [Some(came.trim_matches(['\r', '\n']))])?;
            }
        }
        at += 1;
        has_row = next(&mut record, &mut line)?;
    }
    Ok(TextFile {
        rows: rows.finish()?,
        malformed: malformed.finish()?,
        kinds: names.into_iter().zip(kinds.into_iter().map(Kinds::Csv)).collect(),
        is_json: false,
    })
}

fn read_json(mut input: Box<dyn BufRead + Send>, place: &str) -> Result<TextFile> {
    let mut rows = Collector::new([LINE]);
    let mut malformed = Collector::new([LINE]);
    let mut columns = json::Columns::default();
    let mut line = Vec::new();
    let mut at = 0;
    loop {
        line.clear();
        let read = input.read_until(b'\n', &mut line).map_err(|e| unreadable(place, &e))?;
        if read == 0 {
            break;
        }
        let bytes = line.strip_prefix(b"\xef\xbb\xbf").filter(|_| at == 0).unwrap_or(&line);
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let text = std::str::from_utf8(bytes.trim_ascii()).ok();
        match text.and_then(|text| columns.learn(text)) {
            Some(text) => rows.add(at, [Some(text.as_ref())])?,
            None => {
                malformed.add(at, [Some(String::from_utf8_lossy(bytes.trim_ascii()).as_ref())])?
            }
        }
        at += 1;
    }
    Ok(TextFile {
        rows: rows.finish()?,
        malformed: malformed.finish()?,
        kinds: columns.into_kinds().into_iter().map(|(n, kind)| (n, Kinds::Json(kind))).collect(),
        is_json: true,
    })
}

/// What the values of a column allow.
#[derive(Clone, Debug)]
pub(super) enum Kinds {
    Csv(Seen),
    Json(JsonKind),
}

impl Kinds {
    /// The type of a column with all these values; `Null` when there are none.
    pub(super) fn kind(&self) -> DataType {
        match self {
            Self::Csv(seen) => seen.kind(),
            Self::Json(kind) => kind.kind(),
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        match (self, other) {
            (Self::Csv(a), Self::Csv(b)) => a.merge(b),
            (Self::Json(a), Self::Json(b)) => *a = std::mem::take(a).merged(b.clone()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use alluvium_table::arrow::array::{Int64Array, StringArray};

    use super::*;

    #[test]
    fn csv_keeps_what_it_cannot_read() {
        let text = "id,name\n1,\"a\nb\"\n2\n\n3,c,d\n4,\n";
        let csv = Csv { delimiter: b',', header: true, null: String::new() };
        let file = read_csv(
            Box::new(Cursor::new(text.as_bytes().to_vec())),
            &csv,
            &Headings::default(),
            "f",
        )
        .unwrap();
        assert_eq!((file.rows.rows(), file.malformed.rows(), file.rows()), (2, 2, 4));
        let batch = file.rows.batches().unwrap().next().unwrap().unwrap();
        let names = batch.column(1).as_string::<i32>();
        assert_eq!((names.value(0), names.is_null(1)), ("a\nb", true));
        assert_eq!(batch.column(2).as_ref(), &Int64Array::from(vec![0, 3]));
        let bad = file.malformed.batches().unwrap().next().unwrap().unwrap();
        assert_eq!(bad.column(0).as_ref(), &StringArray::from(vec!["2", "3,c,d"]));
    }

    #[test]
    fn json_lines_are_objects_or_malformed() {
        let text =
            "{\"id\":1,\"v\":{\"a\":[1,2.5]}}\n\n[1]\n{\"id\":\nnull\n{\"id\":\"x\",\"w\":true}\n";
        let file = read_json(Box::new(Cursor::new(text.as_bytes().to_vec())), "f").unwrap();
        assert_eq!((file.rows.rows(), file.malformed.rows()), (2, 3));
        let schema = file.schema();
        assert_eq!(schema.field(0).data_type(), &DataType::Utf8);
        assert!(matches!(schema.field(1).data_type(), DataType::Struct(_)));
        assert_eq!(schema.field(2).data_type(), &DataType::Boolean);
    }
}
