"""The S3 server of the tests: moto, with one writer of an object at a time.

Owns: conditional writes of which exactly one wins. moto looks whether an object is there and then
stores it, so of two writers in its threads both win, now and then. Never: another difference from moto.

    python3 s3_server.py PORT
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

WRITES = {"PUT", "POST", "DELETE"}
STRIPES = 64


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
    run_simple("127.0.0.1", int(sys.argv[1]), application(), threaded=True)
