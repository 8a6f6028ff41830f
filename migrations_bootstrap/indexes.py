"""Converges the indexes of a table, online: what it should have is built, what failed is repaired.

Not in a revision: once stamped a revision never runs again, and these builds can fail.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from migrations_bootstrap import catalogue
from migrations_bootstrap.catalogue import (
    Column,
    Definition,
    ForeignKey,
    Index,
    Table,
    qualified,
)
from migrations_bootstrap.census import Census, census
from migrations_bootstrap.connection import (
    DEADLOCK_DETECTED,
    LOCK_NOT_AVAILABLE,
    connected,
    make_engine,
    sqlstate,
)
from migrations_bootstrap.database import check_name
from migrations_bootstrap.errors import Blocked
from migrations_bootstrap.lock import NO_TIMEOUTS, Wait, bootstrap_lock, watched

# As PostgreSQL writes them in pg_get_expr, which they are compared with.
CANONICAL = "(duplicate_of_id IS NULL)"
WITH_TOKEN = "(creation_token IS NOT NULL)"  # noqa: S105 - a predicate, not a password

UNGUARDED = "Rollcall: unguarded by hand"
REMARK = text("SELECT obj_description(to_regclass(:name), 'pg_class')")

logger = logging.getLogger(__name__)

UNIQUE_VIOLATION = "23505"
DEADLOCK_ATTEMPTS = 3
PATIENCE = 5.0
"""Seconds that a build may wait for somebody before the log says for whom."""

Keys = Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class TableIndexes:
    """What a table has now, what was done for it, and its census where one was taken."""

    table: str
    guard: bool
    lookup: bool
    actions: tuple[str, ...]
    census: Census | None


@dataclass(frozen=True)
class Wanted:
    """An index as it should be."""

    name: str
    definition: Definition

    def is_met_by(self, index: Index | None) -> bool:
        """Tell whether `index` is this one, whole and valid."""
        return index is not None and index.usable and index.definition == self.definition


def converge_indexes(
    url: str | URL,
    keys: Keys,
    *,
    count: bool = False,
    guard: bool | None = None,
    connect_timeout: int = 5,
    lock_timeout: float = 300,
) -> list[TableIndexes]:
    """Give every table of `keys` (table -> natural key) the indexes it should have, online.

    A table without duplicates gets the guard, one with them the look-up index, both one for
    creation tokens and one behind each foreign key. `count` asks for a census also where the guard
    makes it needless. Run it again after any failure: it repairs what a broken build left.

    With `guard` False the table gets the look-up index in any case, and stays so, until somebody
    asks with `guard` True: None leaves a table that was unguarded by hand as it is.

    Needs a connection straight to PostgreSQL: behind a pooler in transaction mode the time-outs of
    the role may end a build, for they cannot be switched off for a statement of its own.
    """
    engine = make_engine(url, connect_timeout)
    with bootstrap_lock(engine, lock_timeout):
        return run_convergence(engine, keys, count=count, guard=guard, lock_timeout=lock_timeout)


def run_convergence(
    engine: Engine, keys: Keys, *, count: bool, lock_timeout: float, guard: bool | None = None
) -> list[TableIndexes]:
    """Do what converge_indexes() does; the caller holds the lock."""
    with connected(engine.execution_options(isolation_level="AUTOCOMMIT")) as connection:
        return [
            _converge(
                _Builder(engine, connection, table, lock_timeout),
                tuple(key),
                count=count,
                guarded=guard,
            )
            for table, key in dict(keys).items()
        ]


def guard_name(table: str) -> str:
    """Return the name of the unique index that makes two canonical rows of one key impossible."""
    return f"uq_{table}_natural_key"


def token_name(table: str) -> str:
    """Return the name of the unique index on creation tokens."""
    return f"uq_{table}_creation_token"


def lookup_name(table: str) -> str:
    """Return the name of the index that serves look-ups while duplicates forbid the guard."""
    return f"ix_{table}_natural_key"


def build_guard_at_once(connection: Connection, table: str, key: Sequence[str]) -> None:
    """Build the guard within the transaction at hand: writers of the table wait meanwhile.

    For tables in which duplicates arrive faster than an index is built online. What a build that
    failed has left is dropped first. Raises the driver's error where there are duplicates.
    """
    found = catalogue.get_table(connection, table)
    guard = _guard(table, tuple(key))
    if guard.name in catalogue.indexes(connection, found):
        connection.exec_driver_sql(f"DROP INDEX {qualified(connection, found, guard.name)}")
    statement = _create_statement(connection, found, guard)
    connection.exec_driver_sql(statement.replace(" CONCURRENTLY ", " ", 1))


def _guard(table: str, key: tuple[str, ...]) -> Wanted:
    definition = Definition(key, CANONICAL, unique=True, nulls_not_distinct=True)
    return Wanted(guard_name(table), definition)


class _Builder:
    """Builds and drops the indexes of one table and keeps account of it."""

    def __init__(
        self, engine: Engine, connection: Connection, table: str, lock_timeout: float
    ) -> None:
        self.engine = engine
        self.connection = connection
        self.table = catalogue.get_table(connection, table)
        self.lock_timeout = lock_timeout
        self.actions: list[str] = []

    def indexes(self) -> dict[str, Index]:
        return catalogue.indexes(self.connection, self.table)

    def has(self, wanted: Wanted) -> bool:
        return wanted.is_met_by(self.indexes().get(wanted.name))

    def ensure(self, wanted: Wanted) -> None:
        """Build the index unless it is there; one that is broken or another goes first."""
        _retry_deadlocks(lambda: self._ensure(wanted))

    def discard(self, wanted: Wanted) -> None:
        """Drop the index if there is one of this name."""
        _retry_deadlocks(lambda: self._discard(wanted))

    def remark(self, wanted: Wanted) -> str | None:
        """Return what was noted on the index, None where nothing was or it is not there."""
        name = qualified(self.connection, self.table, wanted.name)
        found: str | None = self.connection.scalar(REMARK, {"name": name})
        return found

    def note(self, wanted: Wanted, remark: str | None) -> None:
        """Note something on the index, if it is there, or nothing any more."""
        if self.remark(wanted) != remark and wanted.name in self.indexes():
            name = qualified(self.connection, self.table, wanted.name)
            text = "NULL" if remark is None else f"'{remark}'"
            self.connection.exec_driver_sql(f"COMMENT ON INDEX {name} IS {text}")

    def census(self, key: tuple[str, ...]) -> Census:
        logger.info("counting the duplicates of %s", self.table.name)
        self.connection.execute(NO_TIMEOUTS, {"local": False})
        return census(self.connection, self.table.name, key)

    def _ensure(self, wanted: Wanted) -> None:
        if not self.has(wanted):
            self._discard(wanted)
            logger.info("building %s on %s", wanted.name, self.table.name)
            self._run(_create_statement(self.connection, self.table, wanted))
            self.actions.append(f"built {wanted.name}")

    def _discard(self, wanted: Wanted) -> None:
        if wanted.name in self.indexes():
            name = qualified(self.connection, self.table, wanted.name)
            logger.info("dropping %s", wanted.name)
            self._run(f"DROP INDEX CONCURRENTLY {name}")
            self.actions.append(f"dropped {wanted.name}")

    def _run(self, statement: str) -> None:
        wait = Wait()
        # For the session: CONCURRENTLY runs in no transaction that SET LOCAL could belong to.
        self.connection.execute(NO_TIMEOUTS, {"local": False})
        self.connection.exec_driver_sql(f"SET lock_timeout = '{self.lock_timeout}s'")
        try:
            patience = min(PATIENCE, self.lock_timeout / 2)
            with watched(self.engine, self.connection, statement, patience, wait):
                self.connection.exec_driver_sql(statement)
        except DBAPIError as error:
            if sqlstate(error) == LOCK_NOT_AVAILABLE:
                blockers = wait.blockers or "others"
                raise Blocked(
                    f"{statement} waited {self.lock_timeout:g} s for {blockers}: run it again"
                ) from error
            raise


def _retry_deadlocks(step: Callable[[], None]) -> None:
    """Repeat a step that PostgreSQL ended for a deadlock.

    A build whose client was killed goes on in the server, holds the table, and waits for the
    snapshot of whoever queues behind it.
    """
    for _ in range(DEADLOCK_ATTEMPTS - 1):
        try:
            return step()
        except DBAPIError as error:
            if sqlstate(error) != DEADLOCK_DETECTED:
                raise
    return step()


def _create_statement(connection: Connection, table: Table, wanted: Wanted) -> str:
    quoted = connection.dialect.identifier_preparer.quote_identifier
    definition = wanted.definition
    columns = ", ".join(quoted(str(column)) for column in definition.columns)
    # The driver reads %, which quoted() has doubled already.
    where = f" WHERE {definition.predicate}".replace("%", "%%") if definition.predicate else ""
    return (
        f"CREATE {'UNIQUE ' if definition.unique else ''}INDEX CONCURRENTLY {quoted(wanted.name)}"
        f" ON {qualified(connection, table)} ({columns})"
        f"{' NULLS NOT DISTINCT' if definition.nulls_not_distinct else ''}"
        f"{where}"
    )


def _converge(
    builder: _Builder, key: tuple[str, ...], *, count: bool, guarded: bool | None
) -> TableIndexes:
    name = builder.table.name
    guard = _guard(name, key)
    lookup = Wanted(lookup_name(name), Definition(key, CANONICAL))
    token = Wanted(token_name(name), Definition(("creation_token",), WITH_TOKEN, unique=True))
    behind = _behind_foreign_keys(builder)
    for wanted in (guard, lookup, token, *behind):
        check_name(wanted.name)
    for wanted in (token, *behind):
        builder.ensure(wanted)
    if guarded is not None:
        builder.note(lookup, None)
    if guarded is False or builder.remark(lookup) == UNGUARDED:
        counted = _leave_unguarded(builder, key, guard, lookup, count=count)
    else:
        counted = _converge_key(builder, key, guard, lookup, count=count)
    return TableIndexes(
        name, builder.has(guard), builder.has(lookup), tuple(builder.actions), counted
    )


def _leave_unguarded(
    builder: _Builder, key: tuple[str, ...], guard: Wanted, lookup: Wanted, *, count: bool
) -> Census | None:
    """Leave the look-up index, and a note that the next start does not put the guard back."""
    builder.ensure(lookup)
    builder.note(lookup, UNGUARDED)
    builder.discard(guard)
    return builder.census(key) if count else None


def _converge_key(
    builder: _Builder, key: tuple[str, ...], guard: Wanted, lookup: Wanted, *, count: bool
) -> Census | None:
    """Leave the guard or the look-up index, the one before the other goes."""
    if builder.has(guard):
        builder.discard(lookup)
        return builder.census(key) if count else None
    counted = builder.census(key)
    if counted.groups or guard.name in builder.indexes():
        builder.ensure(lookup)
    builder.discard(guard)
    if counted.groups:
        return counted
    if _built_without_duplicate(builder, guard):
        builder.discard(lookup)
        return counted
    builder.ensure(lookup)
    builder.discard(guard)
    return builder.census(key)


def _built_without_duplicate(builder: _Builder, guard: Wanted) -> bool:
    """Build the guard; False, and a broken index left, where a duplicate came after the census."""
    try:
        builder.ensure(guard)
    except DBAPIError as error:
        if sqlstate(error) != UNIQUE_VIOLATION:
            raise
        return False
    return True


def _behind_foreign_keys(builder: _Builder) -> list[Wanted]:
    """Return the indexes to have behind foreign keys that no other index serves.

    Deleting or repointing a row looks for what refers to it: without an index, by a scan of the
    whole table, which under SERIALIZABLE conflicts with every writer.
    """
    columns = catalogue.columns(builder.connection, builder.table)
    others = builder.indexes()
    found = {}
    for foreign_key in catalogue.foreign_keys(builder.connection, builder.table):
        wanted = _behind(builder.table, foreign_key, columns)
        if not any(_serves(index, foreign_key, columns) for index in others.values()):
            found[wanted.name] = wanted
    return list(found.values())


def _behind(table: Table, foreign_key: ForeignKey, columns: dict[str, Column]) -> Wanted:
    nullable = [columns[name] for name in foreign_key.columns if not columns[name].not_null]
    name = "_".join(("ix", table.name, *foreign_key.columns))
    return Wanted(name, Definition(foreign_key.columns, _all_filled(nullable)))


def _serves(index: Index, foreign_key: ForeignKey, columns: dict[str, Column]) -> bool:
    """Tell whether `index` finds the rows that refer to a given one."""
    definition, size = index.definition, len(foreign_key.columns)
    referring = [columns[name] for name in foreign_key.columns]
    filled = {_all_filled(referring), *(_all_filled([column]) for column in referring)}
    return (
        index.usable
        and definition.method in ("btree", "hash")
        and set(definition.columns[:size]) == set(foreign_key.columns)
        and definition.predicate in {None, *filled}
    )


def _all_filled(columns: Sequence[Column]) -> str | None:
    """Return, as PostgreSQL writes it, the predicate that every one of `columns` is filled."""
    terms = [f"({column.quoted} IS NOT NULL)" for column in columns]
    return f"({' AND '.join(terms)})" if len(terms) > 1 else "".join(terms) or None
