"""The cluster does what embedded does: the same tables, whoever dies, whatever is lost."""

from __future__ import annotations

import secrets
import signal
import statistics
import time
from pathlib import Path

import pytest

import oracle
from cluster import Cluster
from lake import Lake
from s3_proxy import S3Proxy
from services import Services

EPOCHS = range(1, 9)


@pytest.fixture
def make(tmp_path: Path, services: Services):
    """Makes clusters, and ends their processes."""
    made: list[Cluster] = []

    def make_cluster(store: str = "disk", **more) -> Cluster:
        made.append(Cluster(tmp_path, services, store, **more).pipeline())
        return made[-1]

    yield make_cluster
    for cluster in made:
        cluster.stop()


def deliver_some(cluster: Cluster, epochs=EPOCHS, rows: int = 50, name: str = "p") -> set[int]:
    """Epochs whose keys overlap, with deletes among them."""
    for epoch in epochs:
        deliveries = []
        for at in range(rows):
            op = "D" if (epoch + at) % 7 == 0 else "U"
            deliveries.append((f"k{(epoch * 13 + at) % (rows * 2)}", epoch * 1000 + at, op))
        cluster.deliver(epoch, deliveries, name)
    return set(epochs)


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
             ("task.ingest", "task.merge", "task.maintenance", "results", "delay", "dead")]
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
        uploads = services.moto.client().list_multipart_uploads(Bucket=cluster.bucket)
        assert not uploads.get("Uploads")
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


# --- people -----------------------------------------------------------------------------------


def test_verbs_ask_the_coordinator(make):
    cluster = make()
    cluster.worker()
    cluster.coordinator()
    epochs = deliver_some(cluster, [1, 2, 3])
    cluster.wait_applied(epochs)
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    status = cluster.alluvium("status")
    assert status.code == 0 and "fresh" in status.out and "IN HAND" in status.out
    [worker] = [w for w in cluster.alluvium("workers", "-o", "json").json() if w["role"] == "worker"]
    assert worker["slots"] == 2 and worker["memory_bytes"] > 0
    assert cluster.alluvium("undo", "p", "3", "--yes").code == 0
    cluster.delivered["p"][3] = []
    cluster.wait(lambda: cluster.states().get(3) == "skipped")
    assert cluster.main() == cluster.expected()
    assert cluster.alluvium("pause", "p").code == 0
    assert cluster.alluvium("status", "-o", "json").json()[0]["health"] == "paused"
    deliver_some(cluster, [4])
    cluster.wait(lambda: cluster.states().get(4) == "ready")
    assert cluster.alluvium("resume", "p").code == 0
    cluster.wait_applied({1, 2, 4})
    acts = cluster.alluvium("audit", "list", "-o", "json").json()
    assert [act["verb"] for act in acts] == ["resume", "pause", "undo"]
    refused = cluster.alluvium("undo", "p", "77", "--yes")
    assert refused.code == 2 and "AL-0105" in refused.err


def test_without_a_coordinator_verbs_look_at_the_tables_and_keep_what_is_asked(make):
    cluster = make()
    epochs = deliver_some(cluster, [1, 2])
    cluster.worker()
    first = cluster.coordinator()
    cluster.wait_applied(epochs)
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    assert first.terminate() == 0
    status = cluster.alluvium("status")
    assert "looking at the tables" in status.err and "2 processed" in status.out
    asked = cluster.alluvium("undo", "p", "2", "--yes")
    assert asked.code == 0 and "next coordinator" in asked.err
    cluster.delivered["p"][2] = []
    cluster.coordinator()
    cluster.wait(lambda: cluster.states().get(2) == "skipped")
    assert cluster.main() == cluster.expected()


def test_changes_need_the_token(make):
    cluster = make()
    text = (cluster.root / "alluvium.toml").read_text()
    with_token = text.replace("[cluster]", '[cluster]\ntoken = "secret-word"')
    (cluster.root / "alluvium.toml").write_text(with_token)
    deliver_some(cluster, [1])
    cluster.worker()
    cluster.coordinator()
    cluster.wait_applied({1})
    cluster.wait(lambda: set(cluster.states().values()) == {"processed"})
    shown = cluster.alluvium("config", "show")
    assert "secret-word" not in shown.out and "guest:guest" not in shown.out
    assert cluster.alluvium("pause", "p").code == 0
    (cluster.root / "alluvium.toml").write_text(text)
    refused = cluster.alluvium("resume", "p")
    assert refused.code != 0 and "token" in refused.err


def test_run_refuses_a_configuration_of_a_cluster(make):
    cluster = make()
    refused = cluster.alluvium("run", "--once")
    assert refused.code == 2 and "alluvium coordinator" in refused.err


def test_a_worker_ends_when_there_is_nothing_to_do(make):
    cluster = make()
    epochs = deliver_some(cluster, [1, 2])
    cluster.coordinator()
    worker = cluster.worker("--exit-when-idle", "5")
    cluster.wait_applied(epochs)
    assert worker.popen.wait(60) == 0
    single = cluster.worker("--max-tasks", "1")
    deliver_some(cluster, [3])
    assert single.popen.wait(60) == 0


def test_steps_can_be_chosen(make):
    cluster = make()
    epochs = deliver_some(cluster, [1, 2])
    cluster.coordinator()
    cluster.worker("--steps", "ingest")
    cluster.wait(lambda: set(cluster.states().values()) & {"merging", "ingested"})
    cluster.worker("--steps", "merge,optimize,cleanup")
    cluster.wait_applied(epochs)
    cluster.check()


def test_coordinator_once_drains_and_ends(make):
    cluster = make()
    epochs = deliver_some(cluster)
    cluster.worker()
    once = cluster.coordinator("--once")
    assert once.popen.wait(120) == 0
    assert "merged" in once.text()
    assert epochs <= cluster.applied()
    cluster.check()


def test_the_api_says_whether_it_lives_and_is_ready(make):
    cluster = make()
    coordinator = cluster.coordinator()
    cluster.wait(lambda: cluster.api("/livez"))
    assert cluster.wait(lambda: cluster.api("/readyz")).strip() in ("leads", "stands by")
    cluster.wait(lambda: "leads" in coordinator.text())
    queues = cluster.api("/api/v1/queues")["items"]
    assert {queue["queue"] for queue in queues} == {"ingest", "merge", "maintenance", "results", "dead"}


# --- what can be wrong ------------------------------------------------------------------------


def test_doctor_says_what_is_wrong(make, services: Services):
    cluster = make("s3")
    deliver_some(cluster, [1])
    found = {item["what"]: item for item in cluster.alluvium("doctor", "-o", "json").json()}
    assert found["RabbitMQ"]["text"].startswith("3.10") or found["RabbitMQ"]["verdict"] == "ok"
    assert found["Redis"]["verdict"] == "ok"
    assert found["coordinator"]["verdict"] == "look"
    assert found[f"storage of s3://{cluster.bucket}/state"]["verdict"] == "ok"
    text = (cluster.root / "alluvium.toml").read_text()
    (cluster.root / "alluvium.toml").write_text(text.replace(services.redis.url, "redis://127.0.0.1:1/0"))
    broken = cluster.alluvium("doctor")
    assert broken.code == 4 and "AL-0506" not in broken.out and "BAD" in broken.out


def test_foreign_storage_is_refused_by_name(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    text = (tmp_path / "alluvium.toml").read_text()
    for uri in ("gs://bucket/raw", "abfss://c@a.dfs.core.windows.net/raw"):
        (tmp_path / "alluvium.toml").write_text(text.replace("./p/raw", uri))
        refused = lake.alluvium("config", "validate")
        assert refused.code == 2 and uri.split(":")[0] in refused.err


def test_unknown_storage_options_are_named(make):
    cluster = make("s3")
    text = (cluster.root / "alluvium.toml").read_text()
    (cluster.root / "alluvium.toml").write_text(text.replace("aws_region", "aws_regoin"))
    refused = cluster.alluvium("config", "validate")
    assert refused.code == 2 and "aws_regoin" in refused.err
