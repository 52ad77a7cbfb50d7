//! Footers of data files, kept by this process: a data file never changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use alluvium_protocol::Result;
use deltalake::parquet::errors::ParquetError;
use deltalake::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use object_store::ObjectStoreExt;

use crate::Table;
use crate::classify::foreign;
use crate::files::path_of;

/// A footer is mostly no longer than this.
const FOOTER_BYTES: u64 = 64 * 1024;
/// Footers are kept up to so many bytes.
const KEPT_BYTES_MAX: usize = 32 << 20;

#[derive(Default)]
struct Kept {
    by_file: HashMap<(String, String), Arc<ParquetMetaData>>,
    bytes: usize,
}

static KEPT: OnceLock<Mutex<Kept>> = OnceLock::new();

impl Table {
    /// The footer of a data file of `size` bytes.
    pub(crate) async fn footer(&self, path: &str, size: u64) -> Result<Arc<ParquetMetaData>> {
        let name = (self.uri.clone(), path.to_owned());
        let kept = KEPT.get_or_init(Mutex::default);
        let known = kept.lock().unwrap_or_else(PoisonError::into_inner).by_file.get(&name).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let read = Arc::new(self.read_footer(path, size).await?);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes > KEPT_BYTES_MAX {
            *kept = Kept::default();
        }
        kept.bytes += read.memory_size();
        kept.by_file.insert(name, Arc::clone(&read));
        Ok(read)
    }

    /// The same from storage, whatever was read before.
    pub(crate) async fn read_footer(&self, path: &str, size: u64) -> Result<ParquetMetaData> {
        let doing = || format!("read {path} of {}", self.uri);
        let at = path_of(path);
        let mut wanted = FOOTER_BYTES;
        loop {
            let range = size.saturating_sub(wanted)..size;
            let tail =
                self.store().get_range(&at, range).await.map_err(|e| foreign(doing(), &e))?;
            let mut reader = ParquetMetaDataReader::new();
            match reader.try_parse_sized(&tail, size) {
                Ok(()) => return reader.finish().map_err(|e| foreign(doing(), &e)),
                Err(ParquetError::NeedMoreData(more)) if wanted < size => wanted = more as u64,
                Err(error) => return Err(foreign(doing(), &error)),
            }
        }
    }
}
