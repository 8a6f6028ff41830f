"""Cancel a task wherever it waits: at its first await, at its second, and so on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class CancelledAt:
    """Awaits a coroutine, and cancels the task as often as is said from the given await on."""

    def __init__(self, work: Coroutine[Any, Any, Any], number: int, times: int = 1) -> None:
        self.work = work
        self.number = number
        self.times = times
        self.awaits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        raised: BaseException | None = None
        while True:
            try:
                waited_for = self.work.send(None) if raised is None else self.work.throw(raised)
            except StopIteration as done:
                return done.value
            raised = None
            if self.number <= self.awaits < self.number + self.times:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            self.awaits += 1
            try:
                yield waited_for
            except BaseException as error:  # the coroutine's to deal with
                raised = error


async def is_cancelled_at(work: Coroutine[Any, Any, Any], number: int, times: int = 1) -> bool:
    """Return False where the work was done before it was to be cancelled."""
    cancelled = CancelledAt(work, number, times)

    async def wait() -> None:
        await cancelled

    task = asyncio.ensure_future(wait())
    await asyncio.wait({task})
    return cancelled.awaits > number
