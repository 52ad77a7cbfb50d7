"""How alerts travel: redirects, refusals, pauses, order, TLS and logins of mail, and each receiver's limits."""

from __future__ import annotations

import json
import resource
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lake import Lake
from mail_server import MailServer, certificates
from receivers import HttpReceiver, Served

SLACK_BLOCKS, SLACK_SECTION, TEAMS_BYTES = 50, 3000, 28_000
MAIL = 'from = "Alluvium <alluvium@example.com>"\nto = ["x@example.com"]'


def alert(kind: str, url: str, more: str = "", name: str = "team") -> str:
    return f'[alert.{name}]\ntype = "{kind}"\nurl = "{url}"\n{more}\n'


def broken_lake(root: Path, head: str, names: tuple[str, ...] = ("p",), epochs: int = 1) -> Lake:
    """A lake whose pipelines all have blocked epochs."""
    root.mkdir(exist_ok=True)
    lake = Lake(root)
    for name in names:
        lake.pipeline(name)
        for epoch in range(1, epochs + 1):
            lake.deliver(epoch, [("a", 1, "U")], name=name)
            (lake.folder(epoch, name) / "part-0.parquet").write_bytes(b"PAR1 not really")
    lake.configure(head)
    return lake


class Answers(Served):
    """An HTTP server that gives each request the next of (status, headers), then 200 for ever."""

    def __init__(self, *answers: tuple[int, dict[str, str]], pause: float = 0):
        self.answers, self.pause, self.came = list(answers), pause, []

    def __enter__(self) -> "Answers":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.came.append((time.monotonic(), self.path, json.loads(body or b"null")))
                time.sleep(outer.pause)
                status, headers = outer.answers.pop(0) if outer.answers else (200, {})
                self.send_response(status)
                for name, value in {"content-length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                pass

        return self.serve(ThreadingHTTPServer(("127.0.0.1", 0), Handler))

    @property
    def url(self) -> str:
        return f"http://{self.host}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_a_refusal(tmp_path: Path, status: int):
    with Answers((status, {"location": "/elsewhere"})) as server:
        lake = broken_lake(tmp_path, alert("slack", f"{server.url}/in"))
        refused = lake.alluvium("alerts", "test", "team")
        assert refused.code == 4 and "AL-0601" in refused.err and str(status) in refused.err
        assert [path for _, path, _ in server.came] == ["/in"]


def test_a_busy_receiver_is_asked_again_when_it_says_without_work_meanwhile(tmp_path: Path):
    with Answers((429, {"retry-after": "3"})) as server:
        lake = broken_lake(tmp_path, alert("webhook", server.url), names=("p", "q"))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        lake.run(code=1)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (first, _, one), (second, _, again), (_, _, other) = server.came[:3]
        assert second - first >= 2.5, "sooner than Retry-After"
        assert one["id"] == again["id"] != other["id"], "in order"
        assert len(server.came) == 3, "each is taken once"
        # Each wake-up of a thread that waited is one; a process that waits for a time has a few.
        wakes = after.ru_nvcsw - before.ru_nvcsw
        assert wakes < 3000, f"{wakes} wake-ups to wait for 3 s"


def test_a_slow_receiver_gets_it_once(tmp_path: Path):
    """Receivers other than webhooks cannot tell a second copy from a second alert."""
    with Answers(pause=1.5) as server:
        broken_lake(tmp_path, alert("slack", server.url)).run(code=1)
        assert len(server.came) == 1


def test_only_the_kinds_and_pipelines_that_a_sink_wants(tmp_path: Path):
    with HttpReceiver() as all_, HttpReceiver() as of_q, HttpReceiver() as others:
        head = alert("webhook", all_.url)
        head += alert("webhook", of_q.url, 'pipelines = ["q"]', "q")
        head += alert("webhook", others.url, 'kinds = ["lag", "poison"]', "others")
        broken_lake(tmp_path, head, names=("p", "q")).run(code=1)
        assert sorted(e["data"]["pipeline"] for e in all_.events()) == ["p", "q"]
        assert [e["data"]["pipeline"] for e in of_q.events()] == ["q"]
        assert others.events() == []


def test_one_sink_that_is_down_does_not_hold_up_another(tmp_path: Path):
    with HttpReceiver(answers=[500]) as down, HttpReceiver() as up:
        head = alert("webhook", down.url, name="down") + alert("webhook", up.url, name="up")
        process = broken_lake(tmp_path, head).start("run", "--once")
        deadline = time.monotonic() + 10
        while not up.requests:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.communicate()
    stored = json.loads((tmp_path / "state/alerts/incidents.json").read_text())
    assert {pending["sink"] for pending in stored["outbox"]} <= {"down", "up"}
    # The next process sends what the killed one could not; whoever had it before knows its id.
    with HttpReceiver() as down:
        lake = Lake(tmp_path).pipeline()
        lake.configure(alert("webhook", down.url, name="down"))
        lake.run(code=1)
        assert [event["id"] for event in down.events()] == [up.events()[0]["id"]]


@pytest.mark.parametrize("kind", ["slack", "teams"])
def test_messages_of_many_pipelines_fit(tmp_path: Path, kind: str):
    names = tuple(f"pipeline_{number:02}" for number in range(25))
    with HttpReceiver() as receiver:
        lake = broken_lake(tmp_path, alert(kind, receiver.url), names, epochs=11)
        lake.run(code=1)
        told = ""
        for request in receiver.requests:
            body = request.json()
            told += json.dumps(body)
            if kind == "slack":
                assert len(body["blocks"]) <= SLACK_BLOCKS
                for block in body["blocks"]:
                    assert len(block["text"]["text"]) <= SLACK_SECTION
            else:
                assert len(request.body) <= TEAMS_BYTES
        missing = [name for name in names if name not in told]
        assert not missing, f"nobody was told of {missing}"


def test_what_files_are_called_cannot_write_markup(tmp_path: Path):
    name = "<!channel> & <b>x.parquet"
    for kind in ("slack", "email"):
        root = tmp_path / kind
        with HttpReceiver() as receiver, MailServer() as mail:
            url = receiver.url if kind == "slack" else f"smtp://{mail.host}"
            lake = broken_lake(root, alert(kind, url, MAIL if kind == "email" else ""))
            (lake.folder(1) / "part-0.parquet").rename(lake.folder(1) / name)
            lake.run(code=1)
            if kind == "slack":
                text = receiver.events()[0]["blocks"][0]["text"]["text"]
                assert "&lt;!channel&gt; &amp;" in text and "<!channel>" not in text
            else:
                html = mail.mails[0].get_body(("html",)).get_content()
                assert "&lt;b&gt;x.parquet" in html and "<b>x" not in html


@pytest.mark.parametrize("how", ["starttls", "smtps"])
def test_mail_goes_over_tls_that_the_system_trusts(tmp_path: Path, how: str):
    ca = certificates(tmp_path)
    with MailServer(tmp_path / "server.pem", starttls=how == "starttls") as server:
        at = f"me:se%40cret@localhost:{server.host.split(':')[1]}"
        url = f"smtps://{at}" if how == "smtps" else f"smtp://{at}?tls=required"
        lake = broken_lake(tmp_path, alert("email", url, MAIL))
        stranger = lake.alluvium("alerts", "test", "team")
        assert stranger.code == 4 and "AL-0601" in stranger.err, "an unknown CA"
        assert server.mails == [] and server.logins == []
        done = lake.alluvium("alerts", "test", "team", env={"SSL_CERT_FILE": str(ca)})
        assert done.code == 0, done.err
        assert server.secure == [True] and server.logins == ["me:se@cret"]
        assert server.mails[0]["to"] == "x@example.com"


def test_tls_that_is_required_is_never_given_up(tmp_path: Path):
    with MailServer() as server:  # offers none
        url = f"smtp://me:secret@{server.host}?tls=required"
        lake = broken_lake(tmp_path, alert("email", url, MAIL))
        refused = lake.alluvium("alerts", "test", "team")
        assert refused.code == 4 and server.mails == [] and server.logins == []
        assert "secret" not in refused.err


def test_a_refused_mail_is_kept_and_says_why(tmp_path: Path):
    with MailServer(refusal="451 greylisted, come later") as server:
        lake = broken_lake(tmp_path, alert("email", f"smtp://{server.host}", MAIL))
        refused = lake.alluvium("alerts", "test", "team")
        assert refused.code == 4 and "greylisted" in refused.err


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ('type = "email"\nurl = "smtp://mail.example.com?tls=required"\nfrom = "nonsense"\nto = ["x@example.com"]', "from"),
        ('type = "email"\nurl = "smtp://mail.example.com?tls=required"\nfrom = "a@example.com"\nto = ["nonsense"]', "to"),
        ('type = "email"\nurl = "smtp://mail.example.com?tls=required"\nfrom = "a@example.com"\nto = []', "to"),
        ('type = "email"\nurl = "smtp://mail.example.com?tls=perhaps"\nfrom = "a@example.com"\nto = ["x@example.com"]', "url"),
        ('type = "email"\nurl = "smtp://me:secret@mail.example.com"\nfrom = "a@example.com"\nto = ["x@example.com"]', "url"),
        ('type = "webhook"\nurl = "http://10.0.0.1/x"', "url"),
        ('type = "slack"\nurl = "http://169.254.169.254/x"', "url"),
        ('type = "slack"\nurl = "https://[::ffff:169.254.169.254]/x"', "url"),
        ('type = "pagerduty"\nkey = "k"\nurl = "http://example.com/x"', "url"),
        ('type = "teams"\nurl = ""', "url"),
    ],
)  # fmt: skip
def test_what_can_never_be_delivered_is_said_before_the_night(tmp_path: Path, lines: str, path: str):
    lake = broken_lake(tmp_path, f"[alert.team]\n{lines}\n")
    done = lake.alluvium("config", "validate")
    assert done.code == 2 and f"alert.team.{path}" in done.err, done.err
    assert "secret" not in done.err
