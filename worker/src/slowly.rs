//! Mode `scd2` (slowly changing dimension, type 2): main holds every version of each key, with the
//! epochs in which it was valid.
//!
//! A version begins at the epoch whose row differs from the key's version before, and ends at the
//! next epoch that changes or deletes it. It is computed anew for each key in question, so that a late
//! epoch splits the version that it falls into, and an undone one joins its neighbours again.

use std::sync::Arc;

use alluvium_protocol::{Error, Result};
use alluvium_table::arrow::array::{ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch};
use alluvium_table::arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use alluvium_table::session::{quoted, quoted_list};

use crate::ordered::{Cursor, Picks, Seen};
use crate::raw;
use crate::winners::Rule;

/// Columns of main beside the data: first epoch, epoch after the last one (NULL: still valid), and
/// whether it is still valid.
pub(crate) const VALIDITY: [&str; 3] = ["valid_from", "valid_to", "is_current"];

/// The same as fields.
pub(crate) fn fields() -> Vec<Field> {
    vec![
        Field::new(VALIDITY[0], DataType::Int64, true),
        Field::new(VALIDITY[1], DataType::Int64, true),
        Field::new(VALIDITY[2], DataType::Boolean, true),
    ]
}

/// The versions of keys, out of one row of each key and epoch, by both.
pub(crate) struct Versions {
    rows: Cursor,
    epoch: usize,
    schema: SchemaRef,
    picks: Picks,
    validity: Vec<(i64, Option<i64>)>,
}

impl Versions {
    /// Of rows with these columns, which can be compared by their values and `_op`.
    pub(crate) fn new(rows: Cursor, columns: &SchemaRef) -> Result<Self> {
        let epoch = columns.index_of(raw::EPOCH).map_err(Error::internal)?;
        let mut fields = columns.fields().to_vec();
        fields.extend(fields_of_versions());
        let schema = Arc::new(Schema::new(fields));
        Ok(Self { rows, epoch, schema, picks: Picks::default(), validity: Vec::new() })
    }

    fn epoch_of(&self, row: &Seen) -> Result<i64> {
        let epochs = row.batch.column(self.epoch).as_primitive_opt::<Int64Type>();
        epochs.map(|epochs| epochs.value(row.row)).ok_or_else(|| Error::internal("no epoch"))
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let mut key: Vec<u8> = Vec::new();
        while !self.picks.is_full() {
            let Some(first) = self.rows.key() else { break };
            key.clear();
            key.extend_from_slice(first);
            let mut version: Option<Seen> = None;
            while self.rows.key() == Some(&key) {
                let Some(row) = self.rows.seen() else { break };
                let is_same = version.as_ref().is_some_and(|held| self.rows.is_same(held, &row));
                if !is_same {
                    let until = self.epoch_of(&row)?;
                    if let Some(held) = version.replace(row) {
                        self.give(&held, Some(until))?;
                    }
                }
                self.rows.advance()?;
            }
            if let Some(held) = version {
                self.give(&held, None)?;
            }
        }
        let Some(rows) = self.picks.take()? else { return Ok(None) };
        let mut columns = rows.columns().to_vec();
        let validity = std::mem::take(&mut self.validity);
        let from: Int64Array = validity.iter().map(|(from, _)| *from).collect();
        let until: Int64Array = validity.iter().map(|(_, until)| *until).collect();
        let is_current: BooleanArray =
            validity.iter().map(|(_, until)| Some(until.is_none())).collect();
        columns.extend([Arc::new(from) as ArrayRef, Arc::new(until), Arc::new(is_current)]);
        let rows = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        rows.map(Some).map_err(Error::internal)
    }

    fn give(&mut self, version: &Seen, until: Option<i64>) -> Result<()> {
        let from = self.epoch_of(version)?;
        self.picks.pick(&version.batch, version.row);
        self.validity.push((from, until));
        Ok(())
    }
}

impl Iterator for Versions {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

fn fields_of_versions() -> Vec<Arc<Field>> {
    fields().into_iter().map(Arc::new).collect()
}

/// The same as SQL, for questions: every version of each key of `relation`, whose rows are raw's and no reverts. Columns: the rule's
/// output and raw's `_op`, which is `upsert`.
pub(crate) fn versions(rule: &Rule, relation: &str) -> String {
    let key = rule.key_list();
    let (op, epoch) = (quoted(raw::OP), quoted(raw::EPOCH));
    let columns = rule.column_list();
    let values: Vec<&String> =
        rule.columns.iter().filter(|column| rule.key_name(column).is_none()).collect();
    let before = |name: &str| quoted(&format!("_alluvium_before_{name}"));
    let lagged: Vec<String> = [raw::OP]
        .into_iter()
        .chain(values.iter().map(|name| name.as_str()))
        .map(|name| format!("lag({}) OVER by_epoch AS {}", quoted(name), before(name)))
        .collect();
    let same: Vec<String> = [raw::OP]
        .into_iter()
        .chain(values.iter().map(|name| name.as_str()))
        .map(|name| format!("({} IS NOT DISTINCT FROM {})", quoted(name), before(name)))
        .collect();
    let output = quoted_list(rule.output.iter().map(String::as_str));
    format!(
        "SELECT {output}, {op} FROM (\
           SELECT {columns}, {op}, CAST({epoch} AS BIGINT) AS {from}, \
             CAST(lead({epoch}) OVER (PARTITION BY {key} ORDER BY {epoch}) AS BIGINT) AS {to}, \
             lead({epoch}) OVER (PARTITION BY {key} ORDER BY {epoch}) IS NULL AS {current} \
           FROM (\
             SELECT {columns}, {op}, {epoch}, {lagged} FROM (\
               SELECT {columns}, {op}, {epoch}, row_number() OVER \
                 (PARTITION BY {key}, {epoch} ORDER BY {order}) AS _alluvium_rank FROM {relation}\
             ) WHERE _alluvium_rank = 1 WINDOW by_epoch AS (PARTITION BY {key} ORDER BY {epoch})\
           ) WHERE NOT ({same})\
         ) WHERE {op} = '{upsert}'",
        from = quoted(VALIDITY[0]),
        to = quoted(VALIDITY[1]),
        current = quoted(VALIDITY[2]),
        lagged = lagged.join(", "),
        same = same.join(" AND "),
        order = rule.last_first(),
        upsert = raw::UPSERT,
    )
}
