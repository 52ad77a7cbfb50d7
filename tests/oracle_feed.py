"""The oracle of the change feed: what a reader of the changes alone would hold, against main itself.

    base, then commit by commit: take out deletes and preimages, put in inserts and postimages = main

Owns: the fold (`fold`), the statements about a feed (`check_feed`), and two ways to read it: by Python
deltalake, as its users do, and straight from the log and the files, as the protocol says.
Never: uses product code, writes anything, or asks what a change was meant to be.

Deltalake 1.6.6 does not decode the paths of change files: below a partition folder whose value has special
characters it finds none of them (`BY_LOG` reads those).
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from oracle import compare, key_of
from oracle_modes import frozen
from oracle_reading import Columns, OracleError, read_table, rows_of
from oracle_vectors import deleted_rows

ENABLED = "delta.enableChangeDataFeed"
TAKES, GIVES = ("delete", "update_preimage"), ("insert", "update_postimage")
# What a key may do in one commit.
NET = (("delete",), ("insert",), ("update_postimage", "update_preimage"))
Held = Counter[tuple]


@dataclass(frozen=True)
class Change:
    """One row of the feed. `told`: it stands in a change file, and was not derived from data files."""

    version: int
    kind: str
    columns: Columns
    told: bool = True


# --- reading ----------------------------------------------------------------------------------


def feed_begins(table: str | Path) -> int | None:
    """The version since which the feed is on without a gap; None when it is off now."""
    begins = None
    for version in _versions(table):
        for action in commit_of(table, version):
            if "metaData" in action:
                is_on = action["metaData"].get("configuration", {}).get(ENABLED) == "true"
                begins = (version if begins is None else begins) if is_on else None
    return begins


def read_feed(table: str | Path, since: int, until: int | None = None) -> list[Change]:
    """Through Python deltalake."""
    reader = DeltaTable(str(table)).load_cdf(starting_version=since, ending_version=until)
    changes = []
    for columns in rows_of(pa.table(reader.read_all())):
        own = {name: value for name, value in columns.items() if not name.startswith("_c")}
        changes.append(Change(columns["_commit_version"], columns["_change_type"], own))
    return changes


def read_feed_by_log(table: str | Path, since: int) -> list[Change]:
    """By the protocol: a commit's change files; without them the data files that came and went."""
    changes = []
    types: dict[str, str] = {}
    for version in _versions(table):
        actions = commit_of(table, version)
        for action in actions:
            if "metaData" in action:
                fields = json.loads(action["metaData"]["schemaString"])["fields"]
                types = {field["name"]: field["type"] for field in fields}
        if version < since:
            continue
        told = [action["cdc"] for action in actions if "cdc" in action]
        for file in told:
            for columns in _file_rows(table, file, types):
                changes.append(Change(version, columns.pop("_change_type"), columns))
        for name, kind in () if told else (("remove", "delete"), ("add", "insert")):
            for file in (a[name] for a in actions if name in a and a[name]["dataChange"]):
                rows = _file_rows(table, file, types)
                changes += [Change(version, kind, columns, told=False) for columns in rows]
    return changes


BY_LOG: tuple[Callable, ...] = (read_feed_by_log,)
BY_BOTH: tuple[Callable, ...] = (read_feed_by_log, read_feed)


def commit_of(table: str | Path, version: int) -> list[dict[str, Any]]:
    """The actions of one commit."""
    lines = (Path(table) / "_delta_log" / f"{version:020}.json").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _versions(table: str | Path) -> list[int]:
    names = (path.stem for path in (Path(table) / "_delta_log").glob("*.json"))
    found = sorted(int(name) for name in names if name.isdigit())
    if found != list(range(len(found))):
        raise OracleError(f"the log of {table} does not begin at 0, or has a gap: its feed cannot be read")
    return found


def _file_rows(table: str | Path, file: dict[str, Any], types: dict[str, str]) -> list[Columns]:
    gone = deleted_rows(table, file.get("deletionVector"))
    # Opened as one file: a folder `name=value` above it is nothing to pyarrow.
    rows = rows_of(pq.ParquetFile(Path(table) / unquote(file["path"])).read())
    values = file.get("partitionValues") or {}
    partition = {name: _typed(value, types[name]) for name, value in values.items()}
    return [{**columns, **partition} for at, columns in enumerate(rows) if at not in gone]


def _typed(text: str | None, kind: str) -> Any:
    """A partition value. The empty text is NULL, by the protocol."""
    if text is None or text == "":
        return None
    if kind in ("byte", "short", "integer", "long"):
        return int(text)
    if kind in ("float", "double"):
        return float(text)
    if kind.startswith("decimal"):
        return Decimal(text)
    times = {"date": dt.date.fromisoformat, "timestamp_ntz": dt.datetime.fromisoformat}
    readers = {"boolean": lambda value: value == "true", "string": str} | times
    if kind not in readers:
        raise OracleError(f"no reader for partition values of type {kind}")
    return readers[kind](text)


# --- the fold ---------------------------------------------------------------------------------


def held(rows: Iterable[Columns]) -> Held:
    """Rows as a multiset of values."""
    return Counter(frozen(columns) for columns in rows)


def fold(changes: Iterable[Change], base: Held, until: int | None = None) -> tuple[Held, list[str]]:
    """What stands after the changes, and the changes that took out what was not there."""
    state, lines = Counter(base), []
    for version, ones in sorted(_by_version(changes).items()):
        if until is not None and version > until:
            break
        taken = held(change.columns for change in ones if change.kind in TAKES)
        given = held(change.columns for change in ones if change.kind in GIVES)
        for values in sorted(taken - state, key=repr):
            lines.append(f"version {version} takes out what is not there: {dict(values)}")
        state = (state - taken) + given
    return state, lines


def check_feed(
    table: str | Path,
    key: tuple[str, ...] = (),
    readers: Iterable[Callable] = BY_BOTH,
    each_version: bool = False,
) -> list[str]:
    """Everything that does not hold of the feed since it is on, one line each.

    `key`: what a commit's change files say of a key is one insert, one delete or one update.
    """
    begins = feed_begins(table)
    if begins is None:
        return [f"{ENABLED} is not set"]
    base = held(read_table(table, begins - 1)) if begins else Counter()
    newest = _versions(table)[-1]
    points = range(begins, newest + 1) if each_version else [newest]
    lines = []
    for reader in readers:
        changes = reader(table, begins)
        unknown = {change.kind for change in changes} - {*TAKES, *GIVES}
        found = [f"unknown kinds of change: {sorted(unknown)}"] if unknown else []
        found += fold(changes, base)[1]
        for point in points:
            main = held(read_table(table, point))
            told = compare(_times(fold(changes, base, point)[0]), _times(main))
            found += [f"fold to version {point}: {line}" for line in told]
        lines += [f"{reader.__name__}: {line}" for line in found]
    return lines + (_net(read_feed_by_log(table, begins), key) if key else [])


def _net(changes: list[Change], key: tuple[str, ...]) -> list[str]:
    kinds = defaultdict(list)
    for change in changes:
        if change.told:
            kinds[change.version, key_of(change.columns, key)].append(change.kind)
    return [
        f"version {version} says of {of}: {', '.join(sorted(said))}"
        for (version, of), said in kinds.items()
        if tuple(sorted(said)) not in NET
    ]


def _by_version(changes: Iterable[Change]) -> dict[int, list[Change]]:
    found = defaultdict(list)
    for change in changes:
        found[change.version].append(change)
    return found


def _times(rows: Held) -> dict[tuple, Columns]:
    return {values: {"times": count} for values, count in rows.items()}
