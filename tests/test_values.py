"""Values that could be taken for others: keys, orders, conditions, columns without a type.

Owns: stories of single values. Never: types that simply do not fit (test_bad_input.py).
"""

from __future__ import annotations

import datetime as dt
import json
import math
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lake import Lake

# Less than main, more than an epoch.
MEMORY = "128MiB"


def deliver(lake: Lake, epoch: int, **columns: pa.Array) -> None:
    """One file with these columns."""
    folder = lake.deliver(epoch, [])
    pq.write_table(pa.table(columns), folder / "part-0.parquet")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_float_key_knows_one_zero(tmp_path: Path, grouped: bool):
    lake = Lake(tmp_path).pipeline(more="" if grouped else "merge.batch_epochs = 1")
    for epoch, key in ((10, 0.0), (20, -0.0), (30, math.nan)):
        deliver(lake, epoch, id=pa.array([key, 7.5]), value=pa.array([epoch] * 2), op=pa.array(["U"] * 2))
    lake.run()
    rows = lake.main()
    assert len(rows) == 3 and rows[0.0] == 20 and rows[7.5] == 30
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    assert lake.main()[0.0] == 10


def test_equal_zeros_and_nans_are_one_in_the_order_too(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='sequence_by = "at"')
    at = pa.array([0.0, -0.0, -math.nan, 1.0, 1.0, math.nan])
    names = ["zero", "zero", "nan", "nan", "last", "last"]
    deliver(lake, 10, id=pa.array(names), value=pa.array(range(6)), op=pa.array(["U"] * 6), at=at)
    lake.run()
    assert lake.main() == {"zero": 1, "nan": 2, "last": 5}


def test_times_of_96_bits_come_as_they_are(tmp_path: Path):
    """As Spark writes them, which says "for ever" with the year 9999."""
    lake = Lake(tmp_path).pipeline()
    far, near = dt.datetime(9999, 12, 31, 23, 59), dt.datetime(2026, 1, 2, 3, 4, 5, 6)
    time = pa.timestamp("us")
    rows = pa.table({
        "id": ["a", "b"], "value": [1, 2], "op": ["U", "U"], "till": pa.array([far, near], time),
        "span": pa.array([{"till": far}, {"till": near}], pa.struct([("till", time)])),
        "all": pa.array([[far, near], None], pa.list_(time)),
    })
    folder = lake.deliver(10, [])
    pq.write_table(rows, folder / "part-0.parquet", use_deprecated_int96_timestamps=True, store_schema=False)
    lake.run()
    for table in ("raw", "main"):
        one, other = lake.rows(table)
        for row, time in ((one, far), (other, near)):
            assert plain(row["till"]) == plain(row["span"]["till"]) == time, row
        assert [plain(time) for time in one["all"]] == [far, near] and other["all"] is None


def test_nanoseconds_of_96_bits_that_decide_are_refused(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='sequence_by = "at"')
    rows = {"id": pa.array(["a", "b"]), "value": pa.array([1, 2]), "op": pa.array(["U", "U"])}
    rows["at"] = pa.array([1_000, 2_001], pa.timestamp("ns"))
    folder = lake.deliver(10, [])
    pq.write_table(pa.table(rows), folder / "part-0.parquet", use_deprecated_int96_timestamps=True, store_schema=False)
    blocked = lake.run(code=1)
    assert "AL-0303" in blocked.err and '"at", row 1' in blocked.err, blocked.err


def plain(time: dt.datetime) -> dt.datetime:
    return time.replace(tzinfo=None)


def test_a_date_that_no_calendar_has_is_refused_by_row(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    never = 2**31 - 1
    days = pa.array([1, never, None], pa.int32()).cast(pa.date32())
    parts = pa.StructArray.from_arrays([pa.array([1, 2, -never], pa.int32()).cast(pa.date32())], ["day"])
    rows = {"id": pa.array(["a", "b", "c"]), "value": pa.array([1, 2, 3]), "op": pa.array(["U"] * 3)}
    deliver(lake, 10, **rows, day=days, part=parts)
    blocked = lake.run(code=1)
    assert "AL-0303" in blocked.err and 'column "day"' in blocked.err and "row 1" in blocked.err, blocked.err
    lake.pipeline(more='on_mismatch = "quarantine"')
    assert lake.alluvium("retry", "p", "10").code == 0
    lake.run()
    assert lake.main() == {"a": 1}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("type:day", 1), ("type:part", 2)]


@pytest.mark.parametrize("column", ["id", "at"])
def test_nanoseconds_that_decide_are_refused_and_others_are_cut(tmp_path: Path, column: str):
    lake = Lake(tmp_path).pipeline(more='sequence_by = "at"')
    times = {"id": [1_000, 2_000], "at": [1_000, 2_000], "seen": [1_001, 2_002]}
    times[column] = [1_000, 2_001]

    def send():
        arrays = {name: pa.array(v, pa.timestamp("ns")) for name, v in times.items()}
        deliver(lake, 10, **arrays, value=pa.array([1, 2]), op=pa.array(["U", "U"]))

    send()
    blocked = lake.run(code=1)
    assert "AL-0303" in blocked.err and f'"{column}", row 1' in blocked.err, blocked.err
    times[column] = [1_000, 2_000]
    send()
    lake.run()
    assert sorted(lake.main().values()) == [1, 2]


@pytest.mark.parametrize("way", ["select", "csv"])
def test_nanoseconds_that_decide_are_refused_on_every_way(tmp_path: Path, way: str):
    more = 'select = "SELECT id, at, value, op FROM incoming"' if way == "select" else 'format = "csv"'
    columns = "" if way == "select" else 'id = "string"\nat = "timestamp"\nvalue = "long"\nop = "string"'
    lake = Lake(tmp_path).pipeline(more=f'sequence_by = "at"\n{more}', columns=columns)

    def send(nanoseconds: int) -> None:
        if way == "csv":
            lines = f"a,2024-01-02T03:04:05.000001000Z,1,U\nb,2024-01-02T03:04:05.{nanoseconds:09}Z,2,U\n"
            lake.write(10, "part-0.csv", "id,at,value,op\n" + lines)
        else:
            at = pa.array([1_000, nanoseconds], pa.timestamp("ns"))
            deliver(lake, 10, id=pa.array(["a", "b"]), at=at, value=pa.array([1, 2]), op=pa.array(["U", "U"]))

    send(2_001)
    blocked = lake.run(code=1)
    assert "AL-0303" in blocked.err and '"at", row 1' in blocked.err, blocked.err
    send(2_000)
    lake.run()
    assert sorted(lake.main().values()) == [1, 2]


@pytest.mark.parametrize(
    "kind, text",
    [
        ("long", "2.9999999999999996"), ("int", "5.00000000001"), ("timestamp_ntz", "2024-01-01 12:00:00 CET"),
        ("decimal(38,18)", "12345678901.1234567890123456785"), ("decimal(10,2)", "1.2300000000000000001"),
    ],
)
def test_a_text_that_a_type_has_no_place_for_is_refused(tmp_path: Path, kind: str, text: str):
    columns = f'id = "string"\nvalue = "long"\nop = "string"\nx = "{kind}"'
    lake = Lake(tmp_path).pipeline(more='format = "csv"\non_mismatch = "quarantine"', columns=columns)
    lake.write(10, "part-0.csv", f"id,value,op,x\na,1,U,{text}\nb,2,U,\n")
    lake.run()
    assert lake.main() == {"b": 2} and [reason for reason, _, _ in lake.refused()] == ["type:x"]


def test_a_nested_time_that_does_not_fit_is_refused(tmp_path: Path):
    """Milliseconds up to the end of time, as some writers say "never"."""
    lake = Lake(tmp_path).pipeline(more='on_mismatch = "quarantine"')
    times = pa.array([1, 2**63 - 1], pa.timestamp("ms"))
    rows = {"id": pa.array(["a", "b"]), "value": pa.array([1, 2]), "op": pa.array(["U", "U"])}
    deliver(lake, 10, **rows, part=pa.StructArray.from_arrays([times], ["at"]))
    lake.run()
    assert lake.main() == {"a": 1} and [reason for reason, _, _ in lake.refused()] == ["type:part"]


def test_what_one_file_promises_of_nested_values_the_next_need_not(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()

    def send(epoch: int, key: str, is_nullable: bool, value) -> None:
        kinds = [
            ("part", pa.struct([pa.field("zip", pa.int64(), is_nullable)]), {"zip": value}),
            ("all", pa.list_(pa.field("element", pa.int64(), is_nullable)), [value]),
            ("named", pa.map_(pa.string(), pa.field("value", pa.int64(), is_nullable)), [("k", value)]),
        ]
        arrays = {name: pa.array([given], kind) for name, kind, given in kinds}
        deliver(lake, epoch, id=pa.array([key]), value=pa.array([epoch]), op=pa.array(["U"]), **arrays)

    send(10, "a", False, 1)
    lake.run()
    send(20, "b", True, None)
    lake.run()
    one, other = lake.rows()
    assert (one["part"], one["all"], one["named"]) == ({"zip": 1}, [1], [("k", 1)])
    assert (other["part"], other["all"], other["named"]) == ({"zip": None}, [None], [("k", None)])


def test_statistics_of_parts_do_not_hide_rows(tmp_path: Path):
    """The log tells doubles, which are no long decimals; and what NaN is larger than is not told."""
    lake = Lake(tmp_path).pipeline()
    amount = pa.array([Decimal("12345678901234567.891"), Decimal(1)], pa.decimal128(20, 3))
    part = pa.StructArray.from_arrays([amount, pa.array([1.5, math.nan]), pa.array([1, 2])], ["amount", "x", "n"])
    deliver(lake, 10, id=pa.array(["a", "b"]), value=pa.array([1, 2]), op=pa.array(["U", "U"]), part=part)
    lake.run()
    for table in ("raw", "main"):
        entries = sorted((tmp_path / "p" / table / "_delta_log").glob("*.json"))
        actions = [json.loads(line) for entry in entries for line in entry.read_text().splitlines()]
        [stats] = [json.loads(action["add"]["stats"]) for action in actions if "add" in action]
        assert stats["maxValues"].get("part", {}) == {"n": 2}, stats


def test_columns_without_a_type_are_null(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='sequence_by = "at"')
    void = pa.nulls(2)
    # No epoch has had a type for these columns yet.
    deliver(lake, 10, id=pa.array(["a", "b"]), value=pa.array([1, 2]), op=void, at=void)
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
    deliver(lake, 20, id=pa.array(["a", "a"]), value=pa.array([3, 4]), op=pa.array(["U", "D"]), at=pa.array([9, 8]))
    deliver(lake, 30, id=void, value=pa.array([5, 6]), op=void, at=void)
    deliver(lake, 40, id=pa.array(["b", "c"]), value=pa.array([7, 8]), op=void, at=void)
    lake.run()
    assert lake.main() == {"a": 3, "b": 7, "c": 8}
    sql = "SELECT count(*) AS n FROM quarantine"
    assert lake.alluvium("query", "p", sql, "-o", "json").json() == [{"n": 2}]


def test_a_first_epoch_whose_key_has_no_type_is_quarantined(lake: Lake):
    deliver(lake, 10, id=pa.nulls(2), value=pa.array([5, 6]), op=pa.array(["U", "U"]))
    lake.deliver(20, [("a", 1, "U")])
    lake.run()
    assert lake.main() == {"a": 1} and lake.states() == {10: "processed", 20: "processed"}


@pytest.mark.parametrize("condition, why", [("value", "not true or false"), ("random() < 0.5", "each time")])
def test_a_condition_is_true_or_false_and_stays_so(tmp_path: Path, condition: str, why: str):
    lake = Lake(tmp_path).pipeline()
    lake.pipelines["p"] = lake.pipelines["p"].replace("op = 'D'", condition)
    lake.configure()
    lake.deliver(10, [("a", 1, "U")])
    blocked = lake.run(code=1)
    assert "AL-0304" in blocked.err and why in blocked.err, blocked.err
    assert not (lake.root / "p/main/_delta_log").exists() or lake.main() == {}


def test_the_first_epoch_gives_the_types_however_many_wait(tmp_path: Path):
    """Later ones may widen them; a narrower one that goes first does not make it a race."""
    for attempt in range(5):
        lake = Lake(tmp_path / str(attempt))
        lake.root.mkdir()
        lake.pipeline()
        deliver(lake, 1, id=pa.array(["a"]), value=pa.array([1], pa.int32()), op=pa.array(["U"]))
        deliver(lake, 2, id=pa.array(["b"]), value=pa.array([2], pa.int64()), op=pa.array(["U"]))
        lake.run()
        assert lake.types()["value"] == lake.types("raw")["value"] == "long"
        assert lake.main() == {"a": 1, "b": 2}


def test_memory_bounds_an_epoch_and_not_the_table(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="merge.batch_epochs = 1\noptimize.enabled = false")
    lake.configure(f'memory = "{MEMORY}"\n')

    def big(epoch: int, keys: range):
        names = [f"{n * 7919 % 1_000_003:08d}-{n:028d}" for n in keys]
        count = len(names)
        deliver(
            lake, epoch, id=pa.array(names), value=pa.array([epoch] * count),
            op=pa.array(["U"] * count), text=pa.array([f"{epoch}-{n:060d}" for n in keys]),
        )

    for epoch in range(1, 9):
        big(epoch, range((epoch - 1) * 60_000, epoch * 60_000))
    lake.run()
    # One epoch that touches every file of main, then one that comes too late.
    big(20, range(0, 480_000, 8))
    lake.run()
    big(19, range(0, 480_000, 4))
    lake.run()
    counted = lake.alluvium(
        "query", "p", "SELECT value, count(*) AS n FROM main WHERE value > 10 GROUP BY 1 ORDER BY 1", "-o", "json"
    ).json()
    assert counted == [{"value": 19, "n": 60_000}, {"value": 20, "n": 60_000}]


def test_a_query_in_json_keeps_every_digit(lake: Lake):
    digits = "12345678901234567890123.45"
    deliver(
        lake, 10, id=pa.array(["a"]), op=pa.array(["U"]),
        value=pa.array([Decimal(digits)], pa.decimal128(38, 2)),
    )
    lake.run()
    rows = lake.alluvium("query", "p", "SELECT value FROM main", "-o", "json").json()
    assert rows == [{"value": digits}]


def test_a_query_in_json_has_every_column(lake: Lake):
    lake.deliver(10, [("a", None, "U")])
    lake.run()
    rows = lake.alluvium("query", "p", "SELECT id, value FROM main", "-o", "json").json()
    assert rows == [{"id": "a", "value": None}]
