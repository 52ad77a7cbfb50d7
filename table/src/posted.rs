//! Rows as an object in a store: how processes hand each other rows that are in no table.

use std::fs::File;
use std::io::{BufReader, Seek, Write};

use alluvium_protocol::Result;
use deltalake::arrow::ipc::reader::StreamReader;
use deltalake::arrow::ipc::writer::StreamWriter;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, WriteMultipart};

use crate::classify::foreign;
use crate::spool::{Spool, Spooled};
use crate::store::StoreRef;

/// Parts on their way at a time, of 5 MiB each.
const PARTS_AT_ONCE: usize = 4;

/// Writes all rows to an object, as an Arrow IPC stream, in bounded memory.
///
/// # Errors
/// Those of the storage.
pub async fn post(rows: &Spooled, store: &StoreRef, path: &Path) -> Result<()> {
    let doing = || format!("write rows to {path}");
    let upload = store.put_multipart(path).await.map_err(|e| foreign(doing(), &e))?;
    let mut upload = WriteMultipart::new(upload);
    let mut encoder =
        StreamWriter::try_new(Vec::new(), rows.schema()).map_err(|e| foreign(doing(), &e))?;
    for batch in rows.batches()? {
        encoder.write(&batch?).map_err(|e| foreign(doing(), &e))?;
        upload.wait_for_capacity(PARTS_AT_ONCE).await.map_err(|e| foreign(doing(), &e))?;
        upload.write(encoder.get_ref());
        encoder.get_mut().clear();
    }
    encoder.finish().map_err(|e| foreign(doing(), &e))?;
    upload.write(encoder.get_ref());
    upload.finish().await.map(drop).map_err(|e| foreign(doing(), &e))
}

/// Adds the rows of such an object.
///
/// # Errors
/// Those of the storage and of this machine's disk; the object is not one that [`post`] wrote.
pub async fn collect(store: &StoreRef, path: &Path, rows: &mut Spool) -> Result<()> {
    let doing = || format!("read rows of {path}");
    let found = store.get(path).await.map_err(|e| foreign(doing(), &e))?;
    let mut file: File = tempfile::tempfile().map_err(|e| foreign(doing(), &e))?;
    let mut bytes = found.into_stream();
    while let Some(bytes) = bytes.try_next().await.map_err(|e| foreign(doing(), &e))? {
        file.write_all(&bytes).map_err(|e| foreign(doing(), &e))?;
    }
    file.rewind().map_err(|e| foreign(doing(), &e))?;
    let batches =
        StreamReader::try_new(BufReader::new(file), None).map_err(|e| foreign(doing(), &e))?;
    for batch in batches {
        rows.push(batch.map_err(|e| foreign(doing(), &e))?)?;
    }
    Ok(())
}
