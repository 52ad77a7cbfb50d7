"""`lineage`: which epoch, generation, file and row gave the present value, and who said what before."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from lake import Lake, Result

TYPED = pa.schema([("id", pa.int64()), ("value", pa.int64()), ("op", pa.string())])


def lineage(lake: Lake, *key: str, code: int = 0) -> list[tuple]:
    """(epoch, generation, op, file, row, fate) of each row of raw, the last word first."""
    arguments = [part for value in key for part in ("--key", value)]
    done = lake.alluvium("lineage", "p", *arguments, "-o", "json")
    assert done.code == code, done.err
    names = ("epoch", "generation", "op", "file", "row", "fate")
    return [tuple(item[name] for name in names) for item in done.json()]


def told(lake: Lake, *key: str) -> Result:
    return lake.alluvium("lineage", "p", *[part for value in key for part in ("--key", value)])


def test_the_last_row_by_epoch_file_and_row_is_named(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(20, [("a", 1, "U"), ("b", 1, "U"), ("a", 2, "U")])
    lake.run()
    lake.deliver(10, [("a", 9, "U")])  # late
    lake.run()
    part = "part-0.parquet"
    assert lineage(lake, "a") == [
        (20, 1, "upsert", part, 2, "current"),
        (20, 1, "upsert", part, 0, "superseded"),
        (10, 1, "upsert", part, 0, "superseded"),
    ]
    out = told(lake, "a").out
    assert "in main, from epoch 20 (generation 1), row 2 of part-0.parquet" in out
    assert "value=2" in out.splitlines()[1], out


def test_deletes_and_what_was_taken_back_are_told(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(1, [("a", 1, "U"), ("b", 1, "U")])
    lake.deliver(2, [("a", 2, "D"), ("b", 2, "U")])
    lake.run()
    assert lineage(lake, "a")[0][2:] == ("delete", "part-0.parquet", 0, "current")
    assert "not in main: deleted by epoch 2" in told(lake, "a").out
    assert lake.alluvium("undo", "p", "2", "--yes").code == 0
    assert [row[:3] + row[5:] for row in lineage(lake, "b")] == [
        (2, 2, "revert", "revert"),
        (1, 1, "upsert", "current"),
    ]
    assert "in main, from epoch 1" in told(lake, "a").out
    assert "no epoch ever named it" in told(lake, "nobody").out


def test_what_a_rollback_took_out_waits(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    for epoch in (1, 2):
        lake.deliver(epoch, [("a", epoch, "U"), (f"only{epoch}", 1, "U")])
    lake.run()
    assert lake.alluvium("rollback", "p", "--to-epoch", "1", "--yes").code == 0
    assert [(row[0], row[5]) for row in lineage(lake, "a")] == [(2, "waiting"), (1, "current")]
    assert "not in main yet: its epochs wait" in told(lake, "only2").out


def test_keys_of_several_columns_and_of_other_types(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', 'key = ["id", "op"]').replace(
        "delete_when = \"op = 'D'\"", "")
    lake.configure()
    lake.deliver(1, [(-7, 1, "it's"), (-7, 2, "x")], schema=TYPED)
    lake.run()
    assert lineage(lake, "-7", "it's") == [(1, 1, "upsert", "part-0.parquet", 0, "current")]
    assert lineage(lake, "-7", "x")[0][4] == 1
    done = told(lake, "-7")
    assert done.code == 2 and "id, op; 1 given" in done.err and "--key id --key op" in done.err
    done = told(lake, "seven", "x")
    assert done.code == 2 and "id Int64" in done.err and "seven" in done.err, done.err


def test_a_main_that_somebody_else_wrote_is_seen(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(1, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    DeltaTable(tmp_path / "p/main").delete("id = 'a'")
    lineage(lake, "a", code=3)
    assert "something else" in told(lake, "a").err
    assert lineage(lake, "b")


def test_values_of_an_adopted_table(tmp_path: Path):
    rows = {"id": ["a", "b"], "value": [1, 2], "op": ["", ""]}
    write_deltalake(tmp_path / "p/main", pa.table(rows))
    lake = Lake(tmp_path).pipeline(more="adopt = true\nstart_from = 5")
    lake.deliver(5, [("b", 9, "U")])
    lake.run()
    assert lineage(lake, "a") == []
    assert "from the table that was adopted" in told(lake, "a").out
    assert "from epoch 5" in told(lake, "b").out
    assert lake.alluvium("undo", "p", "5", "--yes").code == 0
    assert "from the table that was adopted" in told(lake, "b").out


def test_a_replay_that_waits_for_its_merge_is_no_difference(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(1, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    lake.deliver(1, [("a", 2, "U")])
    kill = {"ALLUVIUM_CRASH": "merge.before_commit:1"}
    assert lake.alluvium("replay", "p", "1", "--yes", env=kill).code < 0
    assert lake.main() == {"a": 1, "b": 1}
    assert lineage(lake, "a") == [(1, 2, "upsert", "part-0.parquet", 0, "waiting")]
    assert [row[5] for row in lineage(lake, "b")] == ["waiting"]
    lake.run()
    assert lineage(lake, "a")[0][5] == "current" and lake.main() == {"a": 2}
