"""Put load on a service, with wrk."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, run
from benchmarks.roster import PROJECT

CONNECTIONS = 16
BURST = 2  # seconds; what is under way at its end does not count, so not much less
ERRORS = ("status", "connect", "read", "write", "timeout")
SCRIPT = PROJECT / "benchmarks" / "load.lua"


@dataclass(frozen=True)
class Load:
    """What came of some seconds of load; latencies in milliseconds."""

    requests: int
    seconds: float
    p50: float
    p90: float
    p99: float
    max: float
    errors: dict[str, int]

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


def require_wrk() -> str:
    """Return wrk's path."""
    found = shutil.which("wrk")
    if found is None:
        raise BenchmarkError("wrk is missing: install the Debian package wrk (apt install wrk)")
    return found


def wrk(url: str, workload: str, names: Path, seconds: float, token: str | None = None) -> Load:
    """Send requests for some seconds, on connections that are kept where the server keeps them.

    In bursts, each on new connections. A connection belongs to the worker process that accepted it,
    and which one does is luck: not seldom one process gets all of them, and half of the speed.
    """
    length = min(BURST, max(1, round(seconds)))  # wrk takes no fractions
    number = max(1, round(seconds / length))
    return summed([burst(url, workload, names, length, token) for _ in range(number)])


def summed(bursts: Sequence[dict[str, Any]]) -> Load:
    """Return what came of several bursts together."""
    latencies = [
        milliseconds
        for one in bursts
        for microseconds, count in one["latencies"]
        for milliseconds in [microseconds / 1000] * count
    ]
    return Load(
        requests=sum(one["requests"] for one in bursts),
        seconds=sum(one["seconds"] for one in bursts),
        errors={kind: sum(one["errors"][kind] for one in bursts) for kind in ERRORS},
        **percentiles(latencies),
    )


def percentiles(latencies: Iterable[float]) -> dict[str, float]:
    """Return p50, p90, p99 and max."""
    ordered = sorted(latencies) or [0.0]
    found = {f"p{rank}": ordered[len(ordered) * rank // 100] for rank in (50, 90, 99)}
    return {**found, "max": ordered[-1]}


def burst(
    url: str, workload: str, names: Path, seconds: int, token: str | None = None
) -> dict[str, Any]:
    """Run wrk once, with one thread: it can send far more than any of the services answers."""
    said = run(
        [
            require_wrk(),
            "--threads=1",
            f"--connections={CONNECTIONS}",
            f"--duration={seconds}s",
            "--timeout=30s",
            f"--script={SCRIPT}",
            url,
            "--",
            workload,
            str(names),
            str(secrets.randbits(31)),
            *([] if token is None else [token]),
        ]
    )
    results = [line for line in said.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise BenchmarkError(f"wrk said nothing of its result: {said}")
    result: dict[str, Any] = json.loads(results[0].removeprefix("RESULT "))
    return result
