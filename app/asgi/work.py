"""How work that is written to block is done here: in a greenlet, at the request's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app import tokens
from app.aio import perform
from app.config import Settings
from app.engines import TenantEngines
from app.place import Place, at_hand
from app.token_cache import TokenCache

Result = TypeVar("Result")
Subject = TypeVar("Subject")


@contextmanager
def at(place: Place) -> Iterator[None]:
    """Have the body's work done at a place."""
    before = at_hand.set(place)
    try:
        yield
    finally:
        at_hand.reset(before)


@dataclass
class Work:
    """An application's settings, engine and tenants, and what it remembers of tokens."""

    settings: Settings
    engine: Engine
    tenants: TenantEngines

    def __post_init__(self) -> None:
        self._tokens = TokenCache(self._alone(tokens.find), self._alone(tokens.note_use))

    async def do(
        self, work: Callable[[], Result], session: Session, tenant: str | None = None
    ) -> Result:
        """Do some work with a session, on a tenant's database if one is named.

        Raises TenantUnknown.
        """
        place = Place(self.settings, self.engine, session)

        def there() -> Result:
            with at(place):
                if tenant is not None:
                    place.use(self.tenants.of(tenant))
                return work()

        return await perform(there)

    async def do_alone(self, work: Callable[[], Result]) -> Result:
        """Do some work with a session of its own."""
        return await perform(lambda: self._alone(lambda subject: work())(None))

    async def check(self, presented: str) -> tokens.Token | None:
        """Return the token that was presented; None where it is not valid."""
        return await perform(lambda: self._tokens.check(presented))

    def _alone(self, look: Callable[[Subject], Result]) -> Callable[[Subject], Result]:
        """Have a look at the database done with a session of its own."""

        def alone(subject: Subject) -> Result:
            with (
                Session(self.engine, expire_on_commit=False) as session,
                at(Place(self.settings, self.engine, session)),
            ):
                return look(subject)

        return alone
