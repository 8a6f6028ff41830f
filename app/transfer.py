"""Employees from CSV files and to them, streamed: memory does not grow with the file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO, TypeVar

from marshmallow import ValidationError
from sqlalchemy import Executable, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased

from app import directory
from app.csv_source import CsvSource, Row
from app.db import db
from app.errors import NotStored, UnusableFile
from app.models import Department, Employee
from app.schemas import LONGEST_BATCH, ImportedEmployeeSchema, messages_by_field
from app.transactions import connect, sqlstate

REQUIRED = ("name", "department")
# Data exceptions, integrity constraints, check options of views, exceptions of triggers: it is the
# row that is refused (manual, appendix A).
REFUSALS = frozenset({"22", "23", "44", "P0"})

Part = TypeVar("Part")
Result = TypeVar("Result")

schema = ImportedEmployeeSchema()


class Candidate(NamedTuple):
    """A row that is fit to be stored, and what it says."""

    row: Row
    item: Mapping[str, Any]


class Refusal(NamedTuple):
    """A row that is not stored, and why."""

    row: Row
    reason: str


@dataclass
class Totals:
    """What has become of the rows so far."""

    read: int = 0
    created: int = 0
    existing: int = 0
    rejected: int = 0

    def count(self, outcomes: Sequence[bool | Refusal]) -> None:
        """Add rows that were created (True), were there (False), or were refused."""
        rejected = sum(isinstance(outcome, Refusal) for outcome in outcomes)
        created = sum(outcome is True for outcome in outcomes)
        self.read += len(outcomes)
        self.created += created
        self.existing += len(outcomes) - created - rejected
        self.rejected += rejected


def import_employees(source: CsvSource, reject: Callable[[Refusal], object]) -> Iterator[Totals]:
    """Get or create the employee of each row; yield the totals after each transaction.

    A row that cannot be stored goes to ``reject`` and does not hold up the others. Raises
    UnusableFile, ContentionError, and the driver's error for one that is no row's fault: what the
    totals count is stored then, and running it all again does no harm.
    """
    totals = Totals()
    for outcomes in _ahead(_store, _checked(source)):
        for outcome in outcomes:
            if isinstance(outcome, Refusal):
                reject(outcome)
        totals.count(outcomes)
        yield totals


def _ahead(work: Callable[[Part], Result], parts: Iterator[Part]) -> Iterator[Result]:
    """Yield what the work makes of each part, and get the next part ready meanwhile.

    An error of getting one ready is raised when the parts before it are done.
    """
    with ThreadPoolExecutor(1) as pool:
        fault: Exception | None = None
        part = next(parts, None)
        while part is not None:
            under_way = pool.submit(copy_context().run, work, part)
            try:
                part = next(parts, None)
            except UnusableFile as error:
                part, fault = None, error
            yield under_way.result()
        if fault is not None:
            raise fault


def _checked(source: CsvSource) -> Iterator[list[Candidate | Refusal]]:
    """Yield as many rows as one transaction stores, checked."""
    part: list[Row] = []
    try:
        for row in source:
            part.append(row)
            if len(part) == LONGEST_BATCH:
                yield _check(source.header, part)
                part = []
    except UnusableFile:
        yield _check(source.header, part)  # what could be read is stored all the same
        raise
    yield _check(source.header, part)


def _check(header: Sequence[str], rows: Sequence[Row]) -> list[Candidate | Refusal]:
    columns = [(place, name) for place, name in enumerate(header) if name in schema.fields]
    return [_examined(columns, row) for row in rows]


def _examined(columns: Sequence[tuple[int, str]], row: Row) -> Candidate | Refusal:
    if row.fault:
        return Refusal(row, row.fault)
    try:
        return Candidate(row, schema.load(_given(columns, row)))
    except ValidationError as error:
        return Refusal(row, _reason(error.messages_dict))


def _given(columns: Sequence[tuple[int, str]], row: Row) -> dict[str, str]:
    """Return what a row says; an empty cell says nothing."""
    cells = row.cells
    return {name: cells[at] for at, name in columns if cells[at].strip()}


def _reason(messages: Mapping[str, Any]) -> str:
    found = messages_by_field(messages)
    return "; ".join(f"{name}: {' '.join(texts)}" for name, texts in found.items())


def _store(rows: Sequence[Candidate | Refusal]) -> list[bool | Refusal]:
    """Store those that passed; return of each whether it was created, or why it was refused.

    Where the database refuses one of them, and so all, each half is tried for itself.
    """
    items = [row.item for row in rows if isinstance(row, Candidate)]
    try:
        created = iter(directory.create_employees(items))
    except (DBAPIError, NotStored) as error:
        state = sqlstate(error)
        if isinstance(error, DBAPIError) and (state or "")[:2] not in REFUSALS:
            raise
        if len(rows) == 1:
            why = "a trigger discards it" if state is None else f"SQLSTATE {state}"
            return [Refusal(rows[0].row, f"the database refuses it ({why})")]
        half = len(rows) // 2
        return _store(rows[:half]) + _store(rows[half:])
    return [next(created)[1] if isinstance(row, Candidate) else row for row in rows]


def export_employees(file: TextIO, delimiter: str = ",") -> Iterator[int]:
    """Write all employees as CSV, in the columns of an import; yield how many there are so far.

    Duplicates are left out. It is one query, so that it shows one moment.
    """
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerow(schema.fields)
    written = 0
    with connect(db.engine) as connection:
        rows = connection.execution_options(yield_per=LONGEST_BATCH).execute(_employees())
        for part in rows.partitions():
            writer.writerows(part)
            written += len(part)
            yield written


def _employees() -> Executable:
    kept = aliased(Department)
    department = func.coalesce(kept.name, Department.name)
    return (
        select(Employee.name, department, Employee.title, Employee.email, Employee.hired_on)
        .outerjoin(Department, Department.id == Employee.department_id)
        .outerjoin(kept, kept.id == Department.duplicate_of_id)
        .where(Employee.duplicate_of_id.is_(None))
        .order_by(Employee.id)
    )
