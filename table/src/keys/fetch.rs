//! Parts of a Parquet file in memory, read as if it were all there.

use bytes::Bytes;
use bytes::buf::{Buf, Reader};
use deltalake::parquet::errors::{ParquetError, Result};
use deltalake::parquet::file::reader::{ChunkReader, Length};

/// Byte ranges of a file; cheap to clone.
#[derive(Clone)]
pub(super) struct Parts {
    /// The file's length.
    pub(super) length: u64,
    /// Where each part begins, and the part.
    pub(super) parts: Vec<(u64, Bytes)>,
}

impl Parts {
    fn from(&self, start: u64) -> Result<Bytes> {
        let part = self.parts.iter().find_map(|(from, bytes)| {
            let offset = usize::try_from(start.checked_sub(*from)?).ok()?;
            (offset < bytes.len()).then(|| bytes.slice(offset..))
        });
        part.ok_or_else(|| ParquetError::General(format!("byte {start} was not fetched")))
    }
}

impl Length for Parts {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Parts {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let bytes = self.from(start)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} were not fetched")));
        }
        Ok(bytes.slice(..length))
    }
}
