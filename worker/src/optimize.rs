//! Optimize: one bin of main's small and worn files becomes larger files sorted by key. No row changes.

use std::time::Instant;

use alluvium_protocol::marker::{Markers, maintenance_app_id};
use alluvium_protocol::task::{Report, Task};
use alluvium_protocol::{Code, Error, Pipeline, Result, crash};
use alluvium_table::classify::foreign;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::session::{quoted_list, work_session};
use alluvium_table::upkeep::{BIN_FILES_MIN, candidates};
use alluvium_table::write::FileWriter;
use alluvium_table::{LiveFile, Table};

use crate::ingest::table_names;
use crate::merge::{check_age, count_files};
use crate::{Permit, Workshop};

/// Carries out an optimize task: at most one bin.
pub async fn optimize(workshop: &Workshop, task: &Task, permit: &Permit) -> Result<Report> {
    let pipeline = &task.pipeline;
    let _turn = workshop.tables.turn(&pipeline.main).await;
    let Some(mut main) = workshop.tables.open(&pipeline.main).await? else {
        return Ok(Report { already: true, ..Report::default() });
    };
    let key = table_names(&main, &pipeline.content.key);
    let bin = pick_bin(&main, pipeline).await?;
    if bin.is_empty() {
        let (main_files, main_small_files) = count_files(&main, pipeline).await?;
        return Ok(Report { already: true, main_files, main_small_files, ..Report::default() });
    }
    let report =
        rewrite(&mut main, pipeline, task.work.step().as_str(), &bin, &key, permit).await?;
    workshop.tables.remember(&main);
    let (main_files, main_small_files) = count_files(&main, pipeline).await?;
    Ok(Report { main_files, main_small_files, ..report })
}

/// Candidates of the partition that has most of them, smallest first, up to the bin's size.
async fn pick_bin(table: &Table, pipeline: &Pipeline) -> Result<Vec<LiveFile>> {
    let by_partition = candidates(table.files().await?, pipeline.sizes.target_file_bytes);
    let Some(mut most) = by_partition.into_iter().max_by_key(Vec::len) else {
        return Ok(Vec::new());
    };
    most.sort_by_key(|file| (file.size, file.path.clone()));
    let mut bytes = 0;
    let mut bin = Vec::new();
    for file in most {
        bytes += file.size;
        if bytes > pipeline.sizes.bin_bytes && bin.len() >= BIN_FILES_MIN {
            break;
        }
        bin.push(file);
    }
    Ok(bin)
}

/// Writes the rows of `bin` anew, sorted by `key`, and commits for exactly this snapshot. A lost
/// race drops the bin: the next task picks one on the newer snapshot.
pub(crate) async fn rewrite(
    table: &mut Table,
    pipeline: &Pipeline,
    step: &str,
    bin: &[LiveFile],
    key: &[String],
    permit: &Permit,
) -> Result<Report> {
    let doing = "rewrite small files";
    let started = Instant::now();
    let session = work_session(pipeline.sizes.memory_bytes);
    let paths: Vec<String> = bin.iter().map(|file| file.path.clone()).collect();
    table.register(&session, "bin", Some(&paths)).await?;
    let order = match key.is_empty() {
        true => String::new(),
        false => format!(" ORDER BY {}", quoted_list(key.iter().map(String::as_str))),
    };
    let sql = format!("SELECT * FROM bin{order}");
    let frame = session.sql(&sql).await.map_err(|e| foreign(doing, &e))?;
    let stream = frame.execute_stream().await.map_err(|e| foreign(doing, &e))?;
    let writer = FileWriter::new(table, pipeline.sizes.target_file_bytes)?;
    let mut written = writer.write_all(stream).await?;
    crash::point("optimize.after_write")?;
    permit.check()?;
    let before: Option<u64> = bin.iter().map(LiveFile::live_rows).sum();
    if before.is_some_and(|before| before != written.rows) {
        return Err(Error::internal(format!("{} rows of {before:?} rewritten", written.rows)));
    }
    for add in &mut written.adds {
        add.data_change = false;
    }
    let removes = bin.iter().map(|file| {
        let mut remove = file.remove.clone();
        remove.data_change = false;
        remove
    });
    let maintenance = Markers::of_pipeline(&pipeline.id, table.transactions()).maintenance;
    let change = Change {
        operation: Operation::Merge,
        adds: written.adds.clone(),
        removes: removes.collect(),
        others: Vec::new(),
        markers: vec![Marker {
            app_id: maintenance_app_id(&pipeline.id),
            version: maintenance + 1,
        }],
        info: serde_json::json!({"pipeline": pipeline.id, "step": step}),
    };
    check_age(started, pipeline)?;
    crash::point("optimize.before_commit")?;
    if let CommitOutcome::Lost(error) = table.commit(change).await? {
        return Err(Error::new(Code::TableMovedOn, error.message));
    }
    crash::point("optimize.after_commit")?;
    if let Err(error) = table.checkpoint_if_due().await {
        tracing::warn!(%error, "no checkpoint; the next one makes up for it");
    }
    Ok(Report {
        main_version: Some(table.version()),
        rows_read: written.rows,
        rows_written: written.rows,
        files_added: written.adds.len() as u64,
        files_removed: bin.len() as u64,
        bytes_written: alluvium_table::bytes_of(&written.adds),
        ..Report::default()
    })
}
