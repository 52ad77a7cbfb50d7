"""The two commands that show what was refused and why, and what can be done about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lake import Lake


@pytest.fixture
def refused(tmp_path: Path) -> Lake:
    more = 'expect = [{ name = "paid", sql = "value >= 0", action = "quarantine" }]'
    lake = Lake(tmp_path).pipeline(more=more)
    lake.deliver(10, [("a", 1, "U"), ("b", -1, "U"), (None, 2, "U"), ("c", -3, "U")])
    lake.deliver(20, [("d", -4, "U"), ("e", 5, "U")])
    lake.run()
    return lake


def listed(lake: Lake) -> list[tuple]:
    items = lake.alluvium("quarantine", "list", "-o", "json").json()
    return [(item["pipeline"], item["epoch"], item["reason"], item["rows"]) for item in items]


def test_list_says_how_many_where_and_why(refused: Lake):
    assert listed(refused) == [
        ("p", 10, "expect:paid", 2), ("p", 10, "null_key", 1), ("p", 20, "expect:paid", 1),
    ]  # fmt: skip
    shown = refused.alluvium("quarantine", "list")
    assert "row 1 of part-0.parquet" in shown.out and "quarantine show" in shown.err


def test_show_gives_the_rows_as_they_came(refused: Lake):
    items = refused.alluvium("quarantine", "show", "p", "10", "-o", "json").json()
    assert [(i["row"], i["reason"], i["content"]) for i in items] == [
        (1, "expect:paid", {"id": "b", "value": -1, "op": "U"}),
        (2, "null_key", {"value": 2, "op": "U"}),
        (3, "expect:paid", {"id": "c", "value": -3, "op": "U"}),
    ]
    items = refused.alluvium("quarantine", "show", "p", "--reason", "null_key", "-o", "json").json()
    assert [item["row"] for item in items] == [2]
    out = refused.alluvium("quarantine", "show", "p", "--limit", "1")
    assert "expect:paid" in out.out and "--limit" in out.err
    assert "no such row" in refused.alluvium("quarantine", "show", "p", "30").err


def test_replay_judges_the_rows_anew_and_twice_changes_nothing_more(refused: Lake):
    refused.deliver(10, [("a", 1, "U"), ("b", 7, "U"), ("x", 2, "U"), ("c", -3, "U")])
    assert refused.alluvium("quarantine", "replay", "p", "10", "--yes").code == 0
    once = {"a": 1, "b": 7, "x": 2, "e": 5}
    assert refused.main() == once
    assert listed(refused) == [("p", 10, "expect:paid", 1), ("p", 20, "expect:paid", 1)]
    assert refused.alluvium("quarantine", "replay", "p", "10", "--yes").code == 0
    assert refused.main() == once and listed(refused)[0][3] == 1


def test_drop_forgets_an_epochs_rows_and_says_so(refused: Lake):
    assert refused.alluvium("quarantine", "drop", "p", "10").code == 2, "it asks first"
    done = refused.alluvium("quarantine", "drop", "p", "10", "--yes")
    assert done.code == 0 and "3 refused row(s) are forgotten" in done.err
    assert listed(refused) == [("p", 20, "expect:paid", 1)]
    audit = refused.alluvium("audit", "list", "-o", "json").json()
    assert audit[0]["verb"] == "quarantine drop" and audit[0]["epoch"] == 10
    again = refused.alluvium("quarantine", "drop", "p", "10", "--yes")
    assert again.code == 2 and "quarantine list p" in again.err
    refused.run()
    assert refused.main() == {"a": 1, "e": 5}


def test_an_empty_quarantine_is_told(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    done = lake.alluvium("quarantine", "list")
    assert done.code == 0 and "no row is in quarantine" in done.err
