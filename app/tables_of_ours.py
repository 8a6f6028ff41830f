"""The tables beside the directory's own, which a database may not have yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError

from app import transactions
from app.errors import UnknownTable

UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"  # of a revision before


@contextmanager
def table_required(table: Table, *others: str) -> Iterator[None]:
    """Raise UnknownTable where a table is not there, or not as it should be.

    So for other SQLSTATEs, which say that it is there and may not be used by this role.
    """
    try:
        yield
    except DBAPIError as error:
        state = transactions.sqlstate(error)
        if state not in (UNDEFINED_TABLE, UNDEFINED_COLUMN, *others):
            raise
        missing = "may not be used by this role" if state in others else "is not there"
        raise UnknownTable(f"the table {table.name} {missing}") from error
