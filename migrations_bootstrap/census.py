"""Counts duplicates, in SQL, by the same rule that new keys are normalised with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from migrations_bootstrap import catalogue

WHITE_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""What str.split() splits on. A list, for PostgreSQL's own class depends on the locale."""

TEXT_TYPES = ("character varying", "text")


@dataclass(frozen=True)
class Census:
    """What a table holds: canonical rows, groups of equal keys, rows beyond the first of each
    group, and rows whose stored key is not written as a new one would be."""

    rows: int
    groups: int
    redundant: int
    unnormalised: int


def census(connection: Connection, table: str, key: Sequence[str]) -> Census:
    """Count the duplicates of `table` by its natural key, NULLs equal.

    One statement; it reads the table once and blocks nobody.
    """
    there = catalogue.columns(connection, catalogue.get_table(connection, table))
    utf8 = connection.scalar(sa.text("SHOW server_encoding")) == "UTF8"
    texts = {name for name in key if name in there and there[name].type in TEXT_TYPES}
    compared: dict[str, ColumnElement[Any]] = {
        name: normalised(sa.column(name), utf8=utf8) if name in texts else sa.column(name)
        for name in key
    }
    rows = (
        sa.select(
            *(compared[name].label(f"key_{position}") for position, name in enumerate(key)),
            sa.or_(
                sa.false(), *(sa.column(name).is_distinct_from(compared[name]) for name in texts)
            ).label("unnormalised"),
        )
        .select_from(sa.table(table))
        .where(sa.column("duplicate_of_id").is_(None))
        .subquery()
    )
    groups = (
        sa.select(
            sa.func.count().label("size"),
            sa.func.count().filter(rows.c.unnormalised).label("unnormalised"),
        )
        .group_by(*list(rows.c)[: len(key)])
        .subquery()
    )
    total = sa.select(
        sa.func.coalesce(sa.func.sum(groups.c.size), 0),
        sa.func.count().filter(groups.c.size > 1),
        sa.func.coalesce(sa.func.sum(groups.c.size - 1), 0),
        sa.func.coalesce(sa.func.sum(groups.c.unnormalised), 0),
    )
    return Census(*map(int, connection.execute(total).one()))


def normalised(column: ColumnElement[str], *, utf8: bool) -> ColumnElement[str]:
    """Return the SQL for " ".join(unicodedata.normalize("NFC", column).split()).

    In a database whose encoding is not UTF8, which can compose nothing and may lack the
    characters, only ASCII white space is folded.
    """
    white_space = WHITE_SPACE if utf8 else "".join(filter(str.isascii, WHITE_SPACE))
    # Collation "C": a nondeterministic one takes no regular expressions.
    composed = sa.collate(_composed(column) if utf8 else column, "C")
    return sa.func.btrim(sa.func.regexp_replace(composed, f"[{white_space}]+", " ", "g"))


def _composed(column: ColumnElement[str]) -> ColumnElement[str]:
    # Asking costs a fifth of composing, and nearly every value is composed already.
    return sa.case(
        (sa.func.is_normalized(column, "NFC"), column),
        else_=sa.func.pg_catalog.normalize(column, "NFC"),
    )
