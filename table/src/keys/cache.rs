//! The folder of side indexes on this machine: a cache, which anybody may delete at any time.
//!
//! ```text
//!  CACHEDIR.TAG   programs that make backups leave the folder out
//!  secret         what hashes and names are keyed with
//!  3f/….index     the side index of one data file; its name is a hash of all that it is true for
//!  3f/….seen      a data file was scanned once, without an index
//!  3f/….rows      hashes of a data file's rows as wholes
//! ```
//! Nothing in it is believed without a check, and no failure here fails a merge: keys are then read.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use alluvium_protocol::pipeline::SideIndex;
use tempfile::NamedTempFile;
use uuid::Uuid;

use super::side::{self, Entry, Secret, Wanted};

/// <https://bford.info/cachedir/>
const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n# Side indexes of Alluvium: may be deleted at any time.\n";
/// Data files with fewer rows are read faster than an index is.
pub(super) const ROWS_MIN: u64 = 1 << 15;
/// An index that was used within this time keeps its date.
const TOUCH_EVERY: Duration = Duration::from_secs(600);
/// What nobody finished within this time nobody will.
const LEFTOVER_AFTER: Duration = Duration::from_secs(3600);
/// Marks of data files that were scanned once are kept for so long.
const SEEN_FOR: Duration = Duration::from_secs(30 * 86_400);
/// The folder is looked through when a process first writes, and each time that it wrote this part of the
/// limit.
const LOOK_PART: u64 = 16;
/// Begins the names of files that are being written.
const UNFINISHED: &str = ".making-";
/// Letters of a folder's and of an index's name, which make one hash.
const NAME_LETTERS: (usize, usize) = (2, 30);

/// A folder of side indexes.
pub struct Cache {
    folder: PathBuf,
    secret: Secret,
    bytes_max: u64,
    written: AtomicU64,
}

static KEPT: OnceLock<Cache> = OnceLock::new();

/// This process keeps side indexes in `folder`, which is made, up to `bytes_max`.
pub fn keep(folder: &Path, bytes_max: u64) -> io::Result<()> {
    let cache = Cache::open(folder, bytes_max)?;
    // A second folder in one process: the first one is as good.
    drop(KEPT.set(cache));
    Ok(())
}

/// Bytes of what is kept in `folder`.
pub fn bytes_in(folder: &Path) -> u64 {
    files(folder).filter_map(|file| file.metadata().ok()).map(|file| bytes_of(&file)).sum()
}

/// What a file takes: hashes that are not known take nothing.
fn bytes_of(file: &fs::Metadata) -> u64 {
    file.len().min(file.blocks() * 512)
}

/// The cache of this process, if it has one.
pub(super) fn kept() -> Option<&'static Cache> {
    KEPT.get()
}

impl Cache {
    fn open(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        check_owner(folder)?;
        let tag = folder.join("CACHEDIR.TAG");
        if !tag.exists() {
            fs::write(tag, TAG)?;
        }
        let secret = Self::secret(folder)?;
        let cache =
            Self { folder: folder.to_owned(), secret, bytes_max, written: bytes_max.into() };
        Ok(cache)
    }

    /// The folder's secret, which the first process makes. A damaged one is replaced, after which
    /// nothing that is there is found any more.
    fn secret(folder: &Path) -> io::Result<Secret> {
        let path = folder.join("secret");
        let read = || -> io::Result<Option<Secret>> {
            let metadata = fs::metadata(&path)?;
            // A pipe would never end.
            if !metadata.is_file() {
                return Err(io::Error::other(format!("{} is no file", path.display())));
            }
            // What others know, or gave us, is no secret: it is replaced.
            if metadata.mode() & 0o066 != 0 {
                return Ok(None);
            }
            Ok(fs::read(&path)?.try_into().ok().map(Secret))
        };
        let is_there = match read() {
            Ok(Some(secret)) => return Ok(secret),
            Ok(None) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        // Readable for its owner only.
        let mut file = unfinished(folder)?;
        file.write_all(Uuid::new_v4().as_bytes())?;
        match is_there {
            true => drop(file.persist(&path)?),
            // Of two processes that begin together one is first.
            false => drop(file.persist_noclobber(&path)),
        }
        read()?.ok_or_else(|| io::Error::other(format!("{} is damaged", path.display())))
    }

    /// The name of the index of what `text` tells apart from all else.
    pub(super) fn name(&self, text: &str) -> u128 {
        self.secret.name(text)
    }

    /// What hashes are keyed with.
    pub(super) fn key(&self) -> Secret {
        self.secret
    }

    fn path(&self, name: u128, kind: &str) -> PathBuf {
        let name = format!("{name:032x}");
        let (folder, name) = name.split_at(NAME_LETTERS.0);
        self.folder.join(folder).join(format!("{name}.{kind}"))
    }

    /// Calls `hit` with the rows of the wanted keys; returns the rows of the data file. `None`: there is
    /// no such index, or it is damaged and was deleted; then what was hit counts for nothing.
    pub(super) fn find(
        &self,
        name: u128,
        wanted: &Wanted,
        hit: impl FnMut(u64, bool),
    ) -> Option<u64> {
        let path = self.path(name, "index");
        let file = File::open(&path).ok()?;
        match side::find(&file, name, wanted, hit) {
            Ok(rows) => {
                touch(&file);
                Some(rows)
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a side index was damaged; it is made anew");
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// The hashes of a data file's rows.
    pub(super) fn open_contents(&self, name: u128) -> io::Result<File> {
        let held = File::open(self.path(name, "rows"))?;
        touch(&held);
        Ok(held)
    }

    pub(super) fn forget_contents(&self, name: u128) {
        let _ = fs::remove_file(self.path(name, "rows"));
    }

    /// The same, of so many bytes, to be written to; true: it is new, and empty.
    pub(super) fn make_contents(&self, name: u128, bytes: u64) -> io::Result<(File, bool)> {
        let path = self.path(name, "rows");
        parent(&path)?;
        let held =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let is_new = held.metadata()?.len() != bytes;
        if is_new {
            held.set_len(0)?;
            held.set_len(bytes)?;
            self.count(bytes);
        }
        Ok((held, is_new))
    }

    /// An index is there.
    pub(super) fn has(&self, name: u128) -> bool {
        self.path(name, "index").is_file()
    }

    /// A data file of so many rows, which is scanned now, is to have an index from now on: it was
    /// scanned before, and will be again.
    pub(super) fn pays(&self, name: u128, rows: u64, when: SideIndex) -> bool {
        match when {
            SideIndex::Off => false,
            SideIndex::Always => true,
            SideIndex::Auto => {
                if rows < ROWS_MIN {
                    return false;
                }
                let seen = self.path(name, "seen");
                if seen.exists() {
                    return true;
                }
                let noted = parent(&seen).and_then(|()| File::create(&seen));
                if let Err(error) = noted {
                    tracing::debug!(%error, "a scan was not noted");
                }
                false
            }
        }
    }

    /// Keeps the index of a data file of `rows` rows.
    pub(super) fn store(&self, name: u128, rows: u64, mut entries: Vec<Entry>) {
        match self.try_store(name, rows, &mut entries) {
            Ok(bytes) => self.count(bytes),
            Err(error) => tracing::debug!(%error, "a side index was not kept"),
        }
    }

    /// So much was written.
    fn count(&self, bytes: u64) {
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if written > self.bytes_max / LOOK_PART {
            self.written.store(0, Ordering::Relaxed);
            self.evict();
        }
    }

    fn try_store(&self, name: u128, rows: u64, entries: &mut [Entry]) -> io::Result<u64> {
        let path = self.path(name, "index");
        parent(&path)?;
        let folder = path.parent().unwrap_or(&self.folder);
        let file = unfinished(folder)?;
        side::write(BufWriter::new(&file), name, rows, entries)?;
        let bytes = file.as_file().metadata()?.len();
        file.persist(&path)?;
        let _ = fs::remove_file(self.path(name, "seen"));
        Ok(bytes)
    }

    /// Deletes what was not used for longest until what is left fits the limit, and leftovers.
    fn evict(&self) {
        let now = SystemTime::now();
        let mut kept = Vec::new();
        for file in files(&self.folder) {
            let Ok(metadata) = file.metadata() else { continue };
            let used = metadata.modified().unwrap_or(now);
            let age = now.duration_since(used).unwrap_or_default();
            let path = file.path();
            match kind_of(&file) {
                Kind::Index => kept.push((used, bytes_of(&metadata), path)),
                Kind::Seen if age > SEEN_FOR => drop(fs::remove_file(path)),
                Kind::Unfinished if age > LEFTOVER_AFTER => drop(fs::remove_file(path)),
                _ => {}
            }
        }
        kept.sort_unstable();
        let mut bytes: u64 = kept.iter().map(|(_, bytes, _)| bytes).sum();
        if bytes <= self.bytes_max {
            return;
        }
        for (_, size, path) in kept {
            if bytes <= self.bytes_max / 10 * 9 {
                break;
            }
            bytes -= size;
            // Who reads it just now goes on to do so.
            let _ = fs::remove_file(path);
        }
    }
}

fn parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// What is written by the name of something else when it is whole.
fn unfinished(folder: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)
}

/// Whoever can write to the folder can make indexes that are believed: it must be ours alone to write to.
fn check_owner(folder: &Path) -> io::Result<()> {
    let ours = unfinished(folder)?.as_file().metadata()?.uid();
    let metadata = fs::metadata(folder)?;
    if metadata.uid() != ours || metadata.mode() & 0o022 != 0 {
        let text = format!("{} is another user's, or others may write to it", folder.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

/// The files one level below a folder, in folders that are named as ours are.
fn files(folder: &Path) -> impl Iterator<Item = fs::DirEntry> {
    let below = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let is_ours = |entry: &fs::DirEntry| {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        is_folder && is_hash(&entry.file_name(), NAME_LETTERS.0)
    };
    below(folder).filter(is_ours).flat_map(move |entry| below(&entry.path()))
}

enum Kind {
    Index,
    Seen,
    Unfinished,
    /// Somebody else's.
    Other,
}

fn kind_of(file: &fs::DirEntry) -> Kind {
    let name = PathBuf::from(file.file_name());
    if name.to_str().is_some_and(|name| name.starts_with(UNFINISHED)) {
        return Kind::Unfinished;
    }
    let is_ours = name.file_stem().is_some_and(|stem| is_hash(stem, NAME_LETTERS.1));
    match name.extension().and_then(|kind| kind.to_str()) {
        Some("index" | "rows") if is_ours => Kind::Index,
        Some("seen") if is_ours => Kind::Seen,
        _ => Kind::Other,
    }
}

fn is_hash(name: &OsStr, letters: usize) -> bool {
    let is_digit = |letter: u8| matches!(letter, b'0'..=b'9' | b'a'..=b'f');
    name.len() == letters && name.as_encoded_bytes().iter().all(|letter| is_digit(*letter))
}

/// It was used now.
fn touch(file: &File) {
    let now = SystemTime::now();
    let used = file.metadata().and_then(|metadata| metadata.modified());
    let age = used.ok().and_then(|used| now.duration_since(used).ok());
    if age.is_some_and(|age| age > TOUCH_EVERY) {
        let _ = file.set_modified(now);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entries(cache: &Cache, keys: std::ops::Range<u32>) -> Vec<Entry> {
        keys.map(|row| cache.key().entry(&row.to_le_bytes(), row)).collect()
    }

    fn rows_of(cache: &Cache, name: u128, key: u32) -> Option<Vec<u64>> {
        let wanted = Wanted::new(cache.key(), [(&key.to_le_bytes()[..], true)].into_iter());
        let mut rows = Vec::new();
        cache.find(name, &wanted, |row, _| rows.push(row)).map(|_| rows)
    }

    #[test]
    fn an_index_is_found_by_other_processes_and_not_when_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 1 << 30).unwrap();
        let name = cache.name("a file");
        assert_eq!(rows_of(&cache, name, 3), None);
        cache.store(name, 100, entries(&cache, 0..100));
        let other = Cache::open(folder.path(), 1 << 30).unwrap();
        assert_eq!(other.name("a file"), name);
        assert_eq!(rows_of(&other, name, 3), Some(vec![3]));
        assert_eq!(rows_of(&other, name, 100), Some(vec![]));
        let path = cache.path(name, "index");
        let mut bytes = fs::read(&path).unwrap();
        bytes[60] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(rows_of(&other, name, 3), None);
        assert!(!path.exists());
        // Another secret: nothing is found, nothing fails.
        cache.store(name, 100, entries(&cache, 0..100));
        let secret = folder.path().join("secret");
        fs::write(&secret, "short").unwrap();
        let third = Cache::open(folder.path(), 1 << 30).unwrap();
        assert_ne!(third.name("a file"), name);
        // Neither is one that others can read.
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
        let fourth = Cache::open(folder.path(), 1 << 30).unwrap();
        assert_ne!(fourth.name("a file"), third.name("a file"));
        assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_is_scanned_again_is_worth_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 1 << 30).unwrap();
        assert!(!cache.pays(1, ROWS_MIN - 1, SideIndex::Auto));
        assert!(!cache.pays(1, ROWS_MIN - 1, SideIndex::Auto));
        assert!(!cache.pays(2, ROWS_MIN, SideIndex::Auto));
        assert!(cache.pays(2, ROWS_MIN, SideIndex::Auto));
        assert!(cache.pays(3, 1, SideIndex::Always));
        assert!(!cache.pays(2, ROWS_MIN, SideIndex::Off));
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (mode, is_fine) in [(0o700, true), (0o750, true), (0o770, false), (0o1777, false)] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Cache::open(folder.path(), 1 << 30).is_ok(), is_fine, "{mode:o}");
        }
        let made = folder.path().join("made/here");
        Cache::open(&made, 1 << 30).unwrap();
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 200_000).unwrap();
        for (name, age) in [(1, 50), (2, 90), (3, 10)] {
            cache.try_store(name, 5_000, &mut entries(&cache, 0..5_000)).unwrap();
            let file = File::open(cache.path(name, "index")).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        let old = |path: &str| {
            let path = folder.path().join(path);
            parent(&path).unwrap();
            let file = File::create(&path).unwrap();
            file.set_modified(SystemTime::now() - 2 * SEEN_FOR).unwrap();
            path
        };
        let leftovers = [old("00/.making-x"), old("00/000000000000000000000000000000.seen")];
        // The folder may have been somebody's before.
        let others = [old("00/theirs"), old("00/theirs.index"), old("etc/passwd"), old("mine")];
        cache.evict();
        let left: Vec<u128> = (1..4).filter(|name| cache.has(*name)).collect();
        assert_eq!(left, [1, 3]);
        assert!(leftovers.iter().all(|path| !path.exists()));
        assert!(others.iter().all(|path| path.exists()));
    }
}
