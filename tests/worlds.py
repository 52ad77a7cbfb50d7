"""Property test: random seeded worlds of deliveries, verbs, crashes and lost state, played
against the real binary; after that main must be what the oracle says.

Owns: the command line, the jobs, the report.
Never: knows what an action does (`worlds_drive`), or what must hold (`worlds_check`).

    python tests/worlds.py --binary PATH --count 100 --seed-base 1 --jobs 2
    python tests/worlds.py --binary PATH --only 17 --keep DIR      one world, its folder kept
    python tests/worlds.py --binary PATH --cluster --count 30      each run is a coordinator and two workers
    python tests/worlds.py --count 3 --list                        the plans, nothing is run
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from worlds_cluster import ClusterPlayer, services_of_environment
from worlds_drive import Outcome, WorldFailed, crash_points, play_world
from worlds_plan import Plan, describe, make_plan


def main(argv: list[str] | None = None) -> int:
    """Exit 0 when every world passed, 1 when one failed, 2 for a wrong command line."""
    args = _arguments(argv)
    seeds = range(args.seed_base, args.seed_base + args.count)
    if args.only is not None:
        seeds = range(args.only, args.only + 1)
    if args.list:
        for seed in seeds:
            print("\n".join(_told(make_plan(seed))))
        return 0
    binary = Path(args.binary).resolve()
    try:
        points = crash_points(binary)
    except (OSError, WorldFailed) as error:
        print(f"worlds: {args.binary}: {error}")
        return 1
    return _play_all(args, binary, points, seeds)


def _play_all(args: argparse.Namespace, binary: Path, points: list[str], seeds: range) -> int:
    services = services_of_environment() if args.cluster else None
    make = functools.partial(ClusterPlayer, services=services) if services else None
    passed = failed = invocations = 0
    killed: set[str] = set()
    lost: dict[int, int] = {}
    home = Path(args.keep or tempfile.mkdtemp(prefix="worlds-")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    try:
        for outcome in _outcomes(binary, points, home, seeds, args.jobs, make):
            invocations += outcome.invocations
            killed |= outcome.points_killed
            for code, count in outcome.replies_lost.items():
                lost[code] = lost.get(code, 0) + count
            if not outcome.failure:
                passed += 1
            else:
                failed += 1
                print("\n".join(_report(outcome, args.binary)), flush=True)
            if not outcome.failure and args.only is None:
                shutil.rmtree(_home_of(home, outcome.plan.seed), ignore_errors=True)
    finally:
        if services:
            services.stop()
        if not args.keep:
            shutil.rmtree(home, ignore_errors=True)
    print(f"{invocations} processes; {len(killed)} of {len(points)} crash points killed one")
    if unreached := [point for point in points if point not in killed]:
        print(f"crash points that killed nobody: {', '.join(unreached)}")
    answers = ", ".join(f"exit {code}: {count}" for code, count in sorted(lost.items()))
    print(f"processes set to lose a reply: {answers or 'none'}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _outcomes(
    binary: Path, points: list[str], home: Path, seeds: range, jobs: int, make: Callable | None
) -> Iterator[Outcome]:
    """Outcomes as they come. At most a few worlds wait, however many are asked for."""
    with ThreadPoolExecutor(jobs) as pool:
        todo = iter(seeds)
        running = set()
        while True:
            while len(running) < 2 * jobs and (seed := next(todo, None)) is not None:
                place = _home_of(home, seed)
                shutil.rmtree(place, ignore_errors=True)
                running.add(pool.submit(play_world, make_plan(seed), binary, points, place, make))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _home_of(home: Path, seed: int) -> Path:
    return home / f"world-{seed}"


def _told(plan: Plan) -> list[str]:
    actions = [describe(action, []) for action in plan.actions]
    return [
        f"seed {plan.seed}: {plan.shape}",
        *(f"  {at:2} {a}" for at, a in enumerate(actions, 1)),
    ]


def _report(outcome: Outcome, binary: str) -> list[str]:
    plan = outcome.plan
    return [
        f"--- seed {plan.seed} failed: {plan.shape}",
        *(f"  {at:2} {line}" for at, line in enumerate(outcome.history, 1)),
        "differences:",
        *(f"  {line}" for line in outcome.failure),
        "stderr of the last processes:",
        *(f"  {line}" for line in outcome.stderr),
        f"again: python tests/worlds.py --binary {binary} --only {plan.seed} --keep DIR",
        "",
    ]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worlds.py", description="Random worlds, one rule.")
    parser.add_argument("--binary", help="the alluvium binary")
    parser.add_argument("--count", type=int, default=20, help="how many worlds")
    parser.add_argument("--seed-base", type=int, default=1, help="seed of the first world")
    parser.add_argument("--jobs", type=int, default=2, help="worlds at the same time")
    parser.add_argument("--keep", help="play in this folder and keep the failed worlds")
    parser.add_argument("--only", type=int, metavar="SEED", help="one world, kept with --keep")
    parser.add_argument("--cluster", action="store_true", help="play on RabbitMQ and Redis")
    parser.add_argument("--list", action="store_true", help="print the plans and run nothing")
    args = parser.parse_args(argv)
    if not args.list and not args.binary:
        parser.error("--binary is needed unless --list is given")
    return args


if __name__ == "__main__":
    sys.exit(main())
