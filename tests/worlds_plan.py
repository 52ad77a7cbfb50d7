"""Random worlds: what is delivered, what is asked for and what goes wrong, from a seed alone.

Owns: a world's folders, their rows and its actions, in order; `worlds_shape` draws the configuration.
Never: touches a disk, starts a process or looks at an outcome: one seed is always one plan.

The rules of the game (a plan never leaves them):
- a folder changes only together with `replay`, or where `on_changed` reads it again by itself;
- a verb that was killed, or whose reply was lost, is repeated plainly before anything is checked;
- while a replay is to be repeated no other verb is asked;
- `undo` is asked only of an epoch that a plain run has surely merged, `replay` also of one that
  a killed run may have begun, `skip` of any complete one.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from worlds_shape import APPEND, CSV, PARQUET, SCD2, Shape, draw_index, draw_shape, draw_shard_size

Columns = dict[str, Any]

INVOCATIONS_MIN, INVOCATIONS_MAX = 8, 18
# A run, the verb, a run while held, resume (what is asked meanwhile comes on top).
ROLLBACK_INVOCATIONS = 4
ROWS_MAX = 30
BEGINNING = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
LOST = {"ledger": "ledger", "state": "whole state folder", "main": "main table"}
AWKWARD_KEYS = ("k1 ", "K1", "", "ключ", "k'1", 'k"1', "10", "9")
# In the columns of what cannot be read as a row.
NO_ROW = "no row"
# Values of a partition column; the empty text is none, Delta takes it for NULL.
REGIONS = (None, "north", "a/b", "x=y", "100%", "ä ö", "a b", "it's")
# Of the rows that may repeat an earlier one, as many do; they are taken from the newest.
ECHO_SHARE, ECHO_ROWS = 0.3, 20


@dataclass(frozen=True)
class Layout:
    """How a file holds its rows: which columns, in which order and case; `loose`: empty lines between
    rows, NULLs left out, other ends of lines, whatever the format has of it."""

    columns: tuple[str, ...]
    upper: tuple[str, ...] = ()
    narrow: bool = False
    loose: bool = False


@dataclass(frozen=True)
class File:
    """One file of a folder. Its layout decides which values of the rows are in it."""

    name: str
    rows: tuple[Columns, ...]
    row_group_rows: int
    layout: Layout


@dataclass(frozen=True)
class Fault:
    """`crash` kills the process at a point, `fail` loses a reply there. `pick` chooses a point, among
    those that begin with `near` if there are any."""

    kind: str
    pick: float
    nth: int
    near: str = ""

    def point(self, points: list[str]) -> str:
        """The named point; without a list of points, where in the list it would lie."""
        if not points:
            return f"<{self.pick:.0%} of the points {self.near}>"
        points = [point for point in points if point.startswith(self.near)] or points
        return points[int(self.pick * len(points))]

    def describe(self, points: list[str]) -> str:
        """As in the environment: point:n."""
        return f"{self.kind} {self.point(points)}:{self.nth}"


@dataclass(frozen=True)
class Deliver:
    """Files arrive in a folder; `complete` writes the marker last."""

    epoch: int
    files: tuple[File, ...]
    complete: bool
    junk: bool = False


@dataclass(frozen=True)
class Run:
    """`run --once`; two faults mean two processes at the same time."""

    faults: tuple[Fault | None, ...]

    @property
    def plain(self) -> bool:
        return not any(self.faults)


@dataclass(frozen=True)
class Verb:
    """replay, undo or skip of an epoch. `files`: the folder is rewritten first. `rows`: a replay with
    corrected rows: which of the folder's, as a share of them, and what is put in; nothing takes back."""

    name: str
    epoch: int
    files: tuple[File, ...] | None
    fault: Fault | None
    rows: tuple[tuple[float, Columns | None], ...] = ()


@dataclass(frozen=True)
class Change:
    """A processed folder changes; the next runs read it again by themselves."""

    epoch: int
    files: tuple[File, ...]


@dataclass(frozen=True)
class Rollback:
    """Everything ready is merged, main goes back, is looked at, and goes on.

    `to` chooses an epoch; with `by_version` a version whose rows are known. While the pipeline is held
    `lose` (`ledger`, `state` or nothing) is deleted, then `meanwhile` is asked.
    """

    to: int
    by_version: bool
    fault: Fault | None
    lose: str | None
    meanwhile: Verb | None
    resume_fault: Fault | None


@dataclass(frozen=True)
class Lose:
    """`ledger`, `state` or `main`: the folder is deleted. A run that rebuilds main comes next."""

    what: str


@dataclass(frozen=True)
class Check:
    """All statements about the tables; `still` adds that one more run changes nothing."""

    still: bool = False


Action = Deliver | Run | Verb | Change | Rollback | Lose | Check


@dataclass(frozen=True)
class Plan:
    """A whole world."""

    seed: int
    shape: Shape
    actions: tuple[Action, ...]


def make_plan(seed: int) -> Plan:
    """The world of this seed."""
    planner = _Planner(random.Random(seed))
    index = draw_index(random.Random(f"index {seed}"))
    shard_size = draw_shard_size(random.Random(f"shards {seed}"))
    shape = replace(planner.shape, index=index, shard_size=shard_size)
    return Plan(seed, shape, tuple(planner.play()))


def describe(action: Action, points: list[str]) -> str:
    """One line of history."""
    match action:
        case Deliver():
            state = "complete" if action.complete else "without marker"
            return f"deliver {action.epoch}: {_files(action.files)}; {state}" + (
                ", junk beside it" if action.junk else ""
            )
        case Run():
            what = "run" if len(action.faults) == 1 else "two runs at the same time"
            faults = [fault.describe(points) for fault in action.faults if fault]
            return f"{what}, {', '.join(faults)}" if faults else what
        case Verb():
            return _verb_text(action, points)
        case Change():
            return f"folder {action.epoch} changes: {_files(action.files)}"
        case Rollback():
            to = "to a version that was checked" if action.by_version else f"to epoch {action.to}"
            faults = [f.describe(points) for f in (action.fault, action.resume_fault) if f]
            meanwhile = [f"the {action.lose} is lost meanwhile"] if action.lose else []
            if action.meanwhile:
                meanwhile.append(f"meanwhile {_verb_text(action.meanwhile, points)}")
            return ", ".join([f"rollback {to}, then resume", *faults, *meanwhile])
        case Lose():
            return f"delete the {LOST[action.what]}"
        case Check():
            return "check, then one more run changes nothing" if action.still else "check"


def _verb_text(verb: Verb, points: list[str]) -> str:
    text = f"{verb.name} {verb.epoch}"
    text += f", folder now: {_files(verb.files)}" if verb.files is not None else ""
    text += f" with {len(verb.rows)} corrected rows" if verb.rows else ""
    return text + (f", {verb.fault.describe(points)}" if verb.fault else "")


def _files(files: tuple[File, ...]) -> str:
    return ", ".join(f"{file.name} ({len(file.rows)} rows)" for file in files) or "no files"


@dataclass
class _Planner:
    """Keeps what is possible next. Epochs move undelivered → incomplete → complete → sure."""

    rng: random.Random
    shape: Shape = field(init=False)
    pool: list[str] = field(init=False)
    undelivered: list[int] = field(init=False)
    incomplete: dict[int, tuple[File, ...]] = field(default_factory=dict)
    folders: dict[int, tuple[File, ...]] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    sure: set[int] = field(default_factory=set)
    emptied: set[int] = field(default_factory=set)
    repeats: list[Verb] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    said: list[Columns] = field(default_factory=list)
    version: int = 0

    def __post_init__(self) -> None:
        rng = self.rng
        shape = self.shape = draw_shape(rng)
        self.pool = [f"k{n}" for n in range(rng.randint(3, 12))]
        if rng.random() < 0.3:
            self.pool += rng.sample(AWKWARD_KEYS, 3)
        if shape.format == CSV and shape.text.null == "":
            # There the empty text means NULL.
            self.pool = [key for key in self.pool if key]
        # 1..120 crosses 9/10 and 99/100, where order by name is wrong. Units are never mixed.
        start = 1 if rng.random() < 0.7 else 1_700_000_000
        spread = rng.choice((12, 120))
        self.undelivered = rng.sample(range(start, start + spread), rng.randint(3, 8))
        if rng.random() < 0.4:
            self.undelivered.sort()

    # --- the order of things ---

    def play(self) -> list[Action]:
        budget = self.rng.randint(INVOCATIONS_MIN, INVOCATIONS_MAX)
        # Two for the last check (a run before it, a run within it), one per verb to repeat.
        while self._invocations() + len(self.repeats) + 2 < budget:
            self._one_action(left=budget - self._invocations() - len(self.repeats) - 2)
        self._deliver_the_rest()
        self._repeat_all()
        self._run((None,))
        self.actions.append(Check(still=True))
        return self.actions

    def _invocations(self) -> int:
        runs = sum(len(action.faults) for action in self.actions if isinstance(action, Run))
        runs += ROLLBACK_INVOCATIONS * sum(isinstance(a, Rollback) for a in self.actions)
        return runs + sum(isinstance(action, Verb) for action in self.actions)

    def _one_action(self, left: int) -> None:
        rng = self.rng
        waiting = len(self.undelivered) + len(self.incomplete)
        # Early rather than late: a run with nothing to do teaches little.
        if not self.folders and rng.random() < 0.9:
            return self._deliver_or_complete()
        if waiting and rng.random() < 1.6 * waiting / (waiting + left):
            return self._deliver_or_complete()
        work = bool(self.repeats or self.folders.keys() - self.sure)
        choices = {
            "plain": 4 if work else 1,
            "crash": 6 if work else 1,
            "fail": 3 if work else 1,
            "twice": (3 if work else 1) if left >= 2 else 0,
            "verb": 6 if self.folders and not self._replay_is_open() else 0,
            "correct": 3 if left >= 2 and not self.repeats and self.sure - self.emptied else 0,
            "repeat": 4 if self.repeats else 0,
            "change": 3 if self._changeable() else 0,
            "lose": 3 if self.begun else 0,
            "rebuild": 2 if self.sure else 0,
            "rollback": 10 if len(self.sure) > 1 and not self.repeats and left >= 5 else 0,
        }
        match rng.choices(list(choices), list(choices.values()))[0]:
            case "plain":
                self._run((None,))
                if not self.repeats and rng.random() < 0.5:
                    self.actions.append(Check())
            case "crash":
                self._run((self._fault("crash"),))
            case "fail":
                self._run((self._fault("fail"),))
            case "twice":
                second = self._fault(rng.choice(("crash", "fail"))) if rng.random() < 0.4 else None
                self._run((None, second))
            case "rollback":
                self._rollback()
            case "lose":
                what = rng.choice(("ledger", "state"))
                self.actions.append(Lose("ledger" if self._change_is_open() else what))
            case "change":
                epoch = rng.choice(self._changeable())
                self.folders[epoch] = self._changed_files(epoch)
                self.actions.append(Change(epoch, self.folders[epoch]))
                self.sure.discard(epoch)
                self._run((self._fault("crash") if rng.random() < 0.3 else None,))
            case "rebuild":
                self.actions.append(Lose("main"))
                self.sure.clear()
                self._run((self._fault("crash") if left >= 2 and rng.random() < 0.5 else None,))
            case "repeat":
                self._repeat(self.repeats.pop(0))
            case "correct":
                self._run((None,))
                self._correct(rng.choice(sorted(self.sure - self.emptied)), left - 1)
            case "verb":
                self._verb(left)

    def _rollback(self) -> None:
        rng = self.rng
        self.begun |= self.folders.keys()
        self.sure |= self.folders.keys()
        faults = [self._fault(rng.choice(("crash", "crash", "fail"))) for _ in range(2)]
        near = [replace(fault, near=near, nth=1) for fault, near in zip(faults, ("restore.", "hold."))]
        faults = [rng.choice((fault, close, None, None)) for fault, close in zip(faults, near)]
        self.actions.append(
            Rollback(
                to=rng.choice(sorted(self.sure)[:-1]),
                by_version=rng.random() < 0.3,
                fault=faults[0],
                lose=rng.choice((None, None, "ledger", "state")),
                meanwhile=self._some_verb(left=0) if rng.random() < 0.5 else None,
                resume_fault=faults[1],
            )
        )

    def _changeable(self) -> list[int]:
        """What was surely processed, and not left out by somebody. With the manifests nobody knows any
        more what was read."""
        losses = [a for a in self.actions if isinstance(a, (Lose, Rollback))]
        is_lost = any("state" in (getattr(a, "what", ""), getattr(a, "lose", "")) for a in losses)
        if not self.shape.replay_changed or self.repeats or is_lost:
            return []
        return sorted(self.sure - self.emptied)

    def _change_is_open(self) -> bool:
        """A folder changed, and perhaps nobody saw it yet: only its manifest can tell."""
        changed = {action.epoch for action in self.actions if isinstance(action, Change)}
        return bool(changed - self.sure)

    def _replay_is_open(self) -> bool:
        """Then a folder differs from what was pinned, and may rightly stop other requests."""
        return any(verb.name == "replay" for verb in self.repeats)

    def _fault(self, kind: str) -> Fault:
        nth = self.rng.choice((1, 1, 1, 2, 2, 3, 4))
        return Fault(kind, self.rng.random(), nth)

    def _run(self, faults: tuple[Fault | None, ...]) -> None:
        run = Run(faults)
        self.actions.append(run)
        self.begun |= self.folders.keys()
        if run.plain and not self.repeats:
            self.sure |= self.folders.keys()

    # --- deliveries ---

    def _deliver_or_complete(self) -> None:
        rng = self.rng
        if self.incomplete and (not self.undelivered or rng.random() < 0.4):
            epoch = rng.choice(sorted(self.incomplete))
            first = self.incomplete.pop(epoch)
            taken = {file.name for file in first}
            more = self._new_files(epoch, rng.randint(0, 2), taken)
            self.folders[epoch] = first + more
            self.actions.append(Deliver(epoch, more, complete=True))
            return
        epoch = self.undelivered.pop(0)
        complete = rng.random() < 0.8
        files = self._new_files(epoch, rng.randint(1, 3))
        (self.folders if complete else self.incomplete)[epoch] = files
        self.actions.append(Deliver(epoch, files, complete, junk=rng.random() < 0.2))

    def _deliver_the_rest(self) -> None:
        """All, but in one world of five an incomplete folder stays incomplete for ever."""
        patience = self.rng.random() < 0.8
        while self.undelivered or (patience and self.incomplete):
            self._deliver_or_complete()

    # --- verbs ---

    def _verb(self, left: int) -> None:
        verb = self._some_verb(left)
        if verb is None:
            return self._run((None,))
        self.actions.append(verb)
        if verb.fault:
            self.repeats.append(replace(verb, files=None, fault=None))

    def _correct(self, epoch: int, left: int) -> None:
        rng = self.rng
        fault = self._fault(rng.choice(("crash", "fail"))) if left >= 2 and rng.random() < 0.4 else None
        if self.shape.selects:
            # A row that was corrected into one that `select` leaves out is known to the manifest alone:
            # when the state is lost before the repetition, it is no row any more.
            fault = None
        rows = tuple((rng.random(), self._correction()) for _ in range(rng.randint(1, 4)))
        verb = Verb("replay", epoch, None, fault, rows)
        self.actions.append(verb)
        if verb.fault:
            self.repeats.append(replace(verb, fault=None))

    def _correction(self) -> Columns | None:
        rng = self.rng
        if rng.random() < 0.15:
            return None
        self.version += 1
        new: Columns = {"name": f"corrected/v{self.version}"}
        if rng.random() < 0.5:
            new["pguid"] = None if rng.random() < 0.1 else rng.choice(self.pool)
        if rng.random() < 0.5:
            new["op"] = self._op()
        if rng.random() < 0.5:
            new["amount"] = rng.choice((None, -2.5, 7.0))
        if rng.random() < 0.5:
            new["seq"] = rng.choice((None, 1, 3))
        elif self.shape.misfits and rng.random() < 0.2:
            new["seq"] = "soon"
        return new

    def _some_verb(self, left: int) -> Verb | None:
        rng = self.rng
        busy = {verb.epoch for verb in self.repeats}
        possible = [("skip", epoch) for epoch in self.folders if epoch not in self.emptied]
        possible += [("undo", epoch) for epoch in self.sure - self.emptied]
        possible += [("replay", epoch) for epoch in self.begun for _ in range(3)]
        possible = sorted((name, epoch) for name, epoch in possible if epoch not in busy)
        if not possible:
            return None
        name, epoch = rng.choice(possible)
        fault = None
        if left >= 2 and rng.random() < 0.4:
            fault = self._fault(rng.choice(("crash", "crash", "fail")))
        files = None
        if name == "replay" and rng.random() < 0.85:
            files = self.folders[epoch] = self._changed_files(epoch)
        self.emptied = self.emptied - {epoch} if name == "replay" else self.emptied | {epoch}
        return Verb(name, epoch, files, fault)

    def _repeat(self, verb: Verb) -> None:
        self.actions.append(verb)

    def _repeat_all(self) -> None:
        while self.repeats:
            self._repeat(self.repeats.pop(0))

    # --- rows ---

    def _new_files(self, epoch: int, count: int, taken: Iterable[str] = ()) -> tuple[File, ...]:
        free = [name for name in self.shape.file_names if name not in set(taken)]
        return tuple(self._file(epoch, name) for name in self.rng.sample(free, count))

    def _file(self, epoch: int, name: str) -> File:
        empty = self.rng.random() < 0.08
        count = 0 if empty else self.rng.randint(1, self.rng.choice((4, ROWS_MAX)))
        self.version += 1
        rows = [self._row(f"{epoch}/{name}/{at}/v{self.version}") for at in range(count)]
        if rows and self.shape.mode == APPEND and self.rng.random() < 0.3:
            rows.append(rows[-1])
        return self._sound(File(name, tuple(rows), self.rng.choice((2, 5, 1000)), self._layout()))

    def _layout(self) -> Layout:
        rng, shape = self.rng, self.shape
        columns = list(shape.columns if shape.text.header else shape.declared)
        loose = shape.format != PARQUET and rng.random() < 0.4
        if not shape.drift or rng.random() < 0.4:
            return Layout(tuple(columns), loose=loose)
        lacking = rng.sample([name for name in columns if name not in ("pguid", "site")], rng.randint(0, 2))
        columns = [name for name in columns if name not in lacking]
        if rng.random() < 0.5:
            rng.shuffle(columns)
        upper = [name for name in columns if rng.random() < 0.25]
        return Layout(tuple(columns), tuple(upper), narrow=rng.random() < 0.5, loose=loose)

    def _sound(self, file: File) -> File:
        """Where rows alone say which columns and types there are, the first one says all of them."""
        if not self.shape.is_typed_by_rows:
            return file
        first, *rest = file.rows or (self._row(f"{file.name}/v{self.version}"),)
        values = {"pguid": self.pool[0], "site": 0, "op": "U", "seq": 0, "region": "north"}
        full = {name: values.get(name) if value is None else value for name, value in first.items()}
        full |= {"amount": 0.5, "updated_at": first["updated_at"] or BEGINNING}
        return replace(file, rows=(full, *rest))

    def _changed_files(self, epoch: int) -> tuple[File, ...]:
        """The folder before a replay: keys vanish, rows change, files go, come and move."""
        rng = self.rng
        gone = set(rng.sample(self.pool, rng.randint(0, len(self.pool) // 2)))
        files = []
        for file in self.folders[epoch]:
            self.version += 1
            fate = rng.random()
            if fate < 0.2 and len(self.folders[epoch]) > 1:
                continue
            if fate < 0.4:
                files.append(self._file(epoch, file.name))
            elif fate < 0.8:
                rows = [row for row in file.rows if row.get("pguid") not in gone]
                rows = [self._touched(row) if rng.random() < 0.3 else row for row in rows]
                files.append(replace(file, rows=tuple(rows)))
            else:
                files.append(file)
        if not files or rng.random() < 0.3:
            files += self._new_files(epoch, 1, {file.name for file in files})
        return tuple(self._sound(file) for file in files)

    def _touched(self, row: Columns) -> Columns:
        return {**row, "name": f"{row['name']}+v{self.version}", "op": self._op()}

    def _row(self, name: str) -> Columns:
        """`name` is unlike any other row's, so that a wrong winner shows; where equal rows mean something
        some rows repeat an earlier one."""
        rng = self.rng
        if self.said and self._equal_rows_matter() and rng.random() < ECHO_SHARE:
            return rng.choice(self.said[-ECHO_ROWS:])
        row: Columns = {"pguid": None if rng.random() < 0.04 else rng.choice(self.pool)}
        if "site" in self.shape.columns:
            row["site"] = None if rng.random() < 0.04 else rng.randint(-1, 1)
        row["op"] = self._op()
        row["seq"] = None if rng.random() < 0.2 else rng.randint(-2, 3)
        row["name"] = name
        # Text formats have no word for NaN.
        no_number = math.nan if self.shape.format == PARQUET else None
        row["amount"] = rng.choice((None, no_number, 0.1, -2.5, 1e300, float(rng.randint(0, 9))))
        at = BEGINNING + dt.timedelta(minutes=rng.randint(0, 10**6))
        row["updated_at"] = None if rng.random() < 0.1 else at
        if "region" in self.shape.columns:
            row["region"] = rng.choice(REGIONS)
        if self.shape.misfits and rng.random() < 0.1:
            return self._unfit(row)
        self.said.append(row)
        return row

    def _unfit(self, row: Columns) -> Columns:
        """No whole number where one belongs, or something that is no row."""
        rng = self.rng
        if self.shape.format == PARQUET:
            return {**row, "seq": 0.5}
        return {**row, NO_ROW: True} if rng.random() < 0.4 else {**row, "seq": rng.choice((0.5, "soon"))}

    def _equal_rows_matter(self) -> bool:
        return self.shape.mode == SCD2 or self.shape.skip_unchanged or self.shape.change_feed

    def _op(self) -> str | None:
        return self.rng.choice(("I", "U", "U", "D", None, "d"))
