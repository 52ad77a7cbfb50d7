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


def health_of(binary: str, lake: Path) -> dict:
    command = [binary, "tables", "health", "p", "-o", "json"]
    told = subprocess.run(command, cwd=lake, check=True, capture_output=True)
    return next(item for item in json.loads(told.stdout)["items"] if item["table"] == "main")


def anew(binary: str, lake: Path) -> Path:
    """Main as optimize leaves it when it takes all files."""
    fresh = lake / "anew"
    fresh.mkdir(exist_ok=True)
    of_merges.copied(lake / "main", fresh / "main")
    of_merges.copied(lake / "raw", fresh / "raw")
    (fresh / "alluvium.toml").write_text(CONFIG.format(settings=of_merges.WHOLE, key=f'["{KEY}"]'))
    subprocess.run([binary, "step", "optimize"], cwd=fresh, check=True, capture_output=True)
    assert health_of(binary, fresh)["deleted_rows"] == 0, "not all is new"
    return fresh / "main"


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
    (lake / "alluvium.toml").write_text(CONFIG.format(settings=workload.settings, key=f'["{KEY}"]'))
    of_merges.copied(ground.table, lake / "main")
    print(f"workload: {arguments.target:,} rows; epochs of {arguments.rows:,}, 80 % updates of random keys; delta-rs reads")
    print("times new: beside all rows written anew by our optimize; zorder: beside those of delta-rs's ZORDER")
    heads = (f"{name + ' ms':>9} {'times new':>9} {'zorder':>9}" for name in QUERIES)
    print(f"{'epoch':>5} {'files':>6} {'estimate':>9} " + " ".join(heads))
    worst = {name: [0.0, 0.0] for name in QUERIES}
    for epoch in range(1, arguments.epochs + 1):
        (hidden / str(epoch)).rename(lake / "incoming" / str(epoch))
        subprocess.run([arguments.binary, "run", "--once"], cwd=lake, check=True, capture_output=True)
        health = health_of(arguments.binary, lake)
        fresh = lake / "fresh"
        of_merges.copied(lake / "main", fresh)
        table = DeltaTable(fresh)
        table.optimize.z_order([KEY])
        beside = [anew(arguments.binary, lake), fresh]
        cells = []
        for name, query in QUERIES.items():
            here = milliseconds(lake / "main", query)
            ratios = [here / milliseconds(other, query) for other in beside]
            worst[name] = [max(pair) for pair in zip(worst[name], ratios)]
            cells.append(f"{here:9.0f} {ratios[0]:9.2f} {ratios[1]:9.2f}")
        print(f"{epoch:>5} {health['files']:>6} {health['read_cost']:>8}% " + " ".join(cells), flush=True)
    told = (f"{name} {ours:.2f} times (zorder {theirs:.2f})" for name, (ours, theirs) in worst.items())
    print("worst: " + ", ".join(told) + "; promise: 2.5")
