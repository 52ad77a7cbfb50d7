"""Servers that stand in for images that cannot be pulled: an S3 server, and Jaeger.

Owns: answering as the real images do at what docker-compose.yml and its readers ask: ports, variables,
health, Jaeger's search. Never: runs outside of a container of tests/compose_run.py.

    python3 stand_ins.py s3 | jaeger
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


def s3() -> None:
    """RustFS's port, key and health, over moto; what it keeps is in memory."""
    from s3_server import application
    from werkzeug.serving import run_simple

    key, secret = os.environ["RUSTFS_ACCESS_KEY"], os.environ["RUSTFS_SECRET_KEY"]
    assert key and secret and os.access(os.environ["RUSTFS_VOLUMES"], os.W_OK)
    moto = application()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/health":
            start("200 OK", [("Content-Type", "application/json")])
            return [b'{"status":"ok"}']
        # Signatures are moto's business, which checks none; a wrong key is found here.
        if f"Credential={key}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            start("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"unknown access key"]
        return moto(environ, start)

    port = int(os.environ["RUSTFS_ADDRESS"].rpartition(":")[2])
    run_simple("0.0.0.0", port, answer, threaded=True)


def jaeger() -> None:
    """OTLP on 4317, Jaeger's HTTP API on 16686, its health on 13133."""
    from otlp_receiver import OtlpReceiver

    receiver = OtlpReceiver("0.0.0.0", 4317)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  (the name is http.server's)
            url = urlsplit(self.path)
            asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
            found = {
                "/status": lambda: {"status": "StatusOK"},
                "/api/services": lambda: {"data": sorted({s.service for s in receiver.spans()})},
                "/api/traces": lambda: {"data": search(receiver, asked)},
            }.get(url.path)
            body = json.dumps(found() if found else {"errors": ["not found"]}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    health = ThreadingHTTPServer(("0.0.0.0", 13133), Answers)
    threading.Thread(target=health.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("0.0.0.0", 16686), Answers).serve_forever()


def search(receiver: Any, asked: dict[str, str]) -> list[dict[str, Any]]:
    """Traces in which one span of the service carries all tags, as Jaeger searches."""
    tags = json.loads(asked.get("tags", "{}"))

    def is_meant(span: Any) -> bool:
        known = {name: str(value) for name, value in span.attributes.items()}
        return span.service == asked["service"] and tags.items() <= known.items()

    return [
        as_jaeger(trace_id, spans)
        for trace_id, spans in receiver.traces().items()
        if any(map(is_meant, spans))
    ]


def as_jaeger(trace_id: str, spans: list[Any]) -> dict[str, Any]:
    shown = []
    for span in spans:
        parents = [{"refType": "CHILD_OF", "traceID": trace_id, "spanID": span.parent_id}]
        shown.append({
            "traceID": trace_id, "spanID": span.span_id, "operationName": span.name,
            "references": parents if span.parent_id else [], "processID": span.service,
            "startTime": span.start_ns // 1000, "duration": (span.end_ns - span.start_ns) // 1000,
            "tags": [{"key": name, "value": value} for name, value in span.attributes.items()],
        })
    processes = {span.service: {"serviceName": span.service} for span in spans}
    return {"traceID": trace_id, "spans": shown, "processes": processes}


if __name__ == "__main__":
    {"s3": s3, "jaeger": jaeger}[sys.argv[1]]()
