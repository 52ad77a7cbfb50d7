"""What one merge asks of object storage: requests and bytes, beside a delta-rs MERGE.

Owns: a lake on an S3 server behind a proxy that counts and takes its time. Calls: `of_merges` for rows,
processes and the comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from deltalake import write_deltalake

import of_merges
from s3_proxy import S3Proxy
from services import Services

BUCKET = "bench"
CONFIG = """
[state]
uri = "s3://bench/state"
[worker]
cache = "cache"
[storage]
aws_endpoint_url = "{endpoint}"
aws_region = "us-east-1"
aws_access_key_id = "test"
aws_secret_access_key = "test"
[pipeline.p]
source = "incoming"
raw = "s3://bench/raw"
main = "s3://bench/main"
key = ["pguid"]
adopt = true
start_from = 1
ready = {{ marker = "_SUCCESS" }}
optimize = {{ enabled = false }}
merge = {{ deletion_vectors = "upgrade", index = "{index}" }}
"""


def requests(arguments: argparse.Namespace, folder: Path) -> None:
    """The second epoch's merge, without an index and with one, and the same MERGE."""
    services = Services()
    proxy = S3Proxy(services.moto.url).start()
    rows = min(arguments.rows, arguments.target)
    print(
        f"workload: researchers' metrics, {rows} rows into {arguments.target} on S3, {arguments.latency} ms for each request; "
        "an epoch is 80 % updates, 20 % inserts"
    )
    try:
        for index in ("off", "always"):
            lake = Lake(folder / f"lake-{index}", services, proxy, arguments.target)
            name = "alluvium" if index == "off" else "alluvium, side index"
            report(name, lake.ours(arguments, index, rows))
        lake = Lake(folder / "theirs", services, proxy, arguments.target)
        report("delta-rs MERGE", lake.theirs(arguments, rows))
    finally:
        proxy.stop()
        services.stop()


def report(name: str, found: tuple[of_merges.Cost, dict[str, Any]]) -> None:
    cost, counted = found
    kinds = ", ".join(f"{count} {kind}" for kind, count in counted["by_kind"].items() if count)
    total = sum(counted["by_kind"].values())
    size = f"{counted['bytes_out'] / 1e6:7.1f} MB read, {counted['bytes_in'] / 1e6:6.1f} MB written"
    print(f"  {name:22} {cost.wall:7.2f} s wall {cost.cpu:6.2f} s cpu {total:5d} requests ({kinds}), {size}")


class Lake:
    """Tables in a bucket that begins empty."""

    def __init__(self, root: Path, services: Services, proxy: S3Proxy, rows: int) -> None:
        self.root, self.services, self.proxy, self.rows = root, services, proxy, rows
        root.mkdir()
        services.moto.reset()
        services.moto.create_bucket(BUCKET)
        self.options = {
            "AWS_ENDPOINT_URL": services.moto.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }  # fmt: skip
        os.environ.update(self.options)
        order = np.random.default_rng(rows).permutation(rows)
        for at in range(0, rows, of_merges.FILE_ROWS):
            part = of_merges.rows_of(order[at : at + of_merges.FILE_ROWS], at)
            write_deltalake(f"s3://{BUCKET}/main", part, mode="append", storage_options=self.options)

    def deliver(self, epoch: int, rows: int) -> Path:
        random = np.random.default_rng(epoch)
        updates = random.choice(self.rows, rows * 4 // 5, replace=False)
        first = self.rows + epoch * rows
        numbers = np.concatenate([updates, np.arange(first, first + rows - len(updates))])
        path = self.root / f"incoming/{epoch}/part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(of_merges.rows_of(numbers, epoch), path)
        (path.parent / "_SUCCESS").touch()
        return path

    def counted(self, latency: int, command: list[str]) -> tuple[of_merges.Cost, dict[str, Any]]:
        self.proxy.reset_counters()
        self.proxy.set(latency_ms=latency)
        cost = of_merges.measured(command, self.root)
        self.proxy.set(latency_ms=0)
        return cost, self.proxy.counters()

    def ours(self, arguments: argparse.Namespace, index: str, rows: int) -> tuple[of_merges.Cost, dict[str, Any]]:
        text = CONFIG.format(endpoint=self.proxy.url, index=index)
        (self.root / "alluvium.toml").write_text(text)
        self.deliver(1, rows)
        run = [arguments.binary, "run", "--once"]
        subprocess.run(run, cwd=self.root, check=True, capture_output=True)
        self.deliver(2, rows)
        # Ingested, and not merged.
        kill = os.environ | {"ALLUVIUM_CRASH": "merge.before_commit:1"}
        done = subprocess.run(run, cwd=self.root, env=kill, capture_output=True, check=False)
        if done.returncode == 0:
            sys.exit("the merge was to be killed")
        return self.counted(arguments.latency, [arguments.binary, "step", "merge"])

    def theirs(self, arguments: argparse.Namespace, rows: int) -> tuple[of_merges.Cost, dict[str, Any]]:
        os.environ["AWS_ENDPOINT_URL"] = self.proxy.url
        for epoch in (1, 2):
            path = self.deliver(epoch, rows)
            command = [of_merges.binary_of_rival(), f"s3://{BUCKET}/main", of_merges.KEY, "stream", str(path)]
            found = self.counted(arguments.latency, command)
        return found
