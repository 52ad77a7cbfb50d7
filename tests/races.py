"""Two real processes on one main table at once, many times over: no row is lost or doubled.

Owns: the tables that are raced over, the races, the check. `python tests/races.py --binary BIN --count 300`
runs each race so often; `test_races.py` a few times. Rows are read by polars and by the log alone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
from deltalake import DeltaTable

import lake as lakes
from lake import Lake
from oracle_feed import commit_of

RACES = {
    "merge against merge": ("merge", "merge"),
    "merge against optimize": ("merge", "optimize"),
    "optimize against optimize": ("optimize", "optimize"),
    "merge against cleanup": ("merge", "cleanup"),
    "optimize against cleanup": ("optimize", "cleanup"),
}
KEYS = 400
SETTINGS = """
optimize = { enabled = false, small_files = 2, target_file_size = "1MiB" }
cleanup = { enabled = false, retention = "1h" }
"""
HOURS = 3600.0
# What a step may say that gives way to another one.
MOVED_ON = "AL-0404"


class Ground:
    """A lake with main as it was before the newest epochs' merge, files of all kinds in it."""

    def __init__(self, folder: Path, seed: int, more: str = ""):
        self.random = random.Random(seed)
        self.lake = Lake(folder).pipeline(more=SETTINGS + more)
        self.main = folder / "p/main"
        rows: dict[str, int] = {}
        for epoch in range(1, 7):
            self.deliver(epoch, rows)
            self.lake.run()
        before, kept = dict(rows), set(os.listdir(self.main / "_delta_log"))
        self.deliver(7, rows)
        self.deliver(8, rows)
        self.lake.run()
        self.before, self.after = sorted(before.items()), sorted(rows.items())
        for entry in set(os.listdir(self.main / "_delta_log")) - kept:
            (self.main / "_delta_log" / entry).unlink()
        # What a killed merge left behind: cleanup has something to delete.
        for number in range(5):
            shutil.copy(next(self.main.glob("*.parquet")), self.main / f"part-0000{number}-left-behind.parquet")
        then = time.time() - 6 * HOURS
        for path in self.main.rglob("*"):
            os.utime(path, (then, then))
        self.waiting = folder / "waiting"
        self.main.rename(self.waiting)

    def deliver(self, epoch: int, rows: dict[str, int]) -> None:
        delivered = []
        for key in self.random.sample(range(KEYS), KEYS // 4):
            goes = self.random.random() < 0.2
            delivered.append((f"k{key:04}", epoch, "D" if goes else "U"))
            if goes:
                rows.pop(f"k{key:04}", None)
            else:
                rows[f"k{key:04}"] = epoch
        self.lake.deliver(epoch, delivered)

    def begin(self) -> None:
        shutil.rmtree(self.main, ignore_errors=True)
        shutil.copytree(self.waiting, self.main, copy_function=os.link)

    def step(self, name: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [lakes.BINARY, "step", name], cwd=self.lake.root, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def holds(self, expected: list[tuple[str, int]]) -> None:
        """polars and the live files' statistics agree with what the rows must be."""
        found = sorted(pl.read_delta(str(self.main)).select("id", "value").rows())
        assert found == expected, differences(found, expected)
        live: dict[str, dict] = {}
        for version in range(DeltaTable(self.main).version() + 1):
            for action in commit_of(self.main, version):
                if "remove" in action:
                    live.pop(action["remove"]["path"], None)
            for action in commit_of(self.main, version):
                if "add" in action:
                    live[action["add"]["path"]] = action["add"]
        for path in live:
            assert (self.main / path).exists(), f"{path} is live, and is gone"


def differences(found: list[tuple], expected: list[tuple]) -> str:
    one, other = Counter(found), Counter(expected)
    return f"too many: {sorted((one - other).elements())[:5]}, too few: {sorted((other - one).elements())[:5]}"


def is_fine(code: int, err: str) -> bool:
    """It is done, or somebody else was faster."""
    return code == 0 or (code == 1 and MOVED_ON in err)


def race(ground: Ground, steps: tuple[str, str], number: int) -> Counter:
    """One race. Returns how its processes ended."""
    ground.begin()
    lead = random.Random(number).random() * 0.03
    first = ground.step(steps[number % 2])
    time.sleep(lead)
    second = ground.step(steps[1 - number % 2])
    ends: Counter = Counter()
    for process in (first, second):
        _, err = process.communicate(timeout=120)
        assert is_fine(process.returncode, err), err
        ends[process.returncode] += 1
    merged = "merge" in steps
    ground.holds(ground.after if merged else ground.before)
    if merged:
        # Nothing is in the way of what comes next.
        after = ground.step("optimize")
        _, err = after.communicate(timeout=120)
        assert after.returncode == 0, err
        ground.holds(ground.after)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--count", type=int, default=300, help="so often each race")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="")
    parser.add_argument("--more", default='merge.index = "always"\n', help="settings of the pipeline")
    arguments = parser.parse_args()
    lakes.BINARY = arguments.binary
    import tempfile

    passed = failed = 0
    for name, steps in RACES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
            ground = Ground(Path(folder), arguments.seed, arguments.more)
            ends: Counter = Counter()
            for number in range(arguments.count):
                try:
                    ends += race(ground, steps, arguments.seed * 1_000_000 + number)
                    passed += 1
                except AssertionError as error:
                    failed += 1
                    print(f"{name}, race {number}: {error}", flush=True)
            print(f"{name}: {arguments.count} races, exit codes {dict(ends)}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
