"""Steps in pieces: what comes out is what one worker makes alone, whoever does the pieces and whoever dies.

Owns: `shard_size`, the lane of pieces, what is left below the state folder. Rules of rows are the others' (the
worlds run with pieces, too).
"""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import random
import signal
import subprocess
import time
import uuid
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from cluster import Cluster
from lake import Lake
from oracle_feed import BY_BOTH, check_feed
from receivers import stands_still, wait_for

SMALL = 'shard_size = "1KiB"\n'
SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
SCHEMA_OF_TWO = pa.schema([("id", pa.string()), ("value", pa.int64())])
FILES, ROWS = 6, 400
WAYS = {
    "marks": "",
    "copies": 'merge.deletion_vectors = "off"',
    "little memory": "",
    "sequence": 'sequence_by = "value"',
    "skip": "merge.skip_unchanged = true",
    "feed": "change_feed = true",
}


def rows_of(epoch: int, file: int, rows: int = ROWS, keys: int = 4 * ROWS) -> list[tuple]:
    """Keys that occur in several files and epochs; every eleventh row is a delete."""
    draw = random.Random(f"{epoch}/{file}")
    return [
        (f"k{draw.randrange(keys):05}", epoch * 1_000_000 + draw.randrange(1000) * 1000 + at, "D" if at % 11 == 0 else "U")
        for at in range(rows)
    ]  # fmt: skip


def deliver(lake: Lake, epoch: int, files: int = FILES, **of: int) -> None:
    for file in range(files):
        lake.deliver(epoch, rows_of(epoch, file, **of), file=f"part-{file}.parquet", complete=file == files - 1)


def expected(epochs: list[int], sequenced: bool = False, files: int = FILES, **of: int) -> dict[str, int]:
    main: dict[str, int] = {}
    for epoch in sorted(epochs):
        rows = [row for file in range(files) for row in rows_of(epoch, file, **of)]
        for key, value, op in sorted(rows, key=lambda row: row[1]) if sequenced else rows:
            if op == "D":
                main.pop(key, None)
            else:
                main[key] = value
    return main


def pieces(lake: Lake, table: str, step: str) -> list[int]:
    """In how many pieces the commits of a step were made, the oldest first."""
    history = DeltaTable(lake.root / "p" / table).history()
    told = [entry.get("alluvium", {}) for entry in reversed(history)]
    return [entry["pieces"] for entry in told if entry.get("step") == step]


def nothing_is_left(lake: Lake) -> None:
    """No object, that is: a kill may leave the beginning of one that was being put (`NAME#1`)."""
    files = [path for path in (lake.root / "state/shards").rglob("*") if path.is_file()]
    assert [path for path in files if "#" not in path.name] == []


@pytest.mark.parametrize("way", WAYS)
def test_pieces_make_what_one_makes(way: str, tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + WAYS[way])
    if way == "little memory":
        lake.configure(head='memory = "16MiB"\n')
    sequenced = way == "sequence"
    for epoch in (10, 20, 30):
        deliver(lake, epoch)
        lake.run()
    assert lake.main() == expected([10, 20, 30], sequenced)
    assert pieces(lake, "raw", "ingest") == [FILES] * 3
    # The first one finds no rows to take out, and is split all the same.
    assert all(count > 1 for count in pieces(lake, "main", "merge")[:3])
    nothing_is_left(lake)
    # A late one is computed over all epochs: by one worker, out of what pieces wrote.
    deliver(lake, 15)
    lake.run()
    assert lake.main() == expected([10, 15, 20, 30], sequenced)
    assert pieces(lake, "main", "merge")[-1] == 0 and pieces(lake, "raw", "ingest")[-1] == FILES
    for verb, epochs in (("undo", [10, 15, 30]), ("replay", [10, 15, 20, 30])):
        done = lake.alluvium(verb, "p", "20", "--yes")
        assert done.code == 0, done.err
        lake.run()
        assert lake.main() == expected(epochs, sequenced)
    nothing_is_left(lake)
    if way == "feed":
        assert check_feed(tmp_path / "p/main", ("id",), BY_BOTH, each_version=True) == []


def test_ranges_leave_unchanged_rows_alone(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + "merge.skip_unchanged = true", deletes=False)
    rows = [(f"k{at:05}", at) for at in range(12_000)]
    changed = [(key, -value) if value % 1000 == 1 else (key, value) for key, value in rows]
    for epoch, content in ((10, rows), (20, changed)):
        for file in range(3):
            lake.deliver(epoch, content[file::3], file=f"part-{file}.parquet", complete=file == 2, schema=SCHEMA_OF_TWO)
        lake.run()
    assert lake.main() == dict(changed)
    assert all(count > 2 for count in pieces(lake, "main", "merge"))
    newest = next(run for run in lake.alluvium("runs", "p", "-o", "json").json() if run["step"] == "merge")
    assert (newest["epoch"], newest["rows_updated"], newest["rows_written"]) == (20, 12, 12)


def test_ranges_without_a_row_that_goes_tell_their_changes(tmp_path: Path):
    """A reader of the feed does not look at the new files of a commit that has files of changes."""
    lake = Lake(tmp_path).pipeline(more=SMALL + "change_feed = true")
    keys = {10: range(3_000), 20: range(2_000, 12_000)}
    for epoch, of in keys.items():
        for file in range(3):
            rows = [(f"k{at:05}", epoch * 100_000 + at, "U") for at in of][file::3]
            lake.deliver(epoch, rows, file=f"part-{file}.parquet", complete=file == 2)
        lake.run()
    assert all(count > 2 for count in pieces(lake, "main", "merge"))
    assert check_feed(tmp_path / "p/main", ("id",), BY_BOTH, each_version=True) == []
    # The first one is told by its new files.
    told = DeltaTable(tmp_path / "p/main").load_cdf(starting_version=0).read_all()
    told = pa.table(told).group_by(["_commit_version", "_change_type"]).aggregate([([], "count_all")]).to_pylist()
    changes = {(change["_change_type"], change["count_all"]) for change in told}
    assert changes == {("insert", 3_000), ("insert", 9_000), ("update_preimage", 1_000), ("update_postimage", 1_000)}


EPOCH_START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
KEYS = {
    "long": (pa.int64(), lambda n: (n - 20_000) * 2**40 + n),
    "decimal": (pa.decimal128(38, 10), lambda n: Decimal(n * 10**20 + 7) / 10**10),
    "double": (pa.float64(), lambda n: (n - 20_000) * 0.1),
    # Statistics do not tell of NaN.
    "not a number": (pa.float64(), lambda n: n * 0.1 if n % 1000 else float("nan")),
    # Longer than what statistics keep of a text.
    "one prefix": (pa.string(), lambda n: "x" * 70 + f"{n:06}"),
    "binary": (pa.binary(), lambda n: n.to_bytes(3) + b"\xff" * 70),
    "timestamp": (pa.timestamp("us", "UTC"), lambda n: EPOCH_START + dt.timedelta(microseconds=n * 997)),
    "two columns": (pa.string(), lambda n: f"k{n:06}"),
}


@pytest.mark.parametrize("way", ["marks", "copies"])
@pytest.mark.parametrize("kind", KEYS)
def test_ranges_of_keys_of_any_type(kind: str, way: str, tmp_path: Path):
    arrow, key_of = KEYS[kind]
    schema = pa.schema([("id", arrow), ("value", pa.int64()), ("op", pa.string()), ("site", pa.int32())])
    key = '["site", "id"]' if kind == "two columns" else '["id"]'
    lake = Lake(tmp_path).pipeline(more='shard_size = "16KiB"\nmerge.batch_epochs = 1\n' + WAYS[way])
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', f"key = {key}")
    lake.configure()
    main: dict = {}
    for epoch in (10, 20):
        draw = random.Random(epoch)
        for file in range(3):
            # Ten times as many in a part of the keys as in the rest.
            numbers = [draw.randrange(4_000 if at % 10 else 40_000) for at in range(9_000)]
            rows = [(key_of(n), epoch * 1_000_000 + file * 10_000 + at, "D" if at % 7 == 0 else "U", n % 3) for at, n in enumerate(numbers)]
            lake.deliver(epoch, rows, file=f"part-{file}.parquet", complete=file == 2, schema=schema)
            for row in rows:
                main[repr(row[0])] = row
    lake.run()
    plain = lambda key: repr(key.astimezone(dt.UTC) if kind == "timestamp" else key)
    found = {(plain(row["id"]), row["value"], row["site"]) for row in lake.rows(by="value")}
    assert found == {(key, row[1], row[3]) for key, row in main.items() if row[2] == "U"}
    assert all(count > 2 for count in pieces(lake, "main", "merge"))
    nothing_is_left(lake)


def test_a_content_that_lost_files_takes_their_keys_back(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + 'on_changed = "replay"')
    deliver(lake, 10)
    deliver(lake, 20)
    lake.run()
    for file in (0, 3, 4):
        (lake.folder(20) / f"part-{file}.parquet").unlink()
    lake.run()
    main = expected([10])
    for file in (1, 2, 5):
        for key, value, op in rows_of(20, file):
            if op == "D":
                main.pop(key, None)
            else:
                main[key] = value
    assert lake.main() == main


@pytest.mark.parametrize("settings", ["", 'format = "csv"', 'format = "json"'])
def test_rows_are_refused_as_they_are_by_one(settings: str, tmp_path: Path):
    """By expectation, by type and for want of a key: with reason, place and content."""
    found = []
    for shard_size in ("1KiB", "1GiB"):
        folder = tmp_path / shard_size
        folder.mkdir()
        more = f'shard_size = "{shard_size}"\n{settings}\non_mismatch = "quarantine"\n'
        more += "select = \"SELECT id, CAST(value AS INT) * 2 AS value, op FROM incoming WHERE op <> 'X'\"\n"
        lake = Lake(folder).pipeline(columns='id = "string"\nvalue = "int"\nop = "string"', more=more)
        expectation = '[[pipeline.p.expect]]\nname = "small"\nsql = "value < 1900"\naction = "quarantine"\n'
        lake.pipelines["p"] += expectation
        lake.configure()
        for file in range(4):
            rows = [(f"k{file}-{at}", file * 300 + at, "X" if at % 7 == 0 else "U") for at in range(250)]
            rows += [(None, 1, "U"), (f"large{file}", 2**31 - 5, "U")]
            lake.write(10, *written(settings, file, rows))
        lake.run()
        found.append((lake.rows(), sorted(map(str, lake.refused())), counts(lake)))
        assert pieces(lake, "raw", "ingest") == [4 if shard_size == "1KiB" else 0]
        nothing_is_left(lake)
    assert found[0] == found[1]
    reasons = " ".join(found[0][1])
    assert "null_key" in reasons and "expect:small" in reasons and len(found[0][1]) > 8, reasons


def counts(lake: Lake) -> list:
    runs = lake.alluvium("runs", "p", "-o", "json").json()
    return [(run["step"], run.get("rows_read"), run.get("rows_written"), run.get("rows_quarantined")) for run in runs]


def written(settings: str, file: int, rows: list[tuple]) -> tuple[str, str | pa.Table]:
    if "csv" in settings:
        lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
        return f"part-{file}.csv", "\n".join(["id,value,op", *lines]) + "\n"
    if "json" in settings:
        lines = [json.dumps(dict(zip(("id", "value", "op"), row))) for row in rows]
        return f"part-{file}.json", "\n".join(lines) + "\n"
    columns = [list(column) for column in zip(*rows)]
    return f"part-{file}.parquet", pa.table(columns, schema=SCHEMA)


def test_repaired_rows_are_read_in_their_pieces(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + 'on_mismatch = "quarantine"')
    for file in range(3):
        rows = [(f"k{file}-{at}", at, "U") for at in range(200)] + [(None, 7, "U")]
        lake.write(10, *written("", file, rows))
    lake.run()
    refused = lake.alluvium("quarantine", "show", "p", "-o", "json").json()
    corrected = [{"file": item["file"], "row": item["row"], "content": item["content"] | {"id": f"new{at}"}} for at, item in enumerate(refused)]  # fmt: skip
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, corrected)))
    done = lake.alluvium("quarantine", "replay", "p", "10", "--rows", "rows.json", "--yes")
    assert done.code == 0, done.err
    lake.run()
    assert {key: value for key, value in lake.main().items() if key.startswith("new")} == {"new0": 7, "new1": 7, "new2": 7}
    assert lake.refused() == [] and pieces(lake, "raw", "ingest") == [3, 3]


def test_a_file_that_cannot_be_read_blocks_the_epoch_as_ever(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL)
    deliver(lake, 10)
    damaged = lake.folder(10) / "part-3.parquet"
    body = bytearray(damaged.read_bytes())
    body[4:400] = bytes(396)  # the footer is whole
    damaged.write_bytes(body)
    done = lake.run(code=1)
    assert "part-3.parquet" in done.err and "AL-0301" in done.err, done.err
    assert lake.states() == {10: "blocked"} and not (tmp_path / "p/main").exists()
    nothing_is_left(lake)
    lake.deliver(10, rows_of(10, 3), file="part-3.parquet")
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    lake.run()
    assert lake.main() == expected([10])


def test_several_bins_are_written_at_a_time(tmp_path: Path):
    optimize = 'optimize = { small_files = 12, bin_size = "1KiB" }\nmerge.batch_epochs = 1\n'
    lake = Lake(tmp_path).pipeline(more=SMALL + optimize)
    lake.configure(head="")
    for epoch in range(1, 13):
        deliver(lake, epoch, files=1)
    assert "optimized" in lake.run().err
    assert lake.main() == expected(list(range(1, 13)), files=1)
    assert pieces(lake, "main", "optimize")[0] >= 1
    # A bin that nobody waited for may be told when the process ends; its plan is gone.
    assert list((tmp_path / "state/shards").rglob("*plan.json")) == []


# Where files are written anew they are searched by themselves, for rows that notes tell.
POINTS = {"shard.after_plan": "", "shard.after_note": WAYS["copies"], "shard.before_result": "", "shard.after_result": ""}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_at_a_piece_loses_and_doubles_nothing(point: str, nth: int, tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + POINTS[point])
    deliver(lake, 10)
    lake.run()
    deliver(lake, 20)
    killed = lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": f"{point}:{nth}"})
    assert killed.code == -signal.SIGKILL
    assert lake.main() in (expected([10]), expected([10, 20]))
    lake.run()
    assert lake.main() == expected([10, 20])
    # Who does the step next takes the plan of the one that died away.
    nothing_is_left(lake)


@pytest.mark.parametrize("point", POINTS)
def test_a_piece_whose_storage_fails_is_tried_again(point: str, tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + POINTS[point])
    deliver(lake, 10)
    lake.run()
    deliver(lake, 20)
    lake.run(env={"ALLUVIUM_FAIL": f"{point}:1-2"})
    assert lake.main() == expected([10, 20])
    nothing_is_left(lake)


def test_a_cleanup_takes_what_a_killed_worker_laid_out(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL + 'cleanup = { every = "1s", retention = "1h" }')
    deliver(lake, 10)
    lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": "shard.after_plan"})
    left = [path for path in (tmp_path / "state/shards").rglob("*") if path.is_file()]
    assert left != []
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    lake.run()
    done = lake.alluvium("step", "cleanup")
    assert done.code == 0, done.err
    nothing_is_left(lake)


# --- over several workers ---------------------------------------------------------------------


def large(make, store: str = "disk") -> Cluster:
    cluster: Cluster = make(store)
    cluster.pipeline(more=SMALL)
    return cluster


def deliver_large(cluster: Cluster, epoch: int) -> None:
    """Six files of one epoch."""
    rows = []
    for file in range(FILES):
        some = rows_of(epoch, file)
        rows += some
        cluster.deliver(epoch, some, file=f"part-{file}.parquet", complete=file == FILES - 1)
    cluster.delivered["p"][epoch] = rows


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_workers_share_an_epoch(make, store: str):
    cluster = large(make, store)
    deliver_large(cluster, 10)
    deliver_large(cluster, 20)
    for _ in range(3):
        cluster.worker("--slots", "1")
    cluster.coordinator()
    cluster.wait_applied({10, 20})
    cluster.check()
    # Messages of pieces that were done meanwhile find nothing to do.
    queue = f"{cluster.name}.v1.task.shard"
    cluster.wait(lambda: cluster.services.rabbitmq.queue_depth(queue) == 0)


@pytest.mark.parametrize("shard_size", ["1GiB", "2MiB"])
def test_files_of_several_row_groups_in_a_store(make, shard_size: str):
    """The next row group is fetched while one is read; and what decides is fetched once for two readers."""
    cluster: Cluster = make("s3")
    cluster.pipeline(more=f'shard_size = "{shard_size}"\n')
    for epoch in (10, 20):
        draw = random.Random(epoch)
        rows = [
            (f"{draw.randrange(400_000) * 2_654_435_761:020}", draw.getrandbits(62), "D" if at % 11 == 0 else "U")
            for at in range(300_000)
        ]
        cluster.deliver(epoch, rows[:150_000], complete=False)
        cluster.deliver(epoch, rows[150_000:], file="part-1.parquet")
        cluster.delivered["p"][epoch] = rows
    cluster.worker("--slots", "2")
    assert cluster.coordinator("--once").popen.wait(120) == 0
    cluster.check()
    store = cluster.services.moto.client()
    listed = store.list_objects_v2(Bucket=cluster.bucket, Prefix="p/raw/_epoch=20")["Contents"]
    bodies = [store.get_object(Bucket=cluster.bucket, Key=found["Key"])["Body"].read() for found in listed]
    groups = [pq.ParquetFile(io.BytesIO(body)).num_row_groups for body in bodies]
    # Two writers have a row group each.
    assert groups == ([2] if shard_size == "1GiB" else [1, 1])


@pytest.mark.parametrize("point", ["shard.before_result", "shard.after_result", "task.after_claim"])
def test_a_worker_that_dies_at_a_piece_costs_that_piece(make, point: str):
    cluster = large(make)
    deliver_large(cluster, 10)
    cluster.worker("--slots", "1")
    for nth in (1, 2):
        cluster.worker("--slots", "1", env={"ALLUVIUM_CRASH": f"{point}:{nth}"})
    cluster.coordinator()
    cluster.wait_applied({10})
    deliver_large(cluster, 20)
    cluster.wait_applied({20})
    cluster.check()


def test_pieces_go_on_without_redis(make):
    cluster = large(make)
    deliver_large(cluster, 10)
    workers = [cluster.worker("--slots", "1") for _ in range(2)]
    cluster.coordinator()
    cluster.wait_applied({10})
    cluster.services.redis.client().flushall()
    deliver_large(cluster, 20)
    cluster.wait_applied({20})
    cluster.check()
    assert all(worker.alive for worker in workers)


@pytest.mark.parametrize(("rows", "in_order"), [(ROWS, 0), (20_000, 19_000)])
@pytest.mark.parametrize("tells", [True, False])
def test_files_of_other_writers_in_no_order_are_merged_all_the_same(tells: bool, rows: int, in_order: int, tmp_path: Path):
    """Somebody rewrote raw's files in another order: pieces cannot be made of them, and one worker does it. That is
    found by the pieces, where the files tell of their pages."""
    lake = Lake(tmp_path).pipeline(more=SMALL + 'merge.batch_epochs = 1\n')
    of = {"rows": rows, "keys": 4 * rows}
    deliver(lake, 10, **of)
    lake.run()
    deliver(lake, 20, **of)
    lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": "merge.after_plan"})
    for path in (tmp_path / "p/raw/_epoch=20").glob("*.parquet"):
        held = pq.read_table(path, partitioning=None)
        assert len(held) == rows
        reverse = held.take(pa.array([*range(in_order), *range(rows - 1, in_order - 1, -1)]))
        pq.write_table(reverse, path, data_page_size=4096, write_page_index=tells)
    # The log's sizes are of the files as they were: a reader asks for the footer by them.
    sizes(tmp_path / "p/raw")
    lake.run()
    assert lake.main() == expected([10, 20], **of) and pieces(lake, "main", "merge")[-1] == 0
    nothing_is_left(lake)


def test_many_rows_of_few_keys_are_as_many_pieces(tmp_path: Path):
    """Ranges are of as many rows each: of as many keys each, the first one would be all."""
    lake = Lake(tmp_path).pipeline(more=SMALL)
    of = {"rows": 40_000, "keys": 200}
    deliver(lake, 10, **of)
    lake.run()
    assert lake.main() == expected([10], **of)
    # Of a file of ten pages; as many as can be without reading most of them for most of the ranges.
    assert 20 < pieces(lake, "main", "merge")[0] < 64
    nothing_is_left(lake)


def test_a_key_with_most_of_the_rows_is_one_range(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='shard_size = "64KiB"\n')
    main = {}
    for file in range(3):
        draw = random.Random(file)
        keys = ["k05000" if at % 5 < 3 else f"k{draw.randrange(10_000):05}" for at in range(30_000)]
        rows = [(key, file * 100_000 + at, "U") for at, key in enumerate(keys)]
        lake.deliver(10, rows, file=f"part-{file}.parquet", complete=file == 2)
        main |= {key: value for key, value, _ in rows}
    lake.run()
    assert lake.main() == main and pieces(lake, "main", "merge")[0] > 2
    written = DeltaTable(tmp_path / "p/main").get_add_actions(flatten=True)
    rows = sorted(pa.table(written)["num_records"].to_pylist())
    # None of them is a few keys beside it.
    assert rows[0] > sum(rows) / len(rows) / 10, rows


def sizes(table: Path) -> None:
    for entry in (table / "_delta_log").glob("*.json"):
        lines = []
        for line in entry.read_text().splitlines():
            action = json.loads(line)
            if "add" in action and (table / action["add"]["path"]).exists():
                action["add"]["size"] = (table / action["add"]["path"]).stat().st_size
            lines.append(json.dumps(action))
        entry.write_text("\n".join(lines) + "\n")


def plan_of_a_stopped(lake: Lake, nth: int = 1) -> tuple[subprocess.Popen, Path]:
    """A run that stands still where its plan lies and nobody is asked yet."""
    process = lake.start("run", "--once", env={"ALLUVIUM_STOP": f"shard.after_plan:{nth}"})
    wait_for(lambda: list((lake.root / "state/shards").rglob("*-plan.json")), "a plan")
    stands_still(process)
    [plan] = (lake.root / "state/shards").rglob("*-plan.json")
    return process, plan


def goes_on(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_what_another_worker_cannot_do_is_done_by_the_one_that_has_the_step(tmp_path: Path):
    """A folder that only one machine does not see must not block the epoch."""
    lake = Lake(tmp_path).pipeline(more=SMALL)
    deliver(lake, 10)
    process, plan = plan_of_a_stopped(lake)
    error = {"code": "AL-0203", "message": "10/part-0.parquet is not there", "help": None}
    for number in range(FILES):
        Path(str(plan).replace("-plan.json", f"-{number}.json")).write_text(json.dumps({"failed": error}))
    goes_on(process)
    assert lake.main() == expected([10]) and lake.states() == {10: "processed"}
    nothing_is_left(lake)


@pytest.mark.parametrize("passed", [0, 1, None])
def test_ranges_that_lack_rows_are_not_believed(passed: int | None, tmp_path: Path):
    """Rows passed over in all ranges are those of the files, or one worker merges them."""
    lake = Lake(tmp_path).pipeline(more=SMALL)
    deliver(lake, 10)
    process, plan = plan_of_a_stopped(lake, nth=2)
    found = {"passed": passed, "keys": 0, "upserts": 0, "going": [], "feed": [], "share": None}
    Path(str(plan).replace("-plan.json", "-0.json")).write_text(json.dumps({"done": {"of_merge": found}}))
    goes_on(process)
    assert lake.main() == expected([10]) and pieces(lake, "main", "merge") == [0]
    nothing_is_left(lake)


@pytest.mark.parametrize("told", ['{"of_the_future": 1}', '{"done": {"rows": 3}}', "[", ""])
def test_an_outcome_of_another_version_is_done_again(told: str, tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=SMALL)
    deliver(lake, 10)
    process, plan = plan_of_a_stopped(lake)
    for number in range(FILES):
        Path(str(plan).replace("-plan.json", f"-{number}.json")).write_text(told)
    goes_on(process)
    assert lake.main() == expected([10]) and lake.states() == {10: "processed"}
    nothing_is_left(lake)


def test_a_piece_that_kills_its_workers_parks_the_epoch(make):
    """Three deaths in all, and not three for each try of the step."""
    cluster = large(make)
    deliver_large(cluster, 10)
    lead = cluster.worker("--slots", "1", env={"ALLUVIUM_STOP": "shard.after_plan"})
    cluster.coordinator()
    shards = cluster.root / "state/shards"
    cluster.wait(lambda: list(shards.rglob("*-plan.json")) != [])
    [plan] = shards.rglob("*-plan.json")
    name = f"shards/p/{plan.name.removesuffix('-plan.json')}/{FILES - 1}"
    piece = uuid.uuid5(uuid.NAMESPACE_OID, name)
    redis = cluster.services.redis.client()
    redis.set(f"{{{cluster.name}}}:deaths:{piece}", 3)
    lead.signal(signal.SIGCONT)
    cluster.wait(lambda: cluster.states() == {10: "parked"})
    runs = cluster.wait(lambda: cluster.alluvium("runs", "p", "-o", "json").json())
    [why] = [(run["code"], run["message"]) for run in runs]
    assert why == ("AL-0504", "3 workers died at piece 5 of this task")


def test_runs_that_memory_is_not_enough_for_are_sorted_by_way_of_the_disk(tmp_path: Path):
    """A row of each writer's files is in memory as long as a merge goes on: with many of them it would not fit."""
    found = []
    for memory in ("16MiB", "1GiB"):
        folder = tmp_path / memory
        folder.mkdir()
        lake = Lake(folder).pipeline(columns='id = "string"\nvalue = "string"\nop = "string"', more=SMALL)
        lake.configure(head=f'memory = "{memory}"\n')
        for file in range(8):
            draw = random.Random(file)
            rows = [(f"k{draw.randrange(3000):05}", draw.randbytes(500).hex(), "U") for _ in range(2000)]
            lake.write(10, f"part-{file}.parquet", pa.table([list(column) for column in zip(*rows)], ["id", "value", "op"]))
        lake.run()
        found.append(lake.rows())
        assert pieces(lake, "raw", "ingest") == [8]
        assert (pieces(lake, "main", "merge")[-1] > 0) == (memory == "1GiB")
    assert found[0] == found[1]


def test_a_plan_that_cannot_be_read_is_nothing_to_do(tmp_path: Path):
    """Another version's: who laid it out does it."""
    lake = Lake(tmp_path).pipeline(more=SMALL)
    deliver(lake, 10)
    process, plan = plan_of_a_stopped(lake)
    plan.write_text('{"of_the_future": {}}')
    goes_on(process)
    assert lake.main() == expected([10])
    nothing_is_left(lake)
