//! One `alluvium run` per state folder: a second one is told who is first.
//!
//! Safety does not rest on it (commits are compare-and-swap); it saves two processes the trouble.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::classify::foreign;
use alluvium_table::store::local_path;

/// Tests switch the lock off to run two at once.
const NO_LOCK: &str = "ALLUVIUM_TEST_NO_LOCK";

/// Held while the process works on the state; the system releases it when the process dies.
pub(crate) struct StateLock {
    _file: Option<File>,
}

/// Takes the lock of a state folder.
pub(crate) fn take(state: &str) -> Result<StateLock> {
    if std::env::var_os(NO_LOCK).is_some() {
        return Ok(StateLock { _file: None });
    }
    let folder = local_path(state)?;
    let path = folder.join("run.lock");
    let doing = || format!("lock the state folder {}", folder.display());
    std::fs::create_dir_all(&folder).map_err(|e| foreign(doing(), &e))?;
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
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let text = format!("{} is in use by {}", folder.display(), holder.trim());
            let help = "wait for it or stop it; `alluvium status` works meanwhile";
            return Err(Error::new(Code::StateLocked, text).with_help(help));
        }
        Err(TryLockError::Error(error)) => return Err(foreign(doing(), &error)),
    }
    let host = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let text = format!(
        "alluvium, process {} on {}, since {}\n",
        std::process::id(),
        host.trim(),
        chrono::Utc::now().format("%Y-%m-%d %H:%M:%S UTC")
    );
    let written =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    written.map_err(|e| foreign(doing(), &e))?;
    Ok(StateLock { _file: Some(file) })
}
