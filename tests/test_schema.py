"""A column that the tables do not have: added, left out, or a reason to stop."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from lake import Lake

WIDER = pa.schema(
    [("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("email", pa.string()), ("n", pa.int32())]
)


def columns(lake: Lake, table: str) -> list[str]:
    return [field.name for field in DeltaTable(lake.root / "p" / table).schema().fields if field.name[0] != "_"]


def begun(tmp_path: Path, more: str) -> Lake:
    lake = Lake(tmp_path).pipeline(more=more)
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.deliver(20, [("b", 2, "U", "b@x", 3), ("c", 3, "U", None, 4)], schema=WIDER)
    return lake


def test_evolve_adds_it_to_both_tables(tmp_path: Path):
    lake = begun(tmp_path, "")
    lake.run()
    assert columns(lake, "raw") == columns(lake, "main") == ["id", "value", "op", "email", "n"]
    rows = pl.read_delta(str(tmp_path / "p/main")).sort("id").to_dicts()
    assert [row["email"] for row in rows] == [None, "b@x", None]


@pytest.mark.parametrize("kind", ["struct", "list"])
def test_a_time_without_zone_in_the_place_of_a_nested_date_asks_for_its_feature(tmp_path: Path, kind: str):
    lake = Lake(tmp_path).pipeline()

    def deliver(epoch: int, key: str, inner: pa.DataType, value) -> None:
        nested = pa.struct([("day", inner)]) if kind == "struct" else pa.list_(inner)
        schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("d", nested)])
        lake.deliver(epoch, [(key, epoch, "U", {"day": value} if kind == "struct" else [value])], schema=schema)

    deliver(10, "a", pa.date32(), dt.date(2026, 1, 2))
    lake.run()
    deliver(20, "b", pa.timestamp("us"), dt.datetime(2026, 1, 2, 3))
    lake.run()
    for table in ("raw", "main"):
        features = DeltaTable(tmp_path / "p" / table).protocol().writer_features
        assert "timestampNtz" in features, table
        days = [row["d"]["day"] if kind == "struct" else row["d"][0] for row in lake.rows(table)]
        assert days == [dt.datetime(2026, 1, 2), dt.datetime(2026, 1, 2, 3)]


def test_freeze_leaves_it_out_and_names_it(tmp_path: Path):
    expect = 'expect = [{ name = "mail", sql = "email IS NOT NULL", action = "warn" }]'
    lake = begun(tmp_path, 'schema = "freeze"')
    lake.pipeline(more=f'schema = "freeze"\n{expect}')
    done = lake.run()
    assert "left out new column(s) email, n" in done.err
    assert "mail does not hold for 1" in done.err, "expressions may speak of it"
    assert columns(lake, "raw") == columns(lake, "main") == ["id", "value", "op"]
    assert lake.main() == {"a": 1, "b": 2, "c": 3}
    runs = lake.alluvium("runs", "p", "--epoch", "20", "-o", "json").json()
    assert "left out new column(s) email, n" in [run["message"] for run in runs]
    # Whoever wants it later reads the folder again.
    lake.pipeline(more='schema = "evolve"')
    assert lake.alluvium("replay", "p", "20", "--yes").code == 0
    assert columns(lake, "main") == ["id", "value", "op", "email", "n"]


def test_fail_blocks_the_epoch_and_touches_no_table(tmp_path: Path):
    lake = begun(tmp_path, 'schema = "fail"')
    before = lake.version("raw"), lake.version("main")
    done = lake.run(code=1)
    assert "AL-0309" in done.err and "email, n" in done.err and "evolve" in done.err
    assert (lake.version("raw"), lake.version("main")) == before
    lake.pipeline(more='schema = "evolve"')
    lake.run()
    assert lake.main() == {"a": 1, "b": 2, "c": 3}


def test_the_first_epoch_says_which_columns_there_are(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='schema = "fail"')
    lake.deliver(10, [("a", 1, "U", "x", 1)], schema=WIDER)
    lake.run()
    lake.deliver(20, [("b", 2, "U")])  # one that lacks columns is no news
    lake.run()
    assert columns(lake, "main") == ["id", "value", "op", "email", "n"] and lake.main() == {"a": 1, "b": 2}


def test_schema_history_says_which_epoch_brought_a_column(tmp_path: Path):
    lake = begun(tmp_path, "")
    lake.run()
    items = lake.alluvium("schema", "history", "p", "-o", "json").json()
    told = [(item["table"], item["epoch"], item["change"]) for item in items]
    own = "_op string, _file string, _row long, _generation long, _ingested_at timestamp, _epoch long"
    columns = "id string, value long, op string"
    assert told == [
        ("raw", 10, f"made with {own}, {columns}"),
        ("raw", 20, "added email string, n integer"),
        ("main", 10, f"made with {columns}"),
        ("main", 20, "added email string, n integer"),
    ]


def test_the_sequence_column_is_never_left_out(tmp_path: Path):
    """The first epoch gave it no type; without it in raw the order within later epochs would be lost."""
    lake = Lake(tmp_path).pipeline(more='schema = "freeze"\nsequence_by = "value"')
    untyped = pa.schema([("id", pa.string()), ("value", pa.null()), ("op", pa.string())])
    lake.deliver(10, [("a", None, "U")], schema=untyped)
    lake.run()
    lake.deliver(20, [("a", 9, "U"), ("a", 5, "U")])
    lake.run()
    assert columns(lake, "main") == ["id", "op", "value"] and lake.main() == {"a": 9}


@pytest.mark.parametrize("policy", ["freeze", "fail"])
def test_an_epoch_without_rows_says_nothing_of_columns(tmp_path: Path, policy: str):
    """Somebody left the first epoch out: raw has no data columns, and the next one says which there are."""
    lake = Lake(tmp_path).pipeline(more=f'schema = "{policy}"')
    lake.deliver(10, [("a", 1, "U")])
    (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
    lake.run(code=1)
    assert lake.alluvium("skip", "p", "10", "--yes").code == 0
    lake.deliver(20, [("b", 2, "U")])
    lake.run()
    assert lake.main() == {"b": 2} and columns(lake, "raw") == ["id", "value", "op"]


def test_the_key_is_never_left_out(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='schema = "freeze"')
    untyped = pa.schema([("id", pa.null()), ("value", pa.int64()), ("op", pa.string())])
    lake.deliver(10, [(None, 1, "U")], schema=untyped)
    lake.deliver(20, [("b", 2, "U")])
    lake.run()
    assert lake.main() == {"b": 2}


def test_a_new_raw_has_the_ignored_columns_that_main_lacks(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='schema = "fail"\ncolumns = { ignore = ["op"] }')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    shutil.rmtree(tmp_path / "p/raw")
    lake.deliver(20, [("b", 2, "U"), ("c", 1, "D")])
    lake.run()
    assert lake.main() == {"a": 1, "b": 2} and "op" in columns(lake, "raw")
