//! After-step checks: what a step counted is what lies in storage, or the epoch is blocked.
//!
//! Owns: the comparison and its words. The counts come from the step; files are read back by their
//! footers before a commit names them, main's rows from its log after the commit.

use alluvium_protocol::{Code, Error, Result, crash};
use alluvium_table::{Add, Table};

/// The files hold as many rows as were counted while they were written.
pub(crate) async fn read_back(
    step: &'static str,
    table: &Table,
    adds: &[Add],
    counted: u64,
) -> Result<()> {
    let found = table.rows_in_files(adds).await?;
    agree(step, "rows in the files, read back", counted, found, table.uri())
}

/// Two counts of the same thing agree.
pub(crate) fn agree(
    step: &'static str,
    what: &str,
    counted: u64,
    found: u64,
    uri: &str,
) -> Result<()> {
    let found = found + crash::miscount(step);
    if counted == found {
        return Ok(());
    }
    let text = format!("{step} into {uri}: {what}: {counted} expected, {found} found");
    Err(Error::new(Code::CountsDisagree, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_too_many_or_too_few_is_named() {
        assert!(agree("merge", "rows", 3, 3, "t").is_ok());
        for found in [2, 4] {
            let error = agree("merge", "rows", 3, found, "t").unwrap_err();
            assert_eq!(error.code, Code::CountsDisagree);
            assert!(error.message.contains(&format!("3 expected, {found} found")), "{error}");
        }
    }
}
