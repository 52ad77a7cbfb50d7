//! `alluvium demo`: sample epochs, processed and shown; no configuration, no services.

use std::path::Path;

use alluvium_protocol::{Code, Error, Result};
use alluvium_table::classify::foreign;
use alluvium_table::store::object_store_at;
use object_store::ObjectStoreExt;
use tokio_util::sync::CancellationToken;

use crate::cli::{DEMO_FOLDER, Demo, Output};
use crate::commands::run::drive;
use crate::commands::{query, stand};
use crate::printer::{self, Exit};
use crate::sample::{self, Size};
use crate::{config, lock};

/// The demo's configuration, to be read and changed.
const CONFIGURATION: &str = r#"# Written by `alluvium demo`. All settings: `alluvium config reference`
[state]
uri = "./lake/_alluvium"             # ledger and manifests

[pipeline.researchers]
source = "./incoming-data"           # one folder per delivery, named by its time
raw    = "./lake/raw"                # every row that came, by epoch
main   = "./lake/main"               # the current row of each key
key    = ["pguid"]
delete_when = "op = 'D'"
ready  = { marker = "_SUCCESS" }     # a folder is complete when this file is in it
"#;

/// Lies in a demo's folder until its data and configuration are written.
const BEGUN: &str = ".alluvium-demo-begun";

/// Carries out `demo`.
pub(crate) async fn demo(config: Option<&Path>, demo: &Demo) -> Result<Exit> {
    if let Some(uri) = demo.out.to_str().filter(|out| out.contains("://")) {
        return to_storage(config, demo, uri).await;
    }
    let out = &demo.out;
    let file = out.join("alluvium.toml");
    let size = Size { rows: demo.rows, seed: demo.seed };
    let late = demo.epochs / 2;
    let incomplete = demo.epochs - 1;
    let is_new = !file.exists();
    if is_new {
        prepare(out, &file, demo, late, incomplete, size)?;
    } else {
        printer::say(&format!(
            "{} is there already: nothing is written, the run goes on where it ended\n",
            out.display()
        ));
    }
    if demo.data_only {
        sample::write(&out.join("incoming-data"), late, size, true)?;
        printer::say(&format!("process it: cd {} && alluvium run --once", in_shell(out)));
        return Ok(Exit::Ok);
    }
    process(&file).await?;
    if is_new {
        printer::say(&format!(
            "\nepoch {} arrives late, after higher ones are in main: it must not overwrite them",
            sample::epoch(late)
        ));
        sample::write(&out.join("incoming-data"), late, size, true)?;
        process(&file).await?;
    }
    show(&file).await?;
    next_steps(out);
    Ok(Exit::Ok)
}

/// Writes the folders below a location of a configured storage; `_SUCCESS` comes last in each.
async fn to_storage(file: Option<&Path>, demo: &Demo, uri: &str) -> Result<Exit> {
    if !demo.data_only {
        let text = format!("{uri}: only the data can be written there");
        return Err(Error::new(Code::NotPossibleNow, text).with_help("add `--data-only`"));
    }
    config::load(file)?;
    let folder = tempfile::tempdir().map_err(|e| foreign("make a temporary folder", &e))?;
    let size = Size { rows: demo.rows, seed: demo.seed };
    let store = object_store_at(uri)?;
    for index in 0..demo.epochs {
        sample::write(folder.path(), index, size, index + 1 != demo.epochs)?;
        let epoch = sample::epoch(index).to_string();
        let made = folder.path().join(&epoch);
        let doing = || format!("write {uri}/incoming-data/{epoch}");
        let entries = made.read_dir().map_err(|e| foreign(doing(), &e))?;
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        // `part-0.parquet` before `_SUCCESS`.
        names.sort_by_key(|name| name.starts_with('_'));
        for name in names {
            let body = std::fs::read(made.join(&name)).map_err(|e| foreign(doing(), &e))?;
            let at = object_store::path::Path::from(format!("incoming-data/{epoch}/{name}"));
            store.put(&at, body.into()).await.map_err(|e| foreign(doing(), &e))?;
        }
        std::fs::remove_dir_all(&made).map_err(|e| foreign(doing(), &e))?;
    }
    printer::say(&format!(
        "wrote {} epoch folders of {} rows to {uri}/incoming-data, the last one incomplete",
        demo.epochs, demo.rows
    ));
    Ok(Exit::Ok)
}

fn prepare(
    out: &Path,
    file: &Path,
    demo: &Demo,
    late: u64,
    incomplete: u64,
    size: Size,
) -> Result<()> {
    // Written first: a demo that was cut off while it wrote its data is known by it, and begins anew.
    let begun = out.join(BEGUN);
    let is_taken = out.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if is_taken && !begun.exists() {
        let text = format!("{} is not empty and holds no demo", out.display());
        return Err(Error::new(Code::NotPossibleNow, text)
            .with_help("name another folder: `alluvium demo --out DIR`"));
    }
    printer::say(&format!(
        "writing {} epoch folders of {} rows to {}",
        demo.epochs,
        demo.rows,
        out.join("incoming-data").display()
    ));
    let failed = |e: std::io::Error| foreign(format!("write {}", begun.display()), &e);
    std::fs::create_dir_all(out).map_err(failed)?;
    std::fs::write(&begun, "").map_err(failed)?;
    let source = out.join("incoming-data");
    for index in (0..demo.epochs).filter(|index| *index != late) {
        sample::write(&source, index, size, index != incomplete)?;
    }
    std::fs::write(file, CONFIGURATION)
        .map_err(|e| foreign(format!("write {}", file.display()), &e))?;
    std::fs::remove_file(&begun).map_err(failed)
}

async fn process(file: &Path) -> Result<()> {
    let config = config::load(Some(file))?;
    let _lock = lock::take(&config.state, CancellationToken::new()).await?;
    let pipelines = config.select(None)?;
    let (outcome, totals) = drive(&config, pipelines, true, CancellationToken::new()).await?;
    if totals.merged == 0 && totals.ingested == 0 {
        printer::say("nothing to process: every complete epoch is in main already");
    }
    for (_, epoch, why) in &outcome.incomplete {
        printer::say(&format!("left alone: {epoch}: {why}"));
    }
    if outcome.stopped > 0 {
        return Err(Error::internal("the sample data cannot be processed"));
    }
    Ok(())
}

async fn show(file: &Path) -> Result<()> {
    printer::say("\nevery epoch (`alluvium epochs`):");
    stand::epochs(Some(file), None, None, Output::Table).await?;
    printer::say("\na few rows of main (`alluvium query researchers \"…\"`):");
    let sql = "SELECT pguid, wos_count, tot_cites, hindex, award_amount_usd FROM main \
               ORDER BY tot_cites DESC LIMIT 5";
    let now = query::At { version: None, epoch: None };
    query::query(Some(file), "researchers", sql, now, Output::Table).await?;
    Ok(())
}

fn next_steps(out: &Path) {
    let main = std::path::absolute(out.join("lake/main")).unwrap_or_else(|_| out.join("lake/main"));
    let again = match out.to_str() {
        Some(DEMO_FOLDER) => String::new(),
        _ => format!(" --out {}", in_shell(out)),
    };
    printer::say(&format!(
        "
main table  {main}
{path}again       alluvium demo{again}    nothing is processed twice
look on     cd {out}
            alluvium status                           what is fresh, and why not
            alluvium query researchers \"SELECT count(*) FROM main\"
            alluvium undo researchers {first}      take an epoch back, then `replay` it
from Python pip install deltalake polars
            python3 -c 'import polars; print(polars.read_delta(\"{main}\"))'
your data   alluvium config reference > alluvium.toml",
        main = main.display(),
        path = path_line(),
        out = in_shell(out),
        first = sample::epoch(0),
    ));
}

/// A path as a shell takes it.
fn in_shell(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    if is_plain { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// How to reach the program by its name, where it was started by a path (as `cargo run` does).
fn path_line() -> String {
    let is_by_name = std::env::args_os().next().is_some_and(|name| name == "alluvium");
    match std::env::current_exe() {
        Ok(program) if !is_by_name => match program.parent() {
            Some(folder) => format!("first       export PATH={}:$PATH\n", in_shell(folder)),
            None => String::new(),
        },
        _ => String::new(),
    }
}
