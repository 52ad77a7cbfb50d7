"""SQL of the configuration over single rows: it guards, it never begins again from below, and it names its row.

Never: what expectations and `select` are for (test_expectations.py, test_select.py).
"""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from lake import Lake

REFUSE = 'on_mismatch = "quarantine"'
PART = "part-0.parquet"
MOST = 2**63 - 1


def expecting(tmp_path: Path, sql: str, action: str = "quarantine") -> Lake:
    return Lake(tmp_path).pipeline(
        more=f'expect = [{{ name = "good", sql = "{sql}", action = "{action}" }}]', deletes=False
    )


def selecting(tmp_path: Path, sql: str, more: str = "") -> Lake:
    return Lake(tmp_path).pipeline(more=f"select = '''{sql}'''\n{more}", deletes=False)


ROWS = [("a", 1, "U"), ("b", 0, "U"), ("c", 100, "U"), ("d", None, "U")]


@pytest.mark.parametrize(
    ("sql", "main"),
    [
        ("value <> 0 AND 10 / value > 1", {"a": 1}),
        ("value = 0 OR 10 / value > 1", {"a": 1, "b": 0}),
        ("CASE WHEN value = 0 THEN true ELSE 10 / value > 1 END", {"a": 1, "b": 0}),
        ("coalesce(CAST(nullif(value, 0) AS DOUBLE), 1.0) < 50 -- a comment", {"a": 1, "b": 0, "d": None}),
        ("value IS NULL OR NOT (value <> 0 AND 10 / value > 1)", {"b": 0, "c": 100, "d": None}),
    ],
)
def test_what_stands_before_guards_what_comes_after(tmp_path: Path, sql: str, main: dict):
    lake = expecting(tmp_path, sql)
    lake.deliver(10, ROWS)
    lake.run()
    assert lake.main() == main
    assert {row["id"] for _, _, row in lake.refused()} == {"a", "b", "c", "d"} - set(main)


def test_a_guard_holds_for_deletes_too(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    lake.pipelines["p"] = lake.pipelines["p"].replace("op = 'D'", "value <> 0 AND 10 / value > 1")
    lake.configure()
    lake.deliver(10, ROWS)
    lake.run()
    assert lake.main() == {"b": 0, "c": 100, "d": None}


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("10 / value > 1", "ivide by zero"),
        ("value + 1 > 0", "verflow"),
        ("value * 2 >= 0", "verflow"),
        ("-value - 2 < 0", "verflow"),
        ("value > 9223372036854775807 + 1", "verflow"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, sql: str, why: str):
    lake = expecting(tmp_path, sql, "warn")
    lake.deliver(10, [("a", 1, "U")], complete=False)
    lake.deliver(10, [("b", 2, "U"), ("c", MOST, "U"), ("z", 0, "U")], file="part-1.parquet")
    if "9223372036854775807" in sql:  # it fails for every row: some file's first is named
        place = "row 0 of part-"
    else:
        place = "row 2 of part-1.parquet" if "/" in sql else "row 1 of part-1.parquet"
    done = lake.run(code=1)
    assert "AL-0304" in done.err and 'expect "good"' in done.err, done.err
    assert why in done.err and place in done.err, done.err
    assert not (tmp_path / "p/main").exists()


def test_the_smallest_number_has_no_opposite(tmp_path: Path):
    lake = expecting(tmp_path, "-value > 0", "warn")
    lake.deliver(10, [("a", 5, "U"), ("b", -(2**63), "U")])
    done = lake.run(code=1)
    assert "AL-0304" in done.err and "row 1 of part-0.parquet" in done.err, done.err


@pytest.mark.parametrize(
    ("column", "bad"),
    [("-value", "b"), ("value - 1", "b"), ("abs(value)", "b"), ("value * 4611686018427387904", "ab")],
)
def test_select_refuses_the_rows_whose_numbers_grow_too_large(tmp_path: Path, column: str, bad: str):
    lake = selecting(tmp_path, f"SELECT id, {column} AS value FROM incoming", REFUSE)
    lake.deliver(10, [("a", -5, "U"), ("b", -(2**63), "U")])
    lake.run()
    assert "".join(row["id"] for reason, _, row in lake.refused() if reason == "select") == bad


def test_a_select_that_fails_for_every_row_blocks(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT id, value + (9223372036854775807 + 1) AS value FROM incoming", REFUSE)
    lake.deliver(10, [("a", -5, "U")])
    assert "AL-0313" in lake.run(code=1).err


def test_a_sum_of_decimals_keeps_within_its_digits(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT id, d + d AS value FROM incoming", REFUSE)
    most = Decimal("9" * 38)
    digits = pa.array([Decimal(1), most], pa.decimal128(38, 0))
    lake.write(10, PART, pa.table({"id": ["a", "b"], "d": digits}))
    lake.run()
    assert lake.main() == {"a": Decimal(2)}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("select", 1)]


def test_conditions_know_columns_in_either_case(tmp_path: Path):
    """The tables spell a column as the first file did."""
    more = 'expect = [{ name = "good", sql = "VALUE > 0 AND incoming.VALUE < 9", action = "quarantine" }]'
    lake = Lake(tmp_path).pipeline(more=more)
    rows = {"ID": ["a", "b", "c", "d"], "vaLUE": [1, 2, 10, 3], "Op": ["U", "D", "U", "U"]}
    lake.write(10, PART, pa.table(rows))
    lake.write(20, PART, pa.table({"id": ["a"], "value": [1], "OP": ["D"]}))
    lake.run()
    assert [row["ID"] for row in lake.rows(by="ID")] == ["d"]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("expect:good", 2)]


@pytest.mark.parametrize(
    "sql", ["V > 0 AND v < 5", "incoming.V > 0 AND INCOMING.v < 5", "\\\"V\\\" > 0 AND coalesce(v, 9) < 5"]
)
def test_one_condition_may_spell_a_column_in_two_ways(tmp_path: Path, sql: str):
    lake = expecting(tmp_path, sql)
    lake.write(10, PART, pa.table({"id": ["a", "b"], "V": [1, 5]}))
    lake.run()
    assert [row["id"] for row in lake.rows()] == ["a"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id, V, v + 1 AS w FROM incoming WHERE v < 5",
        "SELECT incoming.ID, V, V + 1 AS w FROM Incoming WHERE incoming.V < 5",
        "SELECT * EXCLUDE (other), v + 1 AS w FROM incoming WHERE v < 5",
        "SELECT * EXCLUDE (Other) REPLACE (V - 0 AS v), V + 1 AS w FROM incoming WHERE v < 5",
    ],
)
def test_one_select_may_spell_a_column_in_two_ways(tmp_path: Path, sql: str):
    lake = selecting(tmp_path, sql)
    lake.write(10, PART, pa.table({"id": ["a", "b"], "V": [1, 5], "OTHER": [1, 1]}))
    lake.run()
    [row] = lake.rows(by=next(name for name in lake.types() if name.lower() == "id"))
    assert {name.lower(): value for name, value in row.items()} == {"id": "a", "v": 1, "w": 2}


def test_names_within_a_value_are_its_own(tmp_path: Path):
    """`s.Foo` is no other spelling of the column `foo`."""
    kind = pa.struct([("Foo", pa.int64())])
    table = pa.table({"id": ["a", "b"], "foo": [1, 5], "s": pa.array([{"Foo": 7}, {"Foo": 8}], kind)})
    lake = expecting(tmp_path, "s.Foo > 6 AND foo < 3 AND incoming.FOO < 3")
    lake.write(10, PART, table)
    lake.run()
    assert [row["id"] for row in lake.rows()] == ["a"]


def test_replace_makes_a_column_anew_or_says_that_there_is_none(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT * REPLACE (7 AS val) FROM incoming")
    lake.write(10, PART, pa.table({"Id": ["a"], "Val": [1]}))
    lake.run()
    [row] = lake.rows(by="Id")
    assert list(row.values()) == ["a", 7]
    lake = selecting(tmp_path, "SELECT * REPLACE (7 AS nosuch) FROM incoming")
    lake.write(20, PART, pa.table({"Id": ["a"], "Val": [1]}))
    done = lake.run(code=1)
    assert "AL-0313" in done.err and "nosuch" in done.err, done.err


FAR = ["0001-01-01", "9999-12-31"]


@pytest.mark.parametrize(
    "sql",
    [
        "t < TIMESTAMP '9999-12-31 23:00:00'",
        "t >= CAST('0001-01-01' AS TIMESTAMP)",
        "try_cast('9999-12-31' AS TIMESTAMP) IS NOT NULL",
        "t <= '9999-12-31'",
        "t BETWEEN '0001-01-01' AND '9999-12-31'",
        "t < DATE '9999-12-31' OR t IN ('9999-12-31')",
        "t = CAST(CAST(t AS DATE) AS TIMESTAMP) AND t = CAST(t AS DATE)",
        "extract(year FROM t) > 0 AND extract(year FROM t) < 10000",
        "to_timestamp('2020-01-01') < TIMESTAMP '2021-01-01' AND coalesce(t, TIMESTAMP '2020-01-01') IS NOT NULL",
    ],
)
def test_times_reach_as_far_as_in_the_tables(tmp_path: Path, sql: str):
    lake = expecting(tmp_path, sql)
    times = [dt.datetime.fromisoformat(day) for day in FAR]
    lake.write(10, PART, pa.table({"id": ["a", "b"], "t": pa.array(times, pa.timestamp("us"))}))
    lake.run()
    assert [row["id"] for row in lake.rows()] == ["a", "b"]


def test_select_reads_far_times(tmp_path: Path):
    lake = selecting(tmp_path, "SELECT id, CAST(t AS TIMESTAMP) AS t FROM incoming", REFUSE)
    lake.write(10, PART, pa.table({"id": ["a", "b"], "t": FAR}))
    lake.run()
    assert [row["t"].year for row in lake.rows()] == [1, 9999]


def test_a_value_that_is_too_large_is_an_error_of_its_row(tmp_path: Path):
    lake = expecting(tmp_path, "repeat(s, 1000000000) <> ''", "warn")
    lake.write(10, PART, pa.table({"id": ["a"], "s": pa.array(["xxxxxxxxxx"], pa.large_string())}))
    done = lake.run(code=1)
    assert "AL-0304" in done.err and "row 0 of part-0.parquet" in done.err, done.err
