//! Mode `scd2` (slowly changing dimension, type 2): main holds every version of each key, with the
//! epochs in which it was valid.
//!
//! A version begins at the epoch whose row differs from the key's version before, and ends at the
//! next epoch that changes or deletes it. It is computed anew for each key in question, so that a late
//! epoch splits the version that it falls into, and an undone one joins its neighbours again.

use alluvium_table::arrow::datatypes::{DataType, Field};
use alluvium_table::session::{quoted, quoted_list};

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

/// Every version of each key of `relation`, whose rows are raw's and no reverts. Columns: the rule's
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
