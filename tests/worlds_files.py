"""The files of a world: its configuration, its epoch folders, the junk beside them.

Owns: how a planned file becomes bytes. Never: chooses rows or reads anything back.
"""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oracle import Demands, never_deletes, op_column_deletes
from worlds_plan import NO_ROW, File, Layout
from worlds_shape import CSV, PARQUET, SNAPSHOT, TYPES, UPSERT, Shape

PIPELINE = "p"
# Of side indexes, in the world's folder.
CACHE = "cache"
# The same twice: in SQL, and in Python for the oracle. One refuses NULL, one does not.
EXPECTATIONS = (("positive", "amount > -1"), ("known", "seq IS NULL OR seq <> 3"))
SELECT = "SELECT * FROM incoming WHERE pguid IS NULL OR pguid NOT IN ('k1', 'K1')"
MARKER = "_SUCCESS"
COLUMN_TYPES = {
    "pguid": pa.string(),
    "site": pa.int64(),
    "op": pa.string(),
    "seq": pa.int64(),
    "name": pa.string(),
    "amount": pa.float64(),
    "updated_at": pa.timestamp("us", tz="UTC"),
    "region": pa.string(),
}
# All whole numbers and times of a world fit, and NULL does; other amounts do not.
NARROW_TYPES = {"site": pa.int8(), "seq": pa.int16(), "updated_at": pa.timestamp("ms", tz="UTC")}
FLOAT_MAX = 1e30


def config_text(shape: Shape) -> str:
    """The world's configuration file."""
    lines = [
        "[state]",
        'uri = "./state"',
        "[worker]",
        f"slots = {shape.slots}",
        f'cache = "./{CACHE}"',
        f"[pipeline.{PIPELINE}]",
        'source = "./incoming"',
        'raw = "./raw"',
        'main = "./main"',
        f'order = "{shape.order}"',
        f'ready = {{ marker = "{MARKER}" }}',
    ]
    if shape.key:
        lines.append(f"key = {_listed(shape.key)}")
    if shape.deletes:
        lines.append("""delete_when = "op = 'D'\"""")
    if shape.mode != UPSERT:
        lines.append(f'mode = "{shape.mode}"')
    if shape.mode == SNAPSHOT:
        # Sizes are random here: no folder is held for having lost rows.
        lines.append('gate = { rows_min = "0%" }')
    if shape.sequence_by:
        lines.append(f'sequence_by = "{shape.sequence_by}"')
    if shape.partition_by:
        lines.append(f"partition_by = {_listed(shape.partition_by)}")
    if shape.small_files:
        lines.append(f"optimize = {{ small_files = {shape.small_files} }}")
    if shape.batch_epochs:
        lines.append(f"merge.batch_epochs = {shape.batch_epochs}")
    if shape.skip_unchanged:
        lines.append("merge.skip_unchanged = true")
    if shape.deletion_vectors:
        lines.append(f'merge.deletion_vectors = "{shape.deletion_vectors}"')
    if shape.shard_size:
        lines.append(f'shard_size = "{shape.shard_size}"')
    if shape.index:
        lines.append(f'merge.index = "{shape.index}"')
    if shape.change_feed:
        lines.append("change_feed = true")
    if shape.replay_changed:
        lines.append('on_changed = "replay"')
    if shape.refuse_duplicates:
        lines.append('on_duplicate = "quarantine"')
    if shape.misfits:
        lines.append('on_mismatch = "quarantine"')
    if shape.selects:
        lines.append(f'select = "{SELECT}"')
    lines += _format_lines(shape)
    if shape.expects:
        for name, sql in EXPECTATIONS:
            lines += [f"[[pipeline.{PIPELINE}.expect]]", f'name = "{name}"', f'sql = "{sql}"']
            lines.append('action = "quarantine"')
    return "\n".join(lines) + "\n"


def _format_lines(shape: Shape) -> list[str]:
    """The files' format, and what is said of columns: a table of its own, after the other settings."""
    lines = []
    if shape.format != PARQUET:
        lines.append(f'format = "{shape.format}"')
    if shape.format == CSV:
        text = shape.text
        told = f"delimiter = {json.dumps(text.delimiter)}, header = {json.dumps(text.header)}"
        lines.append(f"csv = {{ {told}, null = {json.dumps(text.null)} }}")
    if shape.declared or shape.ignore:
        lines.append(f"[pipeline.{PIPELINE}.columns]")
    if shape.ignore:
        lines.append(f"ignore = {_listed(shape.ignore)}")
    return lines + [f'{name} = "{TYPES[name]}"' for name in shape.declared]


def _listed(names: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


# --- what the configuration demands -----------------------------------------------------------


def demands_of(shape: Shape) -> Demands:
    """What the configuration demands of rows, for the oracle."""
    return Demands(CONDITIONS if shape.expects else (), shape.refuse_duplicates)


def deletes_of(shape: Shape) -> Callable[[dict], bool]:
    """Its `delete_when`, for the oracle."""
    return op_column_deletes if shape.deletes else never_deletes


def is_selected(columns: dict, shape: Shape) -> bool:
    """Its `select`, for the oracle. A line that is no row is never asked."""
    return not shape.selects or columns.get("pguid") not in ("k1", "K1")


def _positive(columns: dict) -> bool | None:
    """NaN is greater than every number, as in DataFusion."""
    amount = columns.get("amount")
    return None if amount is None else math.isnan(amount) or amount > -1


def _known(columns: dict) -> bool:
    return columns.get("seq") is None or columns["seq"] != 3


CONDITIONS = (("positive", _positive), ("known", _known))


# --- folders ----------------------------------------------------------------------------------


def write_files(folder: Path, files: Iterable[File], shape: Shape) -> None:
    """Writes the files; the folder exists afterwards, even without files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_packed(file.name, _content(file, shape)))


def complete_folder(folder: Path) -> None:
    """The marker, always last."""
    (folder / MARKER).touch()


def write_junk(source: Path, folder: Path, shape: Shape) -> None:
    """What lies about in real buckets: never rows of an epoch."""
    ending = shape.endings[0]
    row = {"pguid": "stray", "name": "stray"}
    stray = File(f"stray{ending}", (row,), 1, Layout(("pguid", "name")))
    write_files(source / "backup", [stray], shape)
    write_files(folder / "_temporary", [stray], shape)
    (folder / f"part-0{ending}.crc").write_bytes(b"crc")
    (folder / f"empty{ending}").touch()
    (source / "notes.txt").write_text("not a folder")


def _content(file: File, shape: Shape) -> bytes:
    if shape.format == PARQUET:
        return _parquet(file)
    names = {name: name.upper() if name in file.layout.upper else name for name in file.layout.columns}
    return (_csv if shape.format == CSV else _json)(file, names, shape)


def _parquet(file: File) -> bytes:
    layout, columns = file.layout, {}
    for name in layout.columns:
        values = [row.get(name) for row in file.rows]
        kind = _narrow(name, values) if layout.narrow else COLUMN_TYPES[name]
        if name == "seq" and any(isinstance(value, float) for value in values):
            kind = pa.float64()
        columns[name.upper() if name in layout.upper else name] = pa.array(values, kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=file.row_group_rows)
    return sink.getvalue().to_pybytes()


def _narrow(name: str, values: list[Any]) -> pa.DataType:
    if name == "amount" and all(value is None or not value > FLOAT_MAX for value in values):
        return pa.float32()
    return NARROW_TYPES.get(name, COLUMN_TYPES[name])


def _csv(file: File, names: dict[str, str], shape: Shape) -> bytes:
    text, loose = shape.text, file.layout.loose
    end = "\r\n" if loose else "\n"
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=text.delimiter, lineterminator=end)
    if text.header:
        writer.writerow(names.values())
    for at, row in enumerate(file.rows):
        values = [text.null if row.get(name) is None else _text_of(row[name]) for name in names]
        writer.writerow([*values, "one more"] if NO_ROW in row else values)
        out.write(end if loose and at % 3 == 0 else "")
    # A file without bytes is no file.
    return (out.getvalue() or end).encode()


def _json(file: File, names: dict[str, str], shape: Shape) -> bytes:
    loose, lines = file.layout.loose, []
    for at, row in enumerate(file.rows):
        told = {names[name]: row.get(name) for name in names}
        if loose:
            told = {name: value for name, value in told.items() if value is not None}
        lines += ["", ""] if loose and at % 3 == 1 else []
        line = json.dumps(told, default=_text_of, ensure_ascii=bool(at % 2))
        lines.append(line[:-1] if NO_ROW in row else line)
    return ("\n".join(lines) + "\n").encode()


def _text_of(value: Any) -> str:
    if isinstance(value, dt.datetime):
        return value.isoformat().replace("+00:00", "Z")
    return str(value)


def _packed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    if not name.endswith(".zst"):
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()
