"""Brings tables and columns up to date: Alembic, run from here and never from an ini file."""

import functools
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, text

from migrations_bootstrap import adoption, preflight
from migrations_bootstrap.connection import (
    connected,
    make_engine,
)
from migrations_bootstrap.errors import Blocked, BootstrapError, CannotAdopt, NotAdopted
from migrations_bootstrap.lock import Wait, bootstrap_lock, watched

logger = logging.getLogger(__name__)

VERSION_TABLE = "rollcall_version"
"""Not Alembic's own name: a legacy application may well have its alembic_version."""

DDL_LOCK_TIMEOUT = 3.0
"""Seconds a change may queue for a table: every other statement on it queues behind."""

DDL_PATIENCE = 1.0
"""Seconds after which it is asked who holds the table."""

DDL_ATTEMPTS = 20
DDL_PAUSE = 1.0
"""Seconds in which what has queued up gets through before the next attempt."""

# Alembic keeps the running migration in module globals; threads that bring up the databases of
# different tenants would see each other's.
_alembic = threading.Lock()


@dataclass(frozen=True)
class Upgrade:
    """What upgrade() did: revision before (None: there was none) and after, tables, changes."""

    before: str | None
    after: str
    adopted: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def upgrade(
    url: str | URL, *, adopt: bool = False, connect_timeout: int = 5, lock_timeout: float = 300
) -> Upgrade:
    """Create, or with `adopt` take over, the tables and bring them to the newest revision.

    Raises NotAdopted, CannotAdopt (nothing was touched), Blocked or another BootstrapError.
    """
    engine = make_engine(url, connect_timeout)
    with bootstrap_lock(engine, lock_timeout):
        return run_revisions(engine, adopt=adopt)


def run_revisions(engine: Engine, *, adopt: bool) -> Upgrade:
    """Do what upgrade() does; the caller holds the lock."""
    with connected(engine) as connection:
        before = revision(connection)
        if before == head():
            return Upgrade(before, head())
        adopted = _check(connection, before, adopt=adopt)
    return Upgrade(before, head(), adopted, _migrate_patiently(engine))


def revision(connection: Connection) -> str | None:
    """Return the revision that the database is at, None where Rollcall never was."""
    if connection.scalar(text(f"SELECT to_regclass('{VERSION_TABLE}')")) is None:
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
    return found


def is_current(bind: Connection | str | URL) -> bool:
    """Tell whether the schema is at the newest revision; for a readiness probe."""
    if isinstance(bind, Connection):
        return revision(bind) == head()
    with connected(make_engine(bind, 5)) as connection:
        return revision(connection) == head()


def is_ahead(connection: Connection) -> bool:
    """Tell whether a later version of Rollcall has brought the schema up to date.

    This version can still serve: revisions only add, and the suite takes a database through all of
    them under the first one's statements.
    """
    found = revision(connection)
    return found is not None and not knows(found)


def is_served(found: str | None) -> bool:
    """Tell whether this version can serve a schema of this revision: its own, or a later one."""
    return found is not None and (found == head() or not knows(found))


@functools.cache
def head() -> str:
    """Return the newest revision that this version of Rollcall knows."""
    return str(_scripts().get_current_head())


@functools.cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def knows(found: str) -> bool:
    """Tell whether this version of Rollcall has the revision."""
    return found in _known()


@functools.cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in _scripts().walk_revisions())


def _config() -> Config:
    config = Config()
    # Alembic reads % in a folder's name as an interpolation.
    folder = str(Path(__file__).parent).replace("%", "%%")
    config.set_main_option("script_location", folder)
    return config


def _base_metadata() -> sa.MetaData:
    """Return the tables of the first revision, the one that creates or adopts."""
    base = _scripts().get_revision(str(_scripts().get_base()))
    metadata: sa.MetaData = base.module.metadata
    return metadata


def _check(connection: Connection, before: str | None, *, adopt: bool) -> tuple[str, ...]:
    """Return the tables to be adopted, or raise why the revisions must not run."""
    if before is not None:
        if not knows(before):
            raise BootstrapError(
                f"the database is at revision {before}, which this version of Rollcall"
                " does not know: install the one that made it"
            )
        return ()
    found = adoption.present(connection, _base_metadata())
    if found and not adopt:
        raise NotAdopted(f"tables not made by Rollcall ({', '.join(found)}): run flask init-db")
    problems = preflight.problems(connection, _base_metadata()) if found else []
    if problems:
        raise CannotAdopt(problems)
    return found


def _migrate_patiently(engine: Engine) -> tuple[str, ...]:
    for attempt in range(1, DDL_ATTEMPTS):
        try:
            return _migrate(engine)
        except Blocked as error:
            logger.warning("upgrade_retry after attempt %d: %s", attempt, error)
        time.sleep(DDL_PAUSE)
    return _migrate(engine)


def _migrate(engine: Engine) -> tuple[str, ...]:
    config = _config()
    changes: list[str] = []
    wait = Wait()
    try:
        with (
            connected(engine) as connection,
            watched(engine, connection, "upgrade", DDL_PATIENCE, wait),
        ):
            config.attributes.update(
                connection=connection,
                version_table=VERSION_TABLE,
                lock_timeout=DDL_LOCK_TIMEOUT,
                changes=changes,
            )
            with _alembic:
                command.upgrade(config, "head")
    except Blocked as error:
        raise Blocked(f"{error}, held up by {wait.blockers or 'sessions gone by now'}") from error
    return tuple(changes)
