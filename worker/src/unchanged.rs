//! Rows that come and are as main has them already: with `merge.skip_unchanged` they are left alone.
//!
//! ```text
//!  rows of main with such keys ─► hash of the row known? ─► yes: a row that comes with this hash is unchanged
//!                                        └─ no: read, its hash kept, compared value by value
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::pipeline::same_name;
use alluvium_protocol::{Error, Result};
use alluvium_table::LiveFile;
use alluvium_table::arrow::array::{BooleanArray, RecordBatch};
use alluvium_table::arrow::compute::filter_record_batch;
use alluvium_table::arrow::datatypes::{Field, Schema, SchemaRef};
use alluvium_table::deletion::RowSet;
use alluvium_table::keys::{Content, Contents, Found};
use alluvium_table::rows::Pick;
use alluvium_table::schema::{conform, find_column};
use alluvium_table::spool::{Spool, Spooled};
use futures::StreamExt;

use crate::edit::{Editing, is_upsert};
use crate::ordered::{Cursor, Picks, side_by_side, with_columns};
use crate::raw;
use crate::search::comes;
use crate::sorter::{Plan, Runs, Sorter};

/// Of the memory this part may be hashes of rows.
const HASHES_SHARE: usize = 4;
/// Memory of one.
const HASH_BYTES: usize = 32;

/// Rows of a file of main.
struct Open<'a> {
    file: &'a LiveFile,
    rows_in_file: u64,
    rows: RowSet,
}

/// The winners that are not as main has them; `touched` are the rows of main with such keys.
pub(crate) async fn changed_ones(
    editing: &Editing<'_>,
    touched: &[Found],
    winners: &Spooled,
) -> Result<Arc<Spooled>> {
    let Editing { main, rule, pipeline, .. } = *editing;
    let all = all_columns(&main.schema(), winners.schema());
    let stored = without_op(&all);
    let contents = Contents::of(main, &stored, pipeline.side_index)?;
    let (mut known, mut open) = (HashSet::new(), Vec::new());
    let hits: u64 = touched.iter().map(|found| found.rows.len()).sum();
    let most = pipeline.sizes.memory_bytes / HASHES_SHARE / HASH_BYTES;
    let may_know =
        contents.as_ref().filter(|_| usize::try_from(hits).is_ok_and(|hits| hits <= most));
    for found in touched {
        let rows = match may_know {
            Some(contents) => contents.look_up(&found.file, &found.rows, &mut known),
            None => found.rows.clone(),
        };
        if !rows.is_empty() {
            open.push(Open { file: &found.file, rows_in_file: found.rows_in_file, rows });
        }
    }
    let unlike = |batch: Result<RecordBatch>| match may_know {
        Some(contents) => without_known(&batch?, &stored, contents, &known),
        None => batch,
    };
    let coming = with_columns(winners.batches()?, &all, None).map(unlike);
    let mut changed = Spool::new(Arc::clone(&all));
    if open.is_empty() {
        for batch in coming {
            editing.permit.check()?;
            changed.push(batch?)?;
        }
        return Ok(Arc::new(changed.finish()?));
    }
    let key = &rule.key;
    let is_value = |name: &String| name != raw::OP && rule.key_name(name).is_none();
    let values = all.fields().iter().map(|field| field.name().clone());
    let values: Vec<String> = values.filter(is_value).collect();
    let plan = Plan::new(&all, key, pipeline.sizes.memory_bytes)?;
    let held = read_open(editing, &open, (&all, &stored), contents.as_ref(), &plan).await?;
    let mut sorted = Sorter::new(&plan)?;
    for batch in coming {
        editing.permit.check()?;
        sorted.push(batch?)?;
    }
    let cursor = |rows| Cursor::new(rows, &all, key)?.comparing(&all, &values);
    let coming = cursor(Box::new(sorted.finish()?.batches()))?;
    let held = cursor(Box::new(held.batches()))?;
    let mut picks = Picks::default();
    side_by_side(coming, held, |comes, is, cursor| {
        let Some(comes) = comes else { return Ok(()) };
        let is_kept = is.is_some_and(|is| is_upsert(comes) && cursor.is_same(comes, is));
        if !is_kept {
            picks.pick(&comes.batch, comes.row);
        }
        if picks.is_full() {
            picks.take()?.map_or(Ok(()), |rows| changed.push(rows))?;
        }
        Ok(())
    })?;
    picks.take()?.map_or(Ok(()), |rows| changed.push(rows))?;
    Ok(Arc::new(changed.finish()?))
}

/// The columns of what comes, in main's types, and main's further columns, which are NULL there.
fn all_columns(main: &SchemaRef, coming: &SchemaRef) -> SchemaRef {
    let is_known = |name: &str| coming.fields().iter().any(|f| same_name(f.name(), name));
    let mut fields: Vec<Field> = Vec::new();
    for field in coming.fields() {
        let kind = find_column(main, field.name()).map(|at| main.field(at).data_type());
        let kind = kind.unwrap_or(field.data_type()).clone();
        fields.push(Field::new(field.name(), kind, true));
    }
    let further = main.fields().iter().filter(|field| !is_known(field.name()));
    fields.extend(further.map(|field| field.as_ref().clone()));
    Arc::new(Schema::new(fields))
}

/// Those that main has.
fn without_op(all: &SchemaRef) -> SchemaRef {
    let stored = all.fields().iter().filter(|field| field.name() != raw::OP).cloned();
    Arc::new(Schema::new(stored.collect::<Vec<_>>()))
}

/// Those of the rows that are not upserts with a known hash.
fn without_known(
    batch: &RecordBatch,
    stored: &SchemaRef,
    contents: &Contents,
    known: &HashSet<Content>,
) -> Result<RecordBatch> {
    let hashes = contents.hashes(&conform(batch, stored).map_err(Error::internal)?)?;
    let comes = comes(batch)?;
    let is_unlike = |(row, hash): (usize, &Content)| !(comes.value(row) && known.contains(hash));
    let unlike: BooleanArray = hashes.iter().enumerate().map(|row| Some(is_unlike(row))).collect();
    filter_record_batch(batch, &unlike).map_err(Error::internal)
}

/// Reads rows of main, as the plan orders them, and keeps their hashes.
async fn read_open(
    editing: &Editing<'_>,
    open: &[Open<'_>],
    (all, stored): (&SchemaRef, &SchemaRef),
    contents: Option<&Contents>,
    plan: &Plan,
) -> Result<Runs> {
    let mut sorter = Sorter::new(plan)?;
    let of = open.iter().map(|open| open.rows.len()).sum();
    editing.permit.begin("reads rows of main", Amount::rows(of));
    for Open { file, rows_in_file, rows } in open {
        let mut places = rows.iter();
        let mut batches = editing.main.rows_of(file, all, Pick::Only(rows.clone())).await?;
        while let Some(batch) = batches.next().await {
            let batch = editing.permit.counted(batch)?;
            if let Some(contents) = contents {
                let places: Vec<u64> = places.by_ref().take(batch.num_rows()).collect();
                let hashes = contents.hashes(&conform(&batch, stored).map_err(Error::internal)?)?;
                contents.note(file, *rows_in_file, &places, &hashes);
            }
            sorter.push(batch)?;
        }
    }
    sorter.finish()
}
