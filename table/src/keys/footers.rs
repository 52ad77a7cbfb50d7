//! Footers of data files, kept by this process: a data file never changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use alluvium_protocol::Result;
use alluvium_protocol::pipeline::same_name;
use deltalake::arrow::datatypes::{DataType, FieldRef, Schema, TimeUnit};
use deltalake::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use deltalake::parquet::basic::Type;
use deltalake::parquet::errors::ParquetError;
use deltalake::parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};
use deltalake::parquet::schema::types::ColumnDescPtr;
use object_store::ObjectStoreExt;

use crate::Table;
use crate::classify::of_file;
use crate::files::path_of;

/// What arrow's reader needs of a footer. Times of 96 bits, as Spark writes them, are read as microseconds:
/// as nanoseconds, as arrow has it, years beyond 2262 would become others without a word.
pub(crate) fn for_arrow(footer: Arc<ParquetMetaData>) -> Result<ArrowReaderMetadata, ParquetError> {
    for_arrow_but(footer, &[])
}

/// The same, but for the times of these columns: what they have finer than microseconds is to be seen.
pub fn for_arrow_but(
    footer: Arc<ParquetMetaData>,
    whole: &[String],
) -> Result<ArrowReaderMetadata, ParquetError> {
    let read = ArrowReaderMetadata::try_new(Arc::clone(&footer), ArrowReaderOptions::new())?;
    let columns = footer.file_metadata().schema_descr().columns();
    if columns.iter().all(|column| column.physical_type() != Type::INT96) {
        return Ok(read);
    }
    let mut leaves = columns.iter();
    let fields = read.schema().fields().iter().map(|field| {
        let made = in_micros(field, &mut leaves);
        let is_whole = whole.iter().any(|name| same_name(name, field.name()));
        if is_whole { Arc::clone(field) } else { made }
    });
    let fields: Vec<FieldRef> = fields.collect();
    let options = ArrowReaderOptions::new().with_schema(Arc::new(Schema::new(fields)));
    ArrowReaderMetadata::try_new(footer, options)
}

/// The field with times of 96 bits in microseconds, at whatever depth; `leaves` are the file's next columns.
fn in_micros<'a>(
    field: &FieldRef,
    leaves: &mut impl Iterator<Item = &'a ColumnDescPtr>,
) -> FieldRef {
    let kind = match field.data_type() {
        DataType::Struct(fields) => {
            DataType::Struct(fields.iter().map(|field| in_micros(field, leaves)).collect())
        }
        DataType::List(item) => DataType::List(in_micros(item, leaves)),
        DataType::LargeList(item) => DataType::LargeList(in_micros(item, leaves)),
        DataType::ListView(item) => DataType::ListView(in_micros(item, leaves)),
        DataType::LargeListView(item) => DataType::LargeListView(in_micros(item, leaves)),
        DataType::FixedSizeList(item, size) => {
            DataType::FixedSizeList(in_micros(item, leaves), *size)
        }
        DataType::Map(entries, sorted) => DataType::Map(in_micros(entries, leaves), *sorted),
        kind => {
            let is_wide = leaves.next().is_some_and(|leaf| leaf.physical_type() == Type::INT96);
            match kind {
                DataType::Timestamp(TimeUnit::Nanosecond, zone) if is_wide => {
                    DataType::Timestamp(TimeUnit::Microsecond, zone.clone())
                }
                kind => kind.clone(),
            }
        }
    };
    Arc::new(field.as_ref().clone().with_data_type(kind))
}

/// A footer is mostly no longer than this.
const FOOTER_BYTES: u64 = 64 * 1024;
/// Footers are kept up to so many bytes.
const KEPT_BYTES_MAX: usize = 32 << 20;

#[derive(Default)]
struct Kept {
    by_file: HashMap<(String, String, u64), Arc<ParquetMetaData>>,
    bytes: usize,
}

static KEPT: OnceLock<Mutex<Kept>> = OnceLock::new();

impl Table {
    /// The footer of a data file of `size` bytes.
    pub(crate) async fn footer(&self, path: &str, size: u64) -> Result<Arc<ParquetMetaData>> {
        self.known_footer(path, size, PageIndexPolicy::Skip).await
    }

    /// The same, with the smallest and largest values of pages where the file tells them.
    pub(crate) async fn footer_with_pages(
        &self,
        path: &str,
        size: u64,
    ) -> Result<Arc<ParquetMetaData>> {
        self.known_footer(path, size, PageIndexPolicy::Optional).await
    }

    async fn known_footer(
        &self,
        path: &str,
        size: u64,
        values: PageIndexPolicy,
    ) -> Result<Arc<ParquetMetaData>> {
        let name = (self.uri.clone(), path.to_owned(), size);
        let kept = KEPT.get_or_init(Mutex::default);
        let known = kept.lock().unwrap_or_else(PoisonError::into_inner).by_file.get(&name).cloned();
        let is_enough = |known: &Arc<ParquetMetaData>| {
            values == PageIndexPolicy::Skip || known.column_index().is_some()
        };
        if let Some(known) = known.filter(is_enough) {
            return Ok(known);
        }
        let read = Arc::new(self.read_footer_with(path, size, values).await?);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes > KEPT_BYTES_MAX {
            *kept = Kept::default();
        }
        kept.bytes += read.memory_size();
        if let Some(before) = kept.by_file.insert(name, Arc::clone(&read)) {
            kept.bytes -= before.memory_size();
        }
        Ok(read)
    }

    /// The same from storage, whatever was read before.
    pub(crate) async fn read_footer(&self, path: &str, size: u64) -> Result<ParquetMetaData> {
        self.read_footer_with(path, size, PageIndexPolicy::Skip).await
    }

    async fn read_footer_with(
        &self,
        path: &str,
        size: u64,
        mut values: PageIndexPolicy,
    ) -> Result<ParquetMetaData> {
        let doing = || format!("read {path} of {}", self.uri);
        let at = path_of(path);
        // Where pages begin: some rows of a file in a store are then read without the others.
        let (mut wanted, mut pages) = (FOOTER_BYTES, PageIndexPolicy::Optional);
        loop {
            let range = size.saturating_sub(wanted)..size;
            let tail =
                self.store().get_range(&at, range).await.map_err(|e| of_file(doing(), &e))?;
            let mut reader = ParquetMetaDataReader::new()
                .with_offset_index_policy(pages)
                .with_column_index_policy(values);
            match reader.try_parse_sized(&tail, size) {
                Ok(()) => return reader.finish().map_err(|e| of_file(doing(), &e)),
                // A footer that lies may ask for the same again and again.
                Err(ParquetError::NeedMoreData(more)) if more as u64 > wanted && wanted < size => {
                    wanted = more as u64;
                }
                // Pages can be found without it, too.
                Err(_) if pages == PageIndexPolicy::Optional => {
                    (pages, values) = (PageIndexPolicy::Skip, PageIndexPolicy::Skip);
                }
                Err(error) => return Err(of_file(doing(), &error)),
            }
        }
    }
}
