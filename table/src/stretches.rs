//! Between which values the rows of a data file lie, page by page, as the file's own statistics tell: to read a
//! range of keys without the rest.
//!
//! Format: <https://github.com/apache/parquet-format/blob/master/PageIndex.md>

use std::sync::Arc;

use alluvium_protocol::{Error, Result};
use deltalake::arrow::array::{Array, ArrayRef, RecordBatch, UInt64Array};
use deltalake::arrow::compute::{cast, take};
use deltalake::arrow::datatypes::SchemaRef;
use deltalake::parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use deltalake::parquet::file::metadata::ParquetMetaData;

use crate::classify::foreign;
use crate::keys::footers::for_arrow;
use crate::schema::find_column;
use crate::{LiveFile, Table};

/// Rows of a data file that follow one another, stretch by stretch, and values between which each column's lie.
pub struct Stretches {
    /// The position of the first row of each, and the number of rows in the file.
    pub starts: Vec<u64>,
    /// No value of a stretch is smaller: a row for each.
    pub least: RecordBatch,
    /// No value of a stretch is larger: a row for each.
    pub most: RecordBatch,
}

/// Pages of one column: where they begin, and the smallest and largest value of each.
struct Pages {
    starts: Vec<u64>,
    least: ArrayRef,
    most: ArrayRef,
}

impl Table {
    /// What a file tells of these columns, in these types; `None`: not of each page of all of them.
    pub async fn stretches(
        &self,
        file: &LiveFile,
        columns: &SchemaRef,
    ) -> Result<Option<Stretches>> {
        let doing = || format!("read {} of {}", file.path, self.uri);
        let footer = self.footer_with_pages(&file.path, file.size).await?;
        let mut of_columns = Vec::with_capacity(columns.fields().len());
        for field in columns.fields() {
            let pages = pages_of(&footer, field.name()).map_err(|e| foreign(doing(), &e))?;
            let Some(mut pages) = pages else { return Ok(None) };
            for values in [&mut pages.least, &mut pages.most] {
                *values = cast(values, field.data_type()).map_err(|e| foreign(doing(), &e))?;
                if values.null_count() > 0 {
                    return Ok(None);
                }
            }
            of_columns.push(pages);
        }
        // Pages of one column may begin where those of another do not.
        let mut starts: Vec<u64> =
            of_columns.iter().flat_map(|pages| pages.starts.iter().copied()).collect();
        starts.sort_unstable();
        starts.dedup();
        let (mut least, mut most) = (Vec::new(), Vec::new());
        for pages in &of_columns {
            let page_of = |start: &u64| pages.starts.partition_point(|first| first <= start) - 1;
            let at: UInt64Array = starts.iter().map(|start| page_of(start) as u64).collect();
            least.push(take(&pages.least, &at, None).map_err(Error::internal)?);
            most.push(take(&pages.most, &at, None).map_err(Error::internal)?);
        }
        let rows = footer.row_groups().iter().map(|group| u64::try_from(group.num_rows()));
        starts.push(rows.sum::<Result<u64, _>>().map_err(Error::internal)?);
        let batch = |values| RecordBatch::try_new(Arc::clone(columns), values);
        Ok(Some(Stretches {
            starts,
            least: batch(least).map_err(Error::internal)?,
            most: batch(most).map_err(Error::internal)?,
        }))
    }
}

fn pages_of(
    footer: &Arc<ParquetMetaData>,
    name: &str,
) -> Result<Option<Pages>, deltalake::parquet::errors::ParquetError> {
    let (Some(columns), Some(offsets)) = (footer.column_index(), footer.offset_index()) else {
        return Ok(None);
    };
    let read = for_arrow(Arc::clone(footer))?;
    let Some(at) = find_column(read.schema(), name) else { return Ok(None) };
    let name = read.schema().field(at).name();
    let values = StatisticsConverter::try_new(name, read.schema(), read.parquet_schema())?;
    let Some(leaf) = values.parquet_column_index() else { return Ok(None) };
    let groups: Vec<usize> = (0..footer.num_row_groups()).collect();
    let is_told = |group: &usize| {
        columns.get(*group).is_some_and(|of_group| leaf < of_group.len())
            && offsets.get(*group).is_some_and(|of_group| leaf < of_group.len())
    };
    if groups.is_empty() || !groups.iter().all(is_told) {
        return Ok(None);
    }
    let (mut starts, mut first_row) = (Vec::new(), 0);
    for group in &groups {
        let pages = offsets[*group][leaf].page_locations();
        let start = |first: i64| u64::try_from(first).unwrap_or(0) + first_row;
        starts.extend(pages.iter().map(|page| start(page.first_row_index)));
        first_row += u64::try_from(footer.row_group(*group).num_rows()).unwrap_or(0);
    }
    let least = values.data_page_mins(columns, offsets, &groups)?;
    let most = values.data_page_maxes(columns, offsets, &groups)?;
    let has_rows = |(start, end): (&u64, u64)| *start < end;
    let ends = starts.iter().skip(1).copied().chain([first_row]);
    let is_whole = starts.first() == Some(&0)
        && starts.len() == least.len()
        && starts.iter().zip(ends).all(has_rows);
    Ok((is_whole && starts.len() == most.len()).then_some(Pages { starts, least, most }))
}
