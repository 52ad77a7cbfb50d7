"""Small Delta tables for the oracle's own tests, made by python deltalake.

Owns: how a hand-written example becomes a table with markers, a checkpoint, a deletion vector.
Never: used to check the product; it would then agree with itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

MAIN = pa.schema(
    [("pguid", pa.string()), ("op", pa.string()), ("seq", pa.int64()), ("name", pa.string())]
)
RAW = pa.schema(
    [
        ("_epoch", pa.int64()),
        ("_op", pa.string()),
        ("_file", pa.string()),
        ("_row", pa.int64()),
        ("_generation", pa.int64()),
        *MAIN,
    ]
)
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def write_table(
    path: Path,
    rows: list[dict[str, Any]],
    schema: pa.Schema = MAIN,
    markers: Mapping[str, int] | None = None,
    mode: str = "append",
) -> None:
    """One commit: the rows, and the markers (`<epoch>/<step>` or a whole app id)."""
    own = [
        Transaction(app if app.startswith("alluvium/") else f"alluvium/p/{app}", version)
        for app, version in (markers or {}).items()
    ]
    write_deltalake(
        str(path),
        pa.Table.from_pylist(rows, schema=schema),
        mode=mode,
        partition_by=["_epoch"] if schema is RAW else None,
        commit_properties=CommitProperties(app_transactions=own),
    )


def checkpoint_and_forget(path: Path) -> None:
    """A checkpoint at the latest version; the commits below it are deleted, as by log cleanup."""
    table = DeltaTable(str(path))
    table.create_checkpoint()
    for version in range(table.version()):
        (path / "_delta_log" / f"{version:020}.json").unlink()


def delete_by_vector(path: Path, rows: list[int]) -> None:
    """Marks physical rows of the table's only file as deleted, by an inline deletion vector."""
    log = path / "_delta_log"
    commits = [json.loads(line) for line in _commit(log, 0).read_text().splitlines()]
    add = next(action["add"] for action in commits if "add" in action)
    protocol = {
        "minReaderVersion": 3,
        "minWriterVersion": 7,
        "readerFeatures": ["deletionVectors"],
        "writerFeatures": ["deletionVectors"],
    }
    body = _roaring(rows)
    vector = {
        "storageType": "i",
        "pathOrInlineDv": _z85(body),
        "sizeInBytes": len(body),
        "cardinality": len(rows),
    }
    remove = {"path": add["path"], "dataChange": True, "deletionTimestamp": 1}
    actions = [
        {"protocol": protocol},
        {"remove": remove},
        {"add": {**add, "deletionVector": vector}},
    ]
    text = "".join(json.dumps(action) + "\n" for action in actions)
    _commit(log, DeltaTable(str(path)).version() + 1).write_text(text)


def _commit(log: Path, version: int) -> Path:
    return log / f"{version:020}.json"


def _roaring(rows: list[int]) -> bytes:
    """Delta's 64-bit bitmap array with one 32-bit portable bitmap of one array container."""
    header = struct.pack("<II", 12346, 1) + struct.pack("<HH", 0, len(rows) - 1)
    offset = struct.pack("<I", len(header) + 4)
    values = b"".join(struct.pack("<H", row) for row in sorted(rows))
    return struct.pack("<I", 1681511377) + struct.pack("<QI", 1, 0) + header + offset + values


def _z85(data: bytes) -> str:
    data += b"\0" * (-len(data) % 4)
    text = ""
    for (word,) in struct.iter_unpack(">I", data):
        text += "".join(_Z85[word // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return text
