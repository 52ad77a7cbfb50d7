"""Benchmarks of the cluster: what the queue costs, and what more workers bring.

Owns: the servers, the processes, the figures. Never: asserts a time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("ALLUVIUM_BINARY", "alluvium")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from cluster import Cluster  # noqa: E402
from of_merges import keys_of  # noqa: E402
from s3_proxy import S3Proxy  # noqa: E402
from services import Services  # noqa: E402

CELERY = Path(__file__).with_name("celery_side.py")
# Enough to hide the broker's confirmations; each waits for a message, not for a processor.
QUEUE_SLOTS = 128


def queue(arguments: argparse.Namespace, folder: Path) -> None:
    """Alternates both sides on one broker; medians of the rounds, and their ratio."""
    print(
        "workload: no-op tasks (bodies of 0.8 KB here, 1.5 KB with headers at Celery), quorum queues, publish with confirm, claim a lease, run, "
        "result, acknowledge\n"
        f"alluvium: one worker of {QUEUE_SLOTS} slots, {arguments.tasks} tasks; publishes are confirmed 256 at a time\n"
        f"Celery: 2 processes, acks late, Redis results, confirmed publishes, {arguments.celery_tasks} tasks"
    )
    services = Services()
    ours, theirs = [], []
    try:
        for number in range(arguments.rounds):
            root = folder / f"queue-{number}"
            root.mkdir()
            ours.append(alluvium_side(services, root, arguments))
            theirs.append(celery_side(services, arguments))
            for side in (ours[-1], theirs[-1]):
                print(
                    f"round {number + 1}: {side['tool']:8} {side['tasks_per_second']:7.0f} tasks/s; idle "
                    f"{side['idle_ms_median']:.2f} ms median, {side['idle_ms_p99']:.2f} ms at 99 %"
                )
    finally:
        services.stop()
    of = lambda side, name: statistics.median(one[name] for one in side)
    mine, hers = of(ours, "tasks_per_second"), of(theirs, "tasks_per_second")
    print(
        f"medians: alluvium {mine:.0f} tasks/s, Celery {hers:.0f} tasks/s: {mine / hers:.1f} times as many; idle "
        f"{of(ours, 'idle_ms_median'):.2f} against {of(theirs, 'idle_ms_median'):.2f} ms (median), "
        f"{of(ours, 'idle_ms_p99'):.2f} against {of(theirs, 'idle_ms_p99'):.2f} ms (99 %)"
    )


def alluvium_side(services: Services, root: Path, arguments: argparse.Namespace) -> dict:
    cluster = Cluster(root, services).pipeline()
    try:
        worker = cluster.worker("--slots", str(QUEUE_SLOTS), "--steps", "optimize")
        cluster.wait(lambda: "serves" in worker.text())
        tasks, samples = str(arguments.tasks), str(arguments.samples)
        done = cluster.alluvium("bench-queue", "--tasks", tasks, "--samples", samples)
        assert done.code == 0, done.err
        return json.loads(done.out)
    finally:
        cluster.stop()


def celery_side(services: Services, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, str(CELERY), "--amqp", services.rabbitmq.url, "--redis", services.redis.url]
    command += ["--tasks", str(arguments.celery_tasks), "--samples", str(arguments.samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def scale(arguments: argparse.Namespace, folder: Path) -> None:
    """The same work with more and more workers, behind an S3 that takes its time."""
    services = Services()
    proxy = S3Proxy(services.moto.url).start()
    try:
        one_epoch(services, folder, arguments)
        if arguments.only == "pieces":
            return
        for pipelines in (arguments.pipelines, 1):
            epochs = max(arguments.epochs // 20, 4) if pipelines > 1 else max(arguments.epochs // 4, 10)
            print(
                f"workload: {pipelines} pipeline(s) of {epochs} epochs of {arguments.rows} rows on S3, "
                f"{arguments.latency} ms for each request, 2 slots a worker"
            )
            first = None
            for workers in arguments.workers:
                root = folder / f"scale-{pipelines}-{workers}"
                root.mkdir()
                seconds, counted = scaled(services, proxy, root, arguments, pipelines, epochs, workers)
                first = first or seconds
                total = pipelines * epochs
                requests = sum(counted["requests"].values())
                size = (counted["bytes_in"] + counted["bytes_out"]) / total / 1024
                print(
                    f"{workers} worker(s): {seconds:6.1f} s = {total / seconds:5.1f} epochs/s, "
                    f"{first / seconds:.2f} times as fast; {requests / total:.1f} requests and {size:.0f} KiB an epoch "
                    f"({', '.join(f'{kind} {count / total:.1f}' for kind, count in counted['by_kind'].items() if count)})"
                )
    finally:
        proxy.stop()
        services.stop()


def one_epoch(services, folder: Path, arguments: argparse.Namespace) -> None:
    """One epoch of many rows: its ingest, its merge into a table of as many, and the optimize of a table that lost a quarter
    of its rows."""
    files, rows = arguments.files, arguments.file_rows
    link = f"a link of {arguments.link} MB/s of its own for each worker" if arguments.link else "no bound on bytes"
    print(
        f"workload: one epoch of {files} files of {rows} rows on S3, after one of the same keys; {arguments.latency} ms for each "
        f"request, {link}, 1 slot a worker; alone: in one piece, else in pieces of {arguments.shard_size}. "
        f"optimize: the first epoch's files of 16 MiB after one of a quarter of its keys, in bins of {BIN_SIZE}"
    )
    first = None
    for workers in arguments.workers:
        root = folder / f"pieces-{workers}"
        root.mkdir()
        steps, requests, size = in_pieces(services, root, arguments, workers)
        first = first or steps
        told = (f"{step} {steps[step]:.2f} s, {first[step] / steps[step]:.2f} times as fast" for step in steps)
        print(f"{workers} worker(s): {'; '.join(told)}; {requests} requests, {size / 1e6:.0f} MB", flush=True)


BIN_SIZE = "40MiB"
QUIET = "cleanup = { enabled = false }\noptimize = { enabled = false }"
WORN = f'cleanup = {{ enabled = false }}\noptimize = {{ small_files = 2, target_file_size = "16MiB", bin_size = "{BIN_SIZE}" }}'


def in_pieces(services, root: Path, arguments, workers: int) -> tuple[dict[str, float], int, int]:
    # Each worker is a machine of its own, as far as the network goes.
    links = [S3Proxy(services.moto.url).start() for _ in range(workers)]
    cluster = Cluster(root, services, "s3")
    shard_size = f'\nshard_size = "{arguments.shard_size if workers > 1 else "1GiB"}"'
    slow = {"latency_ms": arguments.latency, "bytes_per_second": arguments.link * 1e6}
    put = services.moto.client().put_object

    def deliver(name: str, epoch: int, files: int) -> None:
        for file in range(files):
            body = large_file(epoch, file * arguments.file_rows, arguments.file_rows)
            put(Bucket=cluster.bucket, Key=f"in_{name}/{epoch}/part-{file:03}.parquet", Body=body)
        put(Bucket=cluster.bucket, Key=f"in_{name}/{epoch}/_SUCCESS", Body=b"")

    def work(**speed: float) -> None:
        for link in links:
            link.set(**({"latency_ms": 0, "bytes_per_second": 0} | speed))
            link.reset_counters()
        assert cluster.coordinator("--once").popen.wait(1800) == 0

    def seconds_of(name: str, step: str, epoch: int | None) -> float:
        told = cluster.alluvium("runs", name, "-o", "json", config="embedded.toml").json()
        return sum(run["duration_ms"] for run in told if (run["step"], run.get("epoch")) == (step, epoch)) / 1000

    try:
        cluster.pipeline("p0", QUIET + shard_size)
        configured = (root / "alluvium.toml").read_text()
        for number, link in enumerate(links):
            (root / f"worker-{number}.toml").write_text(configured.replace(services.moto.url, link.url))
            worker = cluster.start("--config", f"worker-{number}.toml", "worker", "--slots", "1")
            cluster.wait(lambda: "serves" in worker.text())
        deliver("p0", 1, arguments.files)
        work()
        deliver("p0", 2, arguments.files)
        work(**slow)
        counted = [link.counters() for link in links]
        seconds = {step: seconds_of("p0", step, 2) for step in ("ingest", "merge")}
        cluster.pipelines.clear()
        still = WORN.replace("optimize = {", "optimize = { enabled = false,")
        cluster.pipeline("p1", still + shard_size)
        for epoch, files in ((1, arguments.files), (2, max(arguments.files // 4, 1))):
            deliver("p1", epoch, files)
            work()
        cluster.pipeline("p1", WORN + shard_size)
        work(**slow)
        seconds["optimize"] = seconds_of("p1", "optimize", None)
        requests = sum(sum(link["requests"].values()) for link in counted)
        size = sum(link["bytes_in"] + link["bytes_out"] for link in counted)
        return seconds, requests, size
    finally:
        cluster.stop()
        for link in links:
            link.stop()


def large_file(epoch: int, first: int, rows: int) -> bytes:
    """Rows of about 130 bytes: a GUID, a text, and numbers that do not compress."""
    draw = np.random.default_rng([epoch, first])
    columns = {"id": keys_of(np.arange(first, first + rows)), "op": pa.array(["U"] * rows)}
    columns["name"] = pa.array(names(draw, rows))
    columns |= {f"metric_{at}": pa.array(draw.random(rows)) for at in range(6)}
    body = io.BytesIO()
    pq.write_table(pa.table(columns), body)
    return body.getvalue()


def names(draw: np.random.Generator, rows: int) -> list[str]:
    text = draw.bytes(16 * rows).hex()
    return [text[at : at + 32] for at in range(0, 32 * rows, 32)]


def scaled(services, proxy, root: Path, arguments, pipelines: int, epochs: int, workers: int):
    names = [f"p{number}" for number in range(pipelines)]
    cluster = Cluster(root, services, "s3", endpoint=proxy.url)
    try:
        for name in names:
            cluster.pipeline(name, "cleanup = { enabled = false }\nmerge = { batch_epochs = 5 }")
            for epoch in range(1, epochs + 1):
                rows = [(f"k{(epoch * 31 + at) % (3 * arguments.rows)}", at, "U") for at in range(arguments.rows)]
                cluster.deliver(epoch, rows, name)
        for _ in range(workers):
            worker = cluster.worker()
            cluster.wait(lambda: "serves" in worker.text())
        proxy.reset_counters()
        proxy.set(latency_ms=arguments.latency)
        began = time.perf_counter()
        done = cluster.coordinator("--once").popen.wait(1800)
        seconds = time.perf_counter() - began
        counted = proxy.counters()
        proxy.set(latency_ms=0)
        assert done == 0
        for name in names:
            assert cluster.main(name) == cluster.expected(name)
        return seconds, counted
    finally:
        cluster.stop()
