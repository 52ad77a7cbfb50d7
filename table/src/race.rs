//! The race that commits rest on: of many writers that put one object if it is absent, one wins.

use std::sync::Arc;

use alluvium_protocol::{Code, Error, Result};
use futures::future::join_all;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use uuid::Uuid;

use crate::classify::foreign;
use crate::store::object_store_at;

/// Writers at once.
const WRITERS: usize = 8;
/// Rounds: a server that checks and then acts loses nearly each one.
const ROUNDS: usize = 5;

/// Races for a few probe objects below `uri`, and deletes them. Err(`StorageUnsafe`): not exactly one
/// writer won. A local folder that is not there yet is made.
pub async fn race(uri: &str) -> Result<()> {
    let store = object_store_at(uri)?;
    for _ in 0..ROUNDS {
        let key = Path::from(format!("_alluvium_probe/{}", Uuid::new_v4()));
        let puts = (0..WRITERS).map(|writer| {
            let (store, key) = (Arc::clone(&store), key.clone());
            let body = format!("writer {writer}");
            tokio::spawn(async move {
                let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                store.put_opts(&key, body.into(), options).await
            })
        });
        let mut winners = 0;
        let mut failure = None;
        for put in join_all(puts).await {
            match put.map_err(Error::internal)? {
                Ok(_) => winners += 1,
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(error) => failure = Some(foreign(format!("write below {uri}"), &error)),
            }
        }
        // Probes are small, and left ones harm nobody.
        let _ = store.delete(&key).await;
        if let Some(error) = failure.filter(|_| winners == 0) {
            return Err(error);
        }
        if winners != 1 {
            let text =
                format!("{winners} of {WRITERS} writers won the race for one object of {uri}");
            return Err(Error::new(Code::StorageUnsafe, text)
                .with_help("`alluvium explain AL-0408` names storage that keeps the condition"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_local_disk_lets_one_writer_win() {
        let folder = tempfile::tempdir().unwrap();
        race(folder.path().to_str().unwrap()).await.unwrap();
    }
}
