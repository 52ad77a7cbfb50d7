"""The oracle of the modes: what main is in append, snapshot and scd2, from the same model as upsert.

    append    every row of the applied epochs, with `_epoch`: a multiset
    snapshot  the last row of each key of the highest applied epoch that says anything
    scd2      per key the epochs' last rows in order; equal values begin nothing, a delete ends

Owns: one function a mode, reading such a main, the second statement over raw's content.
Calls: `oracle` for the model, for upsert and for comparing.
Never: uses product code, writes anything, or repairs what it finds.

Each mode gives a `Main`, so that one `compare` serves all: append has (epoch, values) with how often,
scd2 has (key, valid_from) with the version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import (
    DELETE,
    REVERT,
    Key,
    Main,
    Refused,
    Row,
    World,
    _sequence,
    applied_epochs,
    compare,
    epochs_needing_merge,
    expected_main,
    key_of,
    normal,
    read_main,
    world_from_raw,
)
from oracle_reading import Columns, OracleError, read_markers, read_table

UPSERT, APPEND, SNAPSHOT, SCD2 = "upsert", "append", "snapshot", "scd2"
MODES = (UPSERT, APPEND, SNAPSHOT, SCD2)
# What scd2 adds to the data columns.
PERIOD = ("valid_from", "valid_to", "is_current")


@dataclass
class ModeWorld(World):
    """A model that knows its mode. Where no row has a key there is nothing to revert."""

    mode: str = UPSERT

    def set_content(self, epoch: int, rows: Iterable[Row], refused: Refused | None = None) -> None:
        super().set_content(epoch, rows, refused)
        if self.mode == APPEND:
            self.content[epoch] = _said(self, epoch)


def expected(mode: str, model: World, applied: Iterable[int]) -> Main:
    """What main holds in this mode when exactly these epochs are applied."""
    match mode:
        case "append":
            return expected_append(model, applied)
        case "snapshot":
            return expected_snapshot(model, applied)
        case "scd2":
            return expected_scd2(model, applied)
        case "upsert":
            return expected_main(model, applied)
    raise OracleError(f"there is no mode {mode!r}")


def expected_append(model: World, applied: Iterable[int]) -> Main:
    """Every row as often as it came, by its epoch and its values."""
    return _counted(
        (epoch, _of_main(model, row)) for epoch in set(applied) for row in _said(model, epoch)
    )


def expected_snapshot(model: World, applied: Iterable[int]) -> Main:
    """The newest applied epoch alone. One that was undone or skipped says nothing."""
    speaking = [epoch for epoch in set(applied) if _said(model, epoch)]
    return expected_main(model, {max(speaking)} if speaking else set())


def expected_scd2(model: World, applied: Iterable[int]) -> Main:
    """(*key, valid_from) → the version's values with its period."""
    versions: Main = {}
    current: dict[Key, tuple[Columns, int]] = {}
    for epoch in sorted(set(applied)):
        for key, row in last_rows(model, epoch).items():
            values = None if row.op == DELETE else _of_main(model, row)
            known, since = current.get(key, (None, 0))
            if known is not None and values is not None and frozen(known) == frozen(values):
                continue
            if known is not None:
                versions[*key, since] |= {"valid_to": epoch, "is_current": False}
                del current[key]
            if values is not None:
                period = dict(zip(PERIOD, (epoch, None, True)))
                versions[*key, epoch] = {**values, **period}
                current[key] = (values, epoch)
    return versions


def last_rows(model: World, epoch: int) -> dict[Key, Row]:
    """The row of each key that counts within the epoch, deletes among them."""
    last: dict[Key, tuple[tuple[Any, ...], Row]] = {}
    for row in _said(model, epoch):
        place = (_sequence(row, model.sequence_by), row.file.encode(), row.row)
        key = key_of(row.columns, model.key)
        if key not in last or last[key][0] < place:
            last[key] = (place, row)
    return {key: row for key, (_, row) in last.items()}


def frozen(columns: Columns) -> tuple[tuple[str, Any], ...]:
    """Values that are equal exactly when they mean the same; a column that is NULL may lack."""
    values = {name: normal(value) for name, value in columns.items() if value is not None}
    told = {name: ("bool", value) if isinstance(value, bool) else value for name, value in values.items()}
    return tuple(sorted(told.items()))


def _said(model: World, epoch: int) -> list[Row]:
    return [row for row in model.content.get(epoch, []) if row.op != REVERT]


def _of_main(model: World, row: Row) -> Columns:
    return {name: value for name, value in row.columns.items() if name not in model.ignore}


def _counted(rows: Iterable[tuple[int, Columns]]) -> Main:
    times = Counter((epoch, frozen(columns)) for epoch, columns in rows)
    return {key: {"times": count} for key, count in times.items()}


# --- reading ----------------------------------------------------------------------------------


def read_main_of(mode: str, uri: str | Path, key: tuple[str, ...], version: int | None = None) -> Main:
    """Main as `expected` gives it. What contradicts the mode is an error, not a difference."""
    if mode in (UPSERT, SNAPSHOT):
        return read_main(uri, key, version)
    rows = read_table(uri, version)
    if mode == APPEND:
        return _counted(_with_epoch(uri, rows))
    main: Main = {}
    for columns in rows:
        place = (*key_of(columns, key), columns.get("valid_from"))
        if None in place:
            raise OracleError(f"main {uri} holds a version with NULL in its key or valid_from: {columns}")
        if place in main:
            raise OracleError(f"main {uri} holds two versions {place}: {main[place]} and {columns}")
        main[place] = columns
    return main


def _with_epoch(uri: str | Path, rows: list[Columns]) -> Iterable[tuple[int, Columns]]:
    for columns in rows:
        if columns.get("_epoch") is None:
            raise OracleError(f"main {uri} holds a row without _epoch: {columns}")
        yield columns["_epoch"], {name: value for name, value in columns.items() if name != "_epoch"}


def main_of_raw(
    mode: str,
    raw_uri: str | Path,
    main_uri: str | Path,
    pipeline_id: str,
    key: tuple[str, ...],
    sequence_by: str | None = None,
    ignore: tuple[str, ...] = (),
) -> list[str]:
    """Main against raw's content and main's own markers, as `oracle.main_from_raw` does for upsert."""
    markers = read_markers(main_uri)
    pending = epochs_needing_merge(markers, read_markers(raw_uri), pipeline_id)
    world = world_from_raw(raw_uri, key, sequence_by)
    world.ignore = ignore
    held = expected(mode, world, applied_epochs(markers, pipeline_id))
    return pending + compare(held, read_main_of(mode, main_uri, key))
