"""Notifications at the edges: neighbours of a source, names that need encoding, signatures, lost brokers."""

from __future__ import annotations

import json
import time
import urllib.parse
from contextlib import contextmanager

import pika
import pytest

from receivers import HttpReceiver, wait_for
from sns import TOPIC, Signer

BEARER = {"Authorization": "Bearer let-me"}
NEVER = 'schedule = "0 0 1 1 *"\n'


def s3_event(bucket: str, key: str, event: str = "ObjectCreated:Put") -> dict:
    """As S3 sends it: keys are encoded like a form."""
    s3 = {"bucket": {"name": bucket}, "object": {"key": urllib.parse.quote_plus(key, safe="/")}}
    return {"Records": [{"eventSource": "aws:s3", "eventName": event, "s3": s3}]}


def notify(cluster, body, headers=None) -> tuple[int, dict]:
    code, text = cluster.post("/api/v1/notify", body, BEARER if headers is None else headers)
    return code, json.loads(text)


def start(cluster, notify_lines: str, hourly: bool = False, env=None):
    """Coordinator and worker, of which the first one leads and has made its first listing."""
    cluster.more = f"[notify]\n{notify_lines}\n"
    cluster.configure()
    path = cluster.root / "alluvium.toml"
    if hourly:
        path.write_text(path.read_text().replace('poll = "500ms"', 'poll = "1h"'))
    cluster.coordinator(env=env)
    cluster.worker()
    cluster.wait(lambda: cluster.api("/readyz") == "leads\n")
    cluster.wait(lambda: cluster.api("/api/v1/status"))
    return cluster


@pytest.fixture
def quiet(make):
    """A cluster on S3 that lists by notification only."""
    cluster = make("s3")
    cluster.pipelines["p"] += NEVER
    return cluster


def done(cluster, name: str = "p", epoch: int = 1):
    return lambda: cluster.states(name).get(epoch) == "processed"


def test_only_the_source_itself_counts(quiet):
    cluster = start(quiet, 'token = "let-me"')
    bucket = cluster.bucket
    for key in ("in_p2/1/x", "in_p", "other/in_p/1/x", "in_"):
        assert notify(cluster, s3_event(bucket, key)) == (200, {"woken": []}), key
    assert notify(cluster, s3_event(f"{bucket}x", "in_p/1/x")) == (200, {"woken": []})
    assert notify(cluster, s3_event(bucket, "in_p/1/x")) == (200, {"woken": ["p"]})


def test_names_that_need_encoding_are_found(quiet):
    quiet.pipeline("q", more=NEVER)
    folder = "in q/täglich+1"
    quiet.pipelines["q"] = quiet.pipelines["q"].replace("/in_q", f"/{folder}")
    cluster = start(quiet, 'token = "let-me"')
    assert notify(cluster, s3_event(cluster.bucket, f"{folder}/1/x")) == (200, {"woken": ["q"]})
    bridge = {"detail": {"bucket": {"name": cluster.bucket}, "object": {"key": f"{folder}/1/x"}}}
    assert notify(cluster, bridge) == (200, {"woken": ["q"]})


def test_a_busy_source_does_not_make_the_others_be_listed(make):
    cluster = make("s3")
    cluster.pipeline("q")
    start(cluster, 'token = "let-me"', hourly=True)
    for name in ("p", "q"):
        cluster.deliver(1, [("a", 1, "U")], name)
    assert notify(cluster, s3_event(cluster.bucket, "in_p/1/x")) == (200, {"woken": ["p"]})
    cluster.wait(done(cluster, "p"))
    time.sleep(1.5)
    assert cluster.states("q").get(1) is None, "q was listed for a file of p"
    notify(cluster, s3_event(cluster.bucket, "in_q/1/x"))
    cluster.wait(done(cluster, "q"))


def test_other_envelopes_and_none(quiet):
    cluster = start(quiet, 'token = "let-me"')
    event = s3_event(cluster.bucket, "in_p/1/x")
    test = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": cluster.bucket}
    assert notify(cluster, test) == (200, {"woken": []})
    # What a function behind SQS gets, and hands on.
    of_sqs = {"Records": [{"eventSource": "aws:sqs", "messageId": "1", "body": json.dumps(event)}]}
    assert notify(cluster, of_sqs) == (200, {"woken": ["p"]})
    many = {"Records": event["Records"] * 500}
    assert notify(cluster, many) == (200, {"woken": ["p"]})
    assert notify(cluster, s3_event(cluster.bucket, "in_p/1/x", "ObjectRemoved:Delete"))[0] == 200


@pytest.mark.parametrize(
    "body",
    [{"Records": "no"}, {"Records": [1, None, {"s3": 1}]}, {}, {"detail": {}}, None, 7, {"Type": 7},
     {"Type": "Notification"}, {"Type": "Notification", "TopicArn": [TOPIC]}],
)  # fmt: skip
def test_garbage_wakes_nobody_and_harms_nobody(quiet_started, body):
    code, answer = notify(quiet_started, body)
    assert (code, answer.get("woken")) == (200, []) or (code == 400 and "AL-0603" in str(answer))
    assert quiet_started.api("/readyz") == "leads\n"


@pytest.fixture(scope="module")
def quiet_started(tmp_path_factory, services):
    from cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("garbage"), services, "s3").pipeline(more=NEVER)
    yield start(cluster, f'token = "let-me"\ntopics = ["{TOPIC}"]')
    cluster.stop()


def test_a_body_without_end_is_cut(quiet_started):
    try:
        code, _ = quiet_started.post("/api/v1/notify", {"Records": ["x" * 1000] * 5000}, BEARER)
    except OSError:
        code = 413  # it hung up before we had said everything
    assert code in (400, 413)
    assert quiet_started.api("/readyz") == "leads\n"


def test_without_a_token_only_this_machine_may(quiet):
    cluster = start(quiet, "")
    event = s3_event(cluster.bucket, "in_p/1/x")
    assert notify(cluster, event, {}) == (200, {"woken": ["p"]})
    for headers in ({"Host": "alluvium.example.com"}, {"Origin": "https://evil.example"}):
        code, answer = notify(cluster, event, headers)
        assert code == 403 and "AL-0603" in str(answer), answer
        assert "[notify]" in str(answer)


# --- SNS -----------------------------------------------------------------------------------------


@contextmanager
def listening(quiet):
    with HttpReceiver() as receiver:
        env = {"ALLUVIUM_TEST_SNS_HOST": receiver.host}
        yield start(quiet, f'token = "let-me"\ntopics = ["{TOPIC}"]', env=env), receiver


def test_signatures_of_every_kind(quiet):
    with listening(quiet) as (cluster, receiver):
        event = json.dumps(s3_event(cluster.bucket, "in_p/1/x"))
        sns = Signer(receiver)
        good = sns.sign("Notification", event, Subject="Amazon S3 Notification")
        assert notify(cluster, good, {}) == (200, {"woken": ["p"]})
        assert notify(cluster, good, {}) == (200, {"woken": ["p"]}), "doubled"
        # A subject that was changed or put in is not what was signed.
        plain = sns.sign("Notification", event)
        old = Signer(receiver, "old", days=-1).sign("Notification", event)
        other = Signer(receiver, "other").sign("Notification", event)
        bad = [
            good | {"Subject": "other"}, plain | {"Subject": "put in"}, old,
            other | {"SigningCertURL": good["SigningCertURL"]},
            good | {"SignatureVersion": "3"}, good | {"SignatureVersion": "1"},
            good | {"Signature": ""}, good | {"Signature": "%%%"},
            {name: value for name, value in good.items() if name != "Signature"},
            good | {"SigningCertURL": f"http://{receiver.host}/nothing.pem"},
            good | {"SigningCertURL": f"http://{receiver.host}@evil.example/cert.pem"},
            good | {"SigningCertURL": "https://sns.eu-central-1.amazonaws.com.evil.example/c.pem"},
        ]  # fmt: skip
        for number, body in enumerate(bad):
            # The token does not help what is signed wrongly.
            for headers in ({}, BEARER):
                code, answer = notify(cluster, body, headers)
                assert code == 400 and "AL-0603" in str(answer), (number, answer)


def test_a_subscription_is_confirmed_where_sns_lives_only(quiet):
    with listening(quiet) as (cluster, receiver), HttpReceiver() as elsewhere:
        sns = Signer(receiver)
        abroad = sns.sign("SubscriptionConfirmation", "x", Token="t", SubscribeURL=elsewhere.url)
        code, answer = notify(cluster, abroad, {})
        assert code == 400 and "AL-0603" in str(answer) and elsewhere.requests == []
        url = f"http://{receiver.host}/yes"
        end = sns.sign("UnsubscribeConfirmation", "x", Token="t", SubscribeURL=url)
        assert notify(cluster, end, {})[0] == 200
        assert "/yes" not in [request.path for request in receiver.requests], "it was wanted"
        receiver.answers[:] = [500]
        asked = sns.sign("SubscriptionConfirmation", "x", Token="t", SubscribeURL=url)
        code, answer = notify(cluster, asked, {})
        assert code >= 500 and "AL-0603" in str(answer), "SNS asks again when it hears an error"


# --- the queue -----------------------------------------------------------------------------------


def test_the_queue_is_heard_again_after_its_broker_was_killed(quiet):
    queue = f"notes-{quiet.name}"
    cluster = start(quiet, f'queue = "{queue}"')
    rabbitmq = cluster.services.rabbitmq
    wait_for(lambda: rabbitmq.queue_depth(queue) is not None, "the queue is declared")
    rabbitmq.settle(queue)
    rabbitmq.kill()
    rabbitmq.start()
    cluster.deliver(1, [("a", 1, "U")])
    body = json.dumps(s3_event(cluster.bucket, "in_p/1/x")).encode()
    with rabbitmq.connection() as connection:
        connection.channel().basic_publish(queue, "", body, pika.BasicProperties(delivery_mode=2))
    cluster.wait(done(cluster))
    wait_for(lambda: rabbitmq.queue_depth(queue) == 0, "acknowledged")


@pytest.mark.parametrize("what", ["queue", "exchange"])
def test_a_queue_that_somebody_made_otherwise_harms_nothing(make, what: str):
    cluster = make()
    name = f"foreign-{cluster.name}"
    with cluster.services.rabbitmq.connection() as connection:
        channel = connection.channel()
        if what == "queue":
            channel.queue_declare(name, durable=True)  # a classic one
        else:
            channel.exchange_declare(name, "topic", durable=True)
    cluster.more = f'[notify]\nqueue = "{name}"\n'
    cluster.configure()
    coordinator = cluster.coordinator()
    cluster.worker()
    cluster.deliver(1, [("a", 1, "U")])
    cluster.wait(done(cluster))
    cluster.wait(lambda: "notifications are not heard" in coordinator.text(), 20)
    assert cluster.api("/readyz") == "leads\n", "polling goes on, and so does everything else"
