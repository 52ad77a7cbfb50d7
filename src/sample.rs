//! Sample data: researcher metrics keyed by `pguid`, in daily epoch folders, at any size.
//!
//! The same seed, rows and epochs make the same files. Each later epoch holds 80 % updates, 18 %
//! inserts and 2 % deletes of keys that earlier epochs made.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use alluvium_protocol::Result;
use alluvium_table::arrow::array::{ArrayRef, Float64Array, Int32Array, RecordBatch, StringArray};
use alluvium_table::classify::foreign;
use alluvium_table::parquet::arrow::ArrowWriter;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The first sample epoch: 2023-11-14 22:13:20 UTC.
const FIRST_EPOCH: i64 = 1_700_000_000;
/// A folder a day.
const DAY: i64 = 86_400;
/// Data files in a folder.
const FILES: u64 = 3;
/// Rows made at a time: memory stays small at any size.
const BATCH_ROWS: u64 = 65_536;

/// 32-bit counters of the real input, in its order.
const COUNTERS: [&str; 10] = [
    "wos_count",
    "tot_cites",
    "grant_count",
    "intl_collab_docs",
    "max_year",
    "min_year",
    "hindex",
    "highly_cited_docs",
    "top_10_percent_docs",
    "cites_from_patents",
];

/// How much is made.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Rows in each epoch.
    pub(crate) rows: u64,
    /// The same seed makes the same data.
    pub(crate) seed: u64,
}

/// The name of the `index`th sample epoch.
pub(crate) fn epoch(index: u64) -> i64 {
    FIRST_EPOCH + DAY * i64::try_from(index).unwrap_or(0)
}

/// Writes the `index`th folder below `source`; without `complete` its `_SUCCESS` file is missing.
pub(crate) fn write(source: &Path, index: u64, size: Size, complete: bool) -> Result<()> {
    let folder = source.join(epoch(index).to_string());
    let doing = || format!("write sample folder {}", folder.display());
    std::fs::create_dir_all(&folder).map_err(|e| foreign(doing(), &e))?;
    let mut random = StdRng::seed_from_u64(size.seed.wrapping_mul(1_000_003).wrapping_add(index));
    // Inserts of all earlier epochs: these keys exist.
    let inserts = size.rows * 18 / 100;
    let mut known = if index == 0 { 0 } else { size.rows + inserts * (index - 1) };
    let mut left = size.rows;
    for part in 0..FILES {
        let mut rows = left / (FILES - part);
        left -= rows;
        let path = folder.join(format!("part-{part}.parquet"));
        let file = File::create(&path).map_err(|e| foreign(doing(), &e))?;
        let mut writer: Option<ArrowWriter<File>> = None;
        let mut file = Some(file);
        while rows > 0 {
            let count = rows.min(BATCH_ROWS);
            rows -= count;
            let batch = batch(&mut random, index, count, &mut known)?;
            if let Some(file) = file.take() {
                let made = ArrowWriter::try_new(file, batch.schema(), None);
                writer = Some(made.map_err(|e| foreign(doing(), &e))?);
            }
            if let Some(writer) = &mut writer {
                writer.write(&batch).map_err(|e| foreign(doing(), &e))?;
            }
        }
        if let Some(writer) = writer {
            writer.close().map_err(|e| foreign(doing(), &e))?;
        }
    }
    if complete {
        std::fs::write(folder.join("_SUCCESS"), b"done\n").map_err(|e| foreign(doing(), &e))?;
    }
    Ok(())
}

fn batch(random: &mut StdRng, index: u64, rows: u64, known: &mut u64) -> Result<RecordBatch> {
    let mut keys = Vec::new();
    let mut ops = Vec::new();
    for _ in 0..rows {
        let dice = random.random_range(0..100);
        let (key, op) = if index == 0 || (80..98).contains(&dice) {
            *known += 1;
            (*known - 1, "I")
        } else if dice < 80 {
            (random.random_range(0..*known), "U")
        } else {
            (random.random_range(0..*known), "D")
        };
        keys.push(guid(key));
        ops.push(op);
    }
    let mut columns: Vec<(&str, ArrayRef)> =
        vec![("pguid", Arc::new(StringArray::from(keys)) as ArrayRef)];
    for name in COUNTERS {
        let values: Int32Array = (0..rows).map(|_| Some(counter(random, name))).collect();
        columns.push((name, Arc::new(values)));
    }
    let awards: Float64Array =
        (0..rows).map(|_| Some(f64::from(random.random_range(0..5_000_000)) / 100.0)).collect();
    columns.push(("award_amount_usd", Arc::new(awards)));
    columns.push(("op", Arc::new(StringArray::from(ops))));
    RecordBatch::try_from_iter(columns).map_err(alluvium_protocol::Error::internal)
}

fn counter(random: &mut StdRng, name: &str) -> i32 {
    match name {
        "max_year" => random.random_range(2015..2026),
        "min_year" => random.random_range(1970..2015),
        "hindex" => random.random_range(0..80),
        "tot_cites" => random.random_range(0..20_000),
        _ => random.random_range(0..300),
    }
}

/// A key that looks like the real ones and scatters: neighbours in number are not neighbours here.
fn guid(number: u64) -> String {
    uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, &number.to_le_bytes()).to_string()
}
