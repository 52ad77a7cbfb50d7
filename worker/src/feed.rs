//! The change data feed of a merge: each row of main that goes and each that comes, told in files of
//! its own beside the commit's data.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#change-data-files>

use std::sync::Arc;

use alluvium_protocol::Pipeline;
use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{ArrayRef, RecordBatch, StringArray};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::keys::Found;
use alluvium_table::rows::Pick;
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::write::{CHANGE_TYPE, ChangeWriter};
use alluvium_table::{Action, LiveFile, Table};
use futures::TryStreamExt;

use crate::Permit;
use crate::edit::{Editing, only_coming};
use crate::ingest::table_names;
use crate::ordered::{Cursor, Picks, Seen, side_by_side, with_columns};
use crate::search::key_in;
use crate::slowly::VALIDITY;
use crate::sorter::{Plan, Runs, Sorter};

/// Writes what changes: rows of main that were found go, those of `coming` that come come.
pub(crate) async fn write(
    editing: &Editing<'_>,
    going: &[Found],
    coming: &Spooled,
) -> Result<Vec<Action>> {
    let Editing { main, rule, pipeline, permit } = editing;
    let schema = main.schema();
    // What makes a row the same one before and after; a version of a key begins at its epoch.
    let mut identity = key_in(main, rule);
    if rule.mode == Mode::Scd2 {
        identity.push(VALIDITY[0].to_owned());
    }
    let plan = Plan::new(&schema, &identity, pipeline.sizes.memory_bytes)?;
    let before = editing.rows_that_go(going, &schema, &plan).await?;
    let mut after = Sorter::new(&plan)?;
    let batches = coming.batches()?.map(|batch| only_coming(&batch?));
    for batch in with_columns(batches, &schema, None) {
        permit.check()?;
        after.push(batch?)?;
    }
    // All versions of a key are computed anew: most of them as they were.
    let tells_same = rule.mode != Mode::Scd2;
    tell(main, &identity, (before, after.finish()?), tells_same).await
}

/// Writes what a restore of files changes: the live rows of `going` go, those of `coming` come.
pub(crate) async fn of_files(
    main: &Table,
    pipeline: &Pipeline,
    (going, coming): (&[LiveFile], &[LiveFile]),
    permit: &Permit,
) -> Result<Vec<Action>> {
    let schema = main.schema();
    let mut identity = table_names(main, &pipeline.content.key);
    match pipeline.content.mode {
        Mode::Scd2 => identity.push(VALIDITY[0].to_owned()),
        // Rows have no key: the same row is the same values.
        Mode::Append => identity = schema.fields().iter().map(|f| f.name().clone()).collect(),
        Mode::Upsert | Mode::Snapshot => {}
    }
    let plan = Plan::new(&schema, &identity, pipeline.sizes.memory_bytes)?;
    let before = live_rows(main, going, &plan, permit).await?;
    let after = live_rows(main, coming, &plan, permit).await?;
    // A file that only got or lost marks is on both sides: most of its rows stay.
    tell(main, &identity, (before, after), false).await
}

async fn live_rows(main: &Table, files: &[LiveFile], plan: &Plan, permit: &Permit) -> Result<Runs> {
    let mut sorter = Sorter::new(plan)?;
    for file in files {
        let deleted = main.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
        let mut rows = main.rows_of(file, &main.schema(), Pick::Without(deleted)).await?;
        while let Some(batch) = rows.try_next().await? {
            permit.check()?;
            sorter.push(batch)?;
        }
    }
    sorter.finish()
}

/// Writes the change files for rows before and after, which are by their identity. Rows that are the same
/// are left out unless `tells_same`.
async fn tell(
    main: &Table,
    identity: &[String],
    (before, after): (Runs, Runs),
    tells_same: bool,
) -> Result<Vec<Action>> {
    let schema = main.schema();
    let all: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let cursor = |rows| Cursor::new(rows, &schema, identity)?.comparing(&schema, &all);
    let before = cursor(Box::new(before.batches()))?;
    let after = cursor(Box::new(after.batches()))?;
    let mut told = Told::new(&schema);
    side_by_side(before, after, |goes, comes, cursor| match (goes, comes) {
        (Some(goes), None) => told.tell(goes, "delete"),
        (None, Some(comes)) => told.tell(comes, "insert"),
        (Some(goes), Some(comes)) if !tells_same && cursor.is_same(goes, comes) => Ok(()),
        (Some(goes), Some(comes)) => {
            told.tell(goes, "update_preimage")?;
            told.tell(comes, "update_postimage")
        }
        (None, None) => Ok(()),
    })?;
    let rows = told.finish()?;
    ChangeWriter::new(main)?.write_rows(futures::stream::iter(rows.batches()?)).await
}

/// Rows that were told, and what happened to each.
struct Told {
    schema: SchemaRef,
    picks: Picks,
    changes: Vec<&'static str>,
    spool: Spool,
}

impl Told {
    fn new(schema: &SchemaRef) -> Self {
        let mut fields = schema.fields().to_vec();
        fields.push(Arc::new(Field::new(CHANGE_TYPE, DataType::Utf8, true)));
        let schema = Arc::new(Schema::new(fields));
        let spool = Spool::new(Arc::clone(&schema));
        Self { schema, picks: Picks::default(), changes: Vec::new(), spool }
    }

    fn tell(&mut self, row: &Seen, change: &'static str) -> Result<()> {
        self.picks.pick(&row.batch, row.row);
        self.changes.push(change);
        if self.picks.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let Some(rows) = self.picks.take()? else { return Ok(()) };
        let mut columns = rows.columns().to_vec();
        let changes = StringArray::from_iter_values(self.changes.drain(..));
        columns.push(Arc::new(changes) as ArrayRef);
        let rows = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        self.spool.push(rows.map_err(Error::internal)?)
    }

    fn finish(mut self) -> Result<Spooled> {
        self.flush()?;
        self.spool.finish()
    }
}
