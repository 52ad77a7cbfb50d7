"""Types of columns: declared, and widened where a table has a narrower one.

Never: a type that nothing declares (test_formats.py), single values that do not fit (test_misfits.py).
"""

from __future__ import annotations

import datetime as dt
import signal
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

UTC = dt.timezone.utc
CSV, JSON = 'format = "csv"', 'format = "json"'
NOON = dt.datetime(2024, 2, 29, 12)


def declared(tmp_path: Path, kind: str, more: str = "") -> Lake:
    """A pipeline whose `value` has this type."""
    return Lake(tmp_path).pipeline(more=more, columns=f'value = "{kind}"')


def table(kind: pa.DataType, *values, ids: str = "abcdef") -> pa.Table:
    """Rows a, b, c … with these values."""
    count = len(values)
    return pa.table({"id": list(ids[:count]), "value": pa.array(values, kind), "op": ["U"] * count})


def undeclared(tmp_path: Path, kind: pa.DataType, value) -> Lake:
    """A lake whose first epoch gave `value` this type: row z."""
    lake = Lake(tmp_path).pipeline()
    lake.write(10, "part-0.parquet", table(kind, value, ids="z"))
    lake.run()
    return lake


# --- declared columns -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["", CSV, JSON])
def test_declared_columns_stand_first_in_their_order(tmp_path: Path, settings: str):
    columns = 'note = "string"\nvalue = "int"\nid = "string"\nnever = "decimal(10,2)"\nignore = ["op"]'
    lake = Lake(tmp_path).pipeline(more=settings, columns=columns)
    if settings == CSV:
        lake.write(10, "part-0.csv", "id,extra,value,op\na,x,1,U\nb,y,2,D\n")
    elif settings == JSON:
        lake.write(10, "part-0.json", '{"id":"a","extra":"x","value":1,"op":"U"}\n{"id":"b","op":"D"}\n')
    else:
        rows = {"id": ["a", "b"], "extra": ["x", "y"], "value": [1, 2], "op": ["U", "D"]}
        lake.write(10, "part-0.parquet", pa.table(rows))
    lake.run()
    expected = {
        "note": "string", "value": "integer", "id": "string", "never": "decimal(10,2)", "extra": "string"
    }  # fmt: skip
    assert list(lake.types().items()) == list(expected.items())
    assert list(lake.types("raw"))[:4] == list(expected)[:4] and "op" in lake.types("raw")
    assert lake.rows() == [{"note": None, "value": 1, "id": "a", "never": None, "extra": "x"}]


LONGEST = "-123456789012345678901234567890123456.78"
TEXTS = [
    ("string", "007", "007"),
    ("boolean", "true", True),
    ("byte", "-128", -128),
    ("short", "32767", 32767),
    ("int", "-2147483648", -(2**31)),
    ("long", "9223372036854775807", 2**63 - 1),
    ("float", "0.5", 0.5),
    ("double", "0.1", 0.1),
    ("double", "3", 3.0),
    ("date", "2024-02-29", NOON.date()),
    ("timestamp", "2024-02-29T14:00:00+02:00", NOON.replace(tzinfo=UTC)),
    ("timestamp_ntz", "2024-02-29T12:00:00.000001", NOON.replace(microsecond=1)),
    ("decimal(10,2)", "-12345678.9", Decimal("-12345678.90")),
    ("decimal(38,2)", LONGEST, Decimal(LONGEST)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "value"), TEXTS)
@pytest.mark.parametrize("settings", [CSV, JSON])
def test_text_becomes_what_is_declared(tmp_path: Path, settings: str, kind: str, text: str, value):
    lake = declared(tmp_path, kind, settings)
    quoted = f'"{text}"' if kind in ("string", "date", "timestamp", "timestamp_ntz") else text
    lines = [f'{{"id":"a","value":{quoted},"op":"U"}}', '{"id":"b","op":"U"}']
    if settings == CSV:
        lines = ["id,value,op", f"a,{text},U", "b,,U"]
    lake.write(10, "part-0.csv" if settings == CSV else "part-0.json", "\n".join(lines))
    lake.run()
    assert [row["value"] for row in lake.rows()] == [value, None]
    assert lake.types()["value"] == {"int": "integer"}.get(kind, kind)


NESTED = [
    ("array<int>", "[1, null]", [1, None], {"elementType": "integer"}),
    ("struct<a:short,b:array<string>>", '{"b": ["x"]}', {"a": None, "b": ["x"]}, {"type": "struct"}),
    ("map<string,double>", '{"x": 1.5}', [("x", 1.5)], {"keyType": "string", "valueType": "double"}),
]


@pytest.mark.parametrize(("kind", "text", "value", "shape"), NESTED)
def test_json_becomes_the_nested_type_that_is_declared(
    tmp_path: Path, kind: str, text: str, value, shape: dict
):
    lake = declared(tmp_path, kind, JSON)
    lake.write(10, "part-0.json", f'{{"id":"a","value":{text},"op":"U"}}\n{{"id":"b","op":"U"}}\n')
    lake.run()
    assert shape.items() <= lake.types()["value"].items()
    assert [row["value"] for row in lake.rows()] == [value, None]


def test_binary_stays_as_it_is(tmp_path: Path):
    lake = declared(tmp_path, "binary")
    lake.write(10, "part-0.parquet", table(pa.binary(), b"\xff\x00", None))
    lake.run()
    assert [row["value"] for row in lake.rows()] == [b"\xff\x00", None]


@pytest.mark.parametrize("kind", ["strng", "decimal(50,2)", "decimal(4,5)", "array<>", "map<string>", ""])
def test_a_type_that_there_is_not_is_named(tmp_path: Path, kind: str):
    done = declared(tmp_path, kind).alluvium("config", "validate")
    assert done.code == 2 and "pipeline.p.columns.value" in done.err, done.err


@pytest.mark.parametrize("policy", ["freeze", "fail"])
def test_what_is_declared_bounds_the_first_epoch_too(tmp_path: Path, policy: str):
    columns = 'id = "string"\nvalue = "long"\nop = "string"'
    lake = Lake(tmp_path).pipeline(more=f'schema = "{policy}"', columns=columns)
    lake.write(10, "part-0.parquet", table(pa.int32(), 1).append_column("email", pa.array(["a@x"])))
    done = lake.run(code=0 if policy == "freeze" else 1)
    assert "email" in done.err
    if policy == "fail":
        assert "AL-0309" in done.err and lake.states() == {10: "blocked"}
        assert not (tmp_path / "p/main").exists()
        return
    assert lake.types("raw") == lake.types() == {"id": "string", "value": "long", "op": "string"}
    assert lake.main() == {"a": 1}


# --- a table that has another type ------------------------------------------------------------


WIDER = [
    (pa.int32(), 1, pa.int64(), 2**40, "integer", "long"),
    (pa.int8(), 1, pa.int32(), 2**20, "byte", "integer"),
    (pa.float32(), 0.5, pa.float64(), 0.1, "float", "double"),
    (pa.date32(), NOON.date(), pa.timestamp("us"), NOON, "date", "timestamp_ntz"),
    (pa.decimal128(10, 2), Decimal("1.25"), pa.decimal128(20, 2), Decimal("123456789012.5"),
     "decimal(10,2)", "decimal(20,2)"),
    (pa.decimal128(10, 2), Decimal("1.25"), pa.decimal128(12, 4), Decimal("1.2345"),
     "decimal(10,2)", "decimal(12,4)"),
]  # fmt: skip


def widened(value):
    """A date in a column of times is its midnight."""
    return dt.datetime.combine(value, dt.time()) if type(value) is dt.date else value


@pytest.mark.parametrize(("old", "first", "new", "second", "was", "becomes"), WIDER)
@pytest.mark.parametrize("told", ["by the file", "by the settings"])
def test_a_wider_type_widens_both_tables(
    tmp_path: Path, old, first, new, second, was: str, becomes: str, told: str
):
    lake = undeclared(tmp_path, old, first)
    assert lake.types()["value"] == was
    if told == "by the settings":
        kind = {"integer": "int"}.get(becomes, becomes)
        lake.pipeline(columns=f'value = "{kind}"')
    lake.write(20, "part-0.parquet", table(new, second, None))
    lake.write(30, "part-0.parquet", table(old, first, ids="y"))  # a narrow one again
    lake.run()
    first = widened(first)
    for name in ("raw", "main"):
        assert lake.types(name)["value"] == becomes
        assert [row["value"] for row in lake.rows(name)] == [second, None, first, first]
    items = lake.alluvium("schema", "history", "p", "-o", "json").json()
    if told == "by the file":
        items = [item for item in items if item["epoch"] == 20]
    changes = {item["table"]: item["change"] for item in items}
    assert all("value" in changes[name] and becomes in changes[name] for name in ("raw", "main")), items
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    assert lake.main() == {"y": first, "z": first}


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", ["schema.before_commit", "schema.after_commit"])
def test_a_kill_while_a_type_widens_loses_and_doubles_nothing(tmp_path: Path, point: str, nth: int):
    """The first passing is raw's, the second main's."""
    lake = undeclared(tmp_path, pa.int32(), 7)
    lake.write(20, "part-0.parquet", table(pa.int64(), 2**40, ids="b"))
    killed = lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": f"{point}:{nth}"})
    assert killed.code == -signal.SIGKILL
    lake.run()
    for name in ("raw", "main"):
        assert [(row["id"], row["value"]) for row in lake.rows(name)] == [("b", 2**40), ("z", 7)]
        assert lake.types(name)["value"] == "long"


def test_a_late_epoch_may_be_wider_and_so_may_one_of_many(tmp_path: Path):
    lake = undeclared(tmp_path, pa.int32(), 1)
    lake.write(20, "part-0.parquet", table(pa.int32(), 2))
    lake.write(30, "part-0.parquet", table(pa.int64(), 2**40, 3))
    lake.write(40, "part-0.parquet", table(pa.int16(), 4))
    lake.run()
    assert lake.main() == {"a": 4, "b": 3, "z": 1}
    lake.write(5, "part-0.parquet", table(pa.int64(), 2**41, 2**42, 2**43))
    lake.run()
    assert lake.main() == {"a": 4, "b": 3, "c": 2**43, "z": 1} and lake.types()["value"] == "long"


def test_a_folders_files_may_have_different_types(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    for epoch in (10, 20):
        lake.write(epoch, "part-0.parquet", table(pa.int32(), epoch, ids="a"))
        lake.write(epoch, "part-1.parquet", table(pa.int64(), 2**40 + epoch, ids="b"))
        lake.run()
        assert lake.main() == {"a": epoch, "b": 2**40 + epoch} and lake.types()["value"] == "long"
    lake.write(30, "part-0.parquet", table(pa.float64(), 5.0, ids="a"))
    lake.write(30, "part-1.parquet", table(pa.int8(), 6, ids="b"))
    lake.run()
    assert lake.main() == {"a": 5, "b": 6} and lake.types()["value"] == "long"


@pytest.mark.parametrize("kind", ["string", "int", "date", "array<long>"])
def test_a_declared_type_that_contradicts_the_table_is_a_conflict(tmp_path: Path, kind: str):
    lake = undeclared(tmp_path, pa.int64(), 1)
    lake.pipeline(columns=f'value = "{kind}"')
    lake.write(20, "part-0.parquet", table(pa.int64(), 2))
    done = lake.run(code=5)
    assert "value" in done.err and "AL-" in done.err, done.err
    assert lake.types()["value"] == "long" and lake.main() == {"z": 1}
    lake.pipeline(columns='value = "long"')
    lake.run()
    assert lake.main() == {"a": 2, "z": 1}
