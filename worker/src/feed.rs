//! The change data feed of a merge: each row of main that goes and each that comes, told in files of
//! its own beside the commit's data.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#change-data-files>

use alluvium_protocol::Result;
use alluvium_protocol::pipeline::Mode;
use alluvium_table::classify::foreign;
use alluvium_table::datafusion::execution::context::SessionContext;
use alluvium_table::schema::find_column;
use alluvium_table::session::quoted;
use alluvium_table::write::{CHANGE_TYPE, ChangeWriter};
use alluvium_table::{Action, Table};

use crate::slowly::VALIDITY;
use crate::winners::{Rule, collect};

/// Writes what changes: rows of the registered `touched` with a key of `winner_keys` go, those that
/// `coming` selects come.
pub(crate) async fn write(
    session: &SessionContext,
    main: &Table,
    rule: &Rule,
    coming: &str,
) -> Result<Vec<Action>> {
    let doing = "tell main's changes";
    let schema = main.schema();
    let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let list = |alias: &str| {
        let columns = names.iter().map(|name| format!("{alias}.{}", quoted(name)));
        columns.collect::<Vec<_>>().join(", ")
    };
    // What goes is few rows, however large the files are.
    let going = format!(
        "SELECT {} FROM winner_keys w JOIN touched t ON {}",
        list("t"),
        rule.keys_equal("t", "w")
    );
    collect(session, &going).await?.register(session, "going")?;
    collect(session, coming).await?.register(session, "coming")?;
    let spelled = |name: &String| {
        let at = find_column(&schema, name);
        at.map_or_else(|| quoted(name), |at| quoted(schema.field(at).name()))
    };
    let key: Vec<String> = rule.key.iter().map(spelled).collect();
    let equal = |a: &str, b: &str, columns: &[String], operator: &str| {
        let equal = columns.iter().map(|name| format!("({a}.{name} {operator} {b}.{name})"));
        equal.collect::<Vec<_>>().join(" AND ")
    };
    let change = quoted(CHANGE_TYPE);
    // What makes a row the same one before and after; a version of a key begins at its epoch.
    let mut identity = key;
    if rule.mode == Mode::Scd2 {
        identity.push(quoted(VALIDITY[0]));
    }
    let is_one = equal("a", "b", &identity, "=");
    let all: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    // All versions of a key are computed anew: most of them as they were.
    let is_changed = match rule.mode {
        Mode::Scd2 => format!("NOT ({})", equal("a", "b", &all, "IS NOT DISTINCT FROM")),
        _ => "TRUE".to_owned(),
    };
    let (before, after) = (list("a"), list("b"));
    let sql = format!(
        "SELECT {before}, 'delete' AS {change} FROM going a LEFT ANTI JOIN coming b ON {is_one} \
         UNION ALL SELECT {before}, 'update_preimage' AS {change} \
         FROM going a JOIN coming b ON {is_one} WHERE {is_changed} \
         UNION ALL SELECT {after}, 'update_postimage' AS {change} \
         FROM going a JOIN coming b ON {is_one} WHERE {is_changed} \
         UNION ALL SELECT {before}, 'insert' AS {change} \
         FROM coming a LEFT ANTI JOIN going b ON {is_one}"
    );
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    ChangeWriter::new(main)?.write_all(stream).await
}
