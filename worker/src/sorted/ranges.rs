//! Ranges of keys, of which each is walked through by itself, maybe in another process.
//!
//! ```text
//!            a..g      g..p      p..z
//!  epoch 3   ▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒     a page that two ranges have rows in is read twice
//!  epoch 5     ▒▒▒▒▒▒│▒▒▒▒▒▒▒▒│▒▒▒▒
//! ```
//! Where pages begin is not believed either: rows passed over in all ranges must be the rows of the files.

use std::collections::HashMap;
use std::ops::Range as Span;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::RecordBatch;
use alluvium_table::arrow::row::Rows;
use alluvium_table::deletion::RowSet;
use alluvium_table::rows::Pick;
use alluvium_table::stretches::Stretches;
use alluvium_table::{LiveFile, Table};
use futures::{StreamExt, TryStreamExt};

use super::cuts::Cuts;
use super::{Columns, RUNS_AT_ONCE, rows_by};
use crate::ground::columns_of;
use crate::winners::Rule;

/// What of some files a range is of.
pub(super) struct Range {
    /// Files that may have rows of it.
    pub(super) files: Vec<LiveFile>,
    /// By path, where these rows are.
    spans: HashMap<String, Span<u64>>,
    /// Rows in these places.
    pub(super) rows: u64,
    pub(super) reach: Reach,
}

/// Keys from one on, and below another, as arrow's row format has them.
#[derive(Clone, Default)]
pub(super) struct Reach {
    from: Option<Vec<u8>>,
    below: Option<Vec<u8>>,
}

impl Reach {
    /// Those of sorted keys that are of it.
    pub(super) fn within(&self, keys: &Rows) -> Span<usize> {
        let first_from = |bound: &Vec<u8>| {
            let (mut from, mut to) = (0, keys.num_rows());
            while from < to {
                let middle = from.midpoint(to);
                if keys.row(middle).data() < bound.as_slice() {
                    from = middle + 1;
                } else {
                    to = middle;
                }
            }
            from
        };
        let from = self.from.as_ref().map_or(0, first_from);
        from..self.below.as_ref().map_or(keys.num_rows(), first_from).max(from)
    }

    /// A key between these may be of it.
    fn meets(&self, least: &[u8], most: &[u8]) -> bool {
        self.from.as_ref().is_none_or(|from| most >= from.as_slice())
            && self.below.as_ref().is_none_or(|below| least < below.as_slice())
    }
}

impl Cuts {
    /// What of these files is of a range.
    pub(super) async fn range(
        &self,
        raw: &Table,
        rule: &Rule,
        files: &[LiveFile],
        number: usize,
    ) -> Result<Range> {
        let columns = Columns::new(raw, rule, &rule.key)?;
        let bounds = rows_by(&columns.by_key, &columns.key, &self.bounds()?)?;
        let cut = |at: usize| bounds.row(at).data().to_vec();
        let (is_first, is_last) = (number == 0, number + 2 >= bounds.num_rows());
        let reach = Reach {
            from: (!is_first).then(|| cut(number)),
            below: (!is_last).then(|| cut(number + 1)),
        };
        let told = told(raw, rule, files).await?;
        let told = told.ok_or_else(|| Error::internal("a file does not tell of its pages"))?;
        let least = keys_of(&columns, told.iter().map(|of_file| &of_file.least))?;
        let most = keys_of(&columns, told.iter().map(|of_file| &of_file.most))?;
        let mut range = Range { files: Vec::new(), spans: HashMap::new(), rows: 0, reach };
        for (file, of_file) in told.iter().enumerate() {
            let meets = |at: &usize| {
                range.reach.meets(least[file].row(*at).data(), most[file].row(*at).data())
            };
            let stretches = 0..of_file.starts.len() - 1;
            let (first, last) = (stretches.clone().find(meets), stretches.rev().find(meets));
            let (Some(first), Some(last)) = (first, last) else { continue };
            let span = of_file.starts[first]..of_file.starts[last + 1];
            range.rows += span.end - span.start;
            range.spans.insert(files[file].path.clone(), span);
            range.files.push(files[file].clone());
        }
        Ok(range)
    }
}

impl Range {
    /// Where a file has rows of it.
    pub(super) fn pick(&self, file: &LiveFile) -> Pick {
        let mut rows = RowSet::new();
        if let Some(span) = self.spans.get(&file.path) {
            rows.insert_range(span.clone());
        }
        Pick::Only(rows)
    }
}

/// What these files tell of their pages' keys; `None`: one does not.
pub(super) async fn told(
    raw: &Table,
    rule: &Rule,
    files: &[LiveFile],
) -> Result<Option<Vec<Stretches>>> {
    let key = columns_of(&raw.schema(), &rule.key)?;
    let looks = files.iter().map(|file| raw.stretches(file, &key)).collect::<Vec<_>>();
    let told: Vec<Option<Stretches>> =
        futures::stream::iter(looks).buffered(RUNS_AT_ONCE).try_collect().await?;
    Ok(told.into_iter().collect())
}

pub(super) fn keys_of<'a>(
    columns: &Columns,
    batches: impl Iterator<Item = &'a RecordBatch>,
) -> Result<Vec<Rows>> {
    batches.map(|batch| rows_by(&columns.by_key, &columns.key, batch)).collect()
}
