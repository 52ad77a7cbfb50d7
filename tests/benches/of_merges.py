"""Merges beside a delta-rs MERGE of the same crate: whole processes, fresh copies, in turn.

Owns: the workloads (researchers' metrics, random GUID keys: 80 % of an epoch's rows are updates), the
measurement (wall, CPU, peak memory), the comparison of both results row for row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder, convert_to_deltalake, write_deltalake

import of_tpcds

KEY = "pguid"
FILE_ROWS = 250_000
COUNTS = ["tot_cites", "h_index", "works", "recent_cites", "co_authors", "grants", "patents"]
CONFIG = """
[pipeline.p]
source = "incoming"
raw = "raw"
main = "main"
key = {key}
adopt = true
start_from = 1
ready = {{ marker = "_SUCCESS" }}
{settings}
"""


@dataclasses.dataclass(frozen=True)
class Workload:
    """So many rows in epochs, into a table of so many."""

    name: str
    target: int
    rows: int
    floor: float
    epochs: int = 1
    settings: str = 'merge = { deletion_vectors = "upgrade", index = "off" }'
    own_layout: bool = False


# All of a table in one bin, whether it pays or not.
WHOLE = 'optimize = { bin_size = "1000GiB", enabled = false, small_files = 2, read_cost = "110%" }'
# The epoch before, which made the tables, made the indexes, too.
INDEXED = 'merge = { deletion_vectors = "upgrade", index = "always" }'
WORKLOADS = [
    Workload("100 k into 5 M", 5_000_000, 100_000, 10),
    Workload(
        "100 k into 5 M, our layout, side index", 5_000_000, 100_000, 15, own_layout=True, settings=INDEXED
    ),
    Workload("1 k into 5 M, side index", 5_000_000, 1_000, 40, settings=INDEXED),
    Workload("10 k into 5 M, side index", 5_000_000, 10_000, 25, settings=INDEXED),
    Workload("1 M into 5 M", 5_000_000, 1_000_000, 3),
    Workload(
        "100 k into 5 M, copy-on-write", 5_000_000, 100_000, 1.8,
        settings='merge = { deletion_vectors = "off", index = "off" }',
    ),
    Workload("100 k into 10 M", 10_000_000, 100_000, 13),
    Workload("30 waiting epochs of 100 k into 5 M", 5_000_000, 100_000, 20, epochs=30),
    Workload("100 k into 50 M", 50_000_000, 100_000, 13),
    Workload("10 k into 5 M", 5_000_000, 10_000, 10),
    Workload("1 k into 5 M", 5_000_000, 1_000, 10),
    Workload("100 k into 5 M, our layout", 5_000_000, 100_000, 10, own_layout=True),
]


@dataclasses.dataclass
class Cost:
    """Of one process: seconds on the wall, of CPU, and peak memory in MB."""

    wall: float
    cpu: float
    memory: float


# A process of its own: what a child's peak memory is counted from is the memory of its parent.
MEASURE = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
error = process.stderr.read()
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - began
if os.waitstatus_to_exitcode(status):
    sys.exit(f"{sys.argv[1:]} failed: {error.decode()[-2000:]}")
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def measured(command: list[str], cwd: Path) -> Cost:
    """Runs a process to its end; one that fails ends the benchmark."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], cwd=cwd, check=True, stdout=subprocess.PIPE)
    return Cost(*json.loads(done.stdout))


def keys_of(numbers: np.ndarray) -> pa.Array:
    """GUIDs that follow from numbers: random to look at, and the same every time."""
    mixed = numbers.astype(np.uint64)
    halves = []
    for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        with np.errstate(over="ignore"):
            half = (mixed + np.uint64(factor)) * np.uint64(factor)
            half ^= half >> np.uint64(29)
            half *= np.uint64(0xBF58476D1CE4E5B9)
            half ^= half >> np.uint64(32)
        halves.append(half.astype(">u8").view(np.uint8).reshape(-1, 8))
    digits = np.concatenate(halves, axis=1)
    letters = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((len(numbers), 36), ord("-"), np.uint8)
    places = [at for at in range(36) if at not in (8, 13, 18, 23)]
    text[:, places[0::2]] = letters[digits >> 4]
    text[:, places[1::2]] = letters[digits & 15]
    offsets = np.arange(0, 36 * (len(numbers) + 1), 36, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text.tobytes())]
    return pa.Array.from_buffers(pa.string(), len(numbers), buffers)


def rows_of(numbers: np.ndarray, seed: int) -> pa.Table:
    """Twelve columns: the key, a name, a country, a score, a day, and counts."""
    random = np.random.default_rng(seed)
    count = len(numbers)
    countries = pa.array([f"country {n}" for n in range(120)])
    columns = {
        KEY: keys_of(numbers),
        "name": pa.array(np.char.add("researcher ", (numbers % 50_000).astype(str))),
        "country": countries.take(pa.array(random.integers(0, 120, count))),
        "score": pa.array(random.random(count)),
        "since": pa.array(random.integers(0, 20_000, count).astype(np.int32)).cast(pa.date32()),
    }
    columns |= {name: pa.array(random.integers(0, 100_000, count)) for name in COUNTS}
    return pa.table(columns)


class Ground:
    """What all workloads of one size share: a table as delta-rs wrote it, made once."""

    def __init__(self, folder: Path, rows: int):
        self.rows = rows
        self.table = folder / f"table-{rows}"
        if not self.table.exists():
            order = np.random.default_rng(rows).permutation(rows)
            for at in range(0, rows, FILE_ROWS):
                write_deltalake(self.table, rows_of(order[at : at + FILE_ROWS], at), mode="append")


def epochs_of(workload: Workload, folder: Path) -> list[Path]:
    """One Parquet file for each epoch."""
    random = np.random.default_rng(7)
    files = []
    for epoch in range(1, workload.epochs + 1):
        updates = random.choice(workload.target, workload.rows * 4 // 5, replace=False)
        first = workload.target + epoch * workload.rows
        inserts = np.arange(first, first + workload.rows - len(updates))
        numbers = random.permutation(np.concatenate([updates, inserts]))
        path = folder / "incoming" / str(epoch) / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(rows_of(numbers, epoch), path)
        (path.parent / "_SUCCESS").touch()
        files.append(path)
    return files


def copied(source: Path, target: Path) -> Path:
    """A fresh copy. Data files are never written again, so that links will do."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    return target


def before_the_merge(binary: str, table: Path, lake: Path, settings: str, key: list[str] = [KEY]) -> None:
    """The lake's epochs in raw and not in main, a copy of the table: processed, then without its merges."""
    waiting = lake / "waiting"
    (lake / "alluvium.toml").write_text(CONFIG.format(settings=settings, key=json.dumps(key)))
    main = copied(table, lake / "main")
    kept = set(os.listdir(main / "_delta_log"))
    subprocess.run([binary, "run", "--once"], cwd=lake, check=True, capture_output=True)
    # Adoption and upgrade stay; the merge goes, and what came after it.
    is_after = False
    for entry in sorted(set(os.listdir(main / "_delta_log")) - kept):
        path = main / "_delta_log" / entry
        is_after |= entry.endswith(".json") and '"step":"merge"' in path.read_text()
        if is_after or "checkpoint" in entry:
            path.unlink()
    main.rename(waiting)


def binary_of_rival() -> str:
    """The example of the table crate."""
    return os.environ["ALLUVIUM_RIVAL"]


def differing(one: Path, other: Path) -> int:
    """Rows that only one of two tables has."""
    both = QueryBuilder().register("a", DeltaTable(one)).register("b", DeltaTable(other))
    names = ", ".join(f'"{field.name}"' for field in DeltaTable(one).schema().fields)
    total = 0
    for left, right in (("a", "b"), ("b", "a")):
        sql = f"SELECT count(*) AS n FROM (SELECT {names} FROM {left} EXCEPT ALL SELECT {names} FROM {right})"
        total += pa.table(both.execute(sql).read_all())["n"][0].as_py()
    counts = [pa.table(both.execute(f"SELECT count(*) AS n FROM {t}").read_all())["n"][0].as_py() for t in "ab"]
    return total + abs(counts[0] - counts[1])


def alternated(sides: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, Cost]:
    """Medians of each side, which take turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            costs[name].append(run())
    return {
        name: Cost(*(statistics.median(getattr(cost, of) for cost in found) for of in ("wall", "cpu", "memory")))
        for name, found in costs.items()
    }


def compare(workload: Workload, arguments: argparse.Namespace, folder: Path) -> None:
    """One workload: both sides in turn, one line of ratios."""
    table = Ground(folder, workload.target).table
    lake = folder / "lake"
    shutil.rmtree(lake, ignore_errors=True)
    files = epochs_of(workload, lake)
    laid_out = table
    if workload.own_layout:
        laid_out = in_our_layout(arguments.binary, table, folder)
    before_the_merge(arguments.binary, laid_out, lake, workload.settings)
    ways = ["stream", "collect"] if workload.epochs == 1 else ["stream"]
    costs = side_by_side(arguments, folder, table, files, [KEY], ways)
    report(workload.name, costs, workload.floor)
    tell_difference(lake / "main", folder / "theirs")


def in_our_layout(binary: str, table: Path, folder: Path) -> Path:
    """The table as our optimize writes it, made once."""
    ordered = folder / f"ordered-{table.name}"
    if not ordered.exists():
        lake = folder / "ordering"
        shutil.rmtree(lake, ignore_errors=True)
        epochs_of(Workload("", 1, 1, 0), lake)
        before_the_merge(binary, table, lake, WHOLE)
        (lake / "waiting").rename(lake / "main")
        subprocess.run([binary, "step", "optimize"], cwd=lake, check=True, capture_output=True)
        # A table like any other: without what adoption noted in its log.
        ordered.mkdir()
        for file in DeltaTable(lake / "main").file_uris():
            os.link(file, ordered / Path(file).name)
        convert_to_deltalake(ordered)
    return ordered


def side_by_side(
    arguments: argparse.Namespace, folder: Path, table: Path, files: list[Path], key: list[str], ways: list[str]
) -> dict[str, Cost]:
    """The merge that waits in `folder / lake`, and MERGEs of the same files into the table, in turn."""
    lake, theirs = folder / "lake", folder / "theirs"

    def ours() -> Cost:
        copied(lake / "waiting", lake / "main")
        return measured([arguments.binary, "step", "merge"], lake)

    def rival(way: str) -> Callable[[], Cost]:
        def run() -> Cost:
            copied(table, theirs)
            return measured([binary_of_rival(), str(theirs), ",".join(key), way, *map(str, files)], folder)

        return run

    names = {"stream": "delta-rs, streaming", "collect": "delta-rs, not streaming"}
    sides = {"alluvium": ours} | {names.get(way, "delta-rs"): rival(way) for way in ways}
    return alternated(sides, arguments.rounds)


def tell_difference(ours: Path, theirs: Path) -> None:
    """Says whether both tables hold the same rows; the benchmark ends when they do not."""
    wrong = differing(ours, theirs)
    print(f"  both tables are {'equal, row for row' if not wrong else f'DIFFERENT: {wrong} rows'}")
    if wrong:
        sys.exit(1)


def compare_tpcds(case: of_tpcds.Case, arguments: argparse.Namespace, folder: Path) -> None:
    """One of the cases that delta-rs measures itself with."""
    table = of_tpcds.table_of(folder)
    lake = folder / "lake"
    shutil.rmtree(lake, ignore_errors=True)
    files = of_tpcds.epoch_of(case, lake)
    settings = """delete_when = "op = 'D'"\ncolumns = { ignore = ["op"] }\n""" + Workload.settings
    before_the_merge(arguments.binary, table, lake, settings, of_tpcds.KEY)
    ways = ["stream", "collect"] if case.way == "stream" else [case.way]
    costs = side_by_side(arguments, folder, table, files, of_tpcds.KEY, ways)
    report(f"web_returns, {of_tpcds.ROWS} rows: {case.name}", costs, None)
    tell_difference(lake / "main", folder / "theirs")


def optimize(arguments: argparse.Namespace, folder: Path) -> None:
    """All of a table as delta-rs wrote it, anew and by key, beside OPTIMIZE ZORDER."""
    ground = Ground(folder, 5_000_000)
    lake, theirs = folder / "lake", folder / "theirs"
    shutil.rmtree(lake, ignore_errors=True)
    # Files of 14 MiB are small ones: all of them go into one bin.
    settings = 'optimize = { bin_size = "1GiB", enabled = false }'
    waiting = lake / "waiting"
    epochs_of(Workload("optimize", 5_000_000, 1_000, 2.5), lake)
    before_the_merge(arguments.binary, ground.table, lake, settings)

    def ours() -> Cost:
        copied(waiting, lake / "main")
        return measured([arguments.binary, "step", "optimize"], lake)

    def zorder() -> Cost:
        copied(ground.table, theirs)
        return measured([binary_of_rival(), str(theirs), KEY, "zorder"], folder)

    costs = alternated({"alluvium": ours, "delta-rs ZORDER": zorder}, arguments.rounds)
    report("optimize, 5 M rows by key", costs, 2.5)
    print(f"  files: {len(DeltaTable(lake / 'main').file_uris())} here, {len(DeltaTable(theirs).file_uris())} there")
    tell_difference(lake / "main", theirs)


def report(name: str, costs: dict[str, Cost], floor: float | None) -> None:
    """Each side's cost, and the ratios: each figure against the rival that is best in it."""
    print(f"\n{name}")
    for side, cost in costs.items():
        print(f"  {side:24} {cost.wall:8.3f} s wall {cost.cpu:8.3f} s cpu {cost.memory:7.0f} MB")
    others = [cost for side, cost in costs.items() if side != "alluvium"]
    ratio = {
        of: min(getattr(cost, of) for cost in others) / getattr(costs["alluvium"], of)
        for of in ("wall", "cpu", "memory")
    }
    of_floor = f" (floor of wall {floor:g})" if floor else ""
    print(f"  ratio {ratio['wall']:6.1f} wall {ratio['cpu']:6.1f} cpu {ratio['memory']:5.1f} memory{of_floor}")


def merge(arguments: argparse.Namespace, folder: Path) -> None:
    """All workloads, or those whose name holds `--only`."""
    print("workload: researchers' metrics, 12 columns, random GUID keys; an epoch is 80 % updates, 20 % inserts")
    print("alluvium: the worker's merge step, from raw; delta-rs: MERGE from the epoch's Parquet file, without a raw copy")
    home = Path(arguments.keep) if arguments.keep else folder
    home.mkdir(parents=True, exist_ok=True)
    for workload in WORKLOADS:
        if arguments.only in workload.name:
            compare(workload, arguments, home)
    for case in of_tpcds.CASES:
        if arguments.only in f"web_returns {case.name}":
            compare_tpcds(case, arguments, home)
    if arguments.only in "optimize":
        optimize(arguments, home)
