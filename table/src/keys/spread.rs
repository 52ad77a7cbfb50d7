//! How a table's keys are spread over its files: whether a range of them is found in a few, or in all.

use alluvium_protocol::{Error, Result};
use deltalake::arrow::array::ArrayRef;
use futures::{StreamExt, TryStreamExt};

use super::bounds::{Bounds, meet_group, meet_stats};
use super::footers::for_arrow;
use crate::classify::foreign;
use crate::schema::find_column;
use crate::{LiveFile, Table};

/// The largest files tell for the rest.
const FILES_MAX: usize = 16;

/// How often a row group of these files is read on average, when each range of values between two that follow one
/// another in `bounds` is looked for by itself in this column. 0.0 without rows.
pub async fn readings(
    table: &Table,
    files: &[LiveFile],
    column: &str,
    bounds: &ArrayRef,
) -> Result<f64> {
    let schema = table.schema();
    let at = find_column(&schema, column).ok_or_else(|| Error::internal(column))?;
    let kind = schema.field(at).data_type();
    let ranges = (1..bounds.len()).map(|to| {
        let mut range = Bounds::default();
        range.extend(&bounds.slice(to - 1, 2), kind);
        [range]
    });
    let (ranges, names) = (ranges.collect::<Vec<_>>(), [schema.field(at).name().clone()]);
    let mut largest: Vec<&LiveFile> = files.iter().collect();
    largest.sort_by_key(|file| std::cmp::Reverse(file.size));
    largest.truncate(FILES_MAX);
    let looks = largest.into_iter().map(|file| {
        let (ranges, names) = (&ranges, &names);
        async move {
            let doing = || format!("read {} of {}", file.path, table.uri());
            let footer = table.footer(&file.path, file.size).await?;
            let footer = for_arrow(footer).map_err(|e| foreign(doing(), &e))?;
            let own = find_column(footer.schema(), &names[0]);
            let own = own.map(|at| footer.schema().field(at).name().as_str());
            let (mut read, mut all) = (0, 0);
            for group in footer.metadata().row_groups() {
                let rows = u64::try_from(group.num_rows()).unwrap_or(0);
                all += rows;
                let meets = |range: &&[Bounds; 1]| {
                    meet_stats(*range, names, file.stats.as_deref())
                        && meet_group(*range, &[own], &footer, group)
                };
                read += rows * ranges.iter().filter(meets).count() as u64;
            }
            Ok::<_, Error>((read, all))
        }
    });
    let looks = futures::stream::iter(looks.collect::<Vec<_>>()).buffered(FILES_MAX);
    let sum =
        |(read, all), of_file: (u64, u64)| async move { Ok((read + of_file.0, all + of_file.1)) };
    let (read, all) = looks.try_fold((0, 0), sum).await?;
    Ok(if all == 0 { 0.0 } else { read as f64 / all as f64 })
}
