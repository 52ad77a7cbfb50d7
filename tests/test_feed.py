"""The change feed of main, as its readers see it: `DeltaTable(...).load_cdf(starting_version=…)`.

Goal: whoever only follows the feed holds main. Method: each kind of change in a small story, and after each
the fold of the whole feed over the empty table, version by version (oracle_feed.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from lake import Lake
from oracle_feed import BY_BOTH, BY_LOG, ENABLED, TAKES, check_feed, commit_of, feed_begins, read_feed

# Snapshots of few rows: none is held for having lost some.
SNAPSHOT = 'mode = "snapshot"\ngate = { rows_min = "0%" }'
FEED = "change_feed = true"
SKIP = "merge.skip_unchanged = true"
ONE_BY_ONE = "merge.batch_epochs = 1"
TYPED = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
ROW = tuple[str, str, int | None]


def fed(tmp_path: Path, *more: str) -> Lake:
    return Lake(tmp_path).pipeline(more="\n".join((FEED, *more)))


def main_of(lake: Lake) -> Path:
    return lake.root / "p/main"


def since(lake: Lake, version: int) -> list[list[ROW]]:
    """Commit by commit after the version: (kind, id, value), without updates that change nothing.

    Preimages come first. That the whole feed is right is looked at, too.
    """
    holds(lake)
    newest = lake.version("main")
    if newest == version:
        return []
    commits: dict[int, list[ROW]] = {}
    for change in read_feed(main_of(lake), version + 1):
        row = change.kind, change.columns["id"], change.columns["value"]
        commits.setdefault(change.version, []).append(row)
    return [_real(commits[version]) for version in sorted(commits) if _real(commits[version])]


def _real(rows: list[ROW]) -> list[ROW]:
    before = {row[1:] for row in rows if row[0] == "update_preimage"}
    after = {row[1:] for row in rows if row[0] == "update_postimage"}
    real = [row for row in rows if row[1:] not in before & after]
    return sorted(real, key=lambda row: (row[1], row[0] not in TAKES, row[0]))


def holds(lake: Lake, *key: str, readers=BY_BOTH) -> None:
    """The fold of the feed is main, at each version."""
    lines = check_feed(main_of(lake), key or ("id",), readers, each_version=True)
    assert lines == [], "\n".join(lines)


def insert(key: str, value: int | None) -> list[ROW]:
    return [("insert", key, value)]


def delete(key: str, value: int | None) -> list[ROW]:
    return [("delete", key, value)]


def update(key: str, before: int | None, after: int | None) -> list[ROW]:
    return [("update_preimage", key, before), ("update_postimage", key, after)]


def begun(tmp_path: Path, *more: str) -> tuple[Lake, int]:
    """Epoch 10 is in main; and main's version."""
    lake = fed(tmp_path, *more)
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("c", None, "U")])
    lake.run()
    return lake, lake.version("main")


def act(lake: Lake, verb: str, epoch: int) -> None:
    done = lake.alluvium(verb, "p", str(epoch), "--yes")
    assert done.code == 0, done.err


# --- what is told -----------------------------------------------------------------------------


def test_inserts_updates_and_deletes_are_told(tmp_path: Path):
    lake, version = begun(tmp_path)
    assert feed_begins(main_of(lake)) == 0
    assert since(lake, -1) == [insert("a", 1) + insert("b", 1) + insert("c", None)]
    lake.deliver(20, [("a", 2, "U"), ("b", 9, "D"), ("c", 3, "U"), ("d", 2, "U"), ("x", 1, "D")])
    lake.run()
    # The preimages are main's values, not the delivered ones.
    [told] = since(lake, version)
    assert told == update("a", 1, 2) + delete("b", 1) + update("c", None, 3) + insert("d", 2)
    changes = [a["cdc"] for a in commit_of(main_of(lake), version + 1) if "cdc" in a]
    assert changes and all(file["path"].startswith("_change_data/") for file in changes)
    assert all((main_of(lake) / file["path"]).stat().st_size == file["size"] for file in changes)
    assert not any(file["dataChange"] for file in changes)


def test_the_feed_has_mains_columns(tmp_path: Path):
    """And a column that comes later is NULL in what was told before."""
    lake, version = begun(tmp_path, 'columns = { ignore = ["op"] }')
    lake.deliver(20, [("a", 2, "U", "a@x")], schema=pa.schema([*TYPED, ("mail", pa.string())]))
    lake.run()
    holds(lake)
    changes = read_feed(main_of(lake), 0)
    assert all(set(change.columns) == {"id", "value", "mail"} for change in changes)
    told = {(change.kind, change.columns["id"], change.columns["mail"]) for change in changes}
    assert told >= {("insert", "a", None), ("update_preimage", "a", None), ("update_postimage", "a", "a@x")}
    assert since(lake, version) == [update("a", 1, 2)]


def test_a_late_epoch_tells_only_what_it_changes(tmp_path: Path):
    lake, _ = begun(tmp_path)
    lake.deliver(30, [("a", 3, "U"), ("d", 3, "D")])
    lake.run()
    version = lake.version("main")
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "U"), ("c", 2, "D"), ("d", 2, "U"), ("e", 2, "U")])
    lake.run()
    assert since(lake, version) == [update("b", 1, 2) + delete("c", None) + insert("e", 2)]


def test_undo_replay_and_skip_are_told_as_what_they_do_to_main(tmp_path: Path):
    lake, _ = begun(tmp_path)
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D"), ("d", 2, "U")])
    lake.run()
    version = lake.version("main")
    act(lake, "undo", 20)
    assert since(lake, version) == [update("a", 2, 1) + insert("b", 1) + delete("d", 2)]
    version = lake.version("main")
    lake.deliver(20, [("a", 5, "U")])
    act(lake, "replay", 20)
    assert since(lake, version) == [update("a", 1, 5)]
    version = lake.version("main")
    act(lake, "skip", 10)
    assert since(lake, version) == [delete("b", 1) + delete("c", None)]


WAITING = {
    10: [("a", 1, "U"), ("b", 1, "U"), ("c", 1, "U")],
    20: [("a", 2, "U"), ("b", 2, "D"), ("d", 2, "U")],
    30: [("a", 1, "U"), ("d", 3, "D"), ("e", 3, "U")],
}


def wait_in_raw(lake: Lake, epochs: Iterable[int]) -> None:
    """All of them are read, and none is merged: the next run takes them in one commit."""
    for _ in range(10):
        lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": "merge.before_commit:1"})
        if {row["_epoch"] for row in lake.rows("raw")} >= set(epochs):
            return
    raise AssertionError("the epochs do not get into raw")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_catch_up_tells_the_net_changes(tmp_path: Path, is_first: bool):
    lake = fed(tmp_path)
    if not is_first:
        lake.deliver(1, [("a", 0, "U"), ("b", 0, "U")])
        lake.run()
    version = -1 if is_first else lake.version("main")
    for epoch, rows in WAITING.items():
        lake.deliver(epoch, rows)
    wait_in_raw(lake, WAITING)
    lake.run()
    known = insert("a", 1) if is_first else update("a", 0, 1) + delete("b", 0)
    assert since(lake, version) == [known + insert("c", 1) + insert("e", 3)]


def test_one_commit_an_epoch_tells_each_epoch_by_itself(tmp_path: Path):
    lake = fed(tmp_path, ONE_BY_ONE)
    for epoch, rows in WAITING.items():
        lake.deliver(epoch, rows)
    lake.run()
    assert since(lake, -1) == [
        insert("a", 1) + insert("b", 1) + insert("c", 1),
        update("a", 1, 2) + delete("b", 1) + insert("d", 2),
        update("a", 2, 1) + delete("d", 2) + insert("e", 3),
    ]


def test_a_snapshot_tells_what_vanished(tmp_path: Path):
    lake, version = begun(tmp_path, SNAPSHOT)
    lake.deliver(20, [("b", 2, "U"), ("d", 2, "U")])
    lake.run()
    assert since(lake, version) == [delete("a", 1) + update("b", 1, 2) + delete("c", None) + insert("d", 2)]
    version = lake.version("main")
    lake.deliver(15, [("z", 1, "U")])
    lake.run()
    assert since(lake, version) == []
    act(lake, "undo", 20)
    assert since(lake, version) == [delete("b", 2) + delete("d", 2) + insert("z", 1)]


# --- what is not told -------------------------------------------------------------------------


def files(lake: Lake) -> set[str]:
    return set(DeltaTable(main_of(lake)).file_uris())


def test_unchanged_rows_are_left_alone(tmp_path: Path):
    """No change is told, and no file is written anew; the epoch is applied all the same."""
    lake, version = begun(tmp_path, SKIP)
    before = files(lake)
    lake.deliver(20, [("a", 1, "U"), ("c", None, "U")])
    lake.run()
    assert lake.states() == {10: "processed", 20: "processed"} and files(lake) == before
    assert since(lake, version) == [] and changes_after(lake, version) == []
    lake.deliver(30, [("a", 1, "U"), ("b", 3, "U"), ("c", None, "I")])
    lake.run()
    # The operation is a column, too.
    assert [change[:2] for change in changes_after(lake, version)] == [
        ("update_postimage", "b"), ("update_postimage", "c"),
        ("update_preimage", "b"), ("update_preimage", "c"),
    ]  # fmt: skip
    holds(lake)


def changes_after(lake: Lake, version: int) -> list[ROW]:
    """With updates that change nothing."""
    if lake.version("main") == version:
        return []
    found = read_feed(main_of(lake), version + 1)
    return sorted(((c.kind, c.columns["id"], c.columns["value"]) for c in found), key=repr)


@pytest.mark.parametrize("feed", [True, False])
def test_unchanged_rows_leave_files_alone_also_where_epochs_are_folded_anew(tmp_path: Path, feed: bool):
    """Late, replayed and undone epochs that leave main as it is."""
    lake = Lake(tmp_path).pipeline(more=f"{SKIP}\n{FEED if feed else ''}")
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    lake.deliver(30, [("a", 3, "U")])
    lake.run()
    before, version = files(lake), lake.version("main")
    lake.deliver(20, [("a", 2, "U"), ("b", 1, "U"), ("x", 1, "D")])
    lake.run()
    act(lake, "replay", 20)
    act(lake, "undo", 20)
    assert files(lake) == before and lake.main() == {"a": 3, "b": 1}
    if feed:
        assert changes_after(lake, version) == []
        holds(lake)


def test_null_and_nan_are_equal_to_themselves(tmp_path: Path):
    lake = fed(tmp_path, SKIP)
    schema = pa.schema([("id", pa.string()), ("value", pa.float64()), ("op", pa.string())])
    rows = [("a", float("nan"), None), ("b", None, "U"), ("c", 0.5, "U")]
    lake.deliver(10, rows, schema=schema)
    lake.run()
    version, before = lake.version("main"), files(lake)
    lake.deliver(20, rows, schema=schema)
    lake.run()
    assert files(lake) == before and changes_after(lake, version) == []


def test_optimize_tells_nothing(tmp_path: Path):
    lake = fed(tmp_path, ONE_BY_ONE, "optimize = { small_files = 2 }")
    for epoch in range(1, 7):
        lake.deliver(epoch, [(f"k{epoch}", epoch, "U")])
    done = lake.run()
    assert "optimized" in done.err, done.err
    assert since(lake, -1) == [insert(f"k{epoch}", epoch) for epoch in range(1, 7)]
    actions = [commit_of(main_of(lake), version) for version in range(lake.version("main") + 1)]
    optimizing = [ones for ones in actions if any(a.get("add", {}).get("dataChange") is False for a in ones)]
    assert optimizing and not any("cdc" in action for ones in optimizing for action in ones)


# --- on and off, back and forth ---------------------------------------------------------------


def test_the_feed_may_be_turned_on_later(tmp_path: Path):
    """In a commit of its own, which changes no row; from there on all is told."""
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    version = lake.version("main")
    assert feed_begins(main_of(lake)) is None
    lake.pipeline(more=FEED)
    lake.deliver(20, [("a", 2, "U"), ("c", 2, "U")])
    lake.run()
    begins = feed_begins(main_of(lake))
    assert begins is not None and begins > version
    kinds = {kind for action in commit_of(main_of(lake), begins) for kind in action}
    assert "metaData" in kinds and not kinds & {"add", "remove", "cdc"}
    assert since(lake, begins) == [update("a", 1, 2) + insert("c", 2)]
    assert DeltaTable(main_of(lake)).metadata().configuration[ENABLED] == "true"
    assert lake.main() == {"a": 2, "b": 1, "c": 2}
    before = lake.version("main")
    lake.run()
    assert lake.version("main") == before, "it is turned on once"


def test_without_the_setting_there_is_no_feed(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.deliver(20, [("a", 2, "U")])
    lake.run()
    assert ENABLED not in DeltaTable(main_of(lake)).metadata().configuration
    assert not (main_of(lake) / "_change_data").exists()


@pytest.mark.parametrize("late", [False, True])
def test_the_feed_follows_a_rollback_and_what_comes_after(tmp_path: Path, late: bool):
    """Restored from a version's files, or computed from raw."""
    lake, _ = begun(tmp_path)
    for epoch in (20, 30):
        lake.deliver(epoch, [("a", epoch, "U"), ("b", epoch, "D"), (f"k{epoch}", epoch, "U")])
        lake.run()
    if late:
        lake.deliver(15, [("b", 15, "U"), ("z", 15, "U")])
        lake.run()
    assert lake.alluvium("rollback", "p", "--to-epoch", "20", "--yes").code == 0
    holds(lake)
    assert DeltaTable(main_of(lake)).metadata().configuration[ENABLED] == "true"
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    holds(lake)
    assert lake.main()["a"] == 30


def test_a_main_that_is_built_anew_has_a_feed_from_its_beginning(tmp_path: Path):
    lake, _ = begun(tmp_path)
    lake.deliver(20, [("a", 2, "U")])
    lake.run()
    main_of(lake).rename(tmp_path / "old")
    lake.run()
    assert since(lake, -1) == [insert("a", 2) + insert("b", 1) + insert("c", None)]


@pytest.mark.parametrize("point", ["merge.after_write", "merge.before_commit", "merge.after_commit"])
def test_a_kill_in_a_merge_tells_nothing_twice(tmp_path: Path, point: str):
    lake, version = begun(tmp_path)
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D")])
    assert lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": point}).code < 0
    lake.run()
    assert since(lake, version) == [update("a", 1, 2) + delete("b", 1)]


def test_a_key_that_moves_between_partitions_is_told(tmp_path: Path):
    lake = fed(tmp_path, 'partition_by = ["region"]')
    schema = pa.schema([*TYPED, ("region", pa.string())])
    lake.deliver(10, [("a", 1, "U", "x"), ("b", 1, "U", None), ("c", 1, "U", "x")], schema=schema)
    lake.run()
    lake.deliver(20, [("a", 2, "U", None), ("b", 2, "U", "y"), ("c", 2, "D", "z")], schema=schema)
    lake.run()
    holds(lake)
    feed = [change for change in read_feed(main_of(lake), 0) if change.kind != "insert"]
    assert {(change.kind, change.columns["id"], change.columns["region"]) for change in feed} == {
        ("update_preimage", "a", "x"), ("update_postimage", "a", None), ("delete", "c", "x"),
        ("update_preimage", "b", None), ("update_postimage", "b", "y"),
    }  # fmt: skip
    # Special characters: Python deltalake finds no such file, the log tells where it is.
    lake.deliver(30, [("a", 3, "U", "a/b"), ("b", 3, "U", "100% ä")], schema=schema)
    lake.deliver(40, [("a", 4, "U", "x=y"), ("b", 3, "D", "y")], schema=schema)
    lake.run()
    holds(lake, readers=BY_LOG)


# --- the whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), (SKIP,), (ONE_BY_ONE,), (SNAPSHOT, SKIP)])
def test_whoever_follows_the_feed_holds_main(tmp_path: Path, more: tuple[str, ...]):
    """Random deliveries, late ones, replays and undos, and optimize between them."""
    rng = random.Random(repr(more))
    lake = fed(tmp_path, *more, "optimize.small_files = 3", 'sequence_by = "value"')
    epochs = rng.sample(range(1, 13), 8)
    done: list[int] = []
    while epochs:
        for _ in range(min(len(epochs), rng.randint(1, 3))):
            done.append(epochs.pop())
            lake.deliver(done[-1], some_rows(rng))
        lake.run()
        verb = rng.choice(["undo", "replay", "skip", None])
        if verb:
            epoch = rng.choice(done)
            if verb == "replay" and rng.random() < 0.7:
                lake.deliver(epoch, some_rows(rng))
            # What was left out already cannot be left out again.
            lake.alluvium(verb, "p", str(epoch), "--yes")
            lake.run()
        holds(lake)


def some_rows(rng: random.Random) -> list[tuple]:
    count = rng.randint(1, 6)
    rows = [(rng.choice("abcdef"), rng.choice((None, 1, 2)), rng.choice("UUUD")) for _ in range(count)]
    return [*rows, ("z", rng.randint(1, 2), "U")]


@pytest.mark.parametrize(("mode", "key"), [("append", ()), ("scd2", ("id", "valid_from"))])
def test_the_other_modes_have_a_feed_too(tmp_path: Path, mode: str, key: tuple):
    lake = fed(tmp_path, f'mode = "{mode}"')
    if mode == "append":
        for line in ('key = ["id"]\n', """delete_when = "op = 'D'"\n"""):
            lake.pipelines["p"] = lake.pipelines["p"].replace(line, "", 1)
        lake.configure()
    for epoch in (10, 30, 20):
        lake.deliver(epoch, [("a", epoch, "U"), ("a", epoch, "U"), ("b", 1, "D" if epoch == 20 else "U")])
        lake.run()
        assert check_feed(main_of(lake), key, each_version=True) == []
    act(lake, "undo", 20)
    assert check_feed(main_of(lake), key, each_version=True) == []


@pytest.mark.parametrize("mode", ["", SNAPSHOT, 'mode = "scd2"', 'mode = "append"'])
def test_a_rollback_to_a_version_tells_the_rows_that_it_changes(mode: str, tmp_path: Path):
    """Files come back without the marks that they had: not every reader looks at marks."""
    lake = fed(tmp_path, "optimize.enabled = false", mode)
    if "append" in mode:
        lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]\n', "").replace("delete_when", "# delete_when")
        lake.configure()
    versions = []
    for epoch in (10, 20, 30):
        lake.deliver(epoch, [(key, epoch, "U") for key in "abcdef" if (ord(key) + epoch) % 4])
        lake.run()
        versions.append(lake.version("main"))
    done = lake.alluvium("rollback", "p", "--to-version", str(versions[0]), "--yes")
    assert done.code == 0, done.err
    told = [a for a in commit_of(main_of(lake), lake.version("main")) if "cdc" in a]
    assert told, "the rollback has change files"
    assert check_feed(main_of(lake), each_version=True) == []
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert check_feed(main_of(lake), each_version=True) == []
