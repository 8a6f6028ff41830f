"""Departments and employees. Natural keys are declared here, once."""

from __future__ import annotations

from datetime import date, datetime

from sqlalchemy import BigInteger, DateTime, ForeignKey, Identity, String, func
from sqlalchemy.orm import Mapped, declared_attr, mapped_column, relationship

from app.aio import AsyncGetOrCreate
from app.db import db

NAME_LENGTH = 255
TITLE_LENGTH = 255
EMAIL_LENGTH = 320


class Record(AsyncGetOrCreate, db.Model):  # type: ignore[misc,name-defined]
    """What both tables have: an id, a name, the mixin's columns, and when it was made and changed.

    The times are NULL in rows older than the adoption of their table.
    """

    __abstract__ = True
    __bookkeeping__ = ("created_at", "updated_at")
    # Fetch what the database sets on UPDATE with the UPDATE: the instance outlives its session.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 - SQLAlchemy's own convention

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))

    @declared_attr
    def duplicate_of_id(cls) -> Mapped[int | None]:
        return mapped_column(ForeignKey(f"{cls.__tablename__}.id"))

    created_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )
    updated_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), onupdate=func.now()
    )


class Department(Record):
    __tablename__ = "department"
    __natural_key__ = ("name",)

    employees: Mapped[list[Employee]] = relationship(
        back_populates="department", cascade="all, delete-orphan", passive_deletes=True
    )


class Employee(Record):
    __tablename__ = "employee"
    __natural_key__ = ("department_id", "name")

    department_id: Mapped[int] = mapped_column(ForeignKey("department.id", ondelete="CASCADE"))
    title: Mapped[str | None] = mapped_column(String(TITLE_LENGTH))
    email: Mapped[str | None] = mapped_column(String(EMAIL_LENGTH))
    hired_on: Mapped[date | None]
    manager_id: Mapped[int | None] = mapped_column(ForeignKey("employee.id", ondelete="SET NULL"))

    department: Mapped[Department] = relationship(back_populates="employees")


RECORDS: tuple[type[Record], ...] = (Department, Employee)
NATURAL_KEYS = {model.__tablename__: model.__natural_key__ for model in RECORDS}
