//! Wider types for columns of a table: its files are written anew, in one commit for exactly the
//! snapshot that was read. Readers need no protocol feature for that.

use alluvium_protocol::{Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::datatypes::{Field, Schema, SchemaRef};
use alluvium_table::commit::{Change, CommitOutcome, Operation};
use alluvium_table::schema::{find_column, widens_to};
use alluvium_table::write::Written;
use alluvium_table::{LiveFile, Table};

use crate::Permit;

/// Those of `wanted` whose type is wider than the table's, as the table spells them.
pub(crate) fn narrower(table: &Schema, wanted: &[Field]) -> Vec<Field> {
    let wider = |field: &Field| {
        let held = table.field(find_column(table, field.name())?);
        let (is, will_be) = (held.data_type(), field.data_type());
        let is_wider = widens_to(is, will_be) && !widens_to(will_be, is);
        is_wider.then(|| Field::new(held.name(), will_be.clone(), true))
    };
    wanted.iter().filter_map(wider).collect()
}

/// Gives the columns their wider types, for an epoch where one brought them. `Lost`: not known to have landed.
pub(crate) async fn widen(
    table: &mut Table,
    pipeline: &Pipeline,
    columns: &[Field],
    ingest: Option<(Epoch, &Permit)>,
) -> Result<CommitOutcome> {
    let held = table.schema();
    let fields: Vec<Field> = held
        .fields()
        .iter()
        .map(|field| {
            let wider = columns.iter().find(|column| column.name() == field.name());
            wider.unwrap_or(field.as_ref()).clone()
        })
        .collect();
    let schema = std::sync::Arc::new(Schema::new(fields));
    let (mut adds, mut removes) = (Vec::new(), Vec::new());
    // File by file: a table of a thousand epochs has a thousand partitions, one writer each.
    for file in table.files().await? {
        ingest.map_or(Ok(()), |(_, permit)| permit.check())?;
        let written = rewritten(table, &file, &schema).await?;
        adds.extend(written.adds.into_iter().map(|mut add| {
            add.data_change = false;
            add
        }));
        let mut remove = file.remove;
        remove.data_change = false;
        removes.push(remove);
    }
    let others = table.change_types(columns)?;
    let names: Vec<&str> = columns.iter().map(|column| column.name().as_str()).collect();
    crash::point("schema.before_commit")?;
    table
        .commit(Change {
            operation: Operation::Merge,
            adds,
            removes,
            others,
            markers: Vec::new(),
            info: serde_json::json!({
                "pipeline": pipeline.id,
                "step": "widen",
                "columns": names,
                "epoch": ingest.map(|(epoch, _)| epoch),
            }),
        })
        .await
}

/// Writes the live rows of a table's file anew, with wider columns.
pub(crate) async fn rewritten(
    table: &Table,
    file: &LiveFile,
    schema: &SchemaRef,
) -> Result<Written> {
    let deleted = table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
    let written = table.copy_without(file, schema, deleted, u64::MAX).await?;
    if file.live_rows().is_some_and(|rows| rows != written.rows) {
        let text = format!("{} rows of {:?} written anew", written.rows, file.rows);
        return Err(Error::internal(text));
    }
    Ok(written)
}
