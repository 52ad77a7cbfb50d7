//! Main with the epochs up to one only, as raw says them now: a version of main, or computed.

use std::collections::BTreeSet;

use alluvium_protocol::marker::Markers;
use alluvium_protocol::pipeline::Mode;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::LiveFile;
use alluvium_table::Table;
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::schema::find_column;
use alluvium_table::session::quoted;

use crate::folding::top_of;
use crate::merge::BASE_VERSION;
use crate::raw;
use crate::restore::versions_with;
use crate::winners::Rule;

/// Where the rows are.
pub enum AsOf {
    /// This version of main holds just them.
    Version(u64),
    /// They are computed from raw: the table is registered.
    Computed,
}

/// Finds main as the fold of all epochs up to `epoch`. Where no version holds just that (later epochs
/// merged in the same commit, or an epoch came late or was read anew), it is registered as `name`, as a
/// query over raw.
///
/// # Errors
/// `UnknownEpoch`: the epoch is not in main. `TableUnreadable`: raw lost an epoch that is needed.
pub async fn as_of(
    session: &SessionContext,
    name: &str,
    pipeline: &Pipeline,
    epoch: Epoch,
) -> Result<AsOf> {
    let unknown = |why: &str| {
        Error::new(Code::UnknownEpoch, format!("epoch {epoch} of {}: {why}", pipeline.id))
            .with_help(format!("`alluvium epochs {}` lists them", pipeline.id))
    };
    let main = Table::open(&pipeline.main).await?.ok_or_else(|| unknown("main does not exist"))?;
    // After main: what it has applied is in this snapshot of raw, too.
    let raw = Table::open(&pipeline.raw).await?.ok_or_else(|| raw::lost(pipeline, &[epoch]))?;
    let of = |table: &Table| Markers::of_pipeline(&pipeline.id, table.transactions());
    let markers = Markers::joined(of(&raw), of(&main));
    let applied = markers.applied();
    if !applied.contains(&epoch) {
        return Err(unknown("it is not in main"));
    }
    let (kept, out): (BTreeSet<Epoch>, BTreeSet<Epoch>) =
        applied.into_iter().partition(|applied| *applied <= epoch);
    // An epoch that is read anew and not merged yet: main still says what raw no longer does.
    let is_pending = kept.iter().any(|epoch| markers.needs_merge(*epoch));
    if out.is_empty() && !is_pending {
        return u64::try_from(main.version()).map(AsOf::Version).map_err(Error::internal);
    }
    for (version, _) in versions_with(&main, pipeline, &markers, &kept, &out).await? {
        let version = u64::try_from(version).map_err(Error::internal)?;
        let Ok(Some(then)) = Table::open_at(main.uri(), Some(version)).await else { continue };
        let adds = then.adds().await?;
        if main.missing_of(&adds.values().collect::<Vec<_>>()).await?.is_empty() {
            return Ok(AsOf::Version(version));
        }
    }
    let lost: Vec<Epoch> = kept.iter().filter(|e| markers.is_lost(**e)).copied().collect();
    if !lost.is_empty() {
        return Err(raw::lost(pipeline, &lost));
    }
    compute(session, name, pipeline, &main, &raw, &kept).await?;
    Ok(AsOf::Computed)
}

async fn compute(
    session: &SessionContext,
    name: &str,
    pipeline: &Pipeline,
    main: &Table,
    raw: &Table,
    kept: &BTreeSet<Epoch>,
) -> Result<()> {
    let doing = "compute main from raw";
    let rule = Rule::new(pipeline, raw);
    let schema = main.schema();
    let columns: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
    let files = match pipeline.content.mode {
        Mode::Snapshot => top_of(raw, kept).await?.map(|(_, files)| files).unwrap_or_default(),
        _ => raw::files_of(raw, kept).await?,
    };
    if files.is_empty() {
        raw.register(session, "applied_of", None).await?;
        let none = session.sql("SELECT * FROM applied_of WHERE FALSE").await;
        let none = none.map_err(|e| foreign(doing, &e))?.into_view();
        session.register_table("applied", none).map_err(|e| foreign(doing, &e))?;
    } else {
        raw.register(session, "applied", Some(&paths_of(&files))).await?;
    }
    let base = main.properties().get(BASE_VERSION).and_then(|text| text.parse().ok());
    if let Some(version) = base {
        let base = Table::open_at(main.uri(), Some(version)).await?;
        let base = base.ok_or_else(|| Error::internal("the base version is gone"))?;
        base.register(session, "base_of", None).await?;
        let held = base.schema();
        let column = |name: &String| match find_column(&held, name) {
            Some(at) => format!("{} AS {}", quoted(held.field(at).name()), quoted(name)),
            None => format!("NULL AS {}", quoted(name)),
        };
        // Named as in main; the key as in raw, whose rows it meets.
        let names = columns.iter().map(|name| rule.key_name(name).unwrap_or(name));
        let list: Vec<String> = names.map(column).collect();
        let sql = format!("SELECT {} FROM base_of", list.join(", "));
        let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
        session.register_table("base", frame.into_view()).map_err(|e| foreign(doing, &e))?;
    }
    let sql = rule.whole(&columns, base.is_some());
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    session.register_table(name, frame.into_view()).map_err(|e| foreign(doing, &e))?;
    for helper in ["applied", "applied_of", "base", "base_of"] {
        session.deregister_table(helper).map_err(|e| foreign(doing, &e))?;
    }
    Ok(())
}

/// Paths of files, as the log spells them.
fn paths_of(files: &[LiveFile]) -> Vec<String> {
    files.iter().map(|file| file.path.clone()).collect()
}
