"""Plays one planned world against the real binary, and keeps the model of what it should be.

Owns: the world's folder, its files, the processes it starts, the exit codes it accepts.
Calls: the plan, the model, `worlds_check`. Never: decides what happens next, waits by sleeping,
reads the product's state for the model, or ends a process it did not start.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from oracle import REVERT, Main, judged
from oracle_modes import ModeWorld, expected
from oracle_reading import SourceRow, table_version
from worlds_check import check_held, check_world, is_held
from worlds_files import (
    CACHE, PIPELINE, complete_folder, config_text, deletes_of, demands_of, is_selected, write_files, write_junk,
)  # fmt: skip
from worlds_plan import (
    Action, Change, Check, Deliver, Fault, File, Lose, Plan, Rollback, Run, Verb, describe,
)  # fmt: skip
from worlds_read import (
    Corrected, corrected_rows, corrections_text, judged_columns, read_folder,
)  # fmt: skip
from worlds_shape import JSON, Shape

TIMEOUT_SECONDS = 120
STDERR_LINES = 40
KILLED = -9
# A lost reply is retried (0), or it ends this run with an error that the next one heals.
AFTER_LOST_REPLY = {0, 1, 4}
# No world has alerts, hooks or rollback points: these have tests of their own.
ELSEWHERE = ("alerts.", "alert.", "hook.", "point.")
# While a replay is to be repeated its folder differs from what was pinned: an alert is right.
WHILE_FOLDER_CHANGED = {0, 1}


class WorldFailed(Exception):
    """What went wrong in this world, one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines[0])
        self.lines = lines


@dataclass
class Outcome:
    """What is told about a world when it is over."""

    plan: Plan
    history: list[str] = field(default_factory=list)
    failure: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    points_killed: set[str] = field(default_factory=set)
    replies_lost: dict[int, int] = field(default_factory=dict)
    invocations: int = 0


def crash_points(binary: Path) -> list[str]:
    """The binary's named crash points, one per line of its hidden verb."""
    done = subprocess.run(
        [binary, "crash-points"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    points = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    points = [point for point in points if not point.startswith(ELSEWHERE)]
    if done.returncode or not points:
        raise WorldFailed([f"`crash-points` exits {done.returncode} and names {len(points)}"])
    return points


def play_world(
    plan: Plan, binary: Path, points: list[str], home: Path, make: Callable | None = None
) -> Outcome:
    """Plays the plan in the folder `home`, which must not exist. `make` makes another player."""
    make = make or Player
    outcome = Outcome(plan)
    try:
        player = make(plan.shape, binary, points, home, outcome)
        for action in plan.actions:
            outcome.history.append(describe(action, points))
            player.play(action)
    except WorldFailed as failed:
        outcome.failure = failed.lines
    except Exception as error:  # A world that cannot be played or read is a failed world.
        outcome.failure = [f"{type(error).__name__}: {error}"]
    return outcome


@dataclass
class Player:
    shape: Shape
    binary: Path
    points: list[str]
    home: Path
    outcome: Outcome
    complete: set[int] = field(default_factory=set)
    unrepeated: set[tuple[str, int]] = field(default_factory=set)
    # Versions of main that were checked, with the rows that they hold.
    checked: dict[int, Main] = field(default_factory=dict)
    also_accepted: set[int] = field(default_factory=set)
    spoiling: random.Random = field(default_factory=lambda: random.Random(1))
    # Corrected rows of each epoch, as long as its files are the same and the manifests are there.
    corrected: dict[int, Corrected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape
        self.model = ModeWorld(shape.key, shape.sequence_by, ignore=shape.ignore, mode=shape.mode)
        for folder in ("incoming", "logs"):
            (self.home / folder).mkdir(parents=True)
        (self.home / "alluvium.toml").write_text(config_text(self.shape))

    def play(self, action: Action) -> None:
        match action:
            case Deliver():
                self._deliver(action)
            case Run():
                self._run(action)
            case Verb():
                self._verb(action)
            case Change():
                self._rewrite(action.epoch, action.files)
                self.model.set_content(action.epoch, *self._folder_content(action.epoch))
            case Rollback():
                self._rollback(action)
            case Lose():
                self._lose(action.what)
            case Check():
                self._check(action.still)

    # --- actions ---

    def _deliver(self, action: Deliver) -> None:
        folder = self._folder(action.epoch)
        write_files(folder, action.files, self.shape)
        if action.junk:
            write_junk(self.home / "incoming", folder, self.shape)
        if action.complete:
            complete_folder(folder)
            self.complete.add(action.epoch)
            self.model.set_content(action.epoch, *self._folder_content(action.epoch))

    def _run(self, action: Run) -> None:
        calls = [(["run", "--once"], fault) for fault in action.faults]
        self._invoke(calls, {"ALLUVIUM_TEST_NO_LOCK": "1"} if len(calls) > 1 else {})

    def _verb(self, action: Verb) -> None:
        if action.files is not None:
            self._rewrite(action.epoch, action.files)
        name, epoch = action.name, action.epoch
        self.unrepeated.discard((name, epoch))
        args = [name, PIPELINE, str(epoch), "--yes"]
        rows = [row for row in self._rows(epoch) if self._is_correctable(epoch, row)]
        corrected = corrected_rows(rows, self.corrected.get(epoch, {}), action.rows)
        if action.rows and not corrected:
            self.unrepeated.discard((name, epoch))
            return
        if corrected:
            (self.home / "rows.json").write_text(corrections_text(corrected))
            args = ["quarantine", *args, "--rows", "rows.json"]
        self._invoke([(args, action.fault)], {})
        if not action.fault:
            kept = self.corrected.get(epoch, {}) | corrected
            self.corrected[epoch] = {place: row for place, row in kept.items() if row is not None}
        if action.fault:
            # Whether it took effect is not known; the plan repeats it before it checks.
            self.unrepeated.add((name, epoch))
        elif name == "replay":
            self.model.set_content(epoch, *self._folder_content(epoch))
        else:
            self.model.clear(epoch)

    def _rewrite(self, epoch: int, files: tuple[File, ...]) -> None:
        folder = self._folder(epoch)
        shutil.rmtree(folder)
        self.corrected.pop(epoch, None)
        write_files(folder, files, self.shape)
        complete_folder(folder)

    def _lose(self, what: str) -> None:
        lost = self.home / ("state/ledger" if what == "ledger" else what)
        shutil.rmtree(lost, ignore_errors=True)
        if what == "main":
            self.checked.clear()
        if what == "state":
            self.corrected.clear()

    def _rollback(self, action: Rollback) -> None:
        """What was killed is repeated plainly; it may have taken effect (then it is refused)."""
        self._invoke([(["run", "--once"], None)], {})
        if not self._rollback_is_held(action):
            if action.meanwhile:
                self._verb(action.meanwhile)
            return
        self._invoke([(["resume", PIPELINE], action.resume_fault)], {})
        if action.resume_fault:
            self._invoke([(["resume", PIPELINE], None)], {})
        self._invoke([(["run", "--once"], None)], {})

    def _rollback_is_held(self, action: Rollback) -> bool:
        above = {epoch for epoch in self.complete if epoch > action.to}
        if not above or self._versions()["main"] is None:
            return False
        version, rows = None, None
        if action.by_version and self.checked:
            version = min(self.checked, key=lambda known: (known * 7919 + action.to) % 101)
            rows = self.checked[version]
        point = ["--to-epoch", str(action.to)]
        if version is not None:
            point = ["--to-version", str(version)]
        args = ["rollback", PIPELINE, *point, "--yes"]
        # The version that is there is refused, as is what a killed process had done.
        self.also_accepted = set() if version is None else {2}
        self._invoke([(args, action.fault)], {})
        if action.fault:
            self.also_accepted = {2}
            self._invoke([(args, None)], {})
        self.also_accepted = set()
        if not is_held(self.home / "main"):
            # Refused: the version holds what epochs said before they were replayed or undone.
            return False
        kept = self.complete - above
        held = rows if version is not None else self._expected(kept)
        self._check_held(held)
        if action.lose:
            self._lose(action.lose)
        if action.meanwhile:
            self._verb(action.meanwhile)
            self._check_held(held)
        self._invoke([(["run", "--once"], None)], {})
        self._check_held(held)
        return True

    def _check_held(self, rows: Main) -> None:
        if lines := check_held(self.home, self.shape, rows):
            raise WorldFailed(["while it is rolled back:", *lines])

    def _check(self, still: bool) -> None:
        if lines := check_world(self.home, self.shape, self.model, self.complete):
            raise WorldFailed(lines)
        if version := self._versions()["main"]:
            self.checked[version] = self._expected(self.complete)
        if not still:
            return
        before = self._versions()
        self._invoke([(["run", "--once"], None)], {})
        if self._versions() != before:
            raise WorldFailed(
                [f"one more run changes the tables: versions {before}, then {self._versions()}"]
            )
        if lines := check_world(self.home, self.shape, self.model, self.complete):
            raise WorldFailed(["after one more run:", *lines])

    # --- processes ---

    def _accepted(self, fault: Fault | None) -> set[int]:
        codes = {0} | self.also_accepted
        if fault and fault.kind == "crash":
            codes.add(KILLED)
        if fault and fault.kind == "fail":
            codes |= AFTER_LOST_REPLY
        if any(name == "replay" for name, _ in self.unrepeated):
            codes |= WHILE_FOLDER_CHANGED
        return codes

    def _invoke(self, calls: list[tuple[list[str], Fault | None]], env: dict[str, str]) -> None:
        """Starts all calls at once, waits for all, and judges their exit codes."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        logs, processes = [], []
        for args, fault in calls:
            self.outcome.invocations += 1
            log = self.home / "logs" / f"{self.outcome.invocations:02}-{args[0]}"
            logs.append(log.with_suffix(".stderr"))
            processes.append(self._start(args, log, {**env, **self._fault_env(fault)}))
        codes = [code_by(deadline, process) for process in processes]
        self.outcome.stderr = tails(logs)
        told = ["hung" if code is None else f"exit {code}" for code in codes]
        self.outcome.history[-1] += f" -> {' and '.join(told)}"
        wrong = []
        for code, (args, fault) in zip(codes, calls):
            self._count(code, fault)
            accepted = self._accepted(fault)
            if code is None:
                wrong.append(f"{args[0]} hung: no end within {TIMEOUT_SECONDS} s")
            elif code not in accepted:
                wrong.append(f"{args[0]}: exit {code}, expected one of {sorted(accepted)}")
        if wrong:
            raise WorldFailed(wrong)

    def _spoil_indexes(self) -> None:
        """Side indexes are a cache: whenever a process begins they may be gone, cut or damaged."""
        cache = self.home / CACHE
        for path in sorted([*cache.glob("*/*.index"), *cache.glob("*/*.rows")]):
            # Another process may delete it, too.
            with contextlib.suppress(FileNotFoundError):
                content = bytearray(path.read_bytes())
                at = self.spoiling.randrange(len(content) or 1)
                match self.spoiling.randrange(12):
                    case 0:
                        path.unlink()
                    case 1:
                        os.truncate(path, at)
                    case 2 if content:
                        content[at] ^= 1 << self.spoiling.randrange(8)
                        path.write_bytes(content)
        if self.spoiling.random() < 0.05:
            shutil.rmtree(cache, ignore_errors=True)

    def _start(self, args: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
        self._spoil_indexes()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
        stdout, stderr = log.with_suffix(".stdout"), log.with_suffix(".stderr")
        with stdout.open("wb") as out, stderr.open("wb") as err:
            return subprocess.Popen(
                [self.binary, *args, "--config", "alluvium.toml"],
                cwd=self.home,
                env={**inherited, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def _fault_env(self, fault: Fault | None) -> dict[str, str]:
        if fault is None:
            return {}
        return {f"ALLUVIUM_{fault.kind.upper()}": f"{fault.point(self.points)}:{fault.nth}"}

    def _count(self, code: int | None, fault: Fault | None) -> None:
        if fault and code == KILLED:
            self.outcome.points_killed.add(fault.point(self.points))
        if fault and fault.kind == "fail" and code is not None:
            lost = self.outcome.replies_lost
            lost[code] = lost.get(code, 0) + 1

    # --- what is where ---

    def _folder(self, epoch: int) -> Path:
        return self.home / "incoming" / str(epoch)

    def _rows(self, epoch: int) -> list[SourceRow]:
        return read_folder(self._folder(epoch), self.shape)

    def _is_correctable(self, epoch: int, row: SourceRow) -> bool:
        """In a table, or corrected before: what `select` left out is not. Below `select` a row has the
        columns of its file alone."""
        shape, place = self.shape, (row.file, row.row)
        if shape.selects and (shape.drift or shape.format == JSON):
            if not row.columns.keys() >= set(shape.columns):
                return False
        in_raw = {(row.file, row.row) for row in self.model.content.get(epoch, []) if row.op != REVERT}
        known = in_raw | self.model.refused.get(epoch, {}).keys()
        return place in known | self.corrected.get(epoch, {}).keys()

    def _folder_content(self, epoch: int) -> tuple:
        shape = self.shape
        corrected = self.corrected.get(epoch, {})
        rows = [
            SourceRow(
                row.file,
                row.row,
                judged_columns(corrected.get((row.file, row.row), row.columns), shape),
            )
            for row in self._rows(epoch)
        ]
        rows = [row for row in rows if is_selected(row.columns, shape)]
        return judged(rows, shape.key, shape.sequence_by, demands_of(shape), deletes_of(shape))

    def _expected(self, epochs: set[int]) -> Main:
        return expected(self.shape.mode, self.model, epochs)

    def _versions(self) -> dict[str, int | None]:
        return {name: table_version(self.home / name) for name in ("raw", "main")}


def code_by(deadline: float, process: subprocess.Popen) -> int | None:
    """The exit code, or None for a process that had to be ended."""
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def tails(logs: Iterable[Path]) -> list[str]:
    lines = []
    for log in logs:
        lines.append(f"{log.name}:")
        lines += log.read_text(errors="replace").splitlines()[-STDERR_LINES:]
    return lines
