"""What must be true of rows: expectations and keys that occur once, each with what becomes of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lake import Lake

TYPED = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])


def expecting(tmp_path: Path, action: str, sql: str = "value >= 0", more: str = "") -> Lake:
    return Lake(tmp_path).pipeline(
        more=f'{more}\n[[pipeline.p.expect]]\nname = "paid"\nsql = "{sql}"\naction = "{action}"\n'
    )


def quarantine(lake: Lake) -> list[tuple]:
    sql = "SELECT _epoch, reason, _file, _row, row, _generation FROM quarantine ORDER BY 1, 3, 4"
    rows = lake.alluvium("query", "p", sql, "-o", "json").json()
    return [(r["_epoch"], r["reason"], r["_row"], json.loads(r["row"])["id"] if '"id"' in r["row"] else None)
            for r in rows]


def told(lake: Lake, epoch: int) -> dict | None:
    """What the ledger says of the expectations at the epoch's newest ingest that ended well."""
    sql = ("SELECT expectations FROM step_events WHERE step = 'ingest' AND verdict = 'done' "
           f"AND epoch = {epoch} ORDER BY at DESC LIMIT 1")
    [row] = lake.alluvium("query", "p", sql, "-o", "json").json()
    return row["expectations"] and json.loads(row["expectations"])


ROWS = [("a", 1, "U"), ("b", -1, "U"), ("c", None, "U"), (None, -5, "U"), ("d", 4, "D")]


def test_warn_counts_and_lets_all_in(tmp_path: Path):
    lake = expecting(tmp_path, "warn")
    lake.deliver(10, ROWS)
    done = lake.run()
    assert "paid does not hold for 2" in done.err
    assert lake.main() == {"a": 1, "b": -1, "c": None}
    assert told(lake, 10) == {"paid": 2}
    assert quarantine(lake) == [(10, "null_key", 3, None)]
    lake.deliver(20, [("a", 2, "U")])
    assert "does not hold" not in lake.run().err
    assert told(lake, 20) == {"paid": 0}


def test_quarantine_refuses_rows_for_which_it_is_false_or_null(tmp_path: Path):
    lake = expecting(tmp_path, "quarantine")
    lake.deliver(10, ROWS)
    lake.run()
    assert lake.main() == {"a": 1}
    assert sorted(quarantine(lake), key=lambda row: row[2]) == [
        (10, "expect:paid", 1, "b"), (10, "expect:paid", 2, "c"), (10, "null_key", 3, None),
    ]  # fmt: skip


def test_the_first_expectation_that_fails_is_the_reason(tmp_path: Path):
    lake = expecting(tmp_path, "quarantine").pipeline(
        more='expect = [{ name = "small", sql = "value < 10", action = "quarantine" },'
        ' { name = "even", sql = "value % 2 = 0", action = "quarantine" },'
        ' { name = "tiny", sql = "value < 3", action = "warn" }]'
    )
    lake.deliver(10, [("a", 11, "U"), ("b", 5, "U"), ("c", 4, "U"), ("d", 2, "U")])
    lake.run()
    assert [row[1:] for row in quarantine(lake)] == [
        ("expect:small", 0, "a"), ("expect:even", 1, "b"),
    ]  # fmt: skip
    assert lake.main() == {"c": 4, "d": 2}
    assert told(lake, 10) == {"small": 1, "even": 2, "tiny": 3}


def test_fail_blocks_the_epoch_and_touches_no_table(tmp_path: Path):
    lake = expecting(tmp_path, "fail")
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    before = lake.version("raw"), lake.version("main")
    wider = pa.schema([*TYPED, ("new", pa.int64())])
    lake.deliver(20, [("z", 2, "U", 1), ("b", -1, "U", 1), ("c", -1, "U", 1)], schema=wider)
    done = lake.run(code=1)
    assert 'AL-0307' in done.err and "does not hold for 2 of 3 rows of 20" in done.err
    assert "the first is row 1 of part-0.parquet" in done.err
    assert (lake.version("raw"), lake.version("main")) == before
    assert quarantine(lake) == [] and lake.states()[20] == "blocked"
    lake.deliver(20, [("z", 2, "U")])
    lake.run()
    assert lake.main() == {"a": 1, "z": 2}


def test_a_relaxed_expectation_lets_refused_rows_in_by_replay(tmp_path: Path):
    lake = expecting(tmp_path, "quarantine")
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U")])
    lake.deliver(20, [("b", 7, "U")])
    lake.run()
    lake.pipeline(more='expect = [{ name = "paid", sql = "value > -2", action = "quarantine" }]')
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 7} and quarantine(lake) == []
    # And the other way: a row that is refused now was never said.
    lake.pipeline(more='expect = [{ name = "paid", sql = "value > 1", action = "quarantine" }]')
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"b": 7}
    assert [row[1:] for row in quarantine(lake)] == [("expect:paid", 0, "a"), ("expect:paid", 1, "b")]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("valu >= 0", "valu"),
        ("value + 1", "true or false"),
        ("count(*) > 1", "more than one row"),
        ("row_number() OVER () > 1", "more than one row"),
        ("value IN (SELECT value FROM incoming)", "more than one row"),
        ("random() > 0.5", "another answer"),
        ("now() > TIMESTAMP '2020-01-01'", "another answer"),
    ],
)
def test_an_expectation_looks_at_one_row(tmp_path: Path, sql: str, says: str):
    lake = expecting(tmp_path, "warn", sql)
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run(code=1)
    assert "AL-0304" in done.err and says in done.err and "paid" in done.err, done.err
    assert not (tmp_path / "p/raw").exists() and not (tmp_path / "p/main").exists()


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ('[{ name = "x", sql = "a >", action = "warn" }]', "x: not an SQL expression"),
        ('[{ name = "x", sql = "a > 1", action = "drop" }]', "drop"),
        ('[{ name = "x", sql = "a > 1" }]', "action"),
        ('[{ name = "X!", sql = "a > 1", action = "warn" }]', "is no name"),
        ('[{ name = "x", sql = "a", action = "warn" }, { name = "x", sql = "b", action = "warn" }]', "two"),
        ('[{ name = "x", sql = "a", action = "warn", colour = 1 }]', "colour"),
        ('"a > 1"', "a list of tables"),
    ],
)
def test_a_wrong_expectation_is_named(tmp_path: Path, expect: str, says: str):
    done = Lake(tmp_path).pipeline(more=f"expect = {expect}").alluvium("config", "validate")
    assert done.code == 2 and "pipeline.p.expect" in done.err and says in done.err, done.err


DOUBLED = [("a", 1, "U"), ("b", 5, "U"), ("a", 3, "U"), ("a", 2, "D")]


@pytest.mark.parametrize("action", ["last", "quarantine"])
@pytest.mark.parametrize(("more", "expected"), [("", {"b": 5}), ('sequence_by = "value"', {"a": 3, "b": 5})])
def test_the_last_row_of_a_key_decides(tmp_path: Path, action: str, more: str, expected: dict):
    lake = Lake(tmp_path).pipeline(more=f'on_duplicate = "{action}"\n{more}')
    lake.deliver(10, DOUBLED)
    lake.run()
    assert lake.main() == expected
    if action == "last":
        assert quarantine(lake) == []
        return
    kept = 3 if not more else 2
    rows = sorted({0, 2, 3} - {kept})
    assert quarantine(lake) == [(10, "duplicate_key", row, "a") for row in rows]
    raw = lake.alluvium("query", "p", "SELECT count(*) AS n FROM raw", "-o", "json").json()
    assert raw == [{"n": 2}]


def test_refused_rows_do_not_count_as_duplicates(tmp_path: Path):
    lake = expecting(tmp_path, "quarantine", more='on_duplicate = "quarantine"')
    lake.deliver(10, [("a", 1, "U"), ("a", 2, "U"), ("a", -1, "U")])
    lake.run()
    assert lake.main() == {"a": 2}
    assert [row[1:] for row in quarantine(lake)] == [
        ("duplicate_key", 0, "a"), ("expect:paid", 2, "a"),
    ]  # fmt: skip


def test_duplicates_can_block_and_are_named_with_their_files(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='on_duplicate = "fail"')
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U"), ("a", 2, "U")], complete=False)
    lake.deliver(10, [("a", 3, "U"), ("c", 1, "U"), ("c", 2, "U")], file="part-1.parquet")
    done = lake.run(code=1)
    assert "AL-0308" in done.err and "2 key(s) occur more than once in 10" in done.err, done.err
    assert '"a" 3 times in part-0.parquet, part-1.parquet' in done.err, done.err
    assert not (tmp_path / "p/main").exists()
    (lake.folder(10) / "part-1.parquet").unlink()
    lake.deliver(10, [("a", 1, "U"), ("b", 1, "U")])
    lake.run()
    assert lake.main() == {"a": 1, "b": 1}


def test_an_older_ledger_gets_the_column(tmp_path: Path):
    """A ledger of a version that knew no expectations is added to."""
    lake = expecting(tmp_path, "warn")
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    path = tmp_path / "state/ledger/step_events"
    older = DeltaTable(path).to_pyarrow_table().drop_columns(["expectations"])
    write_deltalake(path, older, mode="overwrite", schema_mode="overwrite")
    lake.deliver(20, [("b", -1, "U")])
    lake.run()
    assert told(lake, 20) == {"paid": 1} and told(lake, 10) is None


@pytest.mark.parametrize("more", ["", 'on_duplicate = "quarantine"', 'on_duplicate = "fail"'])
def test_a_file_that_cannot_be_read_keeps_its_code(tmp_path: Path, more: str):
    """Found while rows are judged, it is the same error as while they are written."""
    lake = expecting(tmp_path, "quarantine", more=more)
    path = lake.deliver(10, [(f"k{n}", n, "U") for n in range(100)]) / "part-0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(40) + content[44:])  # its footer stays
    done = lake.run(code=1)
    assert "blocked at ingest: AL-0301: read 10/part-0.parquet" in done.err, done.err
    assert "tried again" not in done.err


def test_names_of_columns_do_not_meet_ours(tmp_path: Path):
    """Columns and keys may be called what we might call something."""
    names = ("times", "files", "keys", "_reason", "_later")
    lake = Lake(tmp_path).pipeline(more='on_duplicate = "fail"')
    lake.pipelines["p"] = lake.pipelines["p"].replace('["id"]', '["times", "files"]').replace("op = 'D'", "keys = 'D'")
    lake.configure()
    schema = pa.schema([(name, pa.string()) for name in names])
    lake.deliver(10, [("1", "2", "U", "x", "y"), ("1", "3", "U", "x", "y")], schema=schema)
    lake.run()
    assert pl.read_delta(str(tmp_path / "p/main")).height == 2
    lake.deliver(20, [("1", "2", "U", "x", "y"), ("1", "2", "U", "x", "y")], schema=schema)
    assert '"1", "2" 2 times in part-0.parquet' in lake.run(code=1).err
    lake.pipelines["p"] = lake.pipelines["p"].replace('"fail"', '"quarantine"')
    lake.configure()
    lake.run()
    shown = lake.alluvium("quarantine", "show", "p", "-o", "json").json()
    assert [(row["row"], row["reason"], row["content"]["_reason"]) for row in shown] == [(0, "duplicate_key", "x")]
    reserved = pa.schema([*schema, ("_alluvium_later", pa.string())])
    lake.deliver(30, [("1", "2", "U", "x", "y", "z")], schema=reserved)
    assert "AL-0305" in lake.run(code=1).err
