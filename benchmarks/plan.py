"""What one run measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.roster import PEERS

# In this order on a fresh copy of the tables: the first two leave them as they are.
WORKLOADS = ("existing", "hot", "mixed", "new")
MAIN_SIZE = 100_000
EXTRAS = ("batch", "beside", "production", "import", "start", "memory", "road")


@dataclass(frozen=True)
class Plan:
    """Peers in turn, so many rounds; times in seconds."""

    peers: Sequence[str]
    workloads: Mapping[int, Sequence[str]]  # by the number of rows, the main one last
    rounds: int
    seconds: float
    warm_up: float
    extras: Sequence[str]
    batches: int  # of a thousand employees each, for each number of senders
    beside: float  # seconds of lists and single creates at once
    turns: int  # of each of two services, side by side
    import_rows: int
    road_rows: int
    memory_requests: Sequence[int]  # of each worker, after which its memory is looked at
    starts: int

    def visits(self) -> Iterator[tuple[int, int, str]]:
        """Yield round, rows and peer: a round has every peer, and each begins with another.

        One without tables is there once a round.
        """
        once = list(self.workloads)[-1]
        for number in range(1, self.rounds + 1):
            first = (number - 1) % max(1, len(self.peers))
            for rows in self.workloads:
                for peer in (*self.peers[first:], *self.peers[:first]):
                    if PEERS[peer].layout is not None or rows == once:
                        yield number, rows, peer


FULL = Plan(
    peers=tuple(PEERS),
    # The small and the large table side by side: they are compared.
    workloads={1_000: ("existing", "new"), 1_000_000: ("existing", "new"), MAIN_SIZE: WORKLOADS},
    rounds=3,
    seconds=3,
    warm_up=1,
    extras=EXTRAS,
    batches=100,
    beside=10,
    turns=9,
    import_rows=300_000,
    road_rows=1_000_000,
    memory_requests=(10_000, 50_000, 100_000),
    starts=5,
)
# Two minutes in all.
QUICK = Plan(
    peers=tuple(PEERS),
    workloads={MAIN_SIZE: ("existing", "new")},
    rounds=1,
    seconds=2,
    warm_up=1,
    extras=EXTRAS,
    batches=20,
    beside=3,
    turns=3,
    import_rows=30_000,
    road_rows=20_000,
    memory_requests=(1_000, 2_000),
    starts=3,
)
