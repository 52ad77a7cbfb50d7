//! Revert rows: what takes keys back that an epoch's earlier content had and its new one has not.

use std::collections::BTreeSet;
use std::iter::repeat_n;
use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::{Epoch, Error, Pipeline, Result};
use alluvium_table::Table;
use alluvium_table::arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::rows::Pick;
use alluvium_table::session::quoted_list;
use alluvium_table::write::{FileWriter, Written};
use futures::TryStreamExt;

use crate::ground::columns_of;
use crate::ingest::{sorted, table_names};
use crate::ordered::{Cursor, Without, with_columns};
use crate::sorter::{Plan, Sorter};
use crate::{Permit, raw};

/// Writes a revert row for each key of the previous content that `accepted`, the new one, lacks, with these
/// columns besides.
pub(crate) async fn revert_rows(
    session: &SessionContext,
    pipeline: &Pipeline,
    table: &Table,
    (epoch, own): (Epoch, &[(&str, i64)]),
    permit: &Permit,
) -> Result<Written> {
    let key = table_names(table, &pipeline.content.key);
    let columns = columns_of(&table.schema(), &key)?;
    let memory = pipeline.sizes.memory_bytes;
    permit.begin("looks for rows that the folder had before", Amount::default());
    let mut previous = Sorter::new(&Plan::new(&columns, &key, memory)?)?;
    for file in raw::files_of(table, &BTreeSet::from([epoch])).await? {
        let deleted = table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
        let mut rows = table.rows_of(&file, &columns, Pick::Without(deleted)).await?;
        while let Some(batch) = rows.try_next().await? {
            permit.check()?;
            previous.push(batch)?;
        }
    }
    let list = quoted_list(key.iter().map(String::as_str));
    let sql = format!("SELECT {list} FROM accepted");
    let accepted = sorted(session, &sql, &key, pipeline, permit).await?;
    let cursor = |rows| Cursor::new(with_columns(rows, &columns, None), &columns, &key);
    let gone = Without::new(cursor(previous.finish()?.batches())?, cursor(accepted.batches())?);
    let own: Vec<(String, i64)> = own.iter().map(|(n, value)| ((*n).to_owned(), *value)).collect();
    let permit = permit.clone();
    let rows = gone.map(move |keys| permit.check().and(keys).and_then(|keys| reverts(&keys, &own)));
    let writer = FileWriter::of_runs(table, pipeline.sizes.target_file_bytes)?;
    writer.write_rows(futures::stream::iter(rows)).await
}

/// Rows that take these keys back.
fn reverts(keys: &RecordBatch, own: &[(String, i64)]) -> Result<RecordBatch> {
    let count = keys.num_rows();
    let text = |text| Arc::new(StringArray::from_iter_values(repeat_n(text, count))) as ArrayRef;
    let number = |value: i64| Arc::new(Int64Array::from_value(value, count)) as ArrayRef;
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    for (field, column) in keys.schema().fields().iter().zip(keys.columns()) {
        columns.push((field.name().clone(), Arc::clone(column)));
    }
    columns.push((raw::OP.to_owned(), text(raw::REVERT)));
    columns.push((raw::FILE.to_owned(), text("")));
    columns.push((raw::ROW.to_owned(), number(0)));
    columns.extend(own.iter().map(|(name, value)| (name.clone(), number(*value))));
    RecordBatch::try_from_iter(columns).map_err(Error::internal)
}
