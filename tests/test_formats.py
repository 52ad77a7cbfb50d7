"""Text files: CSV and JSON lines, packed or not, and what a row of them is.

Never: values that do not fit a column (test_types.py), folders and damaged files (test_folders.py).
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

UTC = dt.timezone.utc
CSV, JSON = 'format = "csv"', 'format = "json"'
REFUSE = 'on_mismatch = "quarantine"'


def places(lake: Lake) -> list[tuple]:
    return [(row["id"], row["_file"], row["_row"]) for row in lake.rows("raw")]


def packed(text: str, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(text.encode())
    return sink.getvalue().to_pybytes()


# --- CSV --------------------------------------------------------------------------------------


def test_csv_has_its_names_in_the_first_line_and_empty_lines_are_no_rows(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=CSV)
    lake.write(10, "part-0.csv", "id,value,op\n\na,1,U\n\n\nb,-2,U\nc,,U\nd,4,D\n")
    lake.run()
    assert lake.main() == {"a": 1, "b": -2, "c": None}
    assert lake.types("raw") == lake.types() == {"id": "string", "value": "long", "op": "string"}
    assert places(lake) == [(key, "part-0.csv", row) for row, key in enumerate("abcd")]


def test_csv_without_names_has_c1_c2(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\ncsv = {{ header = false }}", deletes=False)
    lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', 'key = ["c1"]')
    lake.configure()
    lake.write(10, "part-0.csv", "a,1\nb,2\n")
    lake.run()
    assert lake.rows(by="c1") == [{"c1": "a", "c2": 1}, {"c1": "b", "c2": 2}]
    assert [row["_row"] for row in lake.rows("raw", by="c1")] == [0, 1]


def test_csv_without_names_has_those_declared(tmp_path: Path):
    columns = 'id = "string"\nvalue = "int"\nop = "string"'
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\ncsv = {{ header = false }}", columns=columns)
    lake.write(10, "part-0.csv", "7,1,U\nb,2,D\n")
    lake.run()
    assert lake.main() == {"7": 1} and lake.types()["value"] == "integer"


def test_csv_without_names_begins_with_a_row_that_is_none(tmp_path: Path):
    columns = 'id = "string"\nday = "int"\nvalue = "int"'
    more = f'{CSV}\ncsv = {{ header = false }}\non_mismatch = "quarantine"'
    lake = Lake(tmp_path).pipeline(more=more, columns=columns, deletes=False)
    lake.write(10, "day=7/a.csv", "a,1,x,y\nb,2\n")
    lake.write(10, "b.csv", "c\nd,8,4\n")
    lake.run()
    found = {row["id"]: (row["day"], row["value"]) for row in lake.rows()}
    assert found == {"b": (7, 2), "d": (8, 4)}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("malformed", 0)] * 2


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_csv_fields_are_parted_by_what_the_settings_say(tmp_path: Path, delimiter: str):
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\ncsv = {{ delimiter = {json.dumps(delimiter)} }}")
    text = "id,value,op,note\na,1,U,x\n".replace(",", delimiter)
    lake.write(10, "part-0.csv", text + delimiter.join(["b", "2", "U", "one, two"]) + "\n")
    lake.run()
    assert [row["note"] for row in lake.rows()] == ["x", "one, two"]


def test_csv_has_a_text_that_means_null(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f'{CSV}\ncsv = {{ null = "NA" }}')
    lake.write(10, "part-0.csv", "id,value,op,note\na,1,U,NA\nb,NA,U,\nNA,3,U,NaN\nc,4,U,x\n")
    lake.run()
    assert [(row["value"], row["note"]) for row in lake.rows()] == [(1, None), (None, ""), (4, "x")]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("null_key", 2)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_field_may_hold_lines_delimiters_and_quotes(tmp_path: Path, end: str):
    lake = Lake(tmp_path).pipeline(more=CSV)
    text = 'id,value,op,note\na,1,U,"two,\nlines ""quoted""\n\n"\n"b",2,"U",plain\n'
    lake.write(10, "part-0.csv", text.replace("\n", end).rstrip("\r\n"))  # and no end of the last line
    lake.run()
    notes = [row["note"] for row in lake.rows()]
    assert notes == ['two,\nlines "quoted"\n\n'.replace("\n", end), "plain"]
    assert places(lake) == [("a", "part-0.csv", 0), ("b", "part-0.csv", 1)]


MALFORMED_JSON = ['{"id": "b", "val', '[{"id": "b"}]', '"b"', "7", "null", "no json", '{"id": "b\udcff"}']
OBJECT = '{{"id":"{}","value":{},"op":"U"}}'
MALFORMED = [
    *((CSV, "csv", "id,value,op", "{},{},U", line) for line in ["b,2", "b,2,U,x", "b\udcff,2,U"]),
    *((JSON, "jsonl", "", OBJECT, line) for line in MALFORMED_JSON),
]


@pytest.mark.parametrize(("settings", "ending", "head", "good", "line"), MALFORMED)
def test_a_malformed_row_blocks_or_is_refused(
    tmp_path: Path, settings: str, ending: str, head: str, good: str, line: str
):
    lake = Lake(tmp_path).pipeline(more=settings)
    lines = [head, good.format("a", 1), line, good.format("c", 3)]
    text = "\n".join(lines).encode(errors="surrogateescape")
    lake.write(10, f"part-0.{ending}", text)
    done = lake.run(code=1)
    assert "AL-0310" in done.err and f"part-0.{ending}" in done.err and "row 1" in done.err, done.err
    assert not (tmp_path / "p/main").exists() and lake.states() == {10: "blocked"}

    lake.pipeline(more=f"{settings}\n{REFUSE}")
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1, "c": 3} and lake.types()["value"] == "long"
    [(reason, row, content)] = lake.refused()
    assert (reason, row) == ("malformed", 1)
    assert "\udcff" in line or content == {"line": line}


INFERRED = [
    (["1", "-20", "9223372036854775807"], "long", [1, -20, 2**63 - 1]),
    (["1", "", "0"], "long", [1, None, 0]),
    (["1", "2.5"], "double", [1.0, 2.5]),
    (["007", "1"], "string", ["007", "1"]),
    (["+1", "1"], "string", ["+1", "1"]),
    (["true", "false"], "boolean", [True, False]),
    (["true", "1"], "string", ["true", "1"]),
    (["2024-02-29", ""], "date", [dt.date(2024, 2, 29), None]),
    (["2024-02-29", "2024-02-30"], "string", ["2024-02-29", "2024-02-30"]),
    (["2024-02-29", "2024-3-1"], "string", ["2024-02-29", "2024-3-1"]),
    (["2024-02-29", "20240301"], "string", ["2024-02-29", "20240301"]),
    (
        ["2024-02-29T12:00:00Z", "2024-02-29T12:00:00.5+02:00"], "timestamp",
        [dt.datetime(2024, 2, 29, 12, tzinfo=UTC), dt.datetime(2024, 2, 29, 10, 0, 0, 500_000, UTC)],
    ),
    (["2024-02-29T12:00:00"], "timestamp_ntz", [dt.datetime(2024, 2, 29, 12)]),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "kind", "values"), INFERRED)
@pytest.mark.parametrize("files", ["one", "many"])
def test_a_csv_column_has_the_type_that_all_values_of_the_epoch_have(
    tmp_path: Path, texts: list[str], kind: str, values: list, files: str
):
    lake = Lake(tmp_path).pipeline(more=CSV)
    rows = [f"k{at},{text},U\n" for at, text in enumerate(texts)]
    groups = ["".join(rows)] if files == "one" else rows
    for at, group in enumerate(groups):
        lake.write(10, f"part-{at}.csv", "id,value,op\n" + group)
    lake.run()
    assert lake.types()["value"] == kind
    assert [row["value"] for row in lake.rows()] == values


def test_keys_of_csv_that_differ_as_texts_are_two(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=CSV)
    lake.write(10, "part-0.csv", "id,value,op,share\n1.1,1,U,1.50\n1.10,2,U,2.5\n")
    lake.run()
    assert lake.main() == {"1.1": 1, "1.10": 2} and lake.types()["share"] == "double"


def test_a_csv_column_that_the_table_has_keeps_its_type(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=CSV)
    lake.write(10, "part-0.csv", "id,value,op,share\n007,x,U,0.5\n")
    lake.write(20, "part-0.csv", "id,value,op,share\n8,12,U,3\n")
    lake.run()
    found = [(row["id"], row["value"], row["share"]) for row in lake.rows()]
    assert found == [("007", "x", 0.5), ("8", "12", 3.0)]


# --- JSON lines -------------------------------------------------------------------------------


def test_json_says_its_types_itself(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=JSON)
    first = {"id": "a", "value": 9007199254740993, "op": "U", "share": 1, "ok": True, "day": "2024-02-29"}
    second = {"op": "U", "id": "b", "share": 2.5, "ok": None}
    lake.write(10, "part-0.jsonl", f"{json.dumps(first)}\n{json.dumps(second)}\n")
    lake.run()
    assert lake.types() == {
        "id": "string", "value": "long", "op": "string", "share": "double", "ok": "boolean", "day": "string"
    }  # fmt: skip
    missing = {"value": None, "day": None}
    assert lake.rows() == [first, second | missing]


def test_json_may_be_nested(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=JSON)
    rows = [
        {"id": "a", "value": 1, "op": "U", "tags": ["x", "y"], "at": {"lat": 1.5, "names": [{"de": "Köln"}]}},
        {"id": "b", "value": 2, "op": "U", "tags": [], "at": {"lat": 2, "zip": 50667}},
        {"id": "c", "value": 3, "op": "U"},
    ]
    lake.write(10, "part-0.json", "\n".join(json.dumps(row) for row in rows))
    lake.run()
    a, b, c = lake.rows()
    assert a["tags"] == ["x", "y"] and a["at"] == {"lat": 1.5, "names": [{"de": "Köln"}], "zip": None}
    assert b["tags"] == [] and b["at"] == {"lat": 2.0, "names": None, "zip": 50667}
    assert c["tags"] is None and c["at"] is None
    assert lake.types()["tags"]["elementType"] == "string"


def test_empty_json_lines_are_no_rows(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=JSON)
    lake.write(10, "part-0.ndjson", '\n{"id":"a","value":1,"op":"U"}\n\n\n{"value":2,"op":"U"}\r\n')
    lake.run()
    assert lake.main() == {"a": 1} and places(lake) == [("a", "part-0.ndjson", 0)]
    assert lake.refused() == [("null_key", 1, {"value": 2, "op": "U"})]


@pytest.mark.parametrize(("ending", "codec"), [("gz", "gzip"), ("zst", "zstd")])
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "ndjson"])
def test_packed_files_are_unpacked(tmp_path: Path, ending: str, codec: str, kind: str):
    lake = Lake(tmp_path).pipeline(more=CSV if kind == "csv" else JSON)
    if kind == "csv":
        texts = [f"id,value,op\n{key},{value},U\n" for key, value in (("a", 1), ("b", 2))]
    else:
        texts = [f'{{"id":"{key}","value":{value},"op":"U"}}\n' for key, value in (("a", 1), ("b", 2))]
    lake.write(10, f"part-0.{kind}.{ending}", packed(texts[0], codec))
    lake.write(10, f"part-1.{kind}", texts[1])
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
    assert places(lake) == [("a", f"part-0.{kind}.{ending}", 0), ("b", f"part-1.{kind}", 0)]


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "says"),
    [
        ('format = "xml"', "format", "csv"),
        (f'{CSV}\ncsv = {{ delimiter = ";;" }}', "csv.delimiter", ""),
        (f'{CSV}\ncsv = {{ delimiter = "" }}', "csv.delimiter", ""),
        (f'{CSV}\ncsv = {{ delimiter = "ä" }}', "csv.delimiter", ""),
        (f'{CSV}\ncsv = {{ header = "yes" }}', "csv.header", ""),
        (f'{CSV}\ncsv = {{ quote = "x" }}', "csv.quote", ""),
        ('on_mismatch = "null"', "on_mismatch", "quarantine"),
        ('on_corrupt_file = "skip"', "on_corrupt_file", "quarantine"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: str, name: str, says: str):
    done = Lake(tmp_path).pipeline(more=settings).alluvium("config", "validate")
    assert done.code == 2 and f"pipeline.p.{name}" in done.err and says in done.err, done.err


@pytest.mark.parametrize("settings", [CSV, JSON])
def test_parquet_is_not_taken_for_text(tmp_path: Path, settings: str):
    lake = Lake(tmp_path).pipeline(more=settings)
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run(code=1)
    assert "AL-03" in done.err and "part-0.parquet" in done.err, done.err
    assert lake.states() == {10: "blocked"} and not (tmp_path / "p/main").exists()
    lake.pipeline()
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1}
