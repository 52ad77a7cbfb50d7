"""What a delta-rs read of main costs after each merge, beside the same rows in new files.

Owns: the queries and their timing. The table and the epochs are those of `of_merges.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from deltalake import DeltaTable, QueryBuilder

import of_merges
from of_merges import CONFIG, KEY, Ground, Workload, epochs_of

QUERIES = {
    "sum": "SELECT sum(tot_cites), count(*) FROM t",
    "five": f"SELECT sum(tot_cites), avg(score), max(h_index), min(since), max({KEY}) FROM t",
}
READS = 9


def milliseconds(table: Path, query: str) -> float:
    """Median of a few reads by a session that has the table open."""
    builder = QueryBuilder().register("t", DeltaTable(table))
    times = []
    for _ in range(READS):
        began = time.perf_counter()
        builder.execute(query).read_all()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def reads(arguments: argparse.Namespace, folder: Path) -> None:
    """Default policy, epochs one by one: cost of a read before and after what the run's optimize did."""
    home = Path(arguments.keep) if arguments.keep else folder
    home.mkdir(parents=True, exist_ok=True)
    ground = Ground(home, arguments.target)
    lake = home / "reads"
    shutil.rmtree(lake, ignore_errors=True)
    lake.mkdir()
    workload = Workload("reads", arguments.target, arguments.rows, 0, epochs=arguments.epochs)
    epochs_of(workload, lake)
    hidden = lake / "hidden"
    (lake / "incoming").rename(hidden)
    (lake / "incoming").mkdir()
    (lake / "alluvium.toml").write_text(CONFIG.format(settings=workload.settings))
    of_merges.copied(ground.table, lake / "main")
    print(f"workload: {arguments.target:,} rows; epochs of {arguments.rows:,}, 80 % updates of random keys; delta-rs reads")
    print(f"{'epoch':>5} {'files':>6} {'estimate':>9} " + " ".join(f"{name + ' ms':>9} {'times new':>9}" for name in QUERIES))
    worst = dict.fromkeys(QUERIES, 0.0)
    for epoch in range(1, arguments.epochs + 1):
        (hidden / str(epoch)).rename(lake / "incoming" / str(epoch))
        subprocess.run([arguments.binary, "run", "--once"], cwd=lake, check=True, capture_output=True)
        told = subprocess.run(
            [arguments.binary, "tables", "health", "p", "-o", "json"], cwd=lake, check=True, capture_output=True
        )
        health = next(item for item in json.loads(told.stdout)["items"] if item["table"] == "main")
        fresh = lake / "fresh"
        of_merges.copied(lake / "main", fresh)
        table = DeltaTable(fresh)
        table.optimize.z_order([KEY])
        cells = []
        for name, query in QUERIES.items():
            here, best = milliseconds(lake / "main", query), milliseconds(fresh, query)
            worst[name] = max(worst[name], here / best)
            cells.append(f"{here:9.0f} {here / best:9.2f}")
        print(f"{epoch:>5} {health['files']:>6} {health['read_cost']:>8}% " + " ".join(cells), flush=True)
    print("worst: " + ", ".join(f"{name} {ratio:.2f} times" for name, ratio in worst.items()) + " (promise: 2.5)")
