"""The S3 server of the tests: moto, with one writer of an object at a time.

Owns: conditional writes of which exactly one wins. moto looks whether an object is there and then
stores it, so of two writers in its threads both win, now and then. And ranges that cost as much as they are
long: moto reads an object whole for each. Never: another difference from moto.

    python3 s3_server.py PORT
"""

from __future__ import annotations

import io
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import FakeKey
from werkzeug.serving import run_simple

WRITES = {"PUT", "POST", "DELETE"}
STRIPES = 64
KEPT_BYTES = 512 << 20


def keep_values() -> None:
    """Objects that were read last are kept in memory."""
    moto: property = FakeKey.value
    lock, kept = threading.Lock(), OrderedDict[int, tuple[FakeKey, bytes]]()

    def forget(key: FakeKey) -> None:
        with lock:
            kept.pop(id(key), None)

    def read(key: FakeKey) -> bytes:
        with lock:
            if id(key) in kept:
                kept.move_to_end(id(key))
                return kept[id(key)][1]
        value = moto.fget(key)
        with lock:
            # With the key itself: no other has its number as long as it is here.
            kept[id(key)] = key, value
            while sum(len(value) for _, value in kept.values()) > KEPT_BYTES:
                kept.popitem(last=False)
        return value

    def write(key: FakeKey, value: bytes) -> None:
        moto.fset(key, value)
        forget(key)

    FakeKey.value = property(read, write)


def application() -> Callable[..., Iterable[bytes]]:
    """moto as a WSGI application whose writes of one path come one after the other."""
    moto = DomainDispatcherApplication(create_backend_app)
    locks = [threading.Lock() for _ in range(STRIPES)]

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in WRITES:
            return moto(environ, start)
        # The body first: a writer that stops in the middle of it keeps nobody waiting.
        if environ.get("wsgi.input_terminated"):
            body = environ["wsgi.input"].read()
        else:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(length)
            if len(body) < length:
                start("400 Bad Request", [("Content-Type", "text/plain")])
                return [b"the body ended early"]
        environ["wsgi.input"] = io.BytesIO(body)
        with locks[hash(environ["PATH_INFO"]) % STRIPES]:
            return list(moto(environ, start))

    return answer


if __name__ == "__main__":
    keep_values()
    run_simple("127.0.0.1", int(sys.argv[1]), application(), threaded=True)
