"""The oracle against examples worked out by hand, and against mains that are wrong on purpose.

Goal: nobody has to trust the oracle. Method: each fold rule has one small example whose answer
is written down here, then every kind of damage to a right main must be reported.
"""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from delta_making import MAIN, RAW, checkpoint_and_forget, delete_by_vector, write_table

import oracle
from oracle import (
    Row,
    World,
    applied_epochs,
    compare,
    content_of,
    epochs_needing_merge,
    expected_main,
    main_from_raw,
    pipeline_ids,
    read_main,
)
from oracle_reading import (
    OracleError,
    SourceRow,
    list_epoch_folders,
    marker_disagreements,
    read_markers,
    read_source_folder,
    read_table,
    rows_of,
    table_exists,
)

KEY = ("pguid",)


def upsert(key: str, name: str, seq: int | None = None, file: str = "f", row: int = 0) -> Row:
    return Row("upsert", file, row, {"pguid": key, "op": "U", "seq": seq, "name": name})


def delete(key: str, seq: int | None = None, file: str = "f", row: int = 0) -> Row:
    return Row("delete", file, row, {"pguid": key, "op": "D", "seq": seq, "name": "gone"})


def world(sequence_by: str | None = None, **epochs: list[Row]) -> World:
    """`e9=[...]` is epoch 9."""
    made = World(KEY, sequence_by)
    for name, rows in epochs.items():
        made.set_content(int(name[1:]), rows)
    return made


def names(model: World, *applied: int, base: dict | None = None) -> dict[str, str]:
    """What main holds, as key → name."""
    main = expected_main(model, applied, base)
    return {key[0]: columns["name"] for key, columns in main.items()}


# --- the fold ---------------------------------------------------------------------------------


def test_a_later_epoch_updates_and_other_keys_stay():
    model = world(e1=[upsert("a", "a1"), upsert("b", "b1", row=1)], e2=[upsert("a", "a2")])
    assert names(model, 1, 2) == {"a": "a2", "b": "b1"}


def test_epochs_compare_as_numbers():
    model = world(e9=[upsert("a", "nine")], e10=[upsert("a", "ten")])
    assert names(model, 9, 10) == {"a": "ten"}


def test_only_applied_epochs_count():
    model = world(e1=[upsert("a", "a1")], e2=[upsert("a", "a2")])
    assert names(model, 1) == {"a": "a1"}
    assert names(model) == {}


def test_a_delete_removes_and_a_later_row_brings_back():
    model = world(e1=[upsert("a", "a1")], e2=[delete("a")], e3=[upsert("a", "a3")])
    assert names(model, 1, 2) == {}
    assert names(model, 1, 2, 3) == {"a": "a3"}


def test_a_late_epoch_below_a_delete_does_not_bring_the_key_back():
    model = world(e2=[delete("a")], e1=[upsert("a", "late"), upsert("b", "new", row=1)])
    assert names(model, 1, 2) == {"b": "new"}


def test_a_delete_of_a_key_that_never_was_inserts_nothing():
    assert names(world(e1=[delete("a")]), 1) == {}


def test_a_key_that_vanishes_in_a_replay_falls_back_to_the_earlier_epoch():
    model = world(e1=[upsert("a", "a1")], e2=[upsert("a", "a2"), upsert("b", "b2", row=1)])
    model.set_content(2, [upsert("c", "c2")])
    assert [(row.op, row.columns["pguid"]) for row in model.content[2]] == [
        ("upsert", "c"),
        ("revert", "a"),
        ("revert", "b"),
    ]
    assert names(model, 1, 2) == {"a": "a1", "c": "c2"}


def test_reverts_outlast_several_generations_and_end_when_the_key_returns():
    model = world(e2=[upsert("a", "a2")])
    model.clear(2)
    model.set_content(2, [upsert("b", "b2")])
    assert [row.op for row in model.content[2]] == ["upsert", "revert"]
    model.set_content(2, [upsert("a", "again")])
    assert [(row.op, row.columns["pguid"]) for row in model.content[2]] == [
        ("upsert", "a"),
        ("revert", "b"),
    ]


def test_an_undone_delete_gives_the_earlier_row_back():
    model = world(e1=[upsert("a", "a1")], e2=[delete("a")])
    model.clear(2)
    assert names(model, 1, 2) == {"a": "a1"}


def test_duplicates_in_an_epoch_the_last_file_then_the_last_row_wins():
    rows = [
        upsert("a", "row 1", file="part-2", row=1),
        upsert("a", "row 0", file="part-2", row=0),
        upsert("a", "ten", file="part-10", row=7),
    ]
    assert names(world(e1=rows), 1) == {"a": "row 1"}


@pytest.mark.parametrize(("low", "high"), [("B", "a"), ("a-b", "a/b"), ("z", "é"), ("a/b", "aa")])
def test_files_order_by_their_bytes(low: str, high: str):
    rows = [upsert("a", "high", file=high), upsert("a", "low", file=low, row=9)]
    assert names(world(e1=rows), 1) == {"a": "high"}


def test_sequence_by_rules_over_file_and_row_within_an_epoch():
    rows = [upsert("a", "new", seq=5, file="a"), upsert("a", "old", seq=4, file="z", row=9)]
    assert names(world("seq", e1=rows), 1) == {"a": "new"}
    assert names(world(None, e1=rows), 1) == {"a": "old"}


def test_sequence_by_does_not_reach_over_epochs():
    model = world("seq", e1=[upsert("a", "e1", seq=100)], e2=[upsert("a", "e2", seq=1)])
    assert names(model, 1, 2) == {"a": "e2"}


def test_ties_in_sequence_by_are_broken_by_file_then_row():
    rows = [
        upsert("a", "first", seq=5, file="a", row=9),
        upsert("a", "second", seq=5, file="b", row=0),
        upsert("a", "third", seq=5, file="b", row=1),
    ]
    assert names(world("seq", e1=rows), 1) == {"a": "third"}


def test_null_in_sequence_by_is_lowest_and_ties_with_null():
    rows = [upsert("a", "null", file="z"), upsert("a", "value", seq=-9, file="a")]
    assert names(world("seq", e1=rows), 1) == {"a": "value"}
    rows = [upsert("a", "first", row=0), upsert("a", "second", row=1)]
    assert names(world("seq", e1=rows), 1) == {"a": "second"}


def test_a_delete_that_loses_by_sequence_deletes_nothing():
    rows = [upsert("a", "kept", seq=2), delete("a", seq=1, row=1)]
    assert names(world("seq", e1=rows), 1) == {"a": "kept"}


def test_base_rows_hold_where_no_row_speaks():
    base = {("a",): {"name": "base a"}, ("b",): {"name": "base b"}, ("c",): {"name": "base c"}}
    model = world(e1=[upsert("a", "a1"), delete("b", row=1)])
    assert names(model, 1, base=base) == {"a": "a1", "c": "base c"}
    model.clear(1)
    assert names(model, 1, base=base) == {"a": "base a", "b": "base b", "c": "base c"}


def test_content_refuses_null_keys_and_reads_the_op_column():
    rows = [
        SourceRow("f", 0, {"pguid": None, "site": 1, "op": "I"}),
        SourceRow("f", 1, {"pguid": "a", "site": None, "op": "I"}),
        SourceRow("f", 2, {"pguid": "a", "site": 0, "op": "D"}),
        SourceRow("f", 3, {"pguid": "", "site": 0, "op": None}),
    ]
    content = content_of(rows, ("pguid", "site"))
    assert [(row.op, row.row) for row in content] == [("delete", 2), ("upsert", 3)]


# --- comparing values -------------------------------------------------------------------------


def test_equal_values_in_other_clothes_are_equal():
    berlin = dt.timezone(dt.timedelta(hours=1))
    left = {"f": math.nan, "i": 1, "t": dt.datetime(2020, 1, 1, 1, tzinfo=berlin), "n": None}
    right = {"f": math.nan, "i": 1.0, "t": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)}
    assert compare({("a",): left}, {("a",): right}) == []


@pytest.mark.parametrize(
    ("left", "right"),
    [(math.nan, None), (math.nan, 0.0), (True, 1), ("1", 1), ("", None), ("a", "a "), (0.1, 0.2)],
)
def test_different_values_are_different(left: object, right: object):
    assert len(compare({("a",): {"v": left}}, {("a",): {"v": right}})) == 2


def test_many_differences_are_counted_and_every_kind_is_shown():
    expected = {(n,): {"v": n} for n in range(100)}
    actual = {(n,): {"v": n + (n % 2)} for n in range(50, 150)}
    lines = compare(expected, actual)
    assert lines[0].startswith("50 missing, 50 unexpected, 25 different")
    assert len(lines) == 12 and lines[-1] == "... and 115 more"
    assert {line.split()[0] for line in lines[1:-1]} == {"missing", "unexpected", "different"}


def test_nanoseconds_are_cut_as_delta_cuts_them():
    column = pa.array([1_234_567_891_234_567_891], pa.timestamp("ns", tz="UTC"))
    (row,) = rows_of(pa.table({"t": column}))
    assert row["t"].microsecond == 234567


# --- reading ----------------------------------------------------------------------------------


def test_a_folder_is_read_with_names_and_physical_positions(tmp_path: Path):
    for name in ("b.parquet", "sub/a.parquet", "_temporary/x.parquet", ".x.parquet", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"v": [name, name, name]}), tmp_path / name, row_group_size=2)
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "b.parquet.crc").touch()
    rows = read_source_folder(tmp_path)
    assert [(row.file, row.row) for row in rows] == [
        (name, at) for name in ("b.parquet", "sub/a.parquet") for at in range(3)
    ]
    assert all(row.columns["v"] == row.file for row in rows)
    assert rows == read_source_folder(tmp_path.as_uri())


def test_epoch_folders_are_the_numeric_ones_with_data(tmp_path: Path):
    for name in ("7/x.parquet", "010/x.parquet", "backup/x.parquet", "8/_SUCCESS"):
        (tmp_path / name).parent.mkdir()
        pq.write_table(pa.table({"v": [1]}), tmp_path / name)
    (tmp_path / "9").mkdir()
    assert list_epoch_folders(tmp_path) == {7: "7", 10: "010"}
    (tmp_path / "07").mkdir()
    pq.write_table(pa.table({"v": [1]}), tmp_path / "07/x.parquet")
    with pytest.raises(OracleError, match="one epoch"):
        list_epoch_folders(tmp_path)


def test_a_duplicate_or_null_key_in_main_is_an_error(tmp_path: Path):
    write_table(tmp_path / "twice", [{"pguid": "a"}, {"pguid": "b"}, {"pguid": "a"}])
    with pytest.raises(OracleError, match="1 keys more than once.*'a'.*x2"):
        read_main(tmp_path / "twice", KEY)
    write_table(tmp_path / "null", [{"pguid": None}])
    with pytest.raises(OracleError, match="NULL in its key"):
        read_main(tmp_path / "null", KEY)


def test_no_table_is_an_error_and_not_an_empty_main(tmp_path: Path):
    assert not table_exists(tmp_path / "none")
    for read in (lambda at: read_main(at, KEY), read_markers):
        with pytest.raises(OracleError, match="no Delta table"):
            read(tmp_path / "none")


@pytest.mark.parametrize("remote", [False, True], ids=["path", "uri"])
def test_rows_behind_a_deletion_vector_are_gone(tmp_path: Path, remote: bool):
    write_table(tmp_path / "t", [{"pguid": key, "name": key} for key in "abcde"])
    delete_by_vector(tmp_path / "t", [1, 3])
    main = read_main((tmp_path / "t").as_uri() if remote else tmp_path / "t", KEY)
    assert sorted(key for (key,) in main) == ["a", "c", "e"]
    assert sorted(key for (key,) in read_main(tmp_path / "t", KEY, version=0)) == list("abcde")


def test_markers_come_from_commits_and_from_checkpoints(tmp_path: Path):
    table = tmp_path / "t"
    write_table(table, [{"pguid": "a"}], markers={"1/merge": 1, "2/merge": 7})
    write_table(table, [{"pguid": "b"}], markers={"1/merge": 2, "1/wanted": 2})
    assert marker_disagreements(table) == []
    checkpoint_and_forget(table)
    # The latest counts, not the highest.
    write_table(table, [{"pguid": "c"}], markers={"2/merge": 3, "alluvium/p/maintenance": 1})
    assert (
        read_markers(table)
        == read_markers(table.as_uri())
        == {
            "alluvium/p/1/merge": 2,
            "alluvium/p/1/wanted": 2,
            "alluvium/p/2/merge": 3,
            "alluvium/p/maintenance": 1,
        }
    )


def test_a_gap_in_the_log_is_an_error(tmp_path: Path):
    for key in "abc":
        write_table(tmp_path / "t", [{"pguid": key}])
    (tmp_path / "t/_delta_log" / f"{1:020}.json").unlink()
    with pytest.raises(OracleError, match=r"lacks commits \[1\]"):
        read_markers(tmp_path / "t")


def test_a_checkpoint_that_lost_a_marker_is_named(tmp_path: Path):
    for name, epochs in (("right", (1, 2)), ("wrong", (1, 3))):
        for epoch in epochs:
            write_table(tmp_path / name, [], markers={f"{epoch}/merge": 1})
    DeltaTable(str(tmp_path / "wrong")).create_checkpoint()
    checkpoint = f"_delta_log/{1:020}.checkpoint.parquet"
    (tmp_path / "wrong" / checkpoint).rename(tmp_path / "right" / checkpoint)
    assert marker_disagreements(tmp_path / "right") == [
        "marker alluvium/p/2/merge: None by the checkpoint, 1 by the commits",
        "marker alluvium/p/3/merge: 1 by the checkpoint, None by the commits",
    ]


def test_applied_means_merged_at_or_above_wanted():
    main = {
        "alluvium/p/1/merge": 1,
        "alluvium/p/2/merge": 1,
        "alluvium/p/2/wanted": 2,
        "alluvium/p/3/merge": 2,
        "alluvium/p/3/wanted": 2,
        "alluvium/p/4/wanted": 1,
        "alluvium/other/5/merge": 1,
        "alluvium/p/maintenance": 9,
    }
    raw = {f"alluvium/p/{epoch}/ingest": version for epoch, version in [(1, 2), (3, 2), (6, 1)]}
    assert applied_epochs(main, "p") == {1, 3}
    assert pipeline_ids(main) == {"p", "other"}
    pending = epochs_needing_merge(main, raw, "p")
    assert [line.split()[1] for line in pending] == ["1", "2", "4", "6"]


# --- raw and markers, and the command line ----------------------------------------------------

# Two epochs: 9 says a, b, c; 10 updates a, deletes b, and reverts what it once said of c.
FOLDERS = {
    9: [("a", "I", 1), ("b", "I", 1), ("c", "I", 1)],
    10: [("a", "U", 2), ("b", "D", 2), ("a", "U", 1)],
}
RIGHT = {"a": ("U", 2, "10/0"), "c": ("I", 1, "9/2")}


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Source, raw and main that agree."""
    raw = []
    for epoch, rows in FOLDERS.items():
        columns = [
            {"pguid": key, "op": op, "seq": seq, "name": f"{epoch}/{at}"}
            for at, (key, op, seq) in enumerate(rows)
        ]
        folder = tmp_path / "incoming" / str(epoch)
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(columns, schema=MAIN), folder / "f.parquet")
        raw += [
            {
                "_epoch": epoch,
                "_op": "delete" if row["op"] == "D" else "upsert",
                "_file": "f.parquet",
                "_row": at,
                "_generation": 1,
                **row,
            }
            for at, row in enumerate(columns)
        ]
    raw.append({"_epoch": 10, "_op": "revert", "_generation": 1, "pguid": "c"})
    write_table(tmp_path / "raw", raw, RAW, {"9/ingest": 1, "10/ingest": 1})
    write_main(tmp_path, RIGHT, {"9/merge": 1, "10/merge": 1})
    return tmp_path


def write_main(lake: Path, rows: dict, markers: dict[str, int]) -> None:
    made = [
        {"pguid": key, "op": op, "seq": seq, "name": name} for key, (op, seq, name) in rows.items()
    ]
    write_table(lake / "main", made, MAIN, markers, mode="overwrite")


def check_command(lake: Path, *more: str) -> int:
    where = [f"--{name}={lake / name}" for name in ("main", "raw")]
    fixed = ["--pipeline", "p", "--key", "pguid", "--sequence-by", "seq", "--delete-when-op"]
    return oracle.main(["check", f"--source={lake / 'incoming'}", *where, *fixed, *more])


def by_raw(lake: Path) -> list[str]:
    return main_from_raw(lake / "raw", lake / "main", "p", KEY, "seq")


def test_a_right_main_is_equal_by_source_and_by_raw(lake: Path, capsys: pytest.CaptureFixture):
    assert by_raw(lake) == []
    assert check_command(lake) == 0
    assert check_command(lake, "--expect-epochs", "9,10") == 0
    assert capsys.readouterr().out.splitlines() == ["oracle: 2 rows, 2 epochs: equal"] * 2


WRONG_MAINS = {
    "a lost row": {"a": RIGHT["a"]},
    "a deleted key that stayed": {**RIGHT, "b": ("I", 1, "9/1")},
    "a delete applied as an upsert": {**RIGHT, "b": ("D", 2, "10/1")},
    "the loser by sequence": {**RIGHT, "a": ("U", 1, "10/2")},
    "the older epoch's row": {**RIGHT, "a": ("I", 1, "9/0")},
    "a revert taken for a delete": {"a": RIGHT["a"]},
    "one column off": {**RIGHT, "c": ("I", 1, "9/2 ")},
    "a column lost": {**RIGHT, "c": ("I", None, "9/2")},
    "nothing": {},
}


@pytest.mark.parametrize("rows", WRONG_MAINS.values(), ids=WRONG_MAINS.keys())
def test_a_wrong_main_is_reported_both_ways(lake: Path, rows: dict, capsys):
    write_main(lake, rows, {})
    assert len(by_raw(lake)) >= 2
    assert check_command(lake) == 1
    told = capsys.readouterr().out
    assert "by source: " in told and "by raw: " in told and "equal" not in told


def test_a_doubled_row_is_reported(lake: Path, capsys):
    write_table(lake / "main", [{"pguid": "c", "op": "I", "seq": 1, "name": "9/2"}])
    assert check_command(lake) == 1
    assert "more than once" in capsys.readouterr().out


def test_a_marker_without_its_data_is_reported(lake: Path, capsys):
    """Main holds epoch 9 only, and its markers claim 10 as well."""
    rows = {key: (op, seq, f"9/{at}") for at, (key, op, seq) in enumerate(FOLDERS[9])}
    write_main(lake, rows, {})
    assert by_raw(lake)[0].startswith("0 missing, 1 unexpected, 1 different")
    assert check_command(lake) == 1


def test_a_raised_wanted_takes_the_epoch_out_again(lake: Path, capsys):
    rows = {key: (op, seq, f"9/{at}") for at, (key, op, seq) in enumerate(FOLDERS[9])}
    write_main(lake, rows, {"10/wanted": 2})
    assert by_raw(lake) == ["epoch 10 needs a merge: ingest 1, wanted 2, merge 1"]
    assert check_command(lake) == 1
    assert "applied epochs: missing [10], unexpected []" in capsys.readouterr().out


def test_raw_that_ran_ahead_is_named(lake: Path):
    write_table(lake / "raw", [], RAW, {"9/ingest": 2})
    assert by_raw(lake) == ["epoch 9 needs a merge: ingest 2, wanted None, merge 1"]


def test_a_skipped_epoch_is_applied_with_empty_content(lake: Path, capsys):
    rows = {key: (op, seq, f"9/{at}") for at, (key, op, seq) in enumerate(FOLDERS[9])}
    nine = [row for row in read_table(lake / "raw") if row["_epoch"] == 9]
    write_table(lake / "raw", nine, RAW, {"10/ingest": 2}, mode="overwrite")
    write_main(lake, rows, {"10/merge": 2})
    assert check_command(lake, "--skip-epochs", "10") == 0
    assert capsys.readouterr().out == "oracle: 3 rows, 2 epochs: equal\n"
    assert check_command(lake) == 1


def test_an_epoch_that_should_not_be_applied_is_named(lake: Path, capsys):
    assert check_command(lake, "--expect-epochs", "9") == 1
    assert "applied epochs: missing [], unexpected [10]" in capsys.readouterr().out
    assert check_command(lake, "--expect-epochs", "9,10,11") == 1
    assert "no folder for epochs [11]" in capsys.readouterr().out
