//! Two writers with one snapshot: compare-and-swap lets one win, and no row is doubled.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::clock::SystemClock;
use alluvium_protocol::pipeline::{Content, OnBlock, Order, Pipeline, Ready, Sizes};
use alluvium_protocol::task::{FORMAT_MAJOR, Task, Work};
use alluvium_table::arrow::array::{Int64Array, RecordBatch, StringArray};
use alluvium_table::arrow::datatypes::{DataType, Field, Schema};
use alluvium_table::commit::{Change, CommitOutcome, Operation};
use alluvium_table::session::query_session;
use alluvium_table::write::FileWriter;
use alluvium_table::{Table, TableSpec, query};
use alluvium_worker::tables::Tables;
use alluvium_worker::{Permit, Workshop};

fn pipeline(folder: &std::path::Path) -> Pipeline {
    let path = |name: &str| folder.join(name).display().to_string();
    Pipeline {
        id: "p".to_owned(),
        source: path("in"),
        raw: path("raw"),
        main: path("main"),
        quarantine: path("quarantine"),
        state: path("state"),
        content: Content { key: vec!["id".to_owned()], ..Content::default() },
        order: Order::Sequential,
        on_block: OnBlock::Stop,
        hold_for_earlier: Duration::ZERO,
        ready: Ready::Quiet(Duration::ZERO),
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
            target_file_bytes: 1 << 20,
            batch_epochs: 1,
            batch_bytes: 1 << 20,
            small_files: 2,
            read_cost_max: 225,
            bin_bytes: 1 << 20,
            shard_bytes: 1 << 30,
            vacuum_retention: Duration::from_secs(3600),
            memory_bytes: 64 << 20,
        },
    }
}

/// Main with `files` files of one row each.
async fn main_with(pipeline: &Pipeline, files: i64) -> Table {
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, true),
        Field::new("value", DataType::Int64, true),
    ]));
    let spec = TableSpec {
        schema: schema.clone(),
        partition_by: Vec::new(),
        properties: pipeline.content_properties().map(|(k, v)| (k.to_owned(), v)).to_vec(),
    };
    let mut table = Table::create_or_open(&pipeline.main, &spec).await.unwrap();
    for number in 0..files {
        let mut writer = FileWriter::new(&table, 1 << 20).unwrap();
        let ids = StringArray::from(vec![format!("k{number}")]);
        let values = Int64Array::from(vec![number]);
        let columns: Vec<Arc<dyn alluvium_table::arrow::array::Array>> =
            vec![Arc::new(ids), Arc::new(values)];
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        writer.write(&batch).await.unwrap();
        let adds = writer.finish().await.unwrap().adds;
        let outcome = table.commit(append(adds)).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Landed));
    }
    table
}

fn append(adds: Vec<alluvium_table::Add>) -> Change {
    Change {
        operation: Operation::Append,
        adds,
        removes: Vec::new(),
        others: Vec::new(),
        markers: Vec::new(),
        info: serde_json::Value::Null,
    }
}

async fn rows(pipeline: &Pipeline) -> i64 {
    let session = query_session(64 << 20);
    let table = Table::open(&pipeline.main).await.unwrap().unwrap();
    table.register(&session, "t", None).await.unwrap();
    let counted = query::rows(&session, "SELECT count(*) AS n FROM t").await.unwrap();
    counted[0]["n"].as_i64().unwrap()
}

fn workshop() -> Workshop {
    Workshop { clock: Arc::new(SystemClock), tables: Arc::new(Tables::default()) }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_optimizes_of_one_table_one_lands_and_rows_stay() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = pipeline(folder.path());
    main_with(&pipeline, 10).await;
    let task = Task {
        format: FORMAT_MAJOR,
        id: Task::id_of("p", &Work::Optimize, 1),
        pipeline: pipeline.clone(),
        work: Work::Optimize,
        attempt: 1,
        published_at: chrono::Utc::now(),
    };
    // Two workers, as two processes would be: each with tables of its own.
    let (one, two) = (workshop(), workshop());
    let permit = Permit::unlimited();
    let (first, second) = tokio::join!(one.execute(&task, &permit), two.execute(&task, &permit));
    let landed = [&first, &second]
        .iter()
        .filter(|done| done.as_ref().is_ok_and(|report| !report.already))
        .count();
    assert_eq!(landed, 1, "{first:?} {second:?}");
    assert_eq!(rows(&pipeline).await, 10);
    assert_eq!(Table::open(&pipeline.main).await.unwrap().unwrap().files().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_snapshot_never_commits() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = pipeline(folder.path());
    let mut table = main_with(&pipeline, 2).await;
    // Both hold one snapshot, and both would replace the same files.
    let mut rival = table.clone();
    let live = table.files().await.unwrap();
    let replace = || Change {
        operation: Operation::Merge,
        removes: live.iter().map(|file| file.remove.clone()).collect(),
        ..append(Vec::new())
    };
    let won = table.commit(replace()).await.unwrap();
    assert!(matches!(won, CommitOutcome::Landed));
    let before = table.version();
    let lost = rival.commit(replace()).await.unwrap();
    assert!(matches!(lost, CommitOutcome::Lost(_)));
    assert_eq!(Table::open(&pipeline.main).await.unwrap().unwrap().version(), before);
}
