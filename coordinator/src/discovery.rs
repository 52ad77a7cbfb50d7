//! What is in a source: epoch folders, and everything else told apart by name.
//!
//! Lists with the delimiter `/`; never reads data, never decides whether a folder is complete.

use std::collections::{BTreeMap, BTreeSet};

use alluvium_protocol::manifest::Object;
use alluvium_protocol::pipeline::{Format, Ready};
use alluvium_protocol::{Code, Epoch, Error, FolderName, Pipeline, Result};
use alluvium_table::classify::foreign;
use alluvium_table::store::{Place, StoreRef, object_store_at, place_of};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use regex::Regex;

/// Names of junk that are kept for people; the rest is only counted.
const JUNK_NAMES_MAX: usize = 20;

/// A pipeline's source.
pub struct Source {
    uri: String,
    store: StoreRef,
    include: Option<Regex>,
    exclude: Option<Regex>,
    /// The file that says that a folder is complete: never data, whatever its name.
    sign: Option<String>,
    /// Folders are Delta tables.
    is_delta: bool,
}

/// One listing of the source's first level.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Folder names by epoch; more than one name is an error of the producer.
    pub folders: BTreeMap<Epoch, Vec<String>>,
    /// Things that are named like an epoch but are not folders.
    pub files: BTreeMap<Epoch, String>,
    /// Names that are no epochs, the first few.
    pub junk: BTreeSet<String>,
    /// How many such names there are.
    pub junk_count: usize,
}

/// One listing of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Data files by name.
    pub objects: Vec<Object>,
    /// Names of all other files: markers, hidden, empty and excluded ones.
    pub others: BTreeSet<String>,
    /// Those of them that would be data, but are empty.
    pub empty: BTreeSet<String>,
}

impl Contents {
    /// A value that is equal only for equal listings of data files.
    pub fn fingerprint(&self) -> String {
        let text: Vec<String> = self
            .objects
            .iter()
            .map(|o| format!("{}\u{0}{}\u{0}{:?}", o.name, o.size, o.etag))
            .collect();
        alluvium_protocol::pipeline::full_hash(text.join("\u{1}").as_bytes())
    }
}

fn pattern(text: &Option<String>, setting: &str) -> Result<Option<Regex>> {
    let Some(text) = text else { return Ok(None) };
    // The whole name must match, as people expect of `.*\.parquet`.
    let regex = Regex::new(&format!("^(?:{text})$"));
    regex.map(Some).map_err(|e| Error::new(Code::ConfigInvalid, format!("{setting}: {e}")))
}

impl Source {
    /// The source of a pipeline.
    pub fn open(pipeline: &Pipeline) -> Result<Self> {
        Ok(Self {
            uri: pipeline.source.clone(),
            store: object_store_at(&pipeline.source)?,
            include: pattern(&pipeline.include, "files.include")?,
            exclude: pattern(&pipeline.exclude, "files.exclude")?,
            sign: match &pipeline.ready {
                Ready::Marker(name) | Ready::Manifest(name) => Some(name.clone()),
                Ready::Quiet(_) => None,
            },
            is_delta: pipeline.content.format == Format::Delta,
        })
    }

    /// Lists the epoch folders.
    pub async fn list(&self) -> Result<Listing> {
        if let Place::Local(path) = place_of(&self.uri)? {
            check_folder(&path, &self.uri)?;
        }
        let listed = self.store.list_with_delimiter(None).await;
        let listed = listed.map_err(|e| foreign(format!("list {}", self.uri), &e))?;
        let mut listing = Listing::default();
        for prefix in listed.common_prefixes {
            let Some(name) = prefix.filename() else { continue };
            match FolderName::parse(name) {
                FolderName::Epoch(epoch) => {
                    listing.folders.entry(epoch).or_default().push(name.to_owned());
                }
                FolderName::Junk | FolderName::OutOfRange => listing.add_junk(name),
            }
        }
        for object in listed.objects {
            let Some(name) = object.location.filename() else { continue };
            match FolderName::parse(name) {
                FolderName::Epoch(epoch) => drop(listing.files.insert(epoch, name.to_owned())),
                FolderName::Junk | FolderName::OutOfRange => listing.add_junk(name),
            }
        }
        Ok(listing)
    }

    /// Lists one folder, with everything below it.
    pub async fn contents(&self, folder: &str) -> Result<Contents> {
        let prefix = Path::from(folder);
        let found: Vec<_> = self
            .store
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|e| foreign(format!("list {}/{folder}", self.uri), &e))?;
        let mut contents = Contents::default();
        for meta in found {
            let Some(parts) = meta.location.prefix_match(&prefix) else { continue };
            let name = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            if name.is_empty() {
                continue;
            }
            let is_data = self.is_data(&name);
            if meta.size == 0 || !is_data {
                if is_data {
                    contents.empty.insert(name.clone());
                }
                contents.others.insert(name);
                continue;
            }
            let object =
                Object { name, size: meta.size, etag: meta.e_tag, modified: meta.last_modified };
            contents.objects.push(object);
        }
        contents.objects.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(contents)
    }

    /// Reads a small file of a folder (a manifest that the producer wrote).
    pub async fn read(&self, folder: &str, name: &str) -> Result<Vec<u8>> {
        let path = Path::from(format!("{folder}/{name}"));
        let doing = || format!("read {}/{path}", self.uri);
        let found = self.store.get(&path).await.map_err(|e| foreign(doing(), &e))?;
        Ok(found.bytes().await.map_err(|e| foreign(doing(), &e))?.to_vec())
    }

    fn is_data(&self, name: &str) -> bool {
        // What a Delta table's log says is part of what it holds.
        if self.is_delta && name.starts_with("_delta_log/") {
            return !name.ends_with(".crc") && !name.ends_with("/_last_checkpoint");
        }
        let is_hidden = name.split('/').any(|part| part.starts_with(['_', '.']));
        !is_hidden
            && self.sign.as_deref() != Some(name)
            && !name.ends_with(".crc")
            && self.include.as_ref().is_none_or(|regex| regex.is_match(name))
            && !self.exclude.as_ref().is_some_and(|regex| regex.is_match(name))
    }
}

/// A local source that is not there would list as empty.
fn check_folder(path: &std::path::Path, uri: &str) -> Result<()> {
    let why = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => "it is not a folder".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!("the source {uri} cannot be listed: {why}");
    Err(Error::new(Code::SourceUnreadable, text)
        .with_help("create the folder, or correct `source` in the configuration"))
}

impl Listing {
    fn add_junk(&mut self, name: &str) {
        self.junk_count += 1;
        if self.junk.len() < JUNK_NAMES_MAX {
            self.junk.insert(name.to_owned());
        }
    }
}
