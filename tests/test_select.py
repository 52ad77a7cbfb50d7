"""`select`: which columns and rows of a folder become rows of the tables, and which SQL may not say it."""

from __future__ import annotations

import datetime as dt
import json
import re
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

CSV, REFUSE = 'format = "csv"', 'on_mismatch = "quarantine"'


def selecting(tmp_path: Path, sql: str, more: str = "", **others) -> Lake:
    return Lake(tmp_path).pipeline(more=f"select = {json.dumps(sql)}\n{more}", **others)


def source(**columns: list) -> pa.Table:
    return pa.table(columns)


def places(lake: Lake) -> list[tuple]:
    return [(row["id"], row["_row"]) for row in lake.rows("raw")]


# --- what it makes ----------------------------------------------------------------------------


def test_columns_are_chosen_renamed_computed_and_typed(tmp_path: Path):
    sql = (
        "SELECT day, ident AS id, CAST(amount * 2 AS INT) AS value, upper(op) AS op,"
        " CAST(price AS DECIMAL(10,2)) AS price, CAST(day AS DATE) AS born, 'x' AS fixed FROM incoming"
    )
    lake = selecting(tmp_path, sql)
    lake.write(10, "part-0.parquet", source(
        ident=["a", "b"], amount=[1.0, 2.5], op=["u", "d"], price=["1.5", None],
        day=["2024-02-29", None], secret=["s", "t"],
    ))  # fmt: skip
    lake.run()
    assert lake.types() == lake.types("raw") == {
        "day": "string", "id": "string", "value": "integer", "op": "string", "price": "decimal(10,2)",
        "born": "date", "fixed": "string",
    }  # fmt: skip
    assert list(lake.types("raw")) == ["day", "id", "value", "op", "price", "born", "fixed"]
    assert lake.rows() == [{
        "day": "2024-02-29", "id": "a", "value": 2, "op": "U", "price": Decimal("1.50"),
        "born": dt.date(2024, 2, 29), "fixed": "x",
    }]  # fmt: skip


def test_a_star_keeps_all_columns_of_all_files(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT *, value + 1 AS next FROM incoming")
    lake.write(10, "part-0.parquet", source(id=["a"], value=[1], op=["U"]))
    lake.write(10, "country=NL/part-1.parquet", source(id=["b"], value=[2], op=["U"], more=["x"]))
    lake.run()
    found = [(row["id"], row["next"], row["more"], row["country"]) for row in lake.rows()]
    assert found == [("a", 2, None, None), ("b", 3, "x", "NL")]


def test_rows_that_are_filtered_are_nowhere_and_the_others_keep_their_places(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT id, value, op FROM incoming WHERE value > 0 AND kind <> 'test'")
    for file, names in (("part-0.parquet", "abcde"), ("part-1.parquet", "fghij")):
        lake.write(10, file, source(
            id=[*names[:4], None], value=[-1, 1, None, 4, 0], op=["U"] * 5, kind=["x", "x", "x", "y", "x"]
        ))  # fmt: skip
    lake.write(20, "part-0.parquet", source(id=["a", "b"], value=[9, 9], op=["U", "D"], kind=["test", None]))
    lake.run()
    assert lake.main() == {"b": 1, "d": 4, "g": 1, "i": 4}
    assert places(lake) == [("b", 1), ("d", 3), ("g", 1), ("i", 3)]
    assert lake.refused() == [], "not even the one without a key"
    assert lake.states() == {10: "processed", 20: "processed"}


def test_all_rules_see_the_result(tmp_path: Path):
    sql = (
        "SELECT upper(name) AS id, cents / 100 AS value, at,"
        " CASE WHEN kind = 'gone' THEN 'D' ELSE 'U' END AS op FROM incoming"
    )
    expect = 'expect = [{ name = "small", sql = "value < 100", action = "quarantine" }]'
    lake = selecting(tmp_path, sql, f'sequence_by = "at"\n{expect}')
    lake.write(10, "part-0.parquet", source(
        name=["a", "b", "c", None, "A"], cents=[200, 300, 40_000, 100, 500], at=[2, 1, 1, 1, 1],
        kind=["new", "gone", "new", "new", "new"],
    ))  # fmt: skip
    lake.run()
    assert lake.main() == {"A": 2}
    came = {"name": "c", "cents": 40_000, "at": 1, "kind": "new"}
    [small, keyless] = lake.refused()
    assert small == ("expect:small", 2, came), "as it came"
    assert keyless[:2] == ("null_key", 3)


def test_what_is_selected_meets_declared_types(tmp_path: Path):
    lake = selecting(
        tmp_path, "SELECT id, amount / 2 AS value, op FROM incoming WHERE amount <> 7", REFUSE,
        columns='value = "int"\nid = "string"',
    )  # fmt: skip
    lake.write(10, "part-0.parquet", source(id=["a", "b", "c"], amount=[4.0, 5.0, 7.0], op=["U"] * 3))
    lake.run()
    assert lake.main() == {"a": 2} and list(lake.types()) == ["value", "id", "op"]
    assert lake.refused() == [("type:value", 1, {"id": "b", "amount": 5.0, "op": "U"})]


def test_csv_is_selected_from_too(tmp_path: Path):
    sql = "SELECT ident AS id, CAST(amount AS DECIMAL(8,2)) AS value, op FROM incoming WHERE note IS NULL"
    lake = selecting(tmp_path, sql, f"{CSV}\n{REFUSE}")
    lines = ["ident,amount,op,note", "a,1.5,U,", "b,2,U,left out", "c,3", "d,4,U,", "e,5,D,", ",6,U,"]
    lake.write(10, "part-0.csv", "\n".join([*lines, ",7,U,no"]))
    lake.run()
    assert lake.main() == {"a": Decimal("1.50"), "d": Decimal("4.00")}
    assert places(lake) == [("a", 0), ("d", 3), ("e", 4)]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("malformed", 2), ("null_key", 5)]


def test_another_filter_and_a_replay_give_what_a_first_reading_would(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT * FROM incoming WHERE value > 1")
    lake.deliver(10, [("a", 1, "U"), ("b", 2, "U"), ("c", 3, "U")])
    lake.deliver(20, [("c", 30, "U")])
    lake.run()
    assert lake.main() == {"b": 2, "c": 30}
    selecting(tmp_path, "SELECT * FROM incoming WHERE value < 3")
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 2, "c": 30}


# --- what it may not say ----------------------------------------------------------------------


MANY_ROWS = [
    "SELECT a.id FROM incoming a JOIN incoming b ON a.id = b.id",
    "SELECT a.id FROM incoming a, incoming b",
    "SELECT id, max(value) AS value FROM incoming GROUP BY id",
    "SELECT count(*) AS id FROM incoming",
    "SELECT id FROM incoming GROUP BY id",
    "SELECT id FROM incoming HAVING id > 'a'",
    "SELECT id, row_number() OVER (PARTITION BY id) AS value FROM incoming",
    "SELECT id, sum(value) OVER () AS value FROM incoming",
    "SELECT DISTINCT id FROM incoming",
    "SELECT id FROM incoming ORDER BY id",
    "SELECT id FROM incoming LIMIT 10",
    "SELECT id FROM incoming OFFSET 1",
    "SELECT id FROM (SELECT id FROM incoming) AS t",
    "SELECT id FROM incoming WHERE id IN (SELECT id FROM incoming)",
    "SELECT (SELECT max(id) FROM incoming) AS id FROM incoming",
    "WITH t AS (SELECT id FROM incoming) SELECT id FROM t",
    "SELECT id FROM incoming UNION ALL SELECT id FROM incoming",
    "SELECT id FROM main",
    "SELECT id FROM other.incoming",
    "SELECT id FROM incoming; SELECT id FROM incoming",
    "DELETE FROM incoming",
    "SELECT id value op FROM incoming",
]
# What is wrong with these is what they lack.
NOTHING = ["SELECT 1 AS id", "SELECT id FROM", "SELECT id FROM incoming WHERE", "-- nothing", ""]


@pytest.mark.parametrize("sql", [*MANY_ROWS, *NOTHING])
def test_a_select_is_of_one_row(tmp_path: Path, sql: str):
    lake = selecting(tmp_path, sql)
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and "pipeline.p.select" in done.err, done.err
    assert sql in NOTHING or re.search(r"line:? \d+\W+column:? \d+", done.err, re.IGNORECASE), done.err
    lake.deliver(10, [("a", 1, "U")])
    lake.run(code=2)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("sql", "line"),
    [
        ("SELECT id,\n  value value value\nFROM incoming", 2),
        ("SELECT id\nFROM incoming\nWHERE )", 3),
        ("SELECT id\nFROM incoming\nORDER BY id", 3),
        ("SELECT\n  id,\n  max(value) AS value\nFROM incoming", 3),
    ],
)
def test_what_is_wrong_in_a_select_is_named_with_its_line(tmp_path: Path, sql: str, line: int):
    done = selecting(tmp_path, sql).alluvium("config", "validate")
    assert done.code == 2 and re.search(rf"line:? {line}\W+column:? \d+", done.err, re.IGNORECASE), done.err


def test_a_select_may_hold_these_words(tmp_path: Path):
    """Functions that look like aggregates, words in texts and names, comments, another spelling."""
    sql = (
        'select "id", greatest(value, 2) AS value, op, \'order by limit distinct\' AS "group"\n'
        "from Incoming -- join nothing\nwhere id not in ('x', 'y') and coalesce(value, 0) between 0 and 9"
    )
    lake = selecting(tmp_path, sql)
    assert lake.alluvium("config", "validate").code == 0
    lake.deliver(10, [("a", 1, "U"), ("x", 2, "U"), ("b", 3, "U")])
    lake.run()
    assert lake.main() == {"a": 2, "b": 3} and "group" in lake.types()


def test_a_column_that_is_not_there_blocks_the_epoch(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT id, price AS value, op FROM incoming")
    assert lake.alluvium("config", "validate").code == 0, "nobody has seen a folder yet"
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run(code=1)
    assert "AL-0313" in done.err and "price" in done.err, done.err
    assert lake.states() == {10: "blocked"} and not (tmp_path / "p/main").exists()
    selecting(tmp_path, "SELECT id, value, op FROM incoming")
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1}


@pytest.mark.parametrize(
    ("sql", "code", "name"),
    [
        ("SELECT value, op FROM incoming", "AL-0302", "id"),
        ("SELECT id, value FROM incoming", "AL-0304", "op"),
        ("SELECT id, value, op, value AS _row FROM incoming", "AL-0305", "_row"),
    ],
)
def test_the_result_must_have_what_the_pipeline_needs(tmp_path: Path, sql: str, code: str, name: str):
    lake = selecting(tmp_path, sql)
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run(code=1)
    assert code in done.err and name in done.err, done.err
    assert lake.states() == {10: "blocked"}


@pytest.mark.parametrize("text", ["\n", "not an object\n"])
def test_a_folder_without_a_row_has_nothing_to_select(tmp_path: Path, text: str):
    more = f'format = "json"\n{REFUSE}'
    lake = selecting(tmp_path, "SELECT id, value + 1 AS value, op FROM incoming", more)
    lake.write(10, "part-0.json", '{"id":"a","value":1,"op":"U"}\n')
    lake.write(20, "day=2/part-0.json", text)
    lake.run()
    assert lake.main() == {"a": 2} and lake.states() == {10: "processed", 20: "processed"}
    assert set(lake.types("raw")) == {"id", "value", "op"}
    assert [reason for reason, _, _ in lake.refused()] == (["malformed"] if "not" in text else [])


def test_a_select_knows_columns_in_either_case(tmp_path: Path):
    """Files spell a column one way today and another tomorrow."""
    lake = selecting(tmp_path, "SELECT id, incoming.value + 1 AS value, op FROM incoming WHERE kind = 'x'")
    lake.write(10, "part-0.parquet", source(ID=["a"], Value=[1], op=["U"], Kind=["x"]))
    lake.write(20, "part-0.parquet", source(id=["b", "c"], VALUE=[2, 3], OP=["U", "U"], KIND=["x", "y"]))
    lake.run()
    assert lake.main() == {"a": 2, "b": 3}
