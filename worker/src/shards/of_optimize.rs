//! Several bins of an optimize at a time. It waits for no bin that nobody began: a merge that comes must not.

use std::collections::HashSet;

use alluvium_protocol::task::Task;
use alluvium_protocol::{Pipeline, Result};
use alluvium_table::write::Written;
use alluvium_table::{LiveFile, Table};
use serde::{Deserialize, Serialize};

use super::{Product, Shared};
use crate::checks::agree;
use crate::optimize::{Order, write_bin};
use crate::tables::Tables;
use crate::{Permit, Workshop};

/// Paths of main's files, by bin.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    main_version: i64,
    pub(super) bins: Vec<Vec<String>>,
}

impl Job {
    pub(super) async fn carry_out(
        &self,
        tables: &Tables,
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let main = tables.at(&pipeline.main, self.main_version).await?;
        let part: HashSet<&String> = self.bins[number].iter().collect();
        let mut bin = main.files().await?;
        bin.retain(|file| part.contains(&file.path));
        let order = Order::of(&main, pipeline)?;
        write_bin(&main, pipeline, &bin, &order, permit).await.map(Product::of)
    }
}

/// Has bins written anew, one at least. Files of those that were, what became of them, and how many they are.
pub(crate) async fn in_pieces(
    workshop: &Workshop,
    task: &Task,
    (main, bins): (&Table, &[Vec<LiveFile>]),
    permit: &Permit,
) -> Result<(Vec<LiveFile>, Written, u64)> {
    let paths = |bin: &Vec<LiveFile>| bin.iter().map(|file| file.path.clone()).collect();
    let job = Job { main_version: main.version(), bins: bins.iter().map(paths).collect() };
    let shared = Shared::begin(workshop, task, super::Job::Optimize(job), permit).await?;
    let products = shared.gather().await;
    shared.end().await;
    let (mut done, mut written, mut pieces) = (Vec::new(), Written::default(), 0);
    for (bin, product) in bins.iter().zip(products?) {
        let Some(product) = product else { continue };
        pieces += 1;
        // A helper may be of another version.
        if let Some(rows) = bin.iter().map(LiveFile::live_rows).sum::<Option<u64>>() {
            agree("optimize.piece", "rows of a bin", rows, product.rows, main.uri())?;
        }
        done.extend(bin.iter().cloned());
        written.adds.extend(product.adds);
        written.rows += product.rows;
    }
    Ok((done, written, pieces))
}
