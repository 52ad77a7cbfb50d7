"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lake import BINARY, Lake


def pytest_collection_modifyitems(config, items):
    """End-to-end tests need the binary; without it they fail by name, nothing is skipped."""
    if shutil.which(BINARY) is None and not os.access(BINARY, os.X_OK):
        print(f"no binary at {BINARY}: set ALLUVIUM_BINARY; `scripts/test e2e` does")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path).pipeline()
