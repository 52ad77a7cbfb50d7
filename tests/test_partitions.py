"""`partition_by`: main lies in folders by values; a key that moves between them still lives once.

Read back by Python deltalake, by partition and as a whole.
"""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lake import Lake
from oracle_feed import read_feed_by_log
from oracle_reading import read_table

# Snapshots of few rows: none is held for having lost some.
SNAPSHOT = 'mode = "snapshot"\ngate = { rows_min = "0%" }'
SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("region", pa.string())])
BY_REGION = 'partition_by = ["region"]'
REGIONS = [
    None, "north", "a/b", "x=y", "100%", "ä ö", "a b", "it's", 'say "so"', "a%20b", "2024:01", "k+1",
    "back\\slash", "#?&", "[x]*", "__HIVE", "..", " padded ",
]  # fmt: skip


def partitioned(tmp_path: Path, more: str = "") -> Lake:
    return Lake(tmp_path).pipeline(more=f"{BY_REGION}\n{more}")


def deliver(lake: Lake, epoch: int, *rows: tuple) -> None:
    """Rows (id, value, region), and a fourth value for another op than U."""
    told = [(key, value, op[0] if op else "U", region) for key, value, region, *op in rows]
    lake.deliver(epoch, told, schema=SCHEMA)


def places(lake: Lake) -> dict[str, tuple]:
    """id → (value, region), each key once; where a reader that asks for one partition finds the same."""
    path = lake.root / "p/main"
    rows = read_table(path)
    found = {row["id"]: (row["value"], row["region"]) for row in rows}
    assert len(found) == len(rows), f"a key lives twice: {rows}"
    for region in {row["region"] for row in rows}:
        there = {row["id"] for row in of_partition(path, "region", region)}
        assert there == {key for key, (_, value) in found.items() if value == region}, region
    return found


def of_partition(path: Path, column: str, value: Any) -> list[dict]:
    """What polars finds with a filter on the partition column."""
    wanted = pl.col(column).is_null() if value is None else pl.col(column) == value
    return pl.scan_delta(str(path)).filter(wanted).collect().to_dicts()


def act(lake: Lake, verb: str, epoch: int) -> None:
    done = lake.alluvium(verb, "p", str(epoch), "--yes")
    assert done.code == 0, done.err


def test_values_of_every_kind_are_partitions_and_read_back(tmp_path: Path):
    lake = partitioned(tmp_path)
    deliver(lake, 10, *((f"k{at}", at, region) for at, region in enumerate(REGIONS)))
    lake.run()
    assert DeltaTable(tmp_path / "p/main").metadata().partition_columns == ["region"]
    assert places(lake) == {f"k{at}": (at, region) for at, region in enumerate(REGIONS)}
    # Every key moves on to the next value, and one stays.
    moved = [*REGIONS[1:], REGIONS[0]]
    deliver(lake, 20, ("k0", 0, None), *((f"k{at}", -at, region) for at, region in enumerate(moved) if at))
    lake.run()
    assert places(lake) == {"k0": (0, None)} | {f"k{at}": (-at, r) for at, r in enumerate(moved) if at}


@pytest.mark.parametrize("batch", [1, 100])
def test_a_key_that_moves_between_partitions_lives_once(tmp_path: Path, batch: int):
    lake = partitioned(tmp_path, f"merge.batch_epochs = {batch}")
    deliver(lake, 10, ("a", 1, "x"), ("b", 1, "x"), ("c", 1, None), ("d", 1, "y"))
    deliver(lake, 20, ("a", 2, "y"), ("c", 2, "x"), ("d", 2, None))
    lake.run()
    assert places(lake) == {"a": (2, "y"), "b": (1, "x"), "c": (2, "x"), "d": (2, None)}
    deliver(lake, 30, ("a", 3, "x"), ("c", 0, "a delete says another region", "D"), ("d", 3, "x"))
    lake.run()
    assert places(lake) == {"a": (3, "x"), "b": (1, "x"), "d": (3, "x")}


def test_late_replayed_and_undone_epochs_move_keys_as_they_should(tmp_path: Path):
    lake = partitioned(tmp_path)
    deliver(lake, 10, ("a", 1, "x"), ("b", 1, "y"), ("c", 1, None))
    deliver(lake, 30, ("a", 3, "y"))
    lake.run()
    deliver(lake, 20, ("a", 2, "z"), ("b", 2, "x"), ("c", 2, "x"), ("d", 2, None))  # late
    lake.run()
    assert places(lake) == {"a": (3, "y"), "b": (2, "x"), "c": (2, "x"), "d": (2, None)}
    act(lake, "undo", 20)
    assert places(lake) == {"a": (3, "y"), "b": (1, "y"), "c": (1, None)}
    deliver(lake, 20, ("b", 5, "a/b"))
    act(lake, "replay", 20)
    act(lake, "undo", 30)
    assert places(lake) == {"a": (1, "x"), "b": (5, "a/b"), "c": (1, None)}


def test_optimize_keeps_each_row_in_its_partition(tmp_path: Path):
    lake = partitioned(tmp_path, "merge.batch_epochs = 1\noptimize = { small_files = 2 }")
    delivered = {}
    for epoch in range(1, 7):
        rows = {f"{epoch}-{at}": (epoch, region) for at, region in enumerate(REGIONS[:5])}
        deliver(lake, epoch, *((key, *values) for key, values in rows.items()))
        delivered |= rows
    assert "optimized" in lake.run().err
    assert places(lake) == delivered


def test_partitions_are_numbers_too_and_may_be_several(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='partition_by = ["value", "region"]')
    deliver(lake, 10, ("a", 1, "x"), ("b", -7, None), ("c", None, "x"), ("d", None, None))
    lake.run()
    deliver(lake, 20, ("a", -7, "x"), ("d", 2**62, None))
    lake.run()
    assert DeltaTable(tmp_path / "p/main").metadata().partition_columns == ["value", "region"]
    assert places(lake) == {"a": (-7, "x"), "b": (-7, None), "c": (None, "x"), "d": (2**62, None)}
    assert [row["id"] for row in of_partition(tmp_path / "p/main", "value", 2**62)] == ["d"]


def test_a_part_of_the_key_may_be_a_partition(tmp_path: Path):
    lake = partitioned(tmp_path)
    lake.pipelines["p"] = lake.pipelines["p"].replace('["id"]', '["id", "region"]')
    lake.configure()
    deliver(lake, 10, ("a", 1, "x"), ("a", 1, "y"), ("b", 1, None))
    deliver(lake, 20, ("a", 2, "y"), ("a", 2, "x", "D"))
    lake.run()
    assert places(lake) == {"a": (2, "y")}
    shown = lake.alluvium("quarantine", "show", "p", "-o", "json").json()
    assert [item["reason"] for item in shown] == ["null_key"]


def test_a_partitioned_main_goes_back_and_is_built_anew(tmp_path: Path):
    lake = partitioned(tmp_path)
    for epoch, region in ((10, "x"), (20, "a/b"), (30, None)):
        deliver(lake, epoch, ("a", epoch, region), (f"k{epoch}", epoch, region))
        lake.run()
    after = places(lake)
    assert lake.alluvium("rollback", "p", "--to-epoch", "20", "--yes").code == 0
    assert places(lake) == {"a": (20, "a/b"), "k10": (10, "x"), "k20": (20, "a/b")}
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert places(lake) == after
    (tmp_path / "p/main").rename(tmp_path / "old")
    lake.run()
    assert places(lake) == after
    assert DeltaTable(tmp_path / "p/main").metadata().partition_columns == ["region"]


# --- wider types ------------------------------------------------------------------------------

TENTH = float(np.float32(0.1))
DAY, MIDNIGHT = dt.date(2024, 2, 29), dt.datetime(2024, 2, 29)
# A type, a value, its wider type, that value as one of it, and another.
WIDER = [
    (pa.float32(), TENTH, pa.float64(), TENTH, 0.1),
    (pa.float32(), float(np.float32(1e30)), pa.float64(), float(np.float32(1e30)), 1e30),
    (pa.int32(), 7, pa.int64(), 7, 2**40),
    (pa.int32(), 7, pa.float64(), 7.0, 7.5),
    (pa.date32(), DAY, pa.timestamp("us"), MIDNIGHT, dt.datetime(2024, 2, 29, 0, 0, 1)),
    (pa.decimal128(10, 2), Decimal("1.10"), pa.decimal128(12, 4), Decimal("1.1000"), Decimal("1.1001")),
]  # fmt: skip


def typed(lake: Lake, epoch: int, kind: pa.DataType, *rows: tuple) -> None:
    """Rows (id, value, op) of which the value, by which main is partitioned, has this type."""
    schema = pa.schema([("id", pa.string()), ("value", kind), ("op", pa.string())])
    lake.deliver(epoch, list(rows), schema=schema)


def by_value(tmp_path: Path, more: str = "", is_key: bool = True) -> Lake:
    lake = Lake(tmp_path).pipeline(more=f'partition_by = ["value"]\n{more}')
    if is_key:
        lake.pipelines["p"] = lake.pipelines["p"].replace('["id"]', '["value"]')
        lake.configure()
    return lake


def ids(lake: Lake) -> dict:
    """id by value; no value twice, and a reader that asks for one partition finds its row."""
    rows = read_table(lake.root / "p/main")
    found = {row["value"]: row["id"] for row in rows}
    assert len(found) == len(rows), f"a key lives twice: {rows}"
    for value, key in found.items():
        assert [row["id"] for row in of_partition(lake.root / "p/main", "value", value)] == [key]
    return found


@pytest.mark.parametrize(("old", "first", "new", "same", "other"), WIDER)
@pytest.mark.parametrize("marks", ["", 'merge.deletion_vectors = "off"'])
def test_a_key_that_is_a_partition_and_gets_a_wider_type_lives_once(
    tmp_path: Path, marks: str, old, first, new, same, other
):
    lake = by_value(tmp_path, marks)
    typed(lake, 10, old, ("a", first, "U"))
    lake.run()
    typed(lake, 20, new, ("b", same, "U"), ("c", other, "U"))
    lake.run()
    assert ids(lake) == {same: "b", other: "c"}
    typed(lake, 30, new, ("", same, "D"))
    lake.run()
    assert ids(lake) == {other: "c"}
    act(lake, "undo", 30)
    act(lake, "undo", 20)
    assert ids(lake) == {same: "a"}


@pytest.mark.parametrize(("old", "first", "new", "same", "other"), WIDER)
@pytest.mark.parametrize("feed", ["", "change_feed = true"])
@pytest.mark.parametrize("by", ["--to-epoch", "--to-version"])
def test_a_version_of_before_a_wider_type_comes_back_with_it(
    tmp_path: Path, feed: str, by: str, old, first, new, same, other
):
    lake = by_value(tmp_path, feed, is_key=False)
    typed(lake, 10, old, ("a", first, "U"), ("gone", first, "U"))
    lake.run()
    typed(lake, 20, old, ("gone", first, "D"))
    lake.run()
    version = DeltaTable(tmp_path / "p/main").version()
    typed(lake, 30, new, ("a", other, "U"), ("b", same, "U"))
    lake.run()
    before = DeltaTable(tmp_path / "p/main").version()
    point = "20" if by == "--to-epoch" else str(version)
    done = lake.alluvium("rollback", "p", by, point, "--yes")
    assert done.code == 0, done.err
    assert ids(lake) == {same: "a"}
    if feed:
        # deltalake does not find change files of folders with special characters (oracle_feed.py).
        changes = read_feed_by_log(tmp_path / "p/main", before + 1)
        told = {(change.kind, change.columns["id"], change.columns["value"]) for change in changes}
        assert told == {
            ("update_preimage", "a", other), ("update_postimage", "a", same), ("delete", "b", same)
        }  # fmt: skip
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    rows = {row["id"]: row["value"] for row in read_table(tmp_path / "p/main")}
    assert rows == {"a": other, "b": same}


@pytest.mark.parametrize(("old", "first", "new", "same", "other"), WIDER)
def test_an_adopted_base_by_a_column_that_gets_a_wider_type(
    tmp_path: Path, old, first, new, same, other
):
    lake = by_value(tmp_path, "adopt = true\nstart_from = 5")
    schema = pa.schema([("id", pa.string()), ("value", old), ("op", pa.string())])
    base = pa.table({"id": ["base"], "value": pa.array([first], old), "op": ["U"]}, schema=schema)
    write_deltalake(tmp_path / "p/main", base, partition_by=["value"])
    typed(lake, 10, new, ("c", other, "U"))
    lake.run()
    assert ids(lake) == {same: "base", other: "c"}
    typed(lake, 20, new, ("b", same, "U"))
    lake.run()
    assert ids(lake) == {same: "b", other: "c"}
    act(lake, "undo", 20)
    assert ids(lake) == {same: "base", other: "c"}


# --- the other modes --------------------------------------------------------------------------


def test_scd2_closes_a_version_in_another_partition(tmp_path: Path):
    lake = partitioned(tmp_path, 'mode = "scd2"\ncolumns = { ignore = ["op"] }')
    deliver(lake, 10, ("a", 1, "a/b"), ("b", 1, None))
    lake.run()
    deliver(lake, 30, ("a", 1, "x=y"), ("b", 1, "x=y"))
    lake.run()
    deliver(lake, 20, ("a", 1, None))  # late
    lake.run()
    late = {
        ("a", "a/b", 10, 20), ("a", None, 20, 30), ("a", "x=y", 30, None),
        ("b", None, 10, 30), ("b", "x=y", 30, None),
    }  # fmt: skip
    assert versions(lake) == late
    act(lake, "undo", 20)
    assert versions(lake) == late - {("a", "a/b", 10, 20), ("a", None, 20, 30)} | {("a", "a/b", 10, 30)}
    deliver(lake, 40, ("a", 1, "x=y"), ("b", 1, "x=y", "D"))
    lake.run()
    now = of_partition(tmp_path / "p/main", "region", "x=y")
    ends = {(row["id"], row["valid_to"], row["is_current"]) for row in now}
    assert ends == {("a", None, True), ("b", 40, False)} and len(now) == 2


def versions(lake: Lake) -> set[tuple]:
    rows = read_table(lake.root / "p/main")
    found = {(row["id"], row["region"], row["valid_from"], row["valid_to"]) for row in rows}
    assert len(found) == len(rows), rows
    return found


def test_append_lies_by_epoch_then_by_the_columns_asked_for(tmp_path: Path):
    lake = partitioned(tmp_path, 'mode = "append"')
    text = lake.pipelines["p"].replace('key = ["id"]\n', "").replace("""delete_when = "op = 'D'"\n""", "")
    lake.pipelines["p"] = text
    lake.configure()
    deliver(lake, 10, ("a", 1, "a/b"), ("a", 1, "a/b"), ("b", 1, None))
    deliver(lake, 20, ("a", 2, "x"))
    lake.run()
    assert DeltaTable(tmp_path / "p/main").metadata().partition_columns == ["_epoch", "region"]
    there = [(row["_epoch"], row["id"]) for row in of_partition(tmp_path / "p/main", "region", "a/b")]
    assert there == [(10, "a"), (10, "a")]
    act(lake, "undo", 10)
    assert [(row["_epoch"], row["region"]) for row in read_table(tmp_path / "p/main")] == [(20, "x")]


def test_a_snapshot_leaves_partitions_that_it_no_longer_has(tmp_path: Path):
    lake = partitioned(tmp_path, SNAPSHOT)
    deliver(lake, 10, ("a", 1, "x"), ("b", 1, None), ("c", 1, "y"))
    lake.run()
    deliver(lake, 20, ("a", 2, "y"))
    lake.run()
    assert places(lake) == {"a": (2, "y")}
    act(lake, "undo", 20)
    assert places(lake) == {"a": (1, "x"), "b": (1, None), "c": (1, "y")}
