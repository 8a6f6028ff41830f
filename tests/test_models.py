"""The models and the migrated schema are the same; so are the names of the indexes."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, literal, select, text

from app.db import Base
from app.get_or_create import race_indexes
from app.models import NATURAL_KEYS
from app.natural_key import normalise
from migrations_bootstrap import guard_name, normalised, token_name
from migrations_bootstrap.schema import VERSION_TABLE

OF_OUR_OWN = {
    VERSION_TABLE,
    "rollcall_merge",
    "rollcall_change",
    "rollcall_tenant",
    "rollcall_token",
}


def is_ours(thing: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
    """Leave out what the models do not declare: converged indexes, and tables of our own."""
    return kind != "index" and name not in OF_OUR_OWN


def test_the_migrated_schema_is_that_of_the_models(guarded_url: str) -> None:
    """Tables, columns, types, defaults and constraints."""
    engine = create_engine(guarded_url)
    with engine.connect() as connection:
        options = {"include_object": is_ours, "compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_constraints_have_the_names_of_the_convention(guarded_url: str) -> None:
    """So that a later migration can name what it changes."""
    tables = Base.metadata.tables.values()
    wanted = {constraint.name for table in tables for constraint in table.constraints}
    engine = create_engine(guarded_url)
    with engine.connect() as connection:
        found = connection.scalars(
            text(
                "SELECT conname FROM pg_constraint JOIN pg_class c ON c.oid = conrelid"
                " WHERE contype IN ('p', 'f', 'u') AND relname = ANY (:tables)"
            ),
            {"tables": list(NATURAL_KEYS)},
        )
        assert set(found) == wanted - {None}
    engine.dispose()


def test_the_mixin_knows_the_indexes_that_the_bootstrap_builds() -> None:
    """Neither imports the other: this holds the two namings together."""
    for table in NATURAL_KEYS:
        assert race_indexes(table) == {guard_name(table), token_name(table)}


def test_the_mixin_normalises_as_the_bootstrap_counts(guarded_url: str) -> None:
    """In Python and in SQL; test_indexes has the law, this the join of the two."""
    engine = create_engine(guarded_url)
    for value in (" Ann\t Lee\u2003", "Cafe\u0301", "\x1c a \u3000b\n"):
        with engine.connect() as connection:
            in_sql = connection.scalar(select(normalised(literal(value), utf8=True)))
        assert in_sql == normalise(value)
    engine.dispose()
