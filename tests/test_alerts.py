"""Alerts on the wire: every sink, every kind, once for each trouble and once when it is over."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import subprocess
from pathlib import Path

import pytest

from lake import Lake
from receivers import HttpReceiver, MailReceiver, wait_for


def alert(kind: str, url: str, more: str = "") -> str:
    return f'[alert.team]\ntype = "{kind}"\nurl = "{url}"\n{more}\n'


def lake_with(root: Path, head: str, more: str = "") -> Lake:
    lake = Lake(root).pipeline(more=more)
    lake.configure(head)
    return lake


def break_epoch(lake: Lake, epoch: int) -> None:
    lake.deliver(epoch, [("a", 1, "U")])
    (lake.folder(epoch) / "part-0.parquet").write_bytes(b"PAR1 not really")


def changes(receiver: HttpReceiver) -> list[tuple[str, str]]:
    events = receiver.events()
    return [(e["data"]["kind"], e["type"].split(".")[-2]) for e in events]


def test_a_night_of_failures_is_one_alert_and_one_recovery(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, alert("webhook", receiver.url, 'key = "secret"'))
        break_epoch(lake, 10)
        for _ in range(500):
            lake.run(code=1)
        tried = lake.alluvium("runs", "p", "-o", "json").json()
        assert tried, "each run tries again"
        assert changes(receiver) == [("blocked", "opened")]
        listed = lake.alluvium("alerts", "list", "-o", "json").json()
        assert [item["kind"] for item in listed] == ["blocked"] and "epoch 10" in str(listed)
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        assert changes(receiver) == [("blocked", "opened"), ("blocked", "resolved")]
        first, last = receiver.events()
        assert first["data"]["incident"] == last["data"]["incident"] and first["id"] != last["id"]
        assert lake.alluvium("alerts", "list", "-o", "json").json() == []
        # CloudEvents 1.0, structured; signed over "timestamp.body".
        assert first["specversion"] == "1.0" and first["source"].startswith("/alluvium/")
        assert "AL-0301" in json.dumps(first["data"]["subjects"])
        request = receiver.requests[0]
        assert request.headers["content-type"] == "application/cloudevents+json"
        text = request.headers["x-alluvium-timestamp"].encode() + b"." + request.body
        expected = hmac.new(b"secret", text, hashlib.sha256).hexdigest()
        assert request.headers["x-alluvium-signature"] == f"sha256={expected}"


def test_chats_and_pager_get_their_own_shapes(tmp_path: Path):
    for kind in ("slack", "teams", "pagerduty"):
        root = tmp_path / kind
        root.mkdir()
        with HttpReceiver() as receiver:
            lake = lake_with(root, alert(kind, receiver.url, 'key = "routing"'))
            break_epoch(lake, 10)
            break_epoch(lake, 20)
            lake.run(code=1)
            for epoch in (10, 20):
                lake.deliver(epoch, [("a", 1, "U")])
            lake.run()
            told = receiver.events()
            assert len(told) == 2, kind
            if kind == "slack":
                assert "epochs are blocked" in told[0]["text"]
                section = told[0]["blocks"][0]
                assert section["type"] == "section" and "epoch 20" in section["text"]["text"]
                assert "over" in told[1]["text"]
            elif kind == "teams":
                card = told[0]["attachments"][0]
                assert card["contentType"] == "application/vnd.microsoft.card.adaptive"
                facts = next(b for b in card["content"]["body"] if b["type"] == "FactSet")["facts"]
                assert [fact["title"] for fact in facts] == ["epoch 10", "epoch 20"]
            else:
                assert [event["event_action"] for event in told] == ["trigger", "resolve"]
                assert told[0]["dedup_key"] == told[1]["dedup_key"]
                assert told[0]["routing_key"] == "routing"
                assert told[0]["payload"]["severity"] == "critical"


def test_mail_is_a_thread(tmp_path: Path):
    with MailReceiver() as receiver:
        head = alert("email", receiver.url, 'from = "a@example.com"\nto = ["x@example.com", "y@example.com"]')
        lake = lake_with(tmp_path, head)
        break_epoch(lake, 10)
        lake.run(code=1)
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        first, last = receiver.mails
        assert "blocked" in first["subject"] and "over" in last["subject"]
        assert first["references"] == last["references"]
        assert first["message-id"] != last["message-id"]
        assert first.get_content_type() == "multipart/alternative"
        assert len(receiver.receivers) == 4


def test_the_log_is_a_sink(tmp_path: Path):
    lake = lake_with(tmp_path, '[alert.team]\ntype = "log"\n')
    break_epoch(lake, 10)
    assert "epochs are blocked" in lake.run(code=1).err


@pytest.mark.parametrize(
    "fault",
    ["CRASH=alerts.before_store", "CRASH=alerts.after_store", "CRASH=alert.before_send",
     "CRASH=alert.after_send", "FAIL=alerts.before_store", "FAIL=alert.after_send"],
)  # fmt: skip
def test_a_crash_neither_loses_an_alert_nor_makes_another(tmp_path: Path, fault: str):
    how, point = fault.split("=")
    with HttpReceiver() as receiver:
        lake = lake_with(tmp_path, alert("webhook", receiver.url))
        break_epoch(lake, 10)
        result = lake.alluvium("run", "--once", env={f"ALLUVIUM_{how}": point})
        assert result.code == (-signal.SIGKILL if how == "CRASH" else 1)
        lake.run(code=1)
        lake.run(code=1)
        events = receiver.events()
        # Sent again after a crash behind the sending: with the same id, which receivers know.
        assert len({event["id"] for event in events}) == 1 and len(events) <= 2
        assert changes(receiver)[0] == ("blocked", "opened")


def test_a_receiver_that_is_down_gets_it_later(tmp_path: Path):
    with HttpReceiver(answers=[503, 200]) as receiver:
        lake = lake_with(tmp_path, alert("webhook", receiver.url))
        break_epoch(lake, 10)
        # The process waits ten seconds for its last words: one pause of 5 s.
        lake.run(code=1)
        assert len({event["id"] for event in receiver.events()}) == 1
        assert len(receiver.requests) == 2
    stored = json.loads((tmp_path / "state/alerts/incidents.json").read_text())
    assert stored["outbox"] == [] and len(stored["open"]) == 1


def test_a_full_disk_is_told_although_nothing_can_be_stored(tmp_path: Path):
    state = tmp_path / "state"
    state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(state)]
    assert subprocess.run(mount, check=False).returncode == 0, "run this as root: it mounts a tmpfs"
    try:
        with HttpReceiver() as receiver:
            lake = lake_with(tmp_path, alert("webhook", receiver.url))
            lake.deliver(10, [("a", 1, "U")])
            lake.run()
            with (state / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            lake.deliver(20, [("a", 2, "U")])
            lake.alluvium("run", "--once")
            assert ("broken", "opened") in changes(receiver)
            (state / "filler").unlink()
            lake.run()
            assert lake.main() == {"a": 2}
    finally:
        subprocess.run(["umount", str(state)], check=False)


def test_a_receiver_that_is_gone_is_not_asked_again(tmp_path: Path):
    with HttpReceiver(answers=[410]) as receiver:
        lake = lake_with(tmp_path, alert("webhook", receiver.url))
        break_epoch(lake, 10)
        lake.run(code=1)
        lake.run(code=1)
        assert len(receiver.requests) == 1


def test_the_test_verb_says_what_the_receiver_said(tmp_path: Path):
    with HttpReceiver(answers=[200, 200, 403]) as receiver:
        lake = lake_with(tmp_path, alert("slack", receiver.url))
        done = lake.alluvium("alerts", "test", "team")
        assert done.code == 0 and "200" in done.err
        assert "this is a test" in receiver.events()[0]["text"]
        unknown = lake.alluvium("alerts", "test", "nobody")
        assert unknown.code == 2 and "there are: team" in unknown.err
        receiver.answers[:] = [403]
        refused = lake.alluvium("alerts", "test", "team")
        assert refused.code == 4 and "AL-0601" in refused.err and "403" in refused.err
        assert receiver.host not in refused.err, "the URL is a secret"


def test_kinds_that_a_drained_run_can_see(tmp_path: Path):
    """Each kind at least once, in a lake of its own."""

    def quarantine(lake: Lake):
        lake.deliver(10, [("a", 1, "U"), (None, 1, "U")])

    def late(lake: Lake):
        lake.deliver(20, [("a", 1, "U")])
        lake.run()
        break_epoch(lake, 10)

    def changed(lake: Lake):
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        lake.deliver(10, [("b", 1, "U")])

    def broken(lake: Lake):
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        lake.pipelines["p"] = lake.pipelines["p"].replace('key = ["id"]', 'key = ["value"]')
        lake.configure(lake.head)

    def incomplete(lake: Lake):
        lake.deliver(10, [("a", 1, "U")], complete=False)
        lake.run()

    def hook(lake: Lake):
        lake.deliver(10, [("a", 1, "U")])

    cases = {
        "quarantine": (quarantine, "", 0),
        "late_blocked": (late, "", 1),
        "folder_changed": (changed, "", 0),
        "broken": (broken, "", 5),
        "folder_incomplete": (incomplete, 'alert = { incomplete = "1ms" }', 0),
        "nothing_arrived": (lambda lake: None, 'alert = { arrive_by = "00:00" }', 0),
        "hook": (hook, 'after_merge = { command = ["false"] }', 0),
    }
    for kind, (act, more, code) in cases.items():
        root = tmp_path / kind
        root.mkdir()
        with HttpReceiver() as receiver:
            lake = Lake(root).pipeline(more=more)
            lake.head = alert("webhook", receiver.url)
            lake.configure(lake.head)
            act(lake)
            lake.run(code=code)
            assert (kind, "opened") in changes(receiver), (kind, receiver.events())
    listed = Lake(tmp_path).alluvium("alerts", "kinds", "-o", "json").json()
    assert len(listed) == 14 and set(cases) < {item["kind"] for item in listed}


def test_kinds_that_a_watching_run_sees(tmp_path: Path):
    """Lag, a full disk and deliveries that do not come are seen with time or with a limit."""
    with HttpReceiver() as receiver:
        more = 'alert = { lag = "1ms", no_arrival = "1ms" }\n'
        head = alert("webhook", receiver.url)
        lake = lake_with(tmp_path, head + "[run]\npoll = \"200ms\"\n", more=more)
        text = (tmp_path / "alluvium.toml").read_text()
        text = text.replace("[worker]\n", '[worker]\ndisk_free = "900000GiB"\n')
        (tmp_path / "alluvium.toml").write_text(text)
        break_epoch(lake, 10)
        process = lake.start("run")
        try:
            kinds = {"lag", "low_disk", "blocked", "nothing_arrived"}
            wait_for(lambda: kinds <= {kind for kind, _ in changes(receiver)}, str(kinds))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def test_a_cluster_tells_of_workers_and_dead_letters(make):
    """No workers is told after a minute; a message that nobody understands at once."""
    with HttpReceiver() as receiver:
        cluster = make(more=alert("webhook", receiver.url))
        cluster.coordinator()
        rabbitmq, queue = cluster.services.rabbitmq, f"{cluster.name}.v1.dead"
        wait_for(lambda: rabbitmq.queue_depth(queue) is not None, "the dead letters are declared")
        with rabbitmq.connection() as broker:
            broker.channel().basic_publish("", queue, b"garbage")
        wait_for(lambda: ("dead_letters", "opened") in changes(receiver), "dead letters")
        wait_for(lambda: ("no_workers", "opened") in changes(receiver), "no workers", 100)
        cluster.worker()
        wait_for(lambda: ("no_workers", "resolved") in changes(receiver), "a worker again")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('type = "webhook"\nurl = "http://example.com/x"', "https"),
        ('type = "webhook"\nurl = "https://169.254.169.254/latest"', "link"),
        ('type = "pagerduty"', "routing key"),
        ('type = "email"\nurl = "https://x"', "smtp://"),
        ('type = "slack"\nurl = "https://x.example"\nkinds = ["bloked"]', "no kind"),
        ('type = "log"\npipelines = ["q"]', "no pipeline"),
        ('url = "https://x.example"', "required"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, lines: str, says: str):
    lake = lake_with(tmp_path, f"[alert.team]\n{lines}\n")
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and "alert.team." in done.err and says in done.err, done.err
