"""A main table that was there before: what becomes of its rows, and what is refused.

Owns: adoption. Never: the other rules of rows (worlds, test_run.py).
"""

from __future__ import annotations

import json
import struct
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from delta_making import delete_by_vector
from lake import Lake

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])


def adopted(tmp_path: Path, base: pa.Table, **more) -> Lake:
    """A lake whose main exists, to be adopted from epoch 10 on."""
    write_deltalake(str(tmp_path / "p/main"), base, **more)
    return Lake(tmp_path).pipeline(more="adopt = true\nstart_from = 10")


def rows_of(lake: Lake) -> list[dict]:
    return DeltaTable(str(lake.root / "p/main")).to_pyarrow_table().sort_by("id").to_pylist()


def test_undo_gives_back_columns_that_no_epoch_had(tmp_path: Path):
    columns = {"id": ["a", "b"], "value": [1, 2], "op": ["U", "U"], "email": ["a@x", "b@x"]}
    lake = adopted(tmp_path, pa.table(columns))
    before = rows_of(lake)
    lake.deliver(10, [("b", 20, "U"), ("c", 30, "U")])
    lake.run()
    assert [row["email"] for row in rows_of(lake)] == ["a@x", None, None]
    assert lake.alluvium("undo", "p", "10", "--yes").code == 0
    assert rows_of(lake) == before


@pytest.mark.parametrize(
    "kind, value",
    [(pa.float64(), 1.5), (pa.string(), "3rd"), (pa.timestamp("us"), 1), (pa.decimal128(9, 3), Decimal("1.5"))],
)
def test_types_that_the_base_cannot_hold_are_refused(tmp_path: Path, kind: pa.DataType, value):
    lake = adopted(tmp_path, pa.table([["a"], [1], ["U"]], schema=SCHEMA))
    schema = pa.schema([("id", pa.string()), ("value", kind), ("op", pa.string())])
    lake.deliver(10, [("a", value, "U")], schema=schema)
    blocked = lake.run(code=1)
    assert "AL-0303" in blocked.err and '"value"' in blocked.err, blocked.err
    assert lake.main() == {"a": 1}
    # Delivered again as it should be.
    lake.deliver(10, [("a", 2, "U")])
    lake.run()
    assert lake.main() == {"a": 2}


def test_a_key_of_another_type_does_not_meet_the_bases_keys(tmp_path: Path):
    base = pa.table({"id": pa.array([1, 3], pa.int64()), "value": [1, 3], "op": ["U", "U"]})
    lake = adopted(tmp_path, base)
    lake.deliver(10, [("03", 30, "U")])
    assert "AL-0303" in lake.run(code=1).err
    assert lake.main() == {1: 1, 3: 3}


def test_the_key_is_found_in_either_case(tmp_path: Path):
    lake = adopted(tmp_path, pa.table({"ID": ["a"], "VALUE": [1], "op": ["U"]}))
    lake.deliver(10, [("a", 2, "U"), ("b", 3, "U")])
    lake.run()
    rows = DeltaTable(str(tmp_path / "p/main")).to_pyarrow_table().sort_by("ID").to_pylist()
    assert [(row["ID"], row["VALUE"]) for row in rows] == [("a", 2), ("b", 3)]


def test_a_base_with_a_key_twice_is_refused(tmp_path: Path):
    lake = adopted(tmp_path, pa.table([["a", "a", "b"], [1, 2, 3], ["U"] * 3], schema=SCHEMA))
    lake.deliver(10, [("a", 9, "U")])
    blocked = lake.run(code=1)
    assert "AL-0107" in blocked.err and "more than once" in blocked.err and '"a"' in blocked.err
    assert DeltaTable(str(tmp_path / "p/main")).to_pyarrow_table().num_rows == 3


ZERO, NAN = b"\0" * 8, struct.pack("<Q", 0x7FF8_0000_0000_0000)
OTHER_ZERO, OTHER_NAN = struct.pack("<d", -0.0), struct.pack("<Q", 0xFFF8_0000_0000_0001)


@pytest.mark.parametrize("vectors", ["auto", "off"])
@pytest.mark.parametrize("op, left", [("U", {"zero": 10, "nan": 10, "1.5": 3}), ("D", {"1.5": 3})])
def test_there_is_one_zero_and_one_nan(tmp_path: Path, op: str, left: dict, vectors: str):
    """Of the base, too, which nobody wrote with care."""
    floats = pa.array(np.frombuffer(OTHER_ZERO + OTHER_NAN + struct.pack("<d", 1.5)), pa.float64())
    properties = {"delta.enableDeletionVectors": "true"}
    base = pa.table({"id": floats, "value": [1, 2, 3], "op": ["U"] * 3})
    lake = adopted(tmp_path, base, configuration=properties)
    lake.pipeline(more=f'adopt = true\nstart_from = 10\nmerge.deletion_vectors = "{vectors}"')
    schema = pa.schema([("id", pa.float64()), ("value", pa.int64()), ("op", pa.string())])
    lake.write(10, "part-0.parquet", pa.table([np.frombuffer(ZERO + NAN), [10, 10], [op, op]], schema=schema))
    lake.run()
    names = {"0.0": "zero", "-0.0": "zero"}

    def found() -> list[tuple]:
        return sorted((names.get(str(row["id"]), str(row["id"])), row["value"]) for row in lake.rows(by="id"))

    assert found() == sorted(left.items())
    assert lake.alluvium("undo", "p", "10", "--yes").code == 0
    assert found() == [("1.5", 3), ("nan", 2), ("zero", 1)]


def test_marks_leave_what_the_log_tells_of_a_file(tmp_path: Path):
    """A number that is read and written again may be another: readers pass over rows by these."""
    base = pa.table([["a", "b"], [1, 2], ["U"] * 2], schema=SCHEMA)
    lake = adopted(tmp_path, base, configuration={"delta.enableDeletionVectors": "true"})
    entry = tmp_path / "p/main/_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    [add] = [action["add"] for action in actions if "add" in action]
    told = '"price":12345678901234567.89,"x":0.12345678901234567890123'
    add["stats"] = '{"numRecords":2,"minValues":{' + told + '},"maxValues":{' + told + "}}"
    entry.write_text("\n".join(map(json.dumps, actions)))
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    entry = max((tmp_path / "p/main/_delta_log").glob("*.json"))
    adds = [json.loads(line).get("add") for line in entry.read_text().splitlines()]
    [marked] = [add["stats"] for add in adds if add and add.get("deletionVector")]
    assert marked.count(told) == 2, marked
    assert json.loads(marked)["numRecords"] == 2 and json.loads(marked)["tightBounds"] is False


def test_without_a_table_there_is_nothing_to_adopt(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more="adopt = true\nstart_from = 10")
    lake.deliver(10, [("a", 1, "U")])
    refused = lake.run(code=1)
    assert "AL-0405" in refused.err and "remove `adopt`" in refused.err
    assert not (tmp_path / "p/main").exists() and not (tmp_path / "p/raw").exists()
    assert lake.alluvium("status").code == 3
    listed = lake.alluvium("epochs", "-o", "json")
    assert listed.code == 3 and "AL-0405" in listed.err


def test_a_base_with_a_deletion_vector_keeps_its_rows_deleted(tmp_path: Path):
    lake = adopted(tmp_path, pa.table([["a", "gone", "b"], [1, 2, 3], ["U"] * 3], schema=SCHEMA))
    delete_by_vector(tmp_path / "p/main", [1])
    lake.deliver(10, [("a", 10, "U"), ("c", 10, "U")])
    lake.run()
    assert lake.main() == {"a": 10, "b": 3, "c": 10}
    assert lake.alluvium("undo", "p", "10", "--yes").code == 0
    assert lake.main() == {"a": 1, "b": 3}


def test_a_table_that_lists_features_without_using_them_is_adopted(tmp_path: Path):
    # The Python package lists variantType beside deletionVectors, whatever the columns are.
    properties = {"delta.enableDeletionVectors": "true"}
    base = pa.table([["a"], [1], ["U"]], schema=SCHEMA)
    lake = adopted(tmp_path, base, configuration=properties)
    lake.deliver(10, [("a", 10, "U")])
    lake.run()
    assert lake.main() == {"a": 10}


@pytest.mark.parametrize("rule", ["constraint", "append only"])
def test_a_table_with_rules_that_cannot_be_kept_is_not_written(tmp_path: Path, rule: str):
    properties, named = {
        "constraint": ({}, "delta.constraints.positive"),
        "append only": ({"delta.appendOnly": "true"}, "delta.appendOnly"),
    }[rule]
    base = pa.table([["a", "old"], [100, 100], ["U", "U"]], schema=SCHEMA)
    lake = adopted(tmp_path, base, configuration=properties)
    if rule == "constraint":
        DeltaTable(str(tmp_path / "p/main")).alter.add_constraint({"positive": "value > 0"})
    lake.deliver(10, [("a", -1, "U")])
    refused = lake.run(code=1)
    assert "AL-0405" in refused.err and named in refused.err, refused.err
    assert lake.main() == {"a": 100, "old": 100}
