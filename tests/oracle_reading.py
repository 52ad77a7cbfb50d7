"""Reading for the oracle: parquet folders, Delta rows and Delta markers, as plain Python values.

Owns: how files and tables become rows, and how markers are read straight from `_delta_log`.
Never: decides which row wins (that is `oracle.py`), writes anything, or runs the product.

A location is a local path, or a URI that deltalake understands (AWS_* variables apply).
Tables are read at rest: nothing here guards against a writer at work.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder
from deltalake.fs import DeltaStorageHandler

Columns = dict[str, Any]

INCLUDE_DEFAULT = r".*\.parquet"
_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(?:\.(\d{10})\.(\d{10})|\.[0-9a-f-]{36})?\.parquet")


class OracleError(Exception):
    """What was read contradicts itself, or cannot be read: never a mere difference."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a source file: the file's name relative to the epoch folder, its position."""

    file: str
    row: int
    columns: Columns


# --- source folders ---------------------------------------------------------------------------


def read_source_folder(path: str | Path, include_regex: str = INCLUDE_DEFAULT) -> list[SourceRow]:
    """All rows of the epoch folder, files in bytewise order of their names."""
    files = _filesystem(str(path))
    rows: list[SourceRow] = []
    for name in _data_files(files, include_regex):
        table = _parquet(files, name).read()
        rows.extend(SourceRow(name, at, columns) for at, columns in enumerate(rows_of(table)))
    return rows


def list_epoch_folders(source: str | Path, include_regex: str = INCLUDE_DEFAULT) -> dict[int, str]:
    """Numeric folders directly under `source` that hold at least one data file: epoch → name."""
    found: dict[int, str] = {}
    files = _filesystem(str(source))
    names = {info.path.split("/")[0] for info in _listing(files, "") if "/" in info.path}
    for name in sorted(names):
        if not re.fullmatch(r"[0-9]+", name):
            continue
        if not _data_files(_filesystem(_below(str(source), name)), include_regex):
            continue
        if int(name) in found:
            raise OracleError(f"folders {found[int(name)]!r} and {name!r} are one epoch")
        found[int(name)] = name
    return found


def _data_files(files: pafs.FileSystem, include_regex: str) -> list[str]:
    """Names of data files: not hidden, not empty, included; in bytewise order."""
    names = []
    for info in _listing(files, ""):
        hidden = any(part.startswith(("_", ".")) for part in info.path.split("/"))
        if not hidden and info.size and re.fullmatch(include_regex, info.path):
            names.append(info.path)
    return sorted(names, key=lambda name: name.encode())


# --- tables -----------------------------------------------------------------------------------


def table_exists(uri: str | Path) -> bool:
    """True when there is a Delta log with at least one commit or checkpoint."""
    return any(
        _COMMIT.fullmatch(name) or _CHECKPOINT.fullmatch(name)
        for name in _log_names(_filesystem(str(uri)))
    )


def table_version(uri: str | Path) -> int | None:
    """The latest version, or None when there is no table."""
    return DeltaTable(str(uri)).version() if table_exists(uri) else None


def read_table(uri: str | Path, version: int | None = None) -> list[Columns]:
    """All rows of a Delta table: through pyarrow, or DataFusion where pyarrow cannot follow.

    Pyarrow refuses deletion vectors. And on a Python-backed (remote) filesystem its threads may
    outlive the interpreter: the process then aborts at exit, about one time in ten.
    """
    if not table_exists(uri):
        raise OracleError(f"there is no Delta table at {uri}")
    table = DeltaTable(str(uri), version=version)
    files = _filesystem(str(uri))
    local = isinstance(files, pafs.SubTreeFileSystem)
    if local and "deletionVectors" not in (table.protocol().reader_features or []):
        return rows_of(table.to_pyarrow_table(filesystem=files))
    found = QueryBuilder().register("t", table).execute("select * from t").read_all()
    return rows_of(pa.table(found))


def rows_of(table: pa.Table) -> list[Columns]:
    """Rows as dicts of Python values. Nanoseconds are cut to microseconds, as Delta stores them."""
    for at, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            micros = table.column(at).cast(pa.timestamp("us", tz=field.type.tz), safe=False)
            table = table.set_column(at, field.name, micros)
    return table.to_pylist()


# --- markers ----------------------------------------------------------------------------------


def read_markers(uri: str | Path) -> dict[str, int]:
    """App id → version, as a Delta reader sees it: newest checkpoint, then the commits after it."""
    files = _filesystem(str(uri))
    commits, checkpoints = _log_files(files)
    if not commits and not checkpoints:
        raise OracleError(f"there is no Delta table at {uri}")
    markers: dict[str, int] = {}
    start = 0
    if checkpoints:
        newest = max(checkpoints)
        for name in checkpoints[newest]:
            markers.update(_markers_of_checkpoint(files, name))
        start = newest + 1
    _require_no_gap(uri, commits, start)
    for version in sorted(v for v in commits if v >= start):
        markers.update(_markers_of_commit(files, commits[version]))
    return markers


def marker_disagreements(uri: str | Path) -> list[str]:
    """Where the newest checkpoint and the commits speak of different markers.

    Empty as well when old commits are gone: then the checkpoint is the only witness. Not for
    tables that let markers expire.
    """
    files = _filesystem(str(uri))
    commits, _ = _log_files(files)
    if not commits or sorted(commits) != list(range(max(commits) + 1)):
        return []
    replayed: dict[str, int] = {}
    for version in sorted(commits):
        replayed.update(_markers_of_commit(files, commits[version]))
    seen = read_markers(uri)
    return [
        f"marker {app}: {seen.get(app)} by the checkpoint, {replayed.get(app)} by the commits"
        for app in sorted(seen.keys() | replayed.keys())
        if seen.get(app) != replayed.get(app)
    ]


def _markers_of_commit(files: pafs.FileSystem, name: str) -> dict[str, int]:
    with files.open_input_file(f"_delta_log/{name}") as opened:
        lines = opened.read().decode().splitlines()
    actions = [json.loads(line) for line in lines if line.strip()]
    return {a["txn"]["appId"]: a["txn"]["version"] for a in actions if a.get("txn")}


def _markers_of_checkpoint(files: pafs.FileSystem, name: str) -> dict[str, int]:
    checkpoint = _parquet(files, f"_delta_log/{name}")
    if "txn" not in checkpoint.schema_arrow.names:
        return {}
    column = checkpoint.read(columns=["txn"]).column("txn").to_pylist()
    return {txn["appId"]: txn["version"] for txn in column if txn and txn["appId"] is not None}


def _log_files(files: pafs.FileSystem) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Commits by version, and complete checkpoints by version (their part files)."""
    commits: dict[int, str] = {}
    candidates: dict[tuple[int, int], list[str]] = {}
    for name in sorted(_log_names(files)):
        if match := _COMMIT.fullmatch(name):
            commits[int(match[1])] = name
        elif match := _CHECKPOINT.fullmatch(name):
            parts = int(match[3]) if match[3] else 1
            candidates.setdefault((int(match[1]), parts), []).append(name)
    checkpoints: dict[int, list[str]] = {}
    for (version, parts), names in sorted(candidates.items()):
        if parts == 1:
            checkpoints[version] = names[:1]
        elif len(names) == parts:
            checkpoints.setdefault(version, names)
    return commits, checkpoints


def _require_no_gap(uri: str | Path, commits: dict[int, str], start: int) -> None:
    newest = max(commits, default=start - 1)
    missing = [version for version in range(start, newest + 1) if version not in commits]
    if missing:
        raise OracleError(f"the log of {uri} lacks commits {missing[:5]} after its checkpoint")


# --- places -----------------------------------------------------------------------------------


def _filesystem(location: str) -> pafs.FileSystem:
    """A filesystem rooted at the location, local or remote."""
    if "://" in location:
        return pafs.PyFileSystem(DeltaStorageHandler(location))
    return pafs.SubTreeFileSystem(str(Path(location).absolute()), pafs.LocalFileSystem())


def _parquet(files: pafs.FileSystem, name: str) -> pq.ParquetFile:
    """The file, fetched whole: pyarrow's reading threads never call back into Python."""
    with files.open_input_file(name) as opened:
        return pq.ParquetFile(pa.BufferReader(opened.read()))


def _listing(files: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """All files below the folder, paths relative to the filesystem's root."""
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    return [info for info in files.get_file_info(selector) if info.type == pafs.FileType.File]


def _log_names(files: pafs.FileSystem) -> list[str]:
    return [info.path.removeprefix("_delta_log/") for info in _listing(files, "_delta_log")]


def _below(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}"
