"""What the files of an epoch folder say, read back for the model.

Owns: which files hold rows, what a row of each format is, columns that are folders, declared types.
Never: uses product code, or knows what was planned: what lies on the disk is what was said.
"""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from oracle import Unfit
from oracle_reading import Columns, SourceRow, read_source_folder
from worlds_shape import CSV, FOLDER_COLUMNS, PARQUET, TYPES, Shape

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
# By file and row: its columns, or None where a correction is taken back.
Corrected = dict[tuple[str, int], Columns | None]
PACKED = r"(\.gz|\.zst)?"
INCLUDE = {"csv": rf".*\.csv{PACKED}", "json": rf".*\.(json|jsonl|ndjson){PACKED}"}
MALFORMED = Unfit("malformed")
READERS = {
    "string": str, "long": int, "int": int, "double": float,
    "timestamp": dt.datetime.fromisoformat,
}  # fmt: skip


def read_folder(folder: Path, shape: Shape) -> list[SourceRow]:
    """All rows, files in bytewise order of their names, each with its position among the file's rows."""
    if shape.format == PARQUET:
        rows = [
            SourceRow(row.file, row.row, judged_columns(_known_names(row.columns), shape))
            for row in read_source_folder(folder)
        ]
        return [_with_folders(row, shape) for row in rows]
    found = []
    for name in _names(folder, INCLUDE[shape.format]):
        text = _unpacked(name, (folder / name).read_bytes()).decode()
        rows = _csv_rows(text, shape) if shape.format == CSV else _json_rows(text)
        for at, columns in enumerate(rows):
            typed = judged_columns(_known_names(columns), shape)
            found.append(_with_folders(SourceRow(name, at, typed), shape))
    return found


def corrected_rows(
    rows: list[SourceRow], before: Corrected, picked: Iterable[tuple[float, Columns | None]]
) -> Corrected:
    """The corrections asked for: each row as it is now with the new values in it, or None to take back."""
    found: Corrected = {}
    for share, new in picked if rows else ():
        row = rows[int(share * len(rows))]
        now = found.get((row.file, row.row)) or before.get((row.file, row.row)) or row.columns
        found[row.file, row.row] = None if new is None else {**_sayable(now), **new}
    return found


def _sayable(columns: Columns) -> Columns:
    """JSON has no NaN. What is no row has no columns, but for its path's."""
    return {name: None if value != value else value for name, value in columns.items() if name}


def corrections_text(corrected: Corrected) -> str:
    """As `quarantine replay --rows` takes them."""
    items = [{"file": file, "row": row, "content": new} for (file, row), new in corrected.items()]
    return json.dumps(items, default=lambda at: at.isoformat().replace("+00:00", "Z"))


def _names(folder: Path, include: str) -> list[str]:
    """Not hidden, not empty, included."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    names = [str(path.relative_to(folder)) for path in paths]
    shown = [name for name in names if not any(part[0] in "_." for part in name.split("/"))]
    return sorted((name for name in shown if re.fullmatch(include, name)), key=str.encode)


def _unpacked(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.decompress(content)
    if name.endswith(".zst"):
        return pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    return content


def _csv_rows(text: str, shape: Shape) -> Iterator[Columns]:
    """Empty lines are no rows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=shape.text.delimiter)
    lines = (line for line in reader if line)
    names = next(lines) if shape.text.header else shape.declared
    for line in lines:
        if len(line) != len(names):
            yield {"": MALFORMED}
            continue
        values = (None if value == shape.text.null else value for value in line)
        yield dict(zip(names, values, strict=True))


def _json_rows(text: str) -> Iterator[Columns]:
    for line in text.split("\n"):
        if line.strip():
            yield _object(line)


def _object(line: str) -> Columns:
    try:
        return json.loads(line)
    except ValueError:
        return {"": MALFORMED}


def _known_names(columns: Columns) -> Columns:
    """Case is no difference."""
    return {name.lower() if name.lower() in TYPES else name: value for name, value in columns.items()}


def judged_columns(columns: Columns, shape: Shape) -> Columns:
    """Values as their columns have them; some do not fit."""
    return {name: _typed(name, value, shape) for name, value in columns.items()}


def _typed(name: str, value: Any, shape: Shape) -> Any:
    """Without a declaration the value is what the format says it is."""
    if value is None or name not in shape.declared or isinstance(value, (Unfit, dt.datetime)):
        return value
    if TYPES[name] == "double" and isinstance(value, float):
        return value
    try:
        fit = READERS[TYPES[name]](value)
    except ValueError:
        return Unfit(f"type:{name}")
    return Unfit(f"type:{name}") if isinstance(value, float) and fit != value else fit


def _with_folders(row: SourceRow, shape: Shape) -> SourceRow:
    """`name=value` above the file is a column, unless the file has it itself."""
    columns = dict(row.columns)
    for part in row.file.split("/")[:-1]:
        name, equals, text = part.partition("=")
        if equals and name in FOLDER_COLUMNS and name not in columns:
            columns[name] = _typed(name, None if text == HIVE_NULL else unquote(text), shape)
    return SourceRow(row.file, row.row, columns)
