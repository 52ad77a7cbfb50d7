"""Benchmarks of the real binary. Started by `scripts/bench`; prints the workload and every figure.

    drain    N waiting epochs, Alluvium beside a hand-written loop of delta-rs MERGE
    growth   the time of one more epoch after 10, 100 and 1,000 earlier ones
    queue    no-op tasks through the whole path, beside Celery on the same broker
    scale    1, 2 and 4 workers with a slow S3, over one large epoch, many pipelines, and one
    merge    merges of many sizes beside a delta-rs MERGE: time, CPU and memory
    reads    what a delta-rs read of main costs after each merge
    requests what one merge asks of object storage, beside a delta-rs MERGE
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder

from lake_of_samples import SampleLake
from of_clusters import queue, scale
from of_merges import merge
from of_reads import reads
from of_requests import requests

import cluster

STEPS = """
    SELECT median(CASE WHEN step = 'ingest' THEN duration_ms END) AS ingest,
           median(CASE WHEN step = 'merge' THEN duration_ms END) AS merge
    FROM (SELECT *, dense_rank() OVER (ORDER BY epoch DESC) AS age FROM step_events WHERE epoch IS NOT NULL)
    WHERE age <= {rounds}"""
BY_HAND = Path(__file__).with_name("by_hand.py")


def content(table: str) -> list[tuple]:
    """The rows of a table, without columns that only one side keeps, in order."""
    read = QueryBuilder().register("t", DeltaTable(table)).execute("SELECT * FROM t ORDER BY pguid")
    rows = pa.table(read.read_all())
    names = sorted(rows.column_names)
    return list(zip(*(rows[name].to_pylist() for name in names)))


def drain(arguments: argparse.Namespace, folder: Path) -> None:
    """Alternates both sides; the first round compares the tables, too."""
    epochs, rows = arguments.epochs, arguments.rows
    print(f"workload: {epochs} waiting epochs of {rows} rows (80 % updates, 18 % inserts, 2 % deletes)")
    print("alluvium: run --once (raw copy, merge, ledger); by hand: one delta-rs MERGE an epoch, no raw copy")
    ours, theirs = [], []
    for number in range(arguments.rounds):
        lake = SampleLake(arguments.binary, folder / f"drain-{number}", epochs, rows)
        ours.append(lake.drain())
        target = str(folder / f"by-hand-{number}")
        began = time.perf_counter()
        subprocess.run([sys.executable, str(BY_HAND), str(lake.source), target], check=True)
        theirs.append(time.perf_counter() - began)
        if number == 0:
            is_same = content(str(lake.root / "lake/main")) == content(target)
            print(f"both tables are {'equal' if is_same else 'DIFFERENT'}")
            if not is_same:
                sys.exit(1)
        print(f"round {number + 1}: alluvium {ours[-1]:.2f} s, by hand {theirs[-1]:.2f} s")
    mine, hand = statistics.median(ours), statistics.median(theirs)
    print(f"alluvium {epochs / mine:.1f} epochs/s, by hand {epochs / hand:.1f} epochs/s: {hand / mine:.1f} times as fast")


def growth(arguments: argparse.Namespace, folder: Path) -> None:
    """One more epoch, several times, after more and more earlier ones."""
    print(f"workload: one epoch of {arguments.rows} rows after N earlier ones; `run --once`, start included")
    for earlier in arguments.earlier:
        lake = SampleLake(
            arguments.binary, folder / f"growth-{earlier}", earlier, arguments.rows, arguments.rounds
        )
        whole = lake.drain()
        again = []
        for _ in range(arguments.rounds):
            lake.deliver_next()
            again.append(lake.drain())
        idle = min(lake.drain() for _ in range(3))
        steps = lake.query(STEPS.format(rounds=arguments.rounds))[0]
        rows = lake.query("SELECT count(*) AS n FROM main")[0]["n"]
        print(
            f"{earlier:6d} earlier: one more {statistics.median(again):.3f} s "
            f"(from {min(again):.3f} to {max(again):.3f}); ingest {steps['ingest']:.0f} ms, merge "
            f"{steps['merge']:.0f} ms with {rows} rows in main; nothing to do {idle:.3f} s; "
            f"the first {earlier} took {whole:.2f} s = {earlier / whole:.1f} epochs/s"
        )


BENCHMARKS = {
    "drain": drain, "growth": growth, "queue": queue, "scale": scale, "merge": merge, "reads": reads,
    "requests": requests,
}  # fmt: skip


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--celery-tasks", type=int, default=3_000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--latency", type=int, default=30)
    parser.add_argument("--pipelines", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, help="3; merge: 5")
    parser.add_argument("--earlier", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--only", default="", help="merge: workloads whose name holds this; scale: `pieces`")
    parser.add_argument("--files", type=int, default=4, help="scale: files of the one large epoch")
    parser.add_argument("--file-rows", type=int, default=640_000, help="scale: rows of each of them")
    parser.add_argument("--shard-size", default="64MiB", help="scale: size of the pieces of that epoch")
    parser.add_argument("--link", type=float, default=4, help="scale: MB/s of each worker's own link, for that epoch; 0: no bound")
    parser.add_argument("--keep", help="merge, reads: a folder for the tables, kept for the next time")
    parser.add_argument("--target", type=int, default=5_000_000, help="reads, requests: rows of main")
    parser.add_argument("--binary", default=os.environ.get("ALLUVIUM_BINARY", "alluvium"))
    arguments = parser.parse_args()
    cluster.BINARY = arguments.binary
    few_and_large = arguments.what in ("reads", "requests")
    arguments.epochs = arguments.epochs or (12 if few_and_large else 200)
    arguments.rounds = arguments.rounds or (5 if arguments.what == "merge" else 3)
    arguments.rows = arguments.rows or (100_000 if few_and_large else 1000)
    with tempfile.TemporaryDirectory(prefix="alluvium-bench-") as folder:
        BENCHMARKS[arguments.what](arguments, Path(folder))


if __name__ == "__main__":
    main()
