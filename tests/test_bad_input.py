"""Bad input: one clear coded error that names the thing, tables as before, others go on, and after
the repair `run --once` finishes the job."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

GOOD = [("a", 1, "U"), ("b", 2, "U")]


def truncate(lake: Lake) -> None:
    path = lake.deliver(20, [("a", 9, "U")]) / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def csv_in_disguise(lake: Lake) -> None:
    (lake.deliver(20, []) / "part-0.parquet").write_text("id,value,op\na,9,U\n")


def no_key_column(lake: Lake) -> None:
    schema = pa.schema([("ident", pa.string()), ("value", pa.int64()), ("op", pa.string())])
    lake.deliver(20, [("a", 9, "U")], schema=schema)


def wrong_type(lake: Lake) -> None:
    schema = pa.schema([("id", pa.string()), ("value", pa.string()), ("op", pa.string())])
    lake.deliver(20, [("a", "nine", "U")], schema=schema)


def too_wide_type(lake: Lake) -> None:
    schema = pa.schema([("id", pa.string()), ("value", pa.float64()), ("op", pa.string())])
    lake.deliver(20, [("a", 9.5, "U")], schema=schema)


def reserved_name(lake: Lake) -> None:
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("_op", pa.string())])
    lake.deliver(20, [("a", 9, "U")], schema=schema)


def a_file_named_like_an_epoch(lake: Lake) -> None:
    lake.folder(20).write_text("not a folder")


def two_spellings(lake: Lake) -> None:
    lake.deliver(20, [("a", 9, "U")])
    lake.deliver("020", [("a", 8, "U")])


CASES = [
    (truncate, "AL-0301", ["20/part-0.parquet"]),
    (csv_in_disguise, "AL-0301", ["20/part-0.parquet"]),
    (no_key_column, "AL-0302", ["20/part-0.parquet", '"id"', "ident"]),
    (wrong_type, "AL-0303", ["20/part-0.parquet", '"value"', "Utf8", "Int64"]),
    (too_wide_type, "AL-0303", ["20/part-0.parquet", '"value"', "Float64"]),
    (reserved_name, "AL-0305", ["20/part-0.parquet", '"_op"']),
    (a_file_named_like_an_epoch, "AL-0204", ["in_p/20"]),
    (two_spellings, "AL-0202", ["020", "20"]),
]


@pytest.mark.parametrize("break_it, code, names", CASES, ids=[c[0].__name__ for c in CASES])
def test_bad_input_blocks_its_epoch_only(lake: Lake, break_it, code, names):
    lake.pipeline("other")
    lake.deliver(10, GOOD)
    lake.run()
    before = (lake.version("raw"), lake.version("main"), lake.main())
    break_it(lake)
    lake.deliver(30, [("a", 3, "U")])
    lake.deliver(10, GOOD, name="other")

    result = lake.run(code=1)
    assert code in result.err, result.err
    for name in names:
        assert name in result.err, f"{name} is not named:\n{result.err}"
    assert "help:" in result.err and "alluvium" in result.err
    # Sequential: the later epoch waits in raw, main is as before; the other pipeline went on.
    assert lake.version("main") == before[1] and lake.main() == before[2]
    assert lake.main("other") == {"a": 1, "b": 2}
    assert lake.states()[20] == "blocked"
    items = lake.alluvium("epochs", "p", "--state", "blocked", "-o", "json").json()
    assert [item["code"] for item in items] == [code]
    assert lake.alluvium("status").code == 3
    assert lake.alluvium("explain", code).out.startswith(f"# {code}")

    # The repair: the folder is delivered again, right.
    for path in [lake.folder(20), lake.folder("020")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    lake.deliver(20, [("b", 20, "U")])
    lake.run()
    assert lake.main() == {"a": 3, "b": 20}
    assert lake.alluvium("status").code == 0


def test_skipping_a_broken_first_epoch_lets_the_others_go_on(lake: Lake):
    truncate(lake)
    lake.deliver(30, GOOD)
    lake.run(code=1)
    assert lake.alluvium("skip", "p", "20", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 2}
    assert lake.states() == {20: "skipped", 30: "processed"}
    lake.run()
    assert lake.states() == {20: "skipped", 30: "processed"}


def test_a_null_key_goes_to_quarantine_with_its_row(lake: Lake):
    lake.deliver(10, [("a", 1, "U"), (None, 2, "U"), ("c", 3, None)])
    lake.run()
    assert lake.main() == {"a": 1, "c": 3}
    rows = lake.alluvium("query", "p", "SELECT * FROM quarantine", "-o", "json").json()
    assert [(r["_epoch"], r["_file"], r["_row"], r["reason"]) for r in rows] == [
        (10, "part-0.parquet", 1, "null_key")
    ]
    assert '"value":2' in rows[0]["row"]


def test_on_block_continue_merges_around_a_blocked_epoch(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_block = "continue"')
    truncate(lake)
    lake.deliver(30, [("a", 3, "U"), ("c", 3, "U")])
    lake.run(code=1)
    assert lake.main() == {"a": 3, "c": 3}
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "U")])
    lake.run()
    assert lake.main() == {"a": 3, "b": 2, "c": 3}


def test_an_epoch_that_hundreds_wait_for_is_read(tmp_path: Path):
    """There is a limit to what raw reads ahead of main; the epoch that stopped them all is below it."""
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    truncate(lake)
    for epoch in range(30, 440):
        lake.deliver(epoch, [(f"k{epoch}", epoch, "U")])
    lake.run(code=1)
    assert lake.main() == {"a": 1}
    lake.deliver(20, [("b", 2, "U")])
    lake.run()
    assert len(lake.main()) == 412


def test_a_damaged_delete_when_is_told_at_once_and_by_code(tmp_path: Path):
    lake = Lake(tmp_path)
    (tmp_path / "in_p").mkdir()
    lake.pipeline()
    lake.pipelines["p"] = lake.pipelines["p"].replace("op = 'D'", "no_such = 'D'")
    lake.configure()
    lake.deliver(10, GOOD)
    result = lake.run(code=1)
    assert "AL-0304" in result.err and "no_such" in result.err


def mounted(path: Path, options: str) -> bool:
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, check=False
    )
    return done.returncode == 0


def test_a_full_disk_is_named_and_the_job_ends_after_the_repair(lake: Lake):
    """Goal: nothing half-written on a full disk. Method: raw and main on a tiny tmpfs."""
    small = lake.root / "p"
    assert mounted(small, "size=8m"), "this test mounts a tmpfs: run it as root"
    try:
        lake.deliver(10, GOOD)
        lake.run()
        filler = small / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(os.urandom(4096))
            except OSError:
                pass
        lake.deliver(20, [(f"k{n}", n, "U") for n in range(5000)])
        result = lake.run(code=1, env={"ALLUVIUM_RUN__ATTEMPTS": "1"})
        assert "AL-0403" in result.err and "panicked" not in result.err, result.err
        assert lake.main() == {"a": 1, "b": 2}
        filler.unlink()
        lake.run()
        assert len(lake.main()) == 5002
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_read_only_disk_is_named_and_the_job_ends_after_the_repair(lake: Lake):
    small = lake.root / "p"
    assert mounted(small, "size=8m"), "this test mounts a tmpfs: run it as root"
    try:
        lake.deliver(10, GOOD)
        lake.run()
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        lake.deliver(20, [("a", 5, "U")])
        result = lake.run(code=1)
        assert "AL-0402" in result.err and "panicked" not in result.err, result.err
        assert lake.main() == {"a": 1, "b": 2}
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        lake.run()
        assert lake.main() == {"a": 5, "b": 2}
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_folder_that_cannot_be_listed_is_its_own_affair(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    folder = lake.deliver(20, [("a", 2, "U")])
    (folder / "loop").symlink_to(folder)
    blocked = lake.run(code=1)
    assert "AL-0301" in blocked.err and "20" in blocked.err, blocked.err
    assert lake.main() == {"a": 1} and lake.states() == {10: "processed", 20: "blocked"}
    (folder / "loop").unlink()
    lake.run()
    assert lake.main() == {"a": 2}


def test_a_manifest_that_is_not_fulfilled_reads_the_same_everywhere(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(ready='ready = { manifest = "m.json" }')
    folder = lake.deliver(10, [("a", 1, "U")], complete=False)
    (folder / "m.json").write_text('["part-0.parquet", "part-1.parquet"]')
    assert "not there yet" in lake.run().err
    assert lake.states() == {10: "incomplete"}
    plan = lake.alluvium("plan", "-o", "json").json()
    assert [item["action"] for item in plan if item["epoch"] == "10"] == ["wait"], plan
    (folder / "m.json").write_text("{")
    assert "AL-0206" in lake.run(code=1).err
    assert lake.states() == {10: "blocked"} and lake.alluvium("status").code == 3
    (folder / "m.json").write_text('["part-0.parquet"]')
    lake.run()
    assert lake.main() == {"a": 1}


def test_a_blocked_first_epoch_leaves_no_columns(lake: Lake):
    schema = pa.schema([("id", pa.string()), ("value", pa.int64()), ("verb", pa.string())])
    lake.deliver(10, [("a", 1, "U")], schema=schema)
    lake.deliver(20, [("a", 2, "U"), ("b", 2, "D")])
    assert "AL-0304" in lake.run(code=1).err
    assert lake.alluvium("skip", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 2}
