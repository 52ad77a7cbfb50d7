"""The cluster as people meet it: verbs, workers that come and go, and what they are told when it is wrong."""

from __future__ import annotations

import time
from pathlib import Path

from cluster import Cluster, deliver_some
from lake import Lake
from services import Services


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
    assert {queue["queue"] for queue in queues} == {"ingest", "merge", "maintenance", "shard", "results", "dead"}


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


def test_the_api_refuses_epochs_that_nobody_knows(make):
    cluster = make()
    cluster.worker()
    cluster.coordinator()
    cluster.wait_applied(deliver_some(cluster, [1]))
    cluster.wait(lambda: cluster.states() == {1: "processed"})
    for verb, epoch in (("skip", -1), ("undo", 77), ("replay", None)):
        body = {"verb": verb, "pipeline": "p", "epoch": epoch, "by": "test"}
        assert cluster.post("/api/v1/requests", body)[0] >= 400
    assert cluster.states() == {1: "processed"}


def test_a_page_of_another_host_changes_nothing(make):
    cluster = make()
    coordinator = cluster.coordinator()
    cluster.wait(lambda: "leads" in coordinator.text())
    body = {"verb": "pause", "pipeline": "p", "epoch": None, "by": "test"}
    code, answer = cluster.post("/api/v1/requests", body, {"Origin": "http://evil.example"})
    assert code == 403 and "token" in answer


def test_verbs_do_not_talk_to_another_cluster(make, tmp_path: Path, services: Services):
    cluster = make()
    cluster.worker()
    cluster.coordinator()
    cluster.wait_applied(deliver_some(cluster, [1]))
    (tmp_path / "other").mkdir()
    other = Cluster(tmp_path / "other", services)
    other.port = cluster.port
    other.pipeline()
    status = other.alluvium("status")
    assert "serves another cluster" in status.err and "processed" not in status.out
    asked = other.alluvium("pause", "p")
    assert "serves another cluster" in asked.err
    assert cluster.alluvium("status", "-o", "json").json()[0]["health"] == "fresh"


def test_a_name_that_another_state_uses_is_refused(make, tmp_path: Path, services: Services):
    cluster = make()
    coordinator = cluster.coordinator()
    cluster.wait(lambda: "leads" in coordinator.text())
    (tmp_path / "other").mkdir()
    other = Cluster(tmp_path / "other", services)
    other.name = cluster.name
    other.pipeline()
    refused = other.alluvium("worker", "--exit-when-idle", "1")
    assert refused.code == 2 and "another configuration" in refused.err


def test_a_broker_that_refuses_is_named_at_once(make, services: Services):
    cluster = make()
    path = cluster.root / "alluvium.toml"
    path.write_text(path.read_text().replace("guest:guest", "guest:wrong"))
    worker = cluster.worker("--exit-when-idle", "3")
    assert worker.popen.wait(60) == 4
    assert "cannot reach RabbitMQ" in worker.text() and "AL-0501" in worker.text()
    assert cluster.coordinator("--once").popen.wait(60) == 4


def test_garbage_is_set_aside_and_work_goes_on(make, services: Services):
    cluster = make()
    cluster.worker()
    cluster.coordinator()
    cluster.wait_applied(deliver_some(cluster, [1]))
    with services.rabbitmq.connection() as connection:
        channel = connection.channel()
        for queue in ("task.ingest", "results"):
            channel.basic_publish("", f"{cluster.name}.v1.{queue}", b"\x00 garbage")
    cluster.wait(lambda: services.rabbitmq.queue_depth(f"{cluster.name}.v1.dead") == 2)
    cluster.wait_applied(deliver_some(cluster, [1, 2]))
    cluster.check()


def test_a_drained_worker_is_off_the_list(make):
    cluster = make()
    worker = cluster.worker()
    cluster.coordinator()
    names = lambda: {w["name"] for w in (cluster.api("/api/v1/workers") or {"items": []})["items"]}  # noqa: E731
    cluster.wait(lambda: worker.name in names())
    assert worker.terminate() == 0
    cluster.wait(lambda: worker.name not in names(), 3)


def test_a_missing_bucket_is_an_error_and_no_wait(make):
    cluster = make("s3")
    path = cluster.root / "embedded.toml"
    path.write_text(path.read_text().replace(cluster.bucket, "no-such-bucket"))
    began = time.monotonic()
    refused = cluster.alluvium("run", "--once", config="embedded.toml")
    assert refused.code == 4 and "no-such-bucket" in refused.err
    assert time.monotonic() - began < 30


def test_storage_options_can_be_set_for_some_locations_only(make):
    cluster = make("s3")
    epochs = deliver_some(cluster, [1, 2])
    path = cluster.root / "embedded.toml"
    by_prefix = f'[[storage]]\nprefix = "s3://{cluster.bucket}/"'
    elsewhere = '[[storage]]\nprefix = "s3://other/"\naws_endpoint_url = "http://127.0.0.1:9"\n'
    path.write_text(path.read_text().replace("[storage]", elsewhere + by_prefix))
    done = cluster.alluvium("run", "--once", config="embedded.toml")
    assert done.code == 0, done.err
    assert epochs == cluster.applied()
    cluster.check()
    shown = cluster.alluvium("config", "show", config="embedded.toml")
    assert "aws_region" in shown.out and '"test"' not in shown.out
