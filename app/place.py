"""Where the work at hand is done, for whoever is not in one of Flask's application contexts."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session


@dataclass
class Place:
    """What a request has of its own; ``began`` is when its first unit of work did, if one has.

    ``engine`` is of the database that is at work, ``default_engine`` of the service's own.
    """

    settings: Any
    default_engine: Engine
    began: float | None = None
    _session: Session | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.engine = self.default_engine

    @property
    def session(self) -> Session:
        """The session of the work, made for who asks for it: get_or_create needs none."""
        self._session = self._session or Session(self.engine, expire_on_commit=False)
        return self._session

    def use(self, engine: Engine) -> None:
        """Work on another database from now on; to be told before the session is asked for."""
        self.engine = engine

    def close(self) -> None:
        """Close the session, if there is one."""
        if self._session is not None:
            self._session.close()


at_hand: ContextVar[Place | None] = ContextVar("at_hand", default=None)
