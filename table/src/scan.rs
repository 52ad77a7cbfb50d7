//! Scans: a table, or chosen files of it, as a table of a DataFusion session.

use std::sync::Arc;

use alluvium_protocol::Result;
use deltalake::datafusion::catalog::TableProvider;
use deltalake::datafusion::execution::context::SessionContext;
use deltalake::delta_datafusion::{DeltaScanNext, FileSelection};

use crate::Table;
use crate::classify::foreign;

impl Table {
    /// Registers this snapshot as `name`; with `files`, only those.
    pub async fn register(
        &self,
        session: &SessionContext,
        name: &str,
        files: Option<&[String]>,
    ) -> Result<()> {
        let doing = || format!("read {}", self.uri);
        let mut scan = DeltaScanNext::builder()
            .with_log_store(self.log_store.clone())
            .with_snapshot(Arc::clone(&self.snapshot));
        if let Some(files) = files {
            let files = files.iter().map(|path| encoded(path));
            scan = scan.with_file_selection(FileSelection::from_file_paths(files));
        }
        let provider = scan.build().await.map_err(|e| foreign(doing(), &e))?;
        let provider: Arc<dyn TableProvider> = Arc::new(provider);
        session.register_table(name, provider).map_err(|e| foreign(doing(), &e))?;
        Ok(())
    }
}

/// Paths in a selection are URIs.
pub(crate) fn encoded(path: &str) -> String {
    path.replace('%', "%25").replace(' ', "%20").replace('#', "%23").replace('?', "%3F")
}
