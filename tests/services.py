"""Private servers for tests and benchmarks: RabbitMQ, Redis and an S3 server (moto).

Owns: finding free ports, starting the servers in temporary folders, killing, restarting and ending
them, however this process ends. Never: knows what the product does with them, and never ends a
server that the environment gave (ALLUVIUM_TEST_AMQP, ALLUVIUM_TEST_REDIS, ALLUVIUM_TEST_S3).

As a command, `python tests/services.py`: starts all three, prints these variables, and ends with
its standard input (with `--stay` it does not look at that), SIGTERM or SIGINT.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pika
import redis
from botocore.config import Config

READY_SECONDS, STOP_SECONDS = 60, 30
DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "http": 80, "https": 443}

# A process between us and a server. Its standard input ends when we do, even by SIGKILL: then it
# kills the server and removes its folder. PR_SET_PDEATHSIG is set here, not by us, as it strikes
# when the starting *thread* ends, and a test may start a server in a thread.
GUARD = """
import ctypes, os, shutil, signal, subprocess, sys, threading
folder, *command = sys.argv[1:]
die = lambda: sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGKILL)
child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die)
print(child.pid, flush=True)
orphaned = threading.Event()
def watch():
    os.read(0, 1)
    orphaned.set()
    child.kill()
threading.Thread(target=watch, daemon=True).start()
child.wait()
if orphaned.is_set():
    shutil.rmtree(folder, ignore_errors=True)
"""


def free_port() -> int:
    """A free port below the ones that systems give to outgoing connections: it stays free."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def find_command(name: str) -> str:
    """RabbitMQ's own scripts, where Debian has them: its wrappers know one folder and one user."""
    folders = os.pathsep.join(["/usr/lib/rabbitmq/bin", os.environ["PATH"], "/usr/sbin"])
    path = shutil.which(name, path=folders)
    if path is None:
        raise RuntimeError(f"{name} is not installed: run scripts/install-services")
    return path


class Server:
    """One server: private, or given by the environment. A private one dies with us, and keeps its
    port and its folder from one start to the next. What it prints is in `folder`/output.log."""

    name = variable = url_form = ""
    question = b""

    def __init__(self) -> None:
        self.given = os.environ.get(self.variable) or None
        self.url = self.given or self.url_form.format(port=free_port())
        parts = urlsplit(self.url)
        self.address = (parts.hostname or "127.0.0.1", parts.port or DEFAULT_PORTS[parts.scheme])
        self.folder = Path(tempfile.mkdtemp(prefix=f"alluvium-{self.name}-"))
        self.env = dict(os.environ)
        self._guard: subprocess.Popen | None = None

    def command(self) -> list[str]:
        """How to start it; also prepares what it needs."""
        raise NotImplementedError

    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def ready(self) -> bool:
        try:
            with socket.create_connection(self.address, timeout=2) as connection:
                connection.sendall(self.question)
                # One that was given may want more before it answers: TLS, or a password.
                return bool(self.given) or connection.recv(1) != b""
        except OSError:
            return False

    def start(self) -> None:
        """Starts it if it is down, and returns when it answers."""
        if not self.given and not self.running():
            self._launch()
        deadline = time.monotonic() + READY_SECONDS
        while not self.ready():
            if self.given or not self.running() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not answer at {self.url}\n{self.log_tail()}")
            time.sleep(0.05)

    def _launch(self) -> None:
        command = [sys.executable, "-I", "-c", GUARD, str(self.folder), *self.command()]
        with open(self.folder / "output.log", "ab") as log:
            self._guard = subprocess.Popen(
                command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )
        line = self._guard.stdout.readline()
        if not line:
            self._guard.wait()
            raise RuntimeError(f"{self.name} cannot be started\n{self.log_tail()}")
        self.pid = int(line)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks it to end, and returns when it is gone. The folder stays for the next start."""
        if self.given:
            raise RuntimeError(f"{self.name} was given by {self.variable}: it is not ours to end")
        for attempt in (number, signal.SIGKILL):
            if self.running():
                with suppress(ProcessLookupError):
                    os.kill(self.pid, attempt)
                with suppress(subprocess.TimeoutExpired):
                    self._guard.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL of the server itself: it closes nothing in order and flushes nothing."""
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """The end, of the folder too."""
        if not self.given:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_tail(self) -> str:
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("log/*.log")])
        ends = [path.read_bytes()[-3000:].decode(errors="replace") for path in paths]
        return "\n".join(f"--- end of {path}\n{text}" for path, text in zip(paths, ends))


class NodeNames(Server):
    name = "epmd"  # Erlang's, for one broker: a shared one would be a daemon that outlives us
    url_form = "epmd://127.0.0.1:{port}"
    question = b"\0\1n"

    def command(self) -> list[str]:
        return [find_command("epmd"), "-address", "127.0.0.1", "-port", str(self.address[1])]


class RabbitMQ(Server):
    name = "RabbitMQ"
    variable = "ALLUVIUM_TEST_AMQP"
    url_form = "amqp://guest:guest@127.0.0.1:{port}/%2f"
    question = b"AMQP\0\0\x09\1"

    def __init__(self, settings: dict[str, str] | None = None) -> None:
        super().__init__()
        self.settings = settings or {}
        self.node = f"alluvium-{self.address[1]}@localhost"
        self.names = NodeNames()
        inside = {
            "HOME": "", "RABBITMQ_MNESIA_BASE": "data", "RABBITMQ_LOG_BASE": "log",
            "RABBITMQ_PID_FILE": "pid", "RABBITMQ_CONFIG_FILE": "rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": "empty", "RABBITMQ_ENABLED_PLUGINS_FILE": "plugins",
            "RABBITMQ_PLUGINS_EXPAND_DIR": "expanded",
        }
        foreign = ("RABBITMQ_", "ERL_", "NOTIFY_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.env |= {key: str(self.folder / path) for key, path in inside.items()} | {
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(free_port()),
            # The script becomes the server instead of waiting for it: one process to kill.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(self.names.address[1]), "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def command(self) -> list[str]:
        self.names.start()
        lines = {"listeners.tcp.1": f"127.0.0.1:{self.address[1]}"} | self.settings
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        (self.folder / "rabbitmq.conf").write_text(text)
        (self.folder / "plugins").write_text("[].")
        (self.folder / "empty").touch()
        return [find_command("rabbitmq-server")]

    def close(self) -> None:
        super().close()
        self.names.close()

    def settle(self, quorum_queue: str) -> None:
        """Waits until a kill does not break a new queue: its name is on disk only after a second,
        and a broker that does not find it there starts an empty queue that never gets a leader."""
        path = self.folder / "data" / self.node / "quorum" / self.node / "names.dets"
        deadline = time.monotonic() + READY_SECONDS
        while quorum_queue.encode() not in path.read_bytes():
            assert time.monotonic() < deadline, f"{quorum_queue} is no quorum queue"
            time.sleep(0.05)

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl; takes about a second."""
        if self.given:
            raise RuntimeError(f"{self.name} was given by {self.variable}: it has no rabbitmqctl")
        done = subprocess.run(
            [find_command("rabbitmqctl"), "-q", "-n", self.node, *arguments], env=self.env,
            text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {arguments}: {done.stdout}{done.stderr}")
        return done.stdout

    def connection(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.URLParameters(self.url))

    def delete_queues(self, names: list[str]) -> None:
        """Names without a queue are fine."""
        with self.connection() as connection:
            channel = connection.channel()
            for name in names:
                channel.queue_delete(name)

    def queue_depth(self, name: str) -> int | None:
        """Messages ready for a consumer (not those a consumer holds); None without the queue. A
        quorum queue shows 0 for a moment after a restart, until it has elected its leader."""
        with self.connection() as connection, suppress(pika.exceptions.ChannelClosedByBroker):
            return connection.channel().queue_declare(name, passive=True).method.message_count
        return None


class Redis(Server):
    name = "Redis"  # nothing is written to disk: what it knew is lost with it
    variable = "ALLUVIUM_TEST_REDIS"
    url_form = "redis://127.0.0.1:{port}/0"
    question = b"PING\r\n"

    def command(self) -> list[str]:
        server = [find_command("redis-server"), "--port", str(self.address[1]), "--save", ""]
        return [*server, "--appendonly", "no", "--bind", "127.0.0.1", "--dir", str(self.folder)]

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def flush(self) -> None:
        with self.client() as client:
            client.flushdb()


class Moto(Server):
    name = "S3"  # in memory: what it knew is lost with it
    variable = "ALLUVIUM_TEST_S3"
    url_form = "http://127.0.0.1:{port}"
    question = b"HEAD / HTTP/1.0\r\n\r\n"

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(self.address[1])]

    def client(self, url: str | None = None, attempts: int = 3) -> Any:
        """A boto3 client, of this server or of a proxy in front of it."""
        # Without `proxies`, a proxy of the environment would be asked for 127.0.0.1.
        config = Config(proxies={}, s3={"addressing_style": "path"}, max_pool_connections=50,
                        retries={"total_max_attempts": attempts})
        return boto3.client(
            "s3", endpoint_url=url or self.url, aws_access_key_id="test",
            aws_secret_access_key="test", region_name="us-east-1", config=config,
        )

    def create_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def reset(self) -> None:
        """Forgets all buckets."""
        with socket.create_connection(self.address) as connection:
            connection.sendall(b"POST /moto-api/reset HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
            assert b" 200" in connection.recv(15), f"{self.url} is no moto, or broken"


class Services:
    """The three servers. Each is started when it is first asked for, and never again by itself:
    after `kill` it is down until `start` or `heal`."""

    def __init__(self, rabbitmq_settings: dict[str, str] | None = None) -> None:
        self._rabbitmq_settings = rabbitmq_settings
        self._started: list[Server] = []
        atexit.register(self.stop)

    @cached_property
    def rabbitmq(self) -> RabbitMQ:
        return self._start(RabbitMQ(self._rabbitmq_settings))

    @cached_property
    def redis(self) -> Redis:
        return self._start(Redis())

    @cached_property
    def moto(self) -> Moto:
        return self._start(Moto())

    amqp = property(lambda self: self.rabbitmq.url)
    s3 = property(lambda self: self.moto.url)

    def heal(self) -> None:
        """Starts again what was started once and is down: one test's kill is not the next's."""
        for server in self._started:
            server.start()

    def stop(self) -> None:
        for server in self._started:
            server.close()

    def _start(self, server: Any) -> Any:
        self._started.append(server)
        server.start()
        return server


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    services = Services()
    for server in (services.rabbitmq, services.redis, services.moto):
        print(f"{server.variable}={server.url}", flush=True)
    if "--stay" in sys.argv:
        signal.pause()
    sys.stdin.read()


if __name__ == "__main__":
    main()
