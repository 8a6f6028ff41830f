"""The models of another application, which took the mixin."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Dialect, Sequence, String, TypeDecorator, func
from sqlalchemy.dialects.postgresql import ARRAY, CITEXT, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.get_or_create import GetOrCreateMixin


class Own(DeclarativeBase):
    """The models of another application."""


numbers = iter(range(100))


class Tag(GetOrCreateMixin, Own):
    """A nullable key, every kind of column default, and an attribute that is named otherwise."""

    __tablename__ = "tag"
    __natural_key__ = ("scope", "label")

    id: Mapped[int] = mapped_column(primary_key=True)
    scope: Mapped[str | None] = mapped_column("scope_name", String(50))
    label: Mapped[int]
    scalar: Mapped[str] = mapped_column(default="fixed")
    called: Mapped[int] = mapped_column(default=lambda: next(numbers))
    expression: Mapped[datetime] = mapped_column(default=func.to_timestamp(0))
    numbered: Mapped[int] = mapped_column(Sequence("tag_numbers", metadata=Own.metadata))
    served: Mapped[str] = mapped_column(server_default="server")
    color: Mapped[str] = mapped_column(unique=True, default=lambda: uuid.uuid4().hex)


class Legacy(GetOrCreateMixin, Own):
    """A table in a schema, with a key of another name and type, and a column that is not mapped."""

    __tablename__ = "legacy"
    __table_args__ = {"schema": "old"}  # noqa: RUF012 - SQLAlchemy's convention
    __natural_key__ = ("name",)

    key: Mapped[uuid.UUID] = mapped_column("legacy_key", primary_key=True, default=uuid.uuid4)
    name: Mapped[str]
    duplicate_of_id: Mapped[uuid.UUID | None]


Legacy.__table__.append_column(Column("unmapped", String))  # type: ignore[attr-defined]


class Fussy(GetOrCreateMixin, Own):
    """A default that reads its context, which get_or_create has none of."""

    __tablename__ = "fussy"
    __natural_key__ = ("name",)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    copied: Mapped[str] = mapped_column(default=lambda context: context.get_current_parameters())


class Badge(GetOrCreateMixin, Own):
    """A key that the database compares in its own way, under names that a statement might use."""

    __tablename__ = "item"
    __natural_key__ = ("label", "position")

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(CITEXT)
    position: Mapped[str] = mapped_column(String(5, collation="C"))


class Stamp(GetOrCreateMixin, Own):
    """A key that is no text, and columns that the driver has its own way with."""

    __tablename__ = "stamp"
    __natural_key__ = ("at",)

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime | None]
    blob: Mapped[bytes]
    notes: Mapped[dict[str, Any]] = mapped_column(JSONB)


class LowerCase(TypeDecorator[str]):
    """A type that stores what it is given in another way."""

    impl = String(50)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return str(value).lower()


class Car(GetOrCreateMixin, Own):
    """A key that is called as the mixin calls what it works on."""

    __tablename__ = "car"
    __natural_key__ = ("model",)

    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str]


class Basket(GetOrCreateMixin, Own):
    """A column that is an array."""

    __tablename__ = "basket"
    __natural_key__ = ("label",)

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(LowerCase)
    fruits: Mapped[list[str] | None] = mapped_column(ARRAY(String))
