"""A processed folder that changes: told, or read again by itself; and columns that stay in raw."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deltalake import DeltaTable

from lake import Lake


def test_a_changed_folder_is_told_and_left_alone(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.deliver(10, [("a", 2, "U")])
    done = lake.run()
    assert "folder 10 changed after it was read; `alluvium replay p 10` reads it again" in done.err
    assert lake.main() == {"a": 1}


@pytest.mark.parametrize("ready", ['ready = { marker = "_SUCCESS" }', 'ready = { quiet = "1s" }'])
@pytest.mark.parametrize("change", ["new", "changed", "removed"])
def test_a_changed_folder_can_be_read_again_by_itself(tmp_path: Path, ready: str, change: str):
    """As a first reading would have given it: keys that vanished are taken back, newer values stay."""
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"', ready=ready)
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.deliver(10, [("c", 1, "U"), ("d", 1, "U")], file="part-1.parquet")
    lake.deliver(20, [("b", 5, "U")])
    lake.run()
    if change == "new":
        lake.deliver(10, [("e", 1, "U"), ("b", 1, "D")], file="part-2.parquet")
        expected = {"a": 1, "b": 5, "c": 1, "d": 1, "e": 1}
    elif change == "changed":
        lake.deliver(10, [("a", 2, "U")])
        expected = {"a": 2, "b": 5, "c": 1, "d": 1}
    else:
        (lake.folder(10) / "part-1.parquet").unlink()
        expected = {"a": 1, "b": 5}
    done = lake.run()
    assert "folder 10 changed after it was read; it is read again" in done.err
    assert lake.main() == expected
    assert lake.states() == {10: "processed", 20: "processed"}
    before = lake.version("raw"), lake.version("main")
    assert "changed" not in lake.run().err
    assert (lake.version("raw"), lake.version("main")) == before, "nothing more changed"


def test_what_somebody_left_out_stays_out(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    lake.deliver(10, [("a", 1, "U")])
    lake.deliver(20, [("b", 1, "U")])
    lake.run()
    assert lake.alluvium("skip", "p", "10", "--yes").code == 0
    lake.deliver(10, [("a", 2, "U")])
    lake.run()
    assert lake.main() == {"b": 1} and lake.states()[10] == "skipped"


def test_a_changed_folder_that_cannot_be_read_keeps_what_was_read(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
    done = lake.run(code=1)
    assert "AL-0301" in done.err and lake.main() == {"a": 1}
    lake.deliver(10, [("a", 3, "U")])
    lake.run()
    assert lake.main() == {"a": 3}


def test_a_folder_that_goes_while_it_settles_holds_nothing_up(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"', ready='ready = { quiet = "3s" }')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.deliver(10, [("a", 2, "U")])
    process = lake.start("run", "--once")
    first = process.stderr.readline()
    assert "folder 10 changed after it was read" in first
    shutil.rmtree(lake.folder(10))
    assert process.wait(60) == 0
    assert lake.main() == {"a": 1}


def test_two_folders_of_one_number_are_not_taken_for_each_other(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    lake.deliver("7", [("a", 1, "U")])
    lake.run()
    lake.deliver("007", [("b", 1, "U")])
    done = lake.run()
    assert lake.main() == {"a": 1}
    assert "read again" not in done.err
    assert "one epoch" in lake.alluvium("epochs", "p").out


def test_epochs_below_start_from_stay_as_they_are(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_changed = "replay"')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.pipeline(more='on_changed = "replay"\nstart_from = 20')
    lake.deliver(10, [("a", 2, "U")])
    lake.run()
    assert lake.main() == {"a": 1}


def columns(lake: Lake, table: str) -> list[str]:
    return [field.name for field in DeltaTable(lake.root / "p" / table).schema().fields]


def test_ignored_columns_stay_in_raw(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='columns = { ignore = ["OP"] }\nsequence_by = "value"')
    lake.deliver(10, [("a", 2, "U"), ("a", 1, "D"), ("b", 1, "U")])
    lake.run()
    lake.deliver(5, [("b", 9, "D"), ("c", 1, "U")])  # late
    lake.run()
    assert columns(lake, "main") == ["id", "value"] and "op" in columns(lake, "raw")
    assert lake.main() == {"a": 2, "b": 1, "c": 1}
    assert lake.alluvium("undo", "p", "10", "--yes").code == 0
    assert lake.main() == {"c": 1}
    done = lake.alluvium("lineage", "p", "--key", "c")
    assert done.code == 0, done.err


def test_another_set_of_ignored_columns_means_a_new_main(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    lake.pipeline(more='columns = { ignore = ["op"] }')
    done = lake.run(code=5)
    assert "AL-0106" in done.err and "columns.ignore" in done.err and "move main's folder away" in done.err
    # As the help says.
    (tmp_path / "p/main").rename(tmp_path / "old")
    lake.run()
    assert columns(lake, "main") == ["id", "value"] and lake.main() == {"a": 1}


def test_the_key_cannot_be_ignored(tmp_path: Path):
    done = Lake(tmp_path).pipeline(more='columns = { ignore = ["ID"] }').alluvium("config", "validate")
    assert done.code == 2 and "pipeline.p.columns.ignore" in done.err and "main needs it" in done.err
