"""`merge.skip_unchanged`: rows that are as main has them are left alone, and with their hashes kept no row of
main is read for it.

Owns: when hashes of rows are kept, used and made anew, and that they never change what comes out. What the
feed shows of it is test_feed.py's business; the worlds draw it, with indexes that are spoilt in between.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

SKIP = 'merge = { skip_unchanged = true, index = "always" }\noptimize = { enabled = false }'
ROWS = 3_000


def made(root: Path, more: str = SKIP) -> Lake:
    """Main has one file of 3,000 rows, of which each was compared once: their hashes are known."""
    lake = Lake(root).pipeline(more=more)
    for epoch in (1, 2):
        lake.deliver(epoch, [(f"k{key:04}", key, "U") for key in range(ROWS)])
        lake.run()
    return lake


def hashes(lake: Lake) -> list[Path]:
    return sorted((lake.root / "state/cache").glob("*/*.rows"))


def data_files(lake: Lake) -> list[Path]:
    return [path for path in (lake.root / "p/main").glob("*.parquet")]


def test_with_hashes_known_no_byte_of_a_data_file_is_read(tmp_path: Path):
    lake = made(tmp_path)
    assert len(hashes(lake)) == 1
    contents = {path: path.read_bytes() for path in data_files(lake)}
    for path, content in contents.items():
        path.write_bytes(b"\0" * len(content))
    # All but three rows are as they were; one of them goes, one is new.
    rows = [(f"k{key:04}", key, "U") for key in range(ROWS)]
    rows[7], rows[1500], rows[-1] = ("k0007", -7, "U"), ("k1500", 1500, "D"), ("new", 1, "U")
    lake.deliver(3, rows)
    done = lake.alluvium("run", "--once")
    for path, content in contents.items():
        path.write_bytes(content)
    assert done.code == 0, done.err
    main = {f"k{key:04}": key for key in range(ROWS) if key != 1500} | {"k0007": -7, "new": 1}
    assert lake.main() == main
    assert added_rows(lake) == 2


def added_rows(lake: Lake) -> int:
    """Rows of the files that the newest commit added, without those that only got marks."""
    commits = sorted((lake.root / "p/main/_delta_log").glob("*.json"))
    adds = [json.loads(line)["add"] for line in commits[-1].read_text().splitlines() if '"add"' in line]
    return sum(json.loads(add["stats"])["numRecords"] for add in adds if not add.get("deletionVector"))


def test_rows_of_some_hashes_are_read_and_the_others_are_not(tmp_path: Path):
    """Files come and go; of what is not known the rows are read, and known from then on."""
    lake = made(tmp_path)
    main = {f"k{key:04}": key for key in range(ROWS)}
    for epoch, keys in ((3, range(2_500, 3_500)), (4, range(0, 3_500, 3)), (5, range(0, 4_000)), (6, range(0, 4_000))):
        rows = [(f"k{key:04}", key if key % 5 or epoch > 5 else key * epoch, "U") for key in keys]
        changed = sum(main.get(key) != value for key, value, _ in rows)
        main |= {key: value for key, value, _ in rows}
        lake.deliver(epoch, rows)
        lake.run()
        assert lake.main() == main
        assert added_rows(lake) == changed, epoch
    before = lake.version("main"), data_files(lake)
    lake.deliver(7, [(f"k{key:04}", key, "U") for key in range(4_000)])
    lake.run()
    assert lake.main() == main and (lake.version("main"), data_files(lake)) == (before[0] + 1, before[1])


DAMAGES = {
    "a bit is wrong": lambda path: flip(path, 24 + 16 * 100),
    "the header is wrong": lambda path: flip(path, 3),
    "cut": lambda path: os.truncate(path, 24 + 16 * 1000 + 5),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "something else": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "readable for nobody": lambda path: path.chmod(0),
}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_hashes_change_nothing_that_comes_out(damage: str, tmp_path: Path):
    lake = made(tmp_path)
    (path,) = hashes(lake)
    DAMAGES[damage](path)
    main = {f"k{key:04}": key for key in range(ROWS)}
    for epoch in (3, 4):
        rows = [(f"k{key:04}", -key if key % 100 == epoch else key, "U") for key in range(ROWS)]
        main = {key: value for key, value, _ in rows}
        lake.deliver(epoch, rows)
        lake.run()
        assert lake.main() == main and added_rows(lake) == (30 if epoch == 3 else 60)


@pytest.mark.parametrize("index", ["always", "off"])
def test_a_row_is_the_same_by_all_of_its_values(index: str, tmp_path: Path):
    """NULL and NaN are as themselves, 0.0 is not -0.0; a column that main gets is NULL in older rows."""
    lake = Lake(tmp_path).pipeline(more=SKIP.replace("always", index), deletes=False)
    schema = pa.schema([("id", pa.string()), ("f", pa.float64()), ("s", pa.struct([("a", pa.int32())])), ("l", pa.list_(pa.string()))])
    rows = [
        ("a", math.nan, {"a": 1}, ["x", None]), ("b", 0.0, {"a": None}, []), ("c", None, None, None),
        ("d", -0.0, {"a": 2}, [""]), ("e", 1.5, {"a": 3}, ["x"]),
    ]  # fmt: skip
    lake.deliver(1, rows, schema=schema)
    lake.run()
    for epoch in (2, 3):
        version, files = lake.version("main"), data_files(lake)
        lake.deliver(epoch, rows, schema=schema)
        lake.run()
        assert (lake.version("main"), data_files(lake)) == (version + 1, files), "nothing changed"
    changed = list(rows)
    changed[1] = ("b", -0.0, {"a": None}, [])
    changed[2] = ("c", None, {"a": None}, None)
    changed[4] = ("e", 1.5, {"a": 3}, ["x", ""])
    lake.deliver(4, changed, schema=schema)
    lake.run()
    assert added_rows(lake) == 3
    # A further column, NULL in some: these rows are as they were.
    wide = schema.append(pa.field("more", pa.int64()))
    lake.deliver(5, [(*row, 1 if row[0] == "a" else None) for row in changed], schema=wide)
    lake.run()
    assert added_rows(lake) == 1
    lake.deliver(6, [(*row, 1 if row[0] == "a" else None) for row in changed], schema=wide)
    files = data_files(lake)
    lake.run()
    assert data_files(lake) == files
    found = {row["id"]: (str(row["f"]), row["s"], row["l"], row["more"]) for row in lake.rows()}
    assert found == {row[0]: (str(row[1]), row[2], row[3], 1 if row[0] == "a" else None) for row in changed}


def test_too_many_hashes_for_the_memory_are_compared_by_reading(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SKIP)
    lake.configure(head='memory = "16MiB"\n')
    count = 16 * 2**20 // 4 // 32 + 1000
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
    for epoch in (1, 2, 3):
        ids, values = [f"k{key:06}" for key in range(count)], list(range(count))
        values[5] = epoch
        table = pa.table([ids, pa.array(values, pa.int64()), ["U"] * count], schema=schema)
        lake.write(epoch, "part-0.parquet", table)
        lake.run()
        assert epoch == 1 or added_rows(lake) == 1
    assert lake.main() == {f"k{key:06}": 3 if key == 5 else key for key in range(count)}


def test_another_tables_hashes_are_not_taken_for_these(tmp_path: Path):
    """The same rows in two pipelines that share a cache, and a table that is deleted and made again."""
    lake = made(tmp_path)
    lake.pipeline("q", more=SKIP)
    for epoch in (1, 2, 3):
        lake.deliver(epoch, [(f"k{key:04}", key * 2 if epoch == 1 else key, "U") for key in range(ROWS)], name="q")
        lake.run()
    assert lake.main(name="q") == lake.main() == {f"k{key:04}": key for key in range(ROWS)}
    shutil.rmtree(tmp_path / "p/main")
    for epoch in (4, 5):
        lake.deliver(epoch, [(f"k{key:04}", key + epoch, "U") for key in range(ROWS)])
        lake.run()
    assert lake.main() == {f"k{key:04}": key + 5 for key in range(ROWS)}
