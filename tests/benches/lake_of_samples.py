"""Sample lakes for benchmarks, made and processed by the real binary.

Owns: making sample folders, holding some of them back, timing `alluvium run --once`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path


class SampleLake:
    """`alluvium demo --data-only` in a folder; the folders of its last `held` epochs wait aside."""

    def __init__(self, binary: str, root: Path, epochs: int, rows: int, held: int = 0):
        self.binary, self.root = binary, root
        # One more: the demo's last folder is incomplete, and is not wanted here.
        command = [binary, "demo", "--data-only", "--out", str(root)]
        command += ["--rows", str(rows), "--epochs", str(epochs + held + 1)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.source, self.aside = root / "incoming-data", root / "held-back"
        names = sorted(path.name for path in self.source.iterdir())
        shutil.rmtree(self.source / names.pop())
        self.aside.mkdir()
        for name in names[epochs:]:
            (self.source / name).rename(self.aside / name)

    def deliver_next(self) -> None:
        """The next folder that was held back arrives."""
        name = min(path.name for path in self.aside.iterdir())
        (self.aside / name).rename(self.source / name)

    def drain(self) -> float:
        """Seconds of one `run --once`, process start included."""
        began = time.perf_counter()
        subprocess.run(
            [self.binary, "run", "--once"], cwd=self.root, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - began

    def query(self, sql: str) -> list[dict]:
        """Rows of `alluvium query`."""
        command = [self.binary, "query", "researchers", sql, "-o", "json"]
        done = subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["items"]
