"""A few races of each kind (`races.py`), and some in which one process stands still in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from lake import Lake
from races import MOVED_ON, RACES, Ground, is_fine, race
from receivers import stands_still

ROUNDS = 12


@pytest.mark.parametrize("name", RACES)
@pytest.mark.parametrize("vectors", ["auto", "off"])
def test_no_row_is_lost_or_doubled(name: str, vectors: str, tmp_path: Path):
    ground = Ground(tmp_path, seed=len(name), more=f'merge = {{ deletion_vectors = "{vectors}", index = "always" }}')
    for number in range(ROUNDS):
        race(ground, RACES[name], number)


def ended(process) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_an_optimize_that_a_merge_overtook_is_fitted_to_it(tmp_path: Path):
    ground = Ground(tmp_path, seed=5)
    ground.begin()
    files = len(list(ground.main.glob("*.parquet")))
    optimize = ground.step("optimize", ALLUVIUM_STOP="optimize.before_commit")
    stands_still(optimize)
    assert ended(ground.step("merge"))[0] == 0
    ground.holds(ground.after)
    os.kill(optimize.pid, signal.SIGCONT)
    out, err = optimize.communicate(timeout=120)
    assert optimize.returncode == 0, err
    assert '"conflicts":1' in out, out
    ground.holds(ground.after)
    assert len(list(ground.main.glob("*.parquet"))) > files


def test_without_marks_an_overtaken_optimize_is_given_up(tmp_path: Path):
    ground = Ground(tmp_path, seed=6, more='merge = { deletion_vectors = "off" }')
    ground.begin()
    optimize = ground.step("optimize", ALLUVIUM_STOP="optimize.before_commit")
    stands_still(optimize)
    assert ended(ground.step("merge"))[0] == 0
    os.kill(optimize.pid, signal.SIGCONT)
    code, err = ended(optimize)
    assert code == 1 and MOVED_ON in err, (code, err)
    ground.holds(ground.after)


@pytest.mark.parametrize("point", ["merge.after_plan", "merge.before_commit"])
def test_a_merge_that_an_optimize_overtook_plans_again(point: str, tmp_path: Path):
    ground = Ground(tmp_path, seed=7)
    ground.begin()
    merge = ground.step("merge", ALLUVIUM_STOP=point)
    stands_still(merge)
    assert ended(ground.step("optimize"))[0] == 0
    ground.holds(ground.before)
    os.kill(merge.pid, signal.SIGCONT)
    assert ended(merge)[0] == 0
    ground.holds(ground.after)


def test_an_optimize_that_another_overtook_is_given_up(tmp_path: Path):
    ground = Ground(tmp_path, seed=8)
    ground.begin()
    slow = ground.step("optimize", ALLUVIUM_STOP="optimize.before_commit")
    stands_still(slow)
    assert ended(ground.step("optimize"))[0] == 0
    os.kill(slow.pid, signal.SIGCONT)
    assert is_fine(*ended(slow))
    ground.holds(ground.before)
    assert ended(ground.step("merge"))[0] == 0
    ground.holds(ground.after)


@pytest.mark.parametrize("step", ["merge", "optimize"])
def test_files_of_a_step_that_stands_still_are_not_cleaned_away(step: str, tmp_path: Path):
    ground = Ground(tmp_path, seed=9)
    ground.begin()
    slow = ground.step(step, ALLUVIUM_STOP=f"{step}.before_commit")
    stands_still(slow)
    assert ended(ground.step("cleanup"))[0] == 0
    assert not list(ground.main.glob("*left-behind*"))
    os.kill(slow.pid, signal.SIGCONT)
    assert ended(slow)[0] == 0
    ground.holds(ground.after if step == "merge" else ground.before)


def test_columns_that_come_while_a_merge_prepares_main_are_merged(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()

    def deliver(*names: str) -> None:
        fields = [("id", pa.string()), ("value", pa.int64()), ("op", pa.string())] + [(n, pa.string()) for n in names]
        lake.deliver(20, [("b", 2, "U", *names)], schema=pa.schema(fields))

    deliver("first")
    unlocked = {"ALLUVIUM_TEST_NO_LOCK": "1"}
    slow = lake.start("run", "--once", env=unlocked | {"ALLUVIUM_STOP": "schema.after_commit:2"})
    stands_still(slow)
    assert "first" in DeltaTable(tmp_path / "p/main").schema().to_json(), "it is main's"
    # Read again into raw; its merge does not happen, as if this process were killed.
    deliver("first", "second")
    killed = lake.alluvium("replay", "p", "20", "--yes", env=unlocked | {"ALLUVIUM_CRASH": "ingest.after_commit"})
    assert killed.code == -signal.SIGKILL, killed.err
    os.kill(slow.pid, signal.SIGCONT)
    assert ended(slow)[0] == 0
    lake.run()
    assert [row.get("second") for row in lake.rows()] == [None, "second"]
