//! Rows of many files as new files in one order: what optimize writes. Each file is read once, and as many
//! are read or written at a time as there are processors.

use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::RecordBatch;
use alluvium_table::arrow::datatypes::{DataType, Field, Schema};
use alluvium_table::rows::Pick;
use alluvium_table::write::{FileWriter, Written};
use alluvium_table::{LiveFile, Table};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::Permit;
use crate::curve::Curve;
use crate::sorter::{Keys, Plan, Runs, Sorter};

/// A writer ends a file when it is so many times as large as foreseen.
const LARGER_THAN_FORESEEN: u64 = 2;

/// A row's place on a curve, beside the table's columns until the row is written.
const PLACE: &str = "_alluvium_place";

/// How rows of a table are to be written anew.
pub(crate) struct Compaction {
    table: Table,
    /// `None`: rows stay in the order of their files.
    plan: Option<Plan>,
    curve: Option<Curve>,
    target_file_bytes: u64,
    permit: Permit,
}

impl Compaction {
    /// Rows of `table` by their places on the curve, if there is one, and then by the columns of `order`, if
    /// there are any.
    pub(crate) fn new(
        table: &Table,
        (curve, order): (Option<Curve>, &[String]),
        memory_bytes: usize,
        target_file_bytes: u64,
        permit: &Permit,
    ) -> Result<Arc<Self>> {
        let (mut fields, mut by) = (table.schema().fields().to_vec(), Vec::new());
        if curve.is_some() {
            fields.push(Arc::new(Field::new(PLACE, DataType::Binary, true)));
            by.push(PLACE.to_owned());
        }
        by.extend_from_slice(order);
        let plan = match by.as_slice() {
            [] => None,
            by => {
                let schema = Arc::new(Schema::new(fields));
                Some(Plan::for_several(&schema, by, memory_bytes, processors())?)
            }
        };
        let (table, permit) = (table.clone(), permit.clone());
        Ok(Arc::new(Self { table, plan, curve, target_file_bytes, permit }))
    }

    fn with_place(&self, batch: RecordBatch) -> Result<RecordBatch> {
        let Some(curve) = &self.curve else { return Ok(batch) };
        let (mut fields, mut columns) =
            (batch.schema().fields().to_vec(), batch.columns().to_vec());
        fields.push(Arc::new(Field::new(PLACE, DataType::Binary, true)));
        columns.push(curve.places(&batch)?);
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(Error::internal)
    }

    /// Writes the live rows of `files`, which are of one partition.
    pub(crate) async fn write(self: &Arc<Self>, files: &[LiveFile]) -> Result<Written> {
        let rows = Amount::rows(files.iter().filter_map(LiveFile::live_rows).sum());
        self.permit.begin("reads rows of worn files", rows);
        let Some(plan) = &self.plan else { return self.write_in_turn(files).await };
        let runs = Arc::new(self.runs(plan, files).await?);
        self.permit.begin("writes them in order", rows);
        let new_files = new_files(files, self.target_file_bytes);
        let ranges = runs.ranges(new_files);
        let of_each = ranges.len().div_ceil(new_files).max(1);
        let mut writing = Vec::with_capacity(new_files);
        for ranges in ranges.chunks(of_each) {
            let (this, runs, ranges) = (Arc::clone(self), Arc::clone(&runs), ranges.to_vec());
            writing.push(in_a_task(async move { this.write_ranges(runs, ranges).await }));
        }
        let writing = futures::stream::iter(writing).buffered(processors());
        let all = writing.try_fold(Written::default(), |mut all, of_one| async move {
            all.adds.extend(of_one.adds);
            all.rows += of_one.rows;
            Ok(all)
        });
        all.await
    }

    /// One file's rows after the other's.
    async fn write_in_turn(self: &Arc<Self>, files: &[LiveFile]) -> Result<Written> {
        let this = Arc::clone(self);
        let rows = futures::stream::iter(files.to_vec()).map(Ok).and_then(move |file| {
            let this = Arc::clone(&this);
            async move { this.rows_of(&file).await }
        });
        let writer = FileWriter::new(&self.table, self.target_file_bytes)?;
        writer.write_rows(rows.try_flatten().boxed()).await
    }

    async fn rows_of(&self, file: &LiveFile) -> Result<BoxStream<'static, Result<RecordBatch>>> {
        let deleted = self.table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
        let rows = self.table.rows_of(file, &self.table.schema(), Pick::Without(deleted)).await?;
        let permit = self.permit.clone();
        Ok(rows.map(move |batch| permit.counted(batch)).boxed())
    }

    async fn runs(self: &Arc<Self>, plan: &Plan, files: &[LiveFile]) -> Result<Runs> {
        let mut reading = Vec::with_capacity(files.len());
        for file in files {
            let (this, plan, file) = (Arc::clone(self), plan.clone(), file.clone());
            reading.push(in_a_task(async move {
                let (mut sorter, mut rows) = (Sorter::new(&plan)?, this.rows_of(&file).await?);
                while let Some(batch) = rows.try_next().await? {
                    sorter.push(this.with_place(batch)?)?;
                }
                sorter.finish()
            }));
        }
        let reading = futures::stream::iter(reading).buffered(processors());
        let none = Sorter::new(plan)?.finish()?;
        let all = reading.try_fold(none, |mut all, of_one| async move {
            all.extend(of_one)?;
            Ok(all)
        });
        all.await
    }

    /// New files of the rows in ranges that follow one another.
    async fn write_ranges(self: Arc<Self>, runs: Arc<Runs>, ranges: Vec<Keys>) -> Result<Written> {
        let most = self.target_file_bytes.saturating_mul(LARGER_THAN_FORESEEN);
        let writer = FileWriter::new(&self.table, most)?;
        let permit = self.permit.clone();
        let rows = ranges
            .into_iter()
            .flat_map(move |range| runs.rows_in(&range))
            .map(move |batch| permit.counted(batch));
        writer.write_rows(futures::stream::iter(rows)).await
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Begun when it is first asked for, on whichever processor is free.
async fn in_a_task<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    // What is no longer waited for ends, too.
    let task = AbortOnDropHandle::new(tokio::spawn(work.in_current_span()));
    task.await.map_err(Error::internal)?
}

/// How many files the live rows of these make.
fn new_files(files: &[LiveFile], target_file_bytes: u64) -> usize {
    let live = |file: &LiveFile| match (file.rows, file.live_rows()) {
        (Some(rows), Some(live)) if rows > 0 => {
            let share = u128::from(file.size) * u128::from(live) / u128::from(rows);
            u64::try_from(share).unwrap_or(file.size)
        }
        _ => file.size,
    };
    let bytes: u64 = files.iter().map(live).sum();
    usize::try_from(bytes.div_ceil(target_file_bytes.max(1))).unwrap_or(1).max(1)
}
