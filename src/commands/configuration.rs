//! `alluvium config validate | show | reference`.

use std::path::Path;

use alluvium_protocol::Result;
use serde_json::json;

use crate::cli::Output;
use crate::config::{self, reference};
use crate::printer::{self, Exit};

/// Tells every problem at once.
pub(crate) fn validate(file: Option<&Path>) -> Result<Exit> {
    let config = config::load(file)?;
    let names: Vec<&str> = config.pipelines.iter().map(|p| p.id.as_str()).collect();
    printer::say(&format!("{} is valid; pipelines: {}", config.file.display(), names.join(", ")));
    Ok(Exit::Ok)
}

/// Effective values with their origins.
pub(crate) fn show(file: Option<&Path>, output: Output) -> Result<Exit> {
    let config = config::load(file)?;
    match output {
        Output::Table => {
            let rows = config
                .effective
                .iter()
                .map(|(path, (value, origin))| vec![path.clone(), value.clone(), origin.clone()])
                .collect();
            printer::table(&["setting", "value", "from"], rows);
        }
        Output::Json => {
            let items: Vec<_> = config
                .effective
                .iter()
                .map(|(path, (value, origin))| {
                    json!({"setting": path, "value": value, "from": origin})
                })
                .collect();
            printer::json_items("config", &items)?;
        }
    }
    Ok(Exit::Ok)
}

/// Every setting, as a commented file.
pub(crate) fn reference() -> Result<Exit> {
    printer::data(&reference::reference());
    Ok(Exit::Ok)
}
