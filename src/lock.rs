//! One `alluvium run` per state folder: a second one is told who is first.
//!
//! Safety does not rest on it (commits are compare-and-swap); it saves two processes the trouble.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::classify::foreign;
use alluvium_table::store::{Place, StoreRef, object_store_at, place_of};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::printer;

/// Tests switch the lock off to run two at once.
const NO_LOCK: &str = "ALLUVIUM_TEST_NO_LOCK";
/// The lock's name below the state folder.
const NAME: &str = "run.lock";
/// On object storage a lock that was not renewed for so long is a dead process's.
const LOCK_TTL: Duration = Duration::from_secs(15);
/// Three renewals fit in.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// How often a lock that is in the way is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Held while the process works on the state. The system releases a local one when the process dies;
/// one on object storage runs out.
pub(crate) struct StateLock {
    _file: Option<File>,
    remote: Option<(StoreRef, AbortOnDropHandle<()>)>,
}

impl StateLock {
    /// Lets the next one in at once.
    pub(crate) async fn release(self) {
        if let Some((store, renewing)) = self.remote {
            drop(renewing);
            if let Err(error) = store.delete(&Key::from(NAME)).await {
                tracing::debug!(%error, "the lock was not released; it runs out");
            }
        }
    }
}

/// Takes the lock; `lost` is cancelled when somebody else takes it over.
pub(crate) async fn take(state: &str, lost: CancellationToken) -> Result<StateLock> {
    if std::env::var_os(NO_LOCK).is_some() {
        return Ok(StateLock { _file: None, remote: None });
    }
    match place_of(state)? {
        Place::Local(folder) => take_local(&folder),
        Place::Remote(_) => take_remote(state, lost).await,
    }
}

fn locked(place: &str, holder: &str) -> Error {
    let text = format!("{place} is in use by {}", holder.trim());
    let help = "wait for it or stop it; `alluvium status` works meanwhile";
    Error::new(Code::StateLocked, text).with_help(help)
}

/// Who holds the lock, for whoever finds it.
fn holder() -> String {
    let host = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    format!(
        "alluvium, process {} on {}, since {}\n",
        std::process::id(),
        host.trim(),
        chrono::Utc::now().format("%Y-%m-%d %H:%M:%S UTC")
    )
}

/// An object that is renewed; each renewal demands that it is still ours.
async fn take_remote(state: &str, lost: CancellationToken) -> Result<StateLock> {
    let store = object_store_at(state)?;
    let key = Key::from(NAME);
    let doing = || format!("lock the state folder {state}");
    let body = holder();
    let mut seen: Option<(Option<String>, Instant)> = None;
    let version = loop {
        let mode = match &seen {
            // Nobody renewed it: its holder is dead.
            Some((etag, since)) if since.elapsed() > LOCK_TTL => {
                PutMode::Update(UpdateVersion { e_tag: etag.clone(), version: None })
            }
            _ => PutMode::Create,
        };
        let options = PutOptions { mode, ..PutOptions::default() };
        match store.put_opts(&key, body.clone().into(), options).await {
            Ok(put) => break put.e_tag,
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => {}
            // It was released meanwhile: from the start. Else the bucket is missing.
            Err(object_store::Error::NotFound { .. }) if seen.is_some() => seen = None,
            Err(error) => return Err(foreign(doing(), &error)),
        }
        let found = match store.get(&key).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => continue,
            Err(error) => return Err(foreign(doing(), &error)),
        };
        let etag = found.meta.e_tag.clone();
        match &seen {
            Some((known, _)) if *known != etag => {
                let text = found.bytes().await.map_err(|e| foreign(doing(), &e))?;
                return Err(locked(state, &String::from_utf8_lossy(&text)));
            }
            Some(_) => {}
            None => {
                printer::say(&format!("{state} is locked; looking whether its holder lives"));
                seen = Some((etag, Instant::now()));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let renewing = tokio::spawn(renew(store.clone(), key, body, version, lost));
    Ok(StateLock { _file: None, remote: Some((store, AbortOnDropHandle::new(renewing))) })
}

async fn renew(
    store: StoreRef,
    key: Key,
    body: String,
    mut etag: Option<String>,
    lost: CancellationToken,
) {
    for beat in 0_u64.. {
        tokio::time::sleep(RENEW_EVERY).await;
        let version = UpdateVersion { e_tag: etag.clone(), version: None };
        let options = PutOptions { mode: PutMode::Update(version), ..PutOptions::default() };
        // Another text each time: the tag of an object may be a hash of it.
        let text = format!("{body}{beat}\n");
        match store.put_opts(&key, text.into(), options).await {
            Ok(put) => etag = put.e_tag,
            Err(
                object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. },
            ) => {
                printer::warn("another process took the state over; this one stops");
                lost.cancel();
                return;
            }
            // Safety does not rest on it.
            Err(error) => tracing::warn!(%error, "the lock was not renewed"),
        }
    }
}

/// A lock of the operating system on a file.
fn take_local(folder: &Path) -> Result<StateLock> {
    let path = folder.join(NAME);
    let doing = || format!("lock the state folder {}", folder.display());
    std::fs::create_dir_all(folder).map_err(|e| foreign(doing(), &e))?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| foreign(doing(), &e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut found = String::new();
            let _ = file.read_to_string(&mut found);
            return Err(locked(&folder.display().to_string(), &found));
        }
        Err(TryLockError::Error(error)) => return Err(foreign(doing(), &error)),
    }
    let text = holder();
    let written =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    written.map_err(|e| foreign(doing(), &e))?;
    Ok(StateLock { _file: Some(file), remote: None })
}
