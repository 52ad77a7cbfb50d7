//! An epoch's data files, read exactly as the manifest pinned them.
//!
//! Every request demands the pinned entity tag: a file that changed since is an error, not data.

use std::ops::Range;
use std::sync::Arc;

use alluvium_protocol::manifest::{Manifest, Object};
use alluvium_protocol::{Code, Error, Result, part_of_task};
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::classify::foreign;
use alluvium_table::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use alluvium_table::parquet::arrow::async_reader::{
    AsyncFileReader, ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder,
};
use alluvium_table::parquet::errors::{ParquetError, Result as ParquetResult};
use alluvium_table::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use alluvium_table::store::{StoreRef, object_store_at};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::{StreamExt, TryStreamExt};
use object_store::{
    GetOptions, GetRange, OBJECT_STORE_COALESCE_DEFAULT, ObjectStore, coalesce_ranges, path::Path,
};
use tokio::sync::OnceCell;
use tracing::Instrument;

/// Rows decoded at a time.
const BATCH_ROWS: usize = 8192;
/// Files opened at a time.
const OPEN_AT_ONCE: usize = 8;
/// A footer is fetched with so much of the file's end: mostly all of it, in one request.
const FOOTER_BYTES: usize = 64 * 1024;
/// Files of an epoch that is smaller than this are fetched whole, once.
const WHOLE_BYTES_MAX: u64 = 16 << 20;

/// One data file with its footer read.
#[derive(Clone)]
pub struct SourceFile {
    /// Path within the folder: raw's `_file`.
    pub name: String,
    /// Columns as the file has them.
    pub schema: SchemaRef,
    /// Rows, by the footer.
    pub rows: u64,
    metadata: ArrowReaderMetadata,
    reader: PinnedReader,
}

impl SourceFile {
    /// Opens every file of the manifest and reads its footer.
    pub async fn open_all(source: &str, manifest: &Manifest) -> Result<Vec<Self>> {
        let store = object_store_at(source)?;
        let bytes: u64 = manifest.objects.iter().map(|object| object.size).sum();
        let folder = &manifest.folder;
        let is_small = bytes <= WHOLE_BYTES_MAX;
        let mut opening = Vec::with_capacity(manifest.objects.len());
        for object in &manifest.objects {
            opening.push(Self::open(&store, folder, object, is_small).boxed());
        }
        let span = part_of_task!(
            "source.open",
            files = manifest.objects.len() as i64,
            bytes = bytes as i64
        );
        let opened = futures::stream::iter(opening).buffered(OPEN_AT_ONCE).try_collect();
        opened.instrument(span).await
    }

    async fn open(store: &StoreRef, folder: &str, object: &Object, is_small: bool) -> Result<Self> {
        let path = Path::parse(format!("{folder}/{}", object.name))
            .map_err(|e| Error::new(Code::FileUnreadable, format!("{}: {e}", object.name)))?;
        let mut reader = PinnedReader {
            store: Arc::clone(store),
            path,
            size: object.size,
            etag: object.etag.clone(),
            whole: is_small.then(Arc::default),
        };
        let name = object.name.clone();
        let options = ArrowReaderOptions::new();
        let metadata = ArrowReaderMetadata::load_async(&mut reader, options)
            .await
            .map_err(|e| read_error(folder, &name, &e))?;
        let rows = u64::try_from(metadata.metadata().file_metadata().num_rows()).unwrap_or(0);
        Ok(Self { name, schema: Arc::clone(metadata.schema()), rows, metadata, reader })
    }

    /// The file's rows from the start, in order.
    pub fn rows(&self) -> ParquetResult<ParquetRecordBatchStream<PinnedReader>> {
        ParquetRecordBatchStreamBuilder::new_with_metadata(
            self.reader.clone(),
            self.metadata.clone(),
        )
        .with_batch_size(BATCH_ROWS)
        .build()
    }
}

/// The error of reading one file, in words that name it.
pub fn read_error(folder: &str, name: &str, error: &ParquetError) -> Error {
    if is_precondition(error) {
        let text = format!("{folder}/{name} is not the file that was listed: it changed since");
        return Error::new(Code::FolderChanged, text);
    }
    let mut error = foreign(format!("read {folder}/{name}"), error);
    if error.code == Code::FileUnreadable {
        error = error.with_help(
            "deliver the file again whole, as Parquet; the changed folder is picked up by itself",
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
pub struct PinnedReader {
    store: StoreRef,
    path: Path,
    size: u64,
    etag: Option<String>,
    /// The whole file, once fetched, where the epoch is small.
    whole: Option<Arc<OnceCell<Bytes>>>,
}

impl PinnedReader {
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
