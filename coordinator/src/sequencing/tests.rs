//! Sequencing as tables: a line of epochs in, the plan out.

use alluvium_protocol::pipeline::{Content, Ready, Sizes};
use alluvium_protocol::task::Step;

use super::*;

fn pipeline() -> Pipeline {
    Pipeline {
        id: "p".to_owned(),
        source: "in".to_owned(),
        raw: "raw".to_owned(),
        main: "main".to_owned(),
        quarantine: "quarantine".to_owned(),
        state: "state".to_owned(),
        content: Content { key: vec!["k".to_owned()], ..Content::default() },
        order: Order::Sequential,
        on_block: OnBlock::Stop,
        hold_for_earlier: Duration::ZERO,
        ready: Ready::Marker("_SUCCESS".to_owned()),
        include: None,
        exclude: None,
        start_from: None,
        adopt: false,
        deletion_vectors: Default::default(),
        side_index: Default::default(),
        cluster_by: Vec::new(),
        optimize: true,
        cleanup_every: None,
        sizes: Sizes {
            target_file_bytes: 100,
            batch_epochs: 100,
            batch_bytes: 1000,
            small_files: 10,
            read_cost_max: 225,
            bin_bytes: 1000,
            shard_bytes: 1000,
            vacuum_retention: Duration::from_secs(3600),
            memory_bytes: 1 << 20,
        },
    }
}

/// Each letter is an epoch, 1, 2, …: as in the state machine's test, `w` waits for a retry.
fn epochs(line: &str) -> BTreeMap<Epoch, EpochView> {
    let view = |letter: char| EpochView {
        state: match letter {
            'i' => State::Incomplete,
            'r' => State::Ready,
            'I' => State::Ingesting,
            'd' | 'w' => State::Ingested,
            'M' => State::Merging,
            'p' => State::Processed,
            's' => State::Skipped,
            'b' => State::Blocked(Step::Ingest),
            'k' => State::Parked(Step::Merge),
            other => panic!("no state {other}"),
        },
        bytes: 10,
        not_before: (letter == 'w').then(|| now() + chrono::Duration::seconds(1)),
        waiting_since: Some(now() - chrono::Duration::seconds(10)),
        is_empty: false,
    };
    line.chars().zip(1..).map(|(letter, n)| (Epoch::new(n).unwrap(), view(letter))).collect()
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000, 0).unwrap()
}

fn planned(pipeline: &Pipeline, line: &str) -> Plan {
    let epochs = epochs(line);
    plan(&view(pipeline, &epochs), now())
}

fn view<'a>(pipeline: &'a Pipeline, epochs: &'a BTreeMap<Epoch, EpochView>) -> PipelineView<'a> {
    PipelineView {
        pipeline,
        epochs,
        is_rewriting: epochs.values().any(|epoch| epoch.state == State::Merging),
        is_cleaning: false,
        is_held: false,
        wants_restore: None,
        has_raw: true,
        has_main: true,
        small_files: 0,
        read_cost: 100,
        small_files_left: 0,
        maintenance_not_before: None,
        cleaned_at: None,
    }
}

fn merge(pipeline: &Pipeline, line: &str) -> Vec<i64> {
    let merge = planned(pipeline, line).merge.unwrap_or_default();
    merge.into_iter().map(Epoch::value).collect()
}

#[test]
fn sequential_takes_the_lowest_without_a_gap() {
    let p = pipeline();
    let cases: [(&str, &[i64]); 11] = [
        ("ddd", &[1, 2, 3]),
        ("drd", &[1]),
        ("rdd", &[]),
        ("Idd", &[]),
        ("pdd", &[2, 3]),
        ("sdd", &[2, 3]),
        ("dMd", &[]),
        ("bdd", &[]),
        ("kdd", &[]),
        ("wdd", &[]),
        ("idd", &[2, 3]),
    ];
    for (line, expected) in cases {
        assert_eq!(merge(&p, line), expected, "{line}");
    }
}

#[test]
fn arrival_takes_what_is_there() {
    let p = Pipeline { order: Order::Arrival, ..pipeline() };
    let cases: [(&str, &[i64]); 6] =
        [("rdd", &[2, 3]), ("bdd", &[2, 3]), ("wdb", &[2]), ("Mdd", &[]), ("kd", &[2]), ("r", &[])];
    for (line, expected) in cases {
        assert_eq!(merge(&p, line), expected, "{line}");
    }
}

#[test]
fn on_block_continue_passes_a_blocked_epoch() {
    let p = Pipeline { on_block: OnBlock::Continue, ..pipeline() };
    assert_eq!(merge(&p, "bdkd"), [2, 4]);
    assert_eq!(merge(&p, "rd"), [0; 0]);
}

#[test]
fn an_incomplete_lower_folder_is_waited_for_only_so_long() {
    let p = Pipeline { hold_for_earlier: Duration::from_secs(60), ..pipeline() };
    assert_eq!(merge(&p, "id"), [0; 0]);
    let p = Pipeline { hold_for_earlier: Duration::from_secs(5), ..pipeline() };
    assert_eq!(merge(&p, "id"), [2]);
}

#[test]
fn late_epochs_merge_among_themselves() {
    let p = pipeline();
    assert_eq!(merge(&p, "dpdd"), [1]);
    assert_eq!(merge(&p, "ddpdd"), [1, 2]);
    assert_eq!(merge(&p, "pddp"), [2, 3]);
}

#[test]
fn a_group_is_bounded_in_number_and_bytes() {
    let mut p = pipeline();
    p.sizes.batch_epochs = 2;
    assert_eq!(merge(&p, "dddd"), [1, 2]);
    p.sizes.batch_epochs = 100;
    p.sizes.batch_bytes = 25;
    assert_eq!(merge(&p, "dddd"), [1, 2]);
    p.sizes.batch_bytes = 1;
    assert_eq!(merge(&p, "dddd"), [1]);
}

#[test]
fn ingests_run_ahead_of_blocked_and_merging_epochs() {
    let ingests = |line: &str| planned(&pipeline(), line).ingests.len();
    assert_eq!(ingests("brr"), 2);
    assert_eq!(ingests("Mrr"), 2);
    assert_eq!(ingests(&format!("{}rr", "d".repeat(LOOKAHEAD_EPOCHS))), 0);
    assert_eq!(ingests(&format!("{}rr", "d".repeat(LOOKAHEAD_EPOCHS - 1))), 1);
    // They wait for it: without room for it there is never any.
    assert_eq!(ingests(&format!("r{}r", "d".repeat(LOOKAHEAD_EPOCHS))), 1);
    assert_eq!(ingests(&format!("pr{}", "d".repeat(2 * LOOKAHEAD_EPOCHS))), 1);
}

#[test]
fn whatever_waits_says_why() {
    let waits = planned(&pipeline(), "bd").waits;
    assert_eq!(waits[0].epoch, Epoch::new(1));
    assert!(waits[0].why.contains("alluvium retry p"), "{}", waits[0].why);
    assert!(planned(&pipeline(), "bp").waits.is_empty());
}

#[test]
fn a_held_pipeline_publishes_nothing_and_says_so() {
    let p = pipeline();
    let epochs = epochs("rd");
    let held = PipelineView { is_held: true, small_files: 99, ..view(&p, &epochs) };
    let plan = plan(&held, now());
    assert_eq!(Plan { waits: Vec::new(), ..plan.clone() }, Plan::default());
    assert!(plan.waits[0].why.contains("alluvium resume p"));
}

#[test]
fn a_rollback_goes_alone_and_first() {
    let p = pipeline();
    let waiting = epochs("pdr");
    let asked = PipelineView { wants_restore: Some(None), ..view(&p, &waiting) };
    let plan_of = |view: &PipelineView<'_>| {
        let plan = plan(view, now());
        assert!(plan.merge.is_none() && plan.ingests.is_empty() && !plan.cleanup);
        plan.restore
    };
    assert!(plan_of(&asked));
    assert!(plan_of(&PipelineView { is_held: true, ..asked }));
    let asked = || PipelineView { wants_restore: Some(None), ..view(&p, &waiting) };
    assert!(!plan_of(&PipelineView { is_rewriting: true, ..asked() }));
    assert!(!plan_of(&PipelineView { is_cleaning: true, ..asked() }));
    let later = Some(Some(now() + chrono::Duration::seconds(1)));
    assert!(!plan_of(&PipelineView { wants_restore: later, ..asked() }));
}

#[test]
fn empty_content_waits_until_main_exists() {
    let p = pipeline();
    let mut epochs = epochs("dd");
    for epoch in epochs.values_mut() {
        epoch.is_empty = true;
    }
    let without = PipelineView { has_main: false, ..view(&p, &epochs) };
    assert_eq!(plan(&without, now()).merge, None);
    assert!(plan(&view(&p, &epochs), now()).merge.is_some());
}

#[test]
fn empty_content_does_not_fill_a_group() {
    let mut p = pipeline();
    p.sizes.batch_epochs = 1;
    let mut epochs = epochs("ddd");
    epochs.entry(Epoch::new(1).unwrap()).and_modify(|epoch| epoch.is_empty = true);
    let both = [Epoch::new(1).unwrap(), Epoch::new(2).unwrap()];
    let first = PipelineView { has_main: false, ..view(&p, &epochs) };
    assert_eq!(plan(&first, now()).merge.unwrap(), both);
    // However large the first one with rows is.
    epochs.entry(both[1]).and_modify(|epoch| epoch.bytes = 2 * p.sizes.batch_bytes);
    let first = PipelineView { has_main: false, ..view(&p, &epochs) };
    assert_eq!(plan(&first, now()).merge.unwrap(), both);
}

#[test]
fn maintenance_waits_for_merges_and_knows_when_to_stop() {
    let p = Pipeline { cleanup_every: Some(Duration::from_secs(60)), ..pipeline() };
    let idle = epochs("pp");
    let busy = epochs("pd");
    let plan_of = |epochs: &BTreeMap<Epoch, EpochView>, small, left| {
        let view = PipelineView { small_files: small, small_files_left: left, ..view(&p, epochs) };
        plan(&view, now())
    };
    assert!(plan_of(&idle, 10, 0).optimize);
    assert!(!plan_of(&idle, 9, 0).optimize);
    assert!(!plan_of(&idle, 10, 10).optimize, "nothing more to do");
    assert!(!plan_of(&busy, 10, 0).optimize, "the merge goes first");
    assert!(plan_of(&idle, 0, 0).cleanup);
    let cleaned = PipelineView { cleaned_at: Some(now()), ..view(&p, &idle) };
    assert!(!plan(&cleaned, now()).cleanup);
}

#[test]
fn the_first_ingest_goes_alone() {
    let p = pipeline();
    let waiting = epochs("rrr");
    let first = PipelineView { has_raw: false, ..view(&p, &waiting) };
    assert_eq!(plan(&first, now()).ingests.len(), 1);
    assert_eq!(plan(&view(&p, &waiting), now()).ingests.len(), 3);
    let out = epochs("Irr");
    let first = PipelineView { has_raw: false, ..view(&p, &out) };
    assert!(plan(&first, now()).ingests.is_empty());
}

#[test]
fn the_window_is_shared_in_turn() {
    assert_eq!(share(&[10, 1, 10], 5, 0), [2, 1, 2]);
    assert_eq!(share(&[10, 1, 10], 2, 1), [0, 1, 1]);
    assert_eq!(share(&[1, 0], 5, 0), [1, 0]);
    assert_eq!(share(&[], 5, 0), [0; 0]);
}
