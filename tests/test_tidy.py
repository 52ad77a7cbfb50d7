"""What is agreed about the source, checked: headers, sizes, crash points, words that must not be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ["src", "protocol/src", "table/src", "coordinator/src", "worker/src"]
    for path in sorted((ROOT / folder).rglob("*.rs"))
]
LINES_MAX = 600


def test_every_file_says_what_it_owns():
    missing = [str(path) for path in SOURCES if not path.read_text().startswith("//! ")]
    assert missing == []


def test_files_can_be_read_in_one_sitting():
    long = {str(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > LINES_MAX}
    assert long == {}


def test_crash_points_in_the_source_are_the_listed_ones():
    listed = set(re.findall(r'^    "([a-z]+\.[a-z_]+)",$', (ROOT / "protocol/src/crash.rs").read_text(), re.M))
    used = set()
    for path in SOURCES:
        used |= set(re.findall(r'crash::point\(\s*"([^"]+)"', path.read_text()))
    assert used == listed


def test_only_the_table_crate_names_deltalake():
    allowed = ROOT / "table/src"
    naming = [
        str(path) for path in SOURCES
        if allowed not in path.parents and re.search(r"\bdeltalake::", path.read_text())
    ]
    assert naming == []


def test_backoff_is_named_in_one_module():
    naming = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"\bbackoff::", p.read_text())]
    assert naming == ["table/src/pause.rs"]


def test_coordinator_and_worker_do_not_see_each_other():
    for one, other in [("coordinator", "worker"), ("worker", "coordinator")]:
        assert f"alluvium-{other}" not in (ROOT / one / "Cargo.toml").read_text()


def test_readme_and_changelog_are_there_and_true():
    readme = (ROOT / "README.md").read_text()
    assert "cargo run --release -- demo" in readme and "scripts/test" in readme
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_each_trap_is_marked_with_tests_that_exist():
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+){2,})`", (ROOT / "docs/traps.md").read_text()))
    sources = [*ROOT.glob("tests/*.py"), *(path for path in ROOT.rglob("*.rs") if "target" not in path.parts)]
    text = "\n".join(path.read_text() for path in sources)
    missing = {name for name in named if not re.search(rf"(def|fn) {name}\(", text)}
    assert len(named) > 50 and not missing, missing
