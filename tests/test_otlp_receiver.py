"""The collector of traces itself, driven by the generated client."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from otlp_receiver import OtlpReceiver, Span

TRACE, OTHER_TRACE = bytes(range(16)), bytes(range(16, 32))
TIMEOUT_SECONDS = 10


def attribute(key: str, **value: object) -> common_pb2.KeyValue:
    return common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(**value))


def span(name: str, number: int, trace: bytes = TRACE, **more: object) -> trace_pb2.Span:
    return trace_pb2.Span(
        trace_id=trace, span_id=number.to_bytes(8, "big"), name=name, start_time_unix_nano=number,
        end_time_unix_nano=number + 1, **more,
    )


def export(receiver: OtlpReceiver, *spans: trace_pb2.Span) -> None:
    request = trace_service_pb2.ExportTraceServiceRequest(
        resource_spans=[
            trace_pb2.ResourceSpans(
                resource=resource_pb2.Resource(
                    attributes=[attribute("service.name", string_value="alluvium-test")]
                ),
                scope_spans=[trace_pb2.ScopeSpans(spans=spans)],
            )
        ]
    )
    with grpc.insecure_channel(receiver.endpoint.removeprefix("http://")) as channel:
        stub = trace_service_pb2_grpc.TraceServiceStub(channel)
        stub.Export(request, timeout=TIMEOUT_SECONDS)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def test_a_span_is_read_back_whole(receiver):
    items = [common_pb2.AnyValue(int_value=1), common_pb2.AnyValue(string_value="two")]
    export(
        receiver,
        span(
            "merge", 7, parent_span_id=(6).to_bytes(8, "big"),
            kind=trace_pb2.Span.SPAN_KIND_CONSUMER,
            attributes=[
                attribute("text", string_value="s"),
                attribute("int", int_value=-3),
                attribute("float", double_value=0.5),
                attribute("no", bool_value=False),
                attribute("bytes", bytes_value=b"\0"),
                attribute("list", array_value=common_pb2.ArrayValue(values=items)),
                attribute(
                    "map", kvlist_value=common_pb2.KeyValueList(values=[attribute("k", int_value=1)])
                ),
                common_pb2.KeyValue(key="nothing"),
            ],
            events=[
                trace_pb2.Span.Event(name="retry", attributes=[attribute("attempt", int_value=2)])
            ],
            links=[
                trace_pb2.Span.Link(
                    trace_id=OTHER_TRACE, span_id=bytes(8), attributes=[attribute("why", string_value="again")]
                )
            ],
            status=trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR, message="lost"),
        ),
    )
    assert receiver.spans() == [
        Span(
            trace_id="000102030405060708090a0b0c0d0e0f", span_id="0000000000000007",
            parent_id="0000000000000006", name="merge", kind="consumer", start_ns=7, end_ns=8,
            attributes={
                "text": "s", "int": -3, "float": 0.5, "no": False, "bytes": b"\0",
                "list": [1, "two"], "map": {"k": 1}, "nothing": None,
            },
            events=[("retry", {"attempt": 2})],
            links=[(OTHER_TRACE.hex(), "0" * 16, {"why": "again"})],
            status="error", status_message="lost", service="alluvium-test",
            resource={"service.name": "alluvium-test"},
        )
    ]


def test_what_a_plain_span_leaves_out_is_empty(receiver):
    export(receiver, span("root", 1))
    (root,) = receiver.spans()
    assert (root.parent_id, root.kind, root.status) == ("", "unspecified", "unset")
    assert (root.attributes, root.events, root.links) == ({}, [], [])


def test_spans_are_found_by_trace_and_name(receiver):
    export(receiver, span("late", 9), span("early", 2))
    export(receiver, span("early", 3, OTHER_TRACE))
    assert [s.start_ns for s in receiver.spans(name="early")] == [2, 3]
    assert [s.name for s in receiver.spans(trace_id=TRACE.hex())] == ["late", "early"]
    assert [s.start_ns for s in receiver.spans(TRACE.hex(), "early")] == [2]
    by_trace = {trace: [s.name for s in spans] for trace, spans in receiver.traces().items()}
    assert by_trace == {TRACE.hex(): ["early", "late"], OTHER_TRACE.hex(): ["early"]}


def test_waiting_ends_with_the_spans_or_says_what_came(receiver):
    export(receiver, span("claim", 1))
    assert len(receiver.wait_for(lambda spans: len(spans) == 1, 5)) == 1
    with pytest.raises(AssertionError, match="1 spans came: .'claim'."):
        receiver.wait_for(lambda spans: len(spans) == 2, 0.2)


def test_refusing_answers_unavailable_and_keeps_nothing(receiver):
    receiver.refuse(True)
    with pytest.raises(grpc.RpcError) as refused:
        export(receiver, span("lost", 1))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    receiver.refuse(False)
    export(receiver, span("kept", 2))
    assert [s.name for s in receiver.spans()] == ["kept"]
    assert (receiver.accepted, receiver.refused) == (1, 1)


def test_after_stop_the_port_is_closed_and_spans_stay(receiver):
    export(receiver, span("kept", 1))
    receiver.stop()
    with pytest.raises(grpc.RpcError):
        export(receiver, span("late", 2))
    assert [s.name for s in receiver.spans()] == ["kept"]


def test_two_receivers_do_not_mix(receiver):
    with OtlpReceiver() as other:
        assert other.endpoint != receiver.endpoint
        export(other, span("elsewhere", 1))
        assert receiver.spans() == []


def test_a_batch_beyond_the_usual_limit_arrives(receiver):
    text = "x" * 1_000_000
    export(receiver, *(span("large", n, attributes=[attribute("t", string_value=text)]) for n in range(1, 7)))
    assert len(receiver.spans(name="large")) == 6
