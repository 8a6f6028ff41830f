"""How often a client may call, by the same settings and with the same headers as ``app.limits``."""

from __future__ import annotations

import logging
import time

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from app.config import Settings
from app.errors import RollcallError
from app.limits import REDIS_PATIENCE, too_many_requests
from app.web.problems import Problem, problem_of

logger = logging.getLogger(__name__)

LOOK_AGAIN = 30.0  # seconds until a Redis that was away is asked again


class TooManyRequests(RollcallError):
    """A client has to wait for so many seconds."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"wait for {wait:.0f} s")
        self.wait = wait


@problem_of.register
def _(error: TooManyRequests) -> Problem:
    return too_many_requests(error.wait)


class Rates:
    """Counts calls by client: in this process, or in a Redis that all have in common."""

    def __init__(self, settings: Settings) -> None:
        self._items = sorted(parse_many(settings.rate_limit))
        self._here = FixedWindowRateLimiter(MemoryStorage())
        self._shared: FixedWindowRateLimiter | None = None
        self._away_until = 0.0
        if settings.rate_limit_storage:
            storage = storage_from_string(
                f"async+{settings.rate_limit_storage}",
                implementation="redispy",
                wrap_exceptions=True,
                socket_connect_timeout=REDIS_PATIENCE,
                socket_timeout=REDIS_PATIENCE,
            )
            self._shared = FixedWindowRateLimiter(storage)

    async def count(self, client: str) -> dict[str, str]:
        """Count a call; return what to tell the client. Raises TooManyRequests."""
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                return await self._count(self._shared, client)
            except StorageError as error:
                logger.warning("rates are counted here: Redis is away: %s", error)
                self._away_until = time.monotonic() + LOOK_AGAIN
        return await self._count(self._here, client)

    async def _count(self, limiter: FixedWindowRateLimiter, client: str) -> dict[str, str]:
        for item in self._items:
            if not await limiter.hit(item, client):
                reset_at, _ = await limiter.get_window_stats(item, client)
                raise TooManyRequests(reset_at - time.time())
        return await self._told(limiter, self._items[0], client)

    async def _told(
        self, limiter: FixedWindowRateLimiter, item: RateLimitItem, client: str
    ) -> dict[str, str]:
        reset_at, remaining = await limiter.get_window_stats(item, client)
        return {
            "RateLimit-Limit": str(item.amount),
            "RateLimit-Remaining": str(remaining),
            "RateLimit-Reset": str(max(0, int(reset_at - time.time()))),
        }
