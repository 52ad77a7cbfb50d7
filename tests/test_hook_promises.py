"""What the hook after a merge promises: at least once from the first merge on, within its own deadline."""

from __future__ import annotations

import json
import shutil
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lake import Lake
from receivers import HttpReceiver


def lake_with(root: Path, hook: str) -> Lake:
    lake = Lake(root).pipeline(more=f"after_merge = {{ {hook} }}")
    lake.deliver(1, [("a", 1, "U")])
    return lake


@pytest.mark.parametrize("fault", ["CRASH=hook.before_call", "CRASH=hook.after_call", "FAIL=hook.before_call"])
def test_the_first_merge_ever_is_told_after_a_crash_too(tmp_path: Path, fault: str):
    how, point = fault.split("=")
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        result = lake.alluvium("run", "--once", env={f"ALLUVIUM_{how}": point})
        assert result.code == (-signal.SIGKILL if how == "CRASH" else 0)
        lake.run()
        assert receiver.events(), "nobody was ever told"
        assert receiver.events()[-1]["main_version"] == lake.version("main")


def test_the_first_merge_ever_is_told_when_the_receiver_is_up_again(tmp_path: Path):
    with HttpReceiver(answers=[500]) as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        lake.run()
        before = len(receiver.requests)
        receiver.answers[:] = [200]
        lake.run()
        assert len(receiver.requests) > before
        assert receiver.events()[-1]["main_version"] == lake.version("main")


def test_tables_that_are_made_anew_are_told(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        lake.run()
        for epoch in range(2, 5):
            lake.deliver(epoch, [("a", epoch, "U")])
            lake.run()
        told = len(receiver.requests)
        shutil.rmtree(tmp_path / "p")
        lake.run()
        assert lake.main() == {"a": 4}
        assert len(receiver.requests) > told
        assert receiver.events()[-1]["main_version"] == lake.version("main")


def test_a_lost_state_tells_once_more_or_not_at_all_but_never_wrong(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        lake.run()
        shutil.rmtree(tmp_path / "state")
        lake.deliver(2, [("a", 2, "U")])
        lake.run()
        assert receiver.events()[-1]["main_version"] == lake.version("main")
        assert 2 in receiver.events()[-1]["epochs"]


@pytest.mark.parametrize("how", ["lost", "garbage"])
def test_a_memory_that_is_lost_means_a_call_more_not_a_call_less(tmp_path: Path, how: str):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        lake.run()
        lake.deliver(2, [("a", 2, "U")])
        lake.alluvium("run", "--once", env={"ALLUVIUM_CRASH": "hook.before_call"})
        assert lake.version("main") > receiver.events()[-1]["main_version"]
        memory = tmp_path / "state/hooks/p.json"
        memory.unlink() if how == "lost" else memory.write_text("{")
        lake.run()
        assert receiver.events()[-1]["main_version"] == lake.version("main")


def test_a_slow_receiver_has_the_time_that_the_deadline_gives(tmp_path: Path):
    came = []

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self):
            came.append(self.rfile.read(int(self.headers["content-length"])))
            time.sleep(10.5)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    lake = lake_with(tmp_path, f'url = "{url}", deadline = "30s"')
    result = lake.run()
    server.shutdown()
    server.server_close()
    assert len(came) == 1, result.err


def test_a_command_that_leaves_something_behind_has_ended(tmp_path: Path):
    command = 'command = ["sh", "-c", "echo called >> told; sleep 20 & exit 0"], deadline = "3s"'
    lake = lake_with(tmp_path, command)
    result = lake.run()
    assert "hook failed" not in result.err
    assert (tmp_path / "told").read_text() == "called\n"


def test_a_command_that_is_ended_takes_its_children_along(tmp_path: Path):
    script = "sleep 1.5; echo alive >> late"
    command = f'command = ["sh", "-c", "({script}); true"], deadline = "300ms"'
    lake = lake_with(tmp_path, command)
    process = lake.start("run", "--once")
    try:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and not (tmp_path / "late").exists():
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "late").exists(), "a call that was ended goes on beside the next one"


@pytest.mark.parametrize("hook", ['command = ["./is-not-there"]', 'url = "http://127.0.0.1:9/x"'])
def test_a_hook_that_cannot_be_called_is_an_alert_and_data_goes_on(tmp_path: Path, hook: str):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, hook)
        lake.configure(f'[alert.team]\ntype = "webhook"\nurl = "{receiver.url}"\n')
        process = lake.start("run")
        try:
            deadline = time.monotonic() + 20
            while not receiver.requests:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        finally:
            process.terminate()
            process.communicate(timeout=60)
        data = receiver.events()[0]["data"]
        assert (data["kind"], data["pipeline"]) == ("hook", "p")
        assert "AL-0602" in json.dumps(data["subjects"])
        assert lake.main() == {"a": 1}


def test_what_was_told_is_remembered_by_version(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, f'url = "{receiver.url}"')
        lake.run()
        kept = json.loads((tmp_path / "state/hooks/p.json").read_text())
        assert kept == {"main_version": lake.version("main")}
