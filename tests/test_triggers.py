"""What wakes the discovery: schedules, other pipelines, notifications. Losing or doubling one changes no row."""

from __future__ import annotations

import datetime as dt
import json
import signal
import time
from pathlib import Path

import pytest

from lake import Lake
from receivers import HttpReceiver, wait_for
from sns import TOPIC, Signer

# Nobody polls while a test runs.
NEVER = 'schedule = "0 0 1 1 *"'


# --- schedules and followers ---------------------------------------------------------------------


def test_a_schedule_lists_at_its_times_only(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more='schedule = "*/4 * * * * *"\ntimezone = "Europe/Berlin"')
    lake.configure('[run]\npoll = "100ms"\n')
    lake.deliver(1, [("a", 1, "U")])
    process = lake.start("run")
    try:
        # The first listing comes at once; the next ones when the schedule says so.
        wait_for(lambda: lake.states().get(1) == "processed", "the first listing")
        for epoch in (2, 3):
            lake.deliver(epoch, [("a", epoch, "U")])
            delivered = time.time()
            wait_for(lambda: lake.states().get(epoch) == "processed", "the schedule's time")
            runs = ["runs", "p", "--epoch", str(epoch), "-o", "json"]
            run = wait_for(lambda: lake.alluvium(*runs).json(), "the ledger's rows")[-1]
            published = dt.datetime.fromisoformat(run["published_at"].replace("Z", "+00:00"))
            # A time of the schedule lies in between; a poll would not have waited for one.
            assert published.timestamp() // 4 > delivered // 4
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_a_drained_run_does_not_wait_for_the_schedule(tmp_path: Path):
    lake = Lake(tmp_path).pipeline(more=NEVER)
    lake.deliver(1, [("a", 1, "U")])
    lake.run()
    assert lake.main() == {"a": 1}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('schedule = "61 * * * *"', "schedule"),
        ('timezone = "Mars/Olympus"', "no time zone"),
        ('after = ["p"]', "cannot follow itself"),
        ('after = ["q"]', "no pipeline"),
        ('after_merge = { url = "http://example.com" }', "https"),
        ('after_merge = { url = "https://x.example", command = ["x"] }', "not both"),
        ('alert = { arrive_by = "25:00" }', "06:30"),
        ('alert = { quarantine_share = "5" }', "percentage"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, more: str, says: str):
    done = Lake(tmp_path).pipeline(more=more).alluvium("config", "validate")
    assert done.code == 2 and says in done.err, done.err


def test_a_follower_is_listed_when_the_other_merged(tmp_path: Path):
    lake = Lake(tmp_path).pipeline("p").pipeline("q", more=f'{NEVER}\nafter = ["p"]')
    lake.configure('[run]\npoll = "200ms"\n')
    lake.deliver(1, [("a", 1, "U")], name="q")
    process = lake.start("run")
    try:
        wait_for(lambda: lake.states("q").get(1) == "processed", "the first listing")
        lake.deliver(2, [("a", 2, "U")], name="q")
        lake.deliver(1, [("a", 1, "U")], name="p", complete=False)
        # p was listed after q got its folder, and says so.
        line = iter(process.stderr.readline, "")
        assert any("p 1  not complete" in text for text in line)
        assert lake.states("q").get(2) != "processed"
        lake.deliver(1, [("a", 1, "U")], name="p")
        wait_for(lambda: lake.states("q").get(2) == "processed", "q follows p")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


# --- notifications -------------------------------------------------------------------------------


def s3_event(bucket: str, key: str) -> dict:
    return {"Records": [{"eventSource": "aws:s3", "s3": {"bucket": {"name": bucket}, "object": {"key": key}}}]}


def shapes(bucket: str, key: str) -> dict[str, dict]:
    minio = {"EventName": "s3:ObjectCreated:Put", "Key": f"{bucket}/{key}", **s3_event(bucket, key)}
    bridge = {
        "source": "aws.s3", "detail-type": "Object Created",
        "detail": {"bucket": {"name": bucket}, "object": {"key": key}},
    }  # fmt: skip
    return {"s3": s3_event(bucket, key), "minio": minio, "eventbridge": bridge}


@pytest.fixture
def waiting(make):
    """A cluster on S3 that nobody polls, with an epoch that waits to be noticed."""
    with HttpReceiver() as receiver:
        more = f'[notify]\ntoken = "let-me"\ntopics = ["{TOPIC}"]\nqueue = "notes"\n'
        cluster = make("s3", more=more)
        cluster.pipelines["p"] += f"{NEVER}\n"
        cluster.more = more.replace('"notes"', f'"notes-{cluster.name}"')
        cluster.configure()
        cluster.sns = Signer(receiver)
        cluster.receiver = receiver
        cluster.coordinator(env={"ALLUVIUM_TEST_SNS_HOST": receiver.host})
        cluster.worker()
        # The first listing is over.
        cluster.wait(lambda: "alluvium_leading{} 1" in (cluster.api("/metrics") or ""))
        cluster.deliver(1, [("a", 1, "U")])
        yield cluster


def merged(cluster, epoch: int):
    return lambda: cluster.states().get(epoch) == "processed"


def test_every_shape_wakes_the_pipeline_that_it_concerns(waiting):
    cluster = waiting
    bearer = {"Authorization": "Bearer let-me"}
    elsewhere = s3_event(cluster.bucket, "other/1/x")
    code, answer = cluster.post("/api/v1/notify?token=let-me", elsewhere)
    assert code == 200 and json.loads(answer) == {"woken": []}
    assert cluster.states().get(1) != "processed", "nobody polls"
    for number, body in enumerate(shapes(cluster.bucket, "in_p/1/part-0.parquet").values(), 1):
        cluster.deliver(number, [("a", number, "U")])
        for _ in range(3):  # doubled: nothing but a listing more
            code, answer = cluster.post("/api/v1/notify", body, bearer)
            assert code == 200 and json.loads(answer) == {"woken": ["p"]}, answer
        cluster.wait(merged(cluster, number))
    assert cluster.expected() == {"a": 3}


def test_strangers_are_refused(waiting):
    cluster = waiting
    event = s3_event(cluster.bucket, "in_p/1/x")
    for path, headers in (
        ("/api/v1/notify", None),
        ("/api/v1/notify?token=wrong", None),
        ("/api/v1/notify", {"Authorization": "Bearer wrong"}),
    ):
        code, answer = cluster.post(path, event, headers)
        assert code == 401 and "AL-0603" in answer
    for body in ({"hello": 1}, [1], "x"):
        code, answer = cluster.post("/api/v1/notify?token=let-me", body)
        assert code == 400 and "AL-0603" in answer
    assert cluster.states().get(1) != "processed"


@pytest.mark.parametrize("version", ["1", "2"])
def test_sns_is_believed_by_its_signature(waiting, version: str):
    cluster, sns = waiting, waiting.sns
    asked = sns.sign(
        "SubscriptionConfirmation", "come", version, Token="t", SubscribeURL=f"http://{sns.host}/subscribe?x=1",
    )
    code, answer = cluster.post("/api/v1/notify", asked)
    assert code == 200 and json.loads(answer) == {"subscribed": True}, answer
    assert any(request.path == "/subscribe?x=1" for request in cluster.receiver.requests)
    good = sns.sign("Notification", json.dumps(s3_event(cluster.bucket, "in_p/1/x")), version)
    forged = good | {"Message": json.dumps(s3_event(cluster.bucket, "in_p/2/x"))}
    strange = sns.sign("Notification", good["Message"], version, topic="arn:aws:sns:x:1:other")
    abroad = good | {"SigningCertURL": "https://sns.evil.example/cert.pem"}
    for body, why in ((forged, "signature is wrong"), (strange, "notify.topics"), (abroad, "not a host")):
        code, answer = cluster.post("/api/v1/notify", body)
        assert code == 400 and "AL-0603" in answer and why in answer
    assert cluster.states().get(1) != "processed"
    code, answer = cluster.post("/api/v1/notify", good)
    assert code == 200 and json.loads(answer) == {"woken": ["p"]}
    cluster.wait(merged(cluster, 1))


def test_a_queue_of_rabbitmq_wakes_too(waiting):
    cluster = waiting
    queue = f"notes-{cluster.name}"
    rabbitmq = cluster.services.rabbitmq
    wait_for(lambda: rabbitmq.queue_depth(queue) is not None, "the coordinator declares it")
    with rabbitmq.connection() as broker:
        channel = broker.channel()
        for body in (b"garbage", json.dumps(s3_event(cluster.bucket, "in_p/1/x")).encode()):
            # To the exchange of the same name, as RustFS does.
            channel.basic_publish(queue, "", body)
    cluster.wait(merged(cluster, 1))


def test_a_lost_notification_is_a_later_listing(make):
    cluster = make("s3")
    cluster.coordinator()
    cluster.worker()
    cluster.deliver(1, [("a", 1, "U")])
    cluster.wait(merged(cluster, 1))
