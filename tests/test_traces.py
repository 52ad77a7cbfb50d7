"""Traces: one per run of an epoch, whole, also when its worker was killed; never in the way of work."""

from __future__ import annotations

import re
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from cluster import Cluster
from otlp_receiver import OtlpReceiver
from services import Services


@pytest.fixture
def receiver():
    with OtlpReceiver() as running:
        yield running


@pytest.fixture
def cluster(tmp_path: Path, services: Services, receiver: OtlpReceiver):
    made = Cluster(tmp_path, services, more=f'[telemetry]\notlp = "{receiver.endpoint}"')
    made.pipeline(more="merge = { batch_epochs = 1 }\noptimize = { enabled = false }")
    yield made
    made.stop()


def settle(cluster: Cluster, epochs: set[int]) -> None:
    """All epochs processed, all processes ended in order: nothing is left unsent."""
    cluster.wait_applied(epochs)
    cluster.wait(lambda: cluster.states() and set(cluster.states().values()) == {"processed"})
    for process in cluster.processes:
        if process.alive:
            assert process.terminate() == 0


def runs_of(receiver: OtlpReceiver, epochs: set[int]):
    """Epoch → its one trace, with the rules that every trace keeps."""
    runs = defaultdict(list)
    for trace_id, spans in receiver.traces().items():
        roots = [span for span in spans if not span.parent_id]
        if {root.name for root in roots} == {"process maintenance"}:
            # Cleanup belongs to no epoch.
            continue
        assert {root.name for root in roots} <= {"run p"}, spans
        for root in roots:
            runs[root.attributes["alluvium.epoch"]].append(trace_id)
        if roots:
            ids = {span.span_id for span in spans}
            orphans = [s.name for s in spans if s.parent_id and s.parent_id not in ids]
            assert not orphans, f"parents are missing of {orphans}"
            assert len({root.span_id for root in roots}) == 1
    assert set(runs) == epochs
    assert all(len(traces) == 1 for traces in runs.values())
    return {epoch: receiver.traces()[traces[0]] for epoch, traces in runs.items()}


def test_an_epochs_run_is_one_trace_from_discovery_to_commit(cluster, receiver):
    for epoch in (1, 2, 3):
        cluster.deliver(epoch, [(f"k{epoch}", epoch, "U")])
    cluster.worker()
    cluster.coordinator()
    settle(cluster, {1, 2, 3})
    for epoch, spans in runs_of(receiver, {1, 2, 3}).items():
        by_name = defaultdict(list)
        for span in spans:
            by_name[span.name].append(span)
        [root] = by_name["run p"]
        assert root.attributes["alluvium.pipeline"] == "p"
        assert root.attributes["alluvium.epoch"] == epoch
        [found] = by_name["epoch discovered"]
        assert found.parent_id == root.span_id
        for step in ("ingest", "merge"):
            [publish] = by_name[f"publish {step}"]
            [process] = by_name[f"process {step}"]
            assert (publish.kind, process.kind) == ("producer", "consumer")
            assert publish.parent_id == root.span_id
            assert process.parent_id == publish.span_id
            assert publish.span_id in {link[1] for link in process.links}
            assert process.attributes["alluvium.attempt"] == 1
            assert process.service == "alluvium-worker"
            assert publish.service == "alluvium-coordinator"
            children = {s.name for s in spans if s.parent_id == process.span_id}
            assert {"lease wait", "result", "delta.commit"} <= children, children
            waits = {s.name for s in spans if s.parent_id == publish.span_id}
            assert "queue wait" in waits
        first = min(span.start_ns for span in spans)
        assert all(span.start_ns <= span.end_ns for span in spans)
        assert root.start_ns - first < 2e9


def test_a_killed_worker_leaves_a_whole_trace_with_both_attempts(cluster, receiver):
    victim = cluster.worker("--slots", "1", env={"ALLUVIUM_CRASH": "ingest.after_write"})
    cluster.wait(lambda: "serves" in victim.text())
    cluster.coordinator()
    cluster.deliver(7, [("k", 7, "U")])
    assert victim.popen.wait(60) == -signal.SIGKILL
    cluster.worker()
    settle(cluster, {7})
    spans = runs_of(receiver, {7})[7]
    # The dead say nothing: the second delivery of the same message tells of the first.
    [process] = [s for s in spans if s.name == "process ingest"]
    assert "previous_attempt_lost" in [name for name, _ in process.events]


def test_a_retry_is_a_sibling_that_links_to_the_attempt_before(cluster, receiver):
    cluster.worker(env={"ALLUVIUM_FAIL": "ingest.after_read"})
    cluster.coordinator()
    cluster.deliver(5, [("k", 5, "U")])
    settle(cluster, {5})
    spans = runs_of(receiver, {5})[5]
    first, second = sorted((s for s in spans if s.name == "publish ingest"), key=lambda s: s.start_ns)
    assert first.parent_id == second.parent_id
    assert first.span_id in {link[1] for link in second.links}
    assert second.attributes["alluvium.attempt"] == 2
    assert second.attributes["alluvium.retry.reason"] == "AL-0401"
    failed = [s for s in spans if s.name == "process ingest" and s.status == "error"]
    assert [s.attributes["error.type"] for s in failed] == ["AL-0401"]


def test_a_collector_that_refuses_or_is_gone_holds_nothing_up(tmp_path, services, receiver):
    receiver.refuse(True)
    for number, endpoint in enumerate((receiver.endpoint, "http://127.0.0.1:9")):
        folder = tmp_path / str(number)
        folder.mkdir()
        cluster = Cluster(folder, services, more=f'[telemetry]\notlp = "{endpoint}"').pipeline()
        try:
            cluster.deliver(1, [("k", 1, "U")])
            worker = cluster.worker()
            cluster.coordinator()
            cluster.wait_applied({1}, seconds=20)
            assert worker.terminate(20) == 0
        finally:
            cluster.stop()


def test_log_lines_of_a_task_carry_the_trace_id(cluster, receiver):
    worker = cluster.worker("--log-format", "json", "--log", "debug", env={"ALLUVIUM_FAIL": "x"})
    cluster.coordinator()
    cluster.deliver(1, [("k", 1, "U")])
    settle(cluster, {1})
    trace_ids = set(receiver.traces())
    found = set(re.findall(r'"trace_id":"([0-9a-f]{32})"', worker.text()))
    assert found and found <= trace_ids


def test_pieces_of_a_large_epoch_are_in_its_trace_and_others_did_some(cluster, receiver):
    cluster.pipeline(more='shard_size = "1KiB"\noptimize = { enabled = false }')
    files = range(8)
    for file in files:
        rows = [(f"k{file}-{at}", at, "U") for at in range(300)]
        cluster.deliver(1, rows, file=f"part-{file}.parquet", complete=file == files[-1])
    for _ in range(3):
        worker = cluster.worker("--slots", "1")
        cluster.wait(lambda: "serves" in worker.text())
    cluster.coordinator()
    settle(cluster, {1})
    spans = runs_of(receiver, {1})[1]
    steps = {span.span_id: span for span in spans if span.name in ("process ingest", "process merge")}
    by_others = [span for span in spans if span.name == "process shard"]
    assert by_others and all(span.parent_id in steps for span in by_others)
    worked = {span.parent_id for span in spans if span.name in ("source.open", "delta.write")}
    instance = "service.instance.id"
    assert any(
        span.span_id in worked and span.resource[instance] != steps[span.parent_id].resource[instance]
        for span in by_others
    )
