"""The files of a world: its configuration, its parquet folders, the junk beside them.

Owns: how a planned file becomes bytes. Never: chooses rows or reads anything back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from oracle import Demands
from worlds_plan import File, Shape

PIPELINE = "p"
# The same twice: in SQL, and in Python for the oracle. One refuses NULL, one does not.
EXPECTATIONS = (("positive", "amount > -1"), ("known", "seq IS NULL OR seq <> 3"))
MARKER = "_SUCCESS"
COLUMN_TYPES = {
    "pguid": pa.string(),
    "site": pa.int64(),
    "op": pa.string(),
    "seq": pa.int64(),
    "name": pa.string(),
    "amount": pa.float64(),
    "updated_at": pa.timestamp("us", tz="UTC"),
}


def config_text(shape: Shape) -> str:
    """The world's configuration file."""
    keys = ", ".join(f'"{column}"' for column in shape.key)
    lines = [
        "[state]",
        'uri = "./state"',
        "[worker]",
        f"slots = {shape.slots}",
        f"[pipeline.{PIPELINE}]",
        'source = "./incoming"',
        'raw = "./raw"',
        'main = "./main"',
        f"key = [{keys}]",
        f'order = "{shape.order}"',
        """delete_when = "op = 'D'\"""",
        f'ready = {{ marker = "{MARKER}" }}',
    ]
    if shape.sequence_by:
        lines.append(f'sequence_by = "{shape.sequence_by}"')
    if shape.small_files:
        lines.append(f"optimize = {{ small_files = {shape.small_files} }}")
    if shape.batch_epochs:
        lines.append(f"merge = {{ batch_epochs = {shape.batch_epochs} }}")
    if shape.ignore:
        names = ", ".join(f'"{column}"' for column in shape.ignore)
        lines.append(f"columns = {{ ignore = [{names}] }}")
    if shape.replay_changed:
        lines.append('on_changed = "replay"')
    if shape.refuse_duplicates:
        lines.append('on_duplicate = "quarantine"')
    if shape.expects:
        for name, sql in EXPECTATIONS:
            lines += [f"[[pipeline.{PIPELINE}.expect]]", f'name = "{name}"', f'sql = "{sql}"']
            lines.append('action = "quarantine"')
    return "\n".join(lines) + "\n"


def demands_of(shape: Shape) -> Demands:
    """What the configuration demands of rows, for the oracle."""
    return Demands(CONDITIONS if shape.expects else (), shape.refuse_duplicates)


def _positive(columns: dict) -> bool | None:
    """NaN is greater than every number, as in DataFusion."""
    amount = columns["amount"]
    return None if amount is None else math.isnan(amount) or amount > -1


def _known(columns: dict) -> bool:
    return columns["seq"] is None or columns["seq"] != 3


def write_files(folder: Path, files: Iterable[File], key: tuple[str, ...]) -> None:
    """Writes the parquet files; the folder exists afterwards, even without files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(file, key), path, row_group_size=file.row_group_rows)


def complete_folder(folder: Path) -> None:
    """The marker, always last."""
    (folder / MARKER).touch()


def write_junk(source: Path, folder: Path) -> None:
    """What lies about in real buckets: never rows of an epoch."""
    stray = File("stray.parquet", ({"pguid": "stray", "name": "stray"},), 1)
    write_files(source / "backup", [stray], ("pguid",))
    write_files(folder / "_temporary", [stray], ("pguid",))
    (folder / "part-0.parquet.crc").write_bytes(b"crc")
    (folder / "empty.parquet").touch()
    (source / "notes.txt").write_text("not a folder")


def _table(file: File, key: tuple[str, ...]) -> pa.Table:
    """Every file of a world has the same columns; `site` only where it belongs to the key."""
    types = {name: kind for name, kind in COLUMN_TYPES.items() if name != "site" or name in key}
    return pa.table(
        {name: pa.array([row.get(name) for row in file.rows], kind) for name, kind in types.items()}
    )


CONDITIONS = (("positive", _positive), ("known", _known))
