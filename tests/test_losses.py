"""Something is lost, damaged or interrupted between two runs: what is told, and what is kept.

Owns: stories of a lost raw table, damaged state, requests nobody can read, and interrupts. Never: kills
at named points (test_run.py) or random histories (worlds).
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

from lake import Lake
from oracle_feed import BY_BOTH, check_feed
from receivers import stands_still
from s3_proxy import S3Proxy
from services import Services


def test_a_lost_raw_table_blocks_only_what_needs_it(lake: Lake):
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.deliver(20, [("a", 20, "U")])
    lake.run()
    shutil.rmtree(lake.root / "p/raw")
    # A newer epoch needs no older row.
    lake.deliver(30, [("b", 30, "U")])
    lake.run()
    assert lake.main() == {"a": 20, "b": 30}
    # A late one does: without epoch 20's rows it would overwrite them.
    lake.deliver(15, [("a", 15, "U"), ("c", 15, "U")])
    blocked = lake.run(code=1)
    assert "AL-0405" in blocked.err and "rebuild" in blocked.err and "10, 20" in blocked.err
    assert lake.main() == {"a": 20, "b": 30}
    assert lake.states()[15] == "blocked"
    # What the help says.
    shutil.rmtree(lake.root / "p/raw")
    shutil.rmtree(lake.root / "p/main")
    lake.run()
    assert lake.main() == {"a": 20, "b": 30, "c": 15}


WAYS = {"marks": "", "copies": 'merge.deletion_vectors = "off"', "feed": "change_feed = true"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["ingest", "merge", "optimize"])
def test_a_commit_does_not_name_files_that_are_gone(tmp_path: Path, step: str, way: str):
    """A vacuum of another tool came between, or a cleanup after a long sleep."""
    lake = Lake(tmp_path).pipeline(more=f"{WAYS[way]}\noptimize.small_files = 2\n")
    rows = [(f"k{at}", 1, "U") for at in range(2_000)]
    lake.deliver(10, rows)
    lake.run()
    lake.deliver(20, [(key, 2, "U") for key, _, _ in rows[::2]])
    process = lake.start("run", "--once", env={"ALLUVIUM_STOP": f"{step}.before_commit"})
    stands_still(process)
    table = tmp_path / "p" / ("raw" if step == "ingest" else "main")
    if (step, way) == ("merge", "feed"):
        # They alone; a vacuum takes those of the past, too.
        gone = list(table.glob("_change_data/*"))
        for file in gone:
            file.unlink()
    else:
        gone = DeltaTable(table).vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)
    assert gone != []
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert lake.main() == {key: 2 - at % 2 for at, (key, _, _) in enumerate(rows)}
    if (step, way) == ("merge", "feed"):
        assert check_feed(tmp_path / "p/main", ("id",), BY_BOTH, each_version=True) == []


def test_a_lost_file_of_main_is_named(lake: Lake):
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.run()
    [file] = (lake.root / "p/main").glob("*.parquet")
    file.rename(lake.root / "aside")
    lake.deliver(20, [("a", 20, "U")])
    blocked = lake.run(code=1)
    assert "AL-0411" in blocked.err and file.name in blocked.err and "VACUUM" in blocked.err, blocked.err
    (lake.root / "aside").rename(file)
    lake.run()
    assert lake.main() == {"a": 20, "b": 10}


def test_what_raw_lost_cannot_be_undone(lake: Lake):
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.run()
    shutil.rmtree(lake.root / "p/raw")
    red = lake.alluvium("status")
    assert red.code == 3 and "1 epoch(s) of main are not in" in red.err, red.err
    undone = lake.alluvium("undo", "p", "10", "--yes")
    assert undone.code == 1 and "AL-0405" in undone.err and "not done" in undone.err, undone.err
    assert lake.main() == {"a": 10, "b": 10}
    assert lake.states() == {10: "blocked"}


def test_an_older_raw_is_lost_raw(lake: Lake):
    lake.deliver(10, [("a", 10, "U"), ("b", 10, "U")])
    lake.deliver(20, [("a", 20, "U"), ("c", 20, "U")])
    lake.run()
    shutil.copytree(lake.root / "p/raw", lake.root / "backup")
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    shutil.rmtree(lake.root / "p/raw")
    (lake.root / "backup").rename(lake.root / "p/raw")
    assert lake.alluvium("status").code == 3
    lake.deliver(15, [("a", 15, "U")])
    blocked = lake.run(code=1)
    assert "AL-0405" in blocked.err and "(20)" in blocked.err, blocked.err
    assert lake.main() == {"a": 10, "b": 10}


def test_a_damaged_manifest_of_a_done_epoch_stops_nothing(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    for manifest in (lake.root / "state/manifests").rglob("10*.json"):
        manifest.write_text("")
    lake.deliver(20, [("a", 20, "U")])
    lake.run()
    assert lake.main() == {"a": 20} and lake.states() == {10: "processed", 20: "processed"}


def test_an_epoch_without_rows_is_processed_whoever_looks(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.deliver(20, [])
    lake.deliver(30, [("a", 30, "U")])
    lake.run()
    assert lake.alluvium("skip", "p", "30", "--yes").code == 0
    expected = {10: "processed", 20: "processed", 30: "skipped"}
    assert lake.states() == expected
    lake.run()
    assert lake.states() == expected
    lake.deliver(20, [("a", 20, "U")])
    changed = lake.run()
    assert "20 changed after it was read" in changed.err
    listed = lake.alluvium("epochs", "-o", "json").json()
    assert "changed after it was read" in listed[1]["note"]
    shutil.rmtree(lake.root / "state/ledger")
    assert lake.alluvium("ledger", "rebuild").code == 0
    sql = "SELECT DISTINCT epoch, state FROM processed_folders"
    rows = lake.alluvium("query", "p", sql, "-o", "json").json()
    assert {row["epoch"]: row["state"] for row in rows} == expected


def test_an_interrupt_in_the_middle_leaves_nothing_half_done(lake: Lake):
    for epoch in range(1, 61):
        lake.deliver(epoch, [(f"k{n % 11}", epoch * 100 + n, "U") for n in range(30)])
    for number in (signal.SIGINT, signal.SIGTERM):
        before = commits(lake, "raw")
        running = lake.start("run", "--once")
        deadline = time.monotonic() + 60
        while commits(lake, "raw") < before + 5:
            assert running.poll() is None and time.monotonic() < deadline
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
        assert running.returncode == 130, err
    assert commits(lake, "raw") < 61
    lake.run()
    assert lake.main() == {f"k{k}": 6000 + max(n for n in range(30) if n % 11 == k) for k in range(11)}
    assert set(lake.states().values()) == {"processed"} and len(lake.states()) == 60


def commits(lake: Lake, table: str) -> int:
    return len(list((lake.root / "p" / table / "_delta_log").glob("*.json")))


def test_a_damaged_manifest_is_named_and_a_replay_repairs_it(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.deliver(20, [("a", 20, "U")])
    assert lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": "ingest.after_read:1"}).code < 0
    manifests = sorted((lake.root / "state/manifests").rglob("10*.json"))
    assert len(manifests) == 1
    manifests[0].write_text("{ this is no manifest")
    blocked = lake.run(code=1)
    assert "AL-0206" in blocked.err and manifests[0].name in blocked.err, blocked.err
    assert "replay" in blocked.err, blocked.err
    assert not (lake.root / "p/main").exists() or lake.main() == {}
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    lake.run()
    assert lake.main() == {"a": 20}


def test_requests_of_others_stay_and_unreadable_ones_are_told(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    requests = lake.root / "state/requests"
    requests.mkdir(exist_ok=True)
    (requests / "torn.json").write_text('{"id": "to')
    other = {
        "id": "other", "verb": "undo", "pipeline": "elsewhere", "epoch": 10, "by": "test",
        "at": "2026-01-01T00:00:00Z",
    }
    (requests / "other.json").write_text(json.dumps(other))
    lake.deliver(20, [("a", 20, "U")])
    result = lake.run()
    assert "requests/torn.json" in result.err
    assert lake.main() == {"a": 20}
    # Another process may serve that pipeline.
    assert (requests / "other.json").exists()


def test_a_request_carried_out_twice_changes_nothing_more(lake: Lake):
    lake.deliver(10, [("a", 10, "U")])
    lake.deliver(20, [("a", 20, "U")])
    lake.run()
    # Dies after the effect and before the request is removed.
    died = lake.alluvium(
        "undo", "p", "20", "--yes", env={"ALLUVIUM_CRASH": "request.after_carried_out:1"}
    )
    assert died.code < 0
    assert list((lake.root / "state/requests").glob("*.json"))
    lake.run()
    assert lake.main() == {"a": 10}
    version = lake.version("main")
    assert not list((lake.root / "state/requests").glob("*.json"))
    lake.run()
    assert lake.version("main") == version
    assert lake.markers("main")["alluvium/p/20/merge"] == 2


def test_without_the_state_nobody_seems_to_have_left_out_an_epoch_without_rows(lake: Lake):
    """Only what somebody asked to leave out is `skipped`; raw's log says it when the manifests are gone."""
    lake.deliver(10, [("a", 1, "U")])
    lake.deliver(20, [])
    lake.deliver(30, [(None, 1, "U")])
    lake.deliver(40, [("b", 1, "U")])
    lake.run()
    assert lake.alluvium("skip", "p", "40", "--yes").code == 0
    states = {10: "processed", 20: "processed", 30: "processed", 40: "skipped"}
    assert lake.states() == states
    shutil.rmtree(lake.root / "state")
    assert lake.states() == states
    lake.run()
    assert lake.alluvium("ledger", "rebuild").code == 0
    assert lake.states() == states


def test_refused_rows_are_there_when_the_reply_of_their_commit_is_lost(make, services: Services):
    services.moto.start()
    proxy = S3Proxy(services.moto.url).start()
    try:
        cluster = make("s3", endpoint=proxy.url)
        cluster.deliver(1, [("a", 1, "U"), (None, 2, "U")])
        # The first makes the table.
        proxy.drop_reply("PUT", "quarantine/_delta_log/00000000000000000001", 1)
        cluster.worker()
        cluster.coordinator()
        cluster.wait_applied({1})
        shown = cluster.alluvium("quarantine", "show", "p", "-o", "json").json()
        assert [item["reason"] for item in shown] == ["null_key"], shown
    finally:
        proxy.stop()


def test_refused_rows_of_older_content_do_not_come_back(tmp_path: Path):
    """A process sleeps while another reads the corrected folder."""
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    unlocked = {"ALLUVIUM_TEST_NO_LOCK": "1"}
    lake.deliver(10, [("a", 1, "U"), (None, 2, "U")])
    slow = lake.start("run", "--once", env=unlocked | {"ALLUVIUM_STOP": "quarantine.before_commit"})
    stands_still(slow)
    lake.alluvium("run", "--once", env=unlocked)
    assert len(lake.refused()) == 1
    lake.deliver(10, [("a", 1, "U"), ("b", 2, "U")])
    lake.alluvium("run", "--once", env=unlocked)
    assert lake.refused() == [] and lake.main() == {"a": 1, "b": 2}
    slow.send_signal(signal.SIGCONT)
    slow.communicate(timeout=60)
    assert lake.refused() == [] and lake.main() == {"a": 1, "b": 2}


def test_refused_rows_of_newer_content_stay(tmp_path: Path):
    """Two processes read two contents of a folder at a time, and the older one is later."""
    lake = Lake(tmp_path).pipeline()
    unlocked = {"ALLUVIUM_TEST_NO_LOCK": "1"}
    lake.deliver(10, [("a", 1, "U"), (None, 2, "U")])
    older = lake.start("run", "--once", env=unlocked | {"ALLUVIUM_STOP": "quarantine.before_commit"})
    stands_still(older)
    lake.deliver(10, [("a", 3, "U"), (None, 4, "U"), (None, 5, "U")])
    newer = lake.start("replay", "p", "10", "--yes", env=unlocked | {"ALLUVIUM_STOP": "ingest.before_commit"})
    stands_still(newer)
    for process in (older, newer):
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    lake.run()
    assert lake.main() == {"a": 3} and len(lake.refused()) == 2
