"""Receivers on loopback: an HTTP endpoint and a mail server that keep what they are sent.

Owns: the sockets, what came, and the answers. Never: judges what came.
"""

from __future__ import annotations

import email
import json
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 60


@dataclass
class Request:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def stands_still(process: subprocess.Popen) -> None:
    """Waits until the process has stopped itself (`ALLUVIUM_STOP`)."""
    state = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: state.read_text().rsplit(") ", 1)[1].startswith("T"), "a stop")


class Served:
    """A server for as long as its `with` block."""

    server: socketserver.BaseServer

    def serve(self, server: socketserver.TCPServer) -> Any:
        self.server = server
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"


@dataclass
class HttpReceiver(Served):
    """Takes every request; answers with the next of `answers` (the last one for ever), and `files`."""

    answers: list[int] = field(default_factory=lambda: [200])
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "HttpReceiver":
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers.get("content-length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(length)
                receiver.requests.append(Request(self.command, self.path, headers, body))
                code = receiver.answers[0]
                if len(receiver.answers) > 1:
                    receiver.answers.pop(0)
                found = receiver.files.get(self.path, b"ok")
                self.send_response(code)
                self.send_header("content-length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        return self.serve(ThreadingHTTPServer(("127.0.0.1", 0), Handler))

    @property
    def url(self) -> str:
        return f"http://{self.host}/in"

    def events(self) -> list[dict]:
        return [request.json() for request in self.requests if request.method == "POST"]


@dataclass
class MailReceiver(Served):
    """A mail server without TLS that takes everything."""

    mails: list[Message] = field(default_factory=list)
    receivers: list[str] = field(default_factory=list)

    def __enter__(self) -> "MailReceiver":
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def say(self, text: str) -> None:
                self.wfile.write(f"{text}\r\n".encode())

            def handle(self):
                self.say("220 test")
                while line := self.rfile.readline().decode().strip():
                    word = line.split(" ")[0].upper()
                    if word == "DATA":
                        self.say("354 go on")
                        lines = []
                        while (text := self.rfile.readline()) != b".\r\n":
                            lines.append(text.removeprefix(b"."))
                        outer.mails.append(email.message_from_bytes(b"".join(lines)))
                        self.say("250 taken")
                    elif word == "QUIT":
                        self.say("221 bye")
                        return
                    else:
                        if word == "RCPT":
                            outer.receivers.append(line)
                        self.say("250 ok")

        return self.serve(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))

    @property
    def url(self) -> str:
        return f"smtp://{self.host}"
