//! The rival of `scripts/bench merge`: a MERGE (upsert by one key) of the same crate, over the same
//! files, in a process of its own.
//!
//! `delta_rs_merge TABLE KEY stream|collect SOURCE.parquet...`: one MERGE for each source, in order.
//! `delta_rs_merge TABLE KEY zorder`: OPTIMIZE ZORDER BY (KEY).

use deltalake::datafusion::prelude::{ParquetReadOptions, SessionContext, col};
use deltalake::operations::optimize::OptimizeType;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [table, key, way, sources @ ..] = arguments.as_slice() else {
        return Err("TABLE KEY stream|collect|zorder SOURCE...".into());
    };
    let url = deltalake::ensure_table_uri(table)?;
    let mut table = deltalake::open_table(url).await?;
    if way == "zorder" {
        table.optimize().with_type(OptimizeType::ZOrder(vec![key.clone()])).await?;
        return Ok(());
    }
    for source in sources {
        let session = SessionContext::new();
        let rows = session.read_parquet(source, ParquetReadOptions::default()).await?;
        let names: Vec<String> =
            rows.schema().fields().iter().map(|field| field.name().clone()).collect();
        let same = col(format!("t.{key}")).eq(col(format!("s.{key}")));
        let merge = table
            .merge(rows, same)
            .with_source_alias("s")
            .with_target_alias("t")
            .with_streaming(way == "stream")
            .when_matched_update(|update| {
                names
                    .iter()
                    .fold(update, |update, name| update.update(name, col(format!("s.{name}"))))
            })?
            .when_not_matched_insert(|insert| {
                names.iter().fold(insert, |insert, name| insert.set(name, col(format!("s.{name}"))))
            })?;
        table = merge.await?.0;
    }
    Ok(())
}
