//! Deletion vectors: the rows of a data file that no longer count, kept beside it.
//!
//! Owns: their format, and where they lie: in the log itself while they are tiny, else several in one
//! file below `_dv/`. Older readers' vacuum deletes such files at the table's root and leaves folders
//! alone whose names begin with `_`.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#deletion-vector-format>

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use alluvium_protocol::{Code, Error, Result};
use chrono::Utc;
use deltalake::kernel::{Add, DeletionVectorDescriptor, Remove, StorageType};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, path::Path};
use roaring::RoaringTreemap;
use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::classify::{foreign, of_file};
use crate::{LiveFile, Table};

/// Positions of rows in a data file, from 0; those already deleted are counted, too.
pub type RowSet = RoaringTreemap;

/// Before the bitmaps, in little endian.
const MAGIC: u32 = 1_681_511_377;
/// The first byte of a file of vectors.
const VERSION: u8 = 1;
/// Where files of vectors lie.
const FOLDER: &str = "_dv";
/// Vectors of fewer bytes stand in the log.
const INLINE_BYTES_MAX: usize = 256;
/// Readers fetch a file of vectors whole for each one in it: it stays small.
const PACK_BYTES_MAX: usize = 2 << 20;
/// A UUID in base 85.
const UUID_LETTERS: usize = 20;
/// Files of vectors, or log entries, that are read or written at a time.
const AT_ONCE: usize = 16;

/// A live file of which further rows go.
pub struct Mark<'a> {
    /// The file.
    pub file: &'a LiveFile,
    /// Rows in it, deleted ones included.
    pub rows_in_file: u64,
    /// All its deleted rows, those of before included.
    pub deleted: RowSet,
}

fn encode(rows: &RowSet) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(4 + rows.serialized_size());
    bytes.extend(MAGIC.to_le_bytes());
    rows.serialize_into(&mut bytes).map_err(Error::internal)?;
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<RowSet, String> {
    let (magic, body) = bytes.split_at_checked(4).ok_or("it is cut off")?;
    if magic != MAGIC.to_le_bytes() {
        return Err("it does not begin as one".to_owned());
    }
    RowSet::deserialize_from(body).map_err(|e| e.to_string())
}

/// The path of a vector's file below the table, and where in it the vector begins.
fn place_of(descriptor: &DeletionVectorDescriptor) -> Result<Option<(String, u64)>, String> {
    let text = &descriptor.path_or_inline_dv;
    let offset = u64::try_from(descriptor.offset.unwrap_or(0)).map_err(|e| e.to_string())?;
    match descriptor.storage_type {
        StorageType::Inline => Ok(None),
        StorageType::UuidRelativePath => {
            let at = text.len().checked_sub(UUID_LETTERS).ok_or("its name is too short")?;
            let (prefix, name) = text.split_at_checked(at).ok_or("its name is no name")?;
            let id = z85::decode(name).map_err(|e| e.to_string())?;
            let id = Uuid::from_slice(&id).map_err(|e| e.to_string())?;
            let slash = if prefix.is_empty() { "" } else { "/" };
            Ok(Some((format!("{prefix}{slash}deletion_vector_{id}.bin"), offset)))
        }
        StorageType::AbsolutePath => Err("its file lies outside the table".to_owned()),
    }
}

/// What tells two states of one file apart: the path of its vector and the place in it.
pub fn version_of(descriptor: Option<&DeletionVectorDescriptor>) -> Option<(&str, Option<i32>)> {
    descriptor.map(|vector| (vector.path_or_inline_dv.as_str(), vector.offset))
}

impl Table {
    /// The rows that a vector deletes; none without one.
    ///
    /// # Errors
    /// `TableUnreadable`: it cannot be read, or is not what its length and checksum say.
    pub async fn deleted_rows(&self, vector: Option<&DeletionVectorDescriptor>) -> Result<RowSet> {
        let Some(vector) = vector else { return Ok(RowSet::new()) };
        let broken = |why: String| {
            let name = &vector.path_or_inline_dv;
            let text = format!("{}: deletion vector {name:?}: {why}", self.uri);
            Error::new(Code::TableUnreadable, text)
        };
        let Some((path, offset)) = place_of(vector).map_err(broken)? else {
            let bytes = z85::decode(&vector.path_or_inline_dv);
            let bytes = bytes.map_err(|e| broken(e.to_string()))?;
            return decode(&bytes).map_err(broken);
        };
        let size = u64::try_from(vector.size_in_bytes).map_err(|e| broken(e.to_string()))?;
        // Length before it, checksum behind it, in big endian.
        let bytes = self
            .store()
            .get_range(&Path::from(path.as_str()), offset..offset + size + 8)
            .await
            .map_err(|e| of_file(format!("read {path} of {}", self.uri), &e))?;
        let at = |from: usize| bytes.get(from..from + 4).map(<[u8]>::to_vec);
        let length = bytes.len().saturating_sub(8);
        let body = bytes.get(4..4 + length).unwrap_or_default();
        let is_whole = at(0) == u32::try_from(size).ok().map(|size| size.to_be_bytes().to_vec());
        if !is_whole || at(4 + length) != Some(crc32fast::hash(body).to_be_bytes().to_vec()) {
            return Err(broken(format!("{path} is damaged at byte {offset}")));
        }
        decode(body).map_err(broken)
    }

    /// Writes the vectors of files that lose rows. Returns the actions that name the files again; a
    /// file without a row left has none.
    pub async fn mark_deleted(&self, marks: &[Mark<'_>]) -> Result<Vec<Add>> {
        let mut adds = Vec::with_capacity(marks.len());
        let mut pack = Pack::default();
        for mark in marks {
            if mark.deleted.len() >= mark.rows_in_file {
                continue;
            }
            let bytes = encode(&mark.deleted)?;
            let vector = if bytes.len() <= INLINE_BYTES_MAX {
                inline(bytes, mark.deleted.len())?
            } else {
                if pack.bytes.len() + bytes.len() > PACK_BYTES_MAX && !pack.bytes.is_empty() {
                    std::mem::take(&mut pack).store(self).await?;
                }
                pack.push(&bytes, mark.deleted.len())?
            };
            adds.push(marked(mark, vector)?);
        }
        pack.store(self).await?;
        Ok(adds)
    }

    /// Files of vectors that are older than `retention` and that neither this snapshot names, nor one
    /// that was current within it, nor one of the versions `keep`.
    pub async fn unreferenced_vectors(
        &self,
        retention: Duration,
        keep: &[u64],
    ) -> Result<Vec<String>> {
        let doing = || format!("list deletion vectors of {}", self.uri);
        let age = chrono::Duration::from_std(retention).map_err(Error::internal)?;
        let since = Utc::now() - age;
        let mut old: BTreeSet<String> = BTreeSet::new();
        let store = self.store();
        let mut listed = store.list(Some(&Path::from(FOLDER)));
        while let Some(meta) = listed.try_next().await.map_err(|e| foreign(doing(), &e))? {
            if meta.last_modified < since {
                old.insert(meta.location.to_string());
            }
        }
        if old.is_empty() {
            return Ok(Vec::new());
        }
        let mut versions = vec![self.clone()];
        for version in keep {
            let then = Self::open_at(&self.uri, Some(*version)).await?;
            versions.extend(then);
        }
        for table in versions {
            for file in table.files().await? {
                forget(&mut old, file.remove.deletion_vector.as_ref());
            }
        }
        let removed = self.removed_since(since).await?;
        Ok(old.difference(&removed).cloned().collect())
    }

    /// Paths of data files, and of files of vectors, that commits since `since` took out of use: readers
    /// of the versions before may be there. A file whose rows were marked was removed before, too, and
    /// added again: only its last removal counts.
    pub(crate) async fn removed_since(
        &self,
        since: chrono::DateTime<Utc>,
    ) -> Result<BTreeSet<String>> {
        let doing = || format!("read the log of {}", self.uri);
        let store = self.store();
        let entries: Vec<_> = store
            .list(Some(&Path::from("_delta_log")))
            .try_filter(|meta| {
                let is_entry = meta.location.extension() == Some("json");
                std::future::ready(is_entry && meta.last_modified >= since)
            })
            .try_collect()
            .await
            .map_err(|e| foreign(doing(), &e))?;
        let reading = entries.into_iter().map(|meta| {
            let store = std::sync::Arc::clone(&store);
            async move { store.get(&meta.location).await?.bytes().await }
        });
        let mut read = futures::stream::iter(reading).buffer_unordered(AT_ONCE);
        let mut found = BTreeSet::new();
        while let Some(entry) = read.try_next().await.map_err(|e| foreign(doing(), &e))? {
            for line in entry.split(|byte| *byte == b'\n') {
                let Ok(action) = serde_json::from_slice::<Value>(line) else { continue };
                // Read as an action, so that its path is decoded.
                let Ok(remove) = serde_json::from_value::<Remove>(action["remove"].clone()) else {
                    continue;
                };
                let vector = remove.deletion_vector.as_ref().map(place_of);
                found.extend(vector.and_then(Result::ok).flatten().map(|(path, _)| path));
                found.insert(remove.path);
            }
        }
        Ok(found)
    }

    /// Files of these actions, and of their vectors, that storage no longer holds.
    pub async fn missing_of(&self, adds: &[&Add]) -> Result<Vec<String>> {
        let mut paths: BTreeSet<String> = adds.iter().map(|add| add.path.clone()).collect();
        paths.extend(vectors_of(adds.iter().copied()));
        self.missing_files(paths.into_iter().collect()).await
    }
}

/// Paths below the table of the files that hold these vectors.
pub(crate) fn vectors_of<'a>(
    adds: impl IntoIterator<Item = &'a Add>,
) -> impl Iterator<Item = String> {
    let vectors = adds.into_iter().filter_map(|add| add.deletion_vector.as_ref());
    vectors.filter_map(|vector| place_of(vector).ok().flatten().map(|(path, _)| path))
}

fn forget(paths: &mut BTreeSet<String>, vector: Option<&DeletionVectorDescriptor>) {
    if let Some(Ok(Some((path, _)))) = vector.map(place_of) {
        paths.remove(&path);
    }
}

/// The action that names a file again, with fewer rows.
fn marked(mark: &Mark<'_>, vector: DeletionVectorDescriptor) -> Result<Add> {
    let file = mark.file;
    // As it is written there: a number that is parsed may come back as another.
    let known = file.stats.as_deref().unwrap_or_default();
    let mut stats: BTreeMap<&str, &RawValue> = serde_json::from_str(known).unwrap_or_default();
    let rows = RawValue::from_string(mark.rows_in_file.to_string()).map_err(Error::internal)?;
    stats.insert("numRecords", &rows);
    // The smallest and largest values may be those of rows that are gone.
    stats.insert("tightBounds", RawValue::FALSE);
    let stats = serde_json::to_string(&stats).map_err(Error::internal)?;
    Ok(Add {
        path: file.path.clone(),
        partition_values: file.partition.clone(),
        size: i64::try_from(file.size).unwrap_or(i64::MAX),
        modification_time: file.modified,
        data_change: true,
        stats: Some(stats),
        tags: None,
        deletion_vector: Some(vector),
        base_row_id: None,
        default_row_commit_version: None,
        clustering_provider: None,
    })
}

fn inline(mut bytes: Vec<u8>, rows: u64) -> Result<DeletionVectorDescriptor> {
    let size = bytes.len();
    // Base 85 takes four bytes at a time; readers pass over what follows the bitmaps.
    bytes.resize(size.next_multiple_of(4), 0);
    Ok(DeletionVectorDescriptor {
        storage_type: StorageType::Inline,
        path_or_inline_dv: z85::encode(&bytes),
        offset: None,
        size_in_bytes: i32::try_from(size).map_err(Error::internal)?,
        cardinality: i64::try_from(rows).map_err(Error::internal)?,
    })
}

/// Vectors that will be one file.
struct Pack {
    id: Uuid,
    bytes: Vec<u8>,
}

impl Default for Pack {
    fn default() -> Self {
        Self { id: Uuid::new_v4(), bytes: Vec::new() }
    }
}

impl Pack {
    fn push(&mut self, vector: &[u8], rows: u64) -> Result<DeletionVectorDescriptor> {
        if self.bytes.is_empty() {
            self.bytes.push(VERSION);
        }
        let offset = i32::try_from(self.bytes.len()).map_err(Error::internal)?;
        let size = i32::try_from(vector.len()).map_err(Error::internal)?;
        self.bytes.extend(size.to_be_bytes());
        self.bytes.extend(vector);
        self.bytes.extend(crc32fast::hash(vector).to_be_bytes());
        Ok(DeletionVectorDescriptor {
            storage_type: StorageType::UuidRelativePath,
            path_or_inline_dv: format!("{FOLDER}{}", z85::encode(self.id.as_bytes())),
            offset: Some(offset),
            size_in_bytes: size,
            cardinality: i64::try_from(rows).map_err(Error::internal)?,
        })
    }

    async fn store(self, table: &Table) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let path = Path::from(format!("{FOLDER}/deletion_vector_{}.bin", self.id));
        let put = table.store().put(&path, self.bytes.into()).await;
        put.map(drop).map_err(|e| foreign(format!("write {path} of {}", table.uri), &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_read_as_it_was_written() {
        for rows in [vec![], vec![0], vec![3, 7, 70_000], vec![1, 5_000_000_000]] {
            let rows: RowSet = rows.into_iter().collect();
            let bytes = encode(&rows).unwrap();
            assert_eq!(decode(&bytes).unwrap(), rows);
            let vector = inline(bytes, rows.len()).unwrap();
            let bytes = z85::decode(&vector.path_or_inline_dv).unwrap();
            assert_eq!(decode(&bytes).unwrap(), rows);
        }
    }

    /// Put together by the format's text: one bitmap of one array container.
    #[test]
    fn a_vector_of_another_writer_is_read() {
        let rows: [u16; 6] = [3, 4, 7, 11, 18, 29];
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(1_u64.to_le_bytes());
        // The upper half of the positions; the cookie without runs, one container at byte 16.
        for number in [0, 12_346, 1, 5 << 16, 16_u32] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(rows.iter().flat_map(|row| row.to_le_bytes()));
        let found: Vec<u64> = decode(&bytes).unwrap().iter().collect();
        assert_eq!(found, rows.map(u64::from));
        assert_eq!(encode(&found.into_iter().collect()).unwrap(), bytes);
    }

    #[test]
    fn the_place_of_a_vectors_file_is_read_from_its_name() {
        let mut pack = Pack::default();
        let vector = pack.push(b"abc", 1).unwrap();
        let (path, offset) = place_of(&vector).unwrap().unwrap();
        assert_eq!(path, format!("_dv/deletion_vector_{}.bin", pack.id));
        assert_eq!(offset, 1);
        assert_eq!(pack.push(b"d", 1).unwrap().offset, Some(1 + 4 + 3 + 4));
    }

    #[test]
    fn a_damaged_vector_is_an_error() {
        let bytes = encode(&[1, 2].into_iter().collect()).unwrap();
        for bad in [&bytes[..3], &bytes[..10], b"____________" as &[u8]] {
            assert!(decode(bad).is_err());
        }
    }
}
