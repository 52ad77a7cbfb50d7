"""Epochs and tables larger than the memory that a task may use: everything goes in all the same, by way of the disk.

Owns: `worker.memory` as a bound that no content makes an error of. Which rows win is the other tests' business.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from lake import BINARY, Lake

SCHEMA = pa.schema([("id", pa.string()), ("v", pa.int64())])


def keys(numbers: np.ndarray) -> pa.Array:
    """Texts of 36 letters in no order."""
    mixed = (numbers.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    return pa.array([f"{mix:08x}-aaaa-bbbb-cccc-{number:012x}" for mix, number in zip(mixed, numbers)])


def deliver(lake: Lake, epoch: int, numbers: np.ndarray) -> None:
    folder = lake.deliver(epoch, [], schema=SCHEMA)
    rows = pa.table({"id": keys(numbers), "v": np.full(len(numbers), epoch)}, schema=SCHEMA)
    pq.write_table(rows, folder / "part-0.parquet")


def small(tmp_path: Path, more: str = "", memory: str = "32MiB") -> Lake:
    lake = Lake(tmp_path).pipeline(more=more, deletes=False)
    lake.configure(head=f'memory = "{memory}"\n')
    return lake


def counts(lake: Lake) -> dict[int, int]:
    """How many rows of main have each value; no key is there twice."""
    main = pl.read_delta(str(lake.root / "p/main"))
    assert main["id"].n_unique() == len(main)
    return dict(main["v"].value_counts().sort("v").rows())


# A process of its own: what a child's peak is counted from is the memory of the process that made it.
PEAK = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss // 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(lake: Lake, *arguments: str) -> int:
    """Runs `alluvium` to its end: the most memory that it had, in MiB."""
    command = [sys.executable, "-c", PEAK, BINARY, *arguments]
    return int(subprocess.run(command, cwd=lake.root, capture_output=True, text=True, check=True).stdout)


ROWS = 120_000
WAYS = {
    "marks": "",
    "copies": 'merge.deletion_vectors = "off"',
    "unchanged rows left alone": "merge.skip_unchanged = true",
    "change feed": "change_feed = true",
    "snapshot": 'mode = "snapshot"\ngate = { rows_min = "0%" }',
}


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_goes_in_and_out_again_whatever_its_size(way: str, tmp_path: Path):
    lake = small(tmp_path, WAYS[way])
    numbers = np.random.default_rng(1).permutation(ROWS)
    halves, thirds = numbers[numbers % 2 == 0], numbers[numbers % 3 == 0]
    deliver(lake, 20, numbers)
    lake.run()
    deliver(lake, 30, halves)
    lake.run()
    snapshot = way == "snapshot"
    assert counts(lake) == ({} if snapshot else {20: ROWS // 2}) | {30: ROWS // 2}
    # Late: it changes nothing, and every one of its keys is looked at.
    deliver(lake, 10, thirds)
    lake.run()
    assert counts(lake) == ({} if snapshot else {20: ROWS // 2}) | {30: ROWS // 2}
    done = lake.alluvium("undo", "p", "30", "--yes")
    assert done.code == 0, done.err
    assert counts(lake) == {20: ROWS}
    done = lake.alluvium("undo", "p", "20", "--yes")
    assert done.code == 0, done.err
    assert counts(lake) == {10: len(thirds)}


def test_versions_of_many_keys(tmp_path: Path):
    lake = small(tmp_path, 'mode = "scd2"')
    numbers = np.random.default_rng(2).permutation(ROWS)
    deliver(lake, 20, numbers)
    deliver(lake, 30, numbers[numbers % 2 == 0])
    lake.run()
    deliver(lake, 10, numbers[numbers % 3 == 0])
    lake.run()
    main = pl.read_delta(str(lake.root / "p/main"))
    found = dict(main["v"].value_counts().sort("v").rows())
    assert found == {10: ROWS // 3, 20: ROWS, 30: ROWS // 2}
    current = main.filter(pl.col("is_current"))
    assert len(current) == ROWS and set(current["v"]) == {20, 30}


def test_long_keys_are_no_trouble(tmp_path: Path):
    lake = small(tmp_path, memory="32MiB")
    texts = [f"{number % 977:03}" + "k" * 1500 + f"{number:05}" for number in range(8000)]
    for epoch, some in ((20, texts), (10, texts[::2]), (30, texts[::3])):
        folder = lake.deliver(epoch, [], schema=SCHEMA)
        pq.write_table(pa.table({"id": some, "v": [epoch] * len(some)}, schema=SCHEMA), folder / "part-0.parquet")
        lake.run()
    assert counts(lake) == {20: 8000 - len(texts[::3]), 30: len(texts[::3])}


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_wide_rows_are_fewer_at_a_time(format: str, tmp_path: Path):
    """300 MB of rows of 100 kB, of which there are few kinds: a Parquet file of them is small (a row group of what is
    delivered is in memory as it is stored)."""
    lake = small(tmp_path, f'format = "{format}"\n')
    kinds = [np.random.default_rng(kind).bytes(50_000).hex() for kind in range(8)]
    schema = pa.schema([("id", pa.string()), ("v", pa.int64()), ("wide", pa.string())])
    for epoch in (1, 2):
        folder = lake.deliver(epoch, [], schema=schema)
        ids = keys(np.arange(epoch, 3_000 + epoch))
        wide = pa.array([kinds[at % 8] for at in range(3_000)])
        rows = pa.table({"id": ids, "v": np.full(3_000, epoch), "wide": wide}, schema=schema)
        (folder / "part-0.parquet").unlink()
        if format == "parquet":
            pq.write_table(rows, folder / "part-0.parquet")
        else:
            csv.write_csv(rows, folder / "part-0.csv")
        assert peak(lake, "run", "--once") < 500, epoch
    assert counts(lake) == {1: 1, 2: 3_000}
    assert set(pl.scan_delta(str(tmp_path / "p/main")).select("wide").unique().collect()["wide"]) == set(kinds)


def test_a_killed_process_leaves_nothing_on_the_disk(tmp_path: Path):
    lake = small(tmp_path, memory="16MiB")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    deliver(lake, 10, np.arange(400_000))
    process = lake.start("run", "--once", env={"TMPDIR": str(scratch)})
    deadline = time.monotonic() + 60
    # Files without a name are seen where they are open.
    while time.monotonic() < deadline and process.poll() is None:
        links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").glob("*") if link.is_symlink()]
        if any(str(scratch) in link for link in links):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(scratch.rglob("*")) == []
    lake.run()
    assert counts(lake) == {10: 400_000}


def test_files_of_an_epoch_are_not_all_in_memory_at_once(tmp_path: Path):
    """Forty files of one row group each, 15 MB as it is stored: together many times what they may take."""
    lake = small(tmp_path, memory="128MiB")
    folder = lake.deliver(1, [], schema=SCHEMA)
    (folder / "part-0.parquet").unlink()
    random = np.random.default_rng(1)
    schema = SCHEMA.append(pa.field("noise", pa.binary()))
    for number in range(40):
        count = 60_000
        noise = pa.array([random.bytes(250) for _ in range(count)])
        ids = keys(np.arange(number * count, (number + 1) * count))
        rows = pa.table({"id": ids, "v": np.full(count, 1), "noise": noise}, schema=schema)
        pq.write_table(rows, folder / f"part-{number:02}.parquet", row_group_size=count)
    assert peak(lake, "run", "--once") < 650
    assert counts(lake) == {1: 40 * 60_000}
