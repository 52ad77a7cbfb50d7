"""A proxy in front of an S3 server that delays, refuses, fails, loses answers and counts.

Owns: passing HTTP/1.1 through unchanged (the Host header too: it is signed) as its own process, and
the faults. Never: knows S3 beyond what a request is for. A fault is chosen by the request alone.

In a test, `S3Proxy(upstream).start()`; as a command, `python tests/s3_proxy.py http://HOST:PORT`
prints its address and ends with its standard input. Control: JSON at /__proxy__/NAME.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CONTROL = "/__proxy__/"
PIECE_BYTES = 64 * 1024
CODES = {
    403: "AccessDenied", 404: "NoSuchKey", 409: "ConditionalRequestConflict",
    412: "PreconditionFailed", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown",
}


class S3Proxy:
    """The proxy process, and its remote control. It dies with us."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self._process: subprocess.Popen | None = None

    def start(self) -> "S3Proxy":
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.upstream], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.url = self._process.stdout.readline().strip()
        assert self.url, "the proxy did not start"
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def set(self, **values: Any) -> None:
        """latency_ms=N for each request; bytes_per_second=N for bodies, each way; refuse=True: 503 to
        each; reset=True: no answer to any."""
        self._ask("set", values)

    def drop_reply(self, method: str = "PUT", contains: str = "", count: int = 1) -> None:
        """The server does what the next matching requests ask for; the client never learns it."""
        self.fail_once(None, method, contains, count, forward=True)

    def fail_once(
        self, status: int | None, method: str = "PUT", contains: str = "", count: int = 1,
        forward: bool = False,
    ) -> None:
        """The next matching requests get `status` (None: a reset connection); with `forward` the
        server does them all the same."""
        self._ask("rule", asdict(Rule(method, contains, count, forward, status)))

    def clear(self) -> None:
        """No faults any more."""
        self._ask("clear")

    def counters(self) -> dict[str, Any]:
        return self._ask("counters")

    def reset_counters(self) -> None:
        self._ask("reset_counters")

    def _ask(self, name: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        connection.request("POST", CONTROL + name, json.dumps(body or {}))
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status == 200, f"{name}: {answer.status} {text!r}"
        return json.loads(text)


@dataclass
class Rule:
    """A fault for the next `count` requests. Without a status there is no answer at all."""

    method: str = ""
    contains: str = ""
    count: int = 1
    forward: bool = False
    status: int | None = None


@dataclass
class State:
    latency_ms: float = 0
    bytes_per_second: float = 0
    # When the link is free again, for bodies to the server and to the client.
    free_at: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    refuse: bool = False
    reset: bool = False
    rules: list[Rule] = field(default_factory=list)
    requests: Counter = field(default_factory=Counter)
    by_kind: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0

    def control(self, name: str, body: dict[str, Any]) -> Any:
        if name == "set":
            unknown = body.keys() - {"latency_ms", "bytes_per_second", "refuse", "reset"}
            assert not unknown, f"unknown: {unknown}"
            self.__dict__.update(body)
        elif name == "rule":
            self.rules.append(Rule(**body))
        elif name == "clear":
            self.latency_ms, self.refuse, self.reset, self.rules = 0, False, False, []
            self.bytes_per_second = 0
        elif name == "reset_counters":
            self.requests, self.by_kind, self.faults = Counter(), Counter(), Counter()
            self.bytes_in = self.bytes_out = 0
        elif name != "counters":
            raise AssertionError(f"unknown: {name}")
        kinds = {kind: 0 for kind in ("list", "get", "head", "put", "delete", "multipart")}
        return {
            "requests": self.requests, "by_kind": kinds | self.by_kind, "faults": self.faults,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
        }

    async def carry(self, count: int, answer: bool) -> None:
        """Takes as long as so many bytes take on a link that all requests share."""
        if self.bytes_per_second:
            now = asyncio.get_running_loop().time()
            self.free_at[answer] = max(now, self.free_at[answer]) + count / self.bytes_per_second
            await asyncio.sleep(self.free_at[answer] - now)

    def fault(self, method: str, target: str) -> Rule | None:
        """What goes wrong with this request; a rule that strikes is used up."""
        if self.reset:
            return Rule()
        if self.refuse:
            return Rule(status=503)
        for rule in self.rules:
            if rule.count > 0 and rule.method in ("", method) and rule.contains in unquote(target):
                rule.count -= 1
                return rule
        return None


def kind_of(method: str, target: str) -> str:
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    if "uploads" in query or "uploadId" in query:
        return "multipart"
    if method == "DELETE" or "delete" in query:
        return "delete"
    # A path of one name is a bucket.
    if method == "GET" and (parts.path.strip("/").count("/") == 0 or "list-type" in query):
        return "list"
    return method.lower()


@dataclass
class Head:
    """The first line and the headers of a request or an answer."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Head":
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return cls(raw, first.split(" ", 2), headers)

    def onward(self) -> bytes:
        """As it came, but for what concerns one connection only."""
        lines = self.raw.split(b"\r\n")
        own = (b"connection:", b"expect:", b"keep-alive:")
        return b"\r\n".join(line for line in lines if not line.lower().startswith(own))

    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    def last(self) -> bool:
        """Whether its sender ends the connection after it."""
        version = self.first[0] if self.first[0].startswith("HTTP/") else self.first[-1]
        said = self.headers.get("connection", "").lower()
        return "close" in said or (version == "HTTP/1.0" and "keep-alive" not in said)


async def pass_body(
    state: State, reader: asyncio.StreamReader, writer: Any, head: Head, answer: bool
) -> int:
    """Passes a body on as it comes; the number of its bytes. Without a writer it is thrown away."""

    async def put(data: bytes) -> None:
        await state.carry(len(data), answer)
        if writer is not None:
            writer.write(data)
            await writer.drain()

    async def copy(size: int) -> int:
        left = size
        while left > 0:
            data = await reader.read(min(left, PIECE_BYTES))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            await put(data)
            left -= len(data)
        return size

    total = 0
    if head.chunked():
        size = -1
        while size != 0:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            await put(line)
            total += await copy(size)
            # The end of a chunk, or after the last one trailers and an empty line.
            while line := await reader.readline():
                await put(line)
                if size != 0 or line == b"\r\n":
                    break
    elif "content-length" in head.headers:
        total = await copy(int(head.headers["content-length"]))
    elif answer:
        while data := await reader.read(PIECE_BYTES):
            await put(data)
            total += len(data)
    return total


class Connection:
    """One client's connection, and the one to the server that goes with it."""

    def __init__(self, state: State, upstream: tuple[str, int], reader: Any, writer: Any) -> None:
        self.state, self.upstream, self.reader, self.writer = state, upstream, reader, writer
        self.server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def serve(self) -> None:
        try:
            while await self.one_request():
                pass
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # either side went away: the other one sees that, too
        finally:
            self.writer.close()
            if self.server:
                self.server[1].close()

    async def one_request(self) -> bool:
        """Whether another one may follow."""
        head = await Head.read(self.reader)
        method, target = head.first[:2]
        if target.startswith(CONTROL):
            return await self.control(head, target)
        state = self.state
        state.requests[method] += 1
        state.by_kind[kind_of(method, target)] += 1
        fault = state.fault(method, target)
        if state.latency_ms:
            await asyncio.sleep(state.latency_ms / 1000)
        if fault is not None:
            silent = "dropped" if fault.forward else "reset"
            state.faults[str(fault.status or silent)] += 1
            if fault.status is None and not fault.forward:
                return self.abort()
        strikes = fault is not None and not fault.forward
        waits = "100-continue" in head.headers.get("expect", "").lower()
        if waits and not strikes:
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not strikes:
            more = await self.forward(head, method, send=fault is None)
            if fault is None:
                return more and not head.last()
            if fault.status is None:
                return False
        elif not waits:
            size = await pass_body(state, self.reader, None, head, answer=False)
            state.bytes_in += size
        code = CODES.get(fault.status, "InternalError")
        text = f"<Error><Code>{code}</Code><Message>the test's proxy</Message></Error>"
        return await self.send(fault.status, text, method, close=waits or head.last())

    async def forward(self, head: Head, method: str, send: bool) -> bool:
        """Asks the server, and sends its answer or throws it away."""
        reader, writer = await self.connect()
        writer.write(head.onward())
        size = await pass_body(self.state, self.reader, writer, head, answer=False)
        self.state.bytes_in += size
        await writer.drain()
        answer = await Head.read(reader)
        while answer.first[1].startswith("1"):
            answer = await Head.read(reader)
        if send:
            self.writer.write(answer.onward())
        sized = answer.chunked() or "content-length" in answer.headers
        bodiless = method == "HEAD" or answer.first[1] in ("204", "304")
        if not bodiless:
            to = self.writer if send else None
            size = await pass_body(self.state, reader, to, answer, answer=True)
            self.state.bytes_out += size if send else 0
        await self.writer.drain()
        if answer.last():
            writer.close()
            self.server = None
        return sized or bodiless

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.server is None or self.server[0].at_eof():
            self.server = await asyncio.open_connection(*self.upstream, limit=PIECE_BYTES)
        return self.server

    async def send(self, status: int, text: str, method: str, close: bool) -> bool:
        reason = http.client.responses.get(status, "Fault")
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(text.encode())}\r\n"
        head += "Content-Type: application/xml\r\n" + ("Connection: close\r\n" if close else "")
        self.writer.write((head + "\r\n" + ("" if method == "HEAD" else text)).encode())
        await self.writer.drain()
        return not close

    async def control(self, head: Head, target: str) -> bool:
        size = int(head.headers.get("content-length", 0))
        body = json.loads(await self.reader.readexactly(size) or b"{}")
        try:
            status, said = 200, self.state.control(target.removeprefix(CONTROL), body)
        except (AssertionError, TypeError) as error:
            status, said = 400, str(error)
        return await self.send(status, json.dumps(said), "POST", close=True)

    def abort(self) -> bool:
        """A reset (RST), not an orderly end."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return False


async def main(upstream: str) -> None:
    parts = urlsplit(upstream)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    state = State()
    server = await asyncio.start_server(
        lambda reader, writer: Connection(state, address, reader, writer).serve(),
        "127.0.0.1", 0, limit=PIECE_BYTES, backlog=512,
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
