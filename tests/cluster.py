"""A cluster under test: the real coordinator and workers, over real RabbitMQ, Redis and S3 (or disk).

Owns: the configuration, the processes it starts, waiting for what they do. Never: knows how the product
works inside; it sees exit codes, what is printed, the HTTP API, and the tables as other readers see them.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import oracle
from lake import BINARY, Result
from services import Services, free_port

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
TIMEOUT_SECONDS = 120
EPOCHS = range(1, 9)
# Readers of the tests and the product take the same variables.
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@dataclass
class Process:
    """One process of ours, with what it printed."""

    popen: subprocess.Popen
    log: Path
    name: str

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(TIMEOUT_SECONDS)

    def terminate(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """SIGTERM; the exit code."""
        self.popen.terminate()
        return self.popen.wait(seconds)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None


@dataclass
class Cluster:
    """One configuration, its tables, its processes."""

    root: Path
    services: Services
    store: str = "disk"
    endpoint: str | None = None
    more: str = ""
    pipelines: dict[str, str] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    delivered: dict[str, dict[int, list[tuple]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"t{uuid.uuid4().hex[:12]}"
        self.port = free_port()
        self.bucket = f"b-{self.name}"
        if self.store == "s3":
            self.services.moto.start()
            self.services.moto.create_bucket(self.bucket)
            self.endpoint = self.endpoint or self.services.moto.url
        self.services.rabbitmq.start()
        self.services.redis.start()

    # --- configuration ---

    def place(self, path: str) -> str:
        return f"s3://{self.bucket}/{path}" if self.store == "s3" else str(self.root / path)

    def pipeline(self, name: str = "p", more: str = "") -> "Cluster":
        if self.store == "disk":
            (self.root / f"in_{name}").mkdir(exist_ok=True)
        self.pipelines[name] = f"""
[pipeline.{name}]
source = "{self.place(f"in_{name}")}"
raw = "{self.place(f"{name}/raw")}"
main = "{self.place(f"{name}/main")}"
key = ["id"]
delete_when = "op = 'D'"
ready = {{ marker = "_SUCCESS" }}
{more}
"""
        self.configure()
        return self

    def configure(self) -> None:
        head = f"""
[state]
uri = "{self.place("state")}"
[worker]
slots = 2
grace = "20s"
[run]
poll = "500ms"
{self.more}
"""
        if self.store == "s3":
            head += f'[storage]\naws_endpoint_url = "{self.endpoint}"\naws_region = "us-east-1"\n'
            head += 'aws_access_key_id = "test"\naws_secret_access_key = "test"\n'
        cluster = f"""
[cluster]
amqp = "{self.services.rabbitmq.url}"
redis = "{self.services.redis.url}"
name = "{self.name}"
listen = "127.0.0.1:{self.port}"
"""
        tables = "".join(self.pipelines.values())
        (self.root / "alluvium.toml").write_text(head + cluster + tables)
        (self.root / "embedded.toml").write_text(head + tables)

    # --- deliveries ---

    def deliver(
        self, epoch: int, rows: list[tuple], name: str = "p", file: str = "part-0.parquet",
        complete: bool = True,
    ) -> None:
        """Rows (id, value, op) as one file of the epoch's folder, then its marker."""
        self.delivered.setdefault(name, {})[epoch] = rows
        arrays = [pa.array(list(c), type=f.type) for c, f in zip(zip(*rows), SCHEMA)]
        body = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), body)
        for at, content in ((file, body.getvalue()), ("_SUCCESS", b""))[: 1 + complete]:
            if self.store == "s3":
                key = f"in_{name}/{epoch}/{at}"
                self.services.moto.client().put_object(Bucket=self.bucket, Key=key, Body=content)
            else:
                path = self.root / f"in_{name}" / str(epoch) / at
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def expected(self, name: str = "p") -> dict[str, int]:
        """The fold of what was delivered: a second statement beside the oracle's."""
        main: dict[str, int] = {}
        for _, rows in sorted(self.delivered.get(name, {}).items()):
            for key, value, op in rows:
                if op == "D":
                    main.pop(key, None)
                else:
                    main[key] = value
        return main

    # --- processes ---

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALLUVIUM_", "OTEL_"))}
        return kept | (more or {})

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        log = self.root / f"{len(self.processes)}-{arguments[0]}.log"
        with open(log, "wb") as out:
            popen = subprocess.Popen(
                [BINARY, *arguments], cwd=self.root, env=self.environment(env),
                stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            )
        self.processes.append(Process(popen, log, f"{socket.gethostname()}-{popen.pid}"))
        return self.processes[-1]

    def coordinator(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        return self.start("coordinator", *arguments, env=env)

    def worker(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        return self.start("worker", *arguments, env=env)

    def alluvium(self, *arguments: str, config: str = "alluvium.toml") -> Result:
        done = subprocess.run(
            [BINARY, "--config", config, *arguments], cwd=self.root, env=self.environment(),
            text=True, capture_output=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def stop(self) -> None:
        """Ends what still runs, hard."""
        for process in self.processes:
            if process.alive:
                process.signal(signal.SIGCONT)
                process.kill()

    # --- looking ---

    def api(self, path: str) -> Any:
        """The coordinator's answer, or None when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=40) as answer:
                body = answer.read().decode()
        except OSError:
            return None
        return json.loads(body) if body.startswith("{") else body

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of the coordinator's answer to a POST."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=40) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def states(self, name: str = "p") -> dict[int, str]:
        """Epoch → state, by the coordinator's word."""
        found = self.api(f"/api/v1/epochs?pipeline={name}")
        return {item["epoch"]: item["state"] for item in found["items"]} if found else {}

    def applied(self, name: str = "p") -> set[int]:
        """Epochs in main, read from its log by other means."""
        with self.reading():
            try:
                markers = oracle.read_markers(self.place(f"{name}/main"))
            except oracle.OracleError:
                return set()
            return oracle.applied_epochs(markers, name)

    def ingested(self, name: str = "p") -> set[int]:
        """Epochs in raw, read from its log by other means."""
        with self.reading():
            try:
                markers = oracle.read_markers(self.place(f"{name}/raw"))
            except oracle.OracleError:
                return set()
            return set(oracle.step_markers(markers, name, "ingest"))

    def wait(self, what: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> Any:
        """Polls until `what` is true, or fails with the processes' last words."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > deadline:
                logs = [f"--- {p.log.name}\n{p.text()[-3000:]}" for p in self.processes]
                raise AssertionError("\n".join([f"waited {seconds} s in vain", *logs]))
            time.sleep(0.05)
        return found

    def wait_applied(self, epochs: set[int], name: str = "p", seconds: float = TIMEOUT_SECONDS) -> None:
        self.wait(lambda: epochs <= self.applied(name), seconds)

    def main(self, name: str = "p") -> dict[str, int]:
        with self.reading():
            rows = oracle.read_main(self.place(f"{name}/main"), ["id"])
        return {key[0]: row["value"] for key, row in rows.items()}

    def check(self, name: str = "p") -> None:
        """Main is the fold of what was delivered, and what the oracle computes from the folders."""
        assert self.main(name) == self.expected(name)
        with self.reading():
            code = oracle.main([
                "check", "--source", self.place(f"in_{name}"), "--main", self.place(f"{name}/main"),
                "--raw", self.place(f"{name}/raw"), "--pipeline", name, "--key", "id",
                "--delete-when-op",
            ])
        assert code == 0, "the oracle disagrees"

    def reading(self):
        """Readers find the S3 server through variables."""
        variables = dict(S3_KEYS)
        if self.store == "s3":
            variables["AWS_ENDPOINT_URL"] = self.services.moto.url
        return _Environment(variables)


class _Environment:
    """Variables that are set for a while."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def deliver_some(cluster: Cluster, epochs=EPOCHS, rows: int = 50, name: str = "p") -> set[int]:
    """Epochs whose keys overlap, with deletes among them."""
    for epoch in epochs:
        deliveries = []
        for at in range(rows):
            op = "D" if (epoch + at) % 7 == 0 else "U"
            deliveries.append((f"k{(epoch * 13 + at) % (rows * 2)}", epoch * 1000 + at, op))
        cluster.deliver(epoch, deliveries, name)
    return set(epochs)
