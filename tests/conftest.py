"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Iterator

import pytest

from cluster import Cluster
from lake import BINARY, Lake
from services import Services


def pytest_collection_modifyitems(config, items):
    """End-to-end tests need the binary; without it they fail by name, nothing is skipped."""
    if shutil.which(BINARY) is None and not os.access(BINARY, os.X_OK):
        print(f"no binary at {BINARY}: set ALLUVIUM_BINARY; `scripts/test e2e` does")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path).pipeline()


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    """RabbitMQ, Redis and an S3 server, each started by the first test that asks for it."""
    started = Services()
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that killed a server and failed does not take the next ones with it."""
    yield
    if "services" in request.fixturenames:
        request.getfixturevalue("services").heal()


@pytest.fixture
def make(tmp_path: Path, services: Services):
    """Makes clusters, and ends their processes."""
    made: list[Cluster] = []

    def make_cluster(store: str = "disk", **more) -> Cluster:
        made.append(Cluster(tmp_path, services, store, **more).pipeline())
        return made[-1]

    yield make_cluster
    for cluster in made:
        cluster.stop()
