//! The side index of a data file: the rows of its keys, found by the keys' hashes.
//!
//! ```text
//!  header    "ALLUVIX1" · name of the data file (128 bits) · entries · rows of the file · checksum
//!  sections  of up to 65,536 entries, in the order of their hashes over all of the file:
//!            64 bits of each hash · 32 more bits of each · the row of each · checksum
//! ```
//! Numbers are little-endian, checksums xxh3. Equal hashes count as equal keys. The hash is SipHash-1-3
//! (<https://www.aumasson.jp/siphash/siphash.pdf>) with a secret of the cache, of which 96 bits are
//! kept: nobody can prepare keys that meet, and a million keys meet one of a billion others by chance
//! once in 10^13 merges.

use std::io::{Error, ErrorKind, Read, Result, Write};

use siphasher::sip128::SipHasher13;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// What a file begins with.
const MAGIC: &[u8; 8] = b"ALLUVIX1";
/// Bytes of the header.
const HEADER_BYTES: usize = 48;
/// Entries of a section.
const SECTION: usize = 1 << 16;
/// Bytes of an entry.
const ENTRY_BYTES: usize = 16;
/// With fewer keys than one for so many entries, each is searched for.
const SPARSE: usize = 8;

/// What hashes are keyed with.
#[derive(Clone, Copy)]
pub(super) struct Secret(pub(super) [u8; 16]);

impl Secret {
    /// What a key is found by, and what it is told apart by from others that are found there: a hash of
    /// the bytes that it is compared by.
    fn hash(&self, key: &[u8]) -> (u64, u32) {
        let hash = SipHasher13::new_with_key(&self.0).hash(key);
        (hash.h1, hash.h2 as u32)
    }

    /// The entry of a key in this row.
    pub(super) fn entry(&self, key: &[u8], row: u32) -> Entry {
        let (order, check) = self.hash(key);
        Entry { order, check, row }
    }

    /// The hash of a row, as its columns' bytes.
    pub(super) fn content(&self, row: &[u8]) -> [u8; 12] {
        let (first, rest) = self.hash(row);
        let mut content = [0; 12];
        content[..8].copy_from_slice(&first.to_le_bytes());
        content[8..].copy_from_slice(&rest.to_le_bytes());
        content
    }

    /// The name that a text gives.
    pub(super) fn name(&self, text: &str) -> u128 {
        SipHasher13::new_with_key(&self.0).hash(text.as_bytes()).into()
    }
}

/// Where a key is.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    order: u64,
    check: u32,
    row: u32,
}

/// Keys that are looked for, in the order of their hashes; of each it is known whether its row comes.
pub(super) struct Wanted(Vec<(u64, u32, bool)>);

impl Wanted {
    /// Distinct keys, in any order.
    pub(super) fn new<'k>(secret: Secret, keys: impl Iterator<Item = (&'k [u8], bool)>) -> Self {
        let hashed = keys.map(|(key, comes)| {
            let (order, check) = secret.hash(key);
            (order, check, comes)
        });
        let mut keys: Vec<_> = hashed.collect();
        keys.sort_unstable();
        Self(keys)
    }

    /// Those whose hashes lie between two.
    fn between(&self, first: u64, last: u64) -> &[(u64, u32, bool)] {
        let from = self.0.partition_point(|(order, ..)| *order < first);
        let left = &self.0[from..];
        &left[..left.partition_point(|(order, ..)| *order <= last)]
    }
}

/// Writes the index of a data file of `rows` rows.
pub(super) fn write(
    mut out: impl Write,
    name: u128,
    rows: u64,
    entries: &mut [Entry],
) -> Result<()> {
    entries.sort_unstable_by_key(|entry| (entry.order, entry.check));
    out.write_all(&header(name, entries.len() as u64, rows))?;
    let mut section = Vec::with_capacity(SECTION.min(entries.len()) * ENTRY_BYTES);
    for (place, entries) in entries.chunks(SECTION).enumerate() {
        section.clear();
        entries.iter().for_each(|entry| section.extend(entry.order.to_le_bytes()));
        entries.iter().for_each(|entry| section.extend(entry.check.to_le_bytes()));
        entries.iter().for_each(|entry| section.extend(entry.row.to_le_bytes()));
        out.write_all(&section)?;
        out.write_all(&sum_of(&section, name, place).to_le_bytes())?;
    }
    out.flush()
}

/// A section's checksum, which no section of another index or at another place has.
fn sum_of(section: &[u8], name: u128, place: usize) -> u64 {
    xxh3_64_with_seed(section, (name as u64).wrapping_add(place as u64))
}

fn header(name: u128, entries: u64, rows: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..24].copy_from_slice(&name.to_le_bytes());
    header[24..32].copy_from_slice(&entries.to_le_bytes());
    header[32..40].copy_from_slice(&rows.to_le_bytes());
    let sum = xxh3_64(&header[..40]);
    header[40..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// Calls `hit` with each row of a wanted key and whether the key's row comes; returns the rows of the
/// data file. An error: this is not the whole index of that data file, and what was hit counts for
/// nothing.
pub(super) fn find(
    mut input: impl Read,
    name: u128,
    wanted: &Wanted,
    mut hit: impl FnMut(u64, bool),
) -> Result<u64> {
    let mut head = [0; HEADER_BYTES];
    input.read_exact(&mut head)?;
    let (entries, rows) = (number(&head[24..32]), number(&head[32..40]));
    if head != header(name, entries, rows) {
        return Err(damaged("its header"));
    }
    let mut left = usize::try_from(entries).map_err(|_| damaged("its header"))?;
    let mut section = vec![0; SECTION.min(left) * ENTRY_BYTES + 8];
    let mut order = Vec::with_capacity(SECTION.min(left));
    let mut place = 0;
    while left > 0 {
        let count = left.min(SECTION);
        left -= count;
        let section = &mut section[..count * ENTRY_BYTES + 8];
        input.read_exact(section)?;
        let (body, sum) = section.split_at(count * ENTRY_BYTES);
        if sum_of(body, name, place) != number(sum) {
            return Err(damaged("a checksum"));
        }
        place += 1;
        let (hashes, others) = body.split_at(count * 8);
        let (checks, places) = others.split_at(count * 4);
        let (first, last) = (number(&hashes[..8]), number(&hashes[(count - 1) * 8..]));
        let wanted = wanted.between(first, last);
        if wanted.is_empty() {
            continue;
        }
        order.clear();
        order.extend(hashes.chunks_exact(8).map(number));
        let is_sparse = wanted.len() * SPARSE < count;
        let mut at = 0;
        for (of_key, check, comes) in wanted {
            if is_sparse {
                at += order[at..].partition_point(|order| order < of_key);
            } else {
                while order[at] < *of_key {
                    at += 1;
                }
            }
            let same = order[at..].iter().take_while(|order| *order == of_key).count();
            for at in at..at + same {
                let place = at * 4..at * 4 + 4;
                if short(&checks[place.clone()]) == *check {
                    let row = u64::from(short(&places[place]));
                    if row >= rows {
                        return Err(damaged("a row"));
                    }
                    hit(row, *comes);
                }
            }
        }
    }
    Ok(rows)
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("{what} is wrong"))
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn short(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: Secret = Secret([7; 16]);

    fn key(number: u32) -> Vec<u8> {
        format!("key {number}").into_bytes()
    }

    fn index(keys: &[u32]) -> Vec<u8> {
        let places = keys.iter().zip(0..);
        let mut entries: Vec<Entry> =
            places.map(|(number, row)| SECRET.entry(&key(*number), row)).collect();
        let mut bytes = Vec::new();
        write(&mut bytes, 5, keys.len() as u64, &mut entries).unwrap();
        bytes
    }

    fn wanted(keys: impl Iterator<Item = u32>) -> Wanted {
        let keys: Vec<_> = keys.map(|number| (key(number), number % 2 == 0)).collect();
        Wanted::new(SECRET, keys.iter().map(|(key, comes)| (key.as_slice(), *comes)))
    }

    fn found(bytes: &[u8], wanted: &Wanted) -> Result<Vec<(u64, bool)>> {
        let mut hits = Vec::new();
        find(bytes, 5, wanted, |row, comes| hits.push((row, comes)))?;
        hits.sort_unstable();
        Ok(hits)
    }

    #[test]
    fn keys_are_found_over_sections_few_or_many_and_others_are_not() {
        let keys: Vec<u32> = (0..150_000).collect();
        let bytes = index(&keys);
        for step in [1, 3, 20_000] {
            let hits = found(&bytes, &wanted((0..300_000).step_by(step))).unwrap();
            let expected: Vec<_> =
                (0..150_000).step_by(step).map(|row| (row, row % 2 == 0)).collect();
            assert_eq!(hits, expected, "{step}");
        }
        assert_eq!(found(&bytes, &wanted([].into_iter())).unwrap(), []);
        assert_eq!(found(&index(&[]), &wanted(0..9)).unwrap(), []);
    }

    #[test]
    fn every_row_of_a_key_that_is_there_twice_is_found() {
        let bytes = index(&[4, 9, 4, 4]);
        let hits = found(&bytes, &wanted([4].into_iter())).unwrap();
        assert_eq!(hits, [(0, true), (2, true), (3, true)]);
    }

    #[test]
    fn what_is_damaged_cut_or_of_another_file_is_refused() {
        let keys: Vec<u32> = (0..1_000).collect();
        let (bytes, wanted) = (index(&keys), wanted(0..1_000));
        for at in [0, 9, 25, 33, 44, 48, 8_100, 12_100, bytes.len() - 1] {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(found(&bytes, &wanted).is_err(), "{at}");
        }
        for length in [0, 20, 48, 9_000, bytes.len() - 1] {
            assert!(found(&bytes[..length], &wanted).is_err(), "{length}");
        }
        // Sections that changed their places, or are of another index.
        let keys: Vec<u32> = (0..200_000).collect();
        let mut bytes = index(&keys);
        let section = SECTION * ENTRY_BYTES + 8;
        let (one, other) = bytes[HEADER_BYTES..HEADER_BYTES + 2 * section].split_at_mut(section);
        one.swap_with_slice(other);
        assert!(found(&bytes, &wanted).is_err());
        assert!(find(bytes.as_slice(), 6, &wanted, |_, _| {}).is_err());
    }
}
