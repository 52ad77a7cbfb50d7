//! `config reference`: every setting as a commented configuration file that works when its
//! required lines are filled in.

use super::settings::{Kind, SETTINGS, Setting};

/// Options are object_store's own, too many to list: the ones that people need, as a sample.
const STORAGE: &str = r#"
# [storage]
# Options of object storage, for all locations; without it the AWS_* variables and the usual places
# of credentials count. `[[storage]]` with `prefix = "s3://other/"` sets them for some locations.
# aws_endpoint_url = "http://127.0.0.1:9000"   # a server other than AWS
# aws_region = "us-east-1"
# aws_access_key_id = "${S3_KEY}"
# aws_secret_access_key = "${S3_SECRET}"
# retry_timeout = "60s"   # how long one request is repeated
"#;

/// The reference, as TOML with comments.
pub(crate) fn reference() -> String {
    let mut text = String::from(
        "# alluvium.toml: every setting. Lines that begin with `# ` and a name show the default or an\n\
         # example; remove the `# ` to set it. Relative paths start at this file. A variable\n\
         # ALLUVIUM_SECTION__KEY overrides a line; \"${ENV}\" and \"file:PATH\" work in any text.\n",
    );
    let mut section = String::new();
    for setting in SETTINGS {
        let (prefix, key) = split(setting);
        if prefix != section {
            if prefix.starts_with("pipeline.") {
                text.push_str(STORAGE);
            }
            // A section that is there is an alert.
            let hash = if prefix.starts_with("alert.") { "# " } else { "" };
            text.push_str(&format!("\n{hash}[{prefix}]\n"));
            section = prefix;
        }
        for line in wrap(setting.doc, 92) {
            text.push_str(&format!("# {line}\n"));
        }
        let note = match setting.default {
            Some(_) => String::new(),
            None if setting.without == "required" => "   # required".to_owned(),
            None => format!("   # without it: {}", setting.without),
        };
        let value = setting.default.unwrap_or(setting.example);
        let hash = if setting.without == "required" { "" } else { "# " };
        if setting.kind == Kind::Columns {
            // One line for each column: TOML takes no `columns.ignore` after `columns = { … }`.
            let sample: toml::Table =
                toml::from_str(&format!("columns = {value}")).unwrap_or_default();
            for (column, kind) in sample["columns"].as_table().into_iter().flatten() {
                text.push_str(&format!("# {key}.{column} = {kind}\n"));
            }
            continue;
        }
        text.push_str(&format!("{hash}{key} = {value}{note}\n"));
    }
    text
}

/// `pipeline.*.merge.batch_bytes` is `merge.batch_bytes` in `[pipeline.researchers]`.
fn split(setting: &Setting) -> (String, String) {
    let of = |pattern: &str| setting.path.strip_prefix(pattern).map(str::to_owned);
    if let Some(key) = of("alert.*.") {
        return ("alert.team".to_owned(), key);
    }
    match of("pipeline.*.") {
        Some(key) => ("pipeline.researchers".to_owned(), key),
        None => match setting.path.split_once('.') {
            Some((section, key)) => (section.to_owned(), key.to_owned()),
            None => (String::new(), setting.path.to_owned()),
        },
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut();
        match line {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
