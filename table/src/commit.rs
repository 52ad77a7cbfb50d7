//! Commits: built for exactly the snapshot that was checked, or not made at all.
//!
//! ```text
//!  snapshot S, markers checked ──► actions + markers ──► version S+1, if nobody took it
//!        ▲                                                    │ anything else
//!        └──────────── reload, look at the markers ◄──────────┘
//! ```
//! The kind of error never decides whether a commit landed; the marker does. Callers loop with
//! [`CommitOutcome::Lost`], which carries the error only for the log.
//!
//! The library's `CommitBuilder` is not used: it wants all live files in memory before a commit and
//! lists them anew after it, so that a commit costs what the table holds. What it does beside that
//! is done here: `CommitData` writes the actions, the log store puts the entry if it is absent.

use std::collections::{BTreeSet, HashMap, HashSet};

use alluvium_protocol::{Code, Error, Result, part_of_task};
use chrono::Utc;
use deltalake::arrow::datatypes::{DataType, TimeUnit};
use deltalake::checkpoints::{cleanup_metadata, create_checkpoint};
use deltalake::kernel::transaction::{CommitData, CommitProperties};
use deltalake::kernel::{Action, Add, Remove, StructField, Transaction};
use deltalake::logstore::CommitOrBytes;
use deltalake::protocol::{DeltaOperation, MergePredicate, SaveMode};
use tracing::Instrument;
use uuid::Uuid;

use crate::classify::{GONE_HELP, foreign};
use crate::deletion::vectors_of;
use crate::{Table, store};

/// A checkpoint is written every so many versions, after the commit, off the hot path.
const CHECKPOINT_EVERY: i64 = 20;

/// A time without a zone, at whatever depth, asks for a feature of the protocol.
fn has_time_without_zone(kind: &DataType) -> bool {
    match kind {
        DataType::Timestamp(TimeUnit::Microsecond, None) => true,
        DataType::Struct(fields) => fields.iter().any(|f| has_time_without_zone(f.data_type())),
        DataType::List(field) | DataType::Map(field, _) => has_time_without_zone(field.data_type()),
        _ => false,
    }
}

/// The first writer version that knows change files.
const WRITES_CHANGES: i64 = 4;

/// A marker to land with the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    /// `alluvium/<pipeline>/…`
    pub app_id: String,
    /// Generation or counter.
    pub version: i64,
}

/// What kind of change a commit is, for foreign writers' conflict checks and for people.
pub enum Operation {
    /// Replaces the rows that match the predicate.
    Overwrite {
        /// SQL over partition columns.
        predicate: String,
    },
    /// Adds rows.
    Append,
    /// Takes the table back to the files of an earlier version.
    Restore {
        /// The version.
        version: u64,
    },
    /// Changes rows anywhere in the table. Also the label of rewrites without a change of rows: a
    /// racing OPTIMIZE of another writer sees it, which it would not with an optimize of ours.
    Merge,
}

/// The content of a commit.
pub struct Change {
    /// What kind of change it is.
    pub operation: Operation,
    /// Files that become live.
    pub adds: Vec<Add>,
    /// Files that stop being live.
    pub removes: Vec<Remove>,
    /// Further actions (metadata).
    pub others: Vec<Action>,
    /// Markers that land with it.
    pub markers: Vec<Marker>,
    /// What `commitInfo` says under `alluvium`.
    pub info: serde_json::Value,
}

/// How a commit ended.
#[must_use]
pub enum CommitOutcome {
    /// It landed, and the table is at it.
    Landed,
    /// Not known to have landed: reload, check the markers, plan again.
    Lost(Error),
}

/// A file does not go and come as it is: readers take the entry that they meet first, and some would miss it.
fn check_changes(change: &Change) -> Result<()> {
    let going: HashMap<&str, &Remove> =
        change.removes.iter().map(|file| (file.path.as_str(), file)).collect();
    let is_same = |add: &&Add| {
        let gone = going.get(add.path.as_str());
        gone.is_some_and(|gone| gone.deletion_vector == add.deletion_vector)
    };
    match change.adds.iter().find(is_same) {
        Some(add) => Err(Error::internal(format!("{} goes and comes in one commit", add.path))),
        None => Ok(()),
    }
}

impl Table {
    /// Commits `change` as the version after this snapshot, or not at all.
    pub async fn commit(&mut self, change: Change) -> Result<CommitOutcome> {
        self.check_writable(!change.removes.is_empty())?;
        check_changes(&change)?;
        self.check_files(&change).await?;
        let now = Utc::now().timestamp_millis();
        let transactions = change
            .markers
            .iter()
            .map(|marker| {
                Transaction::new_with_last_update(&marker.app_id, marker.version, Some(now))
            })
            .collect();
        let mut actions = change.others;
        actions.extend(change.removes.into_iter().map(Action::Remove));
        actions.extend(change.adds.into_iter().map(Action::Add));
        let operation = self.delta_operation(change.operation);
        let info = [
            ("alluvium".to_owned(), change.info),
            ("readVersion".to_owned(), self.snapshot.version().into()),
        ];
        let data = CommitData::new(actions, operation, info.into(), transactions);
        let entry = data.get_bytes().map_err(|e| foreign(self.committing(), &e))?;
        let span = part_of_task!(
            "delta.commit",
            delta.table = self.uri,
            delta.version = self.version() + 1,
            bytes = entry.len() as i64,
        );
        match self.put_entry(entry).instrument(span).await {
            Ok(version) => {
                self.snapshot = self.snapshot_at(Some(version)).await?;
                self.transactions.landed(version, &change.markers, now);
                Ok(CommitOutcome::Landed)
            }
            Err(error) => Ok(CommitOutcome::Lost(error)),
        }
    }

    /// What a process wrote long before its commit may be gone: a cleanup, or another tool's vacuum, takes what is old and
    /// no commit names.
    async fn check_files(&self, change: &Change) -> Result<()> {
        // A file that is named again, with other marks, was there before.
        let known: HashSet<&str> = change.removes.iter().map(|file| file.path.as_str()).collect();
        let written = change.adds.iter().filter(|add| !known.contains(add.path.as_str()));
        let mut paths: BTreeSet<String> = written.map(|add| add.path.clone()).collect();
        paths.extend(vectors_of(&change.adds));
        paths.extend(change.others.iter().filter_map(|action| match action {
            Action::Cdc(file) => Some(file.path.clone()),
            _ => None,
        }));
        let missing = self.missing_files(paths.into_iter().collect()).await?;
        let Some(first) = missing.first() else { return Ok(()) };
        let text = format!(
            "{}: {} file(s) that were written for it are gone, {first} is one",
            self.committing(),
            missing.len()
        );
        Err(Error::new(Code::FileGone, text).with_help(GONE_HELP))
    }

    /// Puts the log entry of the next version, if nobody has.
    async fn put_entry(&self, entry: bytes::Bytes) -> Result<u64> {
        let version = self.snapshot.version();
        let failed = |e: &(dyn std::error::Error + 'static)| foreign(self.committing(), e);
        // A snapshot so old that the log was cleaned above it would find the next version free.
        let latest = self.log_store.get_latest_version(version).await;
        if latest.map_err(|e| failed(&e))? != version {
            let text = format!("{}: another commit was faster", self.committing());
            return Err(Error::new(Code::TableMovedOn, text));
        }
        let entry = CommitOrBytes::LogBytes(entry);
        let put = self.log_store.write_commit_entry(version + 1, entry, Uuid::new_v4()).await;
        put.map_err(|e| failed(&e))?;
        Ok(version + 1)
    }

    fn committing(&self) -> String {
        format!("commit to {}", self.uri)
    }

    fn delta_operation(&self, operation: Operation) -> DeltaOperation {
        let partition_by = Some(self.partition_columns()).filter(|columns| !columns.is_empty());
        match operation {
            Operation::Overwrite { predicate } => DeltaOperation::Write {
                mode: SaveMode::Overwrite,
                partition_by,
                predicate: Some(predicate),
            },
            Operation::Append => {
                DeltaOperation::Write { mode: SaveMode::Append, partition_by, predicate: None }
            }
            Operation::Restore { version } => {
                DeltaOperation::Restore { version: Some(version), datetime: None }
            }
            Operation::Merge => DeltaOperation::Merge {
                predicate: None,
                merge_predicate: Some("keys are equal".to_owned()),
                matched_predicates: vec![MergePredicate {
                    action_type: "update".to_owned(),
                    predicate: None,
                }],
                not_matched_predicates: vec![MergePredicate {
                    action_type: "insert".to_owned(),
                    predicate: None,
                }],
                not_matched_by_source_predicates: Vec::new(),
            },
        }
    }

    /// Writes a checkpoint when the version asks for one. A failure is only a missing shortcut, so
    /// the caller logs it.
    pub async fn checkpoint_if_due(&self) -> Result<()> {
        if self.version() % CHECKPOINT_EVERY != CHECKPOINT_EVERY - 1 {
            return Ok(());
        }
        self.checkpoint().await
    }

    /// Writes a checkpoint of this version.
    pub async fn checkpoint(&self) -> Result<()> {
        alluvium_protocol::crash::point("checkpoint.before_write")?;
        let handle = self.handle().await?;
        create_checkpoint(&handle, None)
            .await
            .map_err(|e| foreign(format!("write checkpoint of {}", self.uri), &e))?;
        alluvium_protocol::crash::point("checkpoint.after_write")
    }

    /// Deletes log files that a checkpoint covers and that are older than the log's retention.
    pub async fn clean_log(&self) -> Result<usize> {
        let handle = self.handle().await?;
        cleanup_metadata(&handle, None)
            .await
            .map_err(|e| foreign(format!("clean the log of {}", self.uri), &e))
    }

    /// Adds nullable columns, in a commit of its own that says `info` of itself. Not known to have landed: `Lost`.
    pub async fn add_columns(
        &mut self,
        columns: &deltalake::arrow::datatypes::Fields,
        info: serde_json::Value,
    ) -> Result<CommitOutcome> {
        use deltalake::kernel::engine::arrow_conversion::TryIntoKernel;
        let fields = columns
            .iter()
            .map(|field| TryIntoKernel::<StructField>::try_into_kernel(field.as_ref()))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|e| Error::new(Code::ColumnTypeMismatch, e.to_string()))?;
        let properties = CommitProperties::default()
            .with_metadata([("alluvium".to_owned(), info)])
            .with_max_retries(0)
            .with_create_checkpoint(false)
            .with_cleanup_expired_logs(Some(false));
        let added = self.handle().await?.add_columns().with_fields(fields);
        match added.with_commit_properties(properties).await {
            Ok(_) => {
                self.refresh().await?;
                Ok(CommitOutcome::Landed)
            }
            Err(error) => {
                Ok(CommitOutcome::Lost(foreign(format!("add columns to {}", self.uri), &error)))
            }
        }
    }

    /// The action that sets table properties beside the present ones, or takes one away (`None`).
    pub fn change_properties(&self, properties: &[(String, Option<String>)]) -> Result<Action> {
        let metadata = self.snapshot.metadata();
        let mut value = serde_json::to_value(metadata).map_err(Error::internal)?;
        for (key, text) in properties {
            match (text, value["configuration"].as_object_mut()) {
                (Some(text), _) => {
                    value["configuration"][key] = serde_json::Value::String(text.clone());
                }
                (None, Some(held)) => drop(held.remove(key)),
                (None, None) => {}
            }
        }
        let changed = serde_json::from_value(value).map_err(Error::internal)?;
        Ok(Action::Metadata(changed))
    }

    /// The actions that make commits tell their changes: the property, and the protocol that knows it.
    pub fn turn_on_change_feed(&self) -> Result<Vec<Action>> {
        let property = (crate::CHANGE_FEED.to_owned(), Some("true".to_owned()));
        let mut actions = vec![self.change_properties(&[property])?];
        let mut protocol =
            serde_json::to_value(self.snapshot.protocol()).map_err(Error::internal)?;
        let version = protocol["minWriterVersion"].as_i64().unwrap_or(0);
        let feature = serde_json::Value::from("changeDataFeed");
        match protocol["writerFeatures"].as_array_mut() {
            Some(features) if features.contains(&feature) => return Ok(actions),
            Some(features) => features.push(feature),
            None if version < WRITES_CHANGES => {
                protocol["minWriterVersion"] = WRITES_CHANGES.into()
            }
            None => return Ok(actions),
        }
        let protocol = serde_json::from_value(protocol).map_err(Error::internal)?;
        actions.push(Action::Protocol(protocol));
        Ok(actions)
    }

    /// The actions that give columns other types. Data files must fit them.
    pub fn change_types(
        &self,
        columns: &[deltalake::arrow::datatypes::Field],
    ) -> Result<Vec<Action>> {
        use deltalake::kernel::engine::arrow_conversion::TryIntoKernel;
        let mut value = serde_json::to_value(self.snapshot.metadata()).map_err(Error::internal)?;
        let text = value["schemaString"].as_str().unwrap_or_default();
        let mut schema: serde_json::Value = serde_json::from_str(text).map_err(Error::internal)?;
        for column in columns {
            let field: StructField = column.try_into_kernel().map_err(|e| {
                Error::new(Code::ColumnTypeMismatch, format!("{}: {e}", column.name()))
            })?;
            let kind = serde_json::to_value(field.data_type()).map_err(Error::internal)?;
            let fields = schema["fields"].as_array_mut().into_iter().flatten();
            for field in fields.filter(|field| field["name"].as_str() == Some(column.name())) {
                field["type"] = kind.clone();
            }
        }
        value["schemaString"] = serde_json::Value::String(schema.to_string());
        let changed = serde_json::from_value(value).map_err(Error::internal)?;
        let mut actions = vec![Action::Metadata(changed)];
        if columns.iter().any(|column| has_time_without_zone(column.data_type())) {
            actions.extend(self.know_times_without_zone()?);
        }
        Ok(actions)
    }

    /// The protocol that knows times without a zone, where this one does not.
    fn know_times_without_zone(&self) -> Result<Option<Action>> {
        self.know("timestampNtz")
    }

    /// The actions that let rows be marked as deleted: the property, and the protocol that knows it.
    pub fn turn_on_deletion_vectors(&self) -> Result<Vec<Action>> {
        let property = (crate::DELETION_VECTORS.to_owned(), Some("true".to_owned()));
        let mut actions = vec![self.change_properties(&[property])?];
        actions.extend(self.know("deletionVectors")?);
        Ok(actions)
    }

    /// The protocol whose readers and writers know a feature, where this one's do not.
    fn know(&self, feature: &str) -> Result<Option<Action>> {
        let feature = serde_json::Value::from(feature);
        let mut protocol =
            serde_json::to_value(self.snapshot.protocol()).map_err(Error::internal)?;
        let known = protocol["writerFeatures"].as_array().cloned();
        if known.as_ref().is_some_and(|known| known.contains(&feature)) {
            return Ok(None);
        }
        // A protocol that names its features names those in use.
        let properties = self.properties();
        let is_on =
            |name: &str| properties.get(name).is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let in_use = [("changeDataFeed", crate::CHANGE_FEED), ("appendOnly", "delta.appendOnly")];
        let in_use = in_use.into_iter().filter(|(_, property)| is_on(property));
        let mut writer = known
            .unwrap_or_else(|| in_use.map(|(name, _)| serde_json::Value::from(name)).collect());
        writer.push(feature.clone());
        let mut reader = protocol["readerFeatures"].as_array().cloned().unwrap_or_default();
        // Known to readers of version 2 without a list.
        let mapping = serde_json::Value::from("columnMapping");
        if writer.contains(&mapping) && !reader.contains(&mapping) {
            reader.push(mapping);
        }
        reader.push(feature);
        protocol["minReaderVersion"] = 3.into();
        protocol["minWriterVersion"] = 7.into();
        protocol["readerFeatures"] = reader.into();
        protocol["writerFeatures"] = writer.into();
        let protocol = serde_json::from_value(protocol).map_err(Error::internal)?;
        Ok(Some(Action::Protocol(protocol)))
    }

    /// Files of the table's folder that no version within `retention` names and that are older than
    /// it, those of the versions `keep` excepted.
    pub async fn unreferenced_files(
        &self,
        retention: std::time::Duration,
        keep: &[u64],
    ) -> Result<Vec<String>> {
        use deltalake::operations::vacuum::VacuumMode;
        let doing = || format!("list unreferenced files of {}", self.uri);
        let retention = chrono::Duration::from_std(retention).map_err(Error::internal)?;
        // The library takes the first removal of a file that was added again for its last one.
        let removed = self.removed_since(Utc::now() - retention).await?;
        let mut vacuum = self
            .handle()
            .await?
            .vacuum()
            .with_mode(VacuumMode::Full)
            .with_retention_period(retention)
            .with_enforce_retention_duration(false)
            .with_dry_run(true);
        if !keep.is_empty() {
            vacuum = vacuum.with_keep_versions(keep);
        }
        let (_, metrics) = vacuum.await.map_err(|e| foreign(doing(), &e))?;
        // Removed files are named as long as the log remembers them, also when they are gone.
        use futures::TryStreamExt;
        let present: std::collections::HashSet<String> = self
            .store()
            .list(None)
            .map_ok(|meta| meta.location.to_string())
            .try_collect()
            .await
            .map_err(|e| foreign(doing(), &e))?;
        let is_old = |path: &String| present.contains(path) && !removed.contains(path);
        Ok(metrics.files_deleted.into_iter().filter(is_old).collect())
    }

    /// Deletes data files by their path below the table. Missing ones are fine.
    pub async fn delete_files(&self, paths: &[String]) -> Result<u64> {
        use object_store::ObjectStoreExt;
        let store: store::StoreRef = self.store();
        let mut deleted = 0;
        for path in paths {
            let at = crate::files::path_of(path);
            match store.delete(&at).await {
                Ok(()) => deleted += 1,
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    return Err(foreign(format!("delete {path} of {}", self.uri), &error));
                }
            }
        }
        Ok(deleted)
    }
}
