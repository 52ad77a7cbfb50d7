"""What an epoch folder is beside its files' rows: key=value folders, damaged files, a Delta table.

Never: text formats (test_formats.py), values that do not fit a column (test_types.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from delta_making import checkpoint_and_forget, delete_by_vector
from lake import Lake

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])
REFUSE = 'on_corrupt_file = "quarantine"'
DELTA = 'format = "delta"'


def table(*rows: tuple, **more: list) -> pa.Table:
    """Rows (id, value); more columns by name."""
    keys, values = zip(*rows)
    made = pa.table([keys, values, ["U"] * len(rows)], schema=SCHEMA)
    for name, values in more.items():
        made = made.append_column(name, pa.array(values))
    return made


# --- key=value --------------------------------------------------------------------------------


def test_key_value_folders_become_columns(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.write(10, "country=NL/year=2024/part-0.parquet", table(("a", 1)))
    lake.write(10, "country=K%C3%B6ln%2FBonn %3D/year=007/part-0.parquet", table(("b", 2), ("c", 3)))
    lake.write(10, "country=__HIVE_DEFAULT_PARTITION__/year=2024/part-0.parquet", table(("d", 4)))
    lake.write(10, "part-0.parquet", table(("e", 5)))
    lake.run()
    found = {row["id"]: (row["country"], row["year"]) for row in lake.rows()}
    there = ("Köln/Bonn =", "007")
    assert found == {"a": ("NL", "2024"), "b": there, "c": there, "d": (None, "2024"), "e": (None, None)}
    assert lake.types("raw")["year"] == lake.types()["year"] == "string"
    places = [(row["_file"], row["_row"]) for row in lake.rows("raw")]
    assert places[0] == ("country=NL/year=2024/part-0.parquet", 0) and places[2][1] == 1


def test_a_folders_column_may_be_declared_and_may_be_the_key(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(columns='year = "int"')
    lake.pipelines["p"] = lake.pipelines["p"].replace('["id"]', '["id", "year"]')
    lake.configure()
    lake.write(10, "year=2023/part-0.parquet", table(("a", 1)))
    lake.write(10, "year=2024/part-0.parquet", table(("a", 2)))
    lake.run()
    assert sorted((row["id"], row["year"], row["value"]) for row in lake.rows()) == [
        ("a", 2023, 1), ("a", 2024, 2)
    ]  # fmt: skip
    assert lake.types()["year"] == "integer"
    lake.write(20, "year=soon/part-0.parquet", table(("a", 3)))
    done = lake.run(code=1)
    assert "AL-0303" in done.err and "year" in done.err and "soon" in done.err, done.err


def test_a_folders_column_has_the_tables_type(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.write(10, "part-0.parquet", table(("a", 1), year=[2023]))
    lake.write(20, "year=2024/part-0.parquet", table(("b", 2)))
    lake.run()
    assert [row["year"] for row in lake.rows()] == [2023, 2024] and lake.types()["year"] == "long"


def test_a_column_of_the_file_wins_over_the_folders(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.write(10, "country=NL/part-0.parquet", table(("a", 1), ("b", 2), country=["DE", None]))
    lake.run()
    assert [row["country"] for row in lake.rows()] == ["DE", None]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_text_files_lie_in_key_value_folders_too(tmp_path: Path, kind: str):
    lake = Lake(tmp_path).pipeline(more=f'format = "{kind}"')
    for key, value in (("a", 1), ("b", 2)):
        csv, line = f"id,value,op\n{key},{value},U", f'{{"id":"{key}","value":{value},"op":"U"}}'
        lake.write(10, f"day=2024-02-0{value}/part-0.{kind}", csv if kind == "csv" else line)
    lake.run()
    assert [(row["id"], row["day"]) for row in lake.rows()] == [("a", "2024-02-01"), ("b", "2024-02-02")]
    assert lake.types()["day"] == "string"


# --- damaged files ----------------------------------------------------------------------------


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(*((f"k{n}", n) for n in range(100))), sink)
    return sink.getvalue().to_pybytes()


def packed_bytes(codec: str, text: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(text.encode())
    return sink.getvalue().to_pybytes()


LONG = "id,value,op\n" + "".join(f"k{n},{n * 7919 % 100_003},U\n" for n in range(50_000))
DAMAGED = {
    "truncated": ("parquet", "parquet", parquet_bytes()[:-20]),
    "garbage": ("parquet", "parquet", b"no parquet at all " * 100),
    "a page": ("parquet", "parquet", parquet_bytes()[:4] + bytes(40) + parquet_bytes()[44:]),
    "no gzip": ("csv", "csv.gz", b"id,value,op\nz,9,U\n"),
    "half a gzip": ("csv", "csv.gz", packed_bytes("gzip", LONG)[:-3000]),
    "no zstd": ("json", "jsonl.zst", b'{"id":"z","value":9,"op":"U"}\n'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_blocks_its_epoch_or_is_refused_alone(tmp_path: Path, damage: str):
    kind, ending, content = DAMAGED[damage]
    lake = Lake(tmp_path).pipeline(more=f'format = "{kind}"')
    good = {
        "parquet": table(("a", 1)), "csv": "id,value,op\na,1,U\n", "json": '{"id":"a","value":1,"op":"U"}\n'
    }[kind]  # fmt: skip
    lake.write(10, f"part-0.{kind}", good)
    damaged = lake.write(10, f"part-1.{ending}", content)
    lake.write(10, f"part-2.{kind}", good)
    done = lake.run(code=1)
    assert "AL-0301" in done.err and f"10/part-1.{ending}" in done.err, done.err
    assert not (tmp_path / "p/main").exists() and lake.states() == {10: "blocked"}

    lake.pipeline(more=f'format = "{kind}"\n{REFUSE}')
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1} and lake.states() == {10: "processed"}
    [(reason, row, shown)] = lake.refused()
    assert (reason, row, list(shown)) == ("corrupt_file", None, ["error"]) and shown["error"]
    [item] = lake.alluvium("quarantine", "show", "p", "10", "-o", "json").json()
    assert item["file"] == f"part-1.{ending}"
    assert lake.alluvium("quarantine", "list").code == 0

    damaged.unlink()
    lake.write(10, f"part-1.{kind}", good)
    assert lake.alluvium("quarantine", "replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1} and lake.refused() == [] and len(lake.rows("raw")) == 3


# --- Delta ------------------------------------------------------------------------------------


def deliver_delta(lake: Lake, epoch: int, *versions: pa.Table, mode: str = "overwrite", **more) -> Path:
    folder = lake.folder(epoch)
    for version in versions:
        write_deltalake(str(folder), version, mode=mode, **more)
    (folder / "_SUCCESS").write_text("done")
    return folder


def test_a_delta_folders_rows_are_those_that_live(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=DELTA)
    folder = deliver_delta(lake, 10, table(("dead", 0), ("a", 0)), table(("a", 1), ("b", 2)))
    deliver_delta(lake, 20, table(("b", 3)), table(("c", 4)), mode="append")
    assert len(list(folder.glob("*.parquet"))) == 2, "the dead file lies there"
    lake.run()
    assert lake.main() == {"a": 1, "b": 3, "c": 4} and lake.states() == {10: "processed", 20: "processed"}
    [live] = DeltaTable(folder).file_uris()
    first = [(row["id"], row["_file"], row["_row"]) for row in lake.rows("raw") if row["_epoch"] == 10]
    name = os.path.relpath(live, folder)
    assert first == [(key, name, row) for row, key in enumerate(pq.read_table(live)["id"].to_pylist())]


def test_a_partitioned_delta_folder(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=DELTA)
    old = table(("x", 0), ("y", 0), country=["NL", "DE"], year=[2023, 2023])
    new = table(("a", 1), ("b", 2), ("c", 3), country=["NL", None, "NL"], year=[2024, 2024, 2025])
    folder = deliver_delta(lake, 10, old, new, partition_by=["country", "year"])
    lake.run()
    found = [(row["id"], row["value"], row["country"], row["year"]) for row in lake.rows()]
    assert found == [("a", 1, "NL", 2024), ("b", 2, None, 2024), ("c", 3, "NL", 2025)]
    assert lake.types()["year"] == "long"
    live = {os.path.relpath(uri, folder) for uri in DeltaTable(folder).file_uris()}
    assert {row["_file"] for row in lake.rows("raw")} == live and len(live) == 3


def test_rows_that_a_delta_folder_lost_do_not_come(tmp_path: Path):
    """Deleted by rewriting, and with a log that begins with a checkpoint."""
    lake = Lake(tmp_path).pipeline(more=DELTA)
    folder = deliver_delta(lake, 10, table(("a", 1), ("b", 2)), table(("c", 3)), mode="append")
    DeltaTable(folder).delete("id = 'a'")
    checkpoint_and_forget(folder)
    lake.run()
    assert lake.main() == {"b": 2, "c": 3}


def deletion_vectors(folder: Path) -> None:
    delete_by_vector(folder, [0])


def column_mapping(folder: Path) -> None:
    path = folder / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        if "metaData" in action:
            schema = json.loads(action["metaData"]["schemaString"])
            for at, column in enumerate(schema["fields"], 1):
                name = {"delta.columnMapping.physicalName": column["name"], "delta.columnMapping.id": at}
                column["metadata"] = name
            action["metaData"]["schemaString"] = json.dumps(schema)
            action["metaData"]["configuration"] = {
                "delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "3"
            }  # fmt: skip
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
    path.write_text("".join(json.dumps(action) + "\n" for action in actions))


@pytest.mark.parametrize(("feature", "words"), [(deletion_vectors, "deletion"), (column_mapping, "mapping")])
def test_a_delta_folder_that_would_be_misread_is_blocked(tmp_path: Path, feature, words: str):
    lake = Lake(tmp_path).pipeline(more=DELTA)
    feature(deliver_delta(lake, 10, table(("a", 1), ("b", 2))))
    done = lake.run(code=1)
    assert "AL-" in done.err and words in done.err.lower() and "10" in done.err, done.err
    assert lake.states() == {10: "blocked"} and not (tmp_path / "p/main").exists()


def test_a_folder_that_is_no_delta_table_is_named(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=DELTA)
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run(code=1)
    assert "AL-" in done.err and "in_p/10" in done.err and "delta" in done.err.lower(), done.err
    assert lake.states() == {10: "blocked"} and not (tmp_path / "p/main").exists()
    lake.pipeline()
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1}
