//! The rival of `scripts/bench merge`: a MERGE of the same crate, over the same files, in a process of
//! its own.
//!
//! `delta_rs_merge TABLE KEY,... WAY SOURCE.parquet...`: one MERGE for each source, in order. WAY:
//! `stream` or `collect` (upsert), `delete` (rows with such keys), `insert` (rows without).
//! `delta_rs_merge TABLE KEY,... zorder`: OPTIMIZE ZORDER BY (KEY, ...).

use deltalake::datafusion::prelude::{Expr, ParquetReadOptions, SessionContext, col};
use deltalake::operations::optimize::OptimizeType;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [table, key, way, sources @ ..] = arguments.as_slice() else {
        return Err("TABLE KEY,... stream|collect|delete|insert|zorder SOURCE...".into());
    };
    let key: Vec<String> = key.split(',').map(str::to_owned).collect();
    deltalake::aws::register_handlers(None);
    let url = deltalake::ensure_table_uri(table)?;
    let mut table = deltalake::open_table(url).await?;
    if way == "zorder" {
        table.optimize().with_type(OptimizeType::ZOrder(key)).await?;
        return Ok(());
    }
    let (updates, inserts) = (way == "stream" || way == "collect", way != "delete");
    for source in sources {
        let session = SessionContext::new();
        let rows = session.read_parquet(source, ParquetReadOptions::default()).await?;
        let names = rows.schema().fields().iter().map(|field| field.name().clone());
        // What says how a row is meant is no column of the table.
        let names: Vec<String> = names.filter(|name| name != "op").collect();
        let same = key.iter().map(|key| col(format!("t.{key}")).eq(col(format!("s.{key}"))));
        let same = same.reduce(Expr::and).ok_or("no key")?;
        let mut merge = table
            .merge(rows, same)
            .with_source_alias("s")
            .with_target_alias("t")
            .with_streaming(way != "collect");
        if updates {
            merge = merge.when_matched_update(|update| {
                names
                    .iter()
                    .fold(update, |update, name| update.update(name, col(format!("s.{name}"))))
            })?;
        }
        if inserts {
            merge = merge.when_not_matched_insert(|insert| {
                names.iter().fold(insert, |insert, name| insert.set(name, col(format!("s.{name}"))))
            })?;
        } else {
            merge = merge.when_matched_delete(|delete| delete)?;
        }
        table = merge.await?.0;
    }
    Ok(())
}
