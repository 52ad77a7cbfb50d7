"""The feed's oracle against feeds that Python deltalake wrote, and against some wrong on purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from oracle_feed import BY_LOG, ENABLED, check_feed, feed_begins, read_feed, read_feed_by_log

KEY = ("id",)
SCHEMA = pa.schema([("id", pa.string()), ("value", pa.float64()), ("region", pa.string())])


def rows(*told: tuple) -> pa.Table:
    return pa.table([list(column) for column in zip(*told)], schema=SCHEMA)


def merge(path: Path, source: pa.Table) -> None:
    merged = DeltaTable(str(path)).merge(source, "s.id = t.id", source_alias="s", target_alias="t")
    merged.when_matched_update_all().when_not_matched_insert_all().execute()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three commits: inserts; an update and an insert; a delete."""
    path = tmp_path / "t"
    told = rows(("a", 1, "x"), ("b", math.nan, None))
    write_deltalake(str(path), told, partition_by=["region"], configuration={ENABLED: "true"})
    merge(path, rows(("a", 2, "y"), ("c", 1, "x")))
    DeltaTable(str(path)).delete("id = 'b'")
    return path


def kinds(changes: list) -> list[tuple]:
    return sorted((change.version, change.kind, change.columns["id"]) for change in changes)


def test_a_right_feed_is_right_however_it_is_read(table: Path):
    assert check_feed(table, KEY, each_version=True) == []
    expected = [
        (0, "insert", "a"), (0, "insert", "b"), (1, "insert", "c"), (1, "update_postimage", "a"),
        (1, "update_preimage", "a"), (2, "delete", "b"),
    ]  # fmt: skip
    assert kinds(read_feed(table, 0)) == kinds(read_feed_by_log(table, 0)) == expected


def test_optimize_is_no_change(table: Path):
    DeltaTable(str(table)).optimize.compact()
    assert check_feed(table, KEY) == [] and len(read_feed_by_log(table, 0)) == 6


def test_a_feed_may_begin_later(tmp_path: Path):
    path = tmp_path / "t"
    write_deltalake(str(path), rows(("a", 1, "x"), ("b", 1, "x")))
    assert feed_begins(path) is None and check_feed(path) == [f"{ENABLED} is not set"]
    DeltaTable(str(path)).alter.set_table_properties({ENABLED: "true"})
    merge(path, rows(("a", 2, "y")))
    assert feed_begins(path) == 1 and check_feed(path, KEY, each_version=True) == []
    DeltaTable(str(path)).alter.set_table_properties({ENABLED: "false"})
    assert feed_begins(path) is None


def test_values_of_partitions_with_special_characters_are_read_by_the_log(tmp_path: Path):
    path = tmp_path / "t"
    told = rows(*((f"k{at}", at, region) for at, region in enumerate(["a/b", "x=y", "100%", "ä ö", None])))
    write_deltalake(str(path), told, partition_by=["region"], configuration={ENABLED: "true"})
    DeltaTable(str(path)).delete("value < 2")
    assert check_feed(path, KEY, BY_LOG, each_version=True) == []


def test_without_change_files_the_data_files_tell(table: Path):
    damage(table, 1, lambda actions: [action for action in actions if "cdc" not in action])
    assert check_feed(table, KEY, BY_LOG, each_version=True) == []
    assert (1, "delete", "a") in kinds(read_feed_by_log(table, 0))


def test_a_feed_that_lacks_a_change_is_reported(table: Path):
    change_file(table, 2, [])
    lines = check_feed(table, KEY, BY_LOG)
    assert any("fold to version 2" in line for line in lines), lines


def test_a_change_that_takes_out_what_is_not_there_is_reported(table: Path):
    change_file(table, 2, [("b", 4.0, "delete")])
    lines = check_feed(table, KEY, BY_LOG)
    assert any("takes out what is not there" in line for line in lines), lines


def test_changes_that_are_not_net_are_reported(table: Path):
    change_file(table, 2, [("b", math.nan, "delete"), ("d", 1.0, "insert"), ("d", 1.0, "delete")])
    lines = check_feed(table, KEY, BY_LOG)
    assert any("says of ('d',): delete, insert" in line for line in lines), lines


def damage(table: Path, version: int, change) -> None:
    """The commit's actions, changed."""
    path = table / "_delta_log" / f"{version:020}.json"
    actions = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(action) + "\n" for action in actions))


def change_file(table: Path, version: int, told: list[tuple]) -> Path:
    """Another change file in place of the commit's own, all of it in no region."""
    path = table / "_change_data" / f"made-{version}.parquet"
    path.parent.mkdir(exist_ok=True)
    columns = [list(column) for column in zip(*told)] or [[], [], []]
    pq.write_table(pa.table(columns, names=["id", "value", "_change_type"]), path)
    file = {"path": f"_change_data/{path.name}", "partitionValues": {"region": None}, "dataChange": False}
    told = [{"cdc": {"size": 1, **file}}]
    damage(table, version, lambda actions: [action for action in actions if "cdc" not in action] + told)
    return path
