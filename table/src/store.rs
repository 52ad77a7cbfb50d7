//! Where a URI leads: object stores and log stores.
//!
//! This build knows local paths (`file://` and plain paths). Object storage arrives with the
//! cluster; until then other schemes are refused by name.

use std::path::PathBuf;
use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result};
use deltalake::logstore::{LogStoreRef, StorageConfig, logstore_for};
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, path::Path};
use url::Url;

use crate::classify::foreign;

/// A shared object store.
pub type StoreRef = Arc<dyn ObjectStore>;

/// The local folder a URI names; an error that says so when it is not a local one.
pub fn local_path(uri: &str) -> Result<PathBuf> {
    let refused = |why: &str| {
        Error::new(Code::ConfigInvalid, format!("{uri}: {why}"))
            .with_help("this build carries local paths only; use a path or a file:// URI")
    };
    match uri.split_once("://") {
        None => Ok(PathBuf::from(uri)),
        Some(("file", _)) => Url::parse(uri)
            .ok()
            .and_then(|url| url.to_file_path().ok())
            .ok_or_else(|| refused("not a local path")),
        Some((scheme, _)) => Err(refused(&format!("no storage for the scheme {scheme}://"))),
    }
}

/// The URL of a table or folder, made absolute.
pub fn url_of(uri: &str) -> Result<Url> {
    let path = local_path(uri)?;
    let path = std::path::absolute(&path).map_err(|e| foreign(format!("resolve {uri}"), &e))?;
    Url::from_directory_path(&path)
        .map_err(|()| Error::new(Code::ConfigInvalid, format!("{uri} is not a usable path")))
}

/// A store whose root is `uri`, which need not exist yet.
pub fn object_store_at(uri: &str) -> Result<StoreRef> {
    let path = local_path(uri)?;
    let absolute = std::path::absolute(&path).map_err(|e| foreign(format!("resolve {uri}"), &e))?;
    let prefix = Path::from_absolute_path(&absolute)
        .map_err(|e| Error::new(Code::ConfigInvalid, format!("{uri}: {e}")))?;
    Ok(Arc::new(PrefixStore::new(LocalFileSystem::new(), prefix)))
}

/// The Delta log store of a table's URI.
pub(crate) fn log_store_at(uri: &str) -> Result<LogStoreRef> {
    let url = url_of(uri)?;
    logstore_for(&url, StorageConfig::default())
        .map_err(|e| foreign(format!("open storage of {uri}"), &e))
}
