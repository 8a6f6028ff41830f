"""What was measured, and the figures that are made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Load


@dataclass(frozen=True)
class Measurement:
    """One peer under one workload in one round."""

    round: int
    rows: int
    peer: str
    workload: str
    load: Load
    retries: int = 0
    fault: str = ""  # why it does not count


@dataclass(frozen=True)
class Spread:
    """A median, and the least and the most."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread | None:
    """Return the spread of some values, if there are any."""
    known = list(values)
    return Spread(statistics.median(known), min(known), max(known)) if known else None


@dataclass
class Results:
    """All of a run."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)

    def of(self, peer: str, workload: str, rows: int) -> dict[int, Measurement]:
        """Return the measurements of a peer that count, by round."""
        wanted = (peer, workload, rows)
        return {
            one.round: one
            for one in self.measurements
            if (one.peer, one.workload, one.rows) == wanted and not one.fault
        }

    def rate(self, peer: str, workload: str, rows: int) -> Spread | None:
        """Return the requests a second."""
        return spread(one.load.per_second for one in self.of(peer, workload, rows).values())

    def ratio(self, of: Sequence[Any], to: Sequence[Any]) -> Spread | None:
        """Compare two rates within each round, since all of a round share its luck."""
        numerators, denominators = self.of(*of), self.of(*to)
        return spread(
            numerators[number].load.per_second / denominators[number].load.per_second
            for number in sorted(numerators.keys() & denominators.keys())
        )

    def faults(self) -> list[str]:
        """Return what makes measurements not count, one line each."""
        return self.failures + [
            f"round {one.round}, {one.peer}, {one.workload}, {one.rows:,} rows: {one.fault}"
            for one in self.measurements
            if one.fault
        ]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path) -> Results:
    """Read what :meth:`Results.save` wrote."""
    content = json.loads(path.read_text())
    measurements = [
        Measurement(**{**one, "load": Load(**one["load"])}) for one in content.pop("measurements")
    ]
    return Results(measurements=measurements, **content)
