//! Parquet files: footers first, then columns by ranged reads.

use std::ops::Range;
use std::sync::Arc;

use alluvium_protocol::manifest::Object;
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::arrow::array::Int64Array;
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::classify::foreign;
use alluvium_table::keys::for_arrow_but;
use alluvium_table::parquet::arrow::ProjectionMask;
use alluvium_table::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use alluvium_table::parquet::arrow::async_reader::{
    AsyncFileReader, ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder,
};
use alluvium_table::parquet::errors::{ParquetError, Result as ParquetResult};
use alluvium_table::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use alluvium_table::store::StoreRef;
use alluvium_table::width::rows_of_a_batch;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    GetOptions, GetRange, OBJECT_STORE_COALESCE_DEFAULT, ObjectStore, coalesce_ranges, path::Path,
};
use tokio::sync::OnceCell;

use super::Piece;

/// A footer is fetched with so much of the file's end: mostly all of it, in one request.
const FOOTER_BYTES: usize = 64 * 1024;

fn is_of_spark(metadata: &ParquetMetaData) -> bool {
    let pairs = metadata.file_metadata().key_value_metadata();
    pairs.is_some_and(|pairs| pairs.iter().any(|pair| pair.key.starts_with("org.apache.spark.")))
}

/// One data file with its footer read.
#[derive(Clone)]
pub(super) struct ParquetFile {
    /// Path within the folder.
    pub(super) name: String,
    metadata: ArrowReaderMetadata,
    reader: PinnedReader,
}

impl ParquetFile {
    /// Reads the footer. Times in the columns `exact` decide between rows: what is finer than microseconds is kept.
    pub(super) async fn open(
        store: &StoreRef,
        folder: &str,
        object: &Object,
        is_small: bool,
        exact: &[String],
    ) -> Result<Self> {
        let mut reader = PinnedReader::new(store, folder, object, is_small)?;
        let name = object.name.clone();
        let options = ArrowReaderOptions::new();
        let metadata = ArrowReaderMetadata::load_async(&mut reader, options)
            .await
            .and_then(|read| {
                // Spark has no more than microseconds to write.
                let whole = if is_of_spark(read.metadata()) { &[] } else { exact };
                for_arrow_but(Arc::clone(read.metadata()), whole)
            })
            .map_err(|e| read_error(folder, &name, &e))?;
        Ok(Self { name, metadata, reader })
    }

    /// Columns as the file has them.
    pub(super) fn schema(&self) -> &SchemaRef {
        self.metadata.schema()
    }

    /// Rows, by the footer.
    pub(super) fn rows(&self) -> u64 {
        u64::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or(0)
    }

    /// What reading it holds in memory: its largest row group, as it is stored.
    pub(super) fn held_bytes(&self) -> u64 {
        let groups = self.metadata.metadata().row_groups().iter();
        let bytes = groups.map(|group| u64::try_from(group.compressed_size()).unwrap_or(0));
        bytes.max().unwrap_or(0)
    }

    fn batches(&self) -> ParquetResult<ParquetRecordBatchStream<PinnedReader>> {
        let all = ProjectionMask::all();
        let batch_rows = rows_of_a_batch(self.metadata.metadata(), &all);
        ParquetRecordBatchStreamBuilder::new_with_metadata(
            self.reader.clone(),
            self.metadata.clone(),
        )
        .with_batch_size(batch_rows)
        .build()
    }

    /// Decodes every row: Err when one cannot be.
    pub(super) async fn read_through(&self, folder: &str, name: &str) -> Result<()> {
        let failed = |e: &ParquetError| read_error(folder, name, e);
        let mut batches = self.batches().map_err(|e| failed(&e))?;
        while batches.try_next().await.map_err(|e| failed(&e))?.is_some() {}
        Ok(())
    }

    /// The file's rows from the start, in order.
    pub(super) fn pieces(&self, folder: &str) -> BoxStream<'static, Result<Piece>> {
        let (folder, name) = (folder.to_owned(), self.name.clone());
        match self.batches() {
            Ok(batches) => {
                let scan = batches.scan(0, move |next, batch| {
                    let piece = match batch {
                        Ok(rows) => {
                            let first: i64 = *next;
                            *next += rows.num_rows() as i64;
                            let places = Int64Array::from_iter_values(first..*next);
                            Ok(Piece {
                                rows,
                                places,
                                lines: None,
                                misfits: Vec::new(),
                                are_corrections: false,
                            })
                        }
                        Err(error) => Err(read_error(&folder, &name, &error)),
                    };
                    futures::future::ready(Some(piece))
                });
                scan.boxed()
            }
            Err(error) => {
                let error = read_error(&folder, &name, &error);
                futures::stream::once(async move { Err(error) }).boxed()
            }
        }
    }
}

/// The error of reading one file, in words that name it.
pub(super) fn read_error(folder: &str, name: &str, error: &ParquetError) -> Error {
    if is_precondition(error) {
        let text = format!("{folder}/{name} is not the file that was listed: it changed since");
        return Error::new(Code::FolderChanged, text);
    }
    let mut error = foreign(format!("read {folder}/{name}"), error);
    if error.code == Code::FileUnreadable {
        error = error.with_help(
            "deliver the file again whole, as Parquet (or set `format`); the changed folder is picked up by itself",
        );
    }
    error
}

fn is_precondition(error: &ParquetError) -> bool {
    let ParquetError::External(source) = error else { return false };
    source.downcast_ref::<object_store::Error>().is_some_and(|error| {
        matches!(
            error,
            object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }
        )
    })
}

/// Reads ranges of one object, always on condition of its pinned entity tag.
#[derive(Clone)]
pub(super) struct PinnedReader {
    store: StoreRef,
    path: Path,
    size: u64,
    etag: Option<String>,
    /// The whole file, once fetched, where the epoch is small.
    whole: Option<Arc<OnceCell<Bytes>>>,
}

impl PinnedReader {
    /// A reader of one object of the manifest.
    pub(super) fn new(
        store: &StoreRef,
        folder: &str,
        object: &Object,
        is_small: bool,
    ) -> Result<Self> {
        let path = Path::parse(format!("{folder}/{}", object.name))
            .map_err(|e| Error::new(Code::FileUnreadable, format!("{}: {e}", object.name)))?;
        Ok(Self {
            store: Arc::clone(store),
            path,
            size: object.size,
            etag: object.etag.clone(),
            whole: is_small.then(Arc::default),
        })
    }

    /// Reads the object from its start to its end.
    pub(super) async fn whole(
        &self,
    ) -> ParquetResult<BoxStream<'static, object_store::Result<Bytes>>> {
        let options = GetOptions { if_match: self.etag.clone(), ..GetOptions::default() };
        let external = |error| ParquetError::External(Box::new(error));
        let found = self.store.get_opts(&self.path, options).await.map_err(external)?;
        Ok(found.into_stream())
    }

    async fn get(&self, range: Range<u64>) -> ParquetResult<Bytes> {
        let Some(whole) = &self.whole else { return self.fetch(range).await };
        let body = whole.get_or_try_init(|| self.fetch(0..self.size)).await?;
        let (start, end) = (usize::try_from(range.start)?, usize::try_from(range.end)?);
        match start <= end && end <= body.len() {
            true => Ok(body.slice(start..end)),
            false => Err(ParquetError::EOF(format!("{start}..{end} of {} bytes", body.len()))),
        }
    }

    async fn fetch(&self, range: Range<u64>) -> ParquetResult<Bytes> {
        let options = GetOptions {
            if_match: self.etag.clone(),
            range: Some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        let external = |error| ParquetError::External(Box::new(error));
        let found = self.store.get_opts(&self.path, options).await.map_err(external)?;
        if found.meta.size != self.size {
            let text = format!("{} bytes, listed with {}", found.meta.size, self.size);
            let error = object_store::Error::Precondition {
                path: self.path.to_string(),
                source: text.into(),
            };
            return Err(external(error));
        }
        found.bytes().await.map_err(external)
    }
}

impl AsyncFileReader for PinnedReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        self.get(range).boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, ParquetResult<Vec<Bytes>>> {
        // Columns lie side by side: near ranges are one request, far ones go out together.
        async move {
            let fetch = |range| self.get(range);
            coalesce_ranges(&ranges, fetch, OBJECT_STORE_COALESCE_DEFAULT).await
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        async move {
            let size = self.size;
            let metadata = ParquetMetaDataReader::new()
                .with_prefetch_hint(Some(FOOTER_BYTES))
                .load_and_finish(self, size)
                .await?;
            Ok(Arc::new(metadata))
        }
        .boxed()
    }
}
