"""The Celery side of the queue benchmark: no-op tasks through RabbitMQ, their results through Redis.

Owns: one Celery set up as safely as Alluvium is (late acks, publisher confirms, a quorum queue), its
worker process and two figures. Never: starts servers, compares, or leaves anything on them.

    python celery_side.py --amqp URL --redis URL --tasks N --samples M      prints one line of JSON
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import celery
from amqp.exceptions import NotFound
from amqp.serialization import dumps
from celery.result import AsyncResult, ResultSet
from kombu.transport import native_delayed_delivery as delays

TASK = "noop"
# Body and headers come to 1.5 KB: Celery sends an argument twice, the second time as `argsrepr`.
PADDING = "x" * 540
PROCESSES = 2
MULTIPLIERS = [1, 4]  # of the prefetch; the faster one is reported
WARM_UP_TASKS = 200
WARM_UP_SECONDS = 60  # a worker that cannot start is noticed after these
WAIT_SECONDS = 600
STOP_SECONDS = 20


def make_app(amqp: str, redis: str, queue: str, multiplier: int) -> celery.Celery:
    """The same app in the publisher and in the worker."""
    app = celery.Celery("celery_side", broker=amqp, backend=redis)
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=multiplier,
        broker_transport_options={"confirm_publish": True},
        task_default_queue=queue,
        task_default_queue_type="quorum",
        # A worker on a quorum queue binds it for delays, which a direct exchange does not allow.
        task_default_exchange_type="topic",
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
    )

    # Shared tasks, the default, would join those of the next app of this process.
    @app.task(name=TASK, shared=False)
    def noop(padding: str) -> None:
        """Does nothing: the figures are the queue's own cost."""

    return app


def message_bytes(app: celery.Celery) -> int:
    """Body and headers of one message as they are sent."""
    message = app.amqp.create_task_message(celery.uuid(), TASK, (PADDING,), {})
    return len(json.dumps(message.body)) + len(dumps("F", [message.headers]))


@contextmanager
def worker(arguments: argparse.Namespace, queue: str, multiplier: int) -> Iterator[None]:
    """A worker with its processes, in a session of their own so that all of them can be ended."""
    command = [
        sys.executable, __file__, "--amqp", arguments.amqp, "--redis", arguments.redis,
        "--work", queue, "--multiplier", str(multiplier),
    ]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            yield
        except Exception:
            said.seek(0)
            print(said.read(), file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def work(arguments: argparse.Namespace) -> None:
    """Is the worker, until it is told to end."""
    app = make_app(arguments.amqp, arguments.redis, arguments.work, arguments.multiplier)
    # Without gossip, mingle and heartbeats: talk among workers, which one worker has no use for.
    app.worker_main([
        "worker", "--pool", "prefork", "--concurrency", str(PROCESSES), "--loglevel", "warning",
        "--without-gossip", "--without-mingle", "--without-heartbeat",
    ])


def delays_exist(app: celery.Celery) -> bool:
    """Whether the broker has Celery's queues for delayed tasks, which every worker declares."""
    with app.connection_for_write() as connection:
        try:
            connection.channel().queue_declare(queue=delays.level_name(0), passive=True)
        except NotFound:
            return False
    return True


def clean(app: celery.Celery, queue: str, has_delays: bool, ids: list[str]) -> None:
    """Deletes what this run made on both servers; queues for delays only if they are ours."""
    names = [queue]
    if not has_delays:
        names += [delays.level_name(level) for level in range(delays.MAX_LEVEL + 1)]
    with app.connection_for_write() as connection:
        channel = connection.channel()
        for name in names:  # queue and exchange have the same name; a missing one is no error
            channel.queue_delete(name)
            channel.exchange_delete(name)
        if not has_delays:
            channel.exchange_delete(delays.CELERY_DELAYED_DELIVERY_EXCHANGE)
    for start in range(0, len(ids), 1000):
        app.backend.client.delete(*map(app.backend.get_key_for_task, ids[start:start + 1000]))
    app.close()


def publish(app: celery.Celery, tasks: int, ids: list[str]) -> list[AsyncResult]:
    """Sends `tasks` tasks; Celery waits for the confirm of each before it sends the next."""
    task, results = app.tasks[TASK], []
    for _ in range(tasks):
        ids.append(celery.uuid())  # before sending, so that an interrupted run finds its keys, too
        results.append(task.apply_async((PADDING,), task_id=ids[-1]))
    return results


def wait(app: celery.Celery, results: list[AsyncResult], seconds: float) -> None:
    """What a user would write: one subscription, results taken as they come, whatever their order.

    Tried with 3,000 tasks: `get` on each result and `join` go on for 1 to 2 s after the last publish,
    this mostly for less than 1 s. `group(...)` instead of a loop is no faster: publishing, one confirm
    after the other, takes nine tenths of the time.
    """
    ResultSet(results, app=app).join_native(timeout=seconds)


def measure(arguments: argparse.Namespace, multiplier: int) -> dict[str, float]:
    """Both figures with one prefetch multiplier, with a queue and a worker of its own."""
    queue = f"alluvium-bench-{uuid.uuid4().hex}"
    app = make_app(arguments.amqp, arguments.redis, queue, multiplier)
    ids: list[str] = []
    has_delays = delays_exist(app)
    try:
        with worker(arguments, queue, multiplier):
            wait(app, publish(app, WARM_UP_TASKS, ids), WARM_UP_SECONDS)
            began = time.perf_counter()
            results = publish(app, arguments.tasks, ids)
            published = time.perf_counter()
            wait(app, results, WAIT_SECONDS)
            ended = time.perf_counter()
            trips = [round_trip(app, ids) for _ in range(arguments.samples)]
    finally:
        clean(app, queue, has_delays, ids)
    return {
        "prefetch_multiplier": multiplier,
        "message_bytes": message_bytes(app),
        "seconds": round(ended - began, 3),
        "publish_seconds": round(published - began, 3),
        "tasks_per_second": round(arguments.tasks / (ended - began), 1),
        "idle_ms_median": round(statistics.median(trips), 3),
        "idle_ms_p99": round(statistics.quantiles(trips, n=100, method="inclusive")[98], 3),
    }


def round_trip(app: celery.Celery, ids: list[str]) -> float:
    """Milliseconds from before one publish to its result, with nothing else under way."""
    began = time.perf_counter()
    (result,) = publish(app, 1, ids)
    result.get(timeout=WAIT_SECONDS)
    return (time.perf_counter() - began) * 1000


def main() -> None:
    """Parses the command line and measures, or is the worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--amqp", required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--work", metavar="QUEUE", help=argparse.SUPPRESS)
    parser.add_argument("--multiplier", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    # Ended from outside, it still stops its worker and cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tried = [measure(arguments, multiplier) for multiplier in MULTIPLIERS]
    best = max(tried, key=lambda figures: figures["tasks_per_second"])
    head = {"tool": "celery", "version": celery.__version__, "tasks": arguments.tasks}
    print(json.dumps(head | best | {"samples": arguments.samples, "tried": tried}))


if __name__ == "__main__":
    main()
