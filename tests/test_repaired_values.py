"""What a corrected row is, where the file is text, has many types, or is selected from.

Never: the rules of repairs (test_repairs.py).
"""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lake import Lake, Result

CSV, JSON, REFUSE = 'format = "csv"', 'format = "json"', 'on_mismatch = "quarantine"'
TYPED = 'id = "string"\nvalue = "int"\nop = "string"'
OBJECT = '{"id":"%s","value":%s,"op":"U"}\n'


def shown(lake: Lake) -> list[dict[str, Any]]:
    return lake.alluvium("quarantine", "show", "p", "10", "-o", "json").json()


def replay(lake: Lake, items: list, code: int = 0) -> Result:
    (lake.root / "rows.json").write_text(json.dumps(items))
    done = lake.alluvium("quarantine", "replay", "p", "10", "--rows", "rows.json", "--yes")
    assert done.code == code, done.err
    return done


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_all_rows_of_a_text_file_may_be_corrected(tmp_path: Path, kind: str):
    """None of them enters twice."""
    lake = Lake(tmp_path).pipeline(more=f'format = "{kind}"', columns=TYPED)
    lake.write(10, f"part-0.{kind}", "id,value,op\na,1,U\n" if kind == "csv" else OBJECT % ("a", 1))
    lake.run()
    content = {"id": "b", "value": 2, "op": "U"}
    replay(lake, [{"file": f"part-0.{kind}", "row": 0, "content": content}])
    assert [(row["id"], row["value"]) for row in lake.rows()] == [("b", 2)]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_malformed_row_and_a_wrong_value_are_repaired(tmp_path: Path, kind: str):
    lake = Lake(tmp_path).pipeline(more=f'format = "{kind}"\n{REFUSE}', columns=TYPED)
    if kind == "csv":
        text = "id,value,op\na,1,U\nb;2;U\nc,3x,U\nd,4,U\n"
    else:
        text = OBJECT % ("a", 1) + '{"id":"b","value":2,\n' + OBJECT % ("c", '"3x"') + OBJECT % ("d", 4)
    lake.write(10, f"part-0.{kind}", text)
    lake.run()
    malformed, wrong = shown(lake)
    assert list(malformed["content"]) == ["line"] and wrong["content"]["value"] == "3x"
    malformed["content"] = {"id": "b", "value": "2", "op": "U"}  # as text
    wrong["content"]["value"] = 3  # as a number
    replay(lake, [malformed, wrong])
    assert lake.main() == {"a": 1, "b": 2, "c": 3, "d": 4} and lake.refused() == []
    raw = [(row["id"], row["_row"], row["value"]) for row in lake.rows("raw") if row["_op"] == "upsert"]
    assert {("b", 1, 2), ("c", 2, 3)} <= set(raw) and "line" not in lake.types("raw")


def test_a_malformed_row_that_nobody_corrected_brings_no_column(tmp_path: Path):
    """The whole list goes back as it was printed, one row corrected."""
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\n{REFUSE}", columns=TYPED)
    lake.write(10, "part-0.csv", "id,value,op\na,1,U\nb,2\nc,3x,U\n")
    lake.run()
    items = shown(lake)
    items[1]["content"]["value"] = "3"
    replay(lake, items)
    assert lake.main() == {"a": 1, "c": 3}
    assert list(lake.types("raw")) == list(lake.types()) == ["id", "value", "op"]
    assert [row for _, row, _ in lake.refused()] == [1]


def test_a_repaired_value_gives_a_csv_column_no_other_type(tmp_path: Path):
    """A later epoch, whose column the table has."""
    lake = Lake(tmp_path).pipeline(more=f"{CSV}\n{REFUSE}")
    lake.write(5, "part-0.csv", "id,value,op\nz,1,U\n")
    lake.write(10, "part-0.csv", "id,value,op\na,x,U\nb,7.5,U\n")
    lake.run()
    assert [row[:2] for row in lake.refused()] == [("type:value", 0), ("type:value", 1)]
    items = shown(lake)
    items[0]["content"]["value"] = "7"
    replay(lake, items)
    assert lake.main() == {"a": 7, "z": 1} and lake.types()["value"] == "long"
    assert lake.refused() == [("type:value", 1, {"id": "b", "value": "7.5", "op": "U"})]


# fmt: off
RICH = {
    "big": (pa.int64(), 2**53 + 1),
    "money": (pa.decimal128(38, 4), Decimal("1234567890123456789012345678.1234")),
    "share": (pa.float64(), 0.1),
    "day": (pa.date32(), dt.date(1969, 12, 31)),
    "at": (pa.timestamp("us", tz="UTC"), dt.datetime(2024, 2, 29, 12, 0, 0, 1, dt.timezone.utc)),
    "local": (pa.timestamp("us"), dt.datetime(2024, 2, 29, 12, 0, 0, 999_999)),
    "ok": (pa.bool_(), False),
    "bytes": (pa.binary(), b"\x00\xff\"'"),
    "text": (pa.string(), 'ä"\\\n\t{} \u2028'),
    "tags": (pa.list_(pa.string()), ["x", None, ""]),
    "place": (
        pa.struct([("lat", pa.float64()), ("zips", pa.list_(pa.int32()))]), {"lat": None, "zips": [1, 2]}
    ),
    "props": (pa.map_(pa.string(), pa.int64()), [("x", 1), ("y", None)]),
}
# fmt: on


@pytest.mark.parametrize("name", RICH)
def test_what_nobody_corrected_comes_back_as_the_file_has_it(tmp_path: Path, name: str):
    """Each type through show, an editor that changes another column, and replay."""
    kind, value = RICH[name]
    expect = 'expect = [{ name = "paid", sql = "value >= 0", action = "quarantine" }]'
    lake = Lake(tmp_path).pipeline(more=expect)
    rows = {"id": ["a", "b", "c"], "value": [1, -1, -2], "op": ["U"] * 3}
    lake.write(10, "part-0.parquet", pa.table(rows | {name: pa.array([value, value, None], kind)}))
    lake.run()
    items = shown(lake)
    for item in items:
        item["content"]["value"] = 7
    replay(lake, items)
    assert lake.main() == {"a": 1, "b": 7, "c": 7}
    assert [row[name] for row in lake.rows()] == [value, value, None]


def test_a_repair_speaks_of_the_row_as_it_came_where_there_is_a_select(tmp_path: Path):
    sql = "SELECT upper(name) AS id, cents / 100 AS value, op FROM incoming WHERE cents <> 0"
    expect = 'expect = [{ name = "paid", sql = "value >= 0", action = "quarantine" }]'
    lake = Lake(tmp_path).pipeline(more=f'select = "{sql}"\n{expect}')
    lake.write(10, "part-0.parquet", pa.table({
        "name": ["a", "b", None, "d"], "cents": [100, -200, 300, -400], "op": ["U"] * 4
    }))  # fmt: skip
    lake.run()
    items = shown(lake)
    assert items[0]["content"] == {"name": "b", "cents": -200, "op": "U"}
    items[0]["content"]["cents"] = 200
    items[1]["content"]["name"] = "c"
    items[2]["content"]["cents"] = 0  # now it is filtered
    replay(lake, items)
    assert lake.main() == {"A": 1, "B": 2, "C": 3} and lake.refused() == []


def test_a_repair_in_a_key_value_folder_may_change_the_folders_column(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    file = "country=NL/part-0.parquet"
    lake.write(10, file, pa.table({"id": ["a", None, None], "value": [1, 2, 3], "op": ["U"] * 3}))
    lake.run()
    items = shown(lake)
    assert [(item["file"], item["row"], item["content"]["country"]) for item in items] == [
        (file, 1, "NL"), (file, 2, "NL")
    ]  # fmt: skip
    items[0]["content"]["id"] = "b"
    items[1]["content"] |= {"id": "c", "country": "DE"}
    replay(lake, items)
    assert [(row["id"], row["country"]) for row in lake.rows()] == [("a", "NL"), ("b", "NL"), ("c", "DE")]


@pytest.mark.parametrize("schema", ["freeze", "evolve"])
def test_a_repaired_row_brings_no_new_column(tmp_path: Path, schema: str):
    """It would be a slip of the pen more often than a column."""
    lake = Lake(tmp_path).pipeline(more=f'schema = "{schema}"')
    lake.deliver(10, [("a", 1, "U"), (None, 2, "U")])
    lake.run()
    items = shown(lake)
    items[0]["content"] |= {"id": "b", "note": "corrected by hand"}
    done = replay(lake, items, code=2)
    assert "AL-0312" in done.err and '"note"' in done.err
    assert lake.main() == {"a": 1} and "note" not in lake.types("raw")
