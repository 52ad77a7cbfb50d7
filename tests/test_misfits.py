"""A value that does not fit its column: judged row by row, never cut, never NULL.

Never: types as such (test_types.py).
"""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

CSV, JSON = 'format = "csv"', 'format = "json"'
REFUSE = 'on_mismatch = "quarantine"'
NOON = dt.datetime(2024, 2, 29, 12)


def table(kind: pa.DataType, *values, ids: str = "abcdef") -> pa.Table:
    """Rows a, b, c … with these values."""
    count = len(values)
    return pa.table({"id": list(ids[:count]), "value": pa.array(values, kind), "op": ["U"] * count})


def blocked(lake: Lake, *names: str) -> None:
    """The next run blocks epoch 20, names these, and no table changes."""
    before = lake.version("raw"), lake.version("main"), lake.rows(), lake.types()
    done = lake.run(code=1)
    assert "AL-0303" in done.err and lake.states()[20] == "blocked", done.err
    for name in names:
        assert name in done.err, f"{name} is not named:\n{done.err}"
    assert (lake.version("raw"), lake.version("main"), lake.rows(), lake.types()) == before
    assert lake.refused() == []


# The table's type; the file's; a value that fits, and what it becomes; one that does not, as told.
MISFITS = [
    ("int", pa.float64(), 2.0, 2, 1.5, "1.5"),
    ("int", pa.int64(), -(2**31), -(2**31), 2**31, "2147483648"),
    ("byte", pa.int32(), 127, 127, 128, "128"),
    ("long", pa.float64(), -3.0, -3, 1e19, ""),
    ("long", pa.float64(), 0.0, 0, float("nan"), ""),
    ("long", pa.string(), "12", 12, "nine", "nine"),
    ("long", pa.decimal128(20, 1), Decimal("7.0"), 7, Decimal("7.5"), "7.5"),
    ("float", pa.float64(), 0.5, 0.5, 1e39, ""),
    ("decimal(10,2)", pa.decimal128(10, 3), Decimal("1.230"), Decimal("1.23"), Decimal("1.239"), "1.239"),
    ("decimal(10,2)", pa.int64(), 99_999_999, Decimal(99_999_999), 100_000_000, "100000000"),
    ("decimal(10,2)", pa.string(), "1.5", Decimal("1.50"), "1.239", "1.239"),
    ("date", pa.string(), "2024-02-29", NOON.date(), "soon", "soon"),
    ("date", pa.string(), "2024-02-29", NOON.date(), "2024-02-30", "2024-02-30"),
    ("date", pa.timestamp("us"), None, None, NOON, "12:00"),
    ("boolean", pa.string(), "true", True, "maybe", "maybe"),
]


@pytest.mark.parametrize(("kind", "came", "good", "value", "bad", "shown"), MISFITS)
@pytest.mark.parametrize("origin", ["declared", "frozen"])
def test_each_value_is_judged_by_itself(
    tmp_path: Path, kind: str, came, good, value, bad, shown: str, origin: str
):
    """Whether the settings say the type, or a table that nothing may widen."""
    columns, more = f'id = "string"\nvalue = "{kind}"\nop = "string"', ""
    lake = Lake(tmp_path).pipeline(columns=columns)
    lake.write(10, "part-0.parquet", table(pa.null(), None, ids="z"))
    lake.run()
    if origin == "frozen":
        columns, more = "", 'schema = "freeze"'
        lake.pipeline(more=more)
    lake.write(20, "part-0.parquet", table(came, good, bad, None))
    blocked(lake, "20/part-0.parquet", '"value"', "row 1", shown)

    lake.pipeline(more=f"{more}\n{REFUSE}", columns=columns)
    assert lake.alluvium("retry", "p", "20").code == 0
    lake.run()
    assert [(row["id"], row["value"]) for row in lake.rows()] == [("a", value), ("c", None), ("z", None)]
    [(reason, row, content)] = lake.refused()
    assert (reason, row, content["id"]) == ("type:value", 1, "b") and shown in str(content.get("value"))
    assert lake.types()["value"] == {"int": "integer"}.get(kind, kind)


TEXTS = [
    ("byte", "128"),
    ("int", "1.5"),
    ("int", "twelve"),
    ("long", "9223372036854775808"),
    ("double", "much"),
    ("float", "1e39"),
    ("boolean", "maybe"),
    ("decimal(10,2)", "1.239"),
    ("decimal(10,2)", "100000000"),
    ("date", "2023-02-29"),
    ("timestamp", "tomorrow"),
    ("timestamp_ntz", "2024-02-29T25:00:00"),
]


@pytest.mark.parametrize(("kind", "text"), TEXTS)
@pytest.mark.parametrize("settings", [CSV, JSON])
def test_text_that_does_not_fit_is_refused_as_it_came(tmp_path: Path, settings: str, kind: str, text: str):
    columns = f'id = "string"\nvalue = "{kind}"\nop = "string"'
    lake = Lake(tmp_path).pipeline(more=settings, columns=columns)
    number = text.replace(".", "").isdigit()
    if settings == CSV:
        file, lines = "part-0.csv", ["id,value,op", "a,,U", f"b,{text},U"]
    else:
        value = text if number else f'"{text}"'
        file, lines = "part-0.json", ['{"id":"a","op":"U"}', f'{{"id":"b","value":{value},"op":"U"}}']
    lake.write(10, file, "id,value,op\nz,,U\n" if settings == CSV else '{"id":"z","op":"U"}\n')
    lake.run()
    lake.write(20, file, "\n".join(lines))
    blocked(lake, f"20/{file}", '"value"', "row 1", text)

    lake.pipeline(more=f"{settings}\n{REFUSE}", columns=columns)
    assert lake.alluvium("retry", "p", "20").code == 0
    lake.run()
    assert lake.main() == {"a": None, "z": None}
    came = json.loads(text) if settings == JSON and number else text
    assert lake.refused() == [("type:value", 1, {"id": "b", "value": came, "op": "U"})]


def test_the_first_reason_counts(tmp_path: Path):
    """malformed, type, NULL in the key, expectation, duplicate; of types the first column of the table."""
    expect = 'expect = [{ name = "paid", sql = "value >= 0", action = "quarantine" }]'
    columns = 'size = "int"\nvalue = "int"'
    more = f'{CSV}\n{REFUSE}\non_duplicate = "quarantine"\n{expect}'
    lake = Lake(tmp_path).pipeline(more=more, columns=columns)
    rows = [",x,y", "a,x,1", ",1,x", ",-1,1", "a,-1,x", "a,-1,1", "a,1,1", "a,2,1", "a,x,2", "b,3,4"]
    lake.write(10, "part-0.csv", "id,value,size,op\n" + "".join(f"{row},U\n" for row in [*rows, "b,9,9,9"]))
    lake.run()
    assert [(reason, row) for reason, row, _ in lake.refused()] == [
        ("type:size", 0), ("type:value", 1), ("type:size", 2), ("null_key", 3), ("type:size", 4),
        ("expect:paid", 5), ("duplicate_key", 6), ("type:value", 8), ("malformed", 10),
    ]  # fmt: skip
    assert lake.main() == {"a": 2, "b": 3} and len(lake.rows("raw")) == 2


def test_a_column_that_is_ignored_is_judged_too(tmp_path: Path):
    """Raw has it, and never a NULL in its place."""
    columns = 'code = "int"\nignore = ["code"]'
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\n{REFUSE}", columns=columns)
    lake.write(10, "part-0.csv", "id,value,op,code\na,1,U,7\nb,2,U,x\n")
    lake.run()
    assert lake.main() == {"a": 1} and "code" not in lake.types()
    assert [(row["id"], row["code"]) for row in lake.rows("raw")] == [("a", 7)]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("type:code", 1)]


def test_a_value_deep_inside_is_judged_with_its_row(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f"{JSON}\n{REFUSE}", columns='at = "struct<n:int,all:array<byte>>"')
    values = ['{"n": 1, "all": [1]}', '{"n": 1.5}', '{"n": 1, "all": [1, 300]}', '[1]', "null"]
    lines = [f'{{"id":"{"abcde"[at]}","value":1,"op":"U","at":{value}}}' for at, value in enumerate(values)]
    lake.write(10, "part-0.json", "\n".join(lines))
    lake.run()
    assert [(row["id"], row["at"]) for row in lake.rows()] == [("a", {"n": 1, "all": [1]}), ("e", None)]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("type:at", row) for row in (1, 2, 3)]


def test_a_part_that_the_declared_type_has_no_place_for_is_not_lost(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f"{JSON}\n{REFUSE}", columns='at = "struct<n:int>"')
    lines = ['{"id":"a","value":1,"op":"U","at":{"n":1,"new":2}}', '{"id":"b","value":1,"op":"U","at":{"n":1,"new":null}}']
    lake.write(10, "part-0.json", "\n".join(lines))
    lake.run()
    assert [(row["id"], row["at"]) for row in lake.rows()] == [("b", {"n": 1})]
    assert [reason for reason, _, _ in lake.refused()] == ["type:at"]


def test_files_of_one_folder_are_each_read_with_their_own_types(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=REFUSE, columns='value = "long"')
    lake.write(10, "part-0.parquet", table(pa.int32(), 1, ids="a"))
    lake.write(10, "part-1.parquet", table(pa.string(), "2", "x", ids="bc"))
    lake.write(10, "part-2.parquet", table(pa.float64(), 3.0, 3.5, ids="de"))
    lake.run()
    assert lake.main() == {"a": 1, "b": 2, "d": 3}
    assert [(row, content["value"]) for _, row, content in lake.refused()] == [(1, "x"), (1, 3.5)]


def test_a_declared_type_is_never_widened_by_a_file(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=REFUSE, columns='value = "int"')
    lake.write(10, "part-0.parquet", table(pa.int64(), 1, 2**40))
    lake.run()
    assert lake.main() == {"a": 1} and lake.types()["value"] == "integer"
    lake.pipeline(more=REFUSE, columns='value = "long"')
    assert lake.alluvium("quarantine", "replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 2**40} and lake.types()["value"] == "long" and lake.refused() == []
