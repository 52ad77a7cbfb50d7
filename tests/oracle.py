"""The oracle: "what main is", written from the rule alone, to hold the product against.

    main = base, then per key the last non-revert row by (epoch, sequence_by, _file, _row) over
    the applied epochs; delete = absent; no row = base's value. NULL in sequence_by is lowest.

Owns: the rule (`expected_main`), the comparison (`compare`), the second statement over raw's
content and the markers (`main_from_raw`), and `check` on the command line.
Calls: `oracle_reading` for files, tables and markers.
Never: uses product code, asks the ledger, writes anything, or repairs what it finds.

    python tests/oracle.py check --source DIR --main URI --raw URI --pipeline ID --key a,b
"""

from __future__ import annotations

import argparse
import datetime as dt
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oracle_reading import (
    INCLUDE_DEFAULT,
    Columns,
    OracleError,
    SourceRow,
    list_epoch_folders,
    read_markers,
    read_source_folder,
    read_table,
)

Key = tuple[Any, ...]
Main = dict[Key, Columns]
Refused = dict[tuple[str, int], str]

UPSERT, DELETE, REVERT = "upsert", "delete", "revert"
SYSTEM_COLUMNS = ("_epoch", "_op", "_file", "_row", "_generation", "_ingested_at")
SHOWN_MAX = 10
_APP_ID = re.compile(r"alluvium/(.+)/(\d+)/(ingest|merge|wanted)")


# --- the model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of an epoch's content, as raw would hold it."""

    op: str
    file: str
    row: int
    columns: Columns


@dataclass
class World:
    """What every epoch says now: epoch → rows at the current generation, reverts included."""

    key: tuple[str, ...]
    sequence_by: str | None = None
    content: dict[int, list[Row]] = field(default_factory=dict)
    # Columns that stay in raw.
    ignore: tuple[str, ...] = ()
    # Epoch → (file, row) → why the row is not content.
    refused: dict[int, Refused] = field(default_factory=dict)

    def set_content(self, epoch: int, rows: Iterable[Row], refused: Refused | None = None) -> None:
        """The epoch's next generation. Keys that an earlier generation had become reverts."""
        self.refused[epoch] = refused or {}
        rows = list(rows)
        earlier = {key_of(row.columns, self.key) for row in self.content.get(epoch, [])}
        present = {key_of(row.columns, self.key) for row in rows}
        vanished = sorted(earlier - present, key=repr)
        reverts = [Row(REVERT, "", -1, dict(zip(self.key, key))) for key in vanished]
        self.content[epoch] = rows + reverts

    def clear(self, epoch: int) -> None:
        """Undo and skip: empty content at the next generation."""
        self.set_content(epoch, [])


class Unfit(str):
    """Why a row is refused: in place of a value that its column cannot hold, or of all its columns."""


def op_column_deletes(columns: Columns) -> bool:
    """`delete_when = "op = 'D'"` in Python; a NULL op is not a delete."""
    return columns.get("op") == "D"


def never_deletes(columns: Columns) -> bool:
    """No `delete_when` configured."""
    return False


def content_of(
    rows: Iterable[SourceRow],
    key: tuple[str, ...],
    delete_when: Callable[[Columns], bool] = op_column_deletes,
) -> list[Row]:
    """An epoch's content. Rows with NULL in a key column are refused: they are in quarantine."""
    return [
        Row(DELETE if delete_when(row.columns) else UPSERT, row.file, row.row, row.columns)
        for row in rows
        if all(row.columns.get(column) is not None for column in key)
    ]


@dataclass(frozen=True)
class Demands:
    """What a row must be, beyond having a key: named conditions, in order, and keys that occur once."""

    conditions: tuple[tuple[str, Callable[[Columns], bool | None]], ...] = ()
    refuse_duplicates: bool = False


def judged(
    rows: Iterable[SourceRow],
    key: tuple[str, ...],
    sequence_by: str | None,
    demands: Demands,
    delete_when: Callable[[Columns], bool] = op_column_deletes,
) -> tuple[list[Row], Refused]:
    """An epoch's content, and what is refused: what does not fit, then a NULL key, then the first
    condition that is not true, then all but the last row of a key."""
    rows = list(rows)
    refused: Refused = {}
    for row in rows:
        if unfit := next((v for v in row.columns.values() if isinstance(v, Unfit)), None):
            refused[row.file, row.row] = str(unfit)
            continue
        if any(row.columns.get(column) is None for column in key):
            refused[row.file, row.row] = "null_key"
            continue
        failing = (name for name, holds in demands.conditions if holds(row.columns) is not True)
        if name := next(failing, None):
            refused[row.file, row.row] = f"expect:{name}"
    content = [row for row in content_of(rows, key, delete_when) if (row.file, row.row) not in refused]
    if not demands.refuse_duplicates:
        return content, refused
    last: dict[Key, tuple] = {}
    for row in content:
        place = (_sequence(row, sequence_by), row.file.encode(), row.row)
        last[key_of(row.columns, key)] = max(place, last.get(key_of(row.columns, key), place))
    kept = []
    for row in content:
        if last[key_of(row.columns, key)] == (_sequence(row, sequence_by), row.file.encode(), row.row):
            kept.append(row)
        else:
            refused[row.file, row.row] = "duplicate_key"
    return kept, refused


def key_of(columns: Columns, key: tuple[str, ...]) -> Key:
    """The key values of a row, in the order of the key's columns."""
    return tuple(normal(columns.get(column)) for column in key)


# --- the rule ---------------------------------------------------------------------------------


def expected_main(
    model: World, applied_epochs: Iterable[int], base_rows: Mapping[Key, Columns] | None = None
) -> Main:
    """The one rule: what main holds when exactly these epochs are applied."""
    winners: dict[Key, tuple[tuple[Any, ...], Row]] = {}
    for epoch in set(applied_epochs):
        for row in model.content.get(epoch, []):
            if row.op == REVERT:
                continue
            place = (epoch, _sequence(row, model.sequence_by), row.file.encode(), row.row)
            key = key_of(row.columns, model.key)
            if key not in winners or winners[key][0] < place:
                winners[key] = (place, row)
    main: Main = dict(base_rows or {})
    for key, (_, row) in winners.items():
        if row.op == DELETE:
            main.pop(key, None)
        else:
            main[key] = {k: v for k, v in row.columns.items() if k not in model.ignore}
    return main


def _sequence(row: Row, sequence_by: str | None) -> tuple[int, Any]:
    """Orders rows within an epoch: NULL, then values, then NaN (as Arrow sorts floats)."""
    value = row.columns.get(sequence_by) if sequence_by else None
    if value is None:
        return (0, 0)
    if isinstance(value, float) and math.isnan(value):
        return (2, 0)
    return (1, value)


def read_main(uri: str | Path, key: tuple[str, ...], version: int | None = None) -> Main:
    """Main as key → row. A key that stands twice, or is NULL, is an error, not a difference."""
    main: Main = {}
    twice: dict[Key, int] = {}
    for columns in read_table(uri, version):
        own = {name: value for name, value in columns.items() if name not in SYSTEM_COLUMNS}
        found = key_of(own, key)
        if any(value is None for value in found):
            raise OracleError(f"main {uri} holds a row with NULL in its key: {own}")
        if found in main:
            twice[found] = twice.get(found, 1) + 1
        main[found] = own
    if twice:
        shown = ", ".join(f"{found} x{n}" for found, n in list(twice.items())[:SHOWN_MAX])
        raise OracleError(f"main {uri} holds {len(twice)} keys more than once: {shown}")
    return main


# --- comparing --------------------------------------------------------------------------------


def compare(expected: Mapping[Key, Columns], actual: Mapping[Key, Columns]) -> list[str]:
    """Differences for people: the counts first, then about ten of them. Empty when equal."""
    missing = [key for key in expected if key not in actual]
    extra = [key for key in actual if key not in expected]
    changed = {}
    for key in expected.keys() & actual.keys():
        if columns := _different_columns(expected[key], actual[key]):
            changed[key] = columns
    total = len(missing) + len(extra) + len(changed)
    if not total:
        return []
    lines = [f"missing {key}: expected {expected[key]}" for key in sorted(missing, key=repr)]
    lines += [f"unexpected {key}: found {actual[key]}" for key in sorted(extra, key=repr)]
    for key in sorted(changed, key=repr):
        parts = [
            f"{name} expected {expected[key].get(name)!r} found {actual[key].get(name)!r}"
            for name in changed[key]
        ]
        lines.append(f"different {key}: {'; '.join(parts)}")
    counts = f"{len(missing)} missing, {len(extra)} unexpected, {len(changed)} different"
    head = f"{counts} (expected {len(expected)} rows, found {len(actual)})"
    rest = [f"... and {total - SHOWN_MAX} more"] if total > SHOWN_MAX else []
    # A few of every kind: the first kind must not hide the others.
    return [head, *_spread(lines, len(missing), len(extra)), *rest]


def _spread(lines: list[str], missing: int, extra: int) -> list[str]:
    """At most SHOWN_MAX lines, taken in turn from the three kinds."""
    ends = (0, missing, missing + extra, len(lines))
    kinds = [lines[ends[at] : ends[at + 1]] for at in range(3)]
    longest = max(map(len, kinds))
    in_turn = [kind[at] for at in range(longest) for kind in kinds if at < len(kind)]
    chosen = set(in_turn[:SHOWN_MAX])
    return [line for line in lines if line in chosen]


def _different_columns(expected: Columns, actual: Columns) -> list[str]:
    """Names of the columns that differ; a column that one side lacks counts as NULL there."""
    names = dict.fromkeys([*expected, *actual])
    return [name for name in names if not same_value(expected.get(name), actual.get(name))]


def same_value(left: Any, right: Any) -> bool:
    """Equal as values: NaN equals NaN, 1 equals 1.0, True does not equal 1, instants by UTC."""
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    return normal(left) == normal(right)


def normal(value: Any) -> Any:
    """A value that compares and hashes by meaning."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN (not a number)"
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(dt.timezone.utc)
    if isinstance(value, dict):
        return tuple((name, normal(value[name])) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(normal(item) for item in value)
    return value


# --- markers ----------------------------------------------------------------------------------


def step_markers(markers: Mapping[str, int], pipeline_id: str, step: str) -> dict[int, int]:
    """Epoch → generation for one of ingest, merge, wanted."""
    found = {}
    for app, version in markers.items():
        match = _APP_ID.fullmatch(app)
        if match and match[1] == pipeline_id and match[3] == step:
            found[int(match[2])] = version
    return found


def pipeline_ids(markers: Mapping[str, int]) -> set[str]:
    """All pipeline ids that have epoch markers here."""
    return {match[1] for app in markers if (match := _APP_ID.fullmatch(app))}


def applied_epochs(main_markers: Mapping[str, int], pipeline_id: str) -> set[int]:
    """Applied: merge exists and is at or above wanted (default 0)."""
    wanted = step_markers(main_markers, pipeline_id, "wanted")
    merged = step_markers(main_markers, pipeline_id, "merge")
    return {epoch for epoch, at in merged.items() if at >= wanted.get(epoch, 0)}


def epochs_needing_merge(
    main_markers: Mapping[str, int], raw_markers: Mapping[str, int], pipeline_id: str
) -> list[str]:
    """Epochs whose merge is missing or below max(ingest, wanted), one sentence each."""
    ingested = step_markers(raw_markers, pipeline_id, "ingest")
    wanted = step_markers(main_markers, pipeline_id, "wanted")
    merged = step_markers(main_markers, pipeline_id, "merge")
    lines = []
    for epoch in sorted(ingested.keys() | wanted.keys() | merged.keys()):
        ask = max(ingested.get(epoch, 0), wanted.get(epoch, 0))
        if epoch not in merged or merged[epoch] < ask:
            lines.append(
                f"epoch {epoch} needs a merge: ingest {ingested.get(epoch)}, "
                f"wanted {wanted.get(epoch)}, merge {merged.get(epoch)}"
            )
    return lines


# --- the second statement ---------------------------------------------------------------------


def world_from_raw(
    raw_uri: str | Path, key: tuple[str, ...], sequence_by: str | None = None
) -> World:
    """Raw's content as a model: `_epoch`, `_op`, `_file`, `_row` are taken at their word."""
    world = World(key, sequence_by)
    for columns in read_table(raw_uri):
        if columns["_op"] not in (UPSERT, DELETE, REVERT):
            raise OracleError(f"raw {raw_uri} holds _op {columns['_op']!r}")
        own = {name: value for name, value in columns.items() if name not in SYSTEM_COLUMNS}
        file, at = columns["_file"] or "", columns["_row"]
        row = Row(columns["_op"], file, -1 if at is None else at, own)
        world.content.setdefault(int(columns["_epoch"]), []).append(row)
    return world


def main_from_raw(
    raw_uri: str | Path,
    main_uri: str | Path,
    pipeline_id: str,
    key: tuple[str, ...],
    sequence_by: str | None = None,
    base_rows: Mapping[Key, Columns] | None = None,
    ignore: tuple[str, ...] = (),
) -> list[str]:
    """Main against raw's content and main's own markers; differences as `compare` gives them.

    An epoch that still needs a merge is named first: then raw speaks of a generation that main
    has not seen, and the rest of the comparison says little.
    """
    markers = read_markers(main_uri)
    pending = epochs_needing_merge(markers, read_markers(raw_uri), pipeline_id)
    world = world_from_raw(raw_uri, key, sequence_by)
    world.ignore = ignore
    expected = expected_main(world, applied_epochs(markers, pipeline_id), base_rows)
    return pending + compare(expected, read_main(main_uri, key))


# --- command line -----------------------------------------------------------------------------


def check(args: argparse.Namespace) -> list[str]:
    """Everything the command line checks; prints the good news itself when there is no bad."""
    key = tuple(args.key.split(","))
    folders = list_epoch_folders(args.source, args.include)
    skipped = _numbers(args.skip_epochs)
    wanted = set(folders) | skipped
    if args.expect_epochs != "all":
        wanted = _numbers(args.expect_epochs)
    lacking = sorted(wanted - set(folders) - skipped)
    if lacking:
        return [f"the source has no folder for epochs {lacking}"]

    model = World(key, args.sequence_by)
    delete_when = op_column_deletes if args.delete_when_op else never_deletes
    for epoch in sorted(wanted - skipped):
        folder = f"{args.source.rstrip('/')}/{folders[epoch]}"
        rows = read_source_folder(folder, args.include)
        model.set_content(epoch, content_of(rows, key, delete_when))

    base = None
    if args.base_version is not None:
        base = read_main(args.main, key, args.base_version)
    applied = applied_epochs(read_markers(args.main), args.pipeline)
    lines = []
    if applied != wanted:
        lines.append(
            f"applied epochs: missing {sorted(wanted - applied)}, "
            f"unexpected {sorted(applied - wanted)}"
        )
    main = read_main(args.main, key)
    lines += [f"by source: {line}" for line in compare(expected_main(model, wanted, base), main)]
    by_raw = main_from_raw(args.raw, args.main, args.pipeline, key, args.sequence_by, base)
    lines += [f"by raw: {line}" for line in by_raw]
    if not lines:
        print(f"oracle: {len(main)} rows, {len(applied)} epochs: equal")
    return lines


def _numbers(text: str) -> set[int]:
    return {int(part) for part in text.split(",") if part}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="oracle.py", description="Is main what it must be?")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("check", help="compare main with the source folders and with raw")
    verb.add_argument("--source", required=True, help="the folder that holds the epoch folders")
    verb.add_argument("--main", required=True, help="path or URI of the main table")
    verb.add_argument("--raw", required=True, help="path or URI of the raw table")
    verb.add_argument("--pipeline", required=True, help="pipeline id, as the markers carry it")
    verb.add_argument("--key", required=True, help="key columns, separated by commas")
    verb.add_argument("--sequence-by", help="orders rows within an epoch")
    verb.add_argument("--delete-when-op", action="store_true", help="rows with op = 'D' delete")
    verb.add_argument("--skip-epochs", default="", help="applied, but with empty content")
    verb.add_argument("--expect-epochs", default="all", help="all, or the exact epochs applied")
    verb.add_argument("--include", default=INCLUDE_DEFAULT, help="which files hold rows")
    verb.add_argument("--base-version", type=int, help="version of main when it was adopted")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit 0 when equal, 1 with the differences."""
    try:
        lines = check(_arguments(argv))
    except OracleError as error:
        lines = [str(error)]
    for line in lines:
        print(f"oracle: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
