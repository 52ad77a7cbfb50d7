//! The pinned manifests below the state folder. Storing one allocates its generation.

use std::collections::BTreeMap;

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::Generation;
use alluvium_protocol::pipeline::full_hash;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::classify::foreign;
use alluvium_table::store::{StoreRef, object_store_at};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};

/// The manifests of one pipeline.
pub struct Manifests {
    pipeline: String,
    store: StoreRef,
}

/// A manifest with the hash of its stored bytes.
#[derive(Clone, Debug)]
pub struct Pinned {
    /// The manifest.
    pub manifest: Manifest,
    /// SHA-256 of its bytes.
    pub hash: String,
}

impl Manifests {
    /// The manifests of `pipeline`.
    pub fn open(pipeline: &Pipeline) -> Result<Self> {
        Ok(Self { pipeline: pipeline.id.clone(), store: object_store_at(&pipeline.state)? })
    }

    /// The newest generation by epoch.
    pub async fn newest(&self) -> Result<BTreeMap<Epoch, Generation>> {
        let prefix = Path::from(format!("manifests/{}", self.pipeline));
        let found: Vec<_> = self
            .store
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|e| foreign("list the manifests", &e))?;
        let mut newest = BTreeMap::new();
        for meta in found {
            let parsed = meta.location.filename().and_then(Manifest::parse_name);
            if let Some((epoch, generation)) = parsed {
                let known = newest.entry(epoch).or_insert(generation);
                *known = generation.max(*known);
            }
        }
        Ok(newest)
    }

    /// Reads one manifest; `None`: it does not exist.
    pub async fn load(&self, epoch: Epoch, generation: Generation) -> Result<Option<Pinned>> {
        let path = Manifest::path(&self.pipeline, epoch, generation);
        let doing = || format!("read manifest {path}");
        let body = match self.store.get(&Path::from(path.as_str())).await {
            Ok(found) => found.bytes().await.map_err(|e| foreign(doing(), &e))?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(foreign(doing(), &error)),
        };
        let manifest = serde_json::from_slice(&body).map_err(|e| {
            let help = format!("pin the folder anew: `alluvium replay {} {epoch}`", self.pipeline);
            Error::new(Code::ManifestInvalid, format!("{}: {e}", doing())).with_help(help)
        })?;
        Ok(Some(Pinned { manifest, hash: full_hash(&body) }))
    }

    /// Stores a manifest unless its generation is taken; then the one that took it is returned.
    pub async fn store(&self, manifest: Manifest) -> Result<Pinned> {
        let path = Manifest::path(&self.pipeline, manifest.epoch, manifest.generation);
        let body = serde_json::to_vec_pretty(&manifest).map_err(Error::internal)?;
        let hash = full_hash(&body);
        crash::point("manifest.before_store")?;
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let stored = self.store.put_opts(&Path::from(path.as_str()), body.into(), options).await;
        match stored {
            Ok(_) => {
                crash::point("manifest.after_store")?;
                Ok(Pinned { manifest, hash })
            }
            Err(object_store::Error::AlreadyExists { .. }) => {
                let other = self.load(manifest.epoch, manifest.generation).await?;
                other.ok_or_else(|| {
                    Error::new(Code::StorageUnavailable, format!("{path} exists and does not"))
                })
            }
            Err(error) => Err(foreign(format!("store manifest {path}"), &error)),
        }
    }
}
