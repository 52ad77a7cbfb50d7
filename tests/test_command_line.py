"""The command line as a person meets it: each dead end tells what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from lake import Lake

ROOT = Path(__file__).parent.parent


def test_alone_it_shows_the_verbs_and_examples(tmp_path: Path):
    result = Lake(tmp_path).alluvium()
    assert result.code == 2
    assert "alluvium demo" in result.err and "Exit codes" in result.err


def test_help_has_examples(tmp_path: Path):
    result = Lake(tmp_path).alluvium("--help")
    assert result.code == 0 and "Examples:" in result.out and "alluvium run --once" in result.out


def test_run_without_a_configuration_says_what_to_type(tmp_path: Path):
    result = Lake(tmp_path).alluvium("run")
    assert result.code == 2 and "AL-0102" in result.err
    assert "alluvium demo" in result.err and "alluvium config reference > alluvium.toml" in result.err


def test_a_misspelt_setting_gets_a_suggestion_and_all_problems_come_at_once(lake: Lake):
    lake.pipelines["p"] = lake.pipelines["p"].replace("delete_when", "delete_wen")
    lake.configure("[run]\npoll = 5\n")
    result = lake.alluvium("run", "--once")
    assert result.code == 2
    for words in ["AL-0101", "pipeline.p.delete_wen", "did you mean `delete_when`", "run.poll", "60s"]:
        assert words in result.err, f"{words}\n{result.err}"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('after_merge = { deadline = "5s" }', "it calls nobody"),
        ('after_merge = { url = "https://x.example", deadline = "0s" }', "more than no time"),
        ('alert = { lag = "0s" }', "more than no time"),
        ("after_merge = { command = [] }", "a list of texts that are not empty"),
        ('sequence_by = ""', "a text in quotes that is not empty"),
        ('after_merge = { url = "ftp://x.example" }', "expected https://; found ftp://"),
    ],
)
def test_settings_that_make_no_sense_are_named(lake: Lake, setting: str, says: str):
    lake.pipeline(more=setting)
    done = lake.alluvium("config", "validate")
    name = setting.split(" ")[0]
    assert done.code == 2 and f"pipeline.p.{name}" in done.err and says in done.err, done.err


def test_what_does_not_exist_is_named_with_what_does(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    lake.run()
    done = lake.alluvium("rollback-point", "add", "p", "x", "--version", "77")
    assert done.code == 2 and "no version 77; the newest is" in done.err and "tables history p" in done.err
    done = lake.alluvium("query", "p", "SELECT 1", "--at-version", "77")
    assert done.code == 2 and "tables history p" in done.err
    none = lake.alluvium("query", "p", "SELECT reason, row FROM quarantine", "-o", "json")
    assert none.code == 0 and none.json() == [], "nothing was refused so far"
    resumed = lake.alluvium("resume", "p")
    assert "everything that is complete is in main" in resumed.err


def test_a_misspelt_verb_gets_a_suggestion(tmp_path: Path):
    result = Lake(tmp_path).alluvium("statsu")
    assert result.code == 2 and "status" in result.err


def test_an_unknown_pipeline_or_epoch_is_named(lake: Lake):
    result = lake.alluvium("status", "nope")
    assert result.code == 2 and "AL-0104" in result.err and "the configuration has: p" in result.err
    result = lake.alluvium("retry", "p", "77")
    assert result.code == 2 and "AL-0105" in result.err


def test_data_goes_to_stdout_and_talk_to_stderr(lake: Lake):
    lake.deliver(10, [("a", 1, "U")])
    done = lake.run()
    assert done.out == "" and "merged" in done.err
    for verb in ["status", "epochs", "runs", "plan"]:
        items = lake.alluvium(verb, "-o", "json")
        assert items.code == 0 and isinstance(items.json(), list), items.err
    assert lake.alluvium("query", "p", "SELECT 1 AS one", "-o", "json").json() == [{"one": 1}]


def test_the_reference_is_a_configuration_that_validates(tmp_path: Path):
    lake = Lake(tmp_path)
    (tmp_path / "alluvium.toml").write_text(lake.alluvium("config", "reference").out)
    assert lake.alluvium("config", "validate").code == 0


def test_show_tells_where_a_value_comes_from(lake: Lake):
    shown = lake.alluvium("config", "show", "-o", "json", env={"ALLUVIUM_RUN__POLL": "5s"}).json()
    values = {item["setting"]: item for item in shown}
    assert values["run.poll"]["value"] == '"5s"' and "ALLUVIUM_RUN__POLL" in values["run.poll"]["from"]
    assert values["pipeline.p.order"]["from"] == "default"


def test_every_code_is_explained(tmp_path: Path):
    lake = Lake(tmp_path)
    codes = [line.split()[0] for line in lake.alluvium("explain").out.splitlines() if "AL-" in line]
    assert len(codes) > 30
    for code in codes:
        page = lake.alluvium("explain", code.lower())
        assert page.code == 0 and "What to do" in page.out
    assert lake.alluvium("explain", "AL-9999").code == 2


def test_logs_can_be_json(lake: Lake):
    import json

    lake.deliver(10, [("a", 1, "U")])
    result = lake.alluvium("--log-format", "json", "run", "--once")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert any("merged" in line["message"] for line in lines)
    assert {line["level"] for line in lines} == {"INFO"}
    (lake.deliver(20, []) / "part-0.parquet").write_text("no parquet")
    result = lake.alluvium("--log-format", "json", "run", "--once")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert result.code == 1 and any("AL-0301" in line["message"] for line in lines)


def test_a_misspelt_state_is_no_empty_answer(lake: Lake):
    result = lake.alluvium("epochs", "--state", "blokced")
    assert result.code == 2 and "blocked" in result.err


def test_a_demo_that_was_cut_off_begins_anew(tmp_path: Path):
    lake = Lake(tmp_path)
    out = tmp_path / "my demo"
    started = lake.start("demo", "--out", str(out), "--epochs", "400", "--data-only")
    while not list(out.glob("incoming-data/*")):
        assert started.poll() is None
    started.kill()
    started.communicate()
    again = lake.alluvium("demo", "--out", str(out), "--epochs", "4")
    assert again.code == 0, again.err
    assert f"cd '{out}'" in again.out + again.err
    assert lake.alluvium("demo", "--rows", "0").code == 2
