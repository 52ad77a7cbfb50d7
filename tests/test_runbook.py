"""Every procedure of docs/runbook.md, followed to the letter: the trouble is made, the section's commands are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lake import BINARY, Lake
from services import find_command

RUNBOOK = Path(__file__).resolve().parent.parent / "docs/runbook.md"
SECTIONS = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)


def commands(title: str) -> str:
    """The section's command blocks, as they stand."""
    text = RUNBOOK.read_text().split(f"\n## {title}\n", 1)
    assert len(text) == 2, f"the runbook has no section {title!r}"
    body = text[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    assert blocks, f"{title!r} says nothing to type"
    return "\n".join(blocks)


def follow(title: str, root: Path, **variables: str) -> str:
    """Runs the section's commands where the configuration is; what they said."""
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    if not (tools / "alluvium").exists():
        (tools / "alluvium").symlink_to(shutil.which(BINARY) or Path(BINARY).resolve())
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
    env = clean | {"PATH": f"{tools}:/usr/sbin:{clean['PATH']}"} | variables
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(title)], cwd=root, env=env, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False,
    )
    assert done.returncode == 0, f"{title}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def two_epochs(lake: Lake) -> Lake:
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.deliver(20, [("a", 2, "U"), ("c", 2, "U")])
    lake.run()
    return lake


def test_every_section_is_followed_here():
    followed = set(re.findall(r'follow\(\s*"([^"]+)"', Path(__file__).read_text()))
    assert set(SECTIONS) == followed


def test_what_is_wrong(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    (lake.folder(10) / "part-0.parquet").write_bytes(b"PAR1 no")
    lake.run(code=1)
    said = follow("What is wrong?", lake.root)
    assert "AL-0301" in said and "blocked" in said


def test_a_blocked_pipeline(lake: Lake):
    lake.configure('[run]\nattempts = 1\n')
    raw = lake.root / "p"
    raw.write_text("in the way")
    lake.deliver(10, [("a", 1, "U")])
    assert lake.alluvium("run", "--once").code != 0
    raw.unlink()
    follow("A blocked pipeline", lake.root, PIPELINE="p", EPOCH="10")
    lake.run()
    assert lake.main() == {"a": 1} and lake.states() == {10: "processed"}


def test_a_bad_epoch(lake: Lake):
    two_epochs(lake)
    lake.deliver(15, [("b", 99, "U")])
    lake.run()
    assert lake.main()["b"] == 99
    follow("A bad epoch that is in main", lake.root, PIPELINE="p", EPOCH="15")
    assert lake.main() == {"a": 2, "b": 1, "c": 2} and lake.states()[15] == "skipped"


def test_rollback(lake: Lake):
    two_epochs(lake)
    lake.deliver(30, [("a", -1, "U")])
    lake.run()
    said = follow("Rollback", lake.root, PIPELINE="p", EPOCH="20")
    assert lake.main() == {"a": 2, "b": 1, "c": 2} and "restore" in said
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main()["a"] == -1


def test_the_ledger(lake: Lake):
    two_epochs(lake)
    shutil.rmtree(lake.root / "state")
    said = follow("The ledger was lost", lake.root, PIPELINE="p")
    assert "2 epoch(s) restored" in said and "processed" in said
    before = lake.version("main")
    lake.run()
    assert lake.version("main") == before


def test_a_full_disk(lake: Lake):
    small = lake.root / "p"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    assert subprocess.run(mount, check=False).returncode == 0, "run this as root: it mounts a tmpfs"
    try:
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        with (small / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(os.urandom(4096))
        lake.deliver(20, [(f"k{n}", n, "U") for n in range(5000)])
        lake.run(code=1, env={"ALLUVIUM_RUN__ATTEMPTS": "1"})
        (small / "filler").unlink()
        follow("A full disk", lake.root)
        assert len(lake.main()) == 5001
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_main_from_raw(lake: Lake):
    two_epochs(lake)
    lake.deliver(15, [("b", 9, "U")])
    lake.run()
    right = lake.main()
    data = next((lake.root / "p/main").glob("*.parquet"))
    data.write_bytes(b"rotten")
    follow("Rebuild main from raw", lake.root, PIPELINE="p", MAIN=str(lake.root / "p/main"))
    assert lake.main() == right


def busy(make):
    """A cluster with an epoch in main and another on its way."""
    cluster = make()
    cluster.deliver(1, [("a", 1, "U")])
    cluster.coordinator()
    cluster.worker()
    cluster.wait(lambda: cluster.applied() == {1})
    return cluster


def goes_on(cluster) -> None:
    cluster.deliver(2, [("a", 2, "U")])
    cluster.wait(lambda: cluster.applied() == {1, 2})


def test_redis(make):
    cluster = busy(make)
    cluster.services.redis.kill()
    cluster.services.redis.restart()
    follow("Redis was lost", cluster.root)
    goes_on(cluster)


def test_rabbitmq(make):
    cluster = busy(make)
    lanes = ["task.ingest", "task.merge", "task.maintenance", "results"]
    cluster.services.rabbitmq.delete_queues([f"{cluster.name}.v1.{lane}" for lane in lanes])
    follow("RabbitMQ was lost", cluster.root)
    goes_on(cluster)


def test_reset(make):
    cluster = busy(make)
    for process in cluster.processes:
        process.kill()
    cluster.deliver(2, [("a", 2, "U")])
    broker = {
        key: value for key, value in cluster.services.rabbitmq.env.items()
        if key.startswith(("RABBITMQ_", "ERL_")) or key == "HOME"
    }  # fmt: skip
    # The one that takes the environment at its word; Debian's changes the user.
    (cluster.root / "tools").mkdir()
    tool = cluster.root / "tools/rabbitmqctl"
    tool.write_text(f'#!/bin/sh\nexec {find_command("rabbitmqctl")} "$@"\n')
    tool.chmod(0o755)
    redis = cluster.services.redis
    said = follow("Reset of a cluster", cluster.root, CLUSTER=cluster.name, REDIS=redis.url, **broker)
    assert not list(redis.client().scan_iter(f"{{{cluster.name}}}:*"))
    depth = cluster.services.rabbitmq.queue_depth
    assert depth(f"{cluster.name}.v1.task.ingest") is None, said
    cluster.coordinator()
    cluster.worker()
    cluster.wait(lambda: cluster.applied() == {1, 2})
