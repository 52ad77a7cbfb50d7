//! The hook after a merge: a command or URL for people who refresh an index or a cache.
//!
//! It is told the newest version of main, at least once, and never touches the table: a failure is
//! told, and it is called again after longer and longer pauses. What it was told last is kept below
//! the state folder; losing that means telling it once more.

use std::process::Stdio;
use std::time::Duration;

use alluvium_protocol::{Code, Epoch, Error, Result, crash};
use alluvium_table::store::object_store_at;
use chrono::{DateTime, Utc};
use object_store::{ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::alerts::sinks::{client, shown};
use crate::book::Book;

/// An answer or a last word of a command is shown so far.
const SHOWN: usize = 300;
/// Pause after the first failure; doubled up to the longest.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// How long the last words of a program that failed are waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Epochs that are named.
const EPOCHS_MAX: usize = 1000;

/// What is called.
#[derive(Clone, Debug)]
pub enum Call {
    /// A POST with the JSON as its body; 2xx is success.
    Url(String),
    /// A program and its arguments; the JSON comes on its stdin, exit 0 is success.
    Command(Vec<String>),
}

/// A configured hook.
#[derive(Clone, Debug)]
pub struct Hook {
    /// What is called.
    pub call: Call,
    /// It counts as failed after so long.
    pub deadline: Duration,
}

/// How a pipeline's hook stands.
#[derive(Clone, Debug, Default)]
pub struct HookState {
    /// What it was told last is read.
    pub is_known: bool,
    /// The version it was told last.
    pub told: Option<i64>,
    /// The version of main that it is to be told.
    pub wanted: Option<i64>,
    /// Epochs that came since.
    pub epochs: Vec<Epoch>,
    /// Epochs that a rollback took out since.
    pub taken_out: Vec<Epoch>,
    /// It runs now.
    pub is_running: bool,
    /// Failures since the last success.
    pub failures: u32,
    /// What went wrong last.
    pub error: Option<String>,
    /// Not before then.
    pub not_before: Option<DateTime<Utc>>,
}

/// A call that ended.
pub struct HookEnded {
    pipeline: String,
    version: i64,
    epochs: Vec<Epoch>,
    taken_out: Vec<Epoch>,
    result: Result<()>,
}

#[derive(Serialize, Deserialize)]
struct Told {
    main_version: i64,
}

fn document(pipeline: &str) -> Path {
    Path::from(format!("hooks/{pipeline}.json"))
}

async fn read(state: &str, pipeline: &str) -> Option<i64> {
    let found = object_store_at(state).ok()?.get(&document(pipeline)).await.ok()?;
    let told: Told = serde_json::from_slice(&found.bytes().await.ok()?).ok()?;
    Some(told.main_version)
}

impl HookState {
    /// Something is to be told, and nothing stands in the way.
    fn is_due(&self, now: DateTime<Utc>) -> bool {
        self.is_behind() && !self.is_running && self.not_before.is_none_or(|at| at <= now)
    }

    /// It was not told of the newest version.
    pub(crate) fn is_behind(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.told.is_none_or(|told| told < wanted))
    }

    /// Main got new content.
    pub(crate) fn note(&mut self, version: Option<i64>, epochs: &[Epoch]) {
        self.wanted = version.max(self.wanted);
        self.taken_out.retain(|epoch| !epochs.contains(epoch));
        extend(&mut self.epochs, epochs);
    }

    /// A rollback took epochs out of main.
    pub(crate) fn note_rollback(&mut self, version: Option<i64>, epochs: &[Epoch]) {
        self.wanted = version.max(self.wanted);
        self.epochs.retain(|epoch| !epochs.contains(epoch));
        extend(&mut self.taken_out, epochs);
    }
}

fn extend(known: &mut Vec<Epoch>, epochs: &[Epoch]) {
    known.extend(epochs);
    let excess = known.len().saturating_sub(EPOCHS_MAX);
    known.drain(..excess);
}

/// Begins the call of a pipeline's hook, if one is due.
pub(crate) async fn begin(
    book: &mut Book,
    now: DateTime<Utc>,
    ended: &mpsc::UnboundedSender<HookEnded>,
) {
    let (Some(hook), Some(state)) = (book.policy.hook.clone(), book.hook.as_mut()) else { return };
    if !state.is_known {
        state.told = read(&book.pipeline.state, &book.pipeline.id).await;
        state.is_known = true;
        // Nothing is known to have been told: the newest version is, be it once more. A table that was
        // made anew has lower versions than the one that was told.
        let newest = book.versions.1.filter(|_| book.has_main);
        state.told = state.told.filter(|told| newest.is_some_and(|newest| *told <= newest));
        state.wanted = state.wanted.max(newest);
    }
    let Some(version) = state.wanted.filter(|_| state.is_due(now)) else { return };
    state.is_running = true;
    let epochs = std::mem::take(&mut state.epochs);
    let taken_out = std::mem::take(&mut state.taken_out);
    let (pipeline, main) = (book.pipeline.id.clone(), book.pipeline.main.clone());
    let store = book.pipeline.state.clone();
    let ended = ended.clone();
    tokio::spawn(async move {
        let body = json!({
            "event": if epochs.is_empty() && !taken_out.is_empty() { "rolled_back" } else { "merged" },
            "pipeline": pipeline, "main": main, "main_version": version, "epochs": epochs,
            "taken_out": taken_out,
        });
        let result = run(&hook, &pipeline, version, &body, &store).await;
        // Nobody listens any more: the next process calls it again.
        let _ = ended.send(HookEnded { pipeline, version, epochs, taken_out, result });
    });
}

/// Takes the end of a call in.
pub(crate) fn end(book: &mut Book, ended: HookEnded, now: DateTime<Utc>) {
    let Some(state) = book.hook.as_mut() else { return };
    state.is_running = false;
    match ended.result {
        Ok(()) => {
            state.told = Some(ended.version);
            state.failures = 0;
            state.error = None;
            state.not_before = None;
        }
        Err(error) => {
            tracing::warn!(%error, pipeline = book.pipeline.id, "the hook failed; it is called again");
            let pause = PAUSE.saturating_mul(1 << state.failures.min(10)).min(PAUSE_MAX);
            state.failures += 1;
            state.error = Some(error.to_string());
            state.not_before = chrono::Duration::from_std(pause).ok().map(|pause| now + pause);
            let later = std::mem::replace(&mut state.epochs, ended.epochs);
            let later_out = std::mem::replace(&mut state.taken_out, ended.taken_out);
            state.note_rollback(None, &later_out);
            state.note(None, &later);
        }
    }
}

impl HookEnded {
    /// Whose hook it was.
    pub(crate) fn is_of(&self, book: &Book) -> bool {
        self.pipeline == book.pipeline.id
    }
}

async fn run(
    hook: &Hook,
    pipeline: &str,
    version: i64,
    body: &serde_json::Value,
    state: &str,
) -> Result<()> {
    crash::point("hook.before_call")?;
    let failed = |text: String| {
        Error::new(
            Code::HookFailed,
            format!("after_merge of {pipeline}: {text}; it was told {body}"),
        )
    };
    let call = async {
        match &hook.call {
            Call::Url(url) => post(url, body, hook.deadline).await,
            Call::Command(words) => command(words, body).await,
        }
    };
    match tokio::time::timeout(hook.deadline, call).await {
        Ok(result) => result.map_err(failed)?,
        Err(_) => return Err(failed(format!("no end within {:?}", hook.deadline))),
    }
    crash::point("hook.after_call")?;
    let told = serde_json::to_vec(&Told { main_version: version }).map_err(Error::internal)?;
    let stored = object_store_at(state)?.put(&document(pipeline), told.into()).await;
    if let Err(error) = stored {
        tracing::warn!(%error, "the hook is told again after a restart");
    }
    Ok(())
}

async fn post(url: &str, body: &serde_json::Value, most: Duration) -> Result<(), String> {
    let text = |e: reqwest::Error| e.without_url().to_string();
    let request = client().map_err(text)?.post(url).timeout(most).json(body);
    let answer = request.send().await.map_err(text)?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let said = shown(&answer.text().await.unwrap_or_default(), SHOWN);
    Err(format!("it answered {status} {said}"))
}

async fn command(words: &[String], body: &serde_json::Value) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else {
        return Err("it names no program".to_owned());
    };
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .env("ALLUVIUM_PIPELINE", body["pipeline"].as_str().unwrap_or_default())
        .env("ALLUVIUM_MAIN", body["main"].as_str().unwrap_or_default())
        .env("ALLUVIUM_MAIN_VERSION", body["main_version"].to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{program}: {e}"))?;
    let mut group = Group(child.id());
    let said = read_end(child.stderr.take());
    tokio::pin!(said);
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input has it its way.
        let _ = stdin.write_all(body.to_string().as_bytes()).await;
    }
    let mut heard = None;
    let status = tokio::select! {
        status = child.wait() => status,
        text = &mut said => {
            heard = Some(text);
            child.wait().await
        }
    };
    let status = status.map_err(|e| format!("{program}: {e}"))?;
    // What it left behind may go on, and may hold its stderr open.
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    let heard = match heard {
        Some(text) => text,
        None => tokio::time::timeout(LAST_WORDS, said).await.unwrap_or_default(),
    };
    Err(format!("{program} ended with {status}: {heard}"))
}

/// The end of what a program says on stderr.
async fn read_end(stderr: Option<tokio::process::ChildStderr>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..read]);
        let excess = kept.len().saturating_sub(4 * SHOWN);
        kept.drain(..excess);
    }
    let text = String::from_utf8_lossy(&kept);
    let skipped = text.trim().chars().count().saturating_sub(SHOWN);
    shown(&text.trim().chars().skip(skipped).collect::<String>(), SHOWN)
}

/// A program with its children, ended together unless it ended by itself.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.and_then(|id| i32::try_from(id).ok());
        if let Some(group) = id.and_then(rustix::process::Pid::from_raw) {
            // Gone already: nothing is to be ended.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}
