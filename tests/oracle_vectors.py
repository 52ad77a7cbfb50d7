"""Deletion vectors, read by the protocol's text alone: which rows of a data file no longer count.

Owns: base 85, the files of vectors with their checksums, the portable Roaring format.

https://github.com/delta-io/delta/blob/master/PROTOCOL.md#deletion-vector-format
https://github.com/RoaringBitmap/RoaringFormatSpec
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oracle_reading import OracleError

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
MAGIC = 1681511377
WITH_RUNS, WITHOUT_RUNS = 12347, 12346
# Without runs, or with so many containers, each container's place is told.
OFFSETS_FROM = 4
ARRAY_MAX = 4096


def deleted_rows(table: str | Path, vector: dict[str, Any] | None) -> set[int]:
    """Positions of the rows that a vector of the log deletes."""
    if not vector:
        return set()
    text = vector["pathOrInlineDv"]
    if vector["storageType"] == "i":
        body = _base85(text)[: vector["sizeInBytes"]]
    elif vector["storageType"] == "u":
        name = uuid.UUID(bytes=_base85(text[-20:]))
        body = _of_file(Path(table) / text[:-20] / f"deletion_vector_{name}.bin", vector)
    else:
        raise OracleError(f"no reader for deletion vectors of type {vector['storageType']}")
    rows = set(_bitmaps(body))
    if len(rows) != vector["cardinality"]:
        raise OracleError(f"a vector says {vector['cardinality']} rows and deletes {len(rows)}")
    return rows


def _base85(text: str) -> bytes:
    words = []
    for at in range(0, len(text), 5):
        number = 0
        for letter in text[at : at + 5]:
            number = number * 85 + LETTERS.index(letter)
        words.append(struct.pack(">I", number))
    return b"".join(words)


def _of_file(path: Path, vector: dict[str, Any]) -> bytes:
    data = path.read_bytes()
    if data[0] != 1:
        raise OracleError(f"{path} is of version {data[0]}")
    at = vector["offset"]
    (size,) = struct.unpack_from(">I", data, at)
    body = data[at + 4 : at + 4 + size]
    (checksum,) = struct.unpack_from(">I", data, at + 4 + size)
    if size != vector["sizeInBytes"] or checksum != zlib.crc32(body):
        raise OracleError(f"{path} is not what its length and checksum say at {at}")
    return body


def _bitmaps(body: bytes) -> Iterator[int]:
    magic, count = struct.unpack_from("<IQ", body)
    if magic != MAGIC:
        raise OracleError("a vector does not begin with its magic number")
    at = 12
    for _ in range(count):
        (high,) = struct.unpack_from("<I", body, at)
        rows, at = _bitmap(body, at + 4)
        yield from ((high << 32) | row for row in rows)


def _bitmap(body: bytes, at: int) -> tuple[list[int], int]:
    (cookie,) = struct.unpack_from("<I", body, at)
    at += 4
    runs: set[int] = set()
    if cookie & 0xFFFF == WITH_RUNS:
        count = (cookie >> 16) + 1
        flags = body[at : at + (count + 7) // 8]
        runs = {n for n in range(count) if flags[n // 8] >> (n % 8) & 1}
        at += len(flags)
    elif cookie == WITHOUT_RUNS:
        (count,) = struct.unpack_from("<I", body, at)
        at += 4
    else:
        raise OracleError(f"no bitmap begins with {cookie}")
    containers = [struct.unpack_from("<HH", body, at + 4 * n) for n in range(count)]
    at += 4 * count
    if cookie == WITHOUT_RUNS or count >= OFFSETS_FROM:
        at += 4 * count
    rows: list[int] = []
    for number, (high, size) in enumerate(containers):
        low, at = _container(body, at, number in runs, size + 1)
        rows += [(high << 16) | value for value in low]
    return rows, at


def _container(body: bytes, at: int, is_run: bool, size: int) -> tuple[list[int], int]:
    if is_run:
        (count,) = struct.unpack_from("<H", body, at)
        pairs = [struct.unpack_from("<HH", body, at + 2 + 4 * n) for n in range(count)]
        return [start + n for start, length in pairs for n in range(length + 1)], at + 2 + 4 * count
    if size <= ARRAY_MAX:
        return list(struct.unpack_from(f"<{size}H", body, at)), at + 2 * size
    bits = body[at : at + 8192]
    return [n for n in range(65536) if bits[n // 8] >> (n % 8) & 1], at + 8192
