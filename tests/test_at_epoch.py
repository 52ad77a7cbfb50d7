"""`query --at-epoch E` is main with the epochs up to E only, whatever merged in the same commit or later."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from lake import Lake

Rows = dict[str, int]


def at(lake: Lake, epoch: int, code: int = 0) -> Rows:
    done = lake.alluvium("query", "p", "SELECT id, value FROM main", "--at-epoch", str(epoch), "-o", "json")
    assert done.code == code, done.err
    return {row["id"]: row["value"] for row in done.json()} if code == 0 else {}


def fold(deliveries: dict[int, list[tuple]], epoch: int, base: Rows | None = None) -> Rows:
    """The rule, for deliveries of (id, value, op) in one file each."""
    rows = dict(base or {})
    for number in sorted(number for number in deliveries if number <= epoch):
        last = {key: (value, op) for key, value, op in deliveries[number]}
        for key, (value, op) in last.items():
            rows.pop(key, None)
            if op != "D":
                rows[key] = value
    return rows


DELIVERIES = {
    10: [("a", 10, "U"), ("b", 10, "U"), ("c", 10, "U")],
    20: [("a", 20, "U"), ("b", 20, "D"), ("a", 21, "U")],
    30: [("b", 30, "U"), ("c", 30, "D"), ("d", 30, "U")],
    40: [("a", 40, "D")],
}


@pytest.mark.parametrize("order", [[[10, 20, 30, 40]], [[10], [20], [30], [40]], [[20, 40], [10, 30]]])
def test_each_epoch_is_told_however_they_came(tmp_path: Path, order: list[list[int]]):
    lake = Lake(tmp_path).pipeline()
    for group in order:
        for epoch in group:
            lake.deliver(epoch, DELIVERIES[epoch])
        lake.run()
    for epoch in DELIVERIES:
        assert at(lake, epoch) == fold(DELIVERIES, epoch), epoch
    at(lake, 15, code=2)


def test_after_a_rollback_a_replay_and_an_undo_too(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    for epoch, rows in DELIVERIES.items():
        lake.deliver(epoch, rows)
    lake.run()
    assert lake.alluvium("rollback", "p", "--to-epoch", "20", "--yes").code == 0
    assert at(lake, 10) == fold(DELIVERIES, 10) and at(lake, 20) == fold(DELIVERIES, 20)
    at(lake, 30, code=2)
    assert lake.alluvium("resume", "p").code == 0
    changed = {**DELIVERIES, 10: [("a", 11, "U"), ("e", 11, "U")], 20: []}
    lake.deliver(10, changed[10])
    assert lake.alluvium("replay", "p", "10", "--yes").code == 0
    assert lake.alluvium("undo", "p", "20", "--yes").code == 0
    for epoch in (10, 20, 30, 40):
        assert at(lake, epoch) == fold(changed, epoch), epoch


def test_over_an_adopted_table(tmp_path: Path):
    base = pa.table({"id": ["a", "z"], "value": [1, 2], "op": ["", ""], "extra": ["x", "y"]})
    write_deltalake(tmp_path / "p/main", base)
    lake = Lake(tmp_path).pipeline(more="adopt = true\nstart_from = 10")
    for epoch, rows in DELIVERIES.items():
        lake.deliver(epoch, rows)
    lake.run()
    for epoch in DELIVERIES:
        assert at(lake, epoch) == fold(DELIVERIES, epoch, {"a": 1, "z": 2}), epoch
    sql = "SELECT extra FROM main WHERE id = 'z'"
    assert lake.alluvium("query", "p", sql, "--at-epoch", "10", "-o", "json").json() == [{"extra": "y"}]


def test_while_a_replay_waits_for_its_merge_all_epochs_are_told_alike(tmp_path: Path):
    """As raw says them now, also where main does not say so yet."""
    lake = Lake(tmp_path).pipeline()
    for epoch, rows in DELIVERIES.items():
        lake.deliver(epoch, rows)
    lake.run()
    changed = {**DELIVERIES, 20: [("a", 22, "U"), ("f", 20, "U")]}
    lake.deliver(20, changed[20])
    kill = {"ALLUVIUM_CRASH": "merge.before_commit:1"}
    assert lake.alluvium("replay", "p", "20", "--yes", env=kill).code < 0
    for epoch in DELIVERIES:
        assert at(lake, epoch) == fold(changed, epoch), epoch
