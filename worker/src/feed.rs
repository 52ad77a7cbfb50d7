//! The change data feed of a merge: each row of main that goes and each that comes, told in files of
//! its own beside the commit's data.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#change-data-files>

use std::sync::Arc;

use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::{Error, Result};
use alluvium_table::Action;
use alluvium_table::arrow::array::{ArrayRef, RecordBatch, StringArray};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::keys::Found;
use alluvium_table::spool::{Spool, Spooled};
use alluvium_table::write::{CHANGE_TYPE, ChangeWriter};

use crate::edit::{Editing, only_coming};
use crate::ordered::{Cursor, Picks, Seen, side_by_side, with_columns};
use crate::search::key_in;
use crate::slowly::VALIDITY;
use crate::sorter::{Plan, Sorter};

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
    let all: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let cursor = |rows| Cursor::new(rows, &schema, &identity)?.comparing(&schema, &all);
    let before = cursor(Box::new(before.batches()))?;
    let after = cursor(Box::new(after.finish()?.batches()))?;
    let mut told = Told::new(&schema);
    side_by_side(before, after, |goes, comes, cursor| {
        match (goes, comes) {
            (Some(goes), None) => told.tell(goes, "delete"),
            (None, Some(comes)) => told.tell(comes, "insert"),
            // All versions of a key are computed anew: most of them as they were.
            (Some(goes), Some(comes)) if rule.mode == Mode::Scd2 && cursor.is_same(goes, comes) => {
                Ok(())
            }
            (Some(goes), Some(comes)) => {
                told.tell(goes, "update_preimage")?;
                told.tell(comes, "update_postimage")
            }
            (None, None) => Ok(()),
        }
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
