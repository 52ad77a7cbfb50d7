"""The job as its users see it: order, lateness, readiness, losing the state, manual acts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
from deltalake import write_deltalake

import oracle
from lake import Lake

HERE = Path(__file__).parent


def three_epochs(lake: Lake) -> None:
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("c", 1, "U")])
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D")])
    lake.deliver(30, [("a", 3, "U"), ("d", 3, "U")])


ALL_THREE = {"a": 3, "c": 1, "d": 3}


def test_a_merge_that_keeps_failing_blocks_its_epoch_and_the_run_ends(lake: Lake):
    for epoch in (8, 9, 11):
        lake.deliver(epoch, [(f"k{epoch}", epoch, "U")])
    failed = lake.run(code=1, env={"ALLUVIUM_FAIL": "merge.before_commit:1-99"})
    assert "BLOCKED" in failed.err
    assert lake.states()[8] == "blocked" and lake.states()[9] == "ingested"
    assert lake.alluvium("retry", "p", "8").code == 0
    assert lake.main() == {"k8": 8, "k9": 9, "k11": 11}


def test_the_demo_makes_tables_that_the_oracle_confirms(tmp_path: Path):
    lake = Lake(tmp_path)
    first = lake.alluvium("demo", "--rows", "300")
    assert first.code == 0, first.err
    demo = tmp_path / "alluvium-demo"
    for words in ["arrives late", "not complete", "from Python", "alluvium status"]:
        assert words in first.err, words
    arguments = [
        "check", "--source", str(demo / "incoming-data"), "--main", str(demo / "lake/main"),
        "--raw", str(demo / "lake/raw"), "--pipeline", "researchers", "--key", "pguid",
        "--delete-when-op", "--expect-epochs", "1700000000,1700086400,1700172800,1700259200,1700345600",
    ]
    assert oracle.main(arguments) == 0
    # The printed snippet works as printed.
    snippet = re.search(r"python3 -c '(.*)'", first.err).group(1)
    done = lake.alluvium("demo")
    assert done.code == 0 and "nothing to process" in done.err
    shown = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "pguid" in shown.stdout, shown.stderr


def test_late_epochs_do_not_overwrite_newer_values(lake: Lake):
    lake.deliver(30, [("a", 3, "U"), ("d", 3, "U")])
    lake.run()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("c", 1, "U")])
    lake.run()
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D")])
    result = lake.run()
    assert lake.main() == ALL_THREE
    assert "late" in result.err


def test_numbers_not_names_decide_the_order(lake: Lake):
    lake.deliver(9, [("a", 9, "U")])
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    assert lake.main() == {"a": 10}


def test_losing_the_ledger_or_the_whole_state_changes_nothing(lake: Lake):
    three_epochs(lake)
    lake.run()
    versions = (lake.version("raw"), lake.version("main"))
    for lost in ["state/ledger", "state"]:
        shutil.rmtree(lake.root / lost)
        lake.run()
        assert (lake.version("raw"), lake.version("main")) == versions
        assert lake.main() == ALL_THREE
    lake.deliver(40, [("e", 4, "U")])
    shutil.rmtree(lake.root / "state")
    lake.run()
    assert lake.main() == ALL_THREE | {"e": 4}


def test_ledger_rebuild_restores_epoch_generation_state_and_time(lake: Lake):
    three_epochs(lake)
    lake.run()
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    sql = (
        "SELECT epoch_folder, epoch, max(generation) AS generation, last_value(state ORDER BY generation)"
        " AS state, date_trunc('minute', max(processed_at)) AS at, max(main_version) AS main_version"
        " FROM processed_folders GROUP BY epoch_folder, epoch ORDER BY epoch"
    )
    before = lake.alluvium("query", "p", sql, "-o", "json").json()
    assert [row["state"] for row in before] == ["processed", "skipped", "processed"]
    shutil.rmtree(lake.root / "state")
    assert lake.alluvium("ledger", "rebuild").code == 0
    after = lake.alluvium("query", "p", sql, "-o", "json").json()
    assert [row | {"at": ""} for row in after] == [row | {"at": ""} for row in before]
    # Times come from the markers: the same to the second or so.
    assert [row["at"][:13] for row in after] == [row["at"][:13] for row in before]
    versions = (lake.version("raw"), lake.version("main"))
    lake.run()
    assert (lake.version("raw"), lake.version("main")) == versions


def test_two_runs_at_once_agree_with_the_oracle(lake: Lake):
    for epoch in range(1, 25):
        lake.deliver(epoch, [(f"k{n % 7}", epoch * 100 + n, "U") for n in range(20)])
    env = {"ALLUVIUM_TEST_NO_LOCK": "1"}
    running = [lake.start("run", "--once", env=env) for _ in range(2)]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    lake.run()
    expected = {f"k{k}": 2400 + max(n for n in range(20) if n % 7 == k) for k in range(7)}
    assert lake.main() == expected
    rows = lake.alluvium(
        "query", "p", "SELECT epoch, count(*) AS n FROM processed_folders GROUP BY epoch", "-o", "json"
    ).json()
    assert len(rows) == 24 and all(row["n"] == 1 for row in rows)


def test_the_second_run_is_told_who_is_first(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    first = lake.start("run")
    try:
        deadline = time.monotonic() + 60
        while not (lake.root / "p/main/_delta_log").exists():
            assert time.monotonic() < deadline and first.poll() is None
        second = lake.alluvium("run", "--once")
        assert second.code == 5
        assert "AL-0103" in second.err and f"process {first.pid}" in second.err
        # Reading works meanwhile, and asking, too.
        assert lake.alluvium("status").code == 0
    finally:
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    lake.run()


def test_a_watching_run_picks_up_folders_and_requests(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.configure('[run]\npoll = "100ms"\n')
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    running = lake.start("run")
    try:
        wait_for(lambda: lake.states().get(10) == "processed")
        lake.deliver(20, [("a", 2, "U")])
        wait_for(lambda: lake.states().get(20) == "processed")
        asked = lake.alluvium("undo", "p", "20", "--yes")
        assert asked.code == 0 and "next poll" in asked.err
        wait_for(lambda: lake.main() == {"a": 1, "b": 1})
    finally:
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if what():
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline, "waited for a minute"


def test_quiet_folders_are_read_after_two_equal_listings(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(ready='ready = { quiet = "300ms" }')
    lake.deliver(10, [("a", 1, "U")], complete=False)
    lake.run()
    assert lake.main() == {"a": 1}


def test_a_producers_manifest_selects_files_and_waits_for_them(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(ready='ready = { manifest = "manifest.json" }')
    folder = lake.deliver(10, [("a", 1, "U")], complete=False)
    lake.deliver(10, [("z", 9, "U")], complete=False, file="left-over.parquet")
    (folder / "manifest.json").write_text(json.dumps({"files": ["part-0.parquet", "part-1.parquet"]}))
    result = lake.run()
    assert "not there yet" in result.err
    lake.deliver(10, [("b", 2, "U")], complete=False, file="part-1.parquet")
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
    assert lake.alluvium("status").code == 0


def test_junk_empty_incomplete_and_changed_folders_are_told_apart(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.folder(20).mkdir()
    lake.deliver(30, [("a", 3, "U")], complete=False)
    lake.folder("_temporary").mkdir()
    lake.folder("notes.txt").write_text("junk")
    result = lake.run()
    assert "2 name(s)" in result.err and "_temporary" in result.err
    assert lake.states() == {10: "processed", 20: "empty", 30: "incomplete"}
    lake.deliver(10, [("a", 7, "U"), ("b", 7, "U")])
    changed = lake.run()
    assert "changed after it was read" in changed.err and "alluvium replay p 10" in changed.err
    assert lake.main() == {"a": 1}
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 7, "b": 7}


def test_replay_undo_and_skip_leave_what_the_rule_says(lake: Lake):
    three_epochs(lake)
    lake.run()
    assert lake.alluvium("undo", "p", "30", "--yes").code == 0
    assert lake.main() == {"a": 2, "c": 1}
    # The folder's content comes back, without a key that vanished meanwhile.
    lake.deliver(30, [("a", 33, "U")])
    assert lake.alluvium("replay", "p", "30", "--yes").code == 0
    assert lake.main() == {"a": 33, "c": 1}
    assert lake.alluvium("skip", "p", "20", "--yes").code == 0
    assert lake.main() == {"a": 33, "b": 1, "c": 1}
    audit = lake.alluvium("audit", "list", "-o", "json").json()
    assert [(row["verb"], row["epoch"]) for row in audit] == [("skip", 20), ("replay", 30), ("undo", 30)]
    refused = lake.alluvium("undo", "p", "30")
    assert refused.code == 2 and "--yes" in refused.err


def test_pause_stops_and_resume_goes_on_whatever_is_lost(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    assert lake.alluvium("pause", "p").code == 0
    shutil.rmtree(lake.root / "state")
    lake.deliver(20, [("a", 2, "U")])
    assert "p is paused" in lake.run().err
    assert lake.main() == {"a": 1}
    status = lake.alluvium("status")
    assert "paused" in status.out and "alluvium resume p" in status.err
    assert lake.alluvium("resume", "p").code == 0
    assert lake.main() == {"a": 2}


def test_queries_reach_back_to_an_epoch_or_a_version_and_never_write(lake: Lake):
    three_epochs(lake)
    env = {"ALLUVIUM_PIPELINE__P__MERGE__BATCH_EPOCHS": "1"}
    lake.run(env=env)
    query = ["query", "p", "SELECT value FROM main WHERE id = 'a'", "-o", "json"]
    for epoch, value in [(10, 1), (20, 2), (30, 3)]:
        assert lake.alluvium(*query, "--at-epoch", str(epoch)).json() == [{"value": value}]
    assert lake.alluvium(*query, "--at-version", "0").json() == []
    assert lake.alluvium(*query, "--at-epoch", "99").code == 2
    wrong = lake.alluvium("query", "p", "SELECT nothing FROM main")
    assert wrong.code == 1 and "AL-0503" in wrong.err and "tables that exist" in wrong.err
    for statement in ["INSERT INTO main VALUES ('x', 1, 'U')", "DROP TABLE main", "COPY main TO 'x.csv'"]:
        assert lake.alluvium("query", "p", statement).code == 1
    assert lake.main() == ALL_THREE and not (lake.root / "x.csv").exists()


def test_an_existing_table_is_adopted_as_the_base(tmp_path: Path):
    lake = Lake(tmp_path)
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
    base = pa.table([["a", "old"], [100, 100], ["U", "U"]], schema=schema)
    write_deltalake(str(tmp_path / "p/main"), base)
    lake.pipeline()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.deliver(20, [("a", 2, "U"), ("new", 2, "U")])
    refused = lake.run(code=5)
    assert "AL-0107" in refused.err and "adopt = true" in refused.err
    lake.pipeline(more="adopt = true\nstart_from = 20")
    lake.run()
    # Epoch 10 is older than the base: it counts as done.
    assert lake.main() == {"a": 2, "old": 100, "new": 2}
    assert lake.states() == {20: "processed"}
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    assert lake.main() == {"a": 100, "old": 100}
    shutil.rmtree(lake.root / "state")
    lake.run()
    assert lake.main() == {"a": 100, "old": 100}


def test_other_settings_for_a_table_are_a_conflict(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', 'key = ["id", "value"]')
    lake.configure()
    result = lake.run(code=5)
    assert "AL-0106" in result.err and "key" in result.err and "rebuild" in result.err


def test_new_columns_are_added_and_narrower_types_fit(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    schema = pa.schema(
        [("value", pa.int32()), ("op", pa.string()), ("ID", pa.string()), ("more", pa.float32())]
    )
    lake.deliver(20, [(2, "U", "b", 0.5)], schema=schema)
    lake.run()
    rows = lake.alluvium("query", "p", "SELECT id, value, more FROM main ORDER BY id", "-o", "json")
    assert rows.json() == [
        {"id": "a", "value": 1, "more": None}, {"id": "b", "value": 2, "more": 0.5}
    ]


def test_start_from_leaves_older_folders_alone(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="start_from = 20")
    three_epochs(lake)
    lake.run()
    assert lake.main() == {"a": 3, "d": 3}
    status = lake.alluvium("status", "-o", "json").json()
    assert status[0]["settled_folders"] == 1


def test_optimize_joins_small_files_and_cleanup_deletes_only_what_nobody_needs(tmp_path: Path):
    more = "optimize = { small_files = 4 }\nmerge = { batch_epochs = 1 }\ncleanup = { retention = \"1s\", every = \"1ms\" }"
    lake = Lake(tmp_path).pipeline(more=more)
    for epoch in range(1, 13):
        lake.deliver(epoch, [(f"e{epoch}-{n}", n, "U") for n in range(5)])
    short = {"ALLUVIUM_TEST_SHORT_RETENTION": "1"}
    result = lake.run(env=short)
    assert "optimized" in result.err
    status = lake.alluvium("status", "-o", "json", env=short).json()[0]
    assert status["main_files"] < 12
    wait_until_older_than(lake.root / "p/main", 1.5)
    planned = lake.alluvium("plan", "p", "--cleanup", "-o", "json", env=short).json()
    assert planned
    lake.run(env=short)
    assert lake.alluvium("plan", "p", "--cleanup", "-o", "json", env=short).json() == []
    assert len(lake.main()) == 60
    lake.run(env=short)
    assert len(lake.main()) == 60


def wait_until_older_than(folder: Path, seconds: float) -> None:
    while any(time.time() - path.stat().st_mtime < seconds for path in folder.rglob("*.parquet")):
        pass


def test_three_years_of_folders_are_found_in_one_listing(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="start_from = 1200")
    for epoch in range(1, 1201):
        lake.folder(epoch).mkdir()
    lake.deliver(1200, [("a", 1, "U")])
    lake.run()
    assert lake.main() == {"a": 1}


def test_every_crash_point_is_survived(tmp_path: Path):
    """Goal: a kill -9 at each named point loses and doubles nothing. Method: one small lake per
    point, killed there at its first passing, run again, compared."""
    points = Lake(tmp_path).alluvium("crash-points").out.split()
    assert len(points) > 25
    reached = set()
    for point in points:
        root = tmp_path / point
        root.mkdir()
        # Merges in pieces: two, by the two slots. Where files are written anew they search by notes.
        vectors = "off" if point == "shard.after_note" else "auto"
        more = f'optimize = {{ small_files = 2 }}\nmerge = {{ batch_epochs = 1, deletion_vectors = "{vectors}" }}'
        more += '\nshard_size = "2KiB"'
        # The row without a key is an alert; each merge calls the hook.
        lake = Lake(root).pipeline(more=more + '\nafter_merge = { command = ["true"] }')
        lake.configure('[alert.team]\ntype = "log"\n')
        three_epochs(lake)
        crash = {"ALLUVIUM_CRASH": point}
        killed = lake.alluvium("run", "--once", env=crash).code == -signal.SIGKILL
        schema = pa.schema(
            [("id", pa.string()), ("value", pa.int64()), ("op", pa.string()), ("new", pa.int64())]
        )
        lake.deliver(40, [("e", 4, "U", 1), (None, 4, "U", 1)], schema=schema)
        killed |= lake.alluvium("run", "--once", env=crash).code == -signal.SIGKILL
        verbs = [["pause", "p"], ["resume", "p"], ["undo", "p", "40", "--yes"]]
        verbs += [["rollback-point", "add", "p", "x"], ["rollback", "p", "--to-epoch", "20", "--yes"]]
        for verb in [*verbs, ["resume", "p"]]:
            killed |= lake.alluvium(*verb, env=crash).code == -signal.SIGKILL
        for epoch in range(50, 66):
            lake.deliver(epoch, [("f", epoch, "U", 1)], schema=schema)
        killed |= lake.alluvium("run", "--once", env=crash).code == -signal.SIGKILL
        reached |= {point} if killed else set()
        lake.run()
        assert lake.alluvium("resume", "p").code == 0
        lake.run()
        assert lake.alluvium("undo", "p", "40", "--yes").code == 0
        lake.run()
        assert lake.main() == ALL_THREE | {"f": 65}, point
    assert reached == set(points), f"never reached: {sorted(set(points) - reached)}"
