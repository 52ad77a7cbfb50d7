//! Copies of data files in their order, without some of their rows or with wider columns: what copy-on-write
//! does where a table must not have deletion vectors.

use std::sync::Arc;

use alluvium_protocol::{Result, part_of_task};
use deltalake::arrow::datatypes::SchemaRef;
use tracing::Instrument;

use crate::deletion::RowSet;
use crate::rows::Pick;
use crate::write::{FileWriter, Written};
use crate::{LiveFile, Table};

impl Table {
    /// Writes a file's rows anew with the columns of `schema`, without `gone`: positions in it, deleted
    /// ones included.
    pub async fn copy_without(
        &self,
        file: &LiveFile,
        schema: &SchemaRef,
        gone: RowSet,
        target_file_bytes: u64,
    ) -> Result<Written> {
        let span = part_of_task!("delta.copy", delta.table = self.uri, file = file.path);
        let copy = async {
            let rows = self.rows_of(file, schema, Pick::Without(gone)).await?;
            let writer = FileWriter::with_schema(self, Arc::clone(schema), target_file_bytes)?;
            writer.write_rows(rows).await
        };
        copy.instrument(span).await
    }
}
