"""The statements that every world must satisfy, over the tables alone.

Owns: the list of statements and how a broken one reads.
Calls: the oracle of the world's mode and of its change feed.
Never: runs the product, changes a file, or takes the ledger's word for rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from deltalake import DeltaTable

from oracle import (
    REVERT,
    Main,
    OracleError,
    World,
    applied_epochs,
    compare,
    epochs_needing_merge,
    key_of,
    pipeline_ids,
    step_markers,
    world_from_raw,
)
from oracle_feed import BY_BOTH, BY_LOG, check_feed
from oracle_modes import PERIOD, ModeWorld, expected, main_of_raw, read_main_of
from oracle_reading import marker_disagreements, read_markers, read_table, table_exists
from worlds_files import PIPELINE
from worlds_shape import APPEND, SCD2, TYPES, Shape

LEDGER = "state/ledger/processed_folders"
# Delta's names of types that are declared under another name.
DELTA_TYPES = {"int": "integer"}


def check_world(home: Path, shape: Shape, model: ModeWorld, complete: set[int]) -> list[str]:
    """Everything that does not hold, one line each. `complete`: delivered with their marker."""
    raw, main = home / "raw", home / "main"
    if not table_exists(main) and not _has_rows(model, complete):
        # Nothing but empty content so far: main is made by the first epoch with rows.
        return []
    try:
        markers = {"raw": read_markers(raw), "main": read_markers(main)}
        ids = pipeline_ids(markers["raw"]) | pipeline_ids(markers["main"])
        if len(ids) > 1:
            return [f"the markers name several pipeline ids: {sorted(ids)}"]
        pipeline_id = next(iter(ids), PIPELINE)
        lines = _markers(markers["raw"], markers["main"], pipeline_id, complete)
        lines += _prefixed("raw log", marker_disagreements(raw))
        lines += _prefixed("main log", marker_disagreements(main))
        found = read_main_of(model.mode, main, model.key)
        lines += _prefixed("main by model", compare(expected(model.mode, model, complete), found))
        by_raw = main_of_raw(
            model.mode, raw, main, pipeline_id, model.key, model.sequence_by, model.ignore
        )
        lines += _prefixed("main by raw", by_raw)
        lines += _prefixed("main's form", _form(main, shape))
        lines += _prefixed("raw's form", _declared(raw, shape, ()))
        if shape.change_feed:
            # Python deltalake does not find change files below partitions with special characters.
            readers = BY_LOG if "region" in shape.partition_by else BY_BOTH
            lines += _prefixed("change feed", check_feed(main, model.key, readers))
        lines += _prefixed("quarantine", _quarantine(home / "raw_quarantine", model))
        lines += _prefixed("raw by model", _raw(raw, model, markers["raw"], pipeline_id))
        if complete:
            applied = step_markers(markers["main"], pipeline_id, "merge")
            lines += _prefixed("ledger", _ledger(home / LEDGER, applied))
    except OracleError as error:
        return [str(error)]
    return lines


def is_held(main: Path) -> bool:
    """The pipeline's hold marker is odd."""
    return read_markers(main).get(f"alluvium/{PIPELINE}/hold", 0) % 2 == 1


def check_held(home: Path, shape: Shape, rows: Main) -> list[str]:
    """Main after a rollback: exactly these rows."""
    try:
        return _prefixed("main", compare(rows, read_main_of(shape.mode, home / "main", shape.key)))
    except OracleError as error:
        return [str(error)]


def _has_rows(model: World, complete: set[int]) -> bool:
    return any(row.op != REVERT for epoch in complete for row in model.content.get(epoch, []))


def _prefixed(what: str, lines: Iterable[str]) -> list[str]:
    return [f"{what}: {line}" for line in lines]


def _markers(
    raw: dict[str, int], main: dict[str, int], pipeline_id: str, complete: set[int]
) -> list[str]:
    """Applied are exactly the complete epochs, and nobody needs a merge."""
    applied = applied_epochs(main, pipeline_id)
    lines = []
    if lacking := sorted(complete - applied):
        lines.append(f"markers: complete epochs are not applied: {lacking}")
    ingested = set(step_markers(raw, pipeline_id, "ingest"))
    merged = set(step_markers(main, pipeline_id, "merge"))
    if extra := sorted((ingested | merged) - complete):
        lines.append(f"markers: epochs are processed that are not complete: {extra}")
    return lines + _prefixed("markers", epochs_needing_merge(main, raw, pipeline_id))


def _form(main: Path, shape: Shape) -> list[str]:
    """Partitions as configured, and the columns that the mode and the declarations promise."""
    table = DeltaTable(str(main))
    partitions = [*(["_epoch"] if shape.mode == APPEND else []), *shape.partition_by]
    lines = []
    if table.metadata().partition_columns != partitions:
        lines.append(f"partitions {table.metadata().partition_columns}, expected {partitions}")
    types = _types(main)
    own = {"_epoch": "long"} if shape.mode == APPEND else {}
    own |= dict(zip(PERIOD, ("long", "long", "boolean"))) if shape.mode == SCD2 else {}
    lines += [f"{n} is {types.get(n)}, not {kind}" for n, kind in own.items() if types.get(n) != kind]
    lines += [f"{name} is ignored, and there" for name in shape.ignore if name in types]
    return lines + _declared(main, shape, shape.ignore)


def _declared(table: Path, shape: Shape, ignored: tuple[str, ...]) -> list[str]:
    """Declared columns stand first among the data columns, in their order and with their types."""
    wanted = [
        (name, DELTA_TYPES.get(TYPES[name], TYPES[name])) for name in shape.declared if name not in ignored
    ]
    found = [(name, kind) for name, kind in _types(table).items() if not name.startswith("_")]
    if found[: len(wanted)] != wanted:
        return [f"columns {found} do not begin with the declared {wanted}"]
    return []


def _types(table: Path) -> dict[str, str]:
    fields = json.loads(DeltaTable(str(table)).schema().to_json())["fields"]
    return {field["name"]: field["type"] for field in fields}


def _raw(raw: Path, model: World, markers: dict[str, int], pipeline_id: str) -> list[str]:
    """Raw's partitions say what the folders said when they were asked for last."""
    found = world_from_raw(raw, model.key, model.sequence_by)
    lines = compare(_by_place(model), _by_place(found))
    for epoch, rows in found.content.items():
        reverts = [key_of(row.columns, model.key) for row in rows if row.op == REVERT]
        lasting = {key_of(row.columns, model.key) for row in rows if row.op != REVERT}
        if both := sorted(lasting & set(reverts), key=repr):
            lines.append(f"epoch {epoch} has rows and reverts of the keys {both}")
        if len(reverts) != len(set(reverts)):
            lines.append(f"epoch {epoch} reverts a key twice")
        # The model may know more: an epoch replayed before its first ingest has no reverts.
        known = model.content.get(epoch, [])
        allowed = {key_of(row.columns, model.key) for row in known if row.op == REVERT}
        if strange := sorted(set(reverts) - allowed, key=repr):
            lines.append(f"epoch {epoch} reverts keys it never had, or still has: {strange}")
    ingested = step_markers(markers, pipeline_id, "ingest")
    held = {(row["_epoch"], row["_generation"]) for row in read_table(raw) if row["_op"] != REVERT}
    for epoch, generation in sorted(held):
        if ingested.get(int(epoch)) != generation:
            lines.append(
                f"epoch {epoch} holds rows of generation {generation}, "
                f"its ingest marker says {ingested.get(int(epoch))}"
            )
    return lines


def _quarantine(table: Path, model: World) -> list[str]:
    """Exactly the rows that are refused, each with its reason."""
    expected = {
        (epoch, *place): why for epoch, refused in model.refused.items() for place, why in refused.items()
    }
    rows = read_table(table) if table_exists(table) else []
    found = {(row["_epoch"], row["_file"], row["_row"]): row["reason"] for row in rows}
    lines = [f"{len(rows) - len(found)} rows stand twice"] if len(rows) != len(found) else []
    for place in sorted(expected.keys() | found.keys()):
        if expected.get(place) != found.get(place):
            lines.append(f"{place}: expected {expected.get(place)}, found {found.get(place)}")
    return lines


def _by_place(world: World) -> dict[tuple, dict]:
    return {
        (epoch, row.file, row.row): {"_op": row.op, **row.columns}
        for epoch, rows in world.content.items()
        for row in rows
        if row.op != REVERT
    }


def _ledger(table: Path, merged: dict[int, int]) -> list[str]:
    """Each (epoch, generation) at most once, the newest of every applied epoch exactly once."""
    if not table_exists(table):
        return [f"there is no table {table.name}"]
    rows = read_table(table)
    seen = Counter((row["pipeline"], row["epoch"], row["generation"]) for row in rows)
    lines = [f"{entry} stands {count} times" for entry, count in seen.items() if count > 1]
    for epoch, generation in sorted(merged.items()):
        if seen[(PIPELINE, epoch, generation)] == 0:
            others = sorted(entry[2] for entry in seen if entry[1] == epoch)
            lines.append(f"epoch {epoch} lacks generation {generation} (it has {others})")
    for row in rows:
        name = row["epoch_folder"]
        if not re.fullmatch(r"[0-9]+", name) or int(name) != row["epoch"]:
            lines.append(f"folder {name!r} is not the name of epoch {row['epoch']}")
    return lines
