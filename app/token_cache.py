"""What a process remembers of tokens for some seconds, so as not to look them up each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from threading import Lock

from cachetools import LRUCache, TLRUCache, TTLCache

from app.tokens import Found, Token, digest

LIFETIME = 5.0
"""Seconds until a token is looked up again: how long one works at most after it was revoked."""

MOST = 1024
"""Tokens that are remembered, and as many that are none: a flood of those evicts no good one."""


class TokenCache:
    """Checks tokens. ``find`` looks one up by its SHA-256, ``note_use`` writes that it was used."""

    def __init__(
        self,
        find: Callable[[bytes], Found | None],
        note_use: Callable[[Found], None],
        lifetime: float = LIFETIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._note_use = note_use
        self._lifetime = lifetime
        self._clock = clock
        self._lock = Lock()
        self._good: TLRUCache[bytes, tuple[Token, float]] = TLRUCache(
            MOST, lambda sha, entry, now: entry[1], clock
        )
        self._bad: TTLCache[bytes, bool] = TTLCache(MOST, lifetime, clock)
        self._noted: LRUCache[int, date] = LRUCache(MOST)

    def check(self, presented: str) -> Token | None:
        """Return the token that was presented, None where it is not valid; raise what find does."""
        sha = digest(presented)
        if sha is None:
            return None
        with self._lock:
            if (entry := self._good.get(sha)) is not None:
                return entry[0]
            if sha in self._bad:
                return None
        return self._look_up(sha)

    def _look_up(self, sha: bytes) -> Token | None:
        asked = self._clock()  # what is found may be out of date by the time it is
        found = self._find(sha)
        with self._lock:
            if found is None:
                self._bad[sha] = True
                return None
            until = asked + min(self._lifetime, found.remaining)
            self._good[sha] = (found.token, until)
            is_news = found.today not in (found.last_used_on, self._noted.get(found.token.id))
            self._noted[found.token.id] = found.today
        if is_news:
            self._note_use(found)
        return found.token
