//! A Z-order curve: rows that are near each other in several columns come near each other in files, so that
//! a reader who asks for any of these columns passes over most of them.
//!
//! A value becomes its rank among 255 bounds that a sample gives, 8 bits; the bits of all columns' ranks,
//! highest first and in turn, are the place on the curve.
//!
//! G. M. Morton, "A computer oriented geodetic data base and a new technique in file sequencing", 1966.

use std::sync::Arc;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{ArrayRef, BinaryArray, RecordBatch};
use alluvium_table::arrow::row::{RowConverter, Rows, SortField};
use alluvium_table::rows::Pick;
use alluvium_table::schema::find_column;
use alluvium_table::{LiveFile, Table};
use futures::TryStreamExt;

use crate::Permit;
use crate::ground::columns_of;

/// One row of so many is in the sample.
const SAMPLE_ROWS: usize = 64;
/// Ranks of a column.
const RANKS: usize = 256;

/// Where rows lie on the curve.
pub(crate) struct Curve {
    columns: Vec<String>,
    /// Of each column, the smallest value of each rank but the first.
    bounds: Vec<Vec<Box<[u8]>>>,
}

impl Curve {
    /// Looks at some live rows of the files.
    pub(crate) async fn learn(
        table: &Table,
        files: &[LiveFile],
        columns: &[String],
        permit: &Permit,
    ) -> Result<Self> {
        let schema = columns_of(&table.schema(), columns)?;
        let mut samples: Vec<Vec<Box<[u8]>>> = vec![Vec::new(); columns.len()];
        for file in files {
            let deleted = table.deleted_rows(file.remove.deletion_vector.as_ref()).await?;
            let mut rows = table.rows_of(file, &schema, Pick::Without(deleted)).await?;
            while let Some(batch) = rows.try_next().await? {
                permit.check()?;
                for (sample, column) in samples.iter_mut().zip(batch.columns()) {
                    let values = comparable(column)?;
                    let some = (0..values.num_rows()).step_by(SAMPLE_ROWS);
                    sample.extend(some.map(|row| Box::from(values.row(row).data())));
                }
            }
        }
        let bounds = samples.into_iter().map(bounds_of).collect();
        Ok(Self { columns: columns.to_vec(), bounds })
    }

    /// The places of a batch's rows: bytes in the order of the curve.
    pub(crate) fn places(&self, batch: &RecordBatch) -> Result<ArrayRef> {
        let mut ranks: Vec<Vec<u8>> = Vec::with_capacity(self.columns.len());
        for (name, bounds) in self.columns.iter().zip(&self.bounds) {
            let at = find_column(batch.schema_ref(), name).ok_or_else(|| Error::internal(name))?;
            let values = comparable(batch.column(at))?;
            let rank = |row| bounds.partition_point(|bound| **bound <= *values.row(row).data());
            ranks.push((0..batch.num_rows()).map(|row| rank(row) as u8).collect());
        }
        let places = (0..batch.num_rows()).map(|row| {
            let of_row: Vec<u8> = ranks.iter().map(|ranks| ranks[row]).collect();
            interleaved(&of_row)
        });
        Ok(Arc::new(BinaryArray::from_iter_values(places)))
    }
}

/// Values as bytes of the same order, NULL lowest.
fn comparable(column: &ArrayRef) -> Result<Rows> {
    let converter = RowConverter::new(vec![SortField::new(column.data_type().clone())]);
    let converter = converter.map_err(Error::internal)?;
    converter.convert_columns(std::slice::from_ref(column)).map_err(Error::internal)
}

fn bounds_of(mut sample: Vec<Box<[u8]>>) -> Vec<Box<[u8]>> {
    sample.sort_unstable();
    let at = |rank: usize| sample.get(rank * sample.len() / RANKS).cloned();
    let mut bounds: Vec<Box<[u8]>> = (1..RANKS).filter_map(at).collect();
    bounds.dedup();
    bounds
}

/// The bits of the ranks in turn, highest first.
fn interleaved(ranks: &[u8]) -> Vec<u8> {
    let mut place = vec![0; ranks.len()];
    let bits = (0..8).rev().flat_map(|bit| ranks.iter().map(move |rank| rank >> bit & 1));
    for (at, bit) in bits.enumerate() {
        place[at / 8] |= bit << (7 - at % 8);
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_in_turn() {
        assert_eq!(interleaved(&[0b1111_0000, 0b0000_1111]), [0b1010_1010, 0b0101_0101]);
        assert_eq!(interleaved(&[0b1000_0001]), [0b1000_0001]);
        assert_eq!(interleaved(&[0x80, 0, 0]), [0x80, 0, 0]);
    }

    #[test]
    fn a_bound_is_the_smallest_value_of_its_rank() {
        let sample: Vec<Box<[u8]>> = (0..=255_u8).rev().map(|n| Box::from([n])).collect();
        let bounds = bounds_of(sample);
        assert_eq!(bounds.len(), 255);
        assert_eq!((&*bounds[0], &*bounds[254]), (&[1_u8][..], &[255_u8][..]));
        assert!(bounds_of(vec![Box::from([7_u8]); 1000]).len() == 1);
    }
}
