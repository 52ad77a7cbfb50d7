"""What Prometheus is told: a format that its parser takes, bounded labels, true values."""

from __future__ import annotations

import re
import signal
import time
import urllib.request
from pathlib import Path

from prometheus_client.openmetrics import parser

from compose_files import ROOT, metric_names
from lake import Lake
from receivers import wait_for
from services import free_port


def metrics(port: int) -> dict[str, list]:
    """Sample name → samples, parsed strictly."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    found: dict[str, list] = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list], name: str, **labels: str) -> float | None:
    for sample in found.get(name, []):
        if labels.items() <= sample.labels.items():
            return sample.value
    return None


def test_the_page_of_metrics_names_them_all_and_no_others():
    page = (ROOT / "docs/metrics.md").read_text()
    told = set(re.findall(r"`(alluvium_\w+)`", page))
    served = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metric_names()}
    assert told == served


def test_run_shows_what_it_did(tmp_path: Path):
    port = free_port()
    lake = Lake(tmp_path).pipeline()
    text = (tmp_path / "alluvium.toml").read_text()
    text = text.replace("[worker]\n", f'[worker]\nlisten = "127.0.0.1:{port}"\n')
    (tmp_path / "alluvium.toml").write_text(text + '\n[run]\npoll = "200ms"\n')
    for epoch in range(1_700_000_000, 1_700_000_003):
        lake.deliver(epoch, [("a", 1, "U"), (None, 1, "U")])
    process = lake.start("run")
    try:
        done = wait_for(
            lambda: process.poll() is None
            and lake.states().get(1_700_000_002) == "processed"
            and value(metrics(port), "alluvium_epochs", pipeline="p", state="processed") == 3.0,
            "three epochs",
        )
        assert done
        found = metrics(port)
        assert value(found, "alluvium_epochs_processed_total", pipeline="p") == 3.0
        assert value(found, "alluvium_rows_written_total", pipeline="p", table="raw") == 3.0
        assert value(found, "alluvium_rows_written_total", pipeline="p", table="quarantine") == 3.0
        assert value(found, "alluvium_steps_total", step="ingest", status="done") == 3.0
        assert value(found, "alluvium_step_duration_seconds_count", step="ingest") == 3.0
        assert value(found, "alluvium_epoch_lag_seconds", pipeline="p") > 10_000_000
        assert value(found, "alluvium_table_version", pipeline="p", table="main") == lake.version("main")
        commit = lake.alluvium("--version").out.split("(")[1].strip(")\n")
        assert value(found, "alluvium_build_info", commit=commit) == 1.0
        assert value(found, "alluvium_epochs_discovered_total", pipeline="p") == 3.0
        assert value(found, "alluvium_delta_commit_attempts_count", step="ingest") == 3.0
        assert value(found, "alluvium_worker_up") == 1.0
        for samples in found.values():
            for sample in samples:
                # No epoch, run or path in a label.
                for name, label in sample.labels.items():
                    assert name == "commit" or not re.search(r"\d{6}|/", label), sample
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_cluster_processes_show_their_own(make):
    port = free_port()
    cluster = make("s3")
    cluster.configure()
    path = cluster.root / "alluvium.toml"
    path.write_text(path.read_text().replace("[worker]\n", f'[worker]\nlisten = "127.0.0.1:{port}"\n'))
    assert cluster.alluvium("health", "worker").code == 3
    cluster.coordinator()
    cluster.worker()
    cluster.deliver(1, [("a", 1, "U")])
    cluster.wait(lambda: cluster.states().get(1) == "processed")
    assert cluster.alluvium("health", "worker").code == 0
    assert cluster.alluvium("health", "coordinator").code == 0
    of_worker = metrics(port)
    assert value(of_worker, "alluvium_steps_total", step="merge", status="done") >= 1
    assert value(of_worker, "alluvium_queue_wait_seconds_count", step="ingest") >= 1
    assert value(of_worker, "alluvium_storage_requests_total", operation="get") > 0
    assert value(of_worker, "alluvium_bytes_written_total") > 0
    assert value(of_worker, "alluvium_bytes_read_total") > 0
    assert value(of_worker, "alluvium_worker_up") == 1.0
    assert abs(value(of_worker, "alluvium_worker_last_heartbeat_timestamp_seconds") - time.time()) < 10
    assert value(of_worker, "alluvium_delta_commit_attempts_sum", step="merge") >= 1
    assert value(of_worker, "alluvium_worker_memory_bytes") > 1_000_000
    assert value(of_worker, "alluvium_leading") is None
    wait_for(lambda: value(metrics(cluster.port), "alluvium_workers") == 1.0, "a worker is counted")
    of_coordinator = metrics(cluster.port)
    assert value(of_coordinator, "alluvium_leading") == 1.0
    assert value(of_coordinator, "alluvium_dlq_messages", queue="dead") == 0.0
    assert value(of_coordinator, "alluvium_queue_messages", queue="merge", state="ready") == 0.0
    assert value(of_coordinator, "alluvium_queue_messages", queue="merge", state="unacked") == 0.0
    assert value(of_coordinator, "alluvium_worker_up") is None
