"""Where the work at hand is done, for whoever is not in one of Flask's application contexts."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
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
    session: Session
    began: float | None = None

    def __post_init__(self) -> None:
        self.engine = self.default_engine

    def use(self, engine: Engine) -> None:
        """Work on another database from now on."""
        self.engine = self.session.bind = engine


at_hand: ContextVar[Place | None] = ContextVar("at_hand", default=None)
