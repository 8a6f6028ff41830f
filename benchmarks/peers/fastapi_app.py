"""FastAPI with async SQLAlchemy and asyncpg, put together as articles about the three advise."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ForeignKey, String, UniqueConstraint, make_url, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

engine = create_async_engine(
    make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg"),
    poolclass=AsyncAdaptedQueuePool,
    pool_size=20,
    max_overflow=10,
    pool_recycle=1800,
    pool_timeout=30,
)
async_session = async_sessionmaker(engine)
app = FastAPI()


async def get_session() -> AsyncIterator[AsyncSession]:
    """Give a request a session of its own."""
    async with async_session() as session:
        yield session


class Base(DeclarativeBase):
    pass


class Department(Base):
    __tablename__ = "department"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)


class Employee(Base):
    __tablename__ = "employee"
    __table_args__ = (UniqueConstraint("department_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    department_id: Mapped[int] = mapped_column(ForeignKey(Department.id))
    title: Mapped[str | None] = mapped_column(String(255))


class EmployeeIn(BaseModel):
    name: str = Field(min_length=1, max_length=255)
    department_id: int
    title: str | None = Field(default=None, max_length=255)


class EmployeeOut(EmployeeIn):
    model_config = ConfigDict(from_attributes=True)

    id: int


@app.post("/api/v1/employees", response_model=EmployeeOut)
async def create_employee(
    wanted: EmployeeIn, response: Response, session: Annotated[AsyncSession, Depends(get_session)]
) -> EmployeeOut:
    """Find or create an employee."""
    created = await session.scalar(
        insert(Employee)
        .values(**wanted.model_dump())
        .on_conflict_do_nothing(index_elements=["department_id", "name"])
        .returning(Employee)
    )
    employee = created or await session.scalar(
        select(Employee).filter_by(name=wanted.name, department_id=wanted.department_id)
    )
    answer = EmployeeOut.model_validate(employee)
    await session.commit()
    response.status_code = 201 if created else 200
    return answer


async def create_tables() -> None:
    """Create the tables."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


if __name__ == "__main__":
    asyncio.run(create_tables())
