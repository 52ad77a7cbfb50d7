"""A collector of traces for tests: takes what an OTLP/gRPC exporter sends and keeps it readable.

Owns: the gRPC server, and turning the wire's spans into plain ones. Never: judges spans, drops any,
or knows which ones the product should send.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

POLL_SECONDS = 0.05
# gRPC's own limit of 4 MiB would refuse a large batch, which no test means by "refused".
MESSAGE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class Span:
    """One span as it was sent, with its resource; `kind` and `status` are lower-case words."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    links: list[tuple[str, str, dict[str, Any]]]
    status: str
    status_message: str
    service: str
    resource: dict[str, Any]


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens from its making until `stop`; usable as a context manager. Port 0: a free one."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._spans: list[Span] = []
        self._is_refusing = False
        self._lock = threading.Lock()
        self.accepted = 0  # requests, not spans
        self.refused = 0
        # Without this option two receivers could share one port and each see half of the spans.
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4), options=options)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"{host}:{port}")
        self.endpoint = f"http://{host}:{port}"
        self._server.start()

    def __enter__(self) -> "OtlpReceiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def Export(  # noqa: N802  (the name is the protocol's)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext,
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Called by gRPC, from any of its threads."""
        with self._lock:
            is_refusing = self._is_refusing
            if is_refusing:
                self.refused += 1
            else:
                self.accepted += 1
                self._spans.extend(_plain_spans(request))
        if is_refusing:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the test refuses traces")
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str | None = None, name: str | None = None) -> list[Span]:
        """What came so far, in the order of arrival."""
        with self._lock:
            return [
                span for span in self._spans
                if trace_id in (None, span.trace_id) and name in (None, span.name)
            ]

    def traces(self) -> dict[str, list[Span]]:
        """What came so far by trace, each in the order of the spans' starts."""
        traces: dict[str, list[Span]] = {}
        for span in sorted(self.spans(), key=lambda span: span.start_ns):
            traces.setdefault(span.trace_id, []).append(span)
        return traces

    def wait_for(self, predicate: Callable[[list[Span]], Any], seconds: float) -> list[Span]:
        """The spans as soon as `predicate(spans)` holds; fails, naming what came, after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            spans = self.spans()
            if predicate(spans):
                return spans
            if time.monotonic() >= deadline:
                names = sorted(span.name for span in spans)
                raise AssertionError(f"not within {seconds} s; {len(spans)} spans came: {names}")
            time.sleep(POLL_SECONDS)

    def refuse(self, is_refusing: bool) -> None:
        """From now on answers UNAVAILABLE and keeps nothing, or takes spans again."""
        with self._lock:
            self._is_refusing = is_refusing

    def stop(self) -> None:
        """Closes the port; what came stays readable. May be called twice."""
        self._server.stop(grace=None).wait()


def _plain_spans(request: trace_service_pb2.ExportTraceServiceRequest) -> list[Span]:
    return [
        _plain_span(span, _plain_attributes(of_resource.resource.attributes))
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _plain_span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    kind = trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower()
    status = trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower()
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain_attributes(span.attributes),
        events=[(event.name, _plain_attributes(event.attributes)) for event in span.events],
        links=[
            (link.trace_id.hex(), link.span_id.hex(), _plain_attributes(link.attributes))
            for link in span.links
        ],
        status=status,
        status_message=span.status.message,
        service=resource.get("service.name", ""),
        resource=resource,
    )


def _plain_attributes(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    return {attribute.key: _plain_value(attribute.value) for attribute in attributes}


def _plain_value(value: common_pb2.AnyValue) -> Any:
    which = value.WhichOneof("value")
    if which is None:  # an attribute without a value is allowed
        return None
    if which == "array_value":
        return [_plain_value(item) for item in value.array_value.values]
    if which == "kvlist_value":
        return _plain_attributes(value.kvlist_value.values)
    return getattr(value, which)
