"""Docker for the test of docker-compose.yml: an engine, and images that need no registry.

Owns: a private dockerd (when none answers), the base image from Debian's packages, the stand-in images.
Never: touches the network settings of this machine, or ends an engine that it did not start.

What is made once is kept in ALLUVIUM_TEST_DOCKER_CACHE (default ~/.cache/alluvium-test-docker); in an
engine that ran before, the images `alluvium-test-…` stay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
CACHE = Path(
    os.environ.get("ALLUVIUM_TEST_DOCKER_CACHE") or Path.home() / ".cache/alluvium-test-docker"
)
SUITE, PYTHON = "bookworm", "3.11"
# Without one debootstrap knows where Debian is.
MIRROR = os.environ.get("ALLUVIUM_TEST_DEBIAN_MIRROR", "").split()
PACKAGES = [
    "ca-certificates", "curl", "wget", "procps", "python3", "rabbitmq-server", "redis-server",
    "prometheus",
]
# Not all of the tests' requirements: what the stand-ins import.
MODULES = ["moto", "boto3", "grpcio", "opentelemetry-proto"]
STAND_INS = ["rabbitmq", "redis", "s3", "jaeger", "prometheus"]
UP_SECONDS, BUILD_SECONDS = 60, 900


class CannotTry(Exception):
    """Containers cannot be run here: no fault of what is tested."""


def run(*command: Any, seconds: float = 120, check: bool = True, **more: Any) -> str:
    """What the command printed; a failure tells all of it."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
        stdin=subprocess.DEVNULL, check=False, **more,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


class Engine:
    """The engine that answers, or a private one for as long as this lives (a context manager)."""

    def __init__(self) -> None:
        self._daemon: subprocess.Popen | None = None
        self._folder: Path | None = None
        self._lock: Any = None

    def __enter__(self) -> "Engine":
        if self._answers():
            print("uses the Docker engine that runs here", flush=True)
            return self
        if os.geteuid() != 0:
            raise CannotTry("no Docker engine answers, and starting one needs root")
        if shutil.which("dockerd") is None:
            raise CannotTry("dockerd is not installed")
        CACHE.mkdir(parents=True, exist_ok=True)
        self._lock = open(CACHE / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CannotTry(f"another test uses {CACHE}: wait for its end") from None
        self._start()
        return self

    def _start(self) -> None:
        # Short: a socket's path has a limit.
        self._folder = Path(tempfile.mkdtemp(prefix="alluvium-docker-"))
        socket = f"unix://{self._folder}/sock"
        # Without the default bridge and without packet filters: the test's own networks suffice,
        # ports are published by docker-proxy, and nothing of this machine's network is changed.
        command = [
            "dockerd", "--data-root", CACHE / "data", "--exec-root", self._folder / "exec",
            "--pidfile", self._folder / "pid", "--host", socket, "--bridge=none",
            "--iptables=false", "--ip6tables=false", "--ip-masq=false",
        ]
        with open(self._folder / "log", "wb") as log:
            self._daemon = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )
        os.environ["DOCKER_HOST"] = socket
        deadline = time.monotonic() + UP_SECONDS
        while not self._answers():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                said = (self._folder / "log").read_text(errors="replace")[-2000:]
                self.__exit__()
                raise CannotTry(f"dockerd cannot start here; its last words:\n{said}")
            time.sleep(0.2)
        print(f"started a private Docker engine (data in {CACHE})", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._daemon is not None:
            # Images of earlier binaries.
            subprocess.run(["docker", "image", "prune", "-f"], capture_output=True, check=False)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._daemon.poll() is None:
                    self._daemon.send_signal(number)
                    try:
                        self._daemon.wait(60)
                    except subprocess.TimeoutExpired:
                        continue
            os.environ.pop("DOCKER_HOST", None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _answers(self) -> bool:
        if shutil.which("docker") is None:
            raise CannotTry("docker is not installed")
        asked = subprocess.run(
            ["docker", "version"], capture_output=True, timeout=30, stdin=subprocess.DEVNULL,
            check=False,
        )
        return asked.returncode == 0


def compose_command() -> list[str]:
    """docker-compose as Debian 12 has it (1.29), else the plugin; ALLUVIUM_TEST_COMPOSE names another."""
    if given := os.environ.get("ALLUVIUM_TEST_COMPOSE"):
        return given.split()
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    return ["docker", "compose"]


def modules() -> list[str]:
    """The lines of requirements.txt for the stand-ins, with what moto's S3 server needs."""
    lines = (TESTS / "requirements.txt").read_text().split()
    pinned = {line.partition("==")[0].partition("[")[0]: line.partition("==")[2] for line in lines}
    names = [f"{name}[s3]" if name == "moto" else name for name in MODULES]
    found = [f"{name}=={pinned[name.partition('[')[0]]}" for name in names]
    return [*found, "flask", "flask-cors"]


def base_image() -> str:
    """The name of the base image; it is made where it is missing."""
    recipe = "\n".join([SUITE, PYTHON, *PACKAGES, *modules()])
    name = f"alluvium-test-base:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if run("docker", "images", "-q", name).strip():
        return name
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise CannotTry("the base image is made by debootstrap, which is missing or needs root")
    print("making the base image from Debian's packages (once; about 2 minutes)", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="base-", dir=CACHE))
    try:
        try:
            run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root,
                *MIRROR, seconds=BUILD_SECONDS)
            run(sys.executable, "-m", "pip", "install", "-q", "--target", root / "opt/python",
                "--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:",
                *modules(), seconds=BUILD_SECONDS)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise CannotTry(f"the base image cannot be made: {error}") from error
        packed = subprocess.Popen(
            ["tar", "-C", str(root), "--exclude=./var/cache/apt", "--exclude=./usr/share/doc",
             "--exclude=./var/lib/apt/lists", "--exclude=./usr/share/locale", "-c", "."],
            stdout=subprocess.PIPE,
        )
        subprocess.run(
            ["docker", "import", "-", name], stdin=packed.stdout, stdout=subprocess.DEVNULL,
            check=True, timeout=BUILD_SECONDS,
        )
        assert packed.wait() == 0
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return name


def build(dockerfile: Path, context: Path, target: str, tag: str, **arguments: str) -> None:
    """One stage as an image, by the builder that every engine has, without a network."""
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    run("docker", "build", "-q", "--network=none", "-f", dockerfile, "--target", target, "-t", tag,
        *given, context, seconds=BUILD_SECONDS, env=os.environ | {"DOCKER_BUILDKIT": "0"})


def images(binary: Path) -> dict[str, str]:
    """The variables of docker-compose.yml that name images, with images that are made here."""
    base = base_image()
    found = {}
    for name in STAND_INS:
        found[f"{name.upper()}_IMAGE"] = tag = f"alluvium-test-{name}"
        build(TESTS / "stand_ins.Dockerfile", TESTS, name, tag, BASE=base)
    with tempfile.TemporaryDirectory(prefix="alluvium-image-") as folder:
        shutil.copy2(binary, Path(folder) / "alluvium")
        found["ALLUVIUM_IMAGE"] = tag = "alluvium-test-app"
        build(ROOT / "scripts/Dockerfile", Path(folder), "prebuilt", tag, RUNTIME_IMAGE=base,
              BINARY="alluvium")
    return found
