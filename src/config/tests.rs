//! The configuration as its users meet it.

use super::*;

const SMALL: &str = r#"
[pipeline.p]
source = "in"
raw = "raw"
main = "main"
key = ["id"]
"#;

fn parsed(text: &str) -> std::result::Result<Config, Vec<Problem>> {
    parse(text, Path::new("/x/alluvium.toml"), std::iter::empty())
}

fn problems(text: &str) -> Vec<(String, String)> {
    parsed(text).unwrap_err().into_iter().map(|p| (p.path, p.text)).collect()
}

#[test]
fn a_small_file_is_enough() {
    let config = parsed(SMALL).unwrap();
    assert_eq!(config.state, "/x/_alluvium");
    assert_eq!(config.pipelines[0].main, "/x/main");
    assert_eq!(config.pipelines[0].quarantine, "/x/raw_quarantine");
    assert_eq!(config.effective["run.poll"], ("\"10s\"".to_owned(), "default".to_owned()));
}

#[test]
fn all_problems_are_told_at_once_with_their_paths() {
    let text = r#"
        [worker]
        slots = 0
        [run]
        pol = "10s"
        [pipeline.p]
        source = "in"
        raw = "raw"
        main = "raw"
        order = "sequentiall"
        sequence = "x"
    "#;
    let found = problems(text);
    let at = |path: &str| {
        let hit = found.iter().find(|(p, _)| p == path);
        hit.map(|(_, text)| text.clone()).unwrap_or_else(|| panic!("{path} not in {found:?}"))
    };
    assert!(at("run.pol").contains("did you mean `poll`"));
    assert!(at("worker.slots").contains("from 1 to 256"));
    assert!(at("pipeline.p.order").contains("\"sequential\" or \"arrival\""));
    assert!(at("pipeline.p.sequence").contains("sequence_by"));
    assert!(at("pipeline.p.key").contains("required"));
    assert!(at("pipeline.p.main").contains("same table"));
}

#[test]
fn nothing_lies_in_a_tables_folder() {
    let with = |raw: &str, main: &str, more: &str| {
        let text =
            format!("[pipeline.p]\nsource='in'\nkey=['id']\nraw='{raw}'\nmain='{main}'\n{more}");
        problems(&text).into_iter().map(|(path, _)| path).collect::<Vec<_>>()
    };
    assert_eq!(with("lake/raw", "lake/raw/main", ""), ["pipeline.p.main"]);
    assert_eq!(with("main/raw", "main", ""), ["pipeline.p.quarantine", "pipeline.p.raw"]);
    assert_eq!(with("raw", "main", "quarantine='raw/q'"), ["pipeline.p.quarantine"]);
    assert_eq!(with("raw", "file:///x/raw/main", ""), ["pipeline.p.main"]);
    assert_eq!(with("raw", "file:///x/raw", ""), ["pipeline.p.main"]);
    assert_eq!(with("in_raw", "m", "[state]\nuri='m/_state'"), ["state.uri"]);
    for cache in ["in", "in/cache", "raw/x", "main"] {
        let more = format!("[worker]\ncache='{cache}'");
        assert_eq!(with("raw", "main", &more), ["worker.cache"], "{cache}");
    }
    parsed(&format!("{SMALL}\n[worker]\ncache='main_cache'")).unwrap();
    assert_eq!(with("~/raw", "main", "[worker]\ncache='~/x'"), ["pipeline.p.raw", "worker.cache"]);
    assert_eq!(
        with("raw", "main", "[pipeline.q]\nsource='raw/in'\nkey=['a','A']\nraw='r2'\nmain='m2'"),
        ["pipeline.q.key", "pipeline.q.source"]
    );
}

#[test]
fn a_wrong_variable_is_named() {
    let environment = [("ALLUVIUM_RUN__POLL".to_owned(), "zzz".to_owned())];
    let found = parse(SMALL, Path::new("/x/alluvium.toml"), environment.into_iter()).unwrap_err();
    assert!(found[0].text.contains("environment variable ALLUVIUM_RUN__POLL"), "{found:?}");
}

#[test]
fn variables_override_and_say_so() {
    let environment = [
        ("ALLUVIUM_WORKER__SLOTS".to_owned(), "7".to_owned()),
        ("ALLUVIUM_PIPELINE__P__ORDER".to_owned(), "arrival".to_owned()),
        ("ALLUVIUM_LOG".to_owned(), "debug".to_owned()),
    ];
    let config = parse(SMALL, Path::new("/x/a.toml"), environment.into_iter()).unwrap();
    assert_eq!(config.slots, 7);
    assert_eq!(config.pipelines[0].order, alluvium_protocol::pipeline::Order::Arrival);
    assert!(config.effective["worker.slots"].1.contains("ALLUVIUM_WORKER__SLOTS"));
}

#[test]
fn the_reference_is_a_valid_configuration_and_names_every_setting() {
    let text = reference::reference();
    parsed(&text).unwrap();
    // Uncommented, every line is still a known setting with a value of the right kind, except
    // that only one sign of completeness may be set, and samples of secrets name variables.
    let all: String = text
        .lines()
        .map(|line| {
            let bare = line.strip_prefix("# ").unwrap_or(line);
            let is_setting = bare.split_once(" = ").is_some_and(|(key, _)| {
                key.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '.')
            });
            let is_section = bare.starts_with('[') && bare.ends_with(']');
            if is_setting || is_section { format!("{bare}\n") } else { format!("{line}\n") }
        })
        .collect();
    let found = problems(&all);
    let is_expected = |(path, text): &(String, String)| {
        // Samples speak of other pipelines, of two ways to be called, and of another format.
        let is_sample = path.ends_with(".after")
            || path.ends_with(".after_merge")
            || path.starts_with("pipeline.researchers.csv.");
        path.ends_with(".ready") || text.contains("environment variable") || is_sample
    };
    assert!(found.iter().all(is_expected), "{found:?}");
    for setting in settings::SETTINGS {
        let key = setting.path.trim_start_matches("pipeline.*.").trim_start_matches("alert.*.");
        let key = key.split_once('.').filter(|_| !setting.path.contains('*')).map_or(key, |k| k.1);
        let end = if setting.kind == settings::Kind::Columns { "." } else { " = " };
        assert!(all.contains(&format!("\n{key}{end}")), "{}", setting.path);
    }
}

#[test]
fn sections_of_the_cluster_and_foreign_storage_are_named_plainly() {
    let found = problems(&format!("[cluster]\namqp = \"x\"\n{SMALL}"));
    assert_eq!(found[0].0, "cluster.amqp", "{found:?}");
    assert_eq!(found[1].0, "cluster.redis", "{found:?}");
    let found = problems(&SMALL.replace("\"in\"", "\"gs://bucket/in\""));
    assert!(found[0].1.contains("gs://"), "{found:?}");
    let found = problems(&SMALL.replace("main = \"main\"", "main = \"s3://bucket/main\""));
    assert_eq!(found[0].0, "state.uri", "{found:?}");
}

#[test]
fn storage_is_for_all_locations_or_for_some_and_hides_its_secrets() {
    let all = parsed(&format!("[storage]\naws_endpoint_url = \"http://h:9\"\n{SMALL}")).unwrap();
    assert_eq!(all.storage[0].options["aws_allow_http"], "true");
    let text = "[[storage]]\nprefix = \"s3://a/\"\naws_secret_access_key = \"hidden\"\n";
    let some = parsed(&format!("{text}{SMALL}")).unwrap();
    assert_eq!(some.storage[0].prefix, "s3://a/");
    assert!(!format!("{:?}", some).contains("hidden"));
    assert!(some.effective.values().all(|(value, _)| !value.contains("hidden")));
    let found = problems(&format!("[storage]\naws_regoin = \"x\"\n{SMALL}"));
    assert_eq!(found[0].0, "storage.aws_regoin");
    let unsafe_rename = format!("[storage]\naws_s3_allow_unsafe_rename = true\n{SMALL}");
    assert!(problems(&unsafe_rename)[0].1.contains("not possible"));
}

#[test]
fn adopting_and_retention_are_checked() {
    let found = problems(&format!("{SMALL}adopt = true\ncleanup.retention = \"5m\"\n"));
    let paths: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["pipeline.p.adopt", "pipeline.p.cleanup.retention"]);
}

#[test]
fn a_broken_delete_when_is_found_before_any_run() {
    let found = problems(&format!("{SMALL}delete_when = \"op = \"\n"));
    assert_eq!(found[0].0, "pipeline.p.delete_when");
}
