"""What can be said of docker-compose.yml and deploy/compose without a container.

Owns: the rules that the files keep. Never: starts anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy/compose"
ONE_SHOT = {"s3-volume", "s3-bucket", "sample"}
APP = {"coordinator", "worker", "sample"}


def check_all(check: Callable[[str, Any], None]) -> None:
    """Every rule; `check` takes a claim and what speaks against it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    check("every image is a variable with a pinned default", [
        name for name, service in services.items()
        if not re.fullmatch(r"\$\{[A-Z0-9]+_IMAGE:-[^:]+:(?!latest)[^:}]+\}", service["image"])
    ])
    check("every published port is on 127.0.0.1", [
        port for service in services.values() for port in service.get("ports", [])
        if not re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9_]+:-\d+\}:\d+", port)
    ])
    check("everything that stays has a healthcheck", [
        name for name, service in services.items()
        if name not in ONE_SHOT and "healthcheck" not in service
    ])
    check("Alluvium's containers can do no more than they must", [
        name for name in APP for service in [services[name]]
        if not (service["read_only"] and service["user"] == "10001:10001" and service["init"]
                and service["cap_drop"] == ["ALL"] and service["tmpfs"]
                and service["security_opt"] == ["no-new-privileges:true"])
    ])
    check("workers can be many", [
        key for key in ("container_name", "ports", "hostname") if key in services["worker"]
    ])
    check("no secret has a default", re.findall(
        r"\$\{[A-Z0-9_]*(?:PASSWORD|TOKEN|KEY)\b(?!:\?)[^}]*\}",
        (ROOT / "docker-compose.yml").read_text(),
    ))
    check("nothing at the top that docker-compose 1.29 does not know", [
        key for key in yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        if key not in ("services", "volumes") and not key.startswith("x-")
    ])
    dockerfile = (ROOT / "scripts/Dockerfile").read_text()
    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)
    assert version is not None
    check("the image carries the program's version", [
        line for line in dockerfile.splitlines()
        if line.startswith("ARG VERSION=") and line != f"ARG VERSION={version[1]}"
    ])
    _check_grafana(check)


def _check_grafana(check: Callable[[str, Any], None]) -> None:
    board = json.loads((DEPLOY / "grafana/boards/alluvium.json").read_text())
    sources = yaml.safe_load((DEPLOY / "grafana/datasources/alluvium.yml").read_text())
    provider = yaml.safe_load((DEPLOY / "grafana/dashboards/alluvium.yml").read_text())
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    uids = {source["uid"] for source in sources["datasources"]}
    check("Grafana's data sources have fixed ids", uids ^ {"prometheus", "jaeger"})
    place = provider["providers"][0]["options"]["path"]
    compose = (ROOT / "docker-compose.yml").read_text()
    check("Grafana finds its dashboard", [] if f"boards:{place}:ro" in compose else [place])
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    check("every panel asks a data source that is there", [
        panel["title"] for panel in panels if panel["datasource"]["uid"] not in uids
    ])
    check("panels have different ids and do not overlap", _overlapping(board["panels"]))
    asked = [target["expr"] for panel in panels for target in panel["targets"] if "expr" in target]
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    known = metric_names()
    check("dashboard and rules ask for metrics that are served", sorted(
        {name for expr in asked for name in re.findall(r"\balluvium_\w+", expr)} - known
    ))


def _overlapping(panels: list[dict[str, Any]]) -> list[str]:
    taken: dict[tuple[int, int], str] = {}
    found = []
    for panel in panels:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                other = taken.setdefault((x, y), panel["title"])
                if other != panel["title"]:
                    found.append(f"{other} and {panel['title']}")
        if at["x"] + at["w"] > 24:
            found.append(f"{panel['title']} is too wide")
    ids = [panel["id"] for panel in panels]
    return sorted(set(found)) + ([] if len(ids) == len(set(ids)) else [str(ids)])


def metric_names() -> set[str]:
    """Every series that the program serves, as its one list of metrics says."""
    source = (ROOT / "protocol/src/metrics.rs").read_text()
    names = set()
    gauges = re.search(r"const GAUGES.*?\];", source, re.S)
    assert gauges is not None
    names |= {f"alluvium_{name}" for name in re.findall(r'\(\s*"(\w+)",', gauges[0])}
    for name in re.findall(r'r\.register\(\s*"(\w+)"', source):
        if name.endswith("_seconds") or name == "delta_commit_attempts":
            names |= {f"alluvium_{name}_{part}" for part in ("bucket", "sum", "count")}
        elif name in ("steps_in_flight", "build_info"):
            names.add(f"alluvium_{name}")
        else:
            names.add(f"alluvium_{name}_total")
    return names
