"""Plays a world on a cluster: each run is a coordinator that drains, beside two workers.

Owns: which process a fault strikes, the processes of a run, emptying Redis after a coordinator's death.
Calls: `worlds_drive` for everything else. Never: decides what happens, or what must hold.
"""

from __future__ import annotations

import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import redis

from services import Services, free_port
from worlds_drive import KILLED, TIMEOUT_SECONDS, Player, WorldFailed, code_by, tails
from worlds_plan import Fault

WORKERS = 2
# Points that only a coordinator passes; workers pass the others.
OF_COORDINATORS = (
    "manifest.", "request.", "task.before_publish", "task.after_publish", "ledger.", "hold.",
    "result.before_ack", "alerts.", "alert.", "hook.",
)  # fmt: skip


@dataclass
class ClusterPlayer(Player):
    """A player whose runs are a cluster's."""

    services: Services | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = f"w{uuid.uuid4().hex[:12]}"
        path = self.home / "alluvium.toml"
        path.write_text(
            path.read_text() + f"""
[cluster]
amqp = "{self.services.rabbitmq.url}"
redis = "{self.services.redis.url}"
name = "{self.name}"
listen = "127.0.0.1:{free_port()}"
"""
        )

    def _invoke(self, calls, env) -> None:
        """Verbs leave their request; then, as for a run, everything ready is drained."""
        faults = [fault for _, fault in calls]
        for args, _ in calls:
            if args[0] != "run":
                super()._invoke([(args, None)], env)
        self._drain([fault for fault in faults if fault], coordinators=len(calls))

    def _drain(self, faults: list[Fault], coordinators: int) -> None:
        of_coordinators = [f for f in faults if f.point(self.points).startswith(OF_COORDINATORS)]
        of_workers = [f for f in faults if f not in of_coordinators]
        workers = [
            self._begin(["worker", "--slots", str(self.shape.slots)], fault)
            for fault in _filled(of_workers, WORKERS)
        ]
        leaders = [
            self._begin(["coordinator", "--once"], fault)
            for fault in _filled(of_coordinators, coordinators)
        ]
        deadline = time.monotonic() + TIMEOUT_SECONDS
        codes = [(code_by(deadline, process), fault) for process, fault, _ in leaders]
        for process, _, _ in workers:
            process.send_signal(signal.SIGTERM)
        ended = [(code_by(time.monotonic() + 60, process), fault) for process, fault, _ in workers]
        self.outcome.stderr = tails([log for _, _, log in leaders + workers])
        told = " and ".join(str(code) for code, _ in codes + ended)
        self.outcome.history[-1] += f" -> cluster: {told}"
        for code, fault in codes + ended:
            self._count(code, fault)
        if KILLED in [code for code, _ in codes]:
            # Its lead would be waited for; and losing what Redis knows must not matter.
            with redis.Redis.from_url(self.services.redis.url) as client:
                for key in client.scan_iter(f"{{{self.name}}}:*"):
                    client.delete(key)
        wrong = [
            f"coordinator: {code}, expected one of {sorted(self._accepted(fault))}"
            for code, fault in codes
            if code not in self._accepted(fault)
        ]
        # A lost reply at a worker is a result like any other: the worker goes on.
        wrong += [
            f"worker: {code}"
            for code, fault in ended
            if code not in ({0, KILLED} if fault and fault.kind == "crash" else {0})
        ]
        if wrong:
            raise WorldFailed(wrong)

    def _begin(
        self, args: list[str], fault: Fault | None
    ) -> tuple[subprocess.Popen, Fault | None, Path]:
        self.outcome.invocations += 1
        log = self.home / "logs" / f"{self.outcome.invocations:02}-{args[0]}"
        return self._start(args, log, self._fault_env(fault)), fault, log.with_suffix(".stderr")


def _filled(faults: list[Fault], count: int) -> list[Fault | None]:
    """As many as there are processes, at least one process a fault."""
    return [*faults, *[None] * max(0, count - len(faults))]


def services_of_environment() -> Services:
    """Started here, unless ALLUVIUM_TEST_AMQP and ALLUVIUM_TEST_REDIS name others."""
    services = Services()
    services.rabbitmq.start()
    services.redis.start()
    return services
