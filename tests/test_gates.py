"""Gates: an epoch that is unlike the ones before it is held, before any table is touched.

Goal: a folder that was cut off, delivered twice or full of refused rows waits for a person.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lake import Lake

EXPECT = """
[[pipeline.p.expect]]
name = "paid"
sql = "value >= 0"
action = "quarantine"
"""
TABLES = ("raw", "main", "raw_quarantine")


def gated(tmp_path: Path, *settings: str) -> Lake:
    return Lake(tmp_path).pipeline(more="\n".join((*settings, EXPECT)))


def deliver(lake: Lake, epoch: int, good: int, bad: int = 0) -> None:
    """So many rows, and so many more that are refused; each with a key of its own."""
    rows = [(f"{epoch}-{at}", at, "U") for at in range(good)]
    lake.deliver(epoch, rows + [(f"{epoch}-bad-{at}", -1, "U") for at in range(bad)])


def begun(tmp_path: Path, *settings: str) -> Lake:
    """Three epochs of twenty rows, one of them refused."""
    lake = gated(tmp_path, *settings)
    for epoch in (10, 20, 30):
        deliver(lake, epoch, 19, bad=1)
        lake.run()
    return lake


def versions(lake: Lake) -> list[int]:
    return [lake.version(table) for table in TABLES]


def epochs_of(lake: Lake) -> set[int]:
    """Whose rows are in main."""
    return {int(key.split("-")[0]) for key in lake.main()}


HELD = {
    "too few": ('gate.rows_min = "50%"', 8, 0, "rows_min"),
    "none": ('gate.rows_min = "50%"', 0, 0, "rows_min"),
    "too many": ('gate.rows_max = "300%"', 70, 0, "rows_max"),
    "twice": ('gate.rows_max = "150%"', 40, 0, "rows_max"),
    "too many refused": ('gate.refused_max = "10%"', 15, 5, "refused_max"),
    "all refused": ('gate.refused_max = "10%"', 0, 20, "refused_max"),
}
PASSING = [
    ('gate.rows_min = "50%"', 12, 0),
    ('gate.rows_min = "50%"', 100, 0),
    ('gate.rows_max = "300%"', 55, 0),
    ('gate.rows_max = "300%"', 1, 0),
    ('gate.refused_max = "10%"', 19, 1),
    ('gate.refused_max = "10%"', 1, 0),
]


@pytest.mark.parametrize("what", HELD)
def test_an_epoch_unlike_the_others_is_held_and_touches_no_table(tmp_path: Path, what: str):
    setting, good, bad, name = HELD[what]
    lake = begun(tmp_path, setting)
    before, rows = versions(lake), lake.main()
    deliver(lake, 40, good, bad)
    for _ in range(2):
        done = lake.run(code=1)
        assert "AL-0311" in done.err and name in done.err and "alluvium replay" in done.err, done.err
        assert versions(lake) == before and lake.main() == rows
    assert lake.states() == {10: "processed", 20: "processed", 30: "processed", 40: "blocked"}
    items = lake.alluvium("epochs", "p", "--state", "blocked", "-o", "json").json()
    assert [(item["epoch"], item["code"]) for item in items] == [(40, "AL-0311")]
    assert lake.alluvium("explain", "AL-0311").out.startswith("# AL-0311")

    replayed = lake.alluvium("replay", "p", "40", "--yes")
    assert replayed.code == 0, replayed.err
    assert lake.states()[40] == "processed"
    assert len(lake.main()) == len(rows) + good
    shown = lake.alluvium("quarantine", "list", "-o", "json").json()
    assert sum(item["rows"] for item in shown if item["epoch"] == 40) == bad
    after = versions(lake)
    lake.run()
    assert versions(lake) == after, "it stays where it is"


@pytest.mark.parametrize(("setting", "good", "bad"), PASSING)
def test_an_epoch_like_the_others_passes(tmp_path: Path, setting: str, good: int, bad: int):
    lake = begun(tmp_path, setting)
    deliver(lake, 40, good, bad)
    lake.run()
    assert lake.states()[40] == "processed" and len(lake.main()) == 3 * 19 + good


@pytest.mark.parametrize("setting", ['gate.rows_min = "90%"', 'gate.rows_max = "110%"'])
@pytest.mark.parametrize("rows", [1, 500])
def test_the_first_epoch_passes_always(tmp_path: Path, setting: str, rows: int):
    lake = gated(tmp_path, setting)
    deliver(lake, 10, rows)
    lake.run()
    assert lake.states() == {10: "processed"} and len(lake.main()) == rows


@pytest.mark.parametrize("order", ["sequential", "arrival"])
def test_later_epochs_wait_where_order_matters(tmp_path: Path, order: str):
    lake = begun(tmp_path, 'gate.rows_min = "50%"', f'order = "{order}"')
    deliver(lake, 40, 1)
    deliver(lake, 50, 20)
    lake.run(code=1)
    waiting = order == "sequential"
    assert lake.states()[40] == "blocked"
    assert epochs_of(lake) == {10, 20, 30} | (set() if waiting else {50})
    assert lake.alluvium("replay", "p", "40", "--yes").code == 0
    lake.run()
    assert epochs_of(lake) == {10, 20, 30, 40, 50}
    assert set(lake.states().values()) == {"processed"}


def test_a_held_epoch_that_is_delivered_again_is_judged_anew(tmp_path: Path):
    lake = begun(tmp_path, 'gate.rows_min = "50%"')
    deliver(lake, 40, 3)
    lake.run(code=1)
    deliver(lake, 40, 4)
    lake.run(code=1)
    deliver(lake, 40, 19)
    lake.run()
    assert lake.states()[40] == "processed" and epochs_of(lake) == {10, 20, 30, 40}


def test_a_held_epoch_may_be_skipped(tmp_path: Path):
    lake = begun(tmp_path, 'gate.rows_min = "50%"')
    deliver(lake, 40, 3)
    deliver(lake, 50, 20)
    lake.run(code=1)
    assert lake.alluvium("skip", "p", "40", "--yes").code == 0
    lake.run()
    assert lake.states()[40] == "skipped" and epochs_of(lake) == {10, 20, 30, 50}


def test_a_gate_looks_at_what_the_last_epochs_were_also_in_one_catch_up(tmp_path: Path):
    """The short one is held, whether the ones before it are merged already or wait beside it."""
    lake = gated(tmp_path, 'gate.rows_min = "50%"')
    for epoch in (10, 20, 30):
        deliver(lake, epoch, 20)
    deliver(lake, 40, 2)
    lake.run(code=1)
    assert epochs_of(lake) == {10, 20, 30} and lake.states()[40] == "blocked"


def test_all_gates_may_be_set_at_once(tmp_path: Path):
    lake = begun(tmp_path, 'gate = { rows_min = "50%", rows_max = "300%", refused_max = "10%" }')
    deliver(lake, 40, 20)
    lake.run()
    unlike = [(50, 5, 0, "rows_min"), (60, 90, 0, "rows_max"), (70, 15, 5, "refused_max")]
    for epoch, good, bad, name in unlike:
        deliver(lake, epoch, good, bad)
        done = lake.run(code=1)
        assert "AL-0311" in done.err and name in done.err, done.err
        assert lake.alluvium("skip", "p", str(epoch), "--yes").code == 0
    assert epochs_of(lake) == {10, 20, 30, 40}


def test_a_gate_may_be_taken_away(tmp_path: Path):
    lake = begun(tmp_path, 'gate.rows_min = "50%"')
    deliver(lake, 40, 2)
    lake.run(code=1)
    lake.pipeline(more=EXPECT)
    lake.run()
    assert epochs_of(lake) == {10, 20, 30, 40}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ('gate.rows_min = "few"', "gate.rows_min"),
        ('gate.rows_max = "-5%"', "gate.rows_max"),
        ('gate.refused_max = ""', "gate.refused_max"),
        ('gate.rows = "50%"', "gate.rows"),
    ],
)
def test_a_wrong_gate_is_named(tmp_path: Path, setting: str, name: str):
    done = Lake(tmp_path).pipeline(more=setting).alluvium("config", "validate")
    assert done.code == 2 and f"pipeline.p.{name}" in done.err, done.err
