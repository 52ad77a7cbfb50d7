//! A spool: rows that are read more than once, in memory while they are few, on disk beyond.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use alluvium_protocol::Result;
use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::datatypes::SchemaRef;
use deltalake::arrow::ipc::reader::FileReader;
use deltalake::arrow::ipc::writer::FileWriter;
use deltalake::datafusion::catalog::TableProvider;
use deltalake::datafusion::catalog::streaming::StreamingTable;
use deltalake::datafusion::datasource::MemTable;
use deltalake::datafusion::error::DataFusionError;
use deltalake::datafusion::execution::context::SessionContext;
use deltalake::datafusion::execution::{SendableRecordBatchStream, TaskContext};
use deltalake::datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use deltalake::datafusion::physical_plan::streaming::PartitionStream;
use futures::StreamExt;

use crate::classify::foreign;

/// Rows in memory take at most this many bytes, where nobody says otherwise.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Rows collected once and read as often as needed.
pub struct Spool {
    schema: SchemaRef,
    /// Beyond it all rows go to a file.
    memory_bytes: usize,
    rows: usize,
    bytes: usize,
    batches: Vec<RecordBatch>,
    file: Option<(File, FileWriter<BufWriter<File>>)>,
}

impl Spool {
    /// An empty spool for rows of `schema`.
    pub fn new(schema: SchemaRef) -> Self {
        Self::within(schema, MEMORY_BYTES_MAX)
    }

    /// An empty spool that keeps at most so many bytes in memory.
    pub fn within(schema: SchemaRef, memory_bytes: usize) -> Self {
        Self { schema, memory_bytes, rows: 0, bytes: 0, batches: Vec::new(), file: None }
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
        if self.bytes > self.memory_bytes {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        let doing = "spill rows to disk";
        // Without a name: when the process is killed, it is gone.
        let file = tempfile::tempfile().map_err(|e| foreign(doing, &e))?;
        let handle = file.try_clone().map_err(|e| foreign(doing, &e))?;
        let mut writer = FileWriter::try_new(BufWriter::new(handle), &self.schema)
            .map_err(|e| foreign(doing, &e))?;
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

    /// Ends the collecting: the rows can be read any number of times.
    pub fn finish(mut self) -> Result<Spooled> {
        let kept = match self.file.take() {
            None => Kept::Memory(self.batches),
            Some((file, mut writer)) => {
                writer.finish().map_err(|e| foreign("spill rows to disk", &e))?;
                Kept::Disk(Arc::new(file))
            }
        };
        Ok(Spooled { schema: self.schema, rows: self.rows, kept })
    }

    /// Registers the rows as table `name`, readable any number of times.
    pub fn register(self, session: &SessionContext, name: &str) -> Result<()> {
        Arc::new(self.finish()?).register(session, name)
    }
}

/// Rows that were collected. The file of those on disk lives as long as this.
#[derive(Debug)]
pub struct Spooled {
    schema: SchemaRef,
    rows: usize,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Memory(Vec<RecordBatch>),
    Disk(Arc<File>),
}

/// A file that several read at a time, each at its own position.
struct ReadAt {
    file: Arc<File>,
    position: u64,
}

impl Read for ReadAt {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for ReadAt {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        let before = || std::io::Error::new(std::io::ErrorKind::InvalidInput, "before the file");
        self.position = position.ok_or_else(before)?;
        Ok(self.position)
    }
}

/// Batches of one reading.
type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

impl Spooled {
    /// How many there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows' schema.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Registers the rows as table `name`.
    pub fn register(self: &Arc<Self>, session: &SessionContext, name: &str) -> Result<()> {
        let doing = "read spooled rows";
        let schema = Arc::clone(&self.schema);
        let table: Arc<dyn TableProvider> = match &self.kept {
            Kept::Memory(batches) => {
                let table = MemTable::try_new(schema, vec![batches.clone()]);
                Arc::new(table.map_err(|e| foreign(doing, &e))?)
            }
            Kept::Disk(_) => {
                let rows = Arc::clone(self) as Arc<dyn PartitionStream>;
                let table = StreamingTable::try_new(schema, vec![rows]);
                Arc::new(table.map_err(|e| foreign(doing, &e))?)
            }
        };
        session.register_table(name, table).map_err(|e| foreign(doing, &e))?;
        Ok(())
    }

    /// The rows in order.
    pub fn batches(&self) -> Result<Batches> {
        self.batches_from(0)
    }

    /// The rows in order, without so many batches in the beginning.
    pub fn batches_from(&self, first: usize) -> Result<Batches> {
        let doing = "read spooled rows";
        match &self.kept {
            Kept::Memory(batches) => {
                let batches = batches.get(first..).unwrap_or_default().to_vec();
                Ok(Box::new(batches.into_iter().map(Ok)))
            }
            Kept::Disk(file) => {
                let file = BufReader::new(ReadAt { file: Arc::clone(file), position: 0 });
                let reader = FileReader::try_new(file, None);
                let mut reader = reader.map_err(|e| foreign(doing, &e))?;
                if first >= reader.num_batches() {
                    return Ok(Box::new(std::iter::empty()));
                }
                reader.set_index(first).map_err(|e| foreign(doing, &e))?;
                Ok(Box::new(reader.map(move |batch| batch.map_err(|e| foreign(doing, &e)))))
            }
        }
    }
}

impl PartitionStream for Spooled {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let external = |error| DataFusionError::External(Box::new(error));
        let stream = match self.batches() {
            Ok(batches) => {
                futures::stream::iter(batches.map(move |batch| batch.map_err(external))).boxed()
            }
            Err(error) => futures::stream::once(async move { Err(external(error)) }).boxed(),
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), stream))
    }
}
