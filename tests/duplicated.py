"""A database with duplicates in it, and what is done about them, in the words of the tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine

from app.duplicates import journal
from app.duplicates.groups import Group, find_groups
from app.duplicates.journal import Entry
from app.duplicates.merge import Left, merge_all, merge_group, merge_planned
from app.duplicates.merging import Outcome, Rules
from app.duplicates.plan import PlannedGroup
from app.duplicates.purge import Purged, old_merges, purge_merge
from app.duplicates.tables import KeyedTable, Model, SoftReference, Tables, read_tables
from app.duplicates.undo import undo
from app.models import Department, Employee
from app.transactions import RetryPolicy

# What a test holds up is let go on by the test, and not by a limit.
POLICY = RetryPolicy(deadline=60, lock_timeout=60, statement_timeout=60)

USER_TABLES = """
SELECT format('%%I.%%I', n.nspname, c.relname)
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname !~ '^(pg_|information_schema)'
   AND c.relname NOT IN ('rollcall_merge', 'rollcall_change', 'alembic_version')
"""


class Site:
    """A database and the model whose duplicates are dealt with, along with what belongs to it."""

    def __init__(
        self, engine: Engine, model: Model = Employee, soft: Sequence[SoftReference] = ()
    ) -> None:
        self.engine = engine
        self.model = model
        self.soft = soft

    def run(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        for statement in statements:
            with self.engine.begin() as connection:
                connection.exec_driver_sql(statement)

    def rows(self, query: str) -> list[Any]:
        """Return the rows of a query; where it has one column, the values of that."""
        with self.engine.connect() as connection:
            result = connection.exec_driver_sql(query)
            one_column = len(result.keys()) == 1
            return [row[0] if one_column else tuple(row) for row in result]

    def image(self) -> dict[str, list[Any]]:
        """Return every row of every table but the journal's, as JSON."""
        return {
            table: self.rows(f"SELECT to_jsonb(t) FROM {escaped(table)} AS t ORDER BY to_jsonb(t)")
            for table in self.rows(USER_TABLES)
        }

    @property
    def tables(self) -> Tables:
        with self.engine.connect() as connection:
            return read_tables(connection, self.model, self.soft)

    def look(self, model: Model | None = None, **how: Any) -> list[Group]:
        """Return the groups of the model's table."""
        tables, table = self._of(model)
        with self.engine.connect() as connection:
            return list(find_groups(connection, tables, table, **how))

    def merge(
        self,
        kept: Any,
        *duplicates: Any,
        model: Model | None = None,
        rules: Rules = Rules(),  # noqa: B008 - frozen
        fill: Mapping[str, Any] | None = None,
        policy: RetryPolicy = POLICY,
    ) -> Outcome:
        """Merge rows into one."""
        tables, table = self._with_journal(model)
        group = PlannedGroup(table.name, kept, duplicates, fill=fill)
        return merge_group(self.engine, tables, table, group, rules, policy)

    def merge_all(
        self,
        model: Model | None = None,
        rules: Rules = Rules(),  # noqa: B008 - frozen
    ) -> list[Outcome | Left]:
        """Merge every group of the model's table."""
        tables, table = self._with_journal(model)
        return list(merge_all(self.engine, tables, table, rules, POLICY))

    def merge_planned(
        self,
        *groups: PlannedGroup,
        model: Model | None = None,
        rules: Rules = Rules(),  # noqa: B008 - frozen
    ) -> list[Outcome | Left]:
        """Merge groups of a plan."""
        tables, table = self._with_journal(model)
        return list(merge_planned(self.engine, tables, table, groups, rules, POLICY))

    def undo(self, entry: int, model: Model | None = None, policy: RetryPolicy = POLICY) -> int:
        """Take back an entry of the journal."""
        return undo(self.engine, self._with_journal(model)[1], entry, policy)

    def undo_all(self, model: Model | None = None) -> int:
        """Take back all that is journalled and not undone, the newest first."""
        return sum(
            self.undo(entry.id, model)
            for entry in self.entries("undone_at IS NULL AND purged_at IS NULL", model)
        )

    def entries(self, condition: str = "true", model: Model | None = None) -> list[Entry]:
        """Return entries of the journal, the newest first."""
        with self.engine.connect() as connection:
            return journal.entries(connection, self._with_journal(model)[1], condition, {})

    def purge(
        self,
        model: Model | None = None,
        rules: Rules = Rules(),  # noqa: B008 - frozen
        older_than: timedelta = timedelta(0),
        policy: RetryPolicy = POLICY,
    ) -> list[Purged]:
        """Delete what was merged."""
        tables, table = self._with_journal(model)
        with self.engine.connect() as connection:
            merges = old_merges(connection, table, older_than)
        return [purge_merge(self.engine, tables, table, one, rules, policy) for one in merges]

    def _of(self, model: Model | None) -> tuple[Tables, KeyedTable]:
        tables = self.tables
        return tables, tables.of(model or self.model)

    def _with_journal(self, model: Model | None) -> tuple[Tables, KeyedTable]:
        tables, table = self._of(model)
        journal.create(self.engine, table)
        return tables, table

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Assert that what is done meanwhile changes no row."""
        before = self.image()
        yield
        assert self.image() == before

    def add_department(self, *names: str) -> None:
        """Add departments, numbered from 1 in a new database."""
        for name in names:
            with self.engine.begin() as connection:
                connection.exec_driver_sql(
                    "INSERT INTO department (name) VALUES (%(name)s)", {"name": name}
                )

    def add_employee(self, *names: str, department: int = 1, **details: Any) -> None:
        """Add employees of one department, with the same details each."""
        columns = ["name", "department_id", *details]
        values = ", ".join(f"%({column})s" for column in columns)
        for name in names:
            with self.engine.begin() as connection:
                connection.exec_driver_sql(
                    f"INSERT INTO employee ({', '.join(columns)}) VALUES ({values})",
                    {"name": name, "department_id": department, **details},
                )


def escaped(sql: str) -> str:
    """Return SQL as the driver takes it."""
    return sql.replace("%", "%%")


MODELS: tuple[Model, ...] = (Department, Employee)
