//! Gates: an epoch that is unlike the ones before it is held, and no table is touched. What a person
//! asks for passes.

use std::collections::BTreeMap;

use alluvium_protocol::manifest::{Manifest, Reason};
use alluvium_protocol::pipeline::Gates;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use alluvium_table::Table;
use alluvium_table::arrow::array::{Array, AsArray};
use alluvium_table::arrow::datatypes::Int64Type;
use alluvium_table::classify::foreign;
use alluvium_table::session::work_session;

use crate::aside;
use crate::incoming::Incoming;
use crate::raw::EPOCH;
use crate::refusals::{Judged, read_through};

/// Epochs that an epoch is compared with: the nearest ones below it.
const EARLIER: usize = 10;
/// A whole, in hundredths of a percent.
const WHOLE: u64 = 10_000;

/// Holds the epoch back, if it is to be.
///
/// # Errors
/// `GateClosed`, with the counts.
pub(crate) async fn check(
    pipeline: &Pipeline,
    manifest: &Manifest,
    raw: Option<&Table>,
    incoming: &Incoming,
    judged: &Judged,
) -> Result<()> {
    let gates = pipeline.content.gates;
    let is_asked_for =
        matches!(manifest.reason, Reason::Replay) || manifest.reason.is_empty_content();
    if gates == Gates::default() || is_asked_for {
        return Ok(());
    }
    let closed = |why: String| {
        let help = format!(
            "is the folder whole? deliver it again; or let it pass: `alluvium replay {} {}`",
            pipeline.id, manifest.epoch
        );
        Err(Error::new(Code::GateClosed, format!("{}: {why}", manifest.folder)).with_help(help))
    };
    let (content, refused) = counts(pipeline, incoming, judged).await?;
    if let Some(most) = gates.refused_max
        && refused * WHOLE > most * incoming.rows()
    {
        return closed(format!(
            "{refused} of {} rows are refused ({}); gate.refused_max is {}",
            incoming.rows(),
            reasons(pipeline, incoming, judged).await?,
            shown(most)
        ));
    }
    let Some(usual) = usual_rows(raw, manifest.epoch).await? else { return Ok(()) };
    if let Some(least) = gates.rows_min
        && content * WHOLE < least * usual
    {
        return closed(format!(
            "it has {content} rows, epochs before it had {usual} (the median); gate.rows_min is {}",
            shown(least)
        ));
    }
    match gates.rows_max {
        Some(most) if content * WHOLE > most * usual => closed(format!(
            "it has {content} rows, epochs before it had {usual} (the median); gate.rows_max is {}",
            shown(most)
        )),
        _ => Ok(()),
    }
}

fn shown(share: u64) -> String {
    format!("{}%", share as f64 / 100.0)
}

/// Rows that would enter raw, and rows that are refused.
async fn counts(pipeline: &Pipeline, incoming: &Incoming, judged: &Judged) -> Result<(u64, u64)> {
    if incoming.rows() == 0 {
        return Ok((0, 0));
    }
    let doing = "count the folder's rows";
    let session = work_session(pipeline.sizes.memory_bytes);
    let aside = aside::new();
    incoming.register(&session, "incoming", &aside)?;
    judged.register(&session).await?;
    let frame = session.sql("SELECT count(*) FROM accepted").await;
    let frame = frame.map_err(|e| foreign(doing, &e))?;
    let batches = frame.collect().await.map_err(|e| foreign(doing, &e))?;
    let batch = batches.first().ok_or_else(|| Error::internal("a count without a row"))?;
    let content = u64::try_from(batch.column(0).as_primitive::<Int64Type>().value(0)).unwrap_or(0);
    let filtered = aside.lock().unwrap_or_else(std::sync::PoisonError::into_inner).filtered;
    Ok((content, incoming.rows().saturating_sub(content + filtered)))
}

/// `null_key 1, first row 0 of b.csv; type:value 20, first row 3 of a.csv`
async fn reasons(pipeline: &Pipeline, incoming: &Incoming, judged: &Judged) -> Result<String> {
    let aside = aside::new();
    let all = work_session(pipeline.sizes.memory_bytes);
    incoming.register(&all, "incoming", &aside)?;
    read_through(&all).await?;
    let session = work_session(pipeline.sizes.memory_bytes);
    incoming.register(&session, "incoming", &aside::new())?;
    judged.set_aside(&session, &aside).await?;
    let refused = aside.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    let mut reasons: BTreeMap<String, (u64, String)> = BTreeMap::new();
    for batch in refused.finish()?.batches()? {
        let batch = batch?;
        let text = |at: usize| batch.column(at).as_string::<i32>();
        let (files, rows, why) = (text(0), batch.column(1).as_primitive::<Int64Type>(), text(2));
        for at in 0..batch.num_rows() {
            let place = || match rows.is_valid(at) {
                true => format!("row {} of {}", rows.value(at), files.value(at)),
                false => files.value(at).to_owned(),
            };
            reasons.entry(why.value(at).to_owned()).or_insert_with(|| (0, place())).0 += 1;
        }
    }
    let told = reasons.iter().map(|(reason, (count, at))| format!("{reason} {count}, first {at}"));
    Ok(told.collect::<Vec<_>>().join("; "))
}

/// The median of rows of the nearest epochs below; `None`: there is none.
async fn usual_rows(raw: Option<&Table>, epoch: Epoch) -> Result<Option<u64>> {
    let Some(raw) = raw else { return Ok(None) };
    let mut rows: BTreeMap<Epoch, u64> = BTreeMap::new();
    for file in raw.files().await? {
        let value = file.partition.get(EPOCH).cloned().flatten();
        let Some(of) = value.and_then(|value| value.parse::<Epoch>().ok()) else { continue };
        if of < epoch {
            *rows.entry(of).or_default() += file.rows.unwrap_or(0);
        }
    }
    let mut nearest: Vec<u64> = rows.into_values().rev().take(EARLIER).collect();
    nearest.sort_unstable();
    let middle = nearest.len() / 2;
    Ok(match nearest.len() % 2 {
        _ if nearest.is_empty() => None,
        0 => Some(nearest[middle - 1].midpoint(nearest[middle])),
        _ => Some(nearest[middle]),
    })
}
