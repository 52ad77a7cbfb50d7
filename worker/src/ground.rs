//! What main is to hold for the keys of the epochs that change, computed over the rows of all applied
//! epochs, and of the base, with these keys. They are found by their key columns; other rows are not read.
//!
//! ```text
//!  changed epochs ─► their keys ───────────────────► sorted ─┐  by key, side by side:
//!        │ looked for in                                     │   the last row that is no revert,
//!        ├─► raw's files of applied epochs ─► rows ─► sorted ─┼─► else the base's row,
//!        └─► the base's files ──────────────► rows ─► sorted ─┘   else a delete
//! ```
//! Sorting spills to disk: memory does not grow with the rows.

use std::sync::Arc;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::pipeline::same_name;
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_table::arrow::array::RecordBatch;
use alluvium_table::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use alluvium_table::keys::{KeySet, Scan};
use alluvium_table::rows::Pick;
use alluvium_table::schema::find_column;
use alluvium_table::spool::Spool;
use alluvium_table::{LiveFile, Table};
use futures::{StreamExt, TryStreamExt};

use crate::edit::only_coming;
use crate::merge::BASE_VERSION;
use crate::ordered::{Cursor, LastOfEach, Layers, with_columns};
use crate::search::{KEYS_SHARE, key_in};
use crate::sorter::{Plan, Runs, Sorter};
use crate::winners::Rule;
use crate::{Permit, raw, slowly};

/// One of so many parts of the memory sorts one kind of rows: keys, raw's, the base's.
const SORT_SHARE: usize = 2;

/// Files that are read at a time.
const FILES_AT_ONCE: usize = 8;

/// The two tables, on exactly these snapshots.
pub(crate) struct Ground<'a> {
    pub(crate) main: &'a Table,
    pub(crate) raw: &'a Table,
    pub(crate) rule: &'a Rule,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) permit: &'a Permit,
}

impl Ground<'_> {
    /// The last row of each key of these files, by key; deletes, too.
    pub(crate) async fn last_rows(&self, files: &[LiveFile]) -> Result<Spool> {
        let output = self.output()?;
        let rows = self.last_of(files, None, &output).await?;
        collected(rows, &output, self.permit)
    }

    /// What main is to hold for each key of `changes`: a row, or that the key goes.
    pub(crate) async fn reconciled(
        &self,
        changes: &[LiveFile],
        applied: &[LiveFile],
    ) -> Result<Spool> {
        let output = self.output()?;
        let keys = self.keys_of(changes).await?;
        let rows = self.last_of(applied, keys.as_ref(), &output).await?;
        let rows = Cursor::new(with_columns(rows, &output, None), &output, &self.rule.key)?;
        let base = match self.base().await? {
            None => None,
            Some(base) => {
                let columns = without_op(&output);
                let (files, plan) = (base.files().await?, self.plan(&columns, &self.rule.key)?);
                let sorted = self.sorted(&base, &files, keys.as_ref(), &plan, &columns).await?;
                let rows = with_columns(sorted.batches(), &output, Some(raw::UPSERT));
                Some(Cursor::new(rows, &output, &self.rule.key)?)
            }
        };
        drop(keys);
        let going = self.going(self.raw, changes, &output).await?;
        collected(Layers::new(going, rows, base, false), &output, self.permit)
    }

    /// The rows of the newest snapshot, `top`, and deletes of main's other keys.
    pub(crate) async fn snapshot(&self, top: &[LiveFile]) -> Result<Spool> {
        let output = self.output()?;
        let rows = self.last_of(top, None, &output).await?;
        // A key that the snapshot deletes is one that it does not have.
        let rows = rows.map(|batch| only_coming(&batch?));
        let rows = Cursor::new(with_columns(rows, &output, None), &output, &self.rule.key)?;
        let main = self.main.files().await?;
        let going = self.going(self.main, &main, &output).await?;
        collected(Layers::new(going, rows, None, true), &output, self.permit)
    }

    /// A delete for each key of these files, by key.
    async fn going(&self, table: &Table, files: &[LiveFile], output: &SchemaRef) -> Result<Cursor> {
        let columns = columns_of(output, &self.rule.key)?;
        let plan = self.plan(&columns, &self.rule.key)?;
        let sorted = self.sorted(table, files, None, &plan, &columns).await?;
        let keys = Cursor::new(Box::new(sorted.batches()), &columns, &self.rule.key)?;
        let keys = LastOfEach::new(keys, &columns);
        let going = with_columns(keys, output, Some(raw::DELETE));
        Cursor::new(going, output, &self.rule.key)
    }

    /// The last row of each key, of those of `keys` or of all, by key.
    async fn last_of(
        &self,
        files: &[LiveFile],
        keys: Option<&Arc<KeySet>>,
        output: &SchemaRef,
    ) -> Result<impl Iterator<Item = Result<RecordBatch>> + Send + 'static> {
        let (columns, sorted) = self.in_order(files, keys, output).await?;
        let rows = Cursor::new(Box::new(sorted.batches()), &columns, &self.rule.key)?;
        Ok(LastOfEach::new(rows, &columns))
    }

    /// Rows of `keys`, or all, by key and then in the order in which they apply: `output`, and what decides.
    async fn in_order(
        &self,
        files: &[LiveFile],
        keys: Option<&Arc<KeySet>>,
        output: &SchemaRef,
    ) -> Result<(SchemaRef, Runs)> {
        let schema = self.raw.schema();
        let mut fields = output.fields().to_vec();
        let within = self.rule.order_within_epoch();
        for name in within.iter().map(String::as_str).chain([raw::EPOCH]) {
            if fields.iter().all(|field| !same_name(field.name(), name)) {
                let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
                fields.push(Arc::new(schema.field(at).clone()));
            }
        }
        let columns = Arc::new(Schema::new(fields));
        let order = [self.rule.key.clone(), vec![raw::EPOCH.to_owned()], within].concat();
        let plan = self.plan(&columns, &order)?;
        let sorted = self.sorted(self.raw, files, keys, &plan, &columns).await?;
        Ok((columns, sorted))
    }

    /// The live rows of files, those with one of these keys or all, as the plan orders them.
    async fn sorted(
        &self,
        table: &Table,
        files: &[LiveFile],
        keys: Option<&Arc<KeySet>>,
        plan: &Plan,
        columns: &SchemaRef,
    ) -> Result<Runs> {
        let mut picks = Vec::with_capacity(files.len());
        if let Some(keys) = keys {
            let key = key_in(table, self.rule);
            let (memory_bytes, index) = (self.memory(), self.pipeline.side_index);
            let scan = Scan { table, key: &key, memory_bytes, index };
            let found = scan
                .find(files, keys, &|rows, of| self.permit.reached("looks for keys", rows, of))
                .await?;
            picks.extend(found.into_iter().map(|found| (found.file, Pick::Only(found.rows))));
        } else {
            for file in files {
                let deleted = table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
                picks.push((file.clone(), Pick::Without(deleted)));
            }
        }
        let mut expected = 0;
        let mut opening = Vec::with_capacity(picks.len());
        for (file, pick) in picks {
            expected += match &pick {
                Pick::Only(rows) => rows.len(),
                Pick::Without(_) => file.live_rows().unwrap_or(0),
            };
            let (table, columns) = (table.clone(), Arc::clone(columns));
            opening.push(async move { table.rows_of(&file, &columns, pick).await });
        }
        // Several at a time: on object storage most of the time is waiting. Which comes first does not matter.
        let opened = futures::stream::iter(opening).buffer_unordered(FILES_AT_ONCE);
        let mut rows = opened.try_flatten_unordered(FILES_AT_ONCE);
        let mut sorter = Sorter::new(plan)?;
        self.permit.begin("reads rows of these keys", Amount::rows(expected));
        while let Some(batch) = rows.next().await {
            sorter.push(self.permit.counted(batch)?)?;
        }
        sorter.finish()
    }

    /// The version of main that was adopted.
    async fn base(&self) -> Result<Option<Table>> {
        let base = self.main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
        let Some(version) = base else { return Ok(None) };
        let base = Table::open_at(self.main.uri(), Some(version)).await?;
        base.map(Some).ok_or_else(|| Error::internal("the base version is gone"))
    }

    /// The columns that main gets out of raw, with main's types, which are as wide as raw's and as the
    /// base's; and `_op`.
    fn output(&self) -> Result<SchemaRef> {
        let (schema, wide) = (self.raw.schema(), self.main.schema());
        let mut fields = Vec::with_capacity(self.rule.columns.len() + 1);
        for name in self.rule.columns.iter().map(String::as_str).chain([raw::OP]) {
            let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
            let kind = match find_column(&wide, name) {
                Some(at) => wide.field(at).data_type(),
                None => schema.field(at).data_type(),
            };
            fields.push(Field::new(name, kind.clone(), true));
        }
        Ok(Arc::new(Schema::new(fields)))
    }

    fn plan(&self, columns: &SchemaRef, order: &[String]) -> Result<Plan> {
        Plan::new(columns, order, self.pipeline.sizes.memory_bytes / SORT_SHARE)
    }

    fn memory(&self) -> usize {
        self.pipeline.sizes.memory_bytes / KEYS_SHARE
    }

    /// The keys of these files; `None`: they are too many for the memory there is.
    async fn keys_of(&self, files: &[LiveFile]) -> Result<Option<Arc<KeySet>>> {
        let output = self.output()?;
        let columns = columns_of(&output, &self.rule.key)?;
        let kinds: Vec<DataType> =
            columns.fields().iter().map(|field| field.data_type().clone()).collect();
        let mut keys = KeySet::new(&kinds, 0, &[])?;
        let rows = files.iter().filter_map(LiveFile::live_rows).sum();
        self.permit.begin("reads the keys of these epochs", Amount::rows(rows));
        for file in files {
            let deleted = self.raw.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
            let mut rows = self.raw.rows_of(file, &columns, Pick::Without(deleted)).await?;
            while let Some(batch) = rows.next().await {
                let batch = self.permit.counted(batch)?;
                keys.add(batch.columns(), &|_| false)?;
                if keys.bytes() > self.memory() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(Arc::new(keys)))
    }

    /// All rows of these files but reverts, with main's columns, by epoch and place.
    pub(crate) async fn all_rows(&self, files: &[LiveFile]) -> Result<Runs> {
        let (schema, mut fields) = (self.raw.schema(), self.main.schema().fields().to_vec());
        for name in [raw::EPOCH, raw::FILE, raw::ROW, raw::OP] {
            if fields.iter().all(|field| !same_name(field.name(), name)) {
                let at = find_column(&schema, name).ok_or_else(|| Error::internal(name))?;
                fields.push(Arc::new(schema.field(at).clone()));
            }
        }
        let columns = Arc::new(Schema::new(fields));
        let plan = self.plan(&columns, &[raw::EPOCH, raw::FILE, raw::ROW].map(str::to_owned))?;
        self.sorted(self.raw, files, None, &plan, &columns).await
    }

    /// Mode scd2: all versions of each key of `changes`, and a delete of each, as what main has goes.
    pub(crate) async fn versions(
        &self,
        changes: &[LiveFile],
        applied: &[LiveFile],
    ) -> Result<Spool> {
        let output = self.output()?;
        let keys = self.keys_of(changes).await?;
        let (columns, sorted) = self.in_order(applied, keys.as_ref(), &output).await?;
        drop(keys);
        let of_epoch = [self.rule.key.clone(), vec![raw::EPOCH.to_owned()]].concat();
        let rows = Cursor::new(Box::new(sorted.batches()), &columns, &of_epoch)?;
        let rows = LastOfEach::new(rows, &columns);
        let values = self.rule.columns.iter().filter(|name| self.rule.key_name(name).is_none());
        let values: Vec<String> = values.cloned().chain([raw::OP.to_owned()]).collect();
        let rows = Cursor::new(Box::new(rows), &columns, &self.rule.key)?;
        let rows = rows.comparing(&columns, &values)?;
        let versions = slowly::Versions::new(rows, &columns)?;
        let fields =
            [output.fields().to_vec(), slowly::fields().into_iter().map(Arc::new).collect()];
        let output = Arc::new(Schema::new(fields.concat()));
        let mut spool = Spool::new(Arc::clone(&output));
        for batch in with_columns(versions, &output, None) {
            self.permit.check()?;
            spool.push(only_coming(&batch?)?)?;
        }
        let mut going = self.going(self.raw, changes, &output).await?;
        while let Some(batch) = going.next_batch()? {
            spool.push(batch.as_ref().clone())?;
        }
        Ok(spool)
    }
}

/// Some columns of a schema.
pub(crate) fn columns_of(schema: &SchemaRef, names: &[String]) -> Result<SchemaRef> {
    let field = |name: &String| -> Result<Field> {
        let at = find_column(schema, name).ok_or_else(|| Error::internal(name))?;
        Ok(schema.field(at).clone())
    };
    Ok(Arc::new(Schema::new(names.iter().map(field).collect::<Result<Vec<Field>>>()?)))
}

fn without_op(schema: &SchemaRef) -> SchemaRef {
    let fields = schema.fields().iter().filter(|field| field.name() != raw::OP);
    Arc::new(Schema::new(fields.cloned().collect::<Vec<_>>()))
}

/// All rows, kept to be read more than once.
fn collected(
    rows: impl Iterator<Item = Result<RecordBatch>>,
    columns: &SchemaRef,
    permit: &Permit,
) -> Result<Spool> {
    let mut spool = Spool::new(Arc::clone(columns));
    for batch in rows {
        permit.check()?;
        let batch = alluvium_table::schema::conform(&batch?, columns).map_err(Error::internal)?;
        spool.push(batch)?;
    }
    Ok(spool)
}
