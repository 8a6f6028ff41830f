"""The judge of make soak's long load finds what grows, and nothing where all is level."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.steadiness import MB, Sample, Slice, judge

HALF_AN_HOUR = 1800
LEVEL = Sample(0, {"master": 60 * MB, "worker 1": 80 * MB}, 60, 16, 8)

Change = Callable[[Sample], Sample]


def samples(change: Change = lambda sample: sample, seconds: int = HALF_AN_HOUR) -> list[Sample]:
    """Return a sample for each second, of a service that warms up and then breathes a little."""
    dice = random.Random(1)  # noqa: S311 - dice, not a secret
    found = []
    for at in range(seconds):
        cold = max(0, seconds // 5 - at) * MB // 10
        memory = {name: size - cold + dice.randrange(MB) for name, size in LEVEL.memory.items()}
        descriptors = LEVEL.descriptors + dice.randrange(3)
        found.append(change(replace(LEVEL, at=at, memory=memory, descriptors=descriptors)))
    return found


def slices(median: float = 0.0, p99: float = 0.0) -> list[Slice]:
    """Return how long requests took, every ten seconds; in the end so much longer."""
    dice = random.Random(2)  # noqa: S311 - dice, not a secret
    return [
        Slice(
            at,
            share * median + 0.004 + dice.random() / 1000,
            share * p99 + 0.02 + dice.random() / 100,
        )
        for at in range(0, HALF_AN_HOUR, 10)
        for share in [at / HALF_AN_HOUR]
    ]


def leaking(bytes_a_second: int, process: str = "worker 1") -> Change:
    """Have a process keep some of what it takes."""

    def grown(sample: Sample) -> Sample:
        size = sample.memory[process] + int(sample.at) * bytes_a_second
        return replace(sample, memory={**sample.memory, process: size})

    return grown


def kinds(found: list[str]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in found]


@pytest.mark.parametrize("seconds", [HALF_AN_HOUR, 120])
def test_a_level_service_is_found_so(seconds: int) -> None:
    """What it takes to warm up is no growth, and neither is what comes and goes."""
    assert judge(samples(seconds=seconds), slices(), 8) == []


def test_a_worker_that_dies_is_no_level_service() -> None:
    """Its successor begins with little memory, which would hide what leaked."""

    def replaced(sample: Sample) -> Sample:
        name = "worker 1" if sample.at < 900 else "worker 2"
        return replace(sample, memory={"master": 60 * MB, name: 80 * MB})

    found = judge(samples(replaced), slices(), 8)
    assert found == [
        "replaced: worker 1 was there 900 of 1800 times",
        "replaced: worker 2 was there 900 of 1800 times",
    ]


@pytest.mark.parametrize("process", ["master", "worker 1"])
def test_a_hundred_bytes_of_each_request_are_a_leak(process: str) -> None:
    """At three hundred requests a second: in half an hour, and in six minutes."""
    for seconds in (HALF_AN_HOUR, 360):
        [found] = judge(samples(leaking(30_000, process), seconds), slices(), 8)
        assert found.startswith(f"memory: {process} grew by ")


def test_one_connection_too_many_is_found() -> None:
    """However short it was there."""
    found = judge(samples(lambda one: replace(one, connections=8 + (one.at == 7))), slices(), 8)
    assert found == ["connections: 9, of which there may be 8"]


def test_what_is_never_closed_is_found() -> None:
    """One in a minute, of each kind."""

    def growing(sample: Sample) -> Sample:
        more = int(sample.at) // 60
        held = {"descriptors": 60, "threads": 16, "connections": 8}
        return replace(sample, **{name: number + more for name, number in held.items()})

    found = judge(samples(growing), slices(), 100)
    assert kinds(found) == ["descriptors", "threads", "connections"]


@pytest.mark.parametrize(("more", "what"), [({"median": 0.006}, "median"), ({"p99": 0.2}, "p99")])
def test_a_service_that_slows_down_is_found_out(more: dict[str, float], what: str) -> None:
    """In the middle of its requests, or in its slowest."""
    assert kinds(judge(samples(), slices(**more), 8)) == [what]
