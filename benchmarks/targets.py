"""What Rollcall is to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.plan import MAIN_SIZE
from benchmarks.results import Results, Spread, spread

Figure = Callable[[Results], Spread | None]


@dataclass(frozen=True)
class Target:
    """A figure, and the bound that its median is to keep."""

    title: str
    figure: Figure
    bound: float
    at_least: bool = True
    unit: str = ""

    def is_reached(self, results: Results) -> bool | None:
        """Tell whether the bound is kept; None where it was not measured."""
        measured = self.figure(results)
        if measured is None:
            return None
        return measured.median >= self.bound if self.at_least else measured.median <= self.bound


def against(peer: str, workload: str, of: str = "rollcall") -> Figure:
    """Compare the requests a second of Rollcall, or of another, with a peer's."""
    ours, theirs = (of, workload, MAIN_SIZE), (peer, workload, MAIN_SIZE)
    return lambda results: results.ratio(ours, theirs)


def large_against_small(results: Results) -> Spread | None:
    """Compare new names in the large table with new names in the small one."""
    return results.ratio(("rollcall", "new", 1_000_000), ("rollcall", "new", 1_000))


def tail(results: Results) -> Spread | None:
    """Compare the slowest hundredth of new names with the median."""
    measured = results.of("rollcall", "new", MAIN_SIZE).values()
    return spread(one.load.p99 / one.load.p50 for one in measured)


def retries(results: Results) -> Spread | None:
    """Return the retries of each creation."""
    measured = results.of("rollcall", "new", MAIN_SIZE).values()
    return spread(one.retries / one.load.requests for one in measured)


def extra(kind: str, name: str) -> Figure:
    """Return a figure of the further measurements."""

    def figure(results: Results) -> Spread | None:
        value = results.extras.get(kind, {}).get(name)
        return None if value is None else spread([value])

    return figure


def start(results: Results) -> Spread | None:
    """Return the seconds of a start."""
    measured = results.extras.get("start", {})
    if "median" not in measured:
        return None
    return Spread(measured["median"], measured["min"], measured["max"])


def memory_after(requests: int, results: Results) -> float | None:
    """Return the megabytes of the largest worker."""
    found = results.extras.get("memory", {}).get(str(requests))
    return max(found) if found else None


def memory(results: Results) -> Spread | None:
    """Return the megabytes after the last request."""
    last = memory_after(100_000, results)
    return None if last is None else spread([last])


def growth(results: Results) -> Spread | None:
    """Return the megabytes that the second half of the requests added."""
    half, last = memory_after(50_000, results), memory_after(100_000, results)
    return None if half is None or last is None else spread([last - half])


TARGETS = (
    Target("new names, against Django", against("django", "new"), 1.5),
    Target("new names, against the article", against("article", "new"), 4),
    Target("new names, against FastAPI", against("fastapi", "new"), 5),
    Target("new names, awaited, against FastAPI", against("fastapi", "new", "rollcall_async"), 5),
    Target("new names, against bare", against("bare", "new"), 0.8),
    Target("existing names, against Django", against("django", "existing"), 1.5),
    Target("existing names, against bare", against("bare", "existing"), 0.8),
    Target("p99 of new names, in medians", tail, 3, at_least=False),
    Target("new names in 1,000,000 rows, against 1,000", large_against_small, 0.9),
    Target("retries per creation of a random name", retries, 0.05, at_least=False),
    Target("batches, one sender", extra("batch", "senders: 1"), 25_000, unit="rows/s"),
    Target("batches, two senders", extra("batch", "senders: 2"), 25_000, unit="rows/s"),
    Target(
        "longest single create beside two senders of lists",
        extra("beside", "longest single create in seconds"),
        1,
        at_least=False,
        unit="s",
    ),
    Target("new names with tokens, logs and metrics", extra("production", "new"), 0.85),
    Target("existing names, the same", extra("production", "existing"), 0.85),
    Target("import of a file", extra("import", "rows/s"), 25_000, unit="rows/s"),
    Target("import of `app` and create_app", start, 0.7, at_least=False, unit="s"),
    Target("memory of a worker after 100,000 requests", memory, 100, at_least=False, unit="MB"),
    # The allocator's noise is about one.
    Target("its growth over the last 50,000", growth, 2, at_least=False, unit="MB"),
    Target("report", extra("road", "report in seconds"), 30, at_least=False, unit="s"),
    Target("memory of the report", extra("road", "its MB"), 200, at_least=False, unit="MB"),
    Target("guard", extra("road", "guard in seconds"), 120, at_least=False, unit="s"),
    Target("merge", extra("road", "groups merged a second"), 500, unit="groups/s"),
    Target(
        "writers' p99 during the guard, against before",
        extra("road", "writers' p99 during the guard, against before"),
        3,
        at_least=False,
    ),
)
