"""The report counts what is there, from one state of the database, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

from app.duplicates.report import iterate, reading, reason, report
from app.duplicates.tables import SoftReference
from app.errors import UnknownTable
from app.models import Department, Employee
from migrations_bootstrap import upgrade
from tests.legacy import LegacyRows
from tests.other_models import Tag


@pytest.fixture
def engine(legacy_database: tuple[str, LegacyRows]) -> Iterator[Engine]:
    engine = create_engine(legacy_database[0])
    yield engine
    engine.dispose()


def test_it_counts_what_was_put_in(engine: Engine, legacy_database: tuple[str, LegacyRows]) -> None:
    """Rows, groups, redundant rows, and homonyms apart."""
    made = legacy_database[1]
    for model in (Department, Employee):
        found, name = report(engine, model), model.__tablename__
        assert found.table == name
        assert found.rows == made.rows[name]
        assert found.groups == made.groups[name]
        assert found.redundant == found.unmarked == made.redundant[name]
        assert found.homonyms == made.homonyms[name]
        assert (found.marked, found.keep) == (0, "oldest")


def test_it_counts_what_refers_to_redundant_rows(engine: Engine) -> None:
    """By reference, those too that nothing uses, and those that are declared."""
    redundant = [id for group in iterate(engine, Employee) for id in group.duplicates]
    with engine.connect() as connection:
        tickets = connection.exec_driver_sql(
            "SELECT count(*) FROM ticket WHERE employee_id = ANY (%(ids)s)", {"ids": redundant}
        ).scalar_one()
    soft = [SoftReference("ticket", "id", "employee")]
    assert report(engine, Employee, soft_references=soft).references == {
        "employee.manager_id": 0,
        "ticket.employee_id": tickets,
        "ticket.id": len([id for id in redundant if id <= 200]),
    }
    assert len(list(iterate(engine, Employee, soft_references=soft))) == 60


def test_it_shows_the_largest_groups(engine: Engine) -> None:
    """As many as are wanted; the iterator has them all, in the same order."""
    everything = list(iterate(engine, Employee, "newest"))
    sizes = [len(group.duplicates) for group in everything]
    assert sizes == sorted(sizes, reverse=True)
    for largest in (0, 7, 100):
        found = report(engine, Employee, "newest", largest=largest)
        assert list(found.largest) == everything[:largest]
        assert found.groups == len(everything)


def test_it_says_why_a_row_is_kept(fresh_database: str) -> None:
    """Because of the policy, or because it has duplicates already; those are counted apart."""
    upgrade(fresh_database)
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO department (name, duplicate_of_id) VALUES"
            " ('Sales', NULL), ('Sales', 1), ('Sales', NULL), ('Ops', NULL), ('Ops', NULL)"
        )
    found = report(engine, Department, "newest")
    assert [(one.kept, reason(one, "newest")) for one in found.largest] == [
        (1, "has duplicates"),
        (5, "newest"),
    ]
    assert (found.redundant, found.marked, found.unmarked) == (3, 1, 2)
    engine.dispose()


def test_it_reads_one_safe_snapshot_without_limits(
    legacy_database: tuple[str, LegacyRows],
) -> None:
    """Whatever limits the server has for short work."""
    engine = create_engine(
        legacy_database[0],
        connect_args={"options": "-c statement_timeout=5000 -c lock_timeout=5000"},
    )
    with reading(engine) as connection:
        shown = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in (
                "transaction_isolation",
                "transaction_read_only",
                "transaction_deferrable",
                "statement_timeout",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
            )
        }
    assert list(shown.values()) == ["serializable", "on", "on", "0", "0", "0"]
    with engine.connect() as connection:
        limit = connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
    assert limit == "5s"
    engine.dispose()


def test_it_can_be_left_in_the_middle(engine: Engine) -> None:
    """The connection goes back, and with it the transaction ends."""
    groups = iterate(engine, Employee)
    next(groups)
    assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    groups.close()  # type: ignore[attr-defined]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_table_that_is_not_adopted_is_one_clear_error(fresh_database: str) -> None:
    """Nothing there at all, or not the columns that are needed."""
    engine = create_engine(fresh_database)
    with pytest.raises(UnknownTable, match="there is no table employee"):
        report(engine, Employee)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE employee (id int, department_id int, name text)")
    with pytest.raises(UnknownTable, match="the table employee has no column duplicate_of_id"):
        report(engine, Employee)
    engine.dispose()


def test_it_works_on_the_tables_of_another_application(own: Engine) -> None:
    """With its own key and columns; nothing refers to tags."""
    with own.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO tag (scope_name, label, scalar, called, expression, numbered, color)"
            " SELECT 'a', 1, 's', 0, to_timestamp(0), 0, n::text FROM generate_series(1, 3) AS n"
        )
    found: Any = report(own, Tag, "most-referenced")
    assert (found.rows, found.groups, found.redundant, found.homonyms) == (3, 1, 2, 1)
    assert found.references == {}
