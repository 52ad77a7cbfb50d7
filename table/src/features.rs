//! Which tables may be written: those whose every promise this writer keeps.
//!
//! The library lists what its own operations support, among it rules that they check row by row
//! (constraints, generated columns). Data files of ours do not pass through these operations, so a
//! table that uses such a rule is refused; one that only allows it is not.
//!
//! Format: <https://github.com/delta-io/delta/blob/master/PROTOCOL.md#requirements-for-writers>

use alluvium_protocol::{Code, Error, Result};
use deltalake::kernel::transaction::PROTOCOL;

use crate::Table;
use crate::classify::{FEATURES_HELP, foreign};

/// The writer version from which a table names its features.
const NAMES_FEATURES: i64 = 7;

/// Writer features that ask nothing of us, or what we do anyway.
const KEPT: [&str; 6] = [
    "appendOnly",
    "changeDataFeed",
    "deletionVectors",
    "timestampNtz",
    "v2Checkpoint",
    "vacuumProtocolCheck",
];

/// Writer features that a table may list as long as it does not use them.
const UNUSED: [&str; 9] = [
    "checkConstraints",
    "columnMapping",
    "generatedColumns",
    "identityColumns",
    "inCommitTimestamp",
    "invariants",
    "rowTracking",
    "variantType",
    "variantType-preview",
];

/// Marks in a schema of columns that ask for a check, a value, or a type that is not written here.
const COLUMN_RULES: [(&str, &str); 4] = [
    ("\"type\":\"variant\"", "a variant column"),
    ("\"delta.invariants\"", "invariants"),
    ("\"delta.generationExpression\"", "generated columns"),
    ("\"delta.identity.", "identity columns"),
];

impl Table {
    /// Refuses a table that asks more of its writers than this one does.
    pub fn check_writable(&self, removes_rows: bool) -> Result<()> {
        let protocol = self.snapshot.protocol();
        PROTOCOL
            .can_read_from_protocol(protocol)
            .map_err(|e| foreign(format!("read {}", self.uri), &e))?;
        let protocol = serde_json::to_value(protocol).map_err(Error::internal)?;
        let version = protocol["minWriterVersion"].as_i64().unwrap_or(0);
        let listed = protocol["writerFeatures"].as_array().cloned().unwrap_or_default();
        let unknown = listed
            .iter()
            .filter_map(|feature| feature.as_str())
            .find(|feature| !KEPT.contains(feature) && !UNUSED.contains(feature));
        match unknown {
            Some(feature) => return Err(self.refused(feature)),
            None if version > NAMES_FEATURES => {
                return Err(self.refused(&format!("writer version {version}")));
            }
            None => {}
        }
        let schema = serde_json::to_string(&self.snapshot.schema()).map_err(Error::internal)?;
        for (mark, rule) in COLUMN_RULES {
            if schema.contains(mark) {
                return Err(self.refused(rule));
            }
        }
        for (name, value) in self.properties() {
            let is_on = value.eq_ignore_ascii_case("true");
            match name.as_str() {
                "delta.appendOnly" if is_on && removes_rows => {
                    return Err(self.refused("delta.appendOnly"));
                }
                "delta.columnMapping.mode" if !value.eq_ignore_ascii_case("none") => {
                    return Err(self.refused("column mapping"));
                }
                // Without change files of their own, commits are told by their data files.
                "delta.enableInCommitTimestamps" | "delta.enableRowTracking" if is_on => {
                    return Err(self.refused(&name));
                }
                name if name.starts_with("delta.constraints.") => {
                    return Err(self.refused(name));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The protocol has deletion vectors, for readers and for writers.
    pub(crate) fn knows_marks(&self) -> bool {
        let protocol = serde_json::to_value(self.snapshot.protocol()).unwrap_or_default();
        ["readerFeatures", "writerFeatures"].iter().all(|features| {
            let listed = protocol[*features].as_array();
            listed.is_some_and(|listed| listed.iter().any(|name| name == "deletionVectors"))
        })
    }

    fn refused(&self, what: &str) -> Error {
        let text = format!("{} uses {what}, which this version cannot keep up", self.uri);
        Error::new(Code::TableUnreadable, text).with_help(FEATURES_HELP)
    }
}
