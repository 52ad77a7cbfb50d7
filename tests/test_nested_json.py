"""Values within values that JSON lines and corrected rows bring: each is judged, none is lost without a word.

Never: single values (test_misfits.py), names of whole columns (test_formats.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

MORE = 'format = "json"\non_mismatch = "quarantine"'
STRUCT = 'id = "long"\no = "struct<a:long>"'


def a_lake(tmp_path: Path, columns: str = STRUCT, more: str = MORE) -> Lake:
    return Lake(tmp_path).pipeline(more=more, columns=columns, deletes=False)


def deliver(lake: Lake, *lines: str, epoch: int = 10) -> None:
    lake.write(epoch, "a.json", "\n".join(lines) + "\n")
    lake.run()


def refused(lake: Lake) -> list[tuple]:
    return [(reason, row) for reason, row, _ in lake.refused()]


def correct(lake: Lake, content: dict, file: str = "a.json", row: int = 0) -> None:
    (lake.root / "rows.json").write_text(json.dumps([{"file": file, "row": row, "content": content}]))
    done = lake.alluvium("quarantine", "replay", "p", "10", "--rows", "rows.json", "--yes")
    assert done.code == 0, done.err


@pytest.mark.parametrize("bad", ['"bad"', "5", "[]", '"{}"'])
def test_a_value_that_is_none_leaves_the_others_as_they_are(tmp_path: Path, bad: str):
    lake = a_lake(tmp_path)
    lines = ['{"id":1,"o":{"A":1}}', f'{{"id":2,"o":{bad}}}', '{"id":3,"o":{"a":3,"b":4}}']
    deliver(lake, *lines, '{"id":4,"o":{"zz":1}}', '{"id":5,"o":{"a":1,"A":2}}', '{"id":6,"o":{"a":7,"b":null}}')
    assert {row["id"]: row["o"] for row in lake.rows()} == {1: {"a": 1}, 6: {"a": 7}}
    assert refused(lake) == [("type:o", row) for row in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("kind", "form", "made"),
    [
        ("array<struct<a:long>>", "[{}]", [{"a": 1}]),
        ("map<string,struct<a:long>>", '{{"k":{}}}', [("k", {"a": 1})]),
        ("struct<s:struct<a:long>>", '{{"s":{}}}', {"s": {"a": 1}}),
    ],
)
def test_so_it_is_deep_inside(tmp_path: Path, kind: str, form: str, made):
    lake = a_lake(tmp_path, f'id = "long"\no = "{kind}"')
    values = ['{"A":1}', '"bad"', '{"a":3,"b":4}']
    deliver(lake, *(f'{{"id":{at},"o":{form.format(value)}}}' for at, value in enumerate(values)))
    assert [(row["id"], row["o"]) for row in lake.rows()] == [(0, made)]
    assert refused(lake) == [("type:o", 1), ("type:o", 2)]


def test_so_it_is_without_a_declaration(tmp_path: Path):
    lake = a_lake(tmp_path, columns="")
    deliver(lake, '{"id":1,"o":{"a":1}}')
    deliver(lake, '{"id":3,"o":{"A":2}}', '{"id":4,"o":"{}"}', epoch=20)
    assert {row["id"]: row["o"] for row in lake.rows()} == {1: {"a": 1}, 3: {"a": 2}}
    assert refused(lake) == [("type:o", 1)]


@pytest.mark.parametrize(
    ("content", "made"),
    [
        ({"id": 1, "o": {"a": 5, "zz": 1}}, None),
        ({"id": 1, "o": "{}"}, None),
        ({"id": 1, "o": {"A": 5}}, {"a": 5}),
        ({"id": 1, "o": None}, None),
    ],
)
def test_a_corrected_row_is_judged_to_its_last_part(tmp_path: Path, content: dict, made: dict | None):
    lake = a_lake(tmp_path)
    deliver(lake, '{"id":"x"}', '{"id":2}')
    correct(lake, content)
    fits = made is not None or content["o"] is None
    assert {row["id"]: row["o"] for row in lake.rows()} == ({1: made, 2: None} if fits else {2: None})
    assert refused(lake) == ([] if fits else [("type:o", 0)])


def test_a_corrected_row_of_a_parquet_file_too(tmp_path: Path):
    lake = a_lake(tmp_path, columns="", more='on_mismatch = "quarantine"')
    kind = pa.struct([("a", pa.int64())])
    lake.write(10, "a.parquet", pa.table({"id": [None, "b"], "o": pa.array([{"a": 1}, {"a": 2}], kind)}))
    lake.run()
    correct(lake, {"id": "a", "o": {"B": "1.1"}}, file="a.parquet")
    assert [row["id"] for row in lake.rows()] == ["b"] and refused(lake) == [("type:o", 0)]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("map<binary,string>", '{"00ff":"x","00FF":"y"}'),
        ("map<long,string>", '{"01":"x","1":"y"}'),
        ("map<decimal(5,2),string>", '{"1.50":"x","1.5":"y"}'),
        ("map<int,string>", '{"q":"x"}'),
        ("map<date,string>", '{"2024-02-30":"x"}'),
        ("binary", '"0"'),
        ("binary", '"abc"'),
        ("binary", '"zz"'),
        ("map<binary,string>", '{"0":"x"}'),
        ("array<binary>", '["00","0"]'),
    ],
)
def test_a_value_that_would_become_another_is_refused_alone(tmp_path: Path, kind: str, value: str):
    good = {"map<int": '{"1":"x"}', "map<long": '{"1":"x"}', "map<date": '{"2024-02-29":"x"}'}
    other = good.get(kind.split(",")[0], "null")
    lake = a_lake(tmp_path, f'id = "long"\nv = "{kind}"')
    deliver(lake, f'{{"id":1,"v":{other}}}', f'{{"id":2,"v":{value}}}', '{"id":3}')
    found = {row["id"]: row["v"] for row in lake.rows()}
    assert found.keys() == {1, 3} and (found[1] is not None) == (other != "null")
    assert refused(lake) == [("type:v", 1)]


def test_values_too_deep_for_a_tables_log_are_refused(tmp_path: Path):
    """A log with them could never be read again."""
    lake = a_lake(tmp_path, columns="")
    deliver(lake, '{"id":"a","v":1}')
    for depth in (20, 35, 60):
        deep = '{"a":' * depth + "1" + "}" * depth
        deliver(lake, f'{{"id":"b{depth}","o{depth}":{deep}}}', epoch=depth)
    assert [row["id"] for row in lake.rows()] == ["a", "b20"]
    assert refused(lake) == [("malformed", 0)] * 2


def test_parquet_too_deep_for_a_tables_log_blocks(tmp_path: Path):
    lake = a_lake(tmp_path, columns="", more="")
    value, kind = 1, pa.int64()
    for _ in range(42):
        value, kind = {"a": value}, pa.struct([("a", kind)])
    lake.write(10, "a.parquet", pa.table({"id": ["a"], "o": pa.array([value], kind)}))
    done = lake.run(code=1)
    assert "AL-0303" in done.err and "deeper" in done.err and not (tmp_path / "p/raw").exists()
