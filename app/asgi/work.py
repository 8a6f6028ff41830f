"""How work that is written to block is done here: in a greenlet, at the request's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine

from app import tokens
from app.aio import perform
from app.config import Settings
from app.engines import TenantEngines
from app.place import Place, at_hand
from app.token_cache import TokenCache

Result = TypeVar("Result")
Subject = TypeVar("Subject")


@contextmanager
def at(place: Place) -> Iterator[Place]:
    """Have the body's work done at a place."""
    before = at_hand.set(place)
    try:
        yield place
    finally:
        at_hand.reset(before)
        place.close()


@dataclass
class Work:
    """An application's settings, engine and tenants, and what it remembers of tokens."""

    settings: Settings
    engine: Engine
    tenants: TenantEngines

    def __post_init__(self) -> None:
        self._tokens = TokenCache(self._alone(tokens.find), self._alone(tokens.note_use))

    async def do(self, work: Callable[[], Result], tenant: str | None = None) -> Result:
        """Do some work with a session of its own, on a tenant's database if one is named.

        Raises TenantUnknown.
        """
        return await perform(lambda: self._there(work, tenant))

    async def check(self, presented: str) -> tokens.Token | None:
        """Return the token that was presented; None where it is not valid."""
        return await perform(lambda: self._tokens.check(presented))

    def _there(self, work: Callable[[], Result], tenant: str | None = None) -> Result:
        with at(Place(self.settings, self.engine)) as place:
            if tenant is not None:
                place.use(self.tenants.of(tenant))
            return work()

    def _alone(self, look: Callable[[Subject], Result]) -> Callable[[Subject], Result]:
        """Have a look at the database done with a session of its own."""
        return lambda subject: self._there(lambda: look(subject))
