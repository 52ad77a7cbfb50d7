"""Metrics as an operator uses them: alerts and blocked epochs in a run, one leader, nothing stale."""

from __future__ import annotations

import signal
import urllib.request
from pathlib import Path

from prometheus_client.openmetrics import parser

from lake import Lake
from receivers import HttpReceiver, wait_for
from services import free_port

OF_LEADER = [
    "alluvium_leading", "alluvium_queue_messages", "alluvium_dlq_messages", "alluvium_workers",
    "alluvium_queue_oldest_message_age_seconds",
    "alluvium_epochs", "alluvium_table_version",
]  # fmt: skip


def scrape(port: int) -> dict[tuple, float]:
    """(name, labels) → value; the parser is strict about format and doubled samples."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.items()))] = sample.value
    return found


def value(port: int, name: str, **labels: str) -> float | None:
    try:
        return scrape(port).get((name, *sorted(labels.items())))
    except OSError:
        return None


def test_trouble_can_be_counted(tmp_path: Path):
    port = free_port()
    with HttpReceiver(answers=[500, 200]) as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(f'[run]\npoll = "200ms"\n[alert."a\\"b"]\ntype = "webhook"\nurl = "{receiver.url}"\n')
        path = tmp_path / "alluvium.toml"
        path.write_text(path.read_text().replace("[worker]\n", f'[worker]\nlisten = "127.0.0.1:{port}"\n'))
        lake.deliver(10, [("a", 1, "U")])
        (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
        process = lake.start("run")
        try:
            wait_for(lambda: value(port, "alluvium_alerts_open", kind="blocked") == 1, "open", 20)
            assert value(port, "alluvium_epochs", pipeline="p", state="blocked") == 1
            assert value(port, "alluvium_steps_total", pipeline="p", step="ingest", status="done") is None
            wait_for(lambda: value(port, "alluvium_alerts_sent_total", sink='a"b', result="sent"), "sent", 20)
            assert value(port, "alluvium_alerts_sent_total", sink='a"b', result="failed") == 1
            before = scrape(port)
            lake.deliver(10, [("a", 1, "U")])
            assert lake.alluvium("retry", "p", "10").code == 0
            wait_for(lambda: value(port, "alluvium_epochs", pipeline="p", state="processed") == 1, "merged", 20)
            wait_for(lambda: value(port, "alluvium_alerts_open", kind="blocked") == 0, "over", 20)
            after = scrape(port)
            falling = [key for key in before if key[0].endswith(("_total", "_count", "_sum", "_bucket"))
                       and after.get(key, 0) < before[key]]  # fmt: skip
            assert falling == []
            assert value(port, "alluvium_epochs", pipeline="p", state="blocked") == 0
            assert value(port, "alluvium_rows_written_total", pipeline="p", table="main") == 1
            assert value(port, "alluvium_steps_in_flight", step="merge") == 0
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def test_one_leader_and_nothing_stale_where_nobody_leads(make):
    cluster = make()
    cluster.deliver(1, [("a", 1, "U")])
    first = cluster.coordinator()
    cluster.worker()
    cluster.wait(lambda: cluster.states().get(1) == "processed")
    cluster.wait(lambda: value(cluster.port, "alluvium_workers") == 1)
    port = free_port()
    text = (cluster.root / "alluvium.toml").read_text()
    other = cluster.root / "second.toml"
    other.write_text(text.replace(f"127.0.0.1:{cluster.port}", f"127.0.0.1:{port}"))
    cluster.start("coordinator", "--config", str(other))
    cluster.wait(lambda: answers(port))
    assert not value(port, "alluvium_leading"), "it stands by"
    first.signal(signal.SIGSTOP)
    cluster.wait(lambda: value(port, "alluvium_leading") == 1, 40)
    first.signal(signal.SIGCONT)
    cluster.wait(lambda: not value(cluster.port, "alluvium_leading"), 40)
    left = {key[0] for key, found in scrape(cluster.port).items() if found}
    assert left.isdisjoint(OF_LEADER), "gauges of a coordinator that stands by"


def answers(port: int) -> bool:
    try:
        return bool(scrape(port))
    except OSError:
        return False


def test_tasks_that_nobody_takes_are_counted_and_grow_old(make):
    cluster = make()
    cluster.deliver(1, [("a", 1, "U")])
    cluster.coordinator()
    ready = {"queue": "ingest", "state": "ready"}
    cluster.wait(lambda: value(cluster.port, "alluvium_queue_messages", **ready) == 1)
    cluster.wait(lambda: (value(cluster.port, "alluvium_queue_oldest_message_age_seconds", queue="ingest") or 0) > 6)
    assert value(cluster.port, "alluvium_queue_oldest_message_age_seconds", queue="merge") == 0
    cluster.worker()
    cluster.wait(lambda: cluster.states().get(1) == "processed")
    cluster.wait(lambda: value(cluster.port, "alluvium_queue_messages", **ready) == 0)
    cluster.wait(lambda: value(cluster.port, "alluvium_queue_oldest_message_age_seconds", queue="ingest") == 0)


def test_what_is_made_again_is_counted_by_its_reason(tmp_path: Path):
    port = free_port()
    lake = Lake(tmp_path).pipeline()
    lake.configure('[run]\npoll = "200ms"\n')
    path = tmp_path / "alluvium.toml"
    path.write_text(path.read_text().replace("[worker]\n", f'[worker]\nlisten = "127.0.0.1:{port}"\n'))
    lake.deliver(10, [("a", 1, "U")])
    process = lake.start("run", env={"ALLUVIUM_FAIL": "merge.before_commit:1"})
    try:
        wait_for(lambda: value(port, "alluvium_epochs", pipeline="p", state="processed") == 1, "merged", 60)
        again = {key: found for key, found in scrape(port).items() if key[0] == "alluvium_step_retries_total"}
        ((name, reason, step),) = again
        assert step == ("step", "merge") and reason[0] == "reason" and reason[1].startswith("AL-")
        assert again[name, reason, step] == 1
        assert value(port, "alluvium_steps_total", pipeline="p", step="merge", status="transient") == 1
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
