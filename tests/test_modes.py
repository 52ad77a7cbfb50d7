"""append, snapshot and scd2: what main is, whatever came late, again, or was taken back.

Goal: each rule of the modes in a small story, and random stories against the oracle (oracle_modes.py).
Never: upsert (all other tests), partitions (test_partitions.py), formats of files (test_formats.py).
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from lake import Lake
from oracle import Row, compare
from oracle_modes import ModeWorld, expected, read_main_of
from oracle_reading import read_table

KEY = 'key = ["id"]\n'
DELETES = """delete_when = "op = 'D'"\n"""
IGNORE = 'columns = { ignore = ["op"] }'
PART = "part-0.parquet"
TYPED = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
WIDER = pa.schema([*TYPED, ("mail", pa.string())])


def moded(root: Path, mode: str, more: str = "") -> Lake:
    """A pipeline in this mode; in append without what append does not have."""
    # These snapshots are few rows: none is held for having lost some.
    open_gate = 'gate = { rows_min = "0%" }' if mode == "snapshot" else ""
    lake = Lake(root).pipeline(more=f'mode = "{mode}"\n{open_gate}\n{more}')
    if mode == "append":
        lake.pipelines["p"] = lake.pipelines["p"].replace(KEY, "", 1).replace(DELETES, "", 1)
        lake.configure()
    return lake


def told(lake: Lake, *columns: str) -> list[tuple]:
    """Main's rows by these columns, sorted; doubled ones stand twice."""
    rows = read_table(lake.root / "p/main")
    return sorted((tuple(row[name] for name in columns) for row in rows), key=repr)


def act(lake: Lake, verb: str, epoch: int) -> None:
    done = lake.alluvium(verb, "p", str(epoch), "--yes")
    assert done.code == 0, done.err


def processed(lake: Lake) -> set[int]:
    return {epoch for epoch, state in lake.states().items() if state == "processed"}


# --- append -----------------------------------------------------------------------------------


def appended(lake: Lake) -> list[tuple]:
    return told(lake, "_epoch", "id", "value")


def two_appended(tmp_path: Path, more: str = "") -> Lake:
    lake = moded(tmp_path, "append", more)
    lake.deliver(10, [("a", 1, "U"), ("a", 1, "U"), ("b", 1, "D"), (None, 1, "U")])
    lake.deliver(20, [("a", 1, "U"), ("b", 2, "U")])
    lake.run()
    return lake


TEN = [(10, "a", 1), (10, "a", 1), (10, "b", 1), (10, None, 1)]
TWENTY = [(20, "a", 1), (20, "b", 2)]


def test_append_keeps_every_row_once_with_its_epoch(tmp_path: Path):
    """Equal rows are rows, NULL is a value, and no operation is known."""
    lake = two_appended(tmp_path)
    assert appended(lake) == TEN + TWENTY
    table = DeltaTable(tmp_path / "p/main")
    assert table.metadata().partition_columns == ["_epoch"]
    types = {field.name: field.type.type for field in table.schema().fields}
    assert types["_epoch"] == "long" and set(types) == {"id", "value", "op", "_epoch"}
    assert lake.alluvium("quarantine", "list", "-o", "json").json() == []
    before = lake.version("raw"), lake.version("main")
    lake.run()
    assert (lake.version("raw"), lake.version("main")) == before


def test_append_replaces_the_rows_of_an_epoch_that_is_replayed(tmp_path: Path):
    lake = two_appended(tmp_path)
    lake.deliver(10, [("c", 3, "U"), ("a", 1, "U")])
    for _ in range(2):
        act(lake, "replay", 10)
        assert appended(lake) == [(10, "a", 1), (10, "c", 3), *TWENTY]


def test_append_takes_out_what_is_undone_or_skipped(tmp_path: Path):
    lake = two_appended(tmp_path)
    act(lake, "undo", 10)
    assert appended(lake) == TWENTY and lake.states()[10] == "skipped"
    act(lake, "skip", 20)
    assert appended(lake) == []
    act(lake, "replay", 10)
    assert appended(lake) == TEN


def test_append_takes_a_late_epoch_as_any_other(tmp_path: Path):
    lake = two_appended(tmp_path)
    lake.deliver(15, [("a", 1, "U")])
    lake.deliver(5, [("a", 5, "U")], complete=False)
    lake.run()
    assert appended(lake) == [*TEN, (15, "a", 1), *TWENTY]
    lake.deliver(5, [("z", 5, "U")], file="part-1.parquet")
    lake.run()
    assert appended(lake)[-2:] == [(5, "a", 5), (5, "z", 5)] and processed(lake) == {5, 10, 15, 20}


@pytest.mark.parametrize("lost", ["state", "p/main"])
def test_append_doubles_nothing_when_state_or_main_is_lost(tmp_path: Path, lost: str):
    lake = two_appended(tmp_path)
    shutil.rmtree(tmp_path / lost)
    lake.deliver(30, [("a", 1, "U")])
    lake.run()
    assert appended(lake) == [*TEN, *TWENTY, (30, "a", 1)]


def test_append_knows_expectations_and_ignored_columns(tmp_path: Path):
    expect = 'expect = [{ name = "named", sql = "id IS NOT NULL", action = "quarantine" }]'
    lake = two_appended(tmp_path, f"{IGNORE}\n{expect}")
    assert appended(lake) == [row for row in TEN if row[1]] + TWENTY
    assert set(read_table(tmp_path / "p/main")[0]) == {"id", "value", "_epoch"}
    [item] = lake.alluvium("quarantine", "list", "-o", "json").json()
    assert (item["epoch"], item["reason"], item["rows"]) == (10, "expect:named", 1)


REFUSED_IN_APPEND = {
    "key": 'key = ["id"]',
    "delete_when": """delete_when = "op = 'D'\"""",
    "sequence_by": 'sequence_by = "value"',
    "on_duplicate": 'on_duplicate = "quarantine"',
    "adopt": "adopt = true\nstart_from = 10",
}


@pytest.mark.parametrize("name", REFUSED_IN_APPEND)
def test_append_refuses_what_speaks_of_keys(tmp_path: Path, name: str):
    done = moded(tmp_path, "append", REFUSED_IN_APPEND[name]).alluvium("config", "validate")
    assert done.code == 2 and f"pipeline.p.{name}" in done.err and "append" in done.err, done.err
    assert moded(tmp_path, "append").alluvium("config", "validate").code == 0


# --- snapshot ---------------------------------------------------------------------------------


def two_snapshots(tmp_path: Path, more: str = "") -> Lake:
    lake = moded(tmp_path, "snapshot", more)
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("c", 1, "U")])
    lake.run()
    assert lake.main() == {"a": 1, "b": 1, "c": 1}
    lake.deliver(20, [("b", 2, "U"), ("d", 2, "U")])
    lake.run()
    return lake


def test_snapshot_has_the_keys_of_the_newest_folder_only(tmp_path: Path):
    lake = two_snapshots(tmp_path)
    assert lake.main() == {"b": 2, "d": 2} and processed(lake) == {10, 20}


def test_snapshot_has_the_last_row_of_a_key_and_no_deletes(tmp_path: Path):
    lake = two_snapshots(tmp_path, 'sequence_by = "value"')
    lake.deliver(30, [("a", 4, "U"), ("a", 3, "U"), ("b", 3, "U"), ("b", 4, "D"), (None, 9, "U")])
    lake.run()
    assert lake.main() == {"a": 4}
    shown = lake.alluvium("quarantine", "list", "-o", "json").json()
    assert [(item["epoch"], item["reason"]) for item in shown] == [(30, "null_key")]
    lake.deliver(40, [("a", 1, "D"), ("x", 1, "D")])
    lake.run()
    assert lake.main() == {}, "deletes alone are a snapshot without rows"


def test_snapshot_is_not_changed_by_an_older_folder(tmp_path: Path):
    lake = two_snapshots(tmp_path)
    lake.deliver(15, [("a", 15, "U"), ("b", 15, "D")])
    lake.run()
    assert lake.main() == {"b": 2, "d": 2} and processed(lake) == {10, 15, 20}
    lake.deliver(10, [("z", 10, "U")])
    act(lake, "replay", 10)
    act(lake, "undo", 15)
    assert lake.main() == {"b": 2, "d": 2}


def test_snapshot_without_its_newest_folder_is_the_one_before(tmp_path: Path):
    lake = two_snapshots(tmp_path)
    lake.deliver(15, [("e", 15, "U")])
    lake.run()
    act(lake, "undo", 20)
    assert lake.main() == {"e": 15}
    act(lake, "undo", 15)
    assert lake.main() == {"a": 1, "b": 1, "c": 1}
    act(lake, "replay", 20)
    assert lake.main() == {"b": 2, "d": 2}


def test_snapshot_takes_a_replay_of_the_newest_as_it_is(tmp_path: Path):
    lake = two_snapshots(tmp_path)
    lake.deliver(20, [("c", 3, "U")])
    for _ in range(2):
        act(lake, "replay", 20)
        assert lake.main() == {"c": 3}


def test_snapshot_catches_up_to_the_newest(tmp_path: Path):
    lake = moded(tmp_path, "snapshot")
    for epoch in (9, 10, 11):
        lake.deliver(epoch, [(f"k{epoch}", epoch, "U"), ("a", epoch, "U")])
    lake.run()
    assert lake.main() == {"k11": 11, "a": 11} and processed(lake) == {9, 10, 11}


def test_snapshot_stands_where_the_newest_folder_says_nothing(tmp_path: Path):
    """Without any row it is like one that was undone."""
    lake = two_snapshots(tmp_path)
    lake.deliver(30, [])
    lake.deliver(40, [(None, 1, "U")])
    lake.run()
    assert lake.main() == {"b": 2, "d": 2} and processed(lake) == {10, 20, 30, 40}


def test_snapshot_goes_back_to_an_epoch_and_on_again(tmp_path: Path):
    lake = two_snapshots(tmp_path)
    assert lake.alluvium("rollback", "p", "--to-epoch", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 1, "c": 1}
    lake.run()
    assert lake.main() == {"a": 1, "b": 1, "c": 1}
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main() == {"b": 2, "d": 2}


# --- scd2 -------------------------------------------------------------------------------------


def versions(lake: Lake) -> set[tuple]:
    """(id, value, from, to) of each version; that is_current says the same is looked at, too."""
    rows = read_table(lake.root / "p/main")
    assert all(row["is_current"] == (row["valid_to"] is None) for row in rows), rows
    found = {(row["id"], row["value"], row["valid_from"], row["valid_to"]) for row in rows}
    assert len(found) == len(rows), f"a version stands twice: {rows}"
    return found


def historic(tmp_path: Path, more: str = "") -> Lake:
    lake = moded(tmp_path, "scd2", f"{IGNORE}\n{more}")
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("c", 1, "U")])
    lake.run()
    lake.deliver(30, [("a", 3, "U"), ("b", 3, "D"), ("c", 1, "I")])
    lake.run()
    assert versions(lake) == HISTORY
    return lake


HISTORY = {("a", 1, 10, 30), ("a", 3, 30, None), ("b", 1, 10, 30), ("c", 1, 10, None)}


def test_scd2_keeps_versions_with_their_periods(tmp_path: Path):
    """A delete ends the version, and equal values begin none."""
    lake = historic(tmp_path)
    fields = [(field.name, field.type.type) for field in DeltaTable(tmp_path / "p/main").schema().fields]
    assert fields == [
        ("id", "string"), ("value", "long"),
        ("valid_from", "long"), ("valid_to", "long"), ("is_current", "boolean"),
    ]  # fmt: skip
    lake.deliver(40, [("b", 1, "U"), ("x", 1, "D"), ("a", 4, "U"), ("a", 3, "U")])
    lake.deliver(50, [("b", 1, "D"), ("c", None, "U")])
    lake.deliver(60, [("b", 1, "D"), ("c", None, "U")])
    lake.run()
    assert versions(lake) == {
        ("a", 1, 10, 30), ("a", 3, 30, None), ("b", 1, 10, 30), ("b", 1, 40, 50),
        ("c", 1, 10, 50), ("c", None, 50, None),
    }  # fmt: skip


def test_scd2_has_a_version_for_each_value_of_any_column(tmp_path: Path):
    """A column that is not ignored is a value; one that an older row lacks was NULL in it."""
    lake = moded(tmp_path, "scd2")
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    lake.deliver(20, [("a", 1, "I", None), ("b", 1, "U", None)], schema=WIDER)
    lake.deliver(30, [("a", 1, "I", None), ("b", 1, "U", "b@x")], schema=WIDER)
    lake.run()
    assert versions(lake) == {("a", 1, 10, 20), ("a", 1, 20, None), ("b", 1, 10, 30), ("b", 1, 30, None)}
    assert told(lake, "id", "mail", "valid_from")[-1] == ("b", None, 10)


def test_scd2_counts_the_last_row_of_an_epoch(tmp_path: Path):
    lake = moded(tmp_path, "scd2", f'{IGNORE}\nsequence_by = "value"')
    lake.deliver(10, [("a", 2, "U"), ("a", 1, "U"), ("b", 5, "D"), ("b", 4, "U")])
    lake.run()
    assert versions(lake) == {("a", 2, 10, None)}


LATE = {
    "between": ([("a", 2, "U")], {("a", 1, 10, 20), ("a", 2, 20, 30), ("a", 3, 30, None)}),
    "as before": ([("a", 1, "U")], {("a", 1, 10, 30), ("a", 3, 30, None)}),
    "as after": ([("a", 3, "U")], {("a", 1, 10, 20), ("a", 3, 20, None)}),
    "a delete": ([("a", 9, "D")], {("a", 1, 10, 20), ("a", 3, 30, None)}),
}


@pytest.mark.parametrize("what", LATE)
def test_scd2_is_split_by_a_late_epoch_and_joined_by_its_undo(tmp_path: Path, what: str):
    lake = historic(tmp_path)
    rest = {version for version in HISTORY if version[0] != "a"}
    rows, expected_versions = LATE[what]
    lake.deliver(20, rows)
    lake.run()
    assert versions(lake) == rest | expected_versions
    act(lake, "undo", 20)
    assert versions(lake) == HISTORY
    act(lake, "replay", 20)
    assert versions(lake) == rest | expected_versions


def test_scd2_begins_earlier_with_an_epoch_before_all(tmp_path: Path):
    lake = historic(tmp_path)
    lake.deliver(9, [("a", 0, "U"), ("c", 1, "U"), ("d", 9, "U")])
    lake.run()
    assert versions(lake) == {
        ("a", 0, 9, 10), ("a", 1, 10, 30), ("a", 3, 30, None),
        ("b", 1, 10, 30), ("c", 1, 9, None), ("d", 9, 9, None),
    }  # fmt: skip


def test_scd2_is_joined_where_a_replay_has_a_key_no_more(tmp_path: Path):
    lake = historic(tmp_path)
    joined = {("a", 1, 10, None), ("b", 1, 10, None), ("c", 1, 10, 30), ("c", 3, 30, None)}
    lake.deliver(30, [("c", 3, "U")])
    for _ in range(2):
        act(lake, "replay", 30)
        assert versions(lake) == joined
    lake.deliver(10, [("c", 3, "U")])
    act(lake, "replay", 10)
    assert versions(lake) == {("c", 3, 10, None)}


def test_scd2_begins_with_the_second_when_the_first_is_undone(tmp_path: Path):
    lake = historic(tmp_path)
    act(lake, "undo", 10)
    assert versions(lake) == {("a", 3, 30, None), ("c", 1, 30, None)}
    act(lake, "undo", 30)
    assert versions(lake) == set()


# --- all of them ------------------------------------------------------------------------------


def goes_back(lake: Lake, epoch: int, mode: str) -> list[tuple]:
    columns = {"append": ("_epoch", "id", "value"), "scd2": ("id", "value", "valid_from", "valid_to")}[mode]
    done = lake.alluvium("rollback", "p", "--to-epoch", str(epoch), "--yes")
    assert done.code == 0, done.err
    held = told(lake, *columns)
    lake.deliver(40, [("e", 4, "U")])
    lake.run()
    assert told(lake, *columns) == held, "nothing moves while it is rolled back"
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert processed(lake) >= {10, 20, 30, 40}
    return held


@pytest.mark.parametrize("late", [False, True])
def test_append_goes_back_to_an_epoch_and_on_again(tmp_path: Path, late: bool):
    lake = two_appended(tmp_path)
    lake.deliver(30, [("a", 3, "U")])
    lake.run()
    between = [(15, "a", 1)] if late else []
    if late:
        lake.deliver(15, [("a", 1, "U")])
        lake.run()
    assert goes_back(lake, 20, "append") == TEN + between + TWENTY
    assert appended(lake) == [*TEN, *between, *TWENTY, (30, "a", 3), (40, "e", 4)]


@pytest.mark.parametrize("late", [False, True])
def test_scd2_goes_back_to_an_epoch_and_on_again(tmp_path: Path, late: bool):
    """The version that a later epoch closed is open again."""
    lake = historic(tmp_path)
    lake.deliver(20, [("c", 2, "U")])
    lake.run()
    before = {("a", 1, 10, None), ("b", 1, 10, None), ("c", 1, 10, 20), ("c", 2, 20, None)}
    after = {("a", 1, 10, 30), ("a", 3, 30, None), ("b", 1, 10, 30), ("c", 1, 10, 20), ("c", 2, 20, 30),
             ("c", 1, 30, None), ("e", 4, 40, None)}  # fmt: skip
    if late:
        lake.deliver(9, [("b", 1, "U")])
        lake.run()
        before = before - {("b", 1, 10, None)} | {("b", 1, 9, None)}
        after = after - {("b", 1, 10, 30)} | {("b", 1, 9, 30)}
    assert set(goes_back(lake, 20, "scd2")) == before
    assert versions(lake) == after


POINTS = (
    "ingest.after_commit", "merge.after_plan", "merge.after_write", "merge.before_commit",
    "merge.after_commit",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["append", "snapshot", "scd2"])
def test_a_kill_at_any_point_of_a_merge_loses_and_doubles_nothing(tmp_path: Path, mode: str):
    for point in POINTS:
        root = tmp_path / point
        root.mkdir()
        lake = moded(root, mode)
        model = ModeWorld(() if mode == "append" else ("id",), mode=mode)
        codes = []
        for epoch in (20, 10, 30):
            rows = [("a", epoch, "U"), ("b", 1, "U"), (f"k{epoch}", 1, "U")]
            lake.deliver(epoch, rows)
            model.set_content(epoch, content(rows, mode))
            crash = {"ALLUVIUM_CRASH": point} if epoch != 20 else {}
            codes.append(lake.alluvium("run", "--once", env=crash).code)
        # An older snapshot writes nothing.
        assert codes[0] == 0 and -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}, point
        lake.run()
        found = read_main_of(mode, root / "p/main", model.key)
        assert compare(expected(mode, model, {10, 20, 30}), found) == [], point


def content(rows: list[tuple], mode: str) -> list[Row]:
    """What the rows of one file mean in this mode; rows without a key are refused where there are keys."""
    named = [
        (at, dict(zip(("id", "value", "op"), row)))
        for at, row in enumerate(rows)
        if mode == "append" or row[0] is not None
    ]
    deletes = mode != "append"
    return [Row("delete" if deletes and row["op"] == "D" else "upsert", PART, at, row) for at, row in named]


@pytest.mark.parametrize("mode", ["append", "snapshot", "scd2"])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival_gives_what_the_rule_says(tmp_path: Path, mode: str, seed: int):
    """Epochs come in any order and grouping; one is delivered otherwise and replayed, one undone."""
    rng = random.Random(f"{mode} {seed}")
    more = rng.choice(["", "merge.batch_epochs = 1", 'order = "arrival"', "optimize.small_files = 2"])
    lake = moded(tmp_path, mode, f"{IGNORE}\n{more}")
    model = ModeWorld(() if mode == "append" else ("id",), ignore=("op",), mode=mode)

    def deliver(epoch: int) -> None:
        few = [(rng.choice("abcd"), rng.randint(0, 1), rng.choice("UUUD")) for _ in range(rng.randint(1, 5))]
        rows = [*few, *([(None, 7, "U")] if rng.random() < 0.2 else [])]
        lake.deliver(epoch, rows)
        model.set_content(epoch, content(rows, mode))

    def check() -> None:
        found = read_main_of(mode, tmp_path / "p/main", model.key)
        lines = compare(expected(mode, model, model.content), found)
        assert lines == [], "\n".join(lines)

    epochs = [8, 9, 10, 11, 12, 100]
    rng.shuffle(epochs)
    while epochs:
        for _ in range(min(len(epochs), rng.randint(1, 3))):
            deliver(epochs.pop())
        lake.run()
        check()
    again, undone = rng.sample(sorted(model.content), 2)
    deliver(again)
    act(lake, "replay", again)
    check()
    model.clear(undone)
    act(lake, "undo", undone)
    check()


WRONG = [
    ('mode = "upzert"', "", "mode", "scd2"),
    ('mode = "snapshot"', KEY, "key", ""),
    ('mode = "scd2"', KEY, "key", ""),
]


@pytest.mark.parametrize(("more", "without", "name", "says"), WRONG)
def test_a_wrong_mode_is_named(tmp_path: Path, more: str, without: str, name: str, says: str):
    lake = Lake(tmp_path).pipeline(more=more)
    lake.pipelines["p"] = lake.pipelines["p"].replace(without, "") if without else lake.pipelines["p"]
    lake.configure()
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and f"pipeline.p.{name}" in done.err and says in done.err, done.err


def test_another_mode_means_other_tables(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake = moded(tmp_path, "scd2")
    done = lake.run(code=5)
    assert "AL-0106" in done.err and "mode" in done.err, done.err
    assert read_table(tmp_path / "p/main") == [{"id": "a", "value": 1, "op": "U"}]
