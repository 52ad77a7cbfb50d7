"""Refused rows that somebody corrects: `quarantine show -o json`, an editor, `quarantine replay --rows`.

Never: rows of text files, columns of many types (test_repaired_values.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pyarrow as pa
import pytest

from lake import Lake, Result

PART = "part-0.parquet"
EXPECT = 'expect = [{ name = "paid", sql = "value IS NULL OR value >= 0", action = "quarantine" }]'
REFUSE = 'on_mismatch = "quarantine"'


@pytest.fixture
def refused(tmp_path: Path) -> Lake:
    """Of epoch 10 three rows are refused, of epoch 20 one."""
    lake = Lake(tmp_path).pipeline(more=EXPECT)
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U"), (None, 2, "U"), ("c", -3, "U")])
    lake.deliver(20, [("d", -4, "U"), ("e", 5, "U")])
    lake.run()
    return lake


def shown(lake: Lake, epoch: int = 10) -> list[dict[str, Any]]:
    return lake.alluvium("quarantine", "show", "p", str(epoch), "-o", "json").json()


def replay(lake: Lake, rows: Any = None, epoch: int = 10) -> Result:
    """With these rows: text as it is, everything else as JSON."""
    more = []
    if rows is not None:
        (lake.root / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        more = ["--rows", "rows.json"]
    return lake.alluvium("quarantine", "replay", "p", str(epoch), *more, "--yes")


def repair(lake: Lake, *rows: tuple[int, dict | None], file: str = PART, epoch: int = 10) -> None:
    """Position and content of each."""
    items = [{"file": file, "row": row, "content": content} for row, content in rows]
    done = replay(lake, items, epoch)
    assert done.code == 0, done.err


def content(key: str | None, value: int | None, op: str = "U") -> dict:
    return {"id": key, "value": value, "op": op}


def test_corrected_rows_enter_at_their_place_and_the_others_stay_refused(refused: Lake):
    printed = json.loads(refused.alluvium("quarantine", "show", "p", "10", "-o", "json").out)
    printed["items"][0]["content"]["value"] = 7
    printed["items"][1]["content"]["id"] = "x"
    done = replay(refused, printed)
    assert done.code == 0, done.err
    assert refused.main() == {"a": 1, "b": 7, "x": 2, "e": 5}
    assert refused.refused() == [("expect:paid", 3, content("c", -3)), ("expect:paid", 0, content("d", -4))]
    raw = [(r["id"], r["_epoch"], r["_file"], r["_row"]) for r in refused.rows("raw") if r["_op"] == "upsert"]
    assert {("b", 10, PART, 1), ("x", 10, PART, 2)} <= set(raw)
    lineage = refused.alluvium("lineage", "p", "--key", "b", "-o", "json").json()
    assert (lineage[0]["epoch"], lineage[0]["file"], lineage[0]["row"]) == (10, PART, 1)
    audit = refused.alluvium("audit", "list", "-o", "json").json()
    assert audit[0]["epoch"] == 10 and "replay" in audit[0]["verb"]


def whole(items: list) -> str:
    return json.dumps({"items": items, "kind": "quarantine-rows", "schema": 1})


def lines(items: list) -> str:
    return "\n".join(json.dumps(item) for item in items) + "\n\n"


@pytest.mark.parametrize("form", [whole, json.dumps, lambda items: json.dumps(items, indent=2), lines])
def test_the_file_may_be_what_show_prints_an_array_or_lines(refused: Lake, form: Callable[[list], str]):
    items = shown(refused)
    for item in items:
        item |= {"colour": [1], "reason": None, "generation": 99}
    items[0]["content"]["value"] = 7
    items[2]["content"]["value"] = 8
    done = replay(refused, form(items))
    assert done.code == 0, done.err
    assert refused.main() == {"a": 1, "b": 7, "c": 8, "e": 5}
    assert [(reason, row) for reason, row, _ in refused.refused()] == [("null_key", 2), ("expect:paid", 0)]


def test_what_content_lacks_is_null(refused: Lake):
    repair(refused, (1, {"id": "b"}), (2, {"value": 2}))
    assert refused.main() == {"a": 1, "b": None, "e": 5}
    assert [row[:2] for row in refused.refused()][:2] == [("null_key", 2), ("expect:paid", 3)]


def test_what_the_path_says_is_said_of_a_corrected_row_too(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f'format = "csv"\n{REFUSE}', deletes=False)
    lake.write(10, "day=7/part-0.csv", "id,value\na,1\nb,2,too many\nc\n")
    lake.run()
    assert [item["reason"] for item in shown(lake)] == ["malformed"] * 2
    corrected = [(1, {"id": "b", "value": 2}), (2, {"id": "c", "value": 3, "day": None})]
    repair(lake, *corrected, file="day=7/part-0.csv")
    found = {row["id"]: (row["value"], row["day"]) for row in lake.rows()}
    assert found == {"a": (1, "7"), "b": (2, "7"), "c": (3, None)}


def test_a_corrected_rows_columns_are_the_tables_in_any_case(tmp_path: Path):
    """The file lacks one, and has another in other letters."""
    lake = Lake(tmp_path).pipeline(more=EXPECT)
    lake.deliver(10, [("a", 1, "U")])
    lake.write(20, PART, pa.table({"ID": ["b"], "VALUE": [-1]}))
    lake.run()
    repair(lake, (0, {"id": "b", "Value": 7, "op": "U"}), epoch=20)
    assert [(r["id"], r["value"], r["op"]) for r in lake.rows("raw")] == [("a", 1, "U"), ("b", 7, "U")]


def test_a_column_that_is_not_there_is_refused_before_anything_changes(refused: Lake):
    done = replay(refused, [{"file": PART, "row": 1, "content": {"id": "b", "vlaue": 7}}])
    assert done.code == 2 and "AL-0312" in done.err and '"vlaue"' in done.err, done.err
    assert refused.main() == {"a": 1, "e": 5}


def test_all_rules_judge_a_repaired_row(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=f'{EXPECT}\n{REFUSE}\non_duplicate = "quarantine"')
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U"), ("c", -2, "U"), ("d", -3, "U"), ("e", -4, "U")])
    lake.deliver(5, [("e", 1, "U")])
    lake.run()
    bad = content("c", -5)
    repair(lake, (1, content("a", 9)), (2, bad), (3, {"id": "d", "value": "many", "op": "U"}))
    assert lake.main() == {"a": 9, "e": 1}
    assert [(reason, row) for reason, row, _ in lake.refused()] == [
        ("duplicate_key", 0), ("expect:paid", 2), ("type:value", 3), ("expect:paid", 4)
    ]  # fmt: skip
    assert lake.refused()[1][2] == bad, "as it came now"
    repair(lake, (4, content("e", 0, "D")))
    assert lake.main() == {"a": 9}, "a delete"


def test_a_repair_does_not_overtake_a_newer_epoch(refused: Lake):
    refused.deliver(30, [("b", 30, "U"), ("c", 30, "D")])
    refused.run()
    repair(refused, (1, content("b", 7)), (3, content("c", 7)))
    assert refused.main() == {"a": 1, "b": 30, "e": 5}
    assert refused.alluvium("undo", "p", "30", "--yes").code == 0
    assert refused.main() == {"a": 1, "b": 7, "c": 7, "e": 5}


def test_a_row_that_was_not_refused_can_be_repaired_too(refused: Lake):
    repair(refused, (0, content("z", 11)))
    assert refused.main() == {"z": 11, "e": 5}


def test_doing_it_twice_changes_nothing_more(refused: Lake):
    for _ in range(2):
        repair(refused, (1, content("b", 7)))
        assert refused.main() == {"a": 1, "b": 7, "e": 5}
        assert [(reason, row) for reason, row, _ in refused.refused()] == [
            ("null_key", 2), ("expect:paid", 3), ("expect:paid", 0)
        ]  # fmt: skip
    said = [row for row in refused.rows("raw") if row["id"] == "b" and row["_op"] == "upsert"]
    assert {(row["_file"], row["_row"], row["value"]) for row in said} == {(PART, 1, 7)}


def test_later_replays_keep_repairs_and_newer_ones_win(refused: Lake):
    repair(refused, (1, content("b", 7)))
    repair(refused, (3, content("c", 8)))
    for verb in (["quarantine", "replay"], ["replay"]):
        assert refused.alluvium(*verb, "p", "10", "--yes").code == 0
        assert refused.main() == {"a": 1, "b": 7, "c": 8, "e": 5}
    repair(refused, (1, content("b", 9)))
    assert refused.main() == {"a": 1, "b": 9, "c": 8, "e": 5}
    # Undone and wanted again.
    assert refused.alluvium("undo", "p", "10", "--yes").code == 0
    assert refused.main() == {"e": 5}
    assert refused.alluvium("replay", "p", "10", "--yes").code == 0
    assert refused.main() == {"a": 1, "b": 9, "c": 8, "e": 5}


def test_null_takes_a_repair_back(refused: Lake):
    repair(refused, (0, content("a", 2)), (1, content("b", 7)), (3, content("c", 8)))
    repair(refused, (0, None), (1, None))
    assert refused.main() == {"a": 1, "c": 8, "e": 5}
    assert refused.refused()[0] == ("expect:paid", 1, content("b", -1))
    repair(refused, (2, None))  # one that never was
    assert refused.main() == {"a": 1, "c": 8, "e": 5}


@pytest.mark.parametrize("by", ["replay", "on_changed"])
def test_a_file_that_is_delivered_anew_speaks_for_itself(tmp_path: Path, by: str):
    more = EXPECT if by == "replay" else f'{EXPECT}\non_changed = "replay"'
    lake = Lake(tmp_path).pipeline(more=more)
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U")])
    lake.deliver(10, [("c", -3, "U")], file="part-1.parquet")
    lake.run()
    repair(lake, (1, content("b", 7)))
    repair(lake, (0, content("c", 8)), file="part-1.parquet")
    assert lake.main() == {"a": 1, "b": 7, "c": 8}
    lake.deliver(10, [("a", 2, "U"), ("b", -9, "U"), ("n", 1, "U")])
    if by == "replay":
        assert replay(lake).code == 0
    else:
        lake.run()
    assert lake.main() == {"a": 2, "c": 8, "n": 1}
    assert lake.refused() == [("expect:paid", 1, content("b", -9))]


@pytest.mark.parametrize(
    ("file", "row"), [(PART, 4), ("part-1.parquet", 0), ("../10/" + PART, 1), ("_SUCCESS", 0)]
)
def test_a_place_that_no_row_has_changes_nothing(refused: Lake, file: str, row: int):
    before = refused.version("raw"), refused.version("main"), refused.refused()
    items = [{"file": PART, "row": 1, "content": content("b", 7)}]
    done = replay(refused, [*items, {"file": file, "row": row, "content": content("n", 1)}])
    assert done.code == 2 and "AL-0312" in done.err and file in done.err and str(row) in done.err, done.err
    assert (refused.version("raw"), refused.version("main"), refused.refused()) == before
    assert replay(refused).code == 0
    assert refused.main() == {"a": 1, "e": 5}, "the other repair was not kept either"
    assert refused.states() == {10: "processed", 20: "processed"}


@pytest.mark.parametrize(
    "text",
    [
        "no json", "7", '{"items": 7}', '[{"row": 1, "content": {}}]',
        f'[{{"file": "{PART}", "content": {{}}}}]', f'[{{"file": "{PART}", "row": 1}}]',
        f'[{{"file": "{PART}", "row": 1.5, "content": {{}}}}]',
        f'[{{"file": "{PART}", "row": -1, "content": {{}}}}]',
        f'[{{"file": "{PART}", "row": 1, "content": "b"}}]',
        f'{{"file": "{PART}", "row": 1, "content": {{}}}}\n{{"file": ',
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_rows_is_refused(refused: Lake, text: str):
    before = refused.version("raw"), refused.version("main")
    done = replay(refused, text)
    assert done.code == 2 and "AL-" in done.err, done.err
    assert (refused.version("raw"), refused.version("main")) == before


def test_a_file_that_is_not_there_is_named_and_nobody_is_surprised(refused: Lake):
    done = refused.alluvium("quarantine", "replay", "p", "10", "--rows", "nowhere.json", "--yes")
    assert done.code == 2 and "nowhere.json" in done.err
    (refused.root / "rows.json").write_text(json.dumps(shown(refused)))
    done = refused.alluvium("quarantine", "replay", "p", "10", "--rows", "rows.json")
    assert done.code == 2, "it asks first"
    assert refused.main() == {"a": 1, "e": 5}
