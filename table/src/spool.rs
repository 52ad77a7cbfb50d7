//! A spool: rows that are read more than once, in memory while they are few, on disk beyond.

use std::fs::File;
use std::sync::Arc;

use alluvium_protocol::Result;
use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::datatypes::SchemaRef;
use deltalake::arrow::ipc::reader::FileReader;
use deltalake::arrow::ipc::writer::FileWriter;
use deltalake::datafusion::catalog::streaming::StreamingTable;
use deltalake::datafusion::datasource::MemTable;
use deltalake::datafusion::execution::context::SessionContext;
use deltalake::datafusion::execution::{SendableRecordBatchStream, TaskContext};
use deltalake::datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use deltalake::datafusion::physical_plan::streaming::PartitionStream;
use futures::StreamExt;
use tempfile::NamedTempFile;

use crate::classify::foreign;

/// Rows in memory take at most this many bytes; then all go to a file.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Rows collected once and read as often as needed.
pub struct Spool {
    schema: SchemaRef,
    rows: usize,
    bytes: usize,
    batches: Vec<RecordBatch>,
    file: Option<(NamedTempFile, FileWriter<File>)>,
}

impl Spool {
    /// An empty spool for rows of `schema`.
    pub fn new(schema: SchemaRef) -> Self {
        Self { schema, rows: 0, bytes: 0, batches: Vec::new(), file: None }
    }

    /// Collects a whole stream.
    pub async fn collect(mut stream: SendableRecordBatchStream, doing: &str) -> Result<Self> {
        let mut spool = Self::new(stream.schema());
        while let Some(batch) = stream.next().await {
            spool.push(batch.map_err(|e| foreign(doing, &e))?)?;
        }
        Ok(spool)
    }

    /// Appends rows.
    pub fn push(&mut self, batch: RecordBatch) -> Result<()> {
        self.rows += batch.num_rows();
        self.bytes += batch.get_array_memory_size();
        if let Some((_, writer)) = &mut self.file {
            return writer.write(&batch).map_err(|e| foreign("spill rows to disk", &e));
        }
        self.batches.push(batch);
        if self.bytes > MEMORY_BYTES_MAX {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        let doing = "spill rows to disk";
        let file = NamedTempFile::new().map_err(|e| foreign(doing, &e))?;
        let handle = file.reopen().map_err(|e| foreign(doing, &e))?;
        let mut writer =
            FileWriter::try_new(handle, &self.schema).map_err(|e| foreign(doing, &e))?;
        for batch in self.batches.drain(..) {
            writer.write(&batch).map_err(|e| foreign(doing, &e))?;
        }
        self.file = Some((file, writer));
        Ok(())
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows' schema.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Registers the rows as table `name`, readable any number of times.
    pub fn register(mut self, session: &SessionContext, name: &str) -> Result<()> {
        let doing = "read spooled rows";
        let Some((file, mut writer)) = self.file.take() else {
            let table = MemTable::try_new(self.schema, vec![self.batches]);
            let table = table.map_err(|e| foreign(doing, &e))?;
            session.register_table(name, Arc::new(table)).map_err(|e| foreign(doing, &e))?;
            return Ok(());
        };
        writer.finish().map_err(|e| foreign("spill rows to disk", &e))?;
        let partition = SpilledRows { schema: Arc::clone(&self.schema), file };
        let table = StreamingTable::try_new(self.schema, vec![Arc::new(partition)]);
        let table = table.map_err(|e| foreign(doing, &e))?;
        session.register_table(name, Arc::new(table)).map_err(|e| foreign(doing, &e))?;
        Ok(())
    }

    /// The rows in order, for a single reading.
    pub fn into_batches(mut self) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>> + Send>> {
        let doing = "read spooled rows";
        match self.file.take() {
            None => Ok(Box::new(self.batches.into_iter().map(Ok))),
            Some((file, mut writer)) => {
                writer.finish().map_err(|e| foreign("spill rows to disk", &e))?;
                let handle = file.reopen().map_err(|e| foreign(doing, &e))?;
                let reader = FileReader::try_new(handle, None).map_err(|e| foreign(doing, &e))?;
                // The file lives as long as the iterator.
                Ok(Box::new(reader.map(move |batch| {
                    let _keep = &file;
                    batch.map_err(|e| foreign(doing, &e))
                })))
            }
        }
    }
}

#[derive(Debug)]
struct SpilledRows {
    schema: SchemaRef,
    file: NamedTempFile,
}

impl PartitionStream for SpilledRows {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let opened = self
            .file
            .reopen()
            .map_err(deltalake::arrow::error::ArrowError::from)
            .and_then(|file| FileReader::try_new(file, None));
        let stream = match opened {
            Ok(reader) => {
                futures::stream::iter(reader.map(|batch| batch.map_err(Into::into))).boxed()
            }
            Err(error) => futures::stream::once(async move { Err(error.into()) }).boxed(),
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream))
    }
}
