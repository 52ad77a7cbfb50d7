//! A set of keys in memory: about 40 bytes a key, and the key.
//!
//! A hash only says where to look; a key is found when its bytes are equal. Most keys of a table are not
//! in the set, so they are asked in blocks: first a filter of two bits a key (Bloom), which stays in the
//! processor's cache, for the whole block without a branch, so that its reads of memory overlap; then the
//! slots for the few that passed.

use std::hash::{BuildHasher, RandomState};

use alluvium_protocol::{Code, Error, Result};
use deltalake::arrow::array::ArrayRef;
use deltalake::arrow::datatypes::DataType;
use deltalake::parquet::arrow::arrow_reader::ArrowReaderMetadata;
use deltalake::parquet::file::metadata::RowGroupMetaData;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::bounds::{Bounds, meet_group, meet_stats};
use super::encode::{Encoded, Encoder};

/// Keys asked together.
const BLOCK: usize = 512;
/// Bits of the filter for each key.
const FILTER_BITS: usize = 16;
/// Slots for each key: a search ends soon at an empty one.
const SLOTS: usize = 2;

/// Distinct keys, each with one thing known of it: its row comes, or only goes.
pub struct KeySet {
    encoder: Encoder,
    seed: u64,
    /// All keys' bytes, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    hashes: Vec<u64>,
    comes: Vec<bool>,
    /// The upper half of a key's hash, and its number plus one; 0 is empty.
    slots: Vec<u64>,
    filter: Vec<u64>,
    types: Vec<DataType>,
    bounds: Vec<Bounds>,
    /// The values of single columns, where they are asked for.
    columns: Vec<(usize, KeySet)>,
}

impl KeySet {
    /// An empty set of keys with columns of these types, with room for `keys`. Of the columns at
    /// `apart` it can be asked, too, whether any key has a value in them.
    pub fn new(types: &[DataType], keys: usize, apart: &[usize]) -> Result<Self> {
        let encoder = Encoder::new(types).map_err(|e| unusable(&e))?;
        let mut set = Self {
            encoder,
            // Nobody can prepare keys that all fall into one slot.
            seed: RandomState::new().hash_one(0),
            bytes: Vec::new(),
            ends: Vec::with_capacity(keys),
            hashes: Vec::with_capacity(keys),
            comes: Vec::with_capacity(keys),
            slots: Vec::new(),
            filter: Vec::new(),
            types: types.to_vec(),
            bounds: vec![Bounds::default(); types.len()],
            columns: Vec::new(),
        };
        for at in apart {
            set.columns.push((*at, Self::new(&types[*at..=*at], 0, &[])?));
        }
        set.make_room(keys);
        Ok(set)
    }

    /// Adds a batch's keys; `comes` says of each row whether it is one that comes. A key that is there
    /// comes when one of its rows does. A key with a NULL in it is in no set.
    pub fn add(&mut self, columns: &[ArrayRef], comes: &dyn Fn(usize) -> bool) -> Result<()> {
        let encoded = self.encode(columns)?;
        encoded.each(|row, key| self.insert(key, comes(row)));
        for ((bounds, column), kind) in self.bounds.iter_mut().zip(columns).zip(&self.types) {
            bounds.extend(column, kind);
        }
        for (at, values) in &mut self.columns {
            values.add(&columns[*at..=*at], &|_| true)?;
        }
        Ok(())
    }

    /// A file with these statistics (as its log has them) may hold a key of the set.
    pub(super) fn is_within(&self, names: &[String], stats: Option<&str>) -> bool {
        meet_stats(&self.bounds, names, stats)
    }

    /// A row group may hold a key of the set; `names` are the file's columns.
    pub(super) fn may_be_in(
        &self,
        footer: &ArrowReaderMetadata,
        group: &RowGroupMetaData,
        names: &[Option<&str>],
    ) -> bool {
        meet_group(&self.bounds, names, footer, group)
    }

    /// A key has this value, one row, in its column at `at`; unknown unless it is one of those apart.
    pub(super) fn has_in_column(&self, at: usize, value: &ArrayRef) -> Result<bool> {
        let Some((_, values)) = self.columns.iter().find(|(column, _)| *column == at) else {
            return Ok(true);
        };
        let mut is_there = false;
        values.find_in(std::slice::from_ref(value), |_, _| is_there = true)?;
        Ok(is_there)
    }

    fn insert(&mut self, key: &[u8], comes: bool) {
        let hash = xxh3_64_with_seed(key, self.seed);
        if let Some(at) = self.find(key, hash) {
            self.comes[at] |= comes;
            return;
        }
        if (self.len() + 1) * SLOTS > self.slots.len() {
            self.make_room(self.len() * 2 + 1);
        }
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
        self.hashes.push(hash);
        self.comes.push(comes);
        self.enter(self.len() - 1);
    }

    /// Slots and filter for so many keys, with those that are there.
    fn make_room(&mut self, keys: usize) {
        self.slots = vec![0; (keys.max(32) * SLOTS).next_power_of_two()];
        self.filter = vec![0; (keys.max(32) * FILTER_BITS / 64).next_power_of_two()];
        for at in 0..self.len() {
            self.enter(at);
        }
    }

    fn enter(&mut self, at: usize) {
        let hash = self.hashes[at];
        let word = self.word_of(hash);
        self.filter[word] |= bits_of(hash);
        let mut slot = self.slot_of(hash);
        while self.slots[slot] != 0 {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = (hash >> 32 << 32) | (at as u64 + 1);
    }

    fn word_of(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.filter.len() - 1)
    }

    fn slot_of(&self, hash: u64) -> usize {
        (hash >> 12) as usize & (self.slots.len() - 1)
    }

    fn find(&self, key: &[u8], hash: u64) -> Option<usize> {
        let mut slot = self.slot_of(hash);
        loop {
            let held = self.slots[slot];
            if held == 0 {
                return None;
            }
            let at = (held as u32 - 1) as usize;
            if held >> 32 == hash >> 32 && self.key(at) == key {
                return Some(at);
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    fn key(&self, at: usize) -> &[u8] {
        let from = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[from..self.ends[at]]
    }

    /// Calls `hit` with each row of these columns whose key is in the set, in order, and whether the
    /// key's row comes.
    pub fn find_in(&self, columns: &[ArrayRef], hit: impl FnMut(usize, bool)) -> Result<()> {
        self.find_encoded(&self.encode(columns)?, hit);
        Ok(())
    }

    /// These columns' keys as bytes, as this set compares them.
    pub(super) fn encode(&self, columns: &[ArrayRef]) -> Result<Encoded> {
        self.encoder.encode(columns).map_err(|e| unusable(&e))
    }

    /// The same as [`Self::find_in`].
    pub(super) fn find_encoded(&self, encoded: &Encoded, mut hit: impl FnMut(usize, bool)) {
        let mut block: Vec<(usize, u64)> = Vec::with_capacity(BLOCK);
        let mut passed = vec![0; BLOCK];
        encoded.each(|row, key| {
            block.push((row, xxh3_64_with_seed(key, self.seed)));
            if block.len() == BLOCK {
                self.find_block(encoded, &block, &mut passed, &mut hit);
                block.clear();
            }
        });
        self.find_block(encoded, &block, &mut passed, &mut hit);
    }

    fn find_block(
        &self,
        encoded: &Encoded,
        block: &[(usize, u64)],
        passed: &mut [usize],
        hit: &mut impl FnMut(usize, bool),
    ) {
        for at in self.passing(block, passed) {
            let (row, hash) = block[*at];
            let mut space = [0; 8];
            if let Some(found) = self.find(encoded.key(row, &mut space), hash) {
                hit(row, self.comes[found]);
            }
        }
    }

    /// The keys as bytes, each with whether its row comes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], bool)> {
        (0..self.len()).map(|at| (self.key(at), self.comes[at]))
    }

    /// What its keys are compared as.
    pub(super) fn types(&self) -> &[DataType] {
        &self.types
    }

    /// A key is the bytes of its one column: it can be asked for as they are.
    pub(super) fn is_bytes(&self) -> bool {
        self.encoder.is_bytes()
    }

    /// The same as [`Self::find_in`] for keys as bytes, each with its row.
    pub(super) fn find_bytes(&self, keys: &[(u64, &[u8])], mut hit: impl FnMut(u64, bool)) {
        let mut block: Vec<(usize, u64)> = Vec::with_capacity(BLOCK);
        let mut passed = vec![0; BLOCK];
        for keys in keys.chunks(BLOCK) {
            block.clear();
            let hashed =
                |(at, (_, key)): (usize, &(u64, &[u8]))| (at, xxh3_64_with_seed(key, self.seed));
            block.extend(keys.iter().enumerate().map(hashed));
            for at in self.passing(&block, &mut passed) {
                let ((row, key), hash) = (keys[*at], block[*at].1);
                if let Some(found) = self.find(key, hash) {
                    hit(row, self.comes[found]);
                }
            }
        }
    }

    /// The positions in a block of the hashes that the filter lets pass.
    fn passing<'p>(&self, block: &[(usize, u64)], passed: &'p mut [usize]) -> &'p [usize] {
        let mut count = 0;
        for (at, (_, hash)) in block.iter().enumerate() {
            let bits = bits_of(*hash);
            passed[count] = at;
            count += usize::from(self.filter[self.word_of(*hash)] & bits == bits);
        }
        &passed[..count]
    }

    /// Keys in it.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// No key is in it.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Memory that it takes, and that it takes to ask side indexes for its keys.
    pub fn bytes(&self) -> usize {
        16 * self.len()
            + self.bytes.capacity()
            + 8 * (self.ends.capacity() + self.hashes.capacity())
            + self.comes.capacity()
            + 8 * (self.slots.len() + self.filter.len())
    }
}

fn bits_of(hash: u64) -> u64 {
    1 << (hash & 63) | 1 << (hash >> 6 & 63)
}

fn unusable(error: &deltalake::arrow::error::ArrowError) -> Error {
    Error::new(Code::ColumnTypeMismatch, format!("compare keys: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use deltalake::arrow::array::{Date32Array, Float64Array, Int32Array, Int64Array, StringArray};

    use super::*;

    fn found(set: &KeySet, columns: &[ArrayRef]) -> Vec<(usize, bool)> {
        let mut hits = Vec::new();
        set.find_in(columns, |row, comes| hits.push((row, comes))).unwrap();
        hits
    }

    #[test]
    fn keys_are_found_among_many_and_others_are_not() {
        let mut set = KeySet::new(&[DataType::Utf8], 0, &[]).unwrap();
        let key = |number: i32| format!("key {number}");
        let even = StringArray::from_iter_values((0..5_000).map(|n| key(n * 2)));
        set.add(&[Arc::new(even)], &|row| row % 2 == 0).unwrap();
        let all = StringArray::from_iter_values((0..12_000).map(key));
        let hits = found(&set, &[Arc::new(all)]);
        let expected: Vec<_> = (0..5_000).map(|n| (n * 2, n % 2 == 0)).collect();
        assert_eq!(hits, expected);
        assert_eq!(set.len(), 5_000);
    }

    #[test]
    fn a_key_comes_when_one_of_its_rows_does() {
        let mut set = KeySet::new(&[DataType::Int64], 3, &[]).unwrap();
        let keys: ArrayRef = Arc::new(Int64Array::from(vec![1, 1, 2]));
        set.add(std::slice::from_ref(&keys), &|row| row == 1).unwrap();
        assert_eq!(set.len(), 2);
        assert_eq!(found(&set, &[keys]), [(0, true), (1, true), (2, false)]);
    }

    #[test]
    fn keys_of_several_columns_and_other_types_are_compared_as_the_sets() {
        let mut set = KeySet::new(&[DataType::Int64, DataType::Utf8], 2, &[]).unwrap();
        let number = |values: Vec<i32>| Arc::new(Int32Array::from(values)) as ArrayRef;
        let text = |values: Vec<Option<&str>>| Arc::new(StringArray::from(values)) as ArrayRef;
        set.add(&[number(vec![1, 2]), text(vec![Some("a"), None])], &|_| true).unwrap();
        // A NULL is equal to nothing.
        assert_eq!(set.len(), 1);
        let asked = [number(vec![1, 1, 2, 2]), text(vec![Some("b"), Some("a"), None, Some("a")])];
        assert_eq!(found(&set, &asked), [(1, true)]);
    }

    #[test]
    fn days_and_floats_are_keys() {
        let mut days = KeySet::new(&[DataType::Date32], 1, &[]).unwrap();
        let day = |values: Vec<i32>| Arc::new(Date32Array::from(values)) as ArrayRef;
        days.add(&[day(vec![-3])], &|_| true).unwrap();
        assert_eq!(found(&days, &[day(vec![3, -3])]), [(1, true)]);
        let mut floats = KeySet::new(&[DataType::Float64], 1, &[]).unwrap();
        let float = |values: Vec<f64>| Arc::new(Float64Array::from(values)) as ArrayRef;
        floats.add(&[float(vec![f64::NAN, 0.5])], &|_| true).unwrap();
        let hits = found(&floats, &[float(vec![0.5, f64::NAN, 1.0])]);
        assert_eq!(hits, [(0, true), (1, true)]);
    }
}
