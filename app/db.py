"""The declarative base, and the handle on engine and session: Flask-SQLAlchemy's, or a place's."""

from __future__ import annotations

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


# A read is committed, so that its connection goes back to the pool, before its records are shown.
db = SQLAlchemy(model_class=Base, session_options={"expire_on_commit": False})


def current_engine() -> Engine:
    """Return the engine of the work at hand."""
    place = at_hand.get()
    return db.engine if place is None else place.engine


def current_session() -> Session:
    """Return the session of the work at hand."""
    place = at_hand.get()
    return db.session() if place is None else place.session
