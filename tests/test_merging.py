"""How rows get out of main and into it: marks, copies, and what other readers and tools make of them.

Owns: deletion vectors and copy-on-write as seen from outside. Never: which rows these are (worlds, test_run.py).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, convert_to_deltalake, write_deltalake

from lake import Lake
from oracle_feed import commit_of
from oracle_vectors import deleted_rows

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])


def main_of(lake: Lake) -> Path:
    return lake.root / "p/main"


def newest(lake: Lake) -> list[dict[str, Any]]:
    """The actions of main's newest merge."""
    for version in range(DeltaTable(main_of(lake)).version(), -1, -1):
        actions = commit_of(main_of(lake), version)
        if any("txn" in action and action["txn"]["appId"].endswith("/merge") for action in actions):
            return actions
    raise AssertionError("no merge")


def paths(actions: list[dict[str, Any]], kind: str) -> set[str]:
    return {action[kind]["path"] for action in actions if kind in action}


def vectors(actions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Path → deletion vector of each file that becomes live with one."""
    adds = (action["add"] for action in actions if "add" in action)
    return {add["path"]: add["deletionVector"] for add in adds if add.get("deletionVector")}


def by_hand(table: Path) -> list[tuple]:
    """Main's rows by the log and its files alone."""
    live: dict[str, dict[str, Any]] = {}
    for version in range(DeltaTable(table).version() + 1):
        actions = commit_of(table, version)
        for action in actions:
            if "remove" in action:
                live.pop(action["remove"]["path"], None)
        live |= {action["add"]["path"]: action["add"] for action in actions if "add" in action}
    rows = []
    for path, add in live.items():
        gone = deleted_rows(table, add.get("deletionVector"))
        found = pq.ParquetFile(table / path).read().select(["id", "value"]).to_pylist()
        rows += [(row["id"], row["value"]) for at, row in enumerate(found) if at not in gone]
    return sorted(rows)


def holds(lake: Lake, expected: dict[str, int]) -> None:
    """Three readers that share no code with the product's writer find these rows, each once."""
    wanted = sorted(expected.items())
    assert sorted((row["id"], row["value"]) for row in lake.rows()) == wanted
    assert sorted(pl.read_delta(str(main_of(lake))).select("id", "value").rows()) == wanted
    assert by_hand(main_of(lake)) == wanted


def test_rows_that_go_are_marked_and_their_file_stays(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [(key, 1, "U") for key in "abcd"])
    lake.run()
    first = paths(newest(lake), "add")
    lake.deliver(20, [("b", 2, "U"), ("d", 2, "D"), ("e", 2, "U")])
    lake.run()
    actions = newest(lake)
    assert paths(actions, "remove") == first and first < paths(actions, "add")
    [(path, vector)] = vectors(actions).items()
    assert deleted_rows(main_of(lake), vector) == {1, 3} and vector["storageType"] == "i"
    stats = next(json.loads(a["add"]["stats"]) for a in actions if "add" in a and a["add"]["path"] == path)
    assert stats["numRecords"] == 4 and stats["tightBounds"] is False
    holds(lake, {"a": 1, "b": 2, "c": 1, "e": 2})
    # Marks add up, and the rows of before are told no second time.
    lake.deliver(30, [("a", 3, "U"), ("b", 3, "U")])
    lake.run()
    assert deleted_rows(main_of(lake), vectors(newest(lake))[path]) == {0, 1, 3}
    holds(lake, {"a": 3, "b": 3, "c": 1, "e": 2})


def test_a_file_without_a_row_left_goes(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D")])
    lake.run()
    assert not vectors(newest(lake)) and len(paths(newest(lake), "remove")) == 1
    holds(lake, {"a": 2})


def test_many_marks_lie_below_a_folder_that_vacuum_of_others_passes_over(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize.enabled = false")
    expected = {f"k{n:05}": 1 for n in range(5000)}
    lake.deliver(10, [(key, 1, "U") for key in expected])
    lake.run()
    expected |= {key: 2 for key in list(expected)[::3]}
    lake.deliver(20, [(key, 2, "U") for key, value in expected.items() if value == 2])
    lake.run()
    [vector] = vectors(newest(lake)).values()
    assert vector["storageType"] == "u" and vector["pathOrInlineDv"].startswith("_dv")
    assert len(deleted_rows(main_of(lake), vector)) == 1667
    holds(lake, expected)
    DeltaTable(main_of(lake)).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)
    holds(lake, expected)


def test_cleanup_takes_vectors_that_no_version_needs_and_no_others(tmp_path: Path):
    more = 'optimize.enabled = false\ncleanup = { every = "1ms", retention = "1s" }'
    short = {"ALLUVIUM_TEST_SHORT_RETENTION": "1"}
    lake = Lake(tmp_path).pipeline(more=more)
    keys = [f"k{n:05}" for n in range(3000)]
    expected = dict.fromkeys(keys, 1)
    lake.deliver(10, [(key, 1, "U") for key in keys])
    lake.run(env=short)
    for epoch in (20, 30, 40):
        expected |= {key: epoch for key in keys[epoch // 10 :: 4]}
        lake.deliver(epoch, [(key, epoch, "U") for key in keys[epoch // 10 :: 4]])
        lake.run(env=short)
    folder = main_of(lake) / "_dv"
    before = set(folder.iterdir())
    assert before
    for path in folder.iterdir():
        age(path)
    for path in (main_of(lake) / "_delta_log").glob("*.json"):
        age(path)
    lake.deliver(50, [(keys[0], 50, "U")])
    lake.run(env=short)
    expected[keys[0]] = 50
    assert len(set(folder.iterdir()) & before) < len(before)
    holds(lake, expected)


def age(path: Path) -> None:
    """Three hours ago."""
    then = time.time() - 3 * 3600
    os.utime(path, (then, then))


def age_log(table: Path) -> None:
    """What the log tells happened three hours ago."""
    for path in (table / "_delta_log").glob("*.json"):
        text = re.sub(
            r'"(deletionTimestamp|timestamp)":(\d+)',
            lambda found: f'"{found[1]}":{int(found[2]) - 3 * 3600 * 1000}',
            path.read_text(),
        )
        path.write_text(text)
        age(path)


def test_a_file_that_was_marked_long_ago_and_goes_today_is_kept_for_the_retention(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize.enabled = false")
    expected = {f"k{n:05}": 1 for n in range(1000)}
    lake.deliver(10, [(key, 1, "U") for key in expected])
    lake.run()
    expected |= {key: 2 for key in list(expected)[::3]}
    lake.deliver(20, [(key, 2, "U") for key in list(expected)[::3]])
    lake.run()
    before = DeltaTable(main_of(lake))
    files = [path for path in main_of(lake).glob("*.parquet")]
    age_log(main_of(lake))
    for path in [*files, *(main_of(lake) / "_dv").iterdir()]:
        age(path)
    lake.pipeline(more='optimize = { small_files = 2 }\ncleanup = { every = "1ms", retention = "1h" }')
    assert "optimized" in lake.run().err
    lake.deliver(30, [("new", 3, "U")])
    lake.run()
    assert all(path.exists() for path in files)
    then = pl.read_delta(str(main_of(lake)), version=before.version())
    assert dict(then.select("id", "value").rows()) == expected
    holds(lake, expected | {"new": 3})


def test_without_deletion_vectors_files_are_written_anew(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='merge.deletion_vectors = "off"')
    lake.deliver(10, [(key, 1, "U") for key in "abc"])
    lake.run()
    lake.deliver(20, [("b", 2, "U"), ("c", 2, "D")])
    lake.run()
    assert not vectors(newest(lake))
    assert "deletionVectors" not in (DeltaTable(main_of(lake)).protocol().reader_features or [])
    # Readers without deletion vectors read it, too.
    assert DeltaTable(main_of(lake)).to_pyarrow_table().num_rows == 2
    holds(lake, {"a": 1, "b": 2})


def test_the_setting_may_change_at_any_time(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [(key, 1, "U") for key in "abcd"])
    lake.run()
    lake.deliver(20, [("a", 2, "U")])
    lake.run()
    assert vectors(newest(lake))
    lake.pipeline(more='merge.deletion_vectors = "off"')
    lake.deliver(30, [("b", 3, "U")])
    lake.run()
    # The marked file is written anew: neither the marked row nor the new one is in it.
    assert not vectors(newest(lake))
    holds(lake, {"a": 2, "b": 3, "c": 1, "d": 1})
    lake.pipeline()
    lake.deliver(40, [("c", 4, "D")])
    lake.run()
    assert vectors(newest(lake))
    holds(lake, {"a": 2, "b": 3, "d": 1})


@pytest.mark.parametrize("setting", ["auto", "upgrade"])
def test_a_table_of_others_gets_marks_only_when_asked_for(tmp_path: Path, setting: str):
    write_deltalake(str(tmp_path / "p/main"), pa.table([["a", "b"], [1, 1], ["U", "U"]], schema=SCHEMA))
    before = DeltaTable(tmp_path / "p/main").protocol()
    more = f'adopt = true\nstart_from = 10\nmerge.deletion_vectors = "{setting}"'
    lake = Lake(tmp_path).pipeline(more=more)
    lake.deliver(10, [("b", 2, "U"), ("c", 2, "U")])
    lake.run()
    protocol = DeltaTable(main_of(lake)).protocol()
    if setting == "auto":
        assert protocol == before and not vectors(newest(lake))
    else:
        assert (protocol.min_reader_version, protocol.min_writer_version) == (3, 7)
        assert protocol.reader_features == ["deletionVectors"] == protocol.writer_features
        assert vectors(newest(lake))
    holds(lake, {"a": 1, "b": 2, "c": 2})


def test_a_path_that_a_url_writes_otherwise_is_copied(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='partition_by = ["place"]', deletes=False)
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("place", pa.string())])
    lake.deliver(10, [("a", 1, "x/y"), ("b", 1, "x/y"), ("c", 1, "z"), ("d", 1, "z")], schema=schema)
    lake.run()
    lake.deliver(20, [("a", 2, "z"), ("c", 2, "z")], schema=schema)
    lake.run()
    assert {path.split("/")[0] for path in vectors(newest(lake))} == {"place=z"}
    found = pl.read_delta(str(main_of(lake))).select("id", "value", "place").rows()
    assert sorted(found) == [("a", 2, "z"), ("b", 1, "x/y"), ("c", 2, "z"), ("d", 1, "z")]


def test_a_damaged_vector_blocks_and_nothing_changes(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize.enabled = false")
    lake.deliver(10, [(f"k{n:05}", 1, "U") for n in range(3000)])
    lake.run()
    lake.deliver(20, [(f"k{n:05}", 2, "U") for n in range(0, 3000, 3)])
    lake.run()
    [path] = (main_of(lake) / "_dv").iterdir()
    whole = path.read_bytes()
    version = DeltaTable(main_of(lake)).version()
    for damaged in (whole[:-40], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(damaged)
        lake.deliver(30, [("k00001", 3, "U")])
        blocked = lake.run(code=1)
        assert "AL-0" in blocked.err and "_dv/" in blocked.err, blocked.err
        assert DeltaTable(main_of(lake)).version() == version
    path.write_bytes(whole)
    lake.run()
    assert lake.main()["k00001"] == 3


KEYS = {
    "byte": (pa.int8(), [-128, 0, 127]),
    "int": (pa.int32(), [-(2**31), 0, 2**31 - 1]),
    "long": (pa.int64(), [-(2**63), 2**53 + 1, 2**63 - 1]),
    "boolean": (pa.bool_(), [False, True]),
    "date": (pa.date32(), [dt.date(1900, 1, 1), dt.date(2026, 1, 1), dt.date(9999, 12, 31)]),
    "timestamp": (pa.timestamp("us", "UTC"), [dt.datetime(1900, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, 1, 1, 1, 1, tzinfo=dt.UTC)]),
    "timestamp_ntz": (pa.timestamp("us"), [dt.datetime(1, 1, 1), dt.datetime(2026, 1, 1, 0, 0, 0, 999999)]),
    "decimal": (pa.decimal128(38, 10), [Decimal("-1.0000000001"), Decimal("1234567890123456789012345678.0123456789")]),
    "float": (pa.float32(), [-1.5, 0.0, float("inf")]),
    "double": (pa.float64(), [-1e300, 0.1, float("nan")]),
    "string": (pa.string(), ["", "é" * 100, "x" * 70 + "1", "x" * 70 + "2"]),
    "binary": (pa.binary(), [b"\x00", b"\x00\x00", b"\xff" * 70]),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("setting", ["auto", "off"])
def test_a_key_of_any_type_is_found_again(tmp_path: Path, kind: str, setting: str):
    arrow, values = KEYS[kind]
    schema = pa.schema([("id", arrow), ("value", pa.int64()), ("op", pa.string())])
    lake = Lake(tmp_path).pipeline(more=f'merge.deletion_vectors = "{setting}"')
    lake.deliver(10, [(value, 1, "U") for value in values], schema=schema)
    lake.run()
    lake.deliver(20, [(values[0], 2, "U"), (values[-1], 2, "D")], schema=schema)
    lake.run()
    assert sorted(row["value"] for row in lake.rows()) == [1] * (len(values) - 2) + [2]
    # A late epoch: what it says is older than the rows in main.
    lake.deliver(15, [(value, 0, "U") for value in values], schema=schema)
    lake.run()
    assert sorted(row["value"] for row in lake.rows()) == [0] * (len(values) - 2) + [2]


WRITERS = {
    "dictionary, snappy": {"compression": "snappy", "use_dictionary": True},
    "plain, none": {"compression": "none", "use_dictionary": False},
    "delta, gzip": {"compression": "gzip", "use_dictionary": False, "column_encoding": {"id": "DELTA_BYTE_ARRAY"}},
    "delta lengths, lz4": {"compression": "lz4", "use_dictionary": False, "column_encoding": {"id": "DELTA_LENGTH_BYTE_ARRAY"}},
    "pages v2, zstd": {"compression": "zstd", "data_page_version": "2.0"},
    "brotli, small pages": {"compression": "brotli", "data_page_size": 100, "write_page_index": True},
    "no statistics": {"write_statistics": False},
    "small row groups": {"row_group_size": 7},
}


@pytest.mark.parametrize("setting", ["off", "upgrade"])
def test_times_of_96_bits_stay_what_they_are(tmp_path: Path, setting: str):
    main = tmp_path / "p/main"
    far, near = dt.datetime(9999, 12, 31, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    time = pa.timestamp("us", "UTC")
    schema = pa.schema([("id", time), ("value", pa.int64()), ("till", time), ("part", pa.struct([("till", time)]))])
    ids = [far, near, dt.datetime(1000, 1, 1, tzinfo=dt.UTC)]
    rows = pa.table([ids, [1, 1, 1], [far, far, far], [{"till": far}] * 3], schema=schema)
    write_deltalake(str(main), rows)
    # As Spark writes them: the file does not say that they have a zone.
    [add] = [action["add"] for action in commit_of(main, 0) if "add" in action]
    pq.write_table(rows, main / add["path"], use_deprecated_int96_timestamps=True, store_schema=False)
    entry = main / "_delta_log" / f"{0:020}.json"
    size = (main / add["path"]).stat().st_size
    entry.write_text(entry.read_text().replace(f'"size":{add["size"]}', f'"size":{size}'))
    more = f'adopt = true\nstart_from = 10\nmerge.deletion_vectors = "{setting}"'
    lake = Lake(tmp_path).pipeline(more=more, deletes=False)
    lake.deliver(10, [(near, 2, near, None), (far, 3, far, {"till": near})], schema=schema)
    lake.run()
    if setting == "off":
        # Written anew; the old file's times are beyond what its readers can tell.
        [kept] = [row for row in lake.rows(by="value") if row["value"] == 1]
        for told in (kept["till"], kept["part"]["till"]):
            assert told.replace(tzinfo=None) == far.replace(tzinfo=None)
    assert sorted(row["value"] for row in lake.rows()) == [1, 2, 3]


@pytest.mark.parametrize("setting", ["off", "upgrade"])
def test_fields_that_older_files_lack_are_null(tmp_path: Path, setting: str):
    old = pa.struct([("a", pa.int64())])
    new = pa.struct([("a", pa.int64()), ("b", pa.string())])
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("part", new), ("parts", pa.list_(new))])
    main = tmp_path / "p/main"
    write_deltalake(str(main), pa.table({"id": ["x"], "value": [1], "part": [{"a": 1, "b": "1"}], "parts": [[{"a": 1, "b": "1"}]]}, schema=schema))
    # A file from before the fields were added.
    [add] = [action["add"] for action in commit_of(main, 0) if "add" in action]
    older = pa.table({
        "id": pa.array(["a", "b"]), "value": pa.array([1, 1]),
        "part": pa.array([{"a": 1}, None], old), "parts": pa.array([[{"a": 1}], None], pa.list_(old)),
    })
    pq.write_table(older, main / "older.parquet")
    add |= {"path": "older.parquet", "size": (main / "older.parquet").stat().st_size, "stats": '{"numRecords":2}'}
    (main / "_delta_log" / f"{1:020}.json").write_text(json.dumps({"add": add}) + "\n")
    more = f'adopt = true\nstart_from = 10\nmerge.deletion_vectors = "{setting}"'
    lake = Lake(tmp_path).pipeline(more=more, deletes=False)
    rows = pa.table({"id": ["a"], "value": [2], "part": [{"a": 2, "b": "2"}], "parts": [None]}, schema=schema)
    lake.write(10, "part.parquet", rows)
    lake.run()
    assert sorted((row["id"], row["value"]) for row in lake.rows()) == [("a", 2), ("b", 1), ("x", 1)]
    assert lake.alluvium("undo", "p", "10", "--yes").code == 0
    lake.run()
    [back] = [row for row in lake.rows() if row["id"] == "a"]
    assert back["part"] == {"a": 1, "b": None} and back["parts"] == [{"a": 1, "b": None}]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("setting", ["off", "upgrade"])
def test_files_of_any_writer_are_searched(tmp_path: Path, writer: str, setting: str):
    main = tmp_path / "p/main"
    main.mkdir(parents=True)
    expected = {f"key {n % 10}{n:04}": 1 for n in range(300)}
    table = pa.table([list(expected), [1] * 300, ["U"] * 300], schema=SCHEMA)
    for part in range(3):
        pq.write_table(table.slice(part * 100, 100), main / f"part-{part}.parquet", **WRITERS[writer])
    convert_to_deltalake(str(main))
    lake = Lake(tmp_path).pipeline(more=f'adopt = true\nstart_from = 10\nmerge.deletion_vectors = "{setting}"')
    changed = [*list(expected)[5::17], "key new"]
    lake.deliver(10, [(key, 2, "U") for key in changed])
    lake.run()
    holds(lake, expected | dict.fromkeys(changed, 2))


def test_columns_that_files_lack_or_spell_otherwise_are_no_obstacle(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(deletes=False, more='key = ["ID", "site"]')
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]\n', "", 1)
    lake.configure()
    wide = pa.schema([("Id", pa.string()), ("value", pa.int64()), ("site", pa.int32()), ("more", pa.string())])
    narrow = pa.schema([("site", pa.int32()), ("iD", pa.string()), ("value", pa.int64())])
    lake.deliver(10, [(1, "a", 1), (2, "a", 1)], schema=narrow)
    lake.run()
    lake.deliver(20, [("a", 2, 1, "x"), ("b", 2, 1, "x")], schema=wide)
    lake.run()
    found = pl.read_delta(str(main_of(lake)))
    found = found.rename({name: name.lower() for name in found.columns}).select("id", "site", "value", "more")
    assert sorted(found.rows()) == [("a", 1, 2, "x"), ("a", 2, 1, None), ("b", 1, 2, "x")]


def test_unchanged_rows_of_a_table_of_keys_alone_are_left_alone(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="merge.skip_unchanged = true", deletes=False)
    schema = pa.schema([("id", pa.string())])
    lake.deliver(1, [("a",), ("b",)], schema=schema)
    lake.run()
    version = lake.version("main")
    lake.deliver(2, [("b",), ("a",)], schema=schema)
    lake.run()
    [(_, marked)] = [(p, v) for p, v in vectors(newest(lake)).items()] or [("", None)]
    assert marked is None and lake.version("main") == version + 1
    assert [row["id"] for row in lake.rows()] == ["a", "b"]
