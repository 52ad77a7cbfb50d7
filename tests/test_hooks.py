"""The hook after a merge: told the newest version at least once, and never in the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from lake import Lake
from receivers import HttpReceiver, wait_for


def test_a_url_is_told_of_each_new_version(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{receiver.url}" }}')
        lake.deliver(1, [("a", 1, "U")])
        lake.run()
        told = receiver.events()
        assert told[-1]["main_version"] == lake.version("main") and told[-1]["epochs"] == [1]
        assert told[-1]["pipeline"] == "p" and told[-1]["event"] == "merged"
        count = len(told)
        lake.run()
        assert len(receiver.events()) == count, "no news, no call"
        lake.deliver(2, [("a", 2, "U")])
        lake.run()
        assert receiver.events()[-1]["main_version"] == lake.version("main")


def test_a_command_gets_the_json_and_its_environment(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='after_merge = { command = ["sh", "-c", "cat > told; env > env"] }')
    lake.deliver(1, [("a", 1, "U")])
    lake.run()
    assert json.loads((tmp_path / "told").read_text())["epochs"] == [1]
    assert f"ALLUVIUM_MAIN_VERSION={lake.version('main')}" in (tmp_path / "env").read_text()


def test_a_failing_hook_stops_no_data_and_is_called_again(tmp_path: Path):
    with HttpReceiver(answers=[500, 500, 200]) as receiver:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{receiver.url}" }}')
        lake.deliver(1, [("a", 1, "U")])
        lake.run()
        assert lake.main() == {"a": 1}
        assert [event["main_version"] for event in receiver.events()] == [lake.version("main")] * 3


def test_a_hook_that_hangs_is_ended(tmp_path: Path):
    more = 'after_merge = { command = ["sleep", "600"], deadline = "200ms" }'
    lake = Lake(tmp_path).pipeline(more=more)
    lake.configure('[alert.team]\ntype = "log"\n')
    lake.deliver(1, [("a", 1, "U")])
    result = lake.run()
    assert lake.main() == {"a": 1} and "the hook after a merge fails" in result.err


@pytest.mark.parametrize("point", ["hook.before_call", "hook.after_call"])
def test_a_killed_process_calls_again(tmp_path: Path, point: str):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{receiver.url}" }}')
        lake.deliver(1, [("a", 1, "U")])
        lake.run()
        lake.deliver(2, [("a", 2, "U")])
        killed = lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": point})
        assert killed.code == -signal.SIGKILL
        lake.run()
        assert receiver.events()[-1]["main_version"] == lake.version("main")
        assert lake.main() == {"a": 2}


def test_a_rollback_is_told_too(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{receiver.url}" }}')
        for epoch in (1, 2):
            lake.deliver(epoch, [("a", epoch, "U")])
            lake.run()
        assert lake.alluvium("rollback", "p", "--to-epoch", "1", "--yes").code == 0
        wait_for(lambda: receiver.events()[-1]["main_version"] == lake.version("main"), "told", 10)


def test_a_rollback_is_told_as_one(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{receiver.url}" }}')
        for epoch in (10, 20):
            lake.deliver(epoch, [("a", epoch, "U")])
            lake.run()
        assert lake.alluvium("rollback", "p", "--to-epoch", "10", "--yes").code == 0
        lake.run()
        told = receiver.events()[-1]
        assert (told["event"], told["epochs"], told["taken_out"]) == ("rolled_back", [], [20])
        assert told["main_version"] == lake.version("main")
