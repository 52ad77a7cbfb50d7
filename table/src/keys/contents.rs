//! Hashes of whole rows, kept on this machine beside the side indexes: a row that comes and is as the table
//! has it already is known without a look at the table.
//!
//! ```text
//!  header   "ALLUVIR1" · name of the data file and of the columns (128 bits)
//!  entries  for each row of the data file, in its order: 96 bits of its hash · checksum; else not known so far
//! ```
//! Filled as rows are read for a comparison; several processes may do so at once, as they write the same. What
//! is damaged, or written by half, is not known. Hashes are those of [`super::side`], checksums xxh3 with the
//! name and the row.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use alluvium_protocol::pipeline::SideIndex;
use alluvium_protocol::{Error, Result};
use deltalake::arrow::array::RecordBatch;
use deltalake::arrow::datatypes::SchemaRef;
use deltalake::arrow::row::{RowConverter, SortField};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::cache::{self, Cache, ROWS_MIN};
use super::encode::FORM;
use crate::deletion::RowSet;
use crate::{LiveFile, Table};

/// What a file begins with.
const MAGIC: &[u8; 8] = b"ALLUVIR1";
/// Bytes of the header, and of an entry.
const HEADER_BYTES: u64 = 24;
const ENTRY_BYTES: u64 = 16;
/// Entries read at a time.
const WINDOW: u64 = 4096;

/// The hash of a row.
pub type Content = [u8; 12];

/// Hashes of a table's rows over some columns.
pub struct Contents {
    cache: &'static Cache,
    converter: RowConverter,
    /// What tells these columns of this table apart from all else.
    about: String,
    when: SideIndex,
}

impl Contents {
    /// Over these columns; `None`: they have no hashes, or none are kept.
    pub fn of(table: &Table, columns: &SchemaRef, when: SideIndex) -> Result<Option<Self>> {
        let Some(cache) = cache::kept().filter(|_| when != SideIndex::Off) else { return Ok(None) };
        let kinds = columns.fields().iter().map(|field| field.data_type().clone());
        let fields: Vec<SortField> = kinds.map(SortField::new).collect();
        if fields.is_empty() || !RowConverter::supports_fields(&fields) {
            return Ok(None);
        }
        let converter = RowConverter::new(fields).map_err(Error::internal)?;
        let named = columns.fields().iter().map(|field| (field.name(), field.data_type()));
        let named: Vec<_> = named.collect();
        let about = format!("{FORM:?} {} {} {named:?}", table.uri(), table.id());
        Ok(Some(Self { cache, converter, about, when }))
    }

    /// The hashes of rows, which have exactly these columns.
    pub fn hashes(&self, batch: &RecordBatch) -> Result<Vec<Content>> {
        let rows = self.converter.convert_columns(batch.columns()).map_err(Error::internal)?;
        Ok(rows.iter().map(|row| self.cache.key().content(row.data())).collect())
    }

    /// Adds those hashes of rows of a data file that are known to `known`. Returns the other rows.
    pub fn look_up(&self, file: &LiveFile, rows: &RowSet, known: &mut HashSet<Content>) -> RowSet {
        match self.try_look_up(file, rows, known) {
            Ok(others) => others,
            Err(error) if error.kind() == io::ErrorKind::NotFound => rows.clone(),
            Err(error) => {
                tracing::warn!(%error, "hashes of rows were damaged; they are made anew");
                self.cache.forget_contents(self.name(file));
                rows.clone()
            }
        }
    }

    fn try_look_up(
        &self,
        file: &LiveFile,
        rows: &RowSet,
        known: &mut HashSet<Content>,
    ) -> io::Result<RowSet> {
        let name = self.name(file);
        let held = self.cache.open_contents(name)?;
        check_header(&held, name)?;
        let mut others = RowSet::new();
        let (mut window, mut bytes) = (0..0, Vec::new());
        for row in rows {
            if !window.contains(&row) {
                window = row..row + WINDOW;
                read_window(&held, &window, &mut bytes)?;
            }
            let at = usize::try_from((row - window.start) * ENTRY_BYTES).unwrap_or(usize::MAX);
            let held = bytes.get(at..).and_then(|bytes| bytes.first_chunk::<12>());
            let check = bytes.get(at + 12..).and_then(|bytes| bytes.first_chunk::<4>());
            match held.filter(|content| check == Some(&check_of(content, name, row))) {
                Some(content) => drop(known.insert(*content)),
                None => drop(others.insert(row)),
            }
        }
        Ok(others)
    }

    /// Keeps the hashes of these rows of a data file, ascending, which has `rows_in_file`.
    pub fn note(&self, file: &LiveFile, rows_in_file: u64, rows: &[u64], hashes: &[Content]) {
        if self.when == SideIndex::Auto && rows_in_file < ROWS_MIN {
            return;
        }
        let name = self.name(file);
        let bytes = HEADER_BYTES + rows_in_file * ENTRY_BYTES;
        let noted = self.cache.make_contents(name, bytes).and_then(|(held, is_new)| {
            if is_new {
                held.write_all_at(&header(name), 0)?;
            } else {
                check_header(&held, name)?;
            }
            write_runs(&held, name, rows, hashes)
        });
        if let Err(error) = noted {
            tracing::debug!(%error, "hashes of rows were not kept");
        }
    }

    fn name(&self, file: &LiveFile) -> u128 {
        let LiveFile { path, size, modified, .. } = file;
        self.cache.name(&format!("rows {} {path:?} {size} {modified}", self.about))
    }
}

fn header(name: u128) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&name.to_le_bytes());
    header
}

fn check_header(held: &File, name: u128) -> io::Result<()> {
    let mut found = [0; HEADER_BYTES as usize];
    held.read_exact_at(&mut found, 0)?;
    match found == header(name) {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "another header")),
    }
}

/// Reads entries, as far as there are so many.
fn read_window(held: &File, window: &Range<u64>, bytes: &mut Vec<u8>) -> io::Result<()> {
    let wanted = usize::try_from((window.end - window.start) * ENTRY_BYTES).unwrap_or(0);
    bytes.resize(wanted, 0);
    let mut filled = 0;
    while filled < wanted {
        let at = HEADER_BYTES + window.start * ENTRY_BYTES + filled as u64;
        match held.read_at(&mut bytes[filled..], at)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok(())
}

/// Writes the entries of rows, those that follow one another at once.
fn write_runs(held: &File, name: u128, rows: &[u64], hashes: &[Content]) -> io::Result<()> {
    let mut entries = Vec::new();
    for run in rows.iter().zip(hashes).collect::<Vec<_>>().chunk_by(|a, b| a.0 + 1 == *b.0) {
        entries.clear();
        for (row, content) in run {
            entries.extend_from_slice(*content);
            entries.extend_from_slice(&check_of(content, name, **row));
        }
        held.write_all_at(&entries, HEADER_BYTES + run[0].0 * ENTRY_BYTES)?;
    }
    Ok(())
}

/// The checksum of an entry, which none of another row or file has.
fn check_of(content: &Content, name: u128, row: u64) -> [u8; 4] {
    let sum = xxh3_64_with_seed(content, (name as u64).wrapping_add(row));
    (sum as u32).to_le_bytes()
}
