//! `alluvium explain`: the page of an error code.

use alluvium_protocol::{Code, Error, Result};

use crate::printer::{self, Exit};

/// Prints a code's page, or the list of codes.
pub(crate) fn explain(code: Option<&str>) -> Result<Exit> {
    let Some(text) = code else {
        let rows =
            Code::ALL.iter().map(|code| vec![code.to_string(), code.title().to_owned()]).collect();
        printer::table(&["code", "meaning"], rows);
        return Ok(Exit::Ok);
    };
    let known = Code::parse(text).ok_or_else(|| {
        Error::new(Code::NotPossibleNow, format!("there is no error code {text:?}"))
            .with_help("`alluvium explain` lists all codes")
    })?;
    printer::data(known.page());
    Ok(Exit::Ok)
}
