"""The cluster does what embedded does: the same tables, whoever dies, whatever is lost."""

from __future__ import annotations

import secrets
import signal
import statistics
import time
from pathlib import Path

import pytest

import oracle
from cluster import EPOCHS, Cluster, deliver_some
from s3_proxy import S3Proxy
from services import Services

# --- the same tables --------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_one_two_and_four_workers_make_the_tables_that_embedded_makes(
    make, tmp_path: Path, store: str
):
    tables = {}
    for workers in (0, 1, 2, 4):
        folder = tmp_path / f"{store}-{workers}"
        folder.mkdir()
        cluster = make(store)
        cluster.root = folder
        cluster.pipeline(more='merge = { batch_epochs = 3 }')
        epochs = deliver_some(cluster)
        if workers == 0:
            done = cluster.alluvium("run", "--once", config="embedded.toml")
            assert done.code == 0, done.err
        else:
            for _ in range(workers):
                cluster.worker()
            cluster.coordinator()
            cluster.wait_applied(epochs)
            cluster.stop()
        cluster.check()
        with cluster.reading():
            raw = oracle.read_table(cluster.place("p/raw"))
        for row in raw:
            del row["_ingested_at"]
        tables[workers] = (cluster.main(), sorted(map(repr, raw)))
    assert all(found == tables[0] for found in tables.values())


def test_many_pipelines_share_the_workers(make):
    cluster = make()
    for name in ("q", "r"):
        cluster.pipeline(name)
    for name in ("p", "q", "r"):
        deliver_some(cluster, name=name)
    cluster.worker()
    cluster.worker()
    cluster.coordinator()
    for name in ("p", "q", "r"):
        cluster.wait_applied(set(EPOCHS), name)
        cluster.check(name)


def test_a_late_epoch_is_reconciled(make):
    cluster = make()
    cluster.worker()
    cluster.coordinator()
    deliver_some(cluster, [2, 3])
    cluster.wait_applied({2, 3})
    deliver_some(cluster, [1])
    cluster.wait_applied({1, 2, 3})
    cluster.check()


# --- the dead ---------------------------------------------------------------------------------

# One point within each step, and around what the worker says to others.
WORKER_POINTS = [
    "task.after_claim", "ingest.after_read", "ingest.after_write", "ingest.before_commit",
    "ingest.after_commit", "merge.after_plan", "merge.after_write", "merge.before_commit",
    "merge.after_commit", "optimize.after_write", "optimize.before_commit", "optimize.after_commit",
    "cleanup.before_delete", "result.before_publish", "result.after_publish", "task.after_ack",
]  # fmt: skip


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_a_worker_killed_within_a_step_costs_nothing(make, point: str):
    cluster = make()
    cluster.pipeline(more="optimize = { small_files = 2 }\nmerge = { batch_epochs = 1 }")
    # Keys of their own: each merge adds a file, and optimize has something to do.
    for epoch in EPOCHS:
        cluster.deliver(epoch, [(f"k{epoch}-{at}", at, "U") for at in range(50)])
    epochs = set(EPOCHS)
    victim = cluster.worker(env={"ALLUVIUM_CRASH": point})
    cluster.coordinator()
    cluster.wait(lambda: not victim.alive or epochs <= cluster.applied())
    cluster.worker()
    if point.startswith(("optimize", "cleanup")):
        cluster.wait(lambda: not victim.alive)
    cluster.wait_applied(epochs)
    assert victim.popen.wait(30) == -signal.SIGKILL
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    cluster.check()


COORDINATOR_POINTS = [
    "manifest.before_store", "manifest.after_store", "task.before_publish", "task.after_publish",
    "ledger.before_commit", "ledger.after_commit", "result.before_ack",
]  # fmt: skip


@pytest.mark.parametrize("point", COORDINATOR_POINTS)
def test_a_coordinator_killed_anywhere_costs_nothing(make, point: str):
    cluster = make()
    epochs = deliver_some(cluster)
    cluster.worker()
    victim = cluster.coordinator(env={"ALLUVIUM_CRASH": f"{point}:2"})
    assert victim.popen.wait(60) == -signal.SIGKILL
    cluster.coordinator()
    cluster.wait_applied(epochs)
    cluster.check()


def test_a_killed_workers_task_runs_elsewhere_at_once(make):
    """Median below 2 s over 20 kills: the broker sees the connection end, the lease falls over."""
    cluster = make()
    cluster.coordinator()
    cluster.worker("--slots", "1")
    times = []
    for epoch in range(1, 31):
        if len(times) == 20:
            break
        # Claims a task, and holds it at a safe point until it is killed.
        victim = cluster.worker("--slots", "1", env={"ALLUVIUM_CRASH": "ingest.after_read"})
        cluster.wait(lambda: "serves" in victim.text())
        # Two tasks for two workers of one slot: one for each.
        pair = {2 * epoch, 2 * epoch + 1}
        for one in pair:
            cluster.deliver(one, [(f"k{one}", one, "U")])
        cluster.wait(lambda: not victim.alive or pair <= cluster.applied())
        if victim.alive:
            # The other worker was faster, twice.
            victim.kill()
            continue
        began = time.monotonic()
        cluster.wait(lambda: pair <= cluster.ingested())
        times.append(time.monotonic() - began)
    cluster.wait_applied(set(cluster.delivered["p"]))
    cluster.check()
    assert len(times) >= 20
    print(f"{len(times)} kills, median {statistics.median(times):.2f} s, most {max(times):.2f} s")
    assert statistics.median(times) < 2.0


def test_a_second_coordinator_takes_over(make):
    cluster = make()
    cluster.worker()
    first = cluster.coordinator()
    cluster.wait(lambda: "leads" in first.text())
    deliver_some(cluster, [1, 2])
    cluster.wait_applied({1, 2})
    second = cluster.coordinator()
    cluster.wait(lambda: "stands by" in second.text())
    first.kill()
    began = time.monotonic()
    cluster.wait(lambda: f"{second.name} leads" in second.text(), 15)
    print(f"took over after {time.monotonic() - began:.1f} s")
    deliver_some(cluster, [3, 4])
    cluster.wait_applied({1, 2, 3, 4})
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    cluster.check()


def test_a_worker_that_was_stopped_longer_than_its_lease_does_no_harm(make):
    cluster = make()
    epochs = deliver_some(cluster, rows=20000)
    sleeper = cluster.worker("--slots", "2")
    cluster.coordinator()
    cluster.wait(lambda: cluster.states() and "ingesting" in cluster.states().values())
    sleeper.signal(signal.SIGSTOP)
    cluster.worker()
    time_to_expire = time.monotonic() + 20
    cluster.wait(lambda: time.monotonic() > time_to_expire, 60)
    sleeper.signal(signal.SIGCONT)
    cluster.wait_applied(epochs)
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    cluster.check()


# --- the lost ---------------------------------------------------------------------------------


def run_while(cluster: Cluster, disturb) -> None:
    """Work comes in before, during and after a disturbance; nobody types anything."""
    first = deliver_some(cluster, range(1, 5), rows=2000)
    cluster.worker()
    cluster.worker()
    cluster.coordinator()
    cluster.wait(lambda: cluster.applied())
    deliver_some(cluster, range(5, 9), rows=2000)
    disturb()
    more = deliver_some(cluster, range(9, 13), rows=2000)
    cluster.wait_applied(first | set(range(5, 9)) | more, seconds=180)
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"}, 180)
    cluster.check()
    assert all(process.alive for process in cluster.processes)


def test_rabbitmq_killed_and_started_again(make, tmp_path: Path):
    own = Services()
    try:
        cluster = Cluster(tmp_path, own).pipeline()
        try:
            run_while(cluster, lambda: (own.rabbitmq.kill(), own.rabbitmq.start()))
        finally:
            cluster.stop()
    finally:
        own.stop()


def test_an_alarm_of_the_broker_only_delays(make, services: Services):
    def alarm() -> None:
        services.rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        try:
            until = time.monotonic() + 8
            cluster.wait(lambda: time.monotonic() > until)
        finally:
            services.rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")

    cluster = make()
    run_while(cluster, alarm)


def test_all_connections_closed_by_the_broker(make, services: Services):
    run_while(make(), lambda: services.rabbitmq.ctl("close_all_connections", "test"))


def test_queues_deleted_beneath_everybody(make, services: Services):
    cluster = make()
    names = [f"{cluster.name}.v1.{queue}" for queue in
             ("task.ingest", "task.merge", "task.maintenance", "task.shard", "results", "delay", "dead")]
    run_while(cluster, lambda: services.rabbitmq.delete_queues(names))


def test_redis_emptied(make, services: Services):
    run_while(make(), lambda: services.redis.flush())


def test_redis_killed_and_started_again(make, tmp_path: Path):
    own = Services()
    try:
        cluster = Cluster(tmp_path, own).pipeline()
        try:
            run_while(cluster, lambda: (own.redis.kill(), own.redis.start()))
        finally:
            cluster.stop()
    finally:
        own.stop()


def test_s3_refusing_for_twenty_seconds(make, services: Services):
    services.moto.start()
    proxy = S3Proxy(services.moto.url).start()
    try:
        cluster = make("s3", endpoint=proxy.url)

        def refuse() -> None:
            proxy.set(refuse=True)
            until = time.monotonic() + 20
            cluster.wait(lambda: time.monotonic() > until)
            proxy.set(refuse=False)

        run_while(cluster, refuse)
    finally:
        proxy.stop()


def test_a_commit_whose_reply_is_lost_lands_once(make, services: Services):
    services.moto.start()
    proxy = S3Proxy(services.moto.url).start()
    try:
        cluster = make("s3", endpoint=proxy.url)
        proxy.drop_reply("PUT", "_delta_log/", 6)
        epochs = deliver_some(cluster)
        cluster.worker()
        cluster.coordinator()
        cluster.wait_applied(epochs)
        cluster.check()
    finally:
        proxy.stop()


def test_no_parts_of_an_upload_stay_behind(make, services: Services):
    """A data file goes up in parts of 5 MiB; the second part is refused for good."""
    services.moto.start()
    proxy = S3Proxy(services.moto.url).start()
    try:
        cluster = make("s3", endpoint=proxy.url)
        # Nothing to compress: 16 MiB of keys.
        rows = [(secrets.token_hex(32), at, "U") for at in range(500_000)]
        cluster.deliver(1, rows)
        proxy.fail_once(400, "PUT", "partNumber=2", count=1000)
        cluster.worker()
        cluster.coordinator()
        cluster.wait(lambda: cluster.states().get(1) == "blocked")
        # It is aborted beside the result.
        uploads = services.moto.client().list_multipart_uploads
        cluster.wait(lambda: not uploads(Bucket=cluster.bucket).get("Uploads"))
        proxy.clear()
        assert cluster.alluvium("retry", "p", "1").code == 0
        cluster.wait_applied({1})
        cluster.check()
    finally:
        proxy.stop()


def test_a_rolling_restart_loses_nothing_and_counts_no_attempt(make):
    cluster = make()
    cluster.coordinator()
    workers = [cluster.worker(), cluster.worker()]
    everything = set()
    for wave in range(4):
        everything |= deliver_some(cluster, range(wave * 5 + 1, wave * 5 + 6), rows=5000)
        cluster.wait(lambda: len(cluster.applied()) > wave * 5 - 4)
        oldest = workers.pop(0)
        workers.append(cluster.worker())
        # On a busy machine the other one may have done it all: one that has not begun drains nothing.
        cluster.wait(lambda: "serves" in oldest.text())
        assert oldest.terminate(60) == 0
        assert "drained" in oldest.text()
    cluster.wait_applied(everything)
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    cluster.check()
    runs = cluster.alluvium("runs", "p", "--limit", "1000", "-o", "json").json()
    assert {run["attempt"] for run in runs} == {1}
    assert {run["verdict"] for run in runs} <= {"done", "gave_back"}


def test_a_task_that_kills_its_workers_is_parked_and_the_rest_goes_on(make):
    cluster = make()
    cluster.pipeline("q")
    deliver_some(cluster, [1])
    cluster.coordinator()
    for _ in range(3):
        victim = cluster.worker("--slots", "1", env={"ALLUVIUM_CRASH": "ingest.after_read"})
        assert victim.popen.wait(60) == -signal.SIGKILL
    cluster.worker()
    cluster.wait(lambda: cluster.states().get(1) == "parked")
    deliver_some(cluster, [1, 2], name="q")
    cluster.wait_applied({1, 2}, "q")
    assert cluster.alluvium("retry", "p", "1").code == 0
    cluster.wait_applied({1})
    cluster.check()
