"""The declarative base, and the handle on engine and session: Flask-SQLAlchemy's, or a place's."""

from __future__ import annotations

from collections.abc import Mapping

from flask import g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, MetaData
from sqlalchemy.orm import DeclarativeBase, Session

from app.place import at_hand

# Constraints are named by rule, so that a migration can name what it changes.
NAMING_CONVENTION = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class Databases(SQLAlchemy):
    """The default database, and in its place that of a tenant, from :meth:`use` on.

    ``engine`` and ``session`` mean the chosen one for as long as the application context lasts,
    which is a request or a command. What belongs to the service as a whole asks for
    ``default_engine``.
    """

    @property
    def engines(self) -> Mapping[str | None, Engine]:
        """The engine of the database that is at work, in the shape that Flask-SQLAlchemy asks for.

        It is what both ``engine`` and each session's transaction look at.
        """
        chosen = g.get(CHOSEN)
        return super().engines if chosen is None else {None: chosen}

    @property
    def default_engine(self) -> Engine:
        """The engine of the service's own database, whatever was chosen."""
        return super().engines[None]

    def use(self, engine: Engine) -> None:
        """Work on another database from now on, until the application context ends."""
        setattr(g, CHOSEN, engine)


CHOSEN = "engine_of_the_tenant"

# A read is committed, so that its connection goes back to the pool, before its records are shown.
db = Databases(model_class=Base, session_options={"expire_on_commit": False})


def current_engine() -> Engine:
    """Return the engine of the work at hand."""
    place = at_hand.get()
    return db.engine if place is None else place.engine


def default_engine() -> Engine:
    """Return the engine of the service's own database, whichever the work at hand is done on."""
    place = at_hand.get()
    return db.default_engine if place is None else place.default_engine


def current_session() -> Session:
    """Return the session of the work at hand."""
    place = at_hand.get()
    return db.session() if place is None else place.session
