//! Copies of data files without some of their rows, in their order: what copy-on-write does where a
//! table must not have deletion vectors.

use alluvium_protocol::{Result, part_of_task};
use futures::StreamExt;
use tracing::Instrument;

use crate::deletion::RowSet;
use crate::rows::Pick;
use crate::write::{FileWriter, Written};
use crate::{LiveFile, Table};

impl Table {
    /// Writes a file's rows anew, without `gone`: positions in it, deleted ones included.
    pub async fn copy_without(
        &self,
        file: &LiveFile,
        gone: RowSet,
        target_file_bytes: u64,
    ) -> Result<Written> {
        let span = part_of_task!("delta.copy", delta.table = self.uri, file = file.path);
        let copy = async {
            let mut rows = self.rows_of(file, &self.schema(), Pick::Without(gone)).await?;
            let mut writer = FileWriter::new(self, target_file_bytes)?;
            while let Some(batch) = rows.next().await {
                match batch {
                    Ok(batch) => writer.write(&batch).await?,
                    Err(error) => {
                        writer.abort().await;
                        return Err(error);
                    }
                }
            }
            writer.finish().await
        };
        copy.instrument(span).await
    }
}
