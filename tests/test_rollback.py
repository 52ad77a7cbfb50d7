"""Rollback: main goes back in one commit, stays there, and goes on when somebody says so."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from lake import Lake
from receivers import wait_for


def three(lake: Lake) -> Lake:
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    lake.deliver(20, [("a", 2, "U"), ("c", 2, "U")])
    lake.run()
    lake.deliver(30, [("b", 3, "D"), ("d", 3, "U")])
    lake.run()
    assert lake.main() == AFTER[30]
    return lake


AFTER = {
    10: {"a": 1, "b": 1},
    20: {"a": 2, "b": 1, "c": 2},
    30: {"a": 2, "c": 2, "d": 3},
}


def rollback(lake: Lake, *point: str, code: int = 0):
    result = lake.alluvium("rollback", "p", *point, "--yes")
    assert result.code == code, result.err
    return result


def is_held(lake: Lake) -> bool:
    return lake.markers("main").get("alluvium/p/hold", 0) % 2 == 1


@pytest.mark.parametrize("epoch", [10, 20])
def test_to_an_epoch_and_on_again(tmp_path: Path, epoch: int):
    lake = three(Lake(tmp_path).pipeline())
    files = "the files of version" in rollback(lake, "--to-epoch", str(epoch)).err
    assert files, "a version that holds just that is restored, not computed"
    assert lake.main() == AFTER[epoch] and is_held(lake)
    assert lake.states() == {e: "processed" if e <= epoch else "ingested" for e in AFTER}
    # Nothing moves while it is held, whatever is lost or delivered.
    shutil.rmtree(tmp_path / "state")
    lake.deliver(40, [("e", 4, "U")])
    lake.run()
    assert lake.main() == AFTER[epoch]
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main() == AFTER[30] | {"e": 4}
    assert set(lake.states().values()) == {"processed"}


def test_a_late_epoch_makes_it_computed_from_raw(tmp_path: Path):
    lake = three(Lake(tmp_path).pipeline())
    lake.deliver(15, [("b", 9, "U"), ("z", 9, "U")])
    lake.run()
    result = rollback(lake, "--to-epoch", "20")
    assert "computed from raw" in result.err
    assert lake.main() == {"a": 2, "b": 9, "c": 2, "z": 9}
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main() == {"a": 2, "c": 2, "d": 3, "z": 9}


def test_to_a_version_and_forward_again(tmp_path: Path):
    lake = three(Lake(tmp_path).pipeline())
    newest = lake.version("main")
    versions = lake.alluvium("tables", "history", "p", "-o", "json").json()
    merged = {item["epochs"]: item["version"] for item in versions if item["step"] == "merge"}
    rollback(lake, "--to-version", str(merged["10"]))
    assert lake.main() == AFTER[10]
    # The version before the rollback brings the epochs back without a merge.
    plan = lake.alluvium("rollback", "p", "--to-version", str(newest), "--dry-run", "-o", "json")
    assert plan.json()[0]["brings_back"] == [20, 30] and lake.main() == AFTER[10]
    rollback(lake, "--to-version", str(newest))
    assert lake.main() == AFTER[30]
    assert set(lake.states().values()) == {"processed"}
    before = lake.version("main")
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.version("main") == before + 1, "only the hold is taken away"


def test_dry_run_changes_nothing(tmp_path: Path):
    lake = three(Lake(tmp_path).pipeline())
    before = lake.version("main")
    result = lake.alluvium("rollback", "p", "--to-epoch", "10", "--dry-run")
    assert result.code == 0 and "out of main: 2 epoch(s): 20, 30" in result.err
    assert lake.version("main") == before and not list((tmp_path / "state").glob("requests/*"))


@pytest.mark.parametrize(
    ("point", "says"),
    [
        (["--to-epoch", "30"], "nothing to roll back"),
        (["--to-version", "99"], "the newest is"),
        (["--to-version", "0"], "made before the pipeline"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, point: list[str], says: str):
    lake = three(Lake(tmp_path).pipeline())
    if point[-1] == "0":
        # The first version of a table that the pipeline made is its own, and empty.
        assert rollback(lake, *point) and lake.main() == {}
        return
    result = rollback(lake, *point, code=2)
    assert says in result.err and lake.main() == AFTER[30] and not is_held(lake)


def test_a_version_with_an_earlier_content_is_refused(tmp_path: Path):
    lake = three(Lake(tmp_path).pipeline())
    version = lake.version("main")
    lake.deliver(20, [("a", 7, "U")])
    assert lake.alluvium("replay", "p", "20", "--yes").code == 0
    result = rollback(lake, "--to-version", str(version), code=2)
    assert "AL-0409" in result.err and "20" in result.err and not is_held(lake)
    rollback(lake, "--to-epoch", "20")
    assert lake.main() == {"a": 7, "b": 1}


def test_points_are_kept_by_cleanup(tmp_path: Path):
    short = {"ALLUVIUM_TEST_SHORT_RETENTION": "1"}
    more = 'cleanup = { every = "1ms", retention = "1s" }'
    lake = Lake(tmp_path).pipeline(more=more)

    def is_old() -> bool:
        newest = max(path.stat().st_mtime for path in (tmp_path / "p").rglob("*.json"))
        return time.time() - newest > 1.2

    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run(env=short)
    assert lake.alluvium("rollback-point", "add", "p", "good", env=short).code == 0
    version = lake.alluvium("rollback-point", "list", "p", "-o", "json", env=short).json()[0]
    assert version["name"] == "good" and "all" in version["files"]
    lake.deliver(20, [("a", 2, "U"), ("c", 2, "U")])
    lake.run(env=short)
    wait_for(is_old, "the retention is over")
    for epoch in (30, 40):
        lake.deliver(epoch, [("a", epoch, "U")])
        lake.run(env=short)
        wait_for(is_old, "the retention is over")
    lake.run(env=short)
    # The version after the point is no longer there, the point is.
    result = lake.alluvium(
        "rollback", "p", "--to-version", str(version["version"] + 2), "--yes", env=short
    )
    assert result.code == 2 and "AL-0409" in result.err
    done = lake.alluvium(
        "rollback", "p", "--to-version", str(version["version"]), "--yes", env=short
    )
    assert done.code == 0, done.err
    assert lake.main() == AFTER[10]
    # Forgotten, and no longer live: cleanup takes it.
    assert lake.alluvium("resume", "p", env=short).code == 0
    lake.run(env=short)
    assert lake.main() == {"a": 40, "b": 1, "c": 2}
    assert lake.alluvium("rollback-point", "remove", "p", "good", env=short).code == 0
    assert lake.alluvium("rollback-point", "remove", "p", "good", env=short).code == 2
    wait_for(is_old, "the retention is over")
    lake.run(env=short)
    again = lake.alluvium(
        "rollback", "p", "--to-version", str(version["version"]), "--yes", env=short
    )
    assert again.code == 2 and "AL-0409" in again.err


def test_a_missing_file_of_a_point_is_told(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    assert lake.alluvium("rollback-point", "add", "p", "good").code == 0
    first = set((tmp_path / "p/main").glob("*.parquet"))
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "U")])
    lake.run()
    for path in first:
        path.unlink()
    listed = lake.alluvium("rollback-point", "list", "p")
    assert listed.code == 3 and "MISSING" in listed.out


def test_a_missing_deletion_vector_of_a_point_is_told(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize.enabled = false")
    rows = [(f"k{number:05}", 1, "U") for number in range(5000)]
    lake.deliver(10, rows)
    lake.run()
    lake.deliver(20, [(key, 2, "U") for key, _, _ in rows[::3]])
    lake.run()
    assert lake.alluvium("rollback-point", "add", "p", "good").code == 0
    assert lake.alluvium("rollback-point", "list", "p").code == 0
    [vectors] = (tmp_path / "p/main/_dv").glob("*.bin")
    vectors.unlink()
    listed = lake.alluvium("rollback-point", "list", "p")
    assert listed.code == 3 and "MISSING" in listed.out


def test_counts_that_disagree_block_the_epoch(tmp_path: Path):
    """The checks before each commit: nothing is committed."""
    for step in ("ingest", "ingest.files", "merge", "merge.files"):
        root = tmp_path / step
        root.mkdir()
        lake = Lake(root).pipeline()
        lake.deliver(10, [("a", 1, "U"), (None, 1, "U")])
        result = lake.run(code=1, env={"ALLUVIUM_MISCOUNT": step})
        assert "AL-0410" in result.err, step
        assert lake.states() == {10: "blocked"}, step
        lake.run()
        assert lake.main() == {"a": 1} and lake.states() == {10: "processed"}, step


def test_rows_of_main_that_are_not_what_was_committed_stop_the_pipeline_for_good(tmp_path: Path):
    """It is in main already: no later process merges more before somebody looked."""
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U")])
    result = lake.run(code=1, env={"ALLUVIUM_MISCOUNT": "merge.landed"})
    assert "AL-0410" in result.err and "alluvium resume p" in result.err
    lake.deliver(20, [("b", 2, "U")])
    lake.run()
    assert lake.main() == {"a": 1} and lake.states()[20] != "processed"
    assert lake.alluvium("status", "-o", "json").json()[0]["health"] == "paused"
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
