"""Side indexes of keys: with them a merge reads no key, and nothing that becomes of them is ever wrong.

Owns: when an index is made, used, made anew and deleted. Which rows win is the other tests' business; the
worlds have indexes of all their files, and spoil them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lake import Lake

ALWAYS = 'merge.index = "always"\noptimize = { enabled = false }'
ROWS = 3_000


def deliver(lake: Lake, epoch: int, keys: range) -> None:
    lake.deliver(epoch, [(f"k{key}", epoch, "U") for key in keys])
    lake.run()


def indexes(lake: Lake) -> list[Path]:
    return sorted((lake.root / "state/cache").glob("*/*.index"))


def expected(*epochs: tuple[int, range]) -> dict[str, int]:
    return {f"k{key}": epoch for epoch, keys in epochs for key in keys}


def indexed(root: Path, more: str = ALWAYS) -> Lake:
    """Main has one file of 3,000 rows with an index, which the second epoch's merge made."""
    lake = Lake(root).pipeline(more=more)
    deliver(lake, 1, range(ROWS))
    assert indexes(lake) == []
    deliver(lake, 2, range(10))
    return lake


def test_with_its_index_no_byte_of_a_data_file_is_read(tmp_path: Path):
    for index in ("always", "off"):
        (tmp_path / index).mkdir()
        lake = indexed(tmp_path / index, ALWAYS.replace("always", index))
        assert len(indexes(lake)) == (1 if index == "always" else 0)
        large = max((lake.root / "p/main").glob("*.parquet"), key=lambda path: path.stat().st_size)
        content = large.read_bytes()
        large.write_bytes(b"\0" * len(content))
        lake.deliver(3, [(f"k{key}", 3, "U") for key in range(5, 20)])
        done = lake.alluvium("run", "--once")
        large.write_bytes(content)
        if index == "always":
            assert done.code == 0, done.err
            assert lake.main() == expected((1, range(ROWS)), (2, range(10)), (3, range(5, 20)))
        else:
            assert done.code == 1, "without indexes keys are read"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit is wrong": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "something else": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew(damage: str, tmp_path: Path):
    lake = indexed(tmp_path)
    (index,) = indexes(lake)
    good = index.read_bytes()
    DAMAGES[damage](index)
    lake.deliver(3, [(f"k{key}", 3, "U") for key in range(5, 20)])
    assert "side index was damaged" in lake.run().err
    assert lake.main() == expected((1, range(ROWS)), (2, range(10)), (3, range(5, 20)))
    assert index.read_bytes() == good
    # Of another data file, under this one's name.
    other = next(path for path in indexes(lake) if path != index)
    shutil.copy(other, index)
    deliver(lake, 4, range(18, 25))
    assert lake.main() == expected((1, range(ROWS)), (2, range(10)), (3, range(5, 20)), (4, range(18, 25)))


def doctor(lake: Lake) -> dict[str, str]:
    return {item["what"]: item["verdict"] for item in lake.alluvium("doctor", "-o", "json").json()}


def test_a_cache_that_is_gone_or_cannot_be_is_no_matter(tmp_path: Path):
    lake = indexed(tmp_path)
    cache = tmp_path / "state/cache"
    (cache / "secret").write_bytes(b"")
    deliver(lake, 3, range(5, 20))
    shutil.rmtree(cache)
    deliver(lake, 4, range(18, 25))
    shutil.rmtree(cache)
    cache.write_text("a file")
    deliver(lake, 5, range(24, 30))
    cache.unlink()
    cache.mkdir(mode=0o700)
    assert doctor(lake)[f"indexes of keys in {cache}"] == "ok"
    (cache / "secret").unlink()
    os.mkfifo(cache / "secret")
    assert doctor(lake)[f"indexes of keys in {cache}"] == "look"
    deliver(lake, 6, range(29, 31))
    assert lake.main() == expected(
        (1, range(ROWS)), (2, range(10)), (3, range(5, 20)), (4, range(18, 25)), (5, range(24, 30)),
        (6, range(29, 31)),
    )


def test_files_that_are_scanned_again_and_not_small_have_an_index(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="optimize = { enabled = false }")
    deliver(lake, 1, range(40_000))
    deliver(lake, 2, range(10))
    assert indexes(lake) == [], "a first scan"
    deliver(lake, 3, range(5, 20))
    assert len(indexes(lake)) == 1, "a second one"
    (index,) = indexes(lake)
    assert index.stat().st_mode & 0o077 == 0, "keys are nobody else's business"
    deliver(lake, 4, range(18, 25))
    assert indexes(lake) == [index]
    assert lake.main() == expected(
        (1, range(40_000)), (2, range(10)), (3, range(5, 20)), (4, range(18, 25))
    )


def test_keys_of_several_columns_partitions_and_other_types(tmp_path: Path):
    columns = [("site", pa.int32()), ("day", pa.date32()), ("part", pa.float64()), ("v", pa.int64())]
    schema = pa.schema(columns)
    more = ALWAYS + '\nkey = ["site", "day", "part"]\npartition_by = ["site"]'
    lake = Lake(tmp_path).pipeline(more="", deletes=False)
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', more)
    lake.configure()
    want = {}
    for epoch, rows in ((1, range(900)), (2, range(0, 900, 7)), (3, range(0, 1_000, 3)), (4, range(950, 990))):
        keys = [(row % 3, row % 50, row / 4) for row in rows]
        want |= {key: epoch for key in keys}
        sites, days, parts = zip(*keys)
        values = [sites, days, parts, [epoch] * len(keys)]
        arrays = [pa.array(list(value), kind) for value, (_, kind) in zip(values, columns)]
        folder = lake.deliver(epoch, [], schema=schema)
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / "part-0.parquet")
        lake.run()
    assert indexes(lake)
    rows = lake.rows(by="part")
    found = {(row["site"], (row["day"] - row["day"].fromisoformat("1970-01-01")).days, row["part"]): row["v"]
             for row in rows}  # fmt: skip
    assert found == want and len(rows) == len(want)


def test_the_cache_keeps_to_its_size(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=ALWAYS)
    lake.configure('cache_size = "256KiB"\ncache = "./elsewhere"\n')
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    others = tmp_path / "elsewhere/mine/notes.index"
    others.parent.mkdir()
    others.write_text("not an index")
    os.utime(others, (0, 0))
    # Each run writes less than what makes a long-lived worker look through its folder.
    for epoch in range(1, 31):
        deliver(lake, epoch, range(epoch * 700, (epoch + 1) * 700))
    kept = list((tmp_path / "elsewhere").glob("*/*.index"))
    # The run that finds too much deletes before it ends, and may write one more.
    assert 0 < sum(path.stat().st_size for path in kept) <= (256 + 64) << 10
    assert others.read_text() == "not an index", "files of others stay"


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=ALWAYS)
    lake.configure('cache = "./shared"\n')
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    deliver(lake, 1, range(100))
    deliver(lake, 2, range(50))
    assert lake.main() == expected((1, range(100)), (2, range(50)))
    assert list((tmp_path / "shared").iterdir()) == []
    deliver(lake, 3, range(20))
    assert "others may write to it" in lake.run().err


def test_the_cache_is_a_folder_of_this_machine(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=ALWAYS)
    lake.configure('cache = "s3://bucket/cache"\n')
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and "worker.cache" in done.err and "folder of this machine" in done.err
