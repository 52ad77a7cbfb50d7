"""Reading what lies in deploy/ and docs/: units, rendered objects, configurations, named commands.

Owns: the tools (systemd-analyze, kubectl) and how they are called. Never: says what is right.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lake import BINARY, Result

ROOT = Path(__file__).parent.parent
SYSTEMD = ROOT / "deploy/systemd"
KUBERNETES = ROOT / "deploy/kubernetes"
CONFIGURATIONS = sorted((ROOT / "deploy").rglob("*.toml"))
UNITS = sorted(SYSTEMD.glob("*.service")) + sorted(SYSTEMD.glob("*.timer"))
SERVICES = sorted(SYSTEMD.glob("*.service"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]
TIMEOUT_SECONDS = 60
# What a secret's file holds in a test, by its name; a plain word for all others.
SECRETS = {"amqp": "amqp://u:p@127.0.0.1:5672/%2f", "redis": "redis://127.0.0.1:6379/0"}


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Result:
    done = subprocess.run(
        command, env=env, cwd=cwd, text=True, capture_output=True, timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL, check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def tool(name: str) -> str:
    """A program of the system or of the tests' Python packages; one that is missing is a failure."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    path = shutil.which(name, path=folders)
    assert path, f"{name} is missing: scripts/install-services and scripts/python-environment bring it"
    return path


def binary() -> str:
    path = shutil.which(BINARY)
    assert path, f"no binary at {BINARY}: set ALLUVIUM_BINARY; `scripts/test e2e` does"
    return str(Path(path).resolve())


# --- units ---


def settings(unit: Path) -> dict[str, list[str]]:
    """Section.Key → its values, in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def one(unit: Path, key: str) -> str:
    (value,) = settings(unit)[key]
    return value


def installed(folder: Path) -> list[str]:
    """All units as they would be installed, with the binary that is tested."""
    paths = []
    for unit in UNITS:
        # systemd wants to know an instance of a template.
        path = folder / unit.name.replace("@.", "@1.")
        path.write_text(unit.read_text().replace("/usr/local/bin/alluvium", binary()))
        paths.append(str(path))
    return paths


def seconds(text: str) -> int:
    """`60s`, `5m`, `2h`."""
    number, unit = re.fullmatch(r"(\d+)(s|m|h)", text).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


# --- rendered objects ---


def render(folder: Path) -> list[dict[str, Any]]:
    done = run(tool("kubectl"), "kustomize", str(folder))
    assert done.code == 0, done.err
    return [found for found in yaml.safe_load_all(done.out) if found]


def render_with_component(scratch: Path, base: str, component: str) -> list[dict[str, Any]]:
    """As an overlay of somebody else would use it."""
    copy = scratch / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    overlay = copy / "overlays/of_a_test"
    overlay.mkdir()
    text = {"namespace": "alluvium", "resources": [f"../../{base}"], "components": [f"../../{component}"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(overlay)


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


# --- configurations ---


def environment_for(text: str, secrets: Path) -> dict[str, str]:
    """Whatever a configuration takes from outside, with something in it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
    secrets.mkdir(exist_ok=True)
    for name in re.findall(r"file:\$\{CREDENTIALS_DIRECTORY\}/(\w+)", text):
        (secrets / name).write_text(SECRETS.get(name, "word") + "\n")
    env |= {name: "word" for name in re.findall(r"\$\{(\w+)\}", text)}
    return env | {"CREDENTIALS_DIRECTORY": str(secrets)}


def validate(text: str, folder: Path) -> Result:
    """What the real binary says of a configuration."""
    path = folder / "alluvium.toml"
    path.write_text(text)
    env = environment_for(text, folder / "secrets")
    return run(binary(), "--config", str(path), "config", "validate", env=env, cwd=folder)


# --- pages ---


def commands(page: str) -> Iterator[list[str]]:
    """Every `alluvium …` in code, as words; what follows the program is left as it is."""
    spans = re.findall(r"`([^`\n]+)`", page)
    for block in re.findall(r"```sh\n(.*?)```", page, re.S):
        spans += block.splitlines()
    for span in spans:
        span = re.sub(r"\s#\s.*", "", re.sub(r"\"[^\"]*\"", "SQL", span))
        for part in re.split(r"&&|\||;|&| -- ", span):
            # Before the program: sudo, its user, variables.
            found = re.fullmatch(r"(?:sudo |-u \w+ |\w+=\S+ )*(?:\S*/)?alluvium\s+(.*)", part.strip())
            if found:
                yield found[1].split()


@cache
def _help(*words: str) -> str:
    """What --help prints, or nothing: there is no such verb."""
    said = run(binary(), *words, "--help")
    return said.out if said.code == 0 else ""


def help_for(words: list[str]) -> str | None:
    """The help of the longest verb that begins a command; None: its verb is not there."""
    verbs = list(takewhile(lambda word: re.fullmatch(r"[a-z][a-z-]*", word), words))[:2]
    if words[0] == "--config":
        return help_for(words[2:])
    for count in range(len(verbs), -1, -1):
        said = _help(*verbs[:count])
        usage = said.partition("Usage:")[2].partition("\n")[0]
        # A verb that takes an argument takes any word before --help; its usage does not name it.
        if said and all(verb in usage.split() for verb in verbs[:count]):
            return None if "<COMMAND>" in usage and len(verbs) > count else said
    return None


@cache
def known_settings() -> frozenset[str]:
    """Every way to name a setting or a part of one: `worker.slots`, `alert.lag`, `ready`."""
    section, known = [], set()
    for line in run(binary(), "config", "reference").out.splitlines():
        head = re.fullmatch(r"(?:# )?\[([\w.]+)\]", line)
        found = re.match(r"(?:# )?([a-z_]+(?:\.[a-z_]+)*) = ", line)
        if head:
            section = head[1].split(".")
        elif found:
            path = [*section, *found[1].split(".")]
            known |= {".".join(path[i:j]) for i in range(len(path)) for j in range(i + 1, len(path) + 1)}
    return frozenset(known)


def named_settings(page: str) -> set[str]:
    """Settings within a page's lines: `name = value`, and dotted names that begin as ours do."""
    firsts = {name.split(".")[0] for name in known_settings() if "." in name}
    named = set()
    for span in re.findall(r"`([^`\n]+)`", page):
        found = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)( = .*)?", span)
        if not found or found[1].endswith(".toml"):
            continue
        if found[2] or ("." in found[1] and found[1].split(".")[0] in firsts):
            named.add(found[1])
    return named
