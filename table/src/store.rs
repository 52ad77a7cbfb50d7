//! Where a URI leads: object stores and log stores.
//!
//! Local paths (`file://` and plain ones) and S3 (`s3://`, `s3a://`, and every server that speaks it).
//! Credentials come from `[storage]` ([`configure`]) or, without them, from the usual chain of the AWS
//! tools. Clients are made once per bucket and kept: they hold connections and credentials.

use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use alluvium_protocol::{Code, Error, Result};
use deltalake::aws::storage::S3ObjectStoreFactory;
use deltalake::logstore::{
    LogStoreRef, ObjectStoreFactory, StorageConfig, default_logstore, logstore_for,
};
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, path::Path};
use url::Url;

use crate::classify::foreign;
use crate::log_cache::LogCache;
use crate::uploads::CleanUploads;

/// A shared object store.
pub type StoreRef = Arc<dyn ObjectStore>;

/// How long one request is repeated before its step fails and the coordinator takes over: an outage of
/// a minute costs no attempt, and is over soon after it is over.
const RETRIES: [(&str, &str); 3] =
    [("retry_timeout", "60s"), ("max_retries", "100"), ("backoff_config.max_backoff", "5s")];

/// For verbs that a person waits for.
const BRIEF_RETRIES: [(&str, &str); 3] =
    [("retry_timeout", "5s"), ("max_retries", "4"), ("backoff_config.max_backoff", "1s")];
static IS_BRIEF: AtomicBool = AtomicBool::new(false);

/// From here on this process gives up on storage after seconds instead of a minute.
pub fn be_brief() {
    IS_BRIEF.store(true, Ordering::Relaxed);
}

/// Options of all locations that begin with a prefix.
#[derive(Clone, Default)]
pub struct StorageOptions {
    /// Such as `s3://bucket/`; empty: every location.
    pub prefix: String,
    /// Names as `object_store` has them, such as `aws_endpoint_url`.
    pub options: HashMap<String, String>,
}

impl std::fmt::Debug for StorageOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The options hold secrets.
        f.debug_struct("StorageOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// The name of an option that a storage here understands.
pub fn is_option(name: &str) -> bool {
    use object_store::ClientConfigKey;
    use object_store::aws::AmazonS3ConfigKey;
    const RETRIES: [&str; 5] = [
        "max_retries",
        "retry_timeout",
        "backoff_config.init_backoff",
        "backoff_config.max_backoff",
        "backoff_config.base",
    ];
    RETRIES.contains(&name)
        || name == "aws_s3_allow_unsafe_rename"
        || AmazonS3ConfigKey::from_str(name).is_ok()
        || ClientConfigKey::from_str(name).is_ok()
}

static CONFIGURED: OnceLock<Vec<StorageOptions>> = OnceLock::new();

/// Sets the options of this process, once, before the first location is opened.
pub fn configure(options: Vec<StorageOptions>) {
    // Set before: the first configuration of a process stays.
    let _ = CONFIGURED.set(options);
}

/// Where a location is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A folder of this machine.
    Local(PathBuf),
    /// Below a bucket; the URL ends with a slash.
    Remote(Url),
}

/// Reads a location. Schemes without a storage here are refused by name.
pub fn place_of(uri: &str) -> Result<Place> {
    let refused = |why: &str| {
        let help = "use a path, a file:// URI, or s3://BUCKET/PREFIX";
        Error::new(Code::ConfigInvalid, format!("{uri}: {why}")).with_help(help)
    };
    let Some((scheme, rest)) = uri.split_once("://") else {
        // `dbfs:/x`, `hdfs:/x`: a place of another system, not a folder of that name.
        let before = uri.split_once(":/").map_or("", |(scheme, _)| scheme);
        if before.len() > 1 && before.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(refused(&format!("no storage for the scheme {before}:/")));
        }
        return Ok(Place::Local(PathBuf::from(uri)));
    };
    match scheme {
        "file" => {
            let path = Url::parse(uri).ok().and_then(|url| url.to_file_path().ok());
            path.map(Place::Local).ok_or_else(|| refused("not a local path"))
        }
        "s3" | "s3a" => {
            let url = Url::parse(&format!("s3://{}/", rest.trim_end_matches('/')));
            let url = url.map_err(|e| refused(&e.to_string()))?;
            if url.host_str().is_none_or(str::is_empty) {
                return Err(refused("names no bucket"));
            }
            if url.query().is_some() || url.fragment().is_some() {
                return Err(refused("`?` and `#` cannot be part of a location"));
            }
            Ok(Place::Remote(url))
        }
        _ => Err(refused(&format!("no storage for the scheme {scheme}://"))),
    }
}

/// The local folder a URI names; an error that says so when it is not a local one.
pub fn local_path(uri: &str) -> Result<PathBuf> {
    match place_of(uri)? {
        Place::Local(path) => Ok(path),
        Place::Remote(_) => {
            Err(Error::new(Code::ConfigInvalid, format!("{uri} is not a folder of this machine")))
        }
    }
}

/// The URL of a table or folder, made absolute.
pub fn url_of(uri: &str) -> Result<Url> {
    let path = match place_of(uri)? {
        Place::Remote(url) => return Ok(url),
        Place::Local(path) => path,
    };
    let path = std::path::absolute(&path).map_err(|e| foreign(format!("resolve {uri}"), &e))?;
    Url::from_directory_path(&path)
        .map_err(|()| Error::new(Code::ConfigInvalid, format!("{uri} is not a usable path")))
}

/// A store whose root is `uri`, which need not exist yet.
pub fn object_store_at(uri: &str) -> Result<StoreRef> {
    match place_of(uri)? {
        Place::Local(path) => {
            let absolute =
                std::path::absolute(&path).map_err(|e| foreign(format!("resolve {uri}"), &e))?;
            let prefix = Path::from_absolute_path(&absolute)
                .map_err(|e| Error::new(Code::ConfigInvalid, format!("{uri}: {e}")))?;
            Ok(Arc::new(PrefixStore::new(LocalFileSystem::new(), prefix)))
        }
        Place::Remote(url) => {
            let (root, _) = bucket(&url)?;
            Ok(Arc::new(PrefixStore::new(root, prefix_of(&url)?)))
        }
    }
}

/// The Delta log store of a table's URI.
pub(crate) fn log_store_at(uri: &str) -> Result<LogStoreRef> {
    match place_of(uri)? {
        Place::Local(_) => {
            let url = url_of(uri)?;
            logstore_for(&url, StorageConfig::default())
                .map_err(|e| foreign(format!("open storage of {uri}"), &e))
        }
        Place::Remote(url) => {
            let (root, config) = bucket(&url)?;
            let prefixed = Arc::new(PrefixStore::new(Arc::clone(&root), prefix_of(&url)?));
            Ok(default_logstore(prefixed, root, &url, &config))
        }
    }
}

/// Bucket and prefix of a remote location, decoded; `None`: it is on this machine.
pub fn bucket_and_prefix(uri: &str) -> Result<Option<(String, String)>> {
    match place_of(uri)? {
        Place::Local(_) => Ok(None),
        Place::Remote(url) => {
            let bucket = url.host_str().unwrap_or_default().to_owned();
            Ok(Some((bucket, prefix_of(&url)?.to_string())))
        }
    }
}

fn prefix_of(url: &Url) -> Result<Path> {
    Path::from_url_path(url.path())
        .map_err(|e| Error::new(Code::ConfigInvalid, format!("{url}: {e}")))
}

type Buckets = Mutex<HashMap<(String, usize), (StoreRef, StorageConfig)>>;

/// The store of a whole bucket, made at first use.
fn bucket(url: &Url) -> Result<(StoreRef, StorageConfig)> {
    static BUCKETS: OnceLock<Buckets> = OnceLock::new();
    let configured = CONFIGURED.get().map(Vec::as_slice).unwrap_or_default();
    // The longest prefix that fits; the first entry, without one, fits all.
    let chosen = configured
        .iter()
        .enumerate()
        .filter(|(_, options)| url.as_str().starts_with(&options.prefix))
        .max_by_key(|(_, options)| options.prefix.len());
    let index = chosen.map_or(usize::MAX, |(index, _)| index);
    let key = (url.host_str().unwrap_or_default().to_owned(), index);
    let buckets = BUCKETS.get_or_init(Mutex::default);
    if let Some(found) = buckets.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Ok(found.clone());
    }
    let mut options = chosen.map(|(_, chosen)| chosen.options.clone()).unwrap_or_default();
    let retries = if IS_BRIEF.load(Ordering::Relaxed) { BRIEF_RETRIES } else { RETRIES };
    for (name, value) in retries {
        options.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    let failed = |e: &deltalake::DeltaTableError| {
        foreign(format!("open the bucket {}", key.0), e).with_help(
            "set [storage] in the configuration, or the AWS_* variables; `alluvium doctor`",
        )
    };
    let config = StorageConfig::parse_options(options).map_err(|e| failed(&e))?;
    // Two that come here at once make two clients; the second one stays. Harmless.
    let (root, _) =
        S3ObjectStoreFactory::default().parse_url_opts(url, &config).map_err(|e| failed(&e))?;
    let made: (StoreRef, StorageConfig) =
        (Arc::new(LogCache::new(Arc::new(CleanUploads(root)))), config);
    buckets.lock().unwrap_or_else(PoisonError::into_inner).insert(key, made.clone());
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart_and_foreign_schemes_refused_by_name() {
        assert_eq!(place_of("./a/b").unwrap(), Place::Local("./a/b".into()));
        assert_eq!(place_of("file:///a").unwrap(), Place::Local("/a".into()));
        for same in ["s3://bucket/a", "s3a://bucket/a/", "s3://bucket/a//"] {
            let url = Url::parse("s3://bucket/a/").unwrap();
            assert_eq!(place_of(same).unwrap(), Place::Remote(url), "{same}");
        }
        for (bad, named) in [
            ("gs://bucket/a", "gs://"),
            ("dbfs:/mnt/a", "dbfs:/"),
            ("abfss://c@a.dfs.core.windows.net/x", "abfss://"),
            ("s3:///a", "bucket"),
            ("s3://bucket/a?b", "`?`"),
        ] {
            let error = place_of(bad).unwrap_err();
            assert!(error.message.contains(named), "{bad}: {error}");
        }
    }
}
