"""The local cluster of docker-compose.yml, tried: three workers, a death, a drain, the right tables.

Owns: the story and what it claims. Calls: `compose_docker` for engine and images, `compose_files` for
what needs no container, the oracle. Never: touches a cluster or an `.env` of this checkout.

    ALLUVIUM_BINARY=… python tests/compose_run.py [--strict]        by scripts/compose-test
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import compose_files
import oracle
from compose_docker import ROOT, CannotTry, Engine, compose_command, images, run
from services import free_port

PIPELINE, WORKERS = "researchers", 3
FIRST_EPOCH, DAY = 1_700_000_000, 86_400
# Folders of the sample: at first, and when workers are drained. The last one has no _SUCCESS.
EPOCHS, EPOCHS_LATER, ROWS = 9, 13, 20_000
UP_SECONDS, WORK_SECONDS, GRACE_SECONDS = 400, 180, 120
# Usual are 15 s; one that takes longer says who was not healthy.
SLOW_SECONDS = 60
PORTS = [
    "ALLUVIUM_PORT", "RABBITMQ_PORT", "S3_PORT", "S3_CONSOLE_PORT", "JAEGER_PORT", "PROMETHEUS_PORT",
    "GRAFANA_PORT",
]


class Checks:
    """Counts claims, and says each as soon as it is known."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self.began = time.monotonic()

    def none(self, claim: str, against: Any) -> None:
        """Passes when nothing speaks against it."""
        self.passed += not against
        self.failed += bool(against)
        after = f"{time.monotonic() - self.began:4.0f} s"
        print(f"{after}  FAILED  {claim}: {against}" if against else f"{after}  ok  {claim}", flush=True)

    def that(self, claim: str, is_true: Any, otherwise: Any = "it is not so") -> None:
        self.none(claim, None if is_true else otherwise)


class Project:
    """The real compose file, under a name, ports and secrets of its own."""

    def __init__(self, folder: Path, chosen: dict[str, str]) -> None:
        self.env_file = folder / "env"
        run(ROOT / "scripts/compose-secrets", self.env_file)
        self.secrets = dict(
            line.split("=", 1) for line in self.env_file.read_text().splitlines() if "=" in line
        )
        self.ports = {name: free_port() for name in PORTS}
        with open(self.env_file, "a") as file:
            for name, value in {**chosen, **self.ports}.items():
                print(f"{name}={value}", file=file)
        self.name = f"alluviumtest{os.getpid()}"

    def compose(self, *arguments: str, seconds: float = UP_SECONDS, check: bool = True) -> str:
        ours = {*self.secrets, *self.ports, "COMPOSE_FILE", "COMPOSE_PROFILES"}
        env = {k: v for k, v in os.environ.items() if k not in ours and not k.endswith("_IMAGE")}
        head = [
            *compose_command(), "--project-name", self.name, "--project-directory", ROOT,
            "--file", ROOT / "docker-compose.yml", "--env-file", self.env_file,
        ]
        return run(*head, *arguments, seconds=seconds, check=check, env=env)

    def containers(self, service: str) -> list[str]:
        listed = run("docker", "ps", "-aq", "--no-trunc", *self.labels(service))
        return listed.split()

    def labels(self, service: str | None = None) -> list[str]:
        labels = [f"label=com.docker.compose.project={self.name}"]
        labels += [f"label=com.docker.compose.service={service}"] if service else []
        return [word for label in labels for word in ("--filter", label)]

    def ask(self, port: str, path: str, **more: Any) -> Any:
        """JSON (or text) from a published port; None when nobody answers, the status of a refusal."""
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, **more), timeout=20) as answer:
                body = answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None
        return json.loads(body) if body.startswith("{") else body

    def items(self, path: str) -> list[dict[str, Any]]:
        found = self.ask("ALLUVIUM_PORT", f"/api/v1/{path}")
        return found["items"] if isinstance(found, dict) else []


def state_of(container: str) -> dict[str, Any]:
    return json.loads(run("docker", "inspect", "--format", "{{json .State}}", container))


def is_healthy(container: str) -> bool:
    return state_of(container).get("Health", {}).get("Status") == "healthy"


def wait(
    what: str, true: Callable[[], Any], seconds: float = WORK_SECONDS, pause: float = 0.2
) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain: {what}")
        time.sleep(pause)
    return found


# --- the story --------------------------------------------------------------------------------


def complete(epochs: int) -> list[int]:
    """The complete folders of a sample of so many."""
    return [FIRST_EPOCH + DAY * index for index in range(epochs - 1)]


def story(project: Project, checks: Checks) -> None:
    began = time.monotonic()
    project.compose("up", "-d", "--scale", f"worker={WORKERS}")
    if time.monotonic() - began > SLOW_SECONDS:
        for service in ("rabbitmq", "redis", "s3"):
            print(service, *map(state_of, project.containers(service)), flush=True)
    workers = project.containers("worker")
    checks.that(f"`--scale worker={WORKERS}` makes so many", len(workers) == WORKERS, workers)
    stay = ["rabbitmq", "redis", "s3", "jaeger", "coordinator", "worker"]
    for service in stay:
        for container in project.containers(service):
            wait(f"{service} is healthy", lambda c=container: is_healthy(c))
    checks.that("everything is healthy, by the healthchecks of the file", True)
    checks.none("containers of Alluvium are held tight", loose(workers[0]))
    try_doors(project, checks)

    with ThreadPoolExecutor() as beside:
        # Looked at from the first folder on: sample data is soon processed.
        woken = beside.submit(deliver, project, EPOCHS)
        victim = wait("a worker has a task in hand", lambda: busy(workers), pause=0.01)
        run("docker", "kill", "--signal", "KILL", victim)
    said = woken.result()
    checks.that("a notification with its token wakes the pipeline", said == {"woken": [PIPELINE]}, said)
    checks.that("a worker with a task in hand is killed", state_of(victim)["ExitCode"] == 137)
    workers.remove(victim)
    wait("the others process what is complete", lambda: processed(project) == set(complete(EPOCHS)))
    states = {item["epoch"]: item["state"] for item in project.items(f"epochs?pipeline={PIPELINE}")}
    last = states.get(FIRST_EPOCH + DAY * (EPOCHS - 1))
    checks.that("the others process what is complete, and wait for the rest", last == "incomplete", states)
    status = project.compose("exec", "-T", "coordinator", "alluvium", "status")
    checks.that("the verbs work inside a container", PIPELINE in status, status)
    for verb in ("pause", "resume"):
        run("docker", "exec", workers[0], "alluvium", verb, PIPELINE)
    checks.that("verbs reach the coordinator from a worker's container, with the token", True)

    said = project.compose("exec", "-T", "coordinator", "alluvium", "doctor", check=False)
    checks.that("the doctor finds nothing bad", " ok " in said and "BAD" not in said, said)

    try_traces(project, checks)
    try_prometheus(project, checks, len(workers))
    drain(project, checks, workers)
    checks.that("main is what the independent oracle computes", oracle_agrees(project))


def deliver(project: Project, epochs: int) -> Any:
    """Sample folders, and a notification; folders that were there change nothing: their content is the same."""
    size = ["--rows", str(ROWS), "--epochs", str(epochs)]
    project.compose("run", "--rm", "sample", "demo", "--data-only", "--out", "s3://alluvium", *size)
    return notify(project, project.secrets["ALLUVIUM_NOTIFY_TOKEN"])


def loose(container: str) -> list[str]:
    """What a container of Alluvium may and should not."""
    host = json.loads(run("docker", "inspect", "--format", "{{json .HostConfig}}", container))
    rules = {
        "root is not read-only": host["ReadonlyRootfs"],
        "capabilities are not dropped": "ALL" in (host["CapDrop"] or []),
        "new privileges are possible": "no-new-privileges:true" in (host["SecurityOpt"] or []),
        "/tmp is no tmpfs": "/tmp" in (host["Tmpfs"] or {}),
        "no init": host["Init"],
        "not uid 10001": run("docker", "exec", container, "id", "-u").strip() == "10001",
        "a port is published": not host["PortBindings"],
        "no spilling to /tmp": run("docker", "exec", container, "touch", "/tmp/x") == "",
        "writes beside /tmp": "Read-only" in run("docker", "exec", container, "touch", "/x", check=False),
    }
    return [rule for rule, is_kept in rules.items() if not is_kept]


def try_doors(project: Project, checks: Checks) -> None:
    """What changes something wants its token; stores want their passwords."""
    refused = notify(project, "wrong")
    checks.that("a notification without the token is refused", refused == 401, refused)
    body = json.dumps({"pipeline": PIPELINE, "verb": "pause", "by": "a test"}).encode()
    kind = {"Content-Type": "application/json"}
    refused = project.ask("ALLUVIUM_PORT", "/api/v1/requests", data=body, headers=kind)
    checks.that("a change without the token is refused", refused == 401, refused)
    said = project.compose(
        "exec", "-T", "-e", "REDISCLI_AUTH=", "redis", "redis-cli", "ping", check=False
    )
    checks.that("Redis wants its password", "NOAUTH" in said, said)
    users = project.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_users")
    checks.that("RabbitMQ has no guest", "alluvium" in users and "guest" not in users, users)


def notify(project: Project, token: str) -> Any:
    key = f"incoming-data/{FIRST_EPOCH}/_SUCCESS"
    event = {"Records": [{"s3": {"bucket": {"name": "alluvium"}, "object": {"key": key}}}]}
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    body = json.dumps(event).encode()
    return project.ask("ALLUVIUM_PORT", "/api/v1/notify", data=body, headers=headers)


def busy(workers: list[str]) -> str | None:
    """A container whose worker has a task in hand, by its metrics: heartbeats come too seldom."""
    for worker in workers:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address_of(worker)}:8461/metrics", timeout=5) as answer:
            if re.search(r"^alluvium_steps_in_flight\{.*\} [1-9]", answer.read().decode(), re.M):
                return worker
    return None


@cache
def address_of(container: str) -> str:
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return run("docker", "inspect", "--format", form, container).strip()


def processed(project: Project) -> set[int]:
    items = project.items(f"epochs?pipeline={PIPELINE}")
    return {item["epoch"] for item in items if item["state"] == "processed"}


def try_traces(project: Project, checks: Checks) -> None:
    """As deploy/compose/README.md says: by the tags alluvium.pipeline and alluvium.epoch."""

    def names(trace: dict[str, Any]) -> set[str]:
        return {span["operationName"] for span in trace["spans"]}

    def traces_of(epoch: int) -> list[dict[str, Any]]:
        tags = json.dumps({"alluvium.pipeline": PIPELINE, "alluvium.epoch": str(epoch)})
        asked = urlencode({"service": "alluvium-coordinator", "tags": tags, "limit": 20})
        found = project.ask("JAEGER_PORT", f"/api/traces?{asked}")
        return found["data"] if isinstance(found, dict) else []

    def ended() -> list[dict[str, Any]]:
        """A trace for each epoch, once each has its root; else nothing."""
        found = [traces_of(epoch) for epoch in complete(EPOCHS)]
        is_whole = all(traces and f"run {PIPELINE}" in names(traces[0]) for traces in found)
        return [trace for traces in found for trace in traces] if is_whole else []

    found = wait("the traces of the runs", ended, 60)
    count = len(complete(EPOCHS))
    checks.that("pipeline and epoch lead to one trace", len(found) == count, list(map(names, found)))

    # The killed worker took spans with it that it had not sent: not every trace has all.
    wanted = {
        "epoch discovered", "publish ingest", "queue wait", "process ingest", "lease wait",
        "delta.commit", "result", f"run {PIPELINE}",
    }
    whole = wait("a trace with all spans", lambda: [t for t in ended() if wanted <= names(t)], 60)
    checks.that("traces have the spans of their steps", whole)
    services = {process["serviceName"] for process in whole[0]["processes"].values()}
    both = {"alluvium-coordinator", "alluvium-worker"}
    checks.that("coordinator and worker are both in them", services == both, services)


def try_prometheus(project: Project, checks: Checks, workers: int) -> None:
    project.compose("--profile", "observability", "up", "-d", "--no-deps", "prometheus")
    [prometheus] = project.containers("prometheus")
    wait("prometheus is healthy", lambda: is_healthy(prometheus), 60)
    said = run("docker", "exec", prometheus, "promtool", "check", "config",
               "/etc/prometheus/prometheus.yml", check=False)
    checks.that("promtool finds configuration and rules right", "SUCCESS" in said and "FAILED" not in said, said)
    said = run("docker", "exec", prometheus, "promtool", "test", "rules", "/opt/alert_rules.yml", check=False)
    checks.that("every rule fires when it must, and only then", "SUCCESS" in said and "FAILED" not in said, said)

    def up() -> dict[str, list[str]]:
        found = project.ask("PROMETHEUS_PORT", "/api/v1/targets?state=active")
        jobs: dict[str, list[str]] = {}
        for target in found["data"]["activeTargets"] if found else []:
            jobs.setdefault(target["labels"]["job"], []).append(target["health"])
        return jobs

    wanted = {"coordinator": ["up"], "worker": ["up"] * workers, "rabbitmq": ["up"]}
    try:
        wait("all targets are up", lambda: up() == wanted, 60)
    except AssertionError:
        pass
    found = up()
    checks.that("Prometheus finds coordinator, broker and every living worker", found == wanted, found)

    def value(query: str) -> float | None:
        found = project.ask("PROMETHEUS_PORT", f"/api/v1/query?{urlencode({'query': query})}")
        result = found["data"]["result"] if isinstance(found, dict) else []
        return float(result[0]["value"][1]) if result else None

    epochs = f'alluvium_epochs{{pipeline="{PIPELINE}",state="processed"}}'
    wait("metrics tell what was processed", lambda: value(epochs) == len(complete(EPOCHS)), 60)
    checks.that("metrics tell what was processed", True)
    merges = value('sum(alluvium_steps_total{step="merge",status="done"})')
    checks.that("metrics of the workers arrive", merges and merges >= 1, merges)
    alerts = project.ask("PROMETHEUS_PORT", "/api/v1/alerts")["data"]["alerts"]
    firing = [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]
    checks.none("no alert is raised in a cluster that works", firing)


def drain(project: Project, checks: Checks, workers: list[str]) -> None:
    """New folders, and a stop while they are worked on; others finish the work."""
    with ThreadPoolExecutor() as beside:
        beside.submit(deliver, project, EPOCHS_LATER)
        wait("a worker has a task in hand", lambda: busy(workers), pause=0.01)
        began = time.monotonic()
        project.compose("stop", "worker", seconds=GRACE_SECONDS + 30)
        took = time.monotonic() - began
    codes = {worker[:12]: state_of(worker)["ExitCode"] for worker in workers}
    checks.that("`stop` drains workers that have tasks in hand: exit 0", set(codes.values()) == {0}, codes)
    checks.that(f"within their grace period ({took:.0f} s)", took < GRACE_SECONDS)
    said = run("docker", "logs", workers[0])
    checks.that("a drained worker says so", "drained" in said, said[-500:])
    project.compose("up", "-d", "--no-deps", "--no-recreate", "--scale", "worker=2", "worker")
    wait("new workers go on", lambda: processed(project) == set(complete(EPOCHS_LATER)))
    checks.that("workers that start later go on", True)
    project.compose("stop", "worker", "coordinator", seconds=GRACE_SECONDS + 30)
    ended = project.containers("coordinator") + project.containers("worker")
    codes = {container[:12]: state_of(container)["ExitCode"] for container in ended}
    checks.that("all of Alluvium ends with 0", set(codes.values()) == {0}, codes)


def oracle_agrees(project: Project) -> bool:
    os.environ.update({
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{project.ports['S3_PORT']}", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": project.secrets["S3_ACCESS_KEY"], "AWS_REGION": "us-east-1",
        "AWS_SECRET_ACCESS_KEY": project.secrets["S3_SECRET_KEY"], "AWS_DEFAULT_REGION": "us-east-1",
    })
    return oracle.main([
        "check", "--source", "s3://alluvium/incoming-data", "--raw", "s3://alluvium/lake/raw",
        "--main", "s3://alluvium/lake/main", "--pipeline", PIPELINE, "--key", "pguid",
        "--delete-when-op", "--expect-epochs", ",".join(map(str, complete(EPOCHS_LATER))),
    ]) == 0


# --- around the story -------------------------------------------------------------------------


def try_cluster(checks: Checks, folder: Path) -> None:
    with Engine():
        print("making images", flush=True)
        project = Project(folder, images(Path(os.environ["ALLUVIUM_BINARY"])))
        project.compose("config", "-q")
        checks.that("docker-compose reads the file", True)
        try:
            story(project, checks)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            print(project.compose("logs", "--tail=40", check=False)[-12_000:], flush=True)
            traceback.print_exc()
            checks.none("the story comes to its end", str(error)[:500] or repr(error))
        finally:
            project.compose(
                "--profile", "observability", "--profile", "sample", "down", "-v", "-t", "5",
                check=False,
            )
            left = [
                run("docker", *what, *project.labels()).strip()
                for what in (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"])
            ]
            checks.none("`down -v` leaves no container, volume or network", "".join(left))


def try_secrets(checks: Checks, folder: Path) -> None:
    made = folder / "secrets"
    run(ROOT / "scripts/compose-secrets", made)
    checks.that("secrets are for their owner only", made.stat().st_mode & 0o777 == 0o600)
    before = made.read_bytes()
    said = run(ROOT / "scripts/compose-secrets", made, check=False)
    is_kept = made.read_bytes() == before and "stays as it is" in said
    checks.that("secrets that are there are not overwritten", is_kept, said)
    (folder / "none").touch()
    try:
        command = [*compose_command(), "--project-directory", ROOT, "--file", ROOT / "docker-compose.yml"]
        said = run(*command, "--env-file", folder / "none", "config", check=False)
    except OSError as error:
        print(f"docker-compose is not here: {error}")
        return
    checks.that("without secrets nothing starts", "run scripts/compose-secrets" in said, said)


def main() -> int:
    checks = Checks()
    compose_files.check_all(checks.none)
    with tempfile.TemporaryDirectory(prefix="alluvium-compose-") as folder:
        try_secrets(checks, Path(folder))
        try:
            try_cluster(checks, Path(folder))
        except CannotTry as why:
            print(f"NOT TRIED: containers cannot be run here: {why}", flush=True)
            if "--strict" in sys.argv:
                checks.none("containers can be run (--strict)", why)
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 0 if checks.failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
