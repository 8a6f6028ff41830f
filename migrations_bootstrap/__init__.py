"""Brings a database up: creates it, its tables and its indexes, whoever else does the same.

It imports SQLAlchemy and Alembic only; settings, tables and keys reach it as arguments.
"""

from dataclasses import dataclass

from sqlalchemy import URL

from migrations_bootstrap.census import Census, census, normalised
from migrations_bootstrap.connection import make_engine
from migrations_bootstrap.database import ensure_database
from migrations_bootstrap.errors import (
    AccessRefused,
    Blocked,
    BootstrapError,
    CannotAdopt,
    DatabaseMissing,
    LockTimeout,
    NotAdopted,
    ServerUnreachable,
)
from migrations_bootstrap.indexes import (
    Keys,
    TableIndexes,
    build_guard_at_once,
    converge_indexes,
    guard_name,
    lookup_name,
    run_convergence,
    token_name,
)
from migrations_bootstrap.lock import bootstrap_lock
from migrations_bootstrap.schema import Upgrade, head, is_ahead, is_current, run_revisions, upgrade

__all__ = [
    "AccessRefused",
    "Blocked",
    "Bootstrap",
    "BootstrapError",
    "CannotAdopt",
    "Census",
    "DatabaseMissing",
    "LockTimeout",
    "NotAdopted",
    "ServerUnreachable",
    "TableIndexes",
    "Upgrade",
    "bootstrap",
    "build_guard_at_once",
    "census",
    "converge_indexes",
    "ensure_database",
    "guard_name",
    "head",
    "is_ahead",
    "is_current",
    "lookup_name",
    "normalised",
    "token_name",
    "upgrade",
]


@dataclass(frozen=True)
class Bootstrap:
    """What bootstrap() found and did."""

    created: bool
    upgrade: Upgrade
    tables: tuple[TableIndexes, ...]

    @property
    def changed(self) -> bool:
        """Tell whether anything in the database is now different."""
        migrated = self.upgrade.before != self.upgrade.after
        return self.created or migrated or any(table.actions for table in self.tables)


def bootstrap(
    url: str | URL,
    keys: Keys,
    *,
    adopt: bool = False,
    count: bool = False,
    owner: str | None = None,
    encoding: str = "UTF8",
    template: str = "template0",
    connect_timeout: int = 5,
    lock_timeout: float = 300,
) -> Bootstrap:
    """Create the database if it is missing, bring its schema up to date, converge its indexes.

    Safe for any number of processes and hosts at once, and to be run again at any time: a second
    run changes nothing. Times are in seconds. Raises a BootstrapError.
    """
    created = ensure_database(
        url, owner=owner, encoding=encoding, template=template, connect_timeout=connect_timeout
    )
    engine = make_engine(url, connect_timeout)
    with bootstrap_lock(engine, lock_timeout):
        upgraded = run_revisions(engine, adopt=adopt)
        tables = run_convergence(engine, keys, count=count, lock_timeout=lock_timeout)
    return Bootstrap(created, upgraded, tuple(tables))
