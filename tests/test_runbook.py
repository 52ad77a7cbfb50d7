"""Every procedure of docs/runbook.md, followed to the letter: the trouble is made with the real binary,
the section's commands are run as they stand, and other readers look at the tables.

Owns: taking commands out of the document, making each trouble. Never: adds a command that the section
does not name; what a section leaves to people (repair, start) is done here where it says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deltalake
import pika
import pyarrow as pa
import pytest

import oracle
from cluster import Cluster
from lake import BINARY, Lake
from services import find_command

RUNBOOK = Path(__file__).resolve().parent.parent / "docs/runbook.md"
HEADING = re.compile(r"^###? (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_ALERTS = '[alert.log]\ntype = "log"\n'

# --- taking commands out of the document -------------------------------------------------------


def sections() -> dict[str, str]:
    """Heading (of level two or three) → what stands below it, up to the next one."""
    _, *parts = HEADING.split(RUNBOOK.read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(title: str) -> str:
    """The section's command blocks, as they stand."""
    assert title in sections(), f"the runbook has no section {title!r}"
    blocks = BLOCK.findall(sections()[title])
    assert blocks, f"{title!r} says nothing to type"
    return "".join(blocks)


def tools_of(root: Path) -> Path:
    """A folder that is first on PATH, with `alluvium` in it."""
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    if not (tools / "alluvium").exists():
        (tools / "alluvium").symlink_to(Path(shutil.which(BINARY) or BINARY).resolve())
    return tools


def follow(title: str, root: Path, **variables: str) -> str:
    """Runs the section's commands where the configuration is; what they said."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
    env = clean | {"PATH": f"{tools_of(root)}:{clean['PATH']}:/usr/sbin"} | variables
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(title)], cwd=root, env=env, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=100, check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{title}: exit {done.returncode}\n{said}"
    return said


# --- the document itself -----------------------------------------------------------------------


def test_every_section_is_followed_here():
    followed = set(re.findall(r'follow\(\s*"([^"]+)"', Path(__file__).read_text()))
    assert set(sections()) == followed


def test_sections_say_what_is_to_be_set():
    for title, body in sections().items():
        code = commands(title)
        inside = set(re.findall(r"^([A-Z_]+)=", code, re.MULTILINE))
        prose = BLOCK.sub("", body)
        for name in set(re.findall(r"\$\{?([A-Z_]+)", code)) - inside:
            assert f"`{name}`" in prose, f"{title!r} does not say how to set {name}"


def test_every_verb_and_flag_of_the_document_is_there(tmp_path: Path):
    text = RUNBOOK.read_text()
    typed = re.findall(r"\balluvium ((?:[a-z-]+ ?){1,2})([^`\n]*)", "\n".join(
        re.findall(r"`(alluvium [^`]+)`", BLOCK.sub("", text)) + BLOCK.findall(text)
    ))  # fmt: skip
    assert len(typed) > 30
    for words, rest in typed:
        verbs = [word for word in words.split() if not word.startswith("-")]
        rest = " ".join([*words.split()[len(verbs):], rest])
        done = subprocess.run(
            [BINARY, *verbs, "--help"], cwd=tmp_path, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"alluvium {' '.join(verbs)}: {done.stderr}"
        for flag in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert flag in done.stdout, f"alluvium {' '.join(verbs)} has no {flag}"


def test_links_lead_to_sections():
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in sections()}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK.read_text())) <= anchors


# --- one process -------------------------------------------------------------------------------


def kinds_of_alerts(lake: Lake) -> set[str]:
    return {item["kind"] for item in lake.alluvium("alerts", "list", "-o", "json").json()}


def healthy(lake: Lake) -> bool:
    status = lake.alluvium("status")
    return status.code == 0 and "fresh" in status.out


def check(lake: Lake) -> None:
    """Main is the fold of the source's folders, computed from them by the oracle."""
    place = lake.root / "p"
    code = oracle.main([
        "check", "--source", str(lake.root / "in_p"), "--main", str(place / "main"),
        "--raw", str(place / "raw"), "--pipeline", "p", "--key", "id", "--delete-when-op",
    ])
    assert code == 0, "the oracle disagrees"


def blocked(lake: Lake) -> Lake:
    """Epoch 20 is damaged, 30 waits for it."""
    lake.configure(WITH_ALERTS)
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.deliver(20, [("a", 20, "U")])
    (lake.folder(20) / "part-0.parquet").write_bytes(b"PAR1 no")
    lake.deliver(30, [("b", 30, "U")])
    lake.run(code=1)
    status = lake.alluvium("status")
    assert status.code == 3 and "blocked" in status.out and "epoch 20" in status.err
    assert kinds_of_alerts(lake) == {"blocked"}
    assert lake.main() == {"a": 10, "b": 10}
    return lake


def test_what_is_wrong(lake: Lake):
    said = follow("What is wrong?", blocked(lake).root)
    assert "AL-0301" in said and "critical" in said and "later epochs merge after it" in said
    # All of it is said, also when no table can be read.
    (lake.root / "p/main/_delta_log/00000000000000000001.json").write_text("rotten")
    said = follow("What is wrong?", lake.root)
    assert "broken" in said and re.search(r"BAD +main of p", said)


def test_a_blocked_pipeline(lake: Lake):
    blocked(lake).deliver(20, [("a", 20, "U"), ("c", 20, "U")])
    said = follow("A blocked pipeline", lake.root, PIPELINE="p", EPOCH="20")
    assert "AL-0301" in said, "what was tried before is told"
    assert lake.main() == {"a": 20, "b": 30, "c": 20}
    assert set(lake.states().values()) == {"processed"} and healthy(lake)
    check(lake)
    lake.run()
    assert kinds_of_alerts(lake) == set(), "and the recovery is told"


def test_an_epoch_that_cannot_be_repaired_until_it_is(lake: Lake):
    follow("The epoch cannot be repaired", blocked(lake).root, PIPELINE="p", EPOCH="20")
    assert lake.main() == {"a": 10, "b": 30}
    assert lake.states() == {10: "processed", 20: "skipped", 30: "processed"} and healthy(lake)
    lake.deliver(20, [("a", 20, "U"), ("b", 20, "U")])
    lake.run()
    assert lake.main() == {"a": 10, "b": 30}, "not by itself"
    follow("It was delivered again", lake.root, PIPELINE="p", EPOCH="20")
    assert lake.main() == {"a": 20, "b": 30}
    check(lake)


def test_a_bad_epoch(lake: Lake):
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.deliver(20, [("b", -1, "U"), ("x", -1, "U"), ("a", 0, "D")])
    lake.deliver(30, [("c", 30, "U")])
    lake.run()
    assert lake.main() == {"b": -1, "c": 30, "x": -1}
    said = follow("A bad epoch that is in main", lake.root, PIPELINE="p", EPOCH="20")
    assert "skipped" in said and "-1" in said
    assert lake.main() == {"a": 10, "b": 10, "c": 30} and healthy(lake)
    lake.deliver(20, [("b", 20, "U"), ("c", 20, "U")])
    follow("It was delivered again", lake.root, PIPELINE="p", EPOCH="20")
    assert lake.main() == {"a": 10, "b": 20, "c": 30}, "epoch 30 keeps its word of c"
    assert set(lake.states().values()) == {"processed"}
    check(lake)


def test_rollback_and_on(lake: Lake):
    for epoch, value in ((10, 10), (20, 20), (30, -1), (40, 40)):
        lake.deliver(epoch, [("a", value, "U"), (f"k{epoch}", value, "U")])
        lake.run()
    said = follow("Rollback", lake.root, PIPELINE="p", EPOCH="20")
    assert "30, 40" in said and "nothing was changed" in said and "paused" in said
    right = {"a": 20, "k10": 10, "k20": 20}
    assert lake.main() == right
    lake.deliver(50, [("k50", 50, "U")])
    lake.run()
    assert lake.main() == right and lake.states()[50] == "ready", "it stays there"
    follow("Go on after a rollback", lake.root, PIPELINE="p", BAD="30")
    assert lake.main() == {"a": 40, "k10": 10, "k20": 20, "k40": 40, "k50": 50} and healthy(lake)
    expected = {epoch: "skipped" if epoch == 30 else "processed" for epoch in range(10, 60, 10)}
    assert lake.states() == expected


def test_a_point_and_back_to_it(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    said = follow("A point before a risky change", lake.root, PIPELINE="p", POINT="before-change")
    version = re.search(r"alluvium rollback p --to-version (\d+)", said)[1]
    assert re.search(rf"before-change +{version} +all 1 there", said)
    lake.deliver(20, [("a", -1, "U")])
    lake.run()
    assert lake.main() == {"a": -1}
    assert lake.alluvium("rollback", "p", "--to-version", version, "--yes").code == 0
    assert lake.main() == {"a": 10}
    follow("Go on after a rollback", lake.root, PIPELINE="p", BAD="20")
    assert lake.main() == {"a": 10}
    assert lake.alluvium("rollback-point", "remove", "p", "before-change").code == 0


@pytest.mark.parametrize("lost", ["state", "state/ledger", "damaged"])
def test_the_ledger(lake: Lake, lost: str):
    lake.deliver(10, [("a", 10, "U")])
    lake.deliver(20, [("a", -1, "U")])
    lake.deliver(30, [("c", 30, "U")])
    lake.run()
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    assert lake.alluvium("pause", "p").code == 0
    table = lake.root / "state/ledger/processed_folders"
    if lost == "damaged":
        for entry in (table / "_delta_log").glob("*.json"):
            entry.write_text("rotten")
        assert "AL-0405" in lake.alluvium("ledger", "rebuild").err
    else:
        shutil.rmtree(lake.root / lost)
    before, main = lake.version("main"), lake.main()
    damaged = str(table) if lost == "damaged" else ""
    said = follow("The ledger was lost", lake.root, PIPELINE="p", DAMAGED=damaged)
    assert "3 epoch(s) restored" in said and re.search(r"30 +processed +1 +20\d\d-", said)
    assert "paused" in said, "a pause stands in main"
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.main() == main == {"a": 10, "c": 30} and lake.version("main") == before + 1
    assert lake.states() == {10: "processed", 20: "skipped", 30: "processed"}
    rows = lake.alluvium("query", "p", "SELECT epoch FROM processed_folders", "-o", "json").json()
    assert sorted(row["epoch"] for row in rows) == [10, 20, 30]


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    assert subprocess.run(mount, check=False).returncode == 0, "run this as root: it mounts a tmpfs"
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize(("full", "alert"), [("p", "blocked"), ("state", "broken")])
def test_a_full_disk(lake: Lake, full: str, alert: str):
    """The disk of the tables, and the disk of the state folder."""
    lake.configure(WITH_ALERTS)
    with small_disk(lake.root / full):
        lake.deliver(10, [("a", 10, "U")])
        lake.run()
        filler = lake.root / full / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(os.urandom(4096))
        lake.deliver(20, [(f"k{n}", n, "U") for n in range(5000)])
        told = lake.run(code=1, env={"ALLUVIUM_RUN__ATTEMPTS": "1"}).err
        assert "AL-0403" in told and f'alert="{alert}"' in told, told
        doctor = lake.alluvium("doctor")
        assert ("BAD  storage" in doctor.out) == (full == "state"), doctor.out
        status = lake.alluvium("status").out
        assert ("blocked" if full == "p" else "behind") in status, status
        assert lake.main() == {"a": 10}, "readers go on"
        filler.unlink()
        said = follow("A full disk", lake.root, DISK=str(lake.root / full))
        assert "tmpfs" in said and healthy(lake)
        assert len(lake.main()) == 5001 and set(lake.states().values()) == {"processed"}
        check(lake)


def with_a_history(lake: Lake) -> dict[str, int]:
    """Late, undone, skipped and deleted; main as it must be."""
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.deliver(20, [("a", 20, "U"), ("c", 20, "U")])
    lake.deliver(30, [("c", 30, "D"), ("d", 30, "U"), ("a", 31, "U")])
    lake.deliver(40, [("d", -1, "U")])
    lake.run()
    lake.deliver(15, [("b", 15, "U"), ("a", 15, "U")])
    lake.run()
    assert lake.alluvium("undo", "p", "30", "--yes").code == 0
    assert lake.alluvium("skip", "p", "40", "--yes").code == 0
    assert lake.main() == {"a": 20, "b": 15, "c": 20}
    return lake.main()


def differences(said: str) -> list[int]:
    """The three answers of `Is main what raw says?`."""
    found = re.findall(r"^\| (missing|wrong|doubled) *\|\n\+-+\+\n\| (-?\d+) *\|", said, re.MULTILINE)
    assert [name for name, _ in found] == ["missing", "wrong", "doubled"], said
    return [int(number) for _, number in found]


@pytest.mark.parametrize("damage", ["data", "log", "foreign", "gone"])
def test_main_from_raw(lake: Lake, damage: str):
    lake.configure(WITH_ALERTS)
    right = with_a_history(lake)
    states = lake.states()
    main = lake.root / "p/main"
    ask = {"PIPELINE": "p", "KEY": "id", "SEQUENCE": ""}
    assert differences(follow("Is main what raw says?", lake.root, **ask)) == [0, 0, 0]
    if damage == "data":
        for path in main.glob("*.parquet"):
            path.write_bytes(b"rotten")
        lake.deliver(50, [("a", 50, "U")])
        assert "AL-0301" in lake.run(code=1).err
        right, states = right | {"a": 50}, states | {50: "processed"}
    elif damage == "log":
        sorted((main / "_delta_log").glob("*.json"))[-1].write_text("rotten")
        assert "AL-0405" in lake.run(code=1).err
        assert "broken" in lake.alluvium("status").out and kinds_of_alerts(lake) == {"broken"}
    elif damage == "foreign":
        rows = {"id": ["zz", "a"], "value": pa.array([1, 1], pa.int64()), "op": ["U", "U"]}
        deltalake.write_deltalake(str(main), pa.table(rows), mode="append")
        assert "is not ours" in lake.alluvium("doctor").out
        assert differences(follow("Is main what raw says?", lake.root, **ask)) == [0, 2, 2]
    else:
        # Raw is all that is left: the producer cleared its folders, too.
        for epoch in states:
            shutil.rmtree(lake.folder(epoch))
        shutil.rmtree(lake.root / "state")
    follow("Rebuild main from raw", lake.root, PIPELINE="p", MAIN=str(main))
    assert lake.main() == right and lake.states() == states and healthy(lake)
    assert (lake.root / "p/main.damaged").exists()
    assert differences(follow("Is main what raw says?", lake.root, **ask)) == [0, 0, 0]


def test_what_raw_says_knows_the_sequence(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='sequence_by = "value"')
    lake.deliver(10, [("a", 5, "U"), ("a", 3, "U"), ("b", 4, "D"), ("b", 9, "U"), ("b", 7, "D")])
    lake.deliver(20, [("c", 2, "U"), ("c", 1, "D"), ("d", None, "U"), ("d", 0, "U")])
    lake.run()
    assert lake.main() == {"a": 5, "b": 9, "c": 2, "d": 0}
    ask = {"PIPELINE": "p", "KEY": "id"}
    said = follow("Is main what raw says?", tmp_path, SEQUENCE="value", **ask)
    assert differences(said) == [0, 0, 0]
    said = follow("Is main what raw says?", tmp_path, SEQUENCE="", **ask)
    assert differences(said) != [0, 0, 0], "the order counts: else this proves nothing"


# --- a cluster ---------------------------------------------------------------------------------


def busy(make) -> Cluster:
    """A cluster with an epoch in main."""
    cluster = make()
    cluster.deliver(1, [("a", 1, "U"), ("b", 1, "U")])
    cluster.coordinator()
    cluster.worker()
    cluster.wait_applied({1})
    return cluster


def goes_on(cluster: Cluster, epoch: int, seconds: float = 100) -> None:
    cluster.deliver(epoch, [("a", epoch, "U"), (f"k{epoch}", epoch, "U")])
    cluster.wait_applied({epoch}, seconds=seconds)
    cluster.check()


def test_redis(make):
    cluster = busy(make)
    redis = cluster.services.redis
    redis.kill()
    goes_on(cluster, 2)
    doctor = cluster.alluvium("doctor")
    assert doctor.code == 4 and "BAD   Redis" in doctor.out
    assert "AL-0506" in cluster.processes[1].text()
    redis.start()
    said = follow("Redis was lost", cluster.root, REDIS=redis.url)
    assert "PONG" in said and all(process.name in said for process in cluster.processes), said
    assert re.search(r"ok +workers +1 alive", said), said
    goes_on(cluster, 3)


def test_rabbitmq_with_its_data(make):
    cluster = busy(make)
    rabbitmq = cluster.services.rabbitmq
    rabbitmq.kill()
    shutil.rmtree(rabbitmq.folder / "data")
    cluster.deliver(2, [("a", 2, "U"), ("c", 2, "U")])
    doctor = cluster.alluvium("doctor")
    assert doctor.code == 4 and "BAD   RabbitMQ" in doctor.out
    cluster.wait(lambda: "cannot reach RabbitMQ" in cluster.processes[0].text())
    assert cluster.applied() == {1}
    rabbitmq.start()
    said = follow("RabbitMQ was lost", cluster.root, PIPELINE="p")
    assert re.search(r"ok +queues", said), said
    cluster.wait_applied({1, 2})
    cluster.check()


def test_queues_deleted_with_a_task_in_them(make):
    cluster = busy(make)
    # Nobody takes the task: it is in the queue when that is deleted.
    cluster.processes[1].terminate()
    cluster.deliver(2, [("a", 2, "U"), ("c", 2, "U")])
    queue = f"{cluster.name}.v1.task.ingest"
    cluster.wait(lambda: cluster.services.rabbitmq.queue_depth(queue))
    lanes = ["task.ingest", "task.merge", "task.maintenance", "task.shard", "results", "delay", "dead"]
    cluster.services.rabbitmq.delete_queues([f"{cluster.name}.v1.{lane}" for lane in lanes])
    cluster.worker()
    assert cluster.states()[2] == "ingesting" and cluster.applied() == {1}
    follow("RabbitMQ was lost", cluster.root, PIPELINE="p")
    cluster.wait_applied({1, 2}, seconds=100)
    cluster.check()


def strewn(cluster: Cluster) -> None:
    """Messages nobody understands, leases of the dead; and another cluster on the same servers."""
    with cluster.services.rabbitmq.connection() as connection:
        channel = connection.channel()
        for name in ("task.ingest", "task.merge", "dead"):
            channel.basic_publish("", f"{cluster.name}.v1.{name}", b"what is this?")
        channel.queue_declare(f"{cluster.name}x.v1.results", durable=True)
        channel.basic_publish("", f"{cluster.name}x.v1.results", b"theirs", pika.BasicProperties())
    client = cluster.services.redis.client()
    client.hset(f"{{{cluster.name}}}:lease:of-the-dead", mapping={"owner": "ghost", "fence": "9"})
    client.set(f"{{{cluster.name}x}}:state:uri", "theirs")


def test_reset(make):
    cluster = busy(make)
    for process in cluster.processes:
        process.kill()
    strewn(cluster)
    cluster.deliver(2, [("a", 2, "U"), ("c", 2, "U")])
    rabbitmq, redis = cluster.services.rabbitmq, cluster.services.redis
    broker = {
        key: value for key, value in rabbitmq.env.items()
        if key.startswith(("RABBITMQ_", "ERL_")) or key == "HOME"
    }  # fmt: skip
    # The one that takes the environment at its word; Debian's changes the user.
    tool = tools_of(cluster.root) / "rabbitmqctl"
    tool.write_text(f'#!/bin/sh\nexec {find_command("rabbitmqctl")} "$@"\n')
    tool.chmod(0o755)
    said = follow(
        "Reset of a cluster", cluster.root, CLUSTER=cluster.name, REDIS=redis.url, **broker
    )
    assert not list(redis.client().scan_iter(f"{{{cluster.name}}}:*"))
    for lane in ("task.ingest", "task.merge", "task.maintenance", "task.shard", "results", "delay", "dead"):
        assert rabbitmq.queue_depth(f"{cluster.name}.v1.{lane}") is None, said
    # Others are not touched.
    assert rabbitmq.queue_depth(f"{cluster.name}x.v1.results") == 1
    assert redis.client().get(f"{{{cluster.name}x}}:state:uri") == b"theirs"
    rabbitmq.delete_queues([f"{cluster.name}x.v1.results"])
    started = [cluster.coordinator(), cluster.worker()]
    said = follow("After the reset", cluster.root)
    assert all(process.name in said for process in started) and "fresh" in said, said
    cluster.wait_applied({1, 2})
    goes_on(cluster, 3)
