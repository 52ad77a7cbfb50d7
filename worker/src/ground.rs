//! What the formula is computed over: the rows of all applied epochs, and of the base, with keys of the
//! epochs that change. They are found by their key columns; the other rows are not read.

use std::sync::Arc;

use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_table::arrow::array::ArrayRef;
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::deletion::RowSet;
use alluvium_table::keys::{KeySet, Scan};
use alluvium_table::rows::Pick;
use alluvium_table::schema::find_column;
use alluvium_table::session::quoted;
use alluvium_table::spool::Spool;
use alluvium_table::{LiveFile, Table};
use futures::TryStreamExt;

use crate::Permit;
use crate::edit::paths;
use crate::merge::BASE_VERSION;
use crate::raw;
use crate::search::KEYS_SHARE;
use crate::winners::{Rule, Scope};

/// The two tables, on exactly these snapshots.
pub(crate) struct Ground<'a> {
    pub(crate) session: &'a SessionContext,
    pub(crate) main: &'a Table,
    pub(crate) raw: &'a Table,
    pub(crate) rule: &'a Rule,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) permit: &'a Permit,
}

impl Ground<'_> {
    /// Registers `applied`, and `base` where main was adopted, for the keys of `changes`.
    pub(crate) async fn register(
        &self,
        changes: &[LiveFile],
        applied: &[LiveFile],
    ) -> Result<Scope> {
        let keys = self.keys_of(changes).await?;
        self.register_applied(applied, keys.as_ref()).await?;
        let base = self.main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
        let Some(version) = base else { return Ok(Scope::Reconcile { has_base: false }) };
        let base = Table::open_at(self.main.uri(), Some(version)).await?;
        let base = base.ok_or_else(|| Error::internal("the base version is gone"))?;
        match &keys {
            None => base.register(self.session, "base_version", None).await?,
            Some(keys) => {
                let files = base.files().await?;
                let rows = self.rows_with(&base, &files, keys).await?;
                rows.register(self.session, "base_version")?;
            }
        }
        self.register_base(&base).await?;
        Ok(Scope::Reconcile { has_base: true })
    }

    async fn register_applied(&self, files: &[LiveFile], keys: Option<&Arc<KeySet>>) -> Result<()> {
        if files.is_empty() {
            let doing = "read the applied epochs";
            let none = self.session.sql("SELECT * FROM changes WHERE FALSE").await;
            let none = none.map_err(|e| foreign(doing, &e))?.into_view();
            self.session.register_table("applied", none).map_err(|e| foreign(doing, &e))?;
            return Ok(());
        }
        match keys {
            None => self.raw.register(self.session, "applied", Some(&paths(files))).await,
            Some(keys) => {
                let rows = self.rows_with(self.raw, files, keys).await?;
                rows.register(self.session, "applied")
            }
        }
    }

    /// The keys of these files; `None`: they are too many for the memory there is.
    async fn keys_of(&self, files: &[LiveFile]) -> Result<Option<Arc<KeySet>>> {
        // Main's types are as wide as raw's, and as the base's.
        let schema = self.main.schema();
        let kind = |name: &String| {
            let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
            Ok(schema.field(at).data_type().clone())
        };
        let types = self.rule.key.iter().map(kind).collect::<Result<Vec<DataType>>>()?;
        let mut keys = KeySet::new(&types, 0, &[])?;
        let columns = self.columns(self.raw, &self.rule.key)?;
        let memory = self.pipeline.sizes.memory_bytes / KEYS_SHARE;
        for file in files {
            self.permit.check()?;
            let all = Pick::Without(RowSet::new());
            let mut rows = self.raw.rows_of(file, &columns, all).await?;
            while let Some(batch) = rows.try_next().await? {
                let values: Vec<ArrayRef> = batch.columns().to_vec();
                keys.add(&values, &|_| false)?;
                if keys.bytes() > memory {
                    return Ok(None);
                }
            }
        }
        Ok(Some(Arc::new(keys)))
    }

    /// These columns of a table, in this order.
    fn columns(&self, table: &Table, names: &[String]) -> Result<SchemaRef> {
        let schema = table.schema();
        let field = |name: &String| -> Result<Field> {
            let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
            Ok(schema.field(at).clone())
        };
        let fields = names.iter().map(field).collect::<Result<Vec<Field>>>()?;
        Ok(Arc::new(Schema::new(fields)))
    }

    /// The rows of files with these keys.
    async fn rows_with(
        &self,
        table: &Table,
        files: &[LiveFile],
        keys: &Arc<KeySet>,
    ) -> Result<Spool> {
        let schema = table.schema();
        let mut spool = Spool::new(Arc::clone(&schema));
        let spelled = |name: &String| {
            let at = find_column(&schema, name);
            at.map_or_else(|| name.clone(), |at| schema.field(at).name().clone())
        };
        let key: Vec<String> = self.rule.key.iter().map(spelled).collect();
        let memory_bytes = self.pipeline.sizes.memory_bytes / KEYS_SHARE;
        let scan = Scan { table, key: &key, memory_bytes };
        for found in scan.find(files, keys, &|| self.permit.check()).await? {
            self.permit.check()?;
            let mut rows = table.rows_of(&found.file, &schema, Pick::Only(found.rows)).await?;
            while let Some(batch) = rows.try_next().await? {
                spool.push(batch)?;
            }
        }
        Ok(spool)
    }

    /// The base, with a NULL for each of raw's data columns that it lacks.
    async fn register_base(&self, base: &Table) -> Result<()> {
        let doing = "read the base version";
        let schema = base.schema();
        let columns: Vec<String> = raw::data_fields(&self.raw.schema())
            .iter()
            .map(|field| match find_column(&schema, field.name()) {
                Some(at) => {
                    format!("{} AS {}", quoted(schema.field(at).name()), quoted(field.name()))
                }
                None => format!("NULL AS {}", quoted(field.name())),
            })
            .collect();
        let sql = format!("SELECT {} FROM base_version", columns.join(", "));
        let frame = self.session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        self.session.register_table("base", frame.into_view()).map_err(|e| foreign(doing, &e))?;
        Ok(())
    }
}
