"""The configuration of a world: what is drawn for it, and which files and rows go with it.

Owns: the shape, the probabilities of its settings, and that settings which exclude each other never
meet. Never: chooses rows or actions (`worlds_plan`), knows how a setting is written (`worlds_files`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

UPSERT, APPEND, SNAPSHOT, SCD2 = "upsert", "append", "snapshot", "scd2"
PARQUET, CSV, JSON = "parquet", "csv", "json"
# Bytewise order differs from natural order, from case-blind order and from folder order.
FILE_NAMES = (
    "part-0", "part-10", "part-2", "B", "a", "a-b", "a/b", "day=2/part-0",
    "zone=a%3Ab%20c/day=11/p", "day=__HIVE_DEFAULT_PARTITION__/p",
)  # fmt: skip
# Columns that are folders above some files; those without the folder have NULL.
FOLDER_COLUMNS = ("day", "zone")
ENDINGS = {
    PARQUET: ((".parquet",),),
    CSV: ((".csv",), (".csv",), (".csv.gz",), (".csv", ".csv.gz", ".csv.zst")),
    JSON: ((".json",), (".jsonl",), (".ndjson",), (".json.gz",), (".json", ".jsonl.gz", ".ndjson.zst")),
}
# Type names as they are declared.
TYPES = {
    "pguid": "string", "site": "long", "op": "string", "seq": "long", "name": "string", "amount": "double",
    "updated_at": "timestamp", "region": "string", "day": "int",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """How CSV files are written."""

    delimiter: str = ","
    header: bool = True
    null: str = ""


@dataclass(frozen=True)
class Shape:
    """The configuration of a world."""

    key: tuple[str, ...]
    sequence_by: str | None
    order: str
    slots: int
    batch_epochs: int | None
    small_files: int | None
    expects: bool
    refuse_duplicates: bool
    ignore: tuple[str, ...]
    replay_changed: bool
    # Of the rows, in the files' order.
    columns: tuple[str, ...]
    mode: str = UPSERT
    partition_by: tuple[str, ...] = ()
    skip_unchanged: bool = False
    change_feed: bool = False
    format: str = PARQUET
    text: Text = Text()
    # File endings, taken in turn.
    endings: tuple[str, ...] = (".parquet",)
    # Columns with a type in the configuration, in its order; none: the files say the types.
    declared: tuple[str, ...] = ()
    # Files lack columns, have them in another order or case, or in narrower types.
    drift: bool = False
    # Some rows have a value that its column cannot hold, or are no rows; they are refused.
    misfits: bool = False
    # `select` leaves rows out.
    selects: bool = False
    # How rows of main that go are taken out: by marks (None), or by copies of their files.
    deletion_vectors: str | None = None
    # Side indexes of keys: of what is scanned again (None), of all, or none.
    index: str | None = None
    # Steps of more bytes are done in pieces.
    shard_size: str | None = None

    @property
    def is_typed_by_rows(self) -> bool:
        """Then a column without any value has no type: each file's first row has them all."""
        return self.format == JSON and not self.declared

    @property
    def deletes(self) -> bool:
        return self.mode != APPEND

    @property
    def file_names(self) -> tuple[str, ...]:
        """Which names files may have, with their endings."""
        return tuple(name + self.endings[at % len(self.endings)] for at, name in enumerate(FILE_NAMES))


def draw_shape(rng: random.Random) -> Shape:
    """A configuration that is valid as a whole."""
    mode = rng.choices((UPSERT, APPEND, SNAPSHOT, SCD2), (60, 12, 12, 16))[0]
    kind = rng.choices((PARQUET, CSV, JSON), (70, 15, 15))[0]
    composite = rng.random() < 0.3
    is_keyed = mode != APPEND
    ids = ("pguid", "site") if composite else ("pguid",)
    ignore = ("op", "seq") if rng.random() < 0.3 else ()
    partition_by = _partition(rng, composite, ignore) if rng.random() < 0.2 else ()
    region = ("region",) if "region" in partition_by else ()
    columns = (*ids, "op", "seq", "name", "amount", "updated_at", *region)
    text = _text(rng) if kind == CSV else Text()
    # A partition column needs a type from the first epoch on.
    is_declared = kind == CSV or rng.random() < 0.3 or (kind == JSON and bool(partition_by))
    compares = mode in (UPSERT, SNAPSHOT)
    misfits = is_declared and rng.random() < 0.5
    return Shape(
        key=ids if is_keyed else (),
        sequence_by="seq" if rng.random() < 0.5 and is_keyed else None,
        order=rng.choice(("sequential", "arrival")),
        slots=rng.randint(1, 4),
        batch_epochs=rng.choice((None, 1, 3, 100)),
        small_files=2 if rng.random() < 0.4 else None,
        expects=rng.random() < 0.3,
        refuse_duplicates=rng.random() < 0.3 and is_keyed,
        ignore=ignore,
        replay_changed=rng.random() < 0.3,
        columns=columns,
        mode=mode,
        partition_by=partition_by,
        skip_unchanged=rng.random() < 0.3 and compares,
        change_feed=rng.random() < 0.2 and compares,
        format=kind,
        text=text,
        endings=rng.choice(ENDINGS[kind]),
        declared=_declared(rng, columns, text) if is_declared else (),
        # Without a header the declared columns are the files'.
        drift=is_declared and text.header and rng.random() < 0.7,
        misfits=misfits,
        # Where files have types a value may not fit these before `select` sees its row.
        selects=rng.random() < 0.25 and (kind == CSV or not misfits),
        deletion_vectors=rng.choice((None, None, "off", "upgrade")),
    )


def draw_index(rng: random.Random) -> str | None:
    """Apart from all else, so that a seed's plan is what it was before there were indexes."""
    return rng.choice((None, "always", "always", "off"))


def draw_shard_size(rng: random.Random) -> str | None:
    """Apart from all else, too. Files are of a few KiB: two or three make a piece, or each makes one."""
    return rng.choice((None, None, "1KiB", "8KiB"))


def _partition(rng: random.Random, composite: bool, ignore: tuple[str, ...]) -> tuple[str, ...]:
    """By a part of the key, or by a column whose values move."""
    if composite and rng.random() < 0.6:
        return ("site",)
    choices = [("region",), ("region",)]
    if not ignore:
        choices += [("seq",), ("op", "seq"), ("op",)]
    return rng.choice(choices)


def _declared(rng: random.Random, columns: tuple[str, ...], text: Text) -> tuple[str, ...]:
    """All of the rows' columns in some order; sometimes a folder's, too (it is not in the files)."""
    more = ("day",) if text.header and rng.random() < 0.5 else ()
    return tuple(rng.sample((*columns, *more), len(columns) + len(more)))


def _text(rng: random.Random) -> Text:
    return Text(
        rng.choice((",", ",", ";", "\t", "|")), rng.random() < 0.75, rng.choice(("", "", "\\N", "NULL"))
    )
