"""Whether a service stays as it is under load: what it holds and how long it takes, early and late.

What is wrong comes back as a list of sentences, so that tests can also see it find fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import NamedTuple, TypeVar

WARM_UP = 0.25  # of the run: caches fill, pools grow, the allocator takes what it will need
MB = 1024 * 1024
# Of each process. A worker answers a million requests an hour here, so that sixty bytes that stay
# of each are found: less than the smallest dictionary.
MEMORY_AN_HOUR = 60 * MB
# In a run of minutes the slope alone says little: allocators take so much at a time.
MEMORY_AT_ONCE = 2 * MB
# Descriptors and threads of all processes: clients connect anew now and then.
SPARE = 4
# Times, and seconds on top, since machines are not quiet.
SLOWER = {"median": (1.25, 0.001), "p99": (1.5, 0.010)}


@dataclass(frozen=True)
class Sample:
    """What the service held, so many seconds after the load began."""

    at: float
    memory: Mapping[str, int]  # resident bytes of each process
    descriptors: int  # of all processes
    threads: int
    connections: int  # that the database counts


class Slice(NamedTuple):
    """How long the requests of a stretch of time took, in seconds."""

    at: float
    median: float
    p99: float


Timed = TypeVar("Timed", Sample, Slice)


def judge(samples: Sequence[Sample], slices: Sequence[Slice], most_connections: int) -> list[str]:
    """Return what has grown since the warm-up, or was ever too much; nothing, if all is level.

    Both are in the order of time.
    """
    return [
        *_replaced(samples),
        *_connections(samples, most_connections),
        *_memory(_warm(samples)),
        *_held(*_thirds(samples)),
        *_slower(*_thirds(slices)),
    ]


def _warm(timed: Sequence[Timed]) -> list[Timed]:
    return [one for one in timed if one.at >= WARM_UP * timed[-1].at]


def _thirds(timed: Sequence[Timed]) -> tuple[list[Timed], list[Timed]]:
    """Return the first third of what comes after the warm-up, and the last."""
    warm = _warm(timed)
    third = len(warm) // 3
    return warm[:third], warm[-third:]


def _replaced(samples: Sequence[Sample]) -> Iterator[str]:
    """Find processes that were not there all the time: a level that starts again is none."""
    everybody = {name for sample in samples for name in sample.memory}
    for name in sorted(everybody):
        present = sum(name in sample.memory for sample in samples)
        if present < len(samples):
            yield f"replaced: {name} was there {present} of {len(samples)} times"


def _connections(samples: Sequence[Sample], most: int) -> Iterator[str]:
    seen = max(sample.connections for sample in samples)
    if seen > most:
        yield f"connections: {seen}, of which there may be {most}"


def _memory(samples: Sequence[Sample]) -> Iterator[str]:
    for name in samples[0].memory:
        sizes = [(sample.at, sample.memory[name]) for sample in samples if name in sample.memory]
        slope = linear_regression(*zip(*sizes, strict=True)).slope
        grown = slope * (sizes[-1][0] - sizes[0][0])
        if slope * 3600 > MEMORY_AN_HOUR and grown > MEMORY_AT_ONCE:
            yield f"memory: {name} grew by {grown / MB:.1f} MB, {slope * 3600 / MB:.0f} MB an hour"


def _held(first: Sequence[Sample], last: Sequence[Sample]) -> Iterator[str]:
    for what in ("descriptors", "threads", "connections"):
        before, after = (median(getattr(one, what) for one in third) for third in (first, last))
        if after > before + SPARE:
            yield f"{what}: {before:g} at first, {after:g} at last"


def _slower(first: Sequence[Slice], last: Sequence[Slice]) -> Iterator[str]:
    for what, (times, more) in SLOWER.items():
        before, after = (median(getattr(one, what) for one in third) for third in (first, last))
        if after > before * times + more:
            yield f"{what}: {before * 1000:.1f} ms at first, {after * 1000:.1f} ms at last"
