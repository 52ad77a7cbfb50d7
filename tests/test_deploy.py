"""What deploy/ and docs/ promise, against the tools that will read it and the binary that will run.

Units are read by systemd, manifests are rendered by kustomize and held against the schemas of Kubernetes
(KEDA's and the Prometheus operator's: tests/schemas), configurations are read by the real binary. A tool
that is missing is a failure. What needs a real systemd or a real cluster is not tried here.
"""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tomllib

import deploy_files as files
from cluster import Cluster
from deploy_files import KUBERNETES, PAGES, ROOT, SERVICES, SYSTEMD, named, one, render, settings
from lake import Lake
from services import free_port

# Oldest and newest version whose schemas the objects must fit.
VERSIONS = ["1.29", "1.37"]
# systemd's scale is 0 to 100; it calls up to 20 "OK".
EXPOSURE_MAX = 15
RUNNING = [unit for unit in SERVICES if "once" not in unit.name]
CLUSTER_UNITS = [SYSTEMD / "alluvium-coordinator.service", SYSTEMD / "alluvium-worker@.service"]


def stop_patience() -> int:
    text = (ROOT / "src/cluster/worker.rs").read_text()
    return int(re.search(r"STOP_PATIENCE: Duration = Duration::from_secs\((\d+)\)", text)[1])


def answer(port: int, path: str) -> str | None:
    """What a process on this machine says, or None."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as found:
            return found.read().decode()
    except OSError:
        return None


# --- units ---


def test_units_are_units(tmp_path: Path):
    said = files.run(files.tool("systemd-analyze"), "verify", "--man=no", *files.installed(tmp_path))
    # It reads units of this machine, too.
    ours = [line for line in (said.out + said.err).splitlines() if "alluvium" in line]
    assert ours == [] and said.code == 0, said.err


def test_a_wrong_line_in_a_unit_would_be_noticed(tmp_path: Path):
    paths = files.installed(tmp_path)
    path = Path(next(path for path in paths if path.endswith("alluvium.service")))
    path.write_text(path.read_text().replace("PrivateTmp=yes", "PrivateTemp=yes"))
    said = files.run(files.tool("systemd-analyze"), "verify", "--man=no", str(path))
    assert "PrivateTemp" in said.err


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_units_are_hardened(unit: Path, tmp_path: Path):
    path = tmp_path / unit.name.replace("@.", "@1.")
    path.write_text(unit.read_text())
    said = files.run(
        files.tool("systemd-analyze"), "security", "--offline=true", "--no-pager",
        f"--threshold={EXPOSURE_MAX}", str(path),
    )
    assert said.code == 0, said.out + said.err


@pytest.mark.parametrize("unit", RUNNING, ids=lambda unit: unit.stem)
def test_what_trying_again_cannot_help_is_not_tried_again(unit: Path):
    assert one(unit, "Service.Restart") == "on-failure"
    assert one(unit, "Service.RestartPreventExitStatus") == "2"
    assert one(unit, "Unit.StartLimitIntervalSec") == "0"


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_stopping_is_waited_for(unit: Path):
    assert one(unit, "Service.KillSignal") == "SIGTERM"
    stopping = files.seconds(one(unit, "Service.TimeoutStopSec"))
    if "worker" in unit.name:
        grace = tomllib.loads((SYSTEMD / "cluster.toml").read_text())["worker"]["grace"]
        assert stopping > files.seconds(grace) + stop_patience()
    if one(unit, "Service.ExecStart").split()[1] == "run":
        # `run` says by 130 that it was told to stop.
        assert one(unit, "Service.SuccessExitStatus") == "130"


def test_units_start_what_there_is():
    for unit in SERVICES:
        program, *words = one(unit, "Service.ExecStart").split()
        assert program == "/usr/local/bin/alluvium"
        assert files.run(files.binary(), *words, "--help").code == 0, unit
        assert "ALLUVIUM_CONFIG=/etc/alluvium/alluvium.toml" in settings(unit)["Service.Environment"]


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_wrong_configuration_ends_with_the_code_that_is_not_tried_again(unit: Path, lake: Lake):
    lake.configure("[nonsense]\n")
    _, *words = one(unit, "Service.ExecStart").split()
    assert lake.alluvium(*words).code == 2


def test_run_says_that_it_was_told_to_stop_as_its_unit_expects(lake: Lake):
    port = free_port()
    lake.deliver(1, [("a", 1, "U")])
    process = lake.start("run", env={"ALLUVIUM_WORKER__LISTEN": f"127.0.0.1:{port}"})
    try:
        deadline = time.monotonic() + 30
        while not (answer(port, "/livez") and lake.states().get(1) == "processed"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == int(one(SYSTEMD / "alluvium.service", "Service.SuccessExitStatus"))
    finally:
        process.kill()
        process.communicate()


def test_the_user_of_the_units_is_made(tmp_path: Path):
    (tmp_path / "etc").mkdir()
    made = files.run(files.tool("systemd-sysusers"), f"--root={tmp_path}", str(SYSTEMD / "sysusers.conf"))
    assert made.code == 0, made.err
    names = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    for unit in SERVICES:
        user = settings(unit).get("Service.User")
        assert set(user) <= names if user else one(unit, "Service.DynamicUser") == "yes", unit
        # What the fixed user writes lies where the unit lets it write.
        assert not user or one(unit, "Service.StateDirectory") == "alluvium"
    local = tomllib.loads((SYSTEMD / "embedded.toml").read_text())
    for place in [local["state"]["uri"], *(local["pipeline"]["researchers"][at] for at in ("raw", "main"))]:
        assert place.startswith("/var/lib/alluvium/"), place


def test_the_timer_has_a_time():
    (when,) = settings(SYSTEMD / "alluvium-once.timer")["Timer.OnCalendar"]
    assert files.run(files.tool("systemd-analyze"), "calendar", when).code == 0


def test_a_unit_is_given_each_secret_that_its_configuration_reads():
    text = (SYSTEMD / "cluster.toml").read_text()
    wanted = sorted(re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/(\w+)", text))
    for unit in CLUSTER_UNITS:
        given = [value.split(":")[0] for value in settings(unit)["Service.LoadCredential"]]
        assert sorted(given) == wanted, unit


# --- configurations ---


@pytest.mark.parametrize("path", files.CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT / "deploy")))
def test_configurations_are_accepted(path: Path, tmp_path: Path):
    said = files.validate(path.read_text(), tmp_path)
    assert said.code == 0, said.err
    wrong = files.validate(path.read_text() + "\nnonsense = 1\n", tmp_path)
    assert wrong.code == 2 and "nonsense" in wrong.err


@pytest.mark.parametrize("path", files.CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT / "deploy")))
def test_no_configuration_holds_a_secret(path: Path):
    for line in path.read_text().splitlines():
        found = re.match(r"\s*(amqp|redis|token|key|url|aws_access_key_id|aws_secret_access_key)\s*= *\"", line)
        assert not found or "${" in line, line


# --- Kubernetes ---


@pytest.fixture(scope="module")
def base() -> list[dict[str, Any]]:
    return render(KUBERNETES / "base")


@pytest.fixture(scope="module")
def scaled() -> list[dict[str, Any]]:
    return render(KUBERNETES / "overlays/keda")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> list[dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("component")
    return files.render_with_component(scratch, "overlays/keda", "components/prometheus")


def check_schema(found: dict[str, Any]) -> None:
    own = ROOT / f"tests/schemas/{found['kind']}.json"
    if own.exists():
        jsonschema.Draft7Validator(json.loads(own.read_text())).validate(found)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)


def test_every_object_fits_its_schema(watched):
    kinds = {found["kind"] for found in watched}
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"}
    assert kinds >= {"ScaledObject", "TriggerAuthentication", "PodMonitor"}
    for found in watched:
        check_schema(found)


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "PodMonitor", "TriggerAuthentication"])
def test_a_wrong_field_would_be_noticed(watched, kind: str):
    wrong = copy.deepcopy(next(found for found in watched if found["kind"] == kind))
    wrong["spec"]["nonsense"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_schema(wrong)


def test_every_file_is_used():
    for listing in KUBERNETES.rglob("kustomization.yaml"):
        text = listing.read_text()
        for path in listing.parent.iterdir():
            assert path.name == listing.name or re.search(rf"- {re.escape(path.name)}$", text, re.M), path


def pods(objects) -> dict[str, dict[str, Any]]:
    found = named(objects, "Deployment")
    return {name: deployment["spec"]["template"]["spec"] for name, deployment in found.items()}


def configuration(objects) -> dict[str, Any]:
    (found,) = named(objects, "ConfigMap").values()
    return tomllib.loads(found["data"]["alluvium.toml"])


def test_pods_may_do_nothing_but_their_work(base):
    assert set(pods(base)) == {"alluvium-coordinator", "alluvium-worker"}
    for name, pod in pods(base).items():
        inside = pod["securityContext"]
        assert inside["runAsNonRoot"] and inside["runAsUser"] > 0, name
        assert inside["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert all(set(volume) <= {"name", "configMap", "secret", "emptyDir"} for volume in pod["volumes"])
        for container in pod["containers"]:
            limits = container["securityContext"]
            assert limits["readOnlyRootFilesystem"] and not limits["allowPrivilegeEscalation"]
            assert limits["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"], name


def test_nothing_but_the_secret_holds_a_secret(scaled):
    assert named(scaled, "Secret") == {}
    for pod in pods(scaled).values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["credentials"]["secret"]["secretName"] == "alluvium"
        (container,) = pod["containers"]
        folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "credentials")
        env = {item["name"]: item["value"] for item in container["env"]}
        assert env["CREDENTIALS_DIRECTORY"] == folder
    readme = (KUBERNETES / "README.md").read_text()
    for name in re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/(\w+)", (KUBERNETES / "base/alluvium.toml").read_text()):
        assert re.search(rf"^#.* {name}\b", readme, re.M), f"the README does not say how to make {name}"


def test_probes_ask_where_the_processes_listen(base):
    settings_of = configuration(base)
    listen = {
        "alluvium-coordinator": settings_of["cluster"]["listen"],
        "alluvium-worker": settings_of["worker"]["listen"],
    }
    for name, pod in pods(base).items():
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe, path in [("startup", "/livez"), ("liveness", "/livez"), ("readiness", "/readyz")]:
            asked = container[f"{probe}Probe"]["httpGet"]
            assert asked["path"] == path
            assert listen[name] == f"0.0.0.0:{ports[asked['port']]}"


def test_a_worker_has_time_to_drain(base):
    worker = pods(base)["alluvium-worker"]
    grace = files.seconds(configuration(base)["worker"]["grace"])
    assert worker["terminationGracePeriodSeconds"] > grace + stop_patience()
    assert all("lifecycle" not in container for container in worker["containers"])


def test_selectors_find_their_pods(watched):
    labels = {
        name: found["spec"]["template"]["metadata"]["labels"]
        for name, found in named(watched, "Deployment").items()
    }

    def chosen(selector: dict[str, str]) -> set[str]:
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    for name, found in named(watched, "PodDisruptionBudget").items():
        assert chosen(found["spec"]["selector"]["matchLabels"]) == {name}
    (service,) = named(watched, "Service").values()
    assert chosen(service["spec"]["selector"]) == {"alluvium-coordinator"}
    port = service["spec"]["ports"][0]["port"]
    assert configuration(watched)["cluster"]["api"] == f"http://{service['metadata']['name']}:{port}"
    (policy,) = named(watched, "NetworkPolicy").values()
    (monitor,) = named(watched, "PodMonitor").values()
    for found in (policy["spec"]["podSelector"], monitor["spec"]["selector"]):
        assert chosen(found["matchLabels"]) == set(labels)
    ports = {port["name"] for pod in pods(watched).values() for port in pod["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == ports


def test_one_coordinator_may_be_lost(base):
    deployments = named(base, "Deployment")
    assert deployments["alluvium-coordinator"]["spec"]["replicas"] == 2
    budget = named(base, "PodDisruptionBudget")["alluvium-coordinator"]
    assert budget["spec"]["maxUnavailable"] == 1


# --- KEDA ---


def scaling(objects) -> dict[str, Any]:
    (found,) = named(objects, "ScaledObject").values()
    return found["spec"]


def test_keda_alone_sets_the_number_of_workers(base, scaled):
    target = scaling(scaled)["scaleTargetRef"]["name"]
    assert "replicas" in named(base, "Deployment")[target]["spec"]
    assert "replicas" not in named(scaled, "Deployment")[target]["spec"]
    assert scaling(scaled)["minReplicaCount"] == 1 and scaling(scaled)["cooldownPeriod"] == 300


def test_keda_counts_what_workers_have_in_hand(scaled):
    (trigger,) = scaling(scaled)["triggers"]
    metadata = trigger["metadata"]
    assert metadata["protocol"] == "http" and metadata["excludeUnacknowledged"] == "false"
    assert metadata["mode"] == "QueueLength" and metadata["operation"] == "sum"
    # One more worker for as many tasks as a worker has slots.
    assert metadata["value"] == str(configuration(scaled)["worker"]["slots"])
    authentication = named(scaled, "TriggerAuthentication")[trigger["authenticationRef"]["name"]]
    assert [ref["parameter"] for ref in authentication["spec"]["secretTargetRef"]] == ["host"]


def test_keda_counts_the_queues_that_there_are(scaled, make):
    pattern = scaling(scaled)["triggers"][0]["metadata"]["queueName"]
    name = configuration(scaled)["cluster"]["name"]
    assert name in pattern
    cluster: Cluster = make()
    cluster.coordinator()
    cluster.wait(lambda: cluster.api("/readyz"))
    lanes = [item["queue"] for item in cluster.wait(lambda: cluster.api("/api/v1/queues"))["items"]]
    counted = []
    for queue in [f"task.{lane}" for lane in lanes] + lanes + ["delay"]:
        depth = cluster.services.rabbitmq.queue_depth(f"{cluster.name}.v1.{queue}")
        if depth is not None and re.search(pattern, f"{name}.v1.{queue}"):
            counted.append(queue)
        elif depth is None:
            assert not re.search(pattern, f"{name}.v1.{queue}"), queue
    assert counted == ["task.ingest", "task.merge", "task.maintenance", "task.shard"]


def test_processes_answer_what_probes_and_prometheus_ask(make):
    cluster: Cluster = make()
    port = free_port()
    cluster.coordinator()
    cluster.worker(env={"ALLUVIUM_WORKER__LISTEN": f"127.0.0.1:{port}"})
    for at in (cluster.port, port):
        for path in ["/livez", "/readyz", "/metrics"]:
            assert cluster.wait(lambda: answer(at, path), 30), path
        assert "alluvium_build_info" in answer(at, "/metrics")
    # SIGTERM: the end that Kubernetes and systemd take for a good one.
    assert [process.terminate(30) for process in reversed(cluster.processes)] == [0, 0]


def test_one_that_stands_by_is_ready(make):
    cluster: Cluster = make()
    other = free_port()
    cluster.coordinator()
    cluster.wait(lambda: cluster.api("/readyz") == "leads\n", 30)
    cluster.coordinator(env={"ALLUVIUM_CLUSTER__LISTEN": f"127.0.0.1:{other}"})
    cluster.wait(lambda: answer(other, "/readyz") == "stands by\n", 30)
    assert answer(other, "/livez") == "ok\n"


# --- pages ---


def wrong_commands(text: str) -> list[str]:
    """Commands of a page that the binary does not know: the verb, or one of its flags."""
    wrong = []
    for words in files.commands(text):
        said = files.help_for(words)
        flags = [word.split("=")[0] for word in words if word.startswith("-")]
        if said is None or any(not re.search(rf"(^|[ ,]){flag}\b", said, re.M) for flag in flags):
            wrong.append(" ".join(words))
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_can_be_typed(page: Path):
    assert wrong_commands(page.read_text()) == []


def test_a_command_that_is_not_there_would_be_noticed():
    page = "`alluvium rollbak p` and `sudo alluvium run --often`, `alluvium tables past p`; `alluvium query p \"SELECT 1\"`"
    assert wrong_commands(page) == ["rollbak p", "run --often", "tables past p"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_on_a_page_are_accepted(page: Path, tmp_path: Path):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.S):
        said = files.validate(block, tmp_path)
        assert said.code == 0, f"{block}\n{said.err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_of_a_page_are_there(page: Path):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"(?:^|[ `])((?:deploy|scripts|tests)/[\w./@-]+\w)", text):
        assert (ROOT / path).exists(), path


def wrong_names(text: str) -> list[str]:
    """Error codes and settings of a page that the binary does not know."""
    codes = {code for code in re.findall(r"AL-\d{4}", text) if files.run(files.binary(), "explain", code).code}
    return sorted(codes | {name for name in files.named_settings(text) if name not in files.known_settings()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_codes_and_settings_of_a_page_are_there(page: Path):
    assert wrong_names(page.read_text()) == []


def test_a_code_or_a_setting_that_is_not_there_would_be_noticed():
    page = "AL-0301, AL-9999, `worker.slot`, `worker.slots`, `alert.lag = \"2h\"`, `ordr = \"arrival\"`, `ready = { quiet = \"60s\" }`"
    assert wrong_names(page) == ["AL-9999", "ordr", "worker.slot"]
