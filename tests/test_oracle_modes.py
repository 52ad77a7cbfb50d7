"""The modes' oracle against examples worked out by hand, and against mains that are wrong on purpose."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest

from delta_making import RAW, write_table

from oracle import Row, compare
from oracle_modes import ModeWorld, expected, frozen, main_of_raw, read_main_of
from oracle_reading import OracleError

KEY = ("pguid",)


def row(key: str | None, name: str | None, op: str = "upsert", seq: int | None = None, at: int = 0) -> Row:
    return Row(op, "f", at, {"pguid": key, "op": op[0], "seq": seq, "name": name})


def delete(key: str, seq: int | None = None, at: int = 0) -> Row:
    return row(key, "gone", "delete", seq, at)


def world(mode: str, sequence_by: str | None = None, **epochs: list[Row]) -> ModeWorld:
    """`e9=[...]` is epoch 9; `op` and `seq` stay in raw."""
    key = () if mode == "append" else KEY
    made = ModeWorld(key, sequence_by, ignore=("op", "seq"), mode=mode)
    for name, rows in epochs.items():
        made.set_content(int(name[1:]), rows)
    return made


# --- append -----------------------------------------------------------------------------------


def times(model: ModeWorld, *applied: int) -> dict[tuple, int]:
    """(epoch, key, name) → how often."""
    main = expected("append", model, applied)
    told = {(epoch, dict(values).get("pguid"), dict(values)["name"]) for epoch, values in main}
    assert len(told) == len(main)
    return {(e, dict(v).get("pguid"), dict(v)["name"]): c["times"] for (e, v), c in main.items()}


def test_append_keeps_every_row_and_its_epoch():
    rows = [row("a", "x"), row("a", "x", at=1), row(None, "y", at=2)]
    model = world("append", e9=rows, e10=[row("a", "x")])
    assert times(model, 9, 10) == {(9, "a", "x"): 2, (9, None, "y"): 1, (10, "a", "x"): 1}
    assert times(model, 10) == {(10, "a", "x"): 1}


def test_append_replaces_an_epochs_rows_and_reverts_nothing():
    model = world("append", e1=[row("a", "x"), row("b", "x", at=1)], e2=[row("a", "z")])
    model.set_content(1, [row("c", "x")])
    assert [said.op for said in model.content[1]] == ["upsert"]
    assert times(model, 1, 2) == {(1, "c", "x"): 1, (2, "a", "z"): 1}
    model.clear(1)
    assert model.content[1] == [] and times(model, 1, 2) == {(2, "a", "z"): 1}


# --- snapshot ---------------------------------------------------------------------------------


def names(model: ModeWorld, *applied: int) -> dict[str, str]:
    return {key[0]: columns["name"] for key, columns in expected("snapshot", model, applied).items()}


def test_snapshot_is_the_highest_applied_epoch():
    model = world("snapshot", e9=[row("a", "9"), row("b", "9", at=1)], e10=[row("b", "10")])
    assert names(model, 9) == {"a": "9", "b": "9"}
    assert names(model, 9, 10) == {"b": "10"}
    assert names(model, 10) == {"b": "10"} and names(model) == {}


def test_snapshot_has_the_last_row_of_a_key_and_no_deletes():
    rows = [row("a", "old", seq=1, at=1), row("a", "new", seq=2), row("b", "b", at=2), delete("b", at=3)]
    assert names(world("snapshot", "seq", e1=rows), 1) == {"a": "new"}
    assert names(world("snapshot", e1=[row("a", "a")], e2=[delete("a")]), 1, 2) == {}


def test_snapshot_without_the_newest_is_the_one_before():
    model = world("snapshot", e1=[row("a", "1")], e2=[row("b", "2")], e3=[])
    assert names(model, 1, 2, 3) == {"b": "2"}
    model.clear(2)
    assert names(model, 1, 2, 3) == {"a": "1"}
    model.set_content(2, [row("c", "2")])
    assert names(model, 1, 2, 3) == {"c": "2"}


# --- scd2 -------------------------------------------------------------------------------------


def versions(model: ModeWorld, *applied: int) -> set[tuple]:
    """(key, name, valid_from, valid_to), and that nothing else is in it."""
    main = expected("scd2", model, applied)
    for place, told in main.items():
        assert set(told) == {"pguid", "name", "valid_from", "valid_to", "is_current"}
        assert place == (told["pguid"], told["valid_from"])
        assert told["is_current"] == (told["valid_to"] is None)
    return {(v["pguid"], v["name"], v["valid_from"], v["valid_to"]) for v in main.values()}


def test_scd2_keeps_each_version_with_its_period():
    model = world("scd2", e9=[row("a", "9"), row("b", "b", at=1)], e10=[row("a", "10")])
    assert versions(model, 9, 10) == {("a", "9", 9, 10), ("a", "10", 10, None), ("b", "b", 9, None)}
    assert versions(model, 10) == {("a", "10", 10, None)}


def test_scd2_closes_by_a_delete_and_begins_again():
    model = world("scd2", e1=[row("a", "x")], e2=[delete("a")], e3=[delete("a")], e4=[row("a", "x")])
    assert versions(model, 1, 2, 3) == {("a", "x", 1, 2)}
    assert versions(model, 1, 2, 3, 4) == {("a", "x", 1, 2), ("a", "x", 4, None)}
    assert versions(model, 2, 3) == set()


@pytest.mark.parametrize("name", ["x", None])
def test_scd2_begins_nothing_with_equal_values(name: str | None):
    """Ignored columns are not in main, and so in no version."""
    model = world("scd2", e1=[row("a", name, seq=1)], e2=[row("a", name, seq=2)], e3=[row("a", "y")])
    assert versions(model, 1, 2) == {("a", name, 1, None)}
    assert versions(model, 1, 2, 3) == {("a", name, 1, 3), ("a", "y", 3, None)}


def test_scd2_is_split_by_an_epoch_between_and_joined_when_that_is_undone():
    model = world("scd2", e10=[row("a", "x")], e30=[row("a", "z")])
    joined = {("a", "x", 10, 30), ("a", "z", 30, None)}
    assert versions(model, 10, 30) == joined
    model.set_content(20, [row("a", "y")])
    assert versions(model, 10, 20, 30) == {("a", "x", 10, 20), ("a", "y", 20, 30), ("a", "z", 30, None)}
    model.set_content(20, [row("a", "z")])
    assert versions(model, 10, 20, 30) == {("a", "x", 10, 20), ("a", "z", 20, None)}
    model.clear(20)
    assert versions(model, 10, 20, 30) == joined


def test_scd2_counts_the_last_row_of_an_epoch_only():
    rows = [row("a", "new", seq=2), row("a", "old", seq=1, at=1)]
    assert versions(world("scd2", "seq", e1=rows), 1) == {("a", "new", 1, None)}
    assert versions(world("scd2", e1=rows), 1) == {("a", "old", 1, None)}
    assert versions(world("scd2", e1=[row("a", "x"), delete("a", at=1)]), 1) == set()


# --- values and tables ------------------------------------------------------------------------


def test_frozen_values_are_equal_by_meaning():
    assert frozen({"a": 1, "b": None}) == frozen({"a": 1.0})
    assert frozen({"a": math.nan}) == frozen({"a": float("nan")})
    different = [frozen({"a": value}) for value in (1, True, "1", math.nan, 0.0)]
    assert len(set(different)) == len(different)


MAINS = {
    "append": [{"_epoch": 1, "pguid": "a", "name": "x"}, {"_epoch": 1, "pguid": "a", "name": "x"},
               {"_epoch": 2, "pguid": "a", "name": "x"}],
    "snapshot": [{"pguid": "a", "name": "x"}],
    "scd2": [{"pguid": "a", "name": "x", "valid_from": 1, "valid_to": None, "is_current": True}],
}  # fmt: skip
SAID = {1: [row("a", "x"), row("a", "x", at=1)], 2: [row("a", "x")]}
TYPED = pa.schema(
    [("_epoch", pa.int64()), ("pguid", pa.string()), ("name", pa.string()), ("valid_from", pa.int64()),
     ("valid_to", pa.int64()), ("is_current", pa.bool_())]
)  # fmt: skip


def tables(path: Path, mode: str, main: list[dict]) -> Path:
    """Raw of what both epochs said, and this main."""
    schema = pa.schema([field for field in TYPED if any(field.name in told for told in MAINS[mode])])
    raw = [
        {"_epoch": epoch, "_op": said.op, "_file": "f", "_row": said.row, "_generation": 1, **said.columns}
        for epoch, rows in SAID.items()
        for said in rows
    ]
    write_table(path / "raw", raw, RAW, {f"{epoch}/ingest": 1 for epoch in SAID})
    write_table(path / "main", main, schema, {f"{epoch}/merge": 1 for epoch in SAID})
    return path


def by_raw(path: Path, mode: str) -> list[str]:
    key = () if mode == "append" else KEY
    return main_of_raw(mode, path / "raw", path / "main", "p", key, ignore=("op", "seq"))


@pytest.mark.parametrize("mode", MAINS)
def test_a_right_main_is_equal_by_the_model_and_by_raw(tmp_path: Path, mode: str):
    tables(tmp_path, mode, MAINS[mode])
    model = world(mode, **{f"e{epoch}": rows for epoch, rows in SAID.items()})
    assert compare(expected(mode, model, SAID), read_main_of(mode, tmp_path / "main", model.key)) == []
    assert by_raw(tmp_path, mode) == []


@pytest.mark.parametrize("mode", MAINS)
@pytest.mark.parametrize("damage", ["lost", "another value", "another place"])
def test_a_wrong_main_is_reported(tmp_path: Path, mode: str, damage: str):
    rows = [dict(told) for told in MAINS[mode]]
    if damage == "lost":
        rows.pop()
    elif damage == "another value":
        rows[-1]["name"] = "y"
    else:
        rows[-1] |= {"append": {"_epoch": 1}, "snapshot": {"pguid": "b"}, "scd2": {"valid_from": 2}}[mode]
    assert len(by_raw(tables(tmp_path, mode, rows), mode)) >= 2


def test_a_version_whose_period_contradicts_itself_is_reported(tmp_path: Path):
    [told] = MAINS["scd2"]
    assert by_raw(tables(tmp_path / "not", "scd2", [{**told, "is_current": False}]), "scd2")
    assert by_raw(tables(tmp_path / "ended", "scd2", [{**told, "valid_to": 2}]), "scd2")
    with pytest.raises(OracleError, match="two versions"):
        by_raw(tables(tmp_path / "twice", "scd2", [told, told]), "scd2")


def test_an_appended_row_without_its_epoch_is_an_error(tmp_path: Path):
    with pytest.raises(OracleError, match="without _epoch"):
        by_raw(tables(tmp_path, "append", [{"pguid": "a", "name": "x"}]), "append")


def test_a_mode_that_is_not_there_is_an_error():
    with pytest.raises(OracleError, match="no mode"):
        expected("upzert", world("upsert"), [])
