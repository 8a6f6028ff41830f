"""Report exact duplicates: how many there are, what refers to them, and which row would be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine

from app.duplicates.groups import Group, find_groups
from app.duplicates.tables import KeyedTable, Model, SoftReference, Tables, read_tables
from app.transactions import connect

LARGEST = 10

HAS_DUPLICATES = "has duplicates"

# It waits for a snapshot that no writer can make it lose over, then it takes no locks that others
# could lose over (manual, "SET TRANSACTION"). First of all statements: a snapshot settles it.
SAFE_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE; "
# A server's limits are for short work. All rows of a cursor are wanted here, not the first tenth.
WITHOUT_LIMITS = (
    "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0;"
    " SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL cursor_tuple_fraction = 1"
)


@dataclass(frozen=True)
class TableReport:
    """What one table has of exact duplicates."""

    table: str
    rows: int
    groups: int
    redundant: int  # rows beyond the one that is kept of each group
    marked: int  # those that point at their kept row already, and wait to be merged
    homonyms: int  # groups of which a person has to say whether they are one record
    references: Mapping[str, int]  # by reference, how many rows refer to redundant ones
    keep: str
    largest: tuple[Group, ...]

    @property
    def unmarked(self) -> int:
        """The redundant rows that nothing tells from canonical ones."""
        return self.redundant - self.marked


def report(
    engine: Engine,
    model: Model,
    keep: str = "oldest",
    *,
    soft_references: Sequence[SoftReference] = (),
    largest: int = LARGEST,
) -> TableReport:
    """Report the exact duplicates of a model's table; nothing in the database changes.

    Memory does not grow with the table, but for the ``largest`` groups that are wanted in full.
    Raises UnknownTable where the table is not there, or lacks the mixin's columns.
    """
    with reading(engine) as connection:
        tables = read_tables(connection, model, soft_references)
        survey = Survey(connection, tables, tables.of(model), keep, largest)
        for _ in survey:
            pass
        return survey.report


def iterate(
    engine: Engine,
    model: Model,
    keep: str = "oldest",
    *,
    soft_references: Sequence[SoftReference] = (),
) -> Iterator[Group]:
    """Yield every group of a model's table, the largest first, as :func:`report` counts them."""
    with reading(engine) as connection:
        tables = read_tables(connection, model, soft_references)
        yield from find_groups(connection, tables, tables.of(model), keep)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a transaction that reads one state of the database, however long.

    Nobody waits for it, and it makes nobody fail. It begins when the serializable transactions that
    write just now are done.
    """
    with connect(engine) as connection:
        connection.exec_driver_sql(SAFE_SNAPSHOT + WITHOUT_LIMITS)
        yield connection


def reason(group: Group, keep: str) -> str:
    """Return why a group's row is kept: the policy's name, or that it has duplicates already."""
    return HAS_DUPLICATES if group.settled else keep


@dataclass
class Survey:
    """A pass over a table's groups, which counts what it yields.

    ``report`` is complete when the pass is.
    """

    connection: Connection
    tables: Tables
    table: KeyedTable
    keep: str = "oldest"
    largest: int | None = LARGEST  # None: all
    _sums: Counter[str] = field(default_factory=Counter, init=False)
    _references: Counter[str] = field(default_factory=Counter, init=False)
    _shown: list[Group] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[Group]:
        self._sums["rows"] = self._count_rows()
        for group in find_groups(self.connection, self.tables, self.table, self.keep):
            self._add(group)
            yield group

    @property
    def report(self) -> TableReport:
        """What was counted so far."""
        sums = self._sums
        return TableReport(
            table=self.table.name,
            rows=sums["rows"],
            groups=sums["groups"],
            redundant=sums["redundant"],
            marked=sums["marked"],
            homonyms=sums["homonyms"],
            references={one.name: self._references[one.name] for one in self.table.references},
            keep=self.keep,
            largest=tuple(self._shown),
        )

    def _count_rows(self) -> Any:
        sql = f"SELECT count(*) FROM {self.table.table}"
        return self.connection.exec_driver_sql(sql).scalar_one()

    def _add(self, group: Group) -> None:
        self._sums["groups"] += 1
        self._sums["redundant"] += len(group.duplicates)
        self._sums["marked"] += len(group.marked)
        self._sums["homonyms"] += group.are_homonyms
        for id in group.duplicates:
            self._references.update(group.references.get(str(id), {}))
        if self.largest is None or len(self._shown) < self.largest:
            self._shown.append(group)
