//! All output: data to stdout, talk to stderr. Nothing else prints.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use alluvium_protocol::{Class, Code, Error, Result};
use anstyle::{AnsiColor, Style};
use serde_json::{Value, json};

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// All is well.
    Ok = 0,
    /// Something failed or is blocked.
    Failed = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Unhealthy.
    Unhealthy = 3,
    /// A dependency cannot be reached.
    Unreachable = 4,
    /// Conflict or locked.
    Conflict = 5,
    /// Interrupted.
    Interrupted = 130,
}

/// The exit code of an error that ends the process.
pub(crate) fn exit_of(code: Code) -> Exit {
    match code {
        Code::ConfigInvalid
        | Code::ConfigNotFound
        | Code::UnknownPipeline
        | Code::UnknownEpoch
        | Code::NotPossibleNow
        | Code::RepairUnknown
        | Code::EpochSettled
        | Code::RestoreImpossible => Exit::Usage,
        Code::StateLocked | Code::SettingsMismatch | Code::TableNotOurs => Exit::Conflict,
        Code::SourceUnreadable
        | Code::StorageUnavailable
        | Code::StorageUnsafe
        | Code::QueueFailed
        | Code::AlertNotSent
        | Code::LeasesUnavailable
        | Code::CoordinatorUnreachable => Exit::Unreachable,
        _ => Exit::Failed,
    }
}

/// Prints what clap has to say.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { Exit::Ok as u8 })
}

/// Prints the error that ends the process.
pub(crate) fn failure(error: &Error) -> ExitCode {
    tell_error(error);
    ExitCode::from(exit_of(error.code) as u8)
}

/// stderr is read by machines: each line is a JSON object, as log lines are.
static FOR_MACHINES: AtomicBool = AtomicBool::new(false);

/// From here on all talk is JSON lines.
pub(crate) fn talk_to_machines() {
    FOR_MACHINES.store(true, Ordering::Relaxed);
}

fn is_for_machines() -> bool {
    FOR_MACHINES.load(Ordering::Relaxed)
}

fn json_line(level: &str, text: &str, more: Value) {
    let mut line = json!({
        "timestamp": chrono::Utc::now().to_rfc3339(), "level": level, "message": text.trim(),
    });
    if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
        line.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
    }
    anstream::eprintln!("{line}");
}

/// Prints an error: what, why, what to type next.
pub(crate) fn tell_error(error: &Error) {
    if is_for_machines() {
        json_line("ERROR", &error.message, json!({"code": error.code, "help": error.help}));
        return;
    }
    let red = Style::new().fg_color(Some(AnsiColor::Red.into())).bold();
    anstream::eprintln!("{red}error{red:#} {}: {}", error.code, error.message);
    if let Some(help) = &error.help {
        anstream::eprintln!("  help: {help}");
    }
    let more = if error.class() == Class::Permanent { "" } else { " (it may pass by itself)" };
    anstream::eprintln!("  more: alluvium explain {}{more}", error.code);
}

/// Says something to the person, beside the data.
pub(crate) fn say(text: &str) {
    if is_for_machines() {
        json_line("INFO", text, json!({}));
        return;
    }
    anstream::eprintln!("{text}");
}

/// Says something that needs attention.
pub(crate) fn warn(text: &str) {
    if is_for_machines() {
        json_line("WARN", text, json!({}));
        return;
    }
    let yellow = Style::new().fg_color(Some(AnsiColor::Yellow.into())).bold();
    anstream::eprintln!("{yellow}warning{yellow:#}: {text}");
}

/// Data: a text to stdout. A closed pipe ends quietly.
pub(crate) fn data(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = stdout.write_all(b"\n");
    }
    let _ = stdout.flush();
}

/// Data: the stable JSON envelope.
pub(crate) fn json_items<T: serde::Serialize>(schema: &str, items: &[T]) -> Result<()> {
    #[derive(serde::Serialize)]
    struct Document<'a, T> {
        items: &'a [T],
        schema: String,
    }
    let document = Document { items, schema: format!("alluvium.{schema}/v1") };
    data(&serde_json::to_string_pretty(&document).map_err(Error::internal)?);
    Ok(())
}

/// Data: items as a document, or as a table of these of their fields.
pub(crate) fn items(
    output: crate::cli::Output,
    schema: &str,
    items: &[Value],
    fields: &[&str],
) -> Result<()> {
    if output == crate::cli::Output::Json {
        return json_items(schema, items);
    }
    let cell = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let rows = items.iter().map(|item| fields.iter().map(|name| cell(&item[*name])).collect());
    table(fields, rows.collect());
    Ok(())
}

/// Data: a table.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    if let Some(width) = terminal_width() {
        table.set_width(width);
    }
    table.set_header(head.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    let text: Vec<String> =
        table.to_string().lines().map(|line| line.trim_end().to_owned()).collect();
    data(&text.join("\n"));
}

fn terminal_width() -> Option<u16> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    std::env::var("COLUMNS").ok()?.parse().ok()
}

/// Data: a new picture on the screen; in a file, another one below the last.
pub(crate) fn begin_screen(title: &str) {
    let clear = if std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "\n" };
    data(&format!("{clear}{title}\n"));
}

/// Asks before something is changed. Without a terminal only `--yes` goes on.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<bool> {
    if yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(Code::NotPossibleNow, "this asks first, and there is no terminal")
            .with_help("add `--yes`"));
    }
    anstream::eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(Error::internal)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// stderr is a terminal: progress may move.
pub(crate) fn is_lively() -> bool {
    std::io::stderr().is_terminal()
}
