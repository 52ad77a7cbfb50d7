//! Says which commit the program was built from, for `--version` and `alluvium_build_info`.

use std::path::Path;
use std::process::Command;

fn main() {
    // An image is built without the repository around it.
    println!("cargo::rerun-if-env-changed=ALLUVIUM_COMMIT");
    let given = std::env::var("ALLUVIUM_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(of_checkout).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=ALLUVIUM_COMMIT={commit}");
}

/// None: the source does not stand in a checkout of its own.
fn of_checkout() -> Option<String> {
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != Path::new(".").canonicalize().ok()? {
        return None;
    }
    // Gets a line with each commit and each checkout.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let done =
        Command::new("git").args(arguments).output().ok().filter(|done| done.status.success())?;
    Some(String::from_utf8(done.stdout).ok()?.trim().to_owned())
}
