"""The shapes of worlds are valid as a whole, and their files say what was planned, without a binary."""

from __future__ import annotations

import datetime as dt
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from oracle import Unfit
from oracle_modes import MODES, frozen
from worlds_files import config_text, write_files, write_junk
from worlds_plan import NO_ROW, Deliver, File, make_plan
from worlds_read import read_folder
from worlds_shape import Shape

PLANS = [make_plan(seed) for seed in range(300)]
SHAPES = [plan.shape for plan in PLANS]


def files_of(plan) -> list[File]:
    return [file for action in plan.actions if isinstance(action, Deliver) for file in action.files]


def test_all_modes_formats_and_settings_occur_about_as_often_as_they_should():
    modes, formats = Counter(s.mode for s in SHAPES), Counter(s.format for s in SHAPES)
    assert modes["upsert"] > 150 and all(modes[mode] > 20 for mode in MODES)
    assert formats["parquet"] > 170 and formats["csv"] > 25 and formats["json"] > 25
    assert any(s.endings != (".parquet",) and any(e.endswith(".gz") for e in s.endings) for s in SHAPES)
    for setting in ("partition_by", "skip_unchanged", "change_feed", "drift", "declared", "misfits", "selects"):
        assert sum(bool(getattr(s, setting)) for s in SHAPES) > 20, setting
    assert {s.partition_by for s in SHAPES} >= {(), ("site",), ("region",), ("seq",)}
    assert any(s.format == "json" and not s.declared for s in SHAPES)


def test_settings_that_exclude_each_other_never_meet():
    for shape in SHAPES:
        assert bool(shape.key) == (shape.mode != "append")
        if shape.mode == "append":
            assert not (shape.sequence_by or shape.refuse_duplicates or shape.deletes)
        if shape.change_feed or shape.skip_unchanged:
            assert shape.mode in ("upsert", "snapshot")
        assert set(shape.partition_by) <= set(shape.columns) - set(shape.ignore)
        assert shape.declared or shape.format != "csv"
        assert not shape.misfits or shape.declared, "what does not fit must be known from the first epoch on"
        assert not shape.drift or (shape.declared and shape.text.header)
        if shape.partition_by and shape.format == "json":
            assert shape.declared, "a partition column has a type from the first epoch on"


def test_the_configuration_says_what_was_drawn():
    for shape in SHAPES:
        told = tomllib.loads(config_text(shape))["pipeline"]["p"]
        columns = dict(told.get("columns", {}))
        assert tuple(columns.pop("ignore", ())) == shape.ignore
        assert tuple(columns) == shape.declared
        assert told.get("mode", "upsert") == shape.mode and tuple(told.get("key", ())) == shape.key
        assert ("delete_when" in told) == shape.deletes
        assert told.get("change_feed", False) == shape.change_feed
        merge = told.get("merge", {})
        assert merge.get("batch_epochs") == shape.batch_epochs
        assert merge.get("skip_unchanged", False) == shape.skip_unchanged
        if shape.format == "csv":
            assert told["csv"]["null"] == shape.text.null and told["csv"]["delimiter"] == shape.text.delimiter


def test_files_drift_only_under_declared_columns():
    drifted = 0
    for plan in PLANS:
        for file in files_of(plan):
            whole = plan.shape.columns if plan.shape.text.header else plan.shape.declared
            is_plain = file.layout.columns == whole and not file.layout.upper and not file.layout.narrow
            assert is_plain or plan.shape.drift
            assert {"pguid", "site"} & set(plan.shape.columns) <= set(file.layout.columns)
            drifted += not is_plain
    assert drifted > 50


def test_rows_that_must_say_all_types_do():
    for plan in PLANS:
        if plan.shape.is_typed_by_rows:
            for file in files_of(plan):
                assert all(file.rows[0][name] is not None for name in plan.shape.columns)


def test_equal_rows_occur_where_they_mean_something():
    for plan in PLANS:
        rows = [frozen(row) for file in files_of(plan) for row in file.rows]
        if plan.shape.mode == "scd2" and len(rows) > 60:
            assert max(Counter(rows).values()) > 1, plan.seed


@pytest.mark.parametrize("part", range(6))
def test_what_is_written_is_what_is_read(tmp_path: Path, part: int):
    for plan in PLANS[part::6]:
        shape, files = plan.shape, files_of(plan)
        for at, file in enumerate(files[:6]):
            folder = tmp_path / str(plan.seed) / str(at)
            write_files(folder, [file], shape)
            write_junk(tmp_path / str(plan.seed), folder, shape)
            rows = read_folder(folder, shape)
            assert [(row.file, row.row) for row in rows] == [(file.name, n) for n in range(len(file.rows))]
            for row, planned in zip(rows, file.rows):
                if NO_ROW in planned:
                    assert row.columns[""] == "malformed", (plan.seed, file.name)
                    continue
                wanted = {name: said(planned.get(name), shape) for name in file.layout.columns}
                wanted |= folder_columns(file.name, shape)
                found = dict(row.columns)
                if isinstance(found.get("seq"), Unfit):
                    assert wanted.pop("seq") in (0.5, "soon") and found.pop("seq") == "type:seq"
                if file.layout.narrow:
                    assert (wanted.pop("amount", None) is None) == (found.pop("amount", None) is None)
                assert frozen(found) == frozen(wanted), (plan.seed, file.name)


def said(value: object, shape: Shape) -> object:
    """JSON knows no times, unless they are declared."""
    if isinstance(value, dt.datetime) and shape.is_typed_by_rows:
        return value.isoformat().replace("+00:00", "Z")
    return value


def folder_columns(name: str, shape: Shape) -> dict[str, object]:
    number = int if "day" in shape.declared else str
    if name.startswith("zone="):
        return {"zone": "a:b c", "day": number("11")}
    return {"day": number("2")} if name.startswith("day=2") else {}
