"""What optimize does to main's files: the same rows, by key, in files of the size asked for.

Owns: optimize and `tables health` as seen from outside. Races are in test_races.py.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import lake as lakes
from lake import Lake
from oracle_feed import commit_of

OFF = "optimize = { enabled = false }\n"


def main_of(lake: Lake) -> Path:
    return lake.root / "p/main"


def step(lake: Lake, name: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [lakes.BINARY, "step", name], cwd=lake.root, env=os.environ | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["report"]


def live(lake: Lake) -> dict[str, dict[str, Any]]:
    """Path → add of each live file."""
    found: dict[str, dict[str, Any]] = {}
    for version in range(DeltaTable(main_of(lake)).version() + 1):
        actions = commit_of(main_of(lake), version)
        for action in actions:
            if "remove" in action:
                found.pop(action["remove"]["path"], None)
        found |= {action["add"]["path"]: action["add"] for action in actions if "add" in action}
    return found


def rows(lake: Lake, *columns: str) -> list[tuple]:
    return sorted(pl.read_delta(str(main_of(lake))).select(columns or ("id", "value")).rows())


def health(lake: Lake) -> dict[str, Any]:
    done = lake.alluvium("tables", "health", "p", "-o", "json")
    assert done.code == 0, done.err
    return next(item for item in done.json() if item["table"] == "main")


def test_marked_files_become_one_by_key_without_marks(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=OFF)
    random.seed(1)
    keys = [f"k{number:04}" for number in range(1000)]
    expected: dict[str, int] = {}
    for epoch in range(1, 6):
        some = random.sample(keys, 300)
        lake.deliver(epoch, [(key, epoch, "U") for key in some])
        expected |= dict.fromkeys(some, epoch)
        lake.run()
    before = health(lake)
    assert before["files"] == 5 and before["marked_files"] == 4 and before["deleted_rows"] > 0
    report = step(lake, "optimize")
    assert (report["files_removed"], report["files_added"]) == (5, 1)
    [(path, add)] = live(lake).items()
    assert not add.get("deletionVector") and add["dataChange"] is False
    ids = pq.read_table(main_of(lake) / path)["id"].to_pylist()
    assert ids == sorted(expected)
    assert rows(lake) == sorted(expected.items())
    after = health(lake)
    assert (after["files"], after["deleted_rows"], after["read_cost"]) == (1, 0, 100)
    assert after["optimize"]["due"] is False
    assert step(lake, "optimize")["already"] is True


def test_files_have_the_size_asked_for_and_do_not_overlap(tmp_path: Path):
    more = 'optimize = { enabled = false, target_file_size = "1MiB" }\n'
    lake = Lake(tmp_path).pipeline(more=more)
    random.seed(2)
    # Texts that do not shrink, in several epochs whose keys lie side by side.
    count = 40_000
    keys = [f"{random.getrandbits(128):032x}" for _ in range(count)]
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("text", pa.string())])
    for epoch in range(1, 17):
        part = keys[(epoch - 1) * count // 16 : epoch * count // 16]
        values = [(key, epoch, "U", f"{random.getrandbits(400):x}") for key in part]
        lake.deliver(epoch, values, schema=schema)
        lake.run()
    assert health(lake)["key_overlap"] > 3
    expected = rows(lake, "id", "value", "text")
    # Too little memory for all rows at once: they go by way of the disk.
    lake.configure(head='memory = "16MiB"\n')
    while not step(lake, "optimize").get("already"):
        pass
    files = live(lake)
    sizes = [add["size"] for add in files.values()]
    assert 2 <= len(sizes) and max(sizes) < 2 << 20 and min(sizes) > 1 << 18, sizes
    ranges = []
    for path in files:
        ids = pq.read_table(main_of(lake) / path)["id"].to_pylist()
        assert ids == sorted(ids)
        ranges.append((ids[0], ids[-1]))
    ranges.sort()
    assert all(one[1] < other[0] for one, other in zip(ranges, ranges[1:]))
    assert rows(lake, "id", "value", "text") == expected
    assert health(lake)["key_overlap"] == 1.0


KEYS = {
    "int64": (pa.int64(), lambda n: n * 7 - 3000),
    "double": (pa.float64(), lambda n: [float("-inf"), -0.5, 0.0, 2.5, float("inf")][n] if n < 5 else n * 1.5),
    "decimal": (pa.decimal128(20, 4), lambda n: Decimal(n * 10**10 - 10**12) / 10000),
    "date": (pa.date32(), lambda n: dt.date(1800, 1, 1) + dt.timedelta(days=n * 13)),
    "timestamp": (pa.timestamp("us", tz="UTC"), lambda n: dt.datetime(1969, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=n)),
    "binary": (pa.binary(), lambda n: bytes([n % 256, n // 256, 0])),
    "text": (pa.string(), lambda n: ["", "ä", "z" * 3000, "\0", "Z"][n] if n < 5 else f"{n * 7919 % 1000}"),
    "boolean": (pa.bool_(), lambda n: n % 2 == 0),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_type(kind: str, tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=OFF)
    arrow, make = KEYS[kind]
    schema = pa.schema([("id", arrow), ("value", pa.int64()), ("op", pa.string())])
    keys = list(dict.fromkeys(make(number) for number in range(600)))
    random.seed(3)
    for epoch in (1, 2, 3):
        some = random.sample(keys, len(keys) // 2 or 1)
        lake.deliver(epoch, [(key, epoch, "U") for key in some], schema=schema)
        lake.run()
    expected = rows(lake)
    step(lake, "optimize")
    [path] = live(lake)
    assert rows(lake) == expected
    written = pq.read_table(main_of(lake) / path)["id"].to_pylist()
    assert written == sorted(written)


def test_nested_values_and_columns_that_came_later(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=OFF)
    first = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
    inner = pa.struct([("a", pa.int32()), ("b", pa.list_(pa.string()))])
    later = pa.schema([*first, ("more", inner), ("tags", pa.map_(pa.string(), pa.int64()))])
    lake.deliver(1, [("b", 1, "U"), ("d", 1, "U")], schema=first)
    lake.run()
    lake.deliver(2, [("a", 2, "U", {"a": 1, "b": ["x", None]}, [("k", 1)]), ("d", 2, "U", None, None)], schema=later)
    lake.run()
    step(lake, "optimize")
    [path] = live(lake)
    written = pq.read_table(main_of(lake) / path).to_pylist()
    assert [row["id"] for row in written] == ["a", "b", "d"]
    assert written[0]["more"] == {"a": 1, "b": ["x", None]} and written[0]["tags"] == [("k", 1)]
    assert written[1]["more"] is None and written[2]["tags"] is None


def test_bins_stay_within_their_partition(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=OFF + 'partition_by = ["place"]\n')
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("place", pa.string())])
    for epoch in range(1, 5):
        places = ["north", "south/east", None]
        values = [(f"{place}-{n}", epoch, "U", place) for place in places for n in range(epoch * 3)]
        lake.deliver(epoch, values, schema=schema)
        lake.run()
    expected = rows(lake, "id", "value", "place")
    while not step(lake, "optimize").get("already"):
        pass
    assert len(live(lake)) == 3 and rows(lake, "id", "value", "place") == expected


def test_tables_of_append_mode_keep_the_order_of_their_rows(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=OFF + 'mode = "append"\n', deletes=False)
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]\n', "")
    lake.configure()
    schema = pa.schema([("id", pa.string()), ("value", pa.int64())])
    lake.deliver(1, [("z", 1), ("a", 2)], schema=schema, file="part-0.parquet")
    lake.deliver(1, [("m", 3)], schema=schema, file="part-1.parquet")
    lake.run()
    expected = rows(lake)
    while not step(lake, "optimize").get("already"):
        pass
    assert rows(lake) == expected == [("a", 2), ("m", 3), ("z", 1)]


def test_marks_in_every_file_make_an_optimize_due_when_reads_become_dear(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='optimize = { read_cost = "130%", small_files = 1000 }\n')
    count = 400_000
    schema = pa.schema([("id", pa.int64()), ("value", pa.int64()), ("op", pa.string())])
    path = lake.deliver(1, [], schema=schema) / "part-0.parquet"
    table = pa.table({"id": range(count), "value": [1] * count, "op": ["U"] * count}, schema=schema)
    pq.write_table(table, path)
    lake.run()
    assert health(lake)["read_cost"] == 100
    lake.deliver(2, [(7, 2, "U")], schema=schema)
    lake.run()
    # The run did both: the merge that marks a row, and the optimize that it made worthwhile.
    after = health(lake)
    assert (after["marked_files"], after["rows"], after["deleted_rows"]) == (0, count, 0), after
    versions = lake.alluvium("tables", "history", "p", "-o", "json").json()
    assert any(version["step"] == "optimize" for version in versions)


def test_health_says_in_words_what_is_to_be_done(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize.small_files = 3\n")
    for epoch in (1, 2):
        lake.deliver(epoch, [(f"k{epoch}", 1, "U")])
        lake.run()
    done = lake.alluvium("tables", "health", "p")
    assert done.code == 0 and "OVERLAP" in done.out and "raw" in done.out
    assert "nothing to do yet" in done.err and "3 such files" in done.err
    missing = lake.alluvium("tables", "health", "nobody")
    assert missing.code == 2 and "nobody" in missing.err


def places(lake: Lake) -> list[pl.DataFrame]:
    return [pl.read_parquet(main_of(lake) / path) for path in live(lake)]


def test_rows_are_clustered_by_other_columns_than_the_key(tmp_path: Path):
    """A reader who asks for either of two columns passes over most files."""
    more = 'optimize = { enabled = false, target_file_size = "1MiB", cluster_by = ["x", "y"] }\n'
    lake = Lake(tmp_path).pipeline(more=more)
    random.seed(4)
    schema = pa.schema([
        ("id", pa.string()), ("value", pa.int64()), ("op", pa.string()),
        ("x", pa.int64()), ("y", pa.string()), ("text", pa.string()),
    ])
    for epoch in range(1, 33):
        values = [
            (f"{random.getrandbits(128):032x}", epoch, "U", random.randrange(10**6), f"{random.random():.9f}",
             f"{random.getrandbits(800):x}")
            for _ in range(900)
        ]
        lake.deliver(epoch, values, schema=schema)
        lake.run()
    expected = rows(lake, "id", "value", "x", "y", "text")
    while not step(lake, "optimize").get("already"):
        pass
    files = places(lake)
    assert len(files) >= 3 and rows(lake, "id", "value", "x", "y", "text") == expected
    everything = pl.concat(files)
    for name in ("x", "y"):
        middle = everything[name].sort()[len(everything) // 10]
        holding = sum(frame[name].min() <= middle <= frame[name].max() for frame in files)
        assert holding < len(files), f"{name} is everywhere"


def test_one_column_to_cluster_by_is_an_order(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='optimize = { enabled = false, cluster_by = ["VALUE"] }\n')
    lake.deliver(1, [("a", 3, "U"), ("b", 1, "U"), ("c", None, "U")])
    lake.run()
    lake.deliver(2, [("d", 2, "U"), ("e", 1, "U")])
    lake.run()
    step(lake, "optimize")
    [frame] = places(lake)
    assert frame.select("value", "id").rows() == [(None, "c"), (1, "b"), (1, "e"), (2, "d"), (3, "a")]


def test_a_column_that_is_not_there_is_named(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='optimize = { small_files = 2, cluster_by = ["nothing"] }\n')
    for epoch in (1, 2):
        lake.deliver(epoch, [(f"k{epoch}", 1, "U")])
        result = lake.run()
    assert "optimize.cluster_by" in result.err and "nothing" in result.err
    assert lake.main() == {"k1": 1, "k2": 1}, "data goes on"
