"""Values, names and folders at the edge: what an outsider found who tried to break it.

Never: rows of usual files (test_formats.py, test_types.py).
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lake import Lake

CSV, JSON = 'format = "csv"', 'format = "json"'
REFUSE = 'on_mismatch = "quarantine"'
EXPECT = 'expect = [{ name = "good", sql = "value >= 0", action = "quarantine" }]'
PART = "part-0.parquet"


def a_lake(tmp_path: Path, more: str = "", columns: str = "") -> Lake:
    """Whose rows need no `op`."""
    return Lake(tmp_path).pipeline(more=more, columns=columns, deletes=False)


def with_key(lake: Lake, key: str) -> Lake:
    """The key is this column."""
    lake.pipelines["p"] = lake.pipelines["p"].replace('["id"]', f'["{key}"]')
    lake.configure()
    return lake


def shown(lake: Lake, epoch: int = 10) -> list[dict]:
    return lake.alluvium("quarantine", "show", "p", str(epoch), "-o", "json").json()


def correct(lake: Lake, items: list[dict], code: int = 0, epoch: int = 10):
    (lake.root / "rows.json").write_text(json.dumps(items))
    done = lake.alluvium("quarantine", "replay", "p", str(epoch), "--rows", "rows.json", "--yes")
    assert done.code == code, done.err
    return done


# --- corrected rows ---------------------------------------------------------------------------


def test_a_rollback_keeps_corrections(tmp_path: Path):
    lake = a_lake(tmp_path, more=EXPECT)
    lake.deliver(5, [("z", 1, "U")])
    lake.deliver(10, [("a", -1, "U"), ("b", -2, "U"), ("c", 3, "U")])
    lake.run()
    correct(lake, [{"file": PART, "row": 0, "content": {"id": "a", "value": 1, "op": "U"}}])
    assert lake.alluvium("rollback", "p", "--to-epoch", "5", "--yes").code == 0
    assert lake.alluvium("resume", "p").code == 0
    lake.run()
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "c": 3, "z": 1}


def test_a_correction_of_a_file_that_changed_is_refused(tmp_path: Path):
    """At its place another row stands now."""
    lake = a_lake(tmp_path, more=EXPECT)
    lake.deliver(10, [("a", -1, "U"), ("b", 2, "U")])
    lake.run()
    items = shown(lake)
    items[0]["content"]["value"] = 1
    lake.deliver(10, [("valuable", 100, "U"), ("a", -1, "U"), ("b", 2, "U")])
    done = correct(lake, items, code=2)
    assert "AL-0312" in done.err and "alluvium replay p 10" in done.err
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.main() == {"b": 2, "valuable": 100}
    items = shown(lake)
    items[0]["content"]["value"] = 1
    correct(lake, items)
    assert lake.main() == {"a": 1, "b": 2, "valuable": 100}


def test_what_nobody_touched_comes_back_as_it_was(tmp_path: Path):
    """Every digit, NaN and the infinities, also within nested values; keys of maps that are no text."""
    doubles = [123456789.12345679, -987654321.1234567, 0.1, 1e300, 5e-324, -0.0]
    nan, inf = float("nan"), float("inf")
    lake = a_lake(tmp_path, more=EXPECT)
    columns = {
        "id": [f"k{n}" for n in range(8)],
        "value": [-1] * 8,
        "x": [*doubles, nan, -inf],
        "f": pa.array([0.1, nan, inf, 1.5, 3.4e38, 0, -0.0, 2.0], pa.float32()),
        "list": [[n, nan, inf] for n in range(8)],
        "map": pa.array([[(n, 0.1), (n + 1, None)] for n in range(8)], pa.map_(pa.int64(), pa.float64())),
    }
    lake.write(10, PART, pa.table(columns))
    lake.run()
    assert lake.rows("raw") == []
    items = shown(lake)
    for item in items:
        item["content"]["value"] = 1
    # As a person would: the text of the file is changed, nothing parses it.
    whole = lake.alluvium("quarantine", "show", "p", "10", "-o", "json").out
    (lake.root / "rows.json").write_text(whole.replace('"value":-1', '"value":1'))
    done = lake.alluvium("quarantine", "replay", "p", "10", "--rows", "rows.json", "--yes")
    assert done.code == 0, done.err
    rows = lake.rows()
    assert [repr(row["x"]) for row in rows] == [repr(x) for x in columns["x"]]
    assert [repr(row["f"]) for row in rows] == [repr(x) for x in columns["f"].to_pylist()]
    assert [repr(row["list"]) for row in rows] == [repr([float(n), nan, inf]) for n in range(8)]
    assert [dict(row["map"]) for row in rows] == [{n: 0.1, n + 1: None} for n in range(8)]


def test_a_wrong_correction_names_itself(tmp_path: Path):
    lake = a_lake(tmp_path, more=EXPECT)
    lake.deliver(10, [("a", -1, "U"), ("b", 2, "U")])
    lake.run()
    item = {"file": PART, "row": 0, "content": {"id": "a", "value": "many", "op": "U"}}
    done = correct(lake, [item], code=1)
    assert "corrected row" in done.err and "takes the correction back" in done.err
    correct(lake, [{**item, "content": None}])
    assert lake.main() == {"b": 2}


# --- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["alert", "replay"])
def test_a_folder_that_lost_all_its_files_is_told_and_left_alone(tmp_path: Path, setting: str):
    lake = a_lake(tmp_path, more=f'on_changed = "{setting}"')
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    (lake.folder(10) / PART).unlink()
    done = lake.run()
    assert "lost all its files" in done.err and "alluvium undo p 10" in done.err
    assert "read again" not in done.err
    done = lake.alluvium("replay", "p", "10", "--yes")
    assert done.code == 2 and "alluvium undo p 10" in done.err
    assert lake.main() == {"a": 1}


def test_a_delta_folder_without_a_file_that_its_log_names_says_so(tmp_path: Path):
    lake = a_lake(tmp_path, more='format = "delta"')
    folder = lake.folder(10)
    write_deltalake(folder, pa.table({"id": ["a"], "value": [1], "op": ["U"]}))
    next(folder.glob("*.parquet")).unlink()
    (folder / "_SUCCESS").touch()
    done = lake.run(code=1)
    assert "AL-0301" in done.err and "its log names" in done.err, done.err


# --- names ------------------------------------------------------------------------------------


def test_case_is_no_difference_in_any_alphabet(tmp_path: Path):
    lake = a_lake(tmp_path)
    lake.write(10, PART, pa.table({"id": ["a"], "Ä": ["u"]}))
    lake.run()
    lake.write(20, PART, pa.table({"id": ["b"], "ä": ["l"]}))
    lake.run()
    assert [(row["id"], row["Ä"]) for row in lake.rows()] == [("a", "u"), ("b", "l")]


def test_objects_may_spell_their_names_in_any_case_and_once(tmp_path: Path):
    lake = a_lake(tmp_path, more=f"{JSON}\n{REFUSE}")
    lines = ['{"id":"a","value":1}', '{"ID":"b","Value":2}', '{"id":"c","value":3,"VALUE":4}', '{"id":"d","id":"e"}']
    lake.write(10, "part-0.json", "\n".join(lines) + "\n")
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("malformed", 2), ("malformed", 3)]


def test_a_feeds_own_names_are_reserved(tmp_path: Path):
    lake = a_lake(tmp_path, more="change_feed = true")
    lake.write(10, PART, pa.table({"id": ["a"], "_change_type": ["x"]}))
    done = lake.run(code=1)
    assert "AL-0305" in done.err and "_change_type" in done.err


# --- values -----------------------------------------------------------------------------------


def test_a_quote_that_is_not_closed_hides_no_row(tmp_path: Path):
    lake = a_lake(tmp_path, more=f"{CSV}\n{REFUSE}")
    lake.write(10, "part-0.csv", 'id,value\na,1\n"b",2\nc,"3"x\nd,"4\ne,5\n')
    lake.run()
    assert lake.main() == {"a": 1, "b": 2}
    assert lake.refused() == [
        ("malformed", 2, {"line": 'c,"3"x'}), ("malformed", 3, {"line": 'd,"4\ne,5'})
    ]  # fmt: skip


def test_a_malformed_line_is_kept_as_it_came(tmp_path: Path):
    lake = a_lake(tmp_path, more=f"{CSV}\n{REFUSE}")
    long = "x" * 70_000
    lake.write(10, "part-0.csv", f'id,value\r\na,"{long}",1\r\nb,2\r\n7,"x,y","z""w",k\r\n')
    lake.run()
    assert [content["line"] for _, _, content in lake.refused()] == [f'a,"{long}",1', '7,"x,y","z""w",k']


def test_a_whole_number_is_no_other_one(tmp_path: Path):
    lake = a_lake(tmp_path, more=f"{JSON}\n{REFUSE}", columns='value = "double"')
    rows = ['{"id":"a","value":9007199254740993}', '{"id":"b","value":9007199254740992}', '{"id":"c","value":0.1}']
    lake.write(10, "part-0.json", "\n".join(rows))
    lake.run()
    assert lake.main() == {"b": 9007199254740992.0, "c": 0.1}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("type:value", 0)]


@pytest.mark.parametrize("declared", [False, True])
def test_zeros_before_a_key_make_another_key_unless_it_is_declared(tmp_path: Path, declared: bool):
    columns = 'number = "long"' if declared else ""
    lake = with_key(a_lake(tmp_path, more=f"{CSV}\n{REFUSE}", columns=columns), "number")
    lake.write(10, "part-0.csv", "number,name\n7,seven\n")
    lake.run()
    lake.write(20, "part-0.csv", "number,name\n007,bond\n")
    lake.run()
    assert [(row["number"], row["name"]) for row in lake.rows(by="number")] == [
        (7, "bond" if declared else "seven")
    ]
    assert [reason for reason, _, _ in lake.refused()] == ([] if declared else ["type:number"])


def test_a_select_that_is_too_large_fails(tmp_path: Path):
    select = 'select = "SELECT id, value * 9223372036854775807 AS value FROM incoming"'
    lake = a_lake(tmp_path, more=f"{select}\n{REFUSE}")
    lake.deliver(10, [("a", 1, "U"), ("b", 2, "U")])
    lake.run()
    assert [(row["id"], row["value"]) for row in lake.rows()] == [("a", 9223372036854775807)]
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("select", 1)]


def test_a_line_of_json_that_is_an_array_is_malformed(tmp_path: Path):
    lake = a_lake(tmp_path, more=JSON)
    lake.write(10, "part-0.json", '[{"id":"a"},\n{"id":"b"}]\n')
    done = lake.run(code=1)
    assert "AL-0310" in done.err, done.err


def test_a_first_epoch_without_a_row_that_can_be_read_is_kept_aside(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f"{JSON}\n{REFUSE}\n{EXPECT}")
    lake.write(10, "part-0.json", "one\ntwo\n")
    lake.write(20, "part-0.json", '{"id":"a","value":1,"op":"U"}\n')
    lake.run(code=1)
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("malformed", 0), ("malformed", 1)]
    items = shown(lake)
    for item, key in zip(items, "bc"):
        item["content"] = {"id": key, "value": 2, "op": "U"}
    correct(lake, items)
    lake.run()
    assert lake.main() == {"a": 1, "b": 2, "c": 2} and lake.refused() == []


@pytest.mark.parametrize("sql", ["10 / value > 0", "value >= 0 -- a comment"])
def test_an_expectation_that_fails_is_named(tmp_path: Path, sql: str):
    more = f'expect = [{{ name = "ratio", sql = "{sql}", action = "warn" }}]'
    lake = a_lake(tmp_path, more=more)
    lake.deliver(10, [("a", 0, "U")])
    if "--" in sql:
        lake.run()
        return
    done = lake.run(code=1)
    assert "AL-0304" in done.err and '"ratio"' in done.err and "nullif" in done.err, done.err


NAN = float("nan")


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
@pytest.mark.parametrize("more", ["", 'mode = "scd2"', "merge = { batch_epochs = 1 }"])
def test_a_key_that_is_no_number_lives_once(tmp_path: Path, kind: pa.DataType, more: str):
    """Statistics of files do not know it."""
    lake = with_key(a_lake(tmp_path, more), "k")
    for epoch, keys in ((1, [0.5, NAN]), (2, [NAN]), (3, [0.5])):
        lake.write(epoch, PART, pa.table({"k": pa.array(keys, kind), "v": [epoch] * len(keys)}))
        lake.run()
    current = [row for row in lake.rows(by="k") if row.get("is_current", True)]
    assert sorted((str(row["k"]), row["v"]) for row in current) == [("0.5", 3), ("nan", 2)]
    done = lake.alluvium("query", "p", "SELECT v FROM main WHERE k = 0.5 ORDER BY v DESC LIMIT 1", "-o", "json")
    assert done.json() == [{"v": 3}]
    assert lake.alluvium("lineage", "p", "--key", "0.5").code == 0


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.struct([("x", pa.float64())])])
def test_a_zero_in_a_key_of_parts_is_one_zero(tmp_path: Path, kind: pa.DataType):
    lake = with_key(a_lake(tmp_path), "k")
    for epoch, zero in ((1, 0.0), (2, -0.0)):
        key = [zero] if pa.types.is_list(kind) else {"x": zero}
        lake.write(epoch, PART, pa.table({"k": pa.array([key], kind), "v": [epoch]}))
        lake.run()
    assert [row["v"] for row in lake.rows(by="v")] == [2]


def test_a_key_of_many_digits_lives_once_and_is_found(tmp_path: Path):
    lake = with_key(a_lake(tmp_path), "k")
    keys = [2**64 - 1, 2**64 - 3, 2**63]
    for epoch in (1, 2):
        lake.write(epoch, PART, pa.table({"k": pa.array(keys, pa.uint64()), "v": [epoch] * 3}))
        lake.run()
    assert sorted((int(row["k"]), row["v"]) for row in lake.rows(by="k")) == [(k, 2) for k in sorted(keys)]
    for key in keys:
        assert "in main, from epoch 2" in lake.alluvium("lineage", "p", "--key", str(key)).out


def test_a_map_of_plain_times_is_refused_before_there_is_a_table(tmp_path: Path):
    """The table would ask for a feature that nobody gave it."""
    lake = a_lake(tmp_path)
    kind = pa.map_(pa.int32(), pa.timestamp("us"))
    lake.write(10, PART, pa.table({"id": ["a"], "v": pa.array([[(1, 0)]], kind)}))
    done = lake.run(code=1)
    assert "AL-0303" in done.err and "zone" in done.err, done.err
    assert not (tmp_path / "p/raw").exists()


def test_a_condition_guards_the_rows_that_it_is_for(tmp_path: Path):
    select = 'select = "SELECT id, value FROM incoming WHERE value <> 0 AND 10 / value > 1"'
    lake = a_lake(tmp_path, f"{select}\n{REFUSE}")
    lake.deliver(10, [("a", 1, "U"), ("b", 0, "U"), ("c", 100, "U"), ("d", None, "U")])
    lake.run()
    assert lake.main() == {"a": 1} and lake.refused() == []


def test_bytes_of_a_csv_field_stay_when_another_field_is_corrected(tmp_path: Path):
    lake = a_lake(tmp_path, CSV, columns='id = "string"\nb = "binary"')
    lake.write(10, "part-0.csv", "id,b\n,00ff\nc,00ff\n,~x\n")
    lake.run()
    items = shown(lake)
    items[0]["content"]["id"], items[1]["content"]["id"] = "a", "d"
    correct(lake, items)
    assert [(row["id"], row["b"]) for row in lake.rows()] == [("a", b"00ff"), ("c", b"00ff"), ("d", b"~x")]


def test_decimals_within_values_come_back_to_the_last_digit(tmp_path: Path):
    lake = a_lake(tmp_path, EXPECT)
    kind = pa.struct([("a", pa.decimal128(38, 2))])
    digits = "123456789012345678901234567890.12"
    columns = {"id": ["k"], "value": [-1], "s": pa.array([{"a": Decimal(digits)}], kind)}
    lake.write(10, PART, pa.table(columns))
    lake.run()
    items = shown(lake)
    items[0]["content"]["value"] = 1
    correct(lake, items)
    assert [str(row["s"]["a"]) for row in lake.rows()] == [digits]


def test_a_name_stands_once_within_a_value_too(tmp_path: Path):
    lake = a_lake(tmp_path, f"{JSON}\n{REFUSE}")
    lines = ['{"id":"a","value":1,"o":{"a":1,"b":[{"c":1}]}}', '{"id":"b","value":1,"o":{"a":1,"a":2}}']
    lines.append('{"id":"c","value":1,"o":{"a":1,"b":[{"c":1,"C":2}]}}')
    lake.write(10, "part-0.json", "\n".join(lines))
    lake.run()
    assert lake.main() == {"a": 1}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("malformed", 1), ("type:o", 2)]


# --- partitions -------------------------------------------------------------------------------


def test_an_empty_text_is_no_partition(tmp_path: Path):
    """Delta's log cannot tell it from NULL: all readers see the same."""
    lake = a_lake(tmp_path, more='partition_by = ["op"]')
    lake.deliver(10, [("a", 1, ""), ("b", 2, None)])
    lake.run()
    assert [row["op"] for row in lake.rows()] == [None, None]
    done = lake.alluvium("query", "p", "SELECT count(*) AS n FROM main WHERE op IS NULL", "-o", "json")
    assert done.json() == [{"n": 2}]


def test_an_empty_text_in_a_key_that_names_folders_is_refused(tmp_path: Path):
    lake = a_lake(tmp_path, more='partition_by = ["id"]')
    lake.deliver(10, [("", 1, "U"), ("b", 2, "U")])
    lake.run()
    assert lake.main() == {"b": 2} and [reason for reason, _, _ in lake.refused()] == ["null_key"]


@pytest.mark.parametrize("values", [pa.array([b"a"]), pa.array([{"a": 1}]), pa.array([[1]])])
def test_a_type_that_names_no_folder_is_refused_before_there_is_a_table(tmp_path: Path, values: pa.Array):
    lake = a_lake(tmp_path, more='partition_by = ["where"]')
    lake.write(10, PART, pa.table({"id": ["a"], "where": values}))
    done = lake.run(code=1)
    assert "AL-0303" in done.err and '"where"' in done.err and "partition_by" in done.err, done.err
    assert not (tmp_path / "p/main").exists()


def test_a_partition_column_stands_there_once(tmp_path: Path):
    lake = a_lake(tmp_path, more='partition_by = ["op", "OP"]')
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and "partition_by" in done.err and "twice" in done.err


def test_a_delta_folder_with_binary_partitions_is_refused(tmp_path: Path):
    lake = a_lake(tmp_path, more='format = "delta"')
    folder = lake.folder(10)
    table = pa.table({"id": ["a"], "op": ["U"], "b": pa.array([b"a"], pa.binary())})
    write_deltalake(folder, table, partition_by=["b"])
    (folder / "_SUCCESS").touch()
    done = lake.run(code=1)
    assert "AL-0301" in done.err and "binary" in done.err


# --- what is told -----------------------------------------------------------------------------


def test_schema_history_names_the_epoch_that_brought_a_column(tmp_path: Path):
    lake = a_lake(tmp_path)
    lake.write(1, PART, pa.table({"id": ["a"]}))
    lake.run()
    lake.write(2, PART, pa.table({"id": ["a"], "n": [1]}))
    lake.write(3, PART, pa.table({"id": ["a"]}))
    lake.write(4, PART, pa.table({"id": ["a"], "z": [1]}))
    lake.run()
    items = lake.alluvium("schema", "history", "p", "-o", "json").json()
    told = {(item["table"], item["epoch"], item["change"]) for item in items}
    for table in ("raw", "main"):
        assert {(table, 2, "added n long"), (table, 4, "added z long")} <= told, told
    assert not [item for item in items if item["epoch"] == 3]


@pytest.mark.parametrize(
    ("kind", "value", "given"),
    [(pa.binary(), b"\x00\xff", "00ff"), (pa.float64(), float("nan"), "NaN"), (pa.float64(), -1.5, "-1.5")],
)
def test_lineage_of_any_key(tmp_path: Path, kind: pa.DataType, value: object, given: str):
    lake = with_key(a_lake(tmp_path), "k")
    lake.write(10, PART, pa.table({"k": pa.array([value], kind), "op": ["U"]}))
    lake.run()
    done = lake.alluvium("lineage", "p", "--key", given)
    assert done.code == 0 and "in main, from epoch 10" in done.out, done.out + done.err


@pytest.mark.parametrize(("kind", "given"), [(pa.decimal128(10, 2), "1.501"), (pa.int64(), "abc")])
def test_a_key_that_no_row_can_have_is_refused(tmp_path: Path, kind: pa.DataType, given: str):
    lake = with_key(a_lake(tmp_path), "k")
    lake.write(10, PART, pa.table({"k": pa.array(["1"]).cast(kind), "op": ["U"]}))
    lake.run()
    done = lake.alluvium("lineage", "p", "--key", given)
    assert done.code == 2 and given in done.err and "help" in done.err, done.err


def test_a_gate_tells_why_rows_are_refused(tmp_path: Path):
    lake = a_lake(tmp_path, more=f'{EXPECT}\ngate = {{ refused_max = "10%" }}')
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U"), (None, 1, "U")])
    done = lake.run(code=1)
    assert "expect:good 1, first row 1 of" in done.err and "null_key 1, first row 2 of" in done.err, done.err
    assert "alluvium replay p 10" in done.err and "alluvium retry" not in done.err


def test_refused_rows_and_how_to_repair_them_are_two_commands_away(tmp_path: Path):
    lake = a_lake(tmp_path, more=EXPECT)
    lake.deliver(10, [("a", -1, "U")])
    lake.run()
    for args in (("list",), ("show", "p", "10")):
        done = lake.alluvium("quarantine", *args)
        told = done.out + done.err
        assert "expect:good" in told and "alluvium quarantine replay p 10 --rows rows.json" in told


def test_the_median_of_two_lies_between_them(tmp_path: Path):
    lake = a_lake(tmp_path, more='gate = { rows_min = "50%" }')
    for epoch, count in ((10, 10), (20, 100), (30, 28)):
        lake.deliver(epoch, [(f"{epoch}-{n}", 1, "U") for n in range(count)])
        lake.run()
    assert len(lake.main()) == 138
    assert DeltaTable(tmp_path / "p/main").version() >= 3


def test_bytes_that_are_keys_of_a_map_come_back(tmp_path: Path):
    lake = a_lake(tmp_path, EXPECT)
    kind = pa.map_(pa.binary(), pa.list_(pa.map_(pa.binary(), pa.int64())))
    value = [(b"\xff\x00", [[(b"\xfe", 1)]])]
    lake.write(10, PART, pa.table({"id": ["k"], "value": [-1], "m": pa.array([value], kind)}))
    lake.run()
    [item] = items = shown(lake)
    assert item["content"]["m"] == {"ff00": [{"fe": 1}]}
    item["content"]["value"] = 1
    correct(lake, items)
    assert [(row["id"], row["m"]) for row in lake.rows()] == [("k", value)]


# --- names within JSON ------------------------------------------------------------------------


def test_names_within_json_are_the_same_in_either_case(tmp_path: Path):
    lake = a_lake(tmp_path, f"{JSON}\n{REFUSE}")
    lake.write(10, "a.json", '{"id":"a","s":{"Foo":1,"l":[{"X":1}]}}\n{"id":"b","s":{"foo":2,"l":[{"x":2},{"X":3}]}}\n')
    lake.write(10, "b.json", '{"ID":"c","S":{"FOO":3}}\n{"id":"d","s":{"foo":4,"FOO":5}}\n')
    lake.write(20, "a.json", '{"id":"e","s":{"fOO":6,"L":[{"x":7}]}}\n')
    lake.run()
    found = {row["id"]: (row["s"]["Foo"], [x["X"] for x in row["s"]["l"] or []]) for row in lake.rows()}
    assert found == {"a": (1, [1]), "b": (2, [2, 3]), "c": (3, []), "e": (6, [7])}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [("type:s", 1)]


def test_keys_of_a_map_differ_by_case(tmp_path: Path):
    lake = a_lake(tmp_path, JSON, columns='id = "string"\nm = "map<string,struct<x:long>>"')
    lake.write(10, "a.json", '{"id":"a","m":{"K":{"x":1},"k":{"X":2}}}\n')
    lake.run()
    [row] = lake.rows()
    assert dict(row["m"]) == {"K": {"x": 1}, "k": {"x": 2}}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_large_whole_numbers_beside_fractions_are_numbers(tmp_path: Path, order: tuple):
    lines = ['{"id":"a","v":1}', '{"id":"b","v":9223372036854775808}', '{"id":"c","v":0.5}']
    lake = a_lake(tmp_path, JSON)
    lake.write(10, "a.json", "\n".join(lines[at] for at in order) + "\n")
    lake.run()
    assert {row["id"]: row["v"] for row in lake.rows()} == {"a": 1.0, "b": 2.0**63, "c": 0.5}
