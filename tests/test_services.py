"""The tools of the tests themselves: private servers and the proxy of faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import pika
import pytest
from botocore.exceptions import ClientError, HTTPClientError

from s3_proxy import S3Proxy
from services import Moto, Redis, Services

BUCKET = "tools"
VARIABLES = ["ALLUVIUM_TEST_AMQP", "ALLUVIUM_TEST_REDIS", "ALLUVIUM_TEST_S3"]


@pytest.fixture(scope="module")
def services(services: Services) -> Iterator[Services]:
    """Private ones, even if the environment gives others: here they are killed."""
    if not any(os.environ.get(variable) for variable in VARIABLES):
        yield services
        return
    with pytest.MonkeyPatch.context() as environment:
        for variable in VARIABLES:
            environment.delenv(variable, raising=False)
        private = Services()
        yield private
        private.stop()


@pytest.fixture(scope="module")
def s3(services: Services) -> Any:
    services.moto.create_bucket(BUCKET)
    return services.moto.client()


@pytest.fixture(scope="module")
def process(services: Services) -> Iterator[S3Proxy]:
    proxy = S3Proxy(services.s3).start()
    yield proxy
    proxy.stop()


@pytest.fixture
def proxy(process: S3Proxy) -> S3Proxy:
    process.clear()
    process.reset_counters()
    return process


def through(services: Services, proxy: S3Proxy) -> Any:
    """A client that does not try again."""
    return services.moto.client(proxy.url, attempts=1)


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        threading.Event().wait(0.05)
    return False


def alive(pid: int) -> bool:
    """A process that only waits for its parent to notice is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def publish(services: Services, queue: str, body: bytes) -> None:
    with services.rabbitmq.connection() as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


def test_a_killed_broker_keeps_its_messages_and_its_port(services: Services) -> None:
    broker = services.rabbitmq
    publish(services, "kept", b"still here")
    broker.settle("kept")
    url, killed = services.amqp, broker.pid
    broker.kill()
    assert not broker.running() and not broker.ready() and not alive(killed)
    broker.start()
    assert services.amqp == url
    assert within(20, lambda: broker.queue_depth("kept") == 1)
    with broker.connection() as connection:
        assert connection.channel().basic_get("kept", auto_ack=True)[2] == b"still here"
    broker.delete_queues(["kept", "never there"])
    assert broker.queue_depth("kept") is None


def test_the_broker_can_be_controlled(services: Services) -> None:
    assert "quorum_queue\tenabled" in services.rabbitmq.ctl("list_feature_flags")
    with pytest.raises(RuntimeError, match="no_such_command"):
        services.rabbitmq.ctl("no_such_command")


def test_a_restarted_redis_knows_nothing(services: Services) -> None:
    with services.redis.client() as client:
        client.set("key", "value")
        services.redis.restart()
        assert client.get("key") is None
        client.set("key", "value")
        services.redis.flush()
        assert client.get("key") is None


def test_servers_end_with_a_killed_parent() -> None:
    code = (
        "import services, sys; s = services.Services(); "
        "print(s.redis.pid, s.moto.pid, s.redis.folder, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    redis, moto, folder = parent.stdout.readline().split()
    assert alive(int(redis)) and alive(int(moto)) and Path(folder).is_dir()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert within(10, lambda: not alive(int(redis)) and not alive(int(moto)))
    assert within(10, lambda: not Path(folder).exists())


def test_a_given_server_is_not_ours_to_end(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLUVIUM_TEST_REDIS", services.redis.url)
    other = Services()
    with pytest.raises(RuntimeError, match="given by ALLUVIUM_TEST_REDIS"):
        other.redis.kill()
    other.stop()
    assert services.redis.running()
    monkeypatch.setenv("ALLUVIUM_TEST_REDIS", "redis://127.0.0.1:1/0")
    absent = Services()
    with pytest.raises(RuntimeError, match="does not answer at redis://127.0.0.1:1/0"):
        absent.redis.client()
    absent.stop()


def test_a_server_that_cannot_start_says_why(services: Services) -> None:
    second = Redis()
    second.address = services.redis.address
    second.ready = lambda: False  # else the first one answers for it
    with pytest.raises(RuntimeError, match="Address already in use"):
        second.start()
    second.close()


def test_one_conditional_put_wins(s3: Any, services: Services) -> None:
    clients = [services.moto.client() for _ in range(8)]
    barrier = threading.Barrier(len(clients))

    def put(number: int, key: str) -> bool:
        barrier.wait()
        try:
            clients[number].put_object(
                Bucket=BUCKET, Key=key, Body=str(number).encode(), IfNoneMatch="*"
            )
            return True
        except ClientError as error:
            assert error.response["Error"]["Code"] == "PreconditionFailed"
            return False

    with ThreadPoolExecutor(len(clients)) as pool:
        for number in range(20):
            key = f"race/{number}"
            won = list(pool.map(put, range(len(clients)), [key] * len(clients)))
            assert won.count(True) == 1, f"round {number}: {won}"
            body = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            assert won[int(body)]


def test_moto_forgets_on_request() -> None:
    moto = Moto()
    moto.start()
    moto.create_bucket("soon-gone")
    moto.reset()
    assert moto.client().list_buckets()["Buckets"] == []
    moto.close()


def test_the_proxy_counts(s3: Any, services: Services, proxy: S3Proxy) -> None:
    client = through(services, proxy)
    client.put_object(Bucket=BUCKET, Key="counted", Body=b"12345")
    assert client.get_object(Bucket=BUCKET, Key="counted")["Body"].read() == b"12345"
    client.head_object(Bucket=BUCKET, Key="counted")
    client.list_objects_v2(Bucket=BUCKET, Prefix="counted")
    client.delete_object(Bucket=BUCKET, Key="counted")
    client.create_multipart_upload(Bucket=BUCKET, Key="parts")
    counted = proxy.counters()
    assert counted["requests"] == {"PUT": 1, "GET": 2, "HEAD": 1, "DELETE": 1, "POST": 1}
    assert counted["by_kind"] == {
        "put": 1, "get": 1, "head": 1, "list": 1, "delete": 1, "multipart": 1
    }
    assert counted["bytes_in"] >= 5 and counted["bytes_out"] >= 5
    proxy.reset_counters()
    assert proxy.counters()["requests"] == {}


def test_latency_is_not_shared(s3: Any, services: Services, proxy: S3Proxy) -> None:
    """A proxy behind a proxy: one that keeps its connections, as moto does not."""
    s3.put_object(Bucket=BUCKET, Key="slow", Body=os.urandom(200_000))
    second = S3Proxy(proxy.url).start()
    client = through(services, second)
    proxy.set(latency_ms=300)
    began = time.monotonic()
    with ThreadPoolExecutor(40) as pool:
        gets = pool.map(lambda _: client.get_object(Bucket=BUCKET, Key="slow"), range(80))
        assert {len(got["Body"].read()) for got in gets} == {200_000}
    assert 0.6 <= time.monotonic() - began < 10
    assert second.counters()["bytes_out"] == proxy.counters()["bytes_out"] == 80 * 200_000
    second.stop()


def test_refused_and_reset(s3: Any, services: Services, proxy: S3Proxy) -> None:
    client = through(services, proxy)
    proxy.set(refuse=True)
    with pytest.raises(ClientError, match="SlowDown"):
        client.put_object(Bucket=BUCKET, Key="refused", Body=b"x" * 300_000)
    proxy.set(refuse=False, reset=True)
    with pytest.raises(HTTPClientError):
        client.list_objects_v2(Bucket=BUCKET)
    proxy.clear()
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="refused")["KeyCount"] == 0
    assert proxy.counters()["faults"] == {"503": 1, "reset": 1}


def test_a_lost_reply_is_of_a_request_that_was_done(
    s3: Any, services: Services, proxy: S3Proxy
) -> None:
    client = through(services, proxy)
    proxy.drop_reply(contains="_delta_log/")
    client.put_object(Bucket=BUCKET, Key="t/data.parquet", Body=b"1")
    with pytest.raises(HTTPClientError):
        client.put_object(Bucket=BUCKET, Key="t/_delta_log/0.json", Body=b"2", IfNoneMatch="*")
    assert s3.get_object(Bucket=BUCKET, Key="t/_delta_log/0.json")["Body"].read() == b"2"
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key="t/_delta_log/0.json", Body=b"3", IfNoneMatch="*")
    assert proxy.counters()["faults"] == {"dropped": 1}


@pytest.mark.parametrize("done", [False, True])
def test_a_request_fails_once(s3: Any, services: Services, proxy: S3Proxy, done: bool) -> None:
    client, key = through(services, proxy), f"failed/{done}"
    proxy.fail_once(409, contains="failed/", forward=done)
    with pytest.raises(ClientError, match="ConditionalRequestConflict"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"1")
    assert s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"] == int(done)
    client.put_object(Bucket=BUCKET, Key=key, Body=b"2")
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"2"
