"""What it costs to be locked and observed: Rollcall with tokens, logs and metrics, and without."""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.measure import Bench
from benchmarks.plan import MAIN_SIZE
from benchmarks.processes import run
from benchmarks.roster import PEERS, Peer, program
from benchmarks.services import Service, serving

LOCKED = replace(PEERS["rollcall"], name="rollcall_locked")
PLAIN = replace(
    PEERS["rollcall"],
    name="rollcall_plain",
    command=[program("gunicorn"), "benchmarks.peers.unobserved:app"],
)
WORKLOADS = ("new", "existing")
SECONDS = 2.0


class Production(Bench):
    """Measures the two side by side, in turn, so that both share the machine's moods."""

    def compare(self) -> dict[str, float]:
        """Return the rate with everything on, in parts of that without, by workload."""
        with ExitStack() as stack:
            locked = self._serve(stack, LOCKED, is_locked=True)
            plain = self._serve(stack, PLAIN, is_locked=False)
            return {
                workload: statistics.median(
                    self._rate(locked, workload) / self._rate(plain, workload)
                    for _ in range(self.plan.turns)
                )
                for workload in WORKLOADS
            }

    def _serve(self, stack: ExitStack, peer: Peer, is_locked: bool) -> Service:
        database = str(stack.enter_context(self.databases.copy(peer, MAIN_SIZE)))
        url = self.databases.url(database)
        environment = {"LOG_LEVEL": "WARNING"}
        token = None
        if is_locked:
            arguments = ("tokens", "create", "bench", "--scope=write")
            command = [program("flask"), "--app=wsgi", *arguments]
            token = run(command, {**os.environ, "DATABASE_URL": url}).strip()
            environment = {"LOG_LEVEL": "INFO", "ROLLCALL_AUTH": "token"}
        log = self.folder / f"{peer.name}.log"
        return stack.enter_context(serving(peer, url, database, log, token, **environment))

    def _rate(self, service: Service, workload: str) -> float:
        return self.load(service, workload, SECONDS).per_second
