"""Long work in parts, several of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items, so many at a time."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], size: int, workers: int
) -> Generator[Result]:
    """Yield what the work makes of each item, in their order, while threads go on with the next.

    A thread does so many items in succession: neighbours would be in each other's way. When the
    caller stops, or an item fails, the items under way are finished first.
    """
    stopping = Event()

    def do(part: list[Item]) -> list[Result]:
        return [work(item) for item in takewhile(lambda _: not stopping.is_set(), part)]

    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[list[Result]]] = deque()
        try:
            for part in in_parts(items, size):
                under_way.append(pool.submit(do, part))
                if len(under_way) > workers:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        finally:
            stopping.set()
