//! Ranges of files in a store that one reader fetched, kept for a second one: nothing is fetched twice.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use object_store::path::Path;

/// Ranges of files, up to so many bytes.
pub(crate) struct Kept(Mutex<Ranges>);

struct Ranges {
    /// By file, and by where they begin.
    by_file: HashMap<Path, BTreeMap<u64, Bytes>>,
    /// What may still be kept.
    left: usize,
}

impl Kept {
    /// Room for so many bytes.
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Mutex::new(Ranges { by_file: HashMap::new(), left: bytes }))
    }

    /// Nothing more is kept.
    pub(crate) fn close(&self) {
        self.lock().left = 0;
    }

    /// Keeps what begins there, if there is room.
    pub(crate) fn keep(&self, file: &Path, start: u64, bytes: &Bytes) {
        let mut ranges = self.lock();
        let Some(left) = ranges.left.checked_sub(bytes.len()) else { return };
        ranges.left = left;
        // A copy: it may be a part of something larger.
        let bytes = Bytes::copy_from_slice(bytes);
        match ranges.by_file.get_mut(file) {
            Some(of_file) => drop(of_file.insert(start, bytes)),
            None => drop(ranges.by_file.insert(file.clone(), BTreeMap::from([(start, bytes)]))),
        }
    }

    /// These bytes, if they are in a range that was kept.
    pub(crate) fn get(&self, file: &Path, range: &Range<u64>) -> Option<Bytes> {
        let ranges = self.lock();
        let (start, bytes) = ranges.by_file.get(file)?.range(..=range.start).next_back()?;
        let from = usize::try_from(range.start - start).ok()?;
        let to = usize::try_from(range.end - start).ok()?;
        (to <= bytes.len()).then(|| bytes.slice(from..to))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ranges> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_within_a_range_is_known_until_there_is_no_room() {
        let (kept, file) = (Kept::new(10), Path::from("a"));
        kept.keep(&file, 100, &Bytes::from_static(b"01234567"));
        kept.keep(&file, 200, &Bytes::from_static(b"too long"));
        let get = |range| kept.get(&file, &range);
        assert_eq!(get(102..104).as_deref(), Some(b"23".as_slice()));
        assert_eq!(get(100..108).as_deref(), Some(b"01234567".as_slice()));
        assert_eq!([get(99..101), get(104..109), get(200..201)], [None, None, None]);
        assert_eq!(kept.get(&Path::from("b"), &(100..101)), None);
        kept.close();
        kept.keep(&file, 300, &Bytes::from_static(b"0"));
        assert_eq!(get(300..301), None);
    }
}
