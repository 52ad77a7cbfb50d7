"""kill -9 at each crash point of a merge, an optimize and a cleanup: readers open what is left, and the next
run of the same step finishes.

Owns: one step at a time, over files with marks and without. Whole runs are killed in test_run.py and the worlds.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from races import Ground

WAYS = {"marks": "", "copies": 'merge.deletion_vectors = "off"\n'}
# What each step must come by; others come by more than one of them.
OF_STEP = {
    "merge": {"merge.after_plan", "merge.after_write", "merge.before_commit", "merge.after_commit"},
    "optimize": {"optimize.after_write", "optimize.before_commit", "optimize.after_commit"},
    "cleanup": {"cleanup.before_delete", "cleanup.after_delete"},
}
# A cleanup passes its points once for each table that is there.
PASSED_MOST = 3


@pytest.mark.parametrize("name", OF_STEP)
@pytest.mark.parametrize("way", WAYS)
def test_a_kill_leaves_tables_that_are_read_and_finished(name: str, way: str, tmp_path: Path):
    ground = Ground(tmp_path, 5, WAYS[way])
    points = ground.lake.alluvium("crash-points").out.split()
    goal = ground.after if name == "merge" else ground.before
    reached = set()
    for point in points:
        for nth in range(1, PASSED_MOST + 1):
            ground.begin()
            process = ground.step(name, ALLUVIUM_CRASH=f"{point}:{nth}")
            _, err = process.communicate(timeout=120)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, err
                break
            reached.add(point)
            left = sorted((row["id"], row["value"]) for row in ground.lake.rows())
            assert left in (ground.before, goal), f"{point}:{nth}"
            ground.holds(left)
            process = ground.step(name)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, f"{point}:{nth}: {err}"
            ground.holds(goal)
    assert OF_STEP[name] <= reached, reached
