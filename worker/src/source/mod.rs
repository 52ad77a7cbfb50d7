//! An epoch's data files, read exactly as the manifest pinned them, whatever their format.
//!
//! ```text
//!  manifest ─► open: footers, or text read into lines and fields ─► columns ─► pieces of rows, in order
//! ```
//! Every request demands the pinned entity tag: a file that changed since is an error, not data.

mod csv;
mod delta;
mod folders;
mod hex;
mod json;
mod parquet;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use alluvium_protocol::manifest::{Manifest, Object};
use alluvium_protocol::pipeline::{Format, OnBad, same_name};
use alluvium_protocol::{Code, Error, Pipeline, Result, part_of_task};
use alluvium_table::arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray,
};
use alluvium_table::arrow::compute::cast;
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::schema::find_column;
use alluvium_table::spool::Spooled;
use alluvium_table::store::object_store_at;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use serde_json::value::RawValue;
use tracing::Instrument;

use self::parquet::ParquetFile;
use self::text::TextFile;

/// Files opened at a time, where that is to read them; and where it is to read a footer, which on object
/// storage is mostly waiting.
const OPEN_AT_ONCE: usize = 8;
const FOOTERS_AT_ONCE: usize = 32;
/// Files of an epoch that is smaller than this are fetched whole, once.
const WHOLE_BYTES_MAX: u64 = 16 << 20;

/// One data file, opened.
#[derive(Clone)]
pub struct SourceFile {
    /// Path within the folder: raw's `_file`.
    pub name: String,
    /// The file's columns, and those that its path gives. Text has the types that its values allow.
    pub schema: SchemaRef,
    /// Rows, the malformed ones included.
    pub rows: u64,
    body: Body,
    /// Columns that the path or the Delta log gives: one value for all rows.
    constants: Vec<(Field, ArrayRef)>,
}

#[derive(Clone)]
enum Body {
    Parquet(ParquetFile),
    Text(Arc<TextFile>),
}

/// Rows of a file.
pub struct Piece {
    /// Their columns as they came; text formats leave most of them as text.
    pub rows: RecordBatch,
    /// The position of each in its file.
    pub places: Int64Array,
    /// The lines, where these are what came.
    pub lines: Option<StringArray>,
    /// Lines with a value that its column cannot hold: position, line, column.
    pub misfits: Vec<(i64, String, String)>,
    /// Not the file's rows, but what somebody put in their places.
    pub are_corrections: bool,
}

/// The files of an epoch.
pub struct Opened {
    /// Those that can be read.
    pub files: Vec<SourceFile>,
    /// Those that cannot, where such files go to quarantine.
    pub corrupt: Vec<(String, Error)>,
}

impl SourceFile {
    /// Opens every file of the manifest.
    pub async fn open_all(pipeline: &Pipeline, manifest: &Manifest) -> Result<Opened> {
        let bytes: u64 = manifest.objects.iter().map(|object| object.size).sum();
        let span = part_of_task!(
            "source.open",
            files = manifest.objects.len() as i64,
            bytes = bytes as i64
        );
        Self::open_them(pipeline, manifest, bytes).instrument(span).await
    }

    async fn open_them(pipeline: &Pipeline, manifest: &Manifest, bytes: u64) -> Result<Opened> {
        let store = object_store_at(&pipeline.source)?;
        let folder = manifest.folder.as_str();
        let is_small = bytes <= WHOLE_BYTES_MAX;
        let format = &pipeline.content.format;
        let live = match format {
            Format::Delta if !manifest.objects.is_empty() => {
                Some(delta::live_files(&pipeline.source, manifest).await?)
            }
            _ => None,
        };
        let objects: Vec<&Object> = match &live {
            Some(live) => live.iter().map(|file| &file.object).collect(),
            None => manifest.objects.iter().collect(),
        };
        let content = &pipeline.content;
        let exact = &[content.key.as_slice(), content.sequence_by.as_slice()].concat();
        let may_be_corrupt = pipeline.content.on_corrupt_file == OnBad::Quarantine;
        let mut opening = Vec::with_capacity(objects.len());
        for object in objects {
            let store = Arc::clone(&store);
            let one = async move {
                let opened = match format {
                    Format::Parquet | Format::Delta => {
                        let file = ParquetFile::open(&store, folder, object, is_small, exact).await;
                        match file {
                            // Only reading all of it tells that it can be read.
                            Ok(file) if may_be_corrupt => {
                                file.read_through(folder, &object.name).await.map(|()| file)
                            }
                            other => other,
                        }
                        .map(Self::of_parquet)
                    }
                    Format::Csv(_) | Format::Json => {
                        let declared = &pipeline.content.declared;
                        TextFile::open(&store, folder, object, format, declared)
                            .await
                            .map(|file| Self::of_text(&object.name, file))
                    }
                };
                (object.name.clone(), opened)
            };
            opening.push(one.boxed());
        }
        let at_once =
            if format.is_text() || may_be_corrupt { OPEN_AT_ONCE } else { FOOTERS_AT_ONCE };
        let opened: Vec<_> = futures::stream::iter(opening).buffered(at_once).collect().await;
        let (mut files, mut corrupt) = (Vec::new(), Vec::new());
        for (name, opened) in opened {
            match opened {
                Ok(file) => files.push(file),
                Err(error) if may_be_corrupt && error.code == Code::FileUnreadable => {
                    corrupt.push((name, error));
                }
                Err(error) => return Err(error),
            }
        }
        if format.is_text() {
            agree_on_types(&mut files, &pipeline.content.key);
        }
        let mut constants: BTreeMap<String, Vec<(Field, ArrayRef)>> = BTreeMap::new();
        for file in live.into_iter().flatten() {
            constants.insert(file.object.name, file.values);
        }
        for file in &mut files {
            let values = constants.remove(&file.name);
            file.add_constants(values.unwrap_or_else(|| folders::columns_of(&file.name)));
        }
        Ok(Opened { files, corrupt })
    }

    fn of_parquet(file: ParquetFile) -> Self {
        Self {
            name: file.name.clone(),
            schema: Arc::clone(file.schema()),
            rows: file.rows(),
            body: Body::Parquet(file),
            constants: Vec::new(),
        }
    }

    fn of_text(name: &str, file: TextFile) -> Self {
        Self {
            name: name.to_owned(),
            schema: file.schema(),
            rows: file.rows(),
            body: Body::Text(Arc::new(file)),
            constants: Vec::new(),
        }
    }

    /// The file's path, or the Delta log, gives the column: as text, whatever it means.
    pub fn is_constant(&self, column: &str) -> bool {
        self.constants.iter().any(|(field, _)| same_name(field.name(), column))
    }

    /// The file has columns itself: an empty text file has none.
    pub fn has_columns(&self) -> bool {
        self.schema.fields().len() > self.constants.len()
    }

    /// What the file itself says of a column counts.
    fn add_constants(&mut self, constants: Vec<(Field, ArrayRef)>) {
        let is_new = |field: &Field| find_column(&self.schema, field.name()).is_none();
        self.constants = constants.into_iter().filter(|(field, _)| is_new(field)).collect();
        let own = self.schema.fields().iter().map(|field| field.as_ref().clone());
        let added = self.constants.iter().map(|(field, _)| field.clone());
        self.schema = Arc::new(Schema::new(own.chain(added).collect::<Vec<_>>()));
    }

    /// What reading it holds in memory, beside what is being decoded.
    pub fn held_bytes(&self) -> u64 {
        match &self.body {
            Body::Parquet(file) => file.held_bytes(),
            // Its rows lie on disk.
            Body::Text(_) => 0,
        }
    }

    /// The file's rows from the start, in order. `columns` says which types nested values get.
    pub fn pieces(&self, folder: &str, columns: &SchemaRef) -> BoxStream<'static, Result<Piece>> {
        let pieces = match &self.body {
            Body::Parquet(file) => file.pieces(folder),
            Body::Text(file) => file.pieces(columns),
        };
        let constants = self.constants.clone();
        if constants.is_empty() {
            return pieces;
        }
        pieces.map(move |piece| with_constants(piece?, &constants)).boxed()
    }

    /// Values come as text.
    pub fn is_text(&self) -> bool {
        matches!(self.body, Body::Text(_))
    }

    /// Rows that could be read.
    pub fn good_rows(&self) -> u64 {
        self.rows - self.malformed().map_or(0, |malformed| malformed.rows() as u64)
    }

    /// Rows that could not be read, with their lines.
    pub fn malformed(&self) -> Option<&Spooled> {
        match &self.body {
            Body::Text(file) => file.malformed(),
            Body::Parquet(_) => None,
        }
    }

    /// Rows that somebody put in the places of this file's, as JSON text. Their columns are the file's,
    /// or else those of `columns`; one that neither has is an error: dropped in silence, it would be a
    /// NULL.
    pub fn corrections(&self, rows: &BTreeMap<i64, String>, columns: &SchemaRef) -> Result<Piece> {
        // A field's bytes are the value in CSV; JSON writes them in hexadecimal digits.
        let columns = &match &self.body {
            Body::Text(file) if !file.is_json() => without_binary(columns),
            _ => Arc::clone(columns),
        };
        let more =
            columns.fields().iter().filter(|f| find_column(&self.schema, f.name()).is_none());
        let fields = self.schema.fields().iter().chain(more).map(|field| field.as_ref().clone());
        let schema = Schema::new(fields.collect::<Vec<_>>());
        let mut seen = json::Columns::default();
        let mut texts = Vec::with_capacity(rows.len());
        for (row, line) in rows {
            let refused = |why: String| {
                let text = format!("{}: the corrected row {row} {why}", self.name);
                Error::new(Code::RepairUnknown, text).with_help(
                    "correct it again: `alluvium quarantine replay PIPELINE EPOCH --rows FILE`; \
                     \"content\": null in the file takes the correction back",
                )
            };
            let named = self.named(line, &schema).map_err(refused)?;
            let told = seen.learn(&named);
            let told = told.ok_or_else(|| refused("has a name twice".to_owned()))?;
            texts.push(told.into_owned());
        }
        let kinds: BTreeMap<String, json::JsonKind> = seen.into_kinds().into_iter().collect();
        let nothing = json::JsonKind::default();
        let kinds = schema.fields().iter().map(|field| {
            let kind = kinds.get(field.name()).unwrap_or(&nothing);
            (field.name().as_str(), kind)
        });
        let decoding = json::Decoding::new(kinds, columns);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let lines = StringArray::from_iter_values(rows.values());
        let places = Int64Array::from_iter_values(rows.keys().copied());
        let piece = decoding.piece(&texts, lines, places)?;
        Ok(Piece { are_corrections: true, ..piece })
    }

    /// A corrected row with its columns as the schema spells them, and with what the path says.
    fn named(&self, line: &str, schema: &Schema) -> Result<String, String> {
        // Values stay text: a parsed number may lose digits.
        let object: BTreeMap<String, Box<RawValue>> =
            serde_json::from_str(line).map_err(|e| format!("is no object: {e}"))?;
        let mut told = BTreeMap::new();
        for (name, value) in object {
            let Some(at) = find_column(schema, &name) else {
                return Err(format!("has {name:?}: no such column"));
            };
            if told.insert(schema.field(at).name().clone(), value).is_some() {
                return Err(format!("has {name:?} twice"));
            }
        }
        for (field, value) in &self.constants {
            if let (false, Some(text)) = (told.contains_key(field.name()), text_of_constant(value))
            {
                let text = serde_json::value::to_raw_value(&text).map_err(|e| e.to_string())?;
                told.insert(field.name().clone(), text);
            }
        }
        serde_json::to_string(&told).map_err(|e| e.to_string())
    }
}

fn text_of_constant(value: &ArrayRef) -> Option<String> {
    let texts = cast(value, &DataType::Utf8).ok()?;
    let texts = texts.as_string::<i32>();
    texts.is_valid(0).then(|| texts.value(0).to_owned())
}

fn without_binary(columns: &SchemaRef) -> SchemaRef {
    let plain = |field: &Arc<Field>| match field.data_type() {
        DataType::Binary => Field::new(field.name(), DataType::Utf8, true),
        _ => field.as_ref().clone(),
    };
    Arc::new(Schema::new(columns.fields().iter().map(plain).collect::<Vec<_>>()))
}

fn with_constants(piece: Piece, constants: &[(Field, ArrayRef)]) -> Result<Piece> {
    let rows = piece.rows.num_rows();
    let mut fields: Vec<Field> =
        piece.rows.schema_ref().fields().iter().map(|field| field.as_ref().clone()).collect();
    let mut columns = piece.rows.columns().to_vec();
    for (field, value) in constants {
        let same = alluvium_table::arrow::array::UInt32Array::from(vec![0; rows]);
        let column = alluvium_table::arrow::compute::take(value, &same, None);
        fields.push(field.clone());
        columns.push(column.map_err(Error::internal)?);
    }
    let rows = batch_of(fields, columns, rows)?;
    Ok(Piece { rows, ..piece })
}

/// A batch, also without columns.
fn batch_of(fields: Vec<Field>, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch> {
    let options =
        alluvium_table::arrow::array::RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
        .map_err(Error::internal)
}

/// Each column of text has one type in all files of the epoch, whatever their order. Of a key `1.1` and `1.10` are two
/// values, which only text tells apart.
fn agree_on_types(files: &mut [SourceFile], key: &[String]) {
    let mut kinds: BTreeMap<String, text::Kinds> = BTreeMap::new();
    for file in files.iter() {
        let Body::Text(file) = &file.body else { continue };
        for (name, kind) in file.kinds() {
            match kinds.get_mut(&name.to_lowercase()) {
                Some(known) => known.merge(kind),
                None => drop(kinds.insert(name.to_lowercase(), kind.clone())),
            }
        }
    }
    for file in files {
        let Body::Text(text) = &file.body else { continue };
        let fields: Vec<Field> = text
            .kinds()
            .iter()
            .map(|(name, _)| {
                let kind = match kinds.get(&name.to_lowercase()) {
                    Some(text::Kinds::Csv(seen)) if key.iter().any(|key| same_name(key, name)) => {
                        seen.kind_of_key()
                    }
                    Some(kind) => kind.kind(),
                    None => DataType::Utf8,
                };
                Field::new(name, kind, true)
            })
            .collect();
        file.schema = Arc::new(Schema::new(fields));
    }
}
