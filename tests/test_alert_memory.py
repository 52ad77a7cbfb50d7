"""What opens an incident, and what must not close it: restarts, other pipelines, later epochs, clocks."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lake import Lake
from receivers import HttpReceiver, wait_for


def webhook(url: str) -> str:
    return f'[alert.team]\ntype = "webhook"\nurl = "{url}"\n'


def changes(receiver: HttpReceiver, kind: str) -> list[str]:
    events = [event for event in receiver.events() if event["data"]["kind"] == kind]
    return [event["type"].split(".")[-2] for event in events]


def instant(text: str) -> dt.datetime:
    # Nine digits are more than Python reads.
    return dt.datetime.fromisoformat(text[:19] + "+00:00") + dt.timedelta(seconds=1)


def stored(lake: Lake) -> dict:
    return json.loads((lake.root / "state/alerts/incidents.json").read_text())


def test_an_epoch_with_refused_rows_is_told_whatever_comes_after_it(tmp_path: Path):
    """Both are ingested between two looks; the second one has no refused rows."""
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U"), (None, 1, "U")])
        lake.deliver(20, [("a", 2, "U")])
        lake.run()
        assert changes(receiver, "quarantine") == ["opened"]
        assert "epoch 10" in receiver.events()[0]["data"]["subjects"]


@pytest.mark.parametrize(("refused", "told"), [(1, []), (3, ["opened"])])
def test_the_share_of_refused_rows_is_a_limit(tmp_path: Path, refused: int, told: list[str]):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more='alert = { quarantine_share = "20%" }')
        lake.configure(webhook(receiver.url))
        rows = [(f"k{n}", 1, "U") for n in range(10 - refused)]
        lake.deliver(10, [*rows, *[(None, 1, "U")] * refused])
        lake.run()
        assert changes(receiver, "quarantine") == told


def test_a_hook_that_fails_in_every_run_is_one_alert(tmp_path: Path):
    with HttpReceiver() as receiver, HttpReceiver(answers=[200]) as hooked:
        lake = Lake(tmp_path).pipeline(more=f'after_merge = {{ url = "{hooked.url}" }}')
        lake.configure(webhook(receiver.url))
        lake.deliver(1, [("a", 1, "U")])
        lake.run()
        hooked.answers[:] = [500]
        lake.deliver(2, [("a", 2, "U")])
        lake.run()
        assert changes(receiver, "hook") == ["opened"]
        lake.run()
        assert changes(receiver, "hook") == ["opened"], "nothing was repaired"
        hooked.answers[:] = [200]
        lake.run()
        assert changes(receiver, "hook") == ["opened", "resolved"]


def test_time_goes_on_while_another_pipeline_runs(tmp_path: Path):
    """Since when a folder is incomplete is not forgotten by a process that does not look at it."""
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline("p", more='alert = { incomplete = "2s" }').pipeline("q")
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")], name="p", complete=False)
        assert lake.alluvium("run", "--once", "p").code == 0
        since = stored(lake)["first_seen"]
        assert [name for name in since if name.startswith("incomplete/p/")]
        assert lake.alluvium("run", "--once", "q").code == 0
        assert stored(lake)["first_seen"] == since
        since = next(iter(stored(lake)["first_seen"].values()))
        wait_for(lambda: dt.datetime.now(dt.timezone.utc) > instant(since) + dt.timedelta(seconds=2), "2 s")
        assert lake.alluvium("run", "--once", "p").code == 0
        assert changes(receiver, "folder_incomplete") == ["opened"]


def test_time_goes_on_while_the_source_cannot_be_read(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline("p", more='alert = { incomplete = "2s" }')
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")], complete=False)
        lake.run()
        (tmp_path / "in_p").rename(tmp_path / "away")
        assert lake.alluvium("run", "--once").code != 0
        (tmp_path / "away").rename(tmp_path / "in_p")
        since = next(iter(stored(lake)["first_seen"].values()))
        wait_for(lambda: dt.datetime.now(dt.timezone.utc) > instant(since) + dt.timedelta(seconds=2), "2 s")
        lake.run()
        assert changes(receiver, "folder_incomplete") == ["opened"]
        assert changes(receiver, "broken") == ["opened", "resolved"]


def test_another_pipelines_run_leaves_incidents_open(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline("p").pipeline("q")
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")], name="p")
        (lake.folder(10, "p") / "part-0.parquet").write_bytes(b"no parquet")
        assert lake.alluvium("run", "--once", "p").code == 1
        assert lake.alluvium("run", "--once", "q").code == 0
        assert changes(receiver, "blocked") == ["opened"]
        listed = lake.alluvium("alerts", "list", "-o", "json").json()
        assert [(item["kind"], item["pipeline"]) for item in listed] == [("blocked", "p")]


@pytest.mark.parametrize("verb", ["retry", "replay"])
def test_a_person_ends_an_incident(tmp_path: Path, verb: str):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")])
        (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        lake.deliver(10, [("a", 1, "U")])
        done = lake.alluvium(verb, "p", "10", *([] if verb == "retry" else ["--yes"]))
        assert done.code == 0, done.err
        lake.run()
        assert changes(receiver, "blocked") == ["opened", "resolved"]


def test_a_document_that_nobody_understands_stops_no_data(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        (tmp_path / "state/alerts").mkdir(parents=True)
        (tmp_path / "state/alerts/incidents.json").write_text("{ half a doc")
        lake.deliver(10, [("a", 1, "U")])
        lake.deliver(20, [("a", 1, "U")])
        (lake.folder(20) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        assert lake.main() == {"a": 1}
        assert changes(receiver, "blocked") == ["opened"]


def test_a_watching_run_tells_of_the_end_too(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url) + '[run]\npoll = "200ms"\n')
        lake.deliver(10, [("a", 1, "U")])
        (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
        process = lake.start("run")
        try:
            wait_for(lambda: changes(receiver, "blocked") == ["opened"], "opened", 20)
            lake.deliver(10, [("a", 1, "U")])
            assert lake.alluvium("retry", "p", "10").code == 0
            wait_for(lambda: changes(receiver, "blocked") == ["opened", "resolved"], "resolved", 20)
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_delivered_by_another_clock(tmp_path: Path):
    """`arrive_by` is a time of the pipeline's zone: the other side of the date line has another day."""
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path)
        for name, zone in (("p", "Pacific/Kiritimati"), ("q", "Pacific/Pago_Pago")):
            more = f'alert = {{ arrive_by = "00:00" }}\ntimezone = "{zone}"'
            lake.pipeline(name, more=more).deliver(10, [("a", 1, "U")], name=name)
        lake.pipeline("r", more='alert = { arrive_by = "00:00" }')
        lake.configure(webhook(receiver.url))
        lake.run()
        events = [event["data"] for event in receiver.events()]
        assert [(e["kind"], e["pipeline"]) for e in events] == [("nothing_arrived", "r")]
        lake.deliver(10, [("a", 1, "U")], name="r")
        lake.run()
        assert changes(receiver, "nothing_arrived") == ["opened", "resolved"]


def test_the_next_coordinator_knows_what_was_told(make):
    with HttpReceiver() as receiver:
        cluster = make(more=webhook(receiver.url))
        cluster.deliver(1, [("a", 1, "U")])
        part = cluster.root / "in_p/1/part-0.parquet"
        good = part.read_bytes()
        part.write_bytes(b"no parquet")
        first = cluster.coordinator()
        cluster.worker()
        wait_for(lambda: changes(receiver, "blocked"), "opened", 30)
        first.kill()
        second = cluster.coordinator()
        cluster.wait(lambda: "leads" in second.text())
        # After its first look there is no second alert; what was on its way may have come twice.
        cluster.wait(lambda: 'alerts_open{kind="blocked"} 1' in (cluster.api("/metrics") or ""))
        assert len({event["id"] for event in receiver.events()}) == 1
        part.write_bytes(good)
        assert cluster.alluvium("retry", "p", "1").code == 0
        wait_for(lambda: "resolved" in changes(receiver, "blocked"), "resolved", 30)
        opened, *_, resolved = receiver.events()
        assert opened["data"]["incident"] == resolved["data"]["incident"]


def rewind(lake: Lake, change) -> None:
    """Lets time pass: edits what is remembered."""
    document = stored(lake)
    change(document)
    (lake.root / "state/alerts/incidents.json").write_text(json.dumps(document))


def break_epoch(lake: Lake, epoch: int) -> None:
    lake.deliver(epoch, [("a", 1, "U")])
    (lake.folder(epoch) / "part-0.parquet").write_bytes(b"no parquet")


def test_an_incident_that_grows_is_told_every_five_minutes_at_most(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        for epoch in (10, 20, 30):
            break_epoch(lake, epoch)
            lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened"], "too soon"

        def six_minutes(document: dict) -> None:
            document["open"][0]["told_at"] = "2026-01-01T00:00:00Z"

        rewind(lake, six_minutes)
        lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened", "grew"]
        first, grown = receiver.events()
        assert grown["data"]["incident"] == first["data"]["incident"]
        assert set(grown["data"]["subjects"]) == {"epoch 10", "epoch 20", "epoch 30"}
        rewind(lake, six_minutes)
        lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened", "grew"], "no news"
        # Two of three are repaired: it is not over, and the one that is left is no news.
        for epoch in (10, 20):
            lake.deliver(epoch, [("a", 1, "U")])
        rewind(lake, six_minutes)
        lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened", "grew"]
        listed = lake.alluvium("alerts", "list", "-o", "json").json()
        assert [item["concerns"] for item in listed] == ["epoch 30"]


def test_what_waits_too_long_or_for_nobody_is_given_up(tmp_path: Path):
    with HttpReceiver(answers=[500]) as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        break_epoch(lake, 10)
        process = lake.start("run", "--once")
        wait_for(lambda: receiver.requests, "the first attempt", 20)
        process.kill()
        process.communicate()

        def a_day(document: dict) -> None:
            (pending,) = document["outbox"]
            pending |= {"since": "2026-01-01T00:00:00Z", "not_before": "2026-01-01T00:00:00Z"}
            document["outbox"].append(pending | {"id": "other", "sink": "gone"})

        rewind(lake, a_day)
        told = lake.run(code=1).err
        assert "given up" in told and "team" in told
        assert stored(lake)["outbox"] == [] and len(receiver.requests) == 2
        assert len(stored(lake)["open"]) == 1, "the trouble is still there"


def test_an_epoch_that_kills_its_workers_is_told(make):
    with HttpReceiver() as receiver:
        cluster = make(more=webhook(receiver.url))
        cluster.coordinator()
        cluster.deliver(1, [("a", 1, "U")])
        for _ in range(3):
            victim = cluster.worker("--slots", "1", env={"ALLUVIUM_CRASH": "ingest.after_read"})
            assert victim.popen.wait(60) == -signal.SIGKILL
        cluster.worker()
        wait_for(lambda: changes(receiver, "poison") == ["opened"], "poison", 30)
        assert cluster.alluvium("retry", "p", "1").code == 0
        wait_for(lambda: changes(receiver, "poison") == ["opened", "resolved"], "over", 30)


def test_maintenance_that_fails_night_after_night_is_told(tmp_path: Path):
    """Each `run --once` tries once; the count of one process would never get far."""
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline(more="optimize = { small_files = 2 }")
        lake.configure(webhook(receiver.url))
        lake.deliver(1, [("a", 1, "U")])
        lake.run()
        [file] = (tmp_path / "p/main").glob("*.parquet")
        content = file.read_bytes()
        # Of the key a merge reads all, of other columns only what it rewrites.
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(2)
        at = chunk.dictionary_page_offset or chunk.data_page_offset
        file.write_bytes(content[:at] + bytes(20) + content[at + 20 :])
        lake.deliver(2, [("z", 2, "U")])
        lake.run()
        assert changes(receiver, "maintenance") == [], "one failure is no trouble yet"
        path = lake.root / "state/alerts/incidents.json"
        incidents = stored(lake)
        first = dt.datetime.now(dt.timezone.utc) - dt.timedelta(hours=13)
        incidents["first_seen"]["maintenance/p"] = first.strftime("%Y-%m-%dT%H:%M:%SZ")
        path.write_text(json.dumps(incidents))
        lake.run()
        assert changes(receiver, "maintenance") == ["opened"]
        lake.run()
        assert changes(receiver, "maintenance") == ["opened"], "and once only"
        file.write_bytes(content)
        lake.run()
        assert changes(receiver, "maintenance") == ["opened", "resolved"]


def test_the_recovery_says_what_the_trouble_was(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")])
        lake.run()
        lake.deliver(20, [("a", 1, "U")])
        (lake.folder(20) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        assert lake.alluvium("skip", "p", "20", "--yes").code == 0
        told = [event["data"]["subjects"]["epoch 20"] for event in receiver.events()]
        assert changes(receiver, "blocked") == ["opened", "resolved"]
        assert all(text.startswith("AL-0301") for text in told), told


def test_what_a_receiver_says_is_one_line_of_the_log(tmp_path: Path):
    with HttpReceiver(answers=[500], files={"/in": b"oops \x1b[31mred\n second line"}) as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(receiver.url))
        done = lake.alluvium("alerts", "test", "team")
        assert done.code != 0 and "\x1b" not in done.err
        assert "oops  [31mred  second line" in done.err, done.err


def test_a_pipeline_that_is_configured_no_more_has_no_trouble(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline("p").pipeline("q")
        lake.configure(webhook(receiver.url))
        lake.deliver(10, [("a", 1, "U")], name="p")
        (lake.folder(10, "p") / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        del lake.pipelines["p"]
        lake.configure(webhook(receiver.url))
        lake.run()
        assert changes(receiver, "blocked") == ["opened", "resolved"]
        assert lake.alluvium("alerts", "list", "-o", "json").json() == []


def test_a_sink_under_a_new_name_is_told_of_what_is_open(tmp_path: Path):
    with HttpReceiver(answers=[503]) as down, HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(webhook(down.url))
        lake.deliver(10, [("a", 1, "U")])
        (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        assert stored(lake)["outbox"], "nobody took it"
        lake.configure(webhook(receiver.url).replace("alert.team", "alert.oncall"))
        lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened"]
        # Told once: the name is known now.
        lake.run(code=1)
        assert changes(receiver, "blocked") == ["opened"]
        assert stored(lake)["outbox"] == []


def test_a_message_that_is_refused_holds_up_no_other(tmp_path: Path):
    """The receiver does not want to hear of one pipeline, for ever; of the other it does."""
    with HttpReceiver(answers=[422, 200]) as receiver:
        lake = Lake(tmp_path).pipeline("p").pipeline("q")
        lake.configure(webhook(receiver.url))
        for name in ("p", "q"):
            lake.deliver(10, [("a", 1, "U")], name=name)
            (lake.folder(10, name) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        first, second = (event["data"]["pipeline"] for event in receiver.events()[:2])
        assert {first, second} == {"p", "q"}, "the refused one came again before the other"


def test_a_pager_is_told_of_the_end_although_the_incident_is_forgotten(tmp_path: Path):
    with HttpReceiver() as receiver:
        lake = Lake(tmp_path).pipeline()
        lake.configure(f'[alert.pager]\ntype = "pagerduty"\nurl = "{receiver.url}"\nkey = "k"\n')
        lake.deliver(10, [("a", 1, "U")])
        good = (lake.folder(10) / "part-0.parquet").read_bytes()
        (lake.folder(10) / "part-0.parquet").write_bytes(b"no parquet")
        lake.run(code=1)
        shutil.rmtree(tmp_path / "state")
        lake.run(code=1)
        (lake.folder(10) / "part-0.parquet").write_bytes(good)
        lake.run()
        told = [(event["event_action"], event["dedup_key"]) for event in receiver.events()]
        assert [action for action, _ in told] == ["trigger", "trigger", "resolve"]
        assert len({key for _, key in told}) == 1
