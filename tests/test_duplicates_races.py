"""Guard, merge and purge while others write, and killed at any point."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from app.directory import delete_record, update
from app.duplicates import journal
from app.duplicates.guard import guard
from app.duplicates.merging import Outcome
from app.errors import (
    AlreadyMerged,
    GroupChanged,
    RecordHasDuplicates,
    RecordIsDuplicate,
)
from app.models import Department, Employee
from app.transactions import sqlstate
from tests.conftest import waits
from tests.duplicated import Site
from tests.races import eventually, inserts_held, started, together
from tests.serving import ROOT

ON_DELETE = ("CASCADE", "SET NULL", "RESTRICT", "NO ACTION")
ISOLATION = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


@pytest.fixture
def anns(site: Site) -> Site:
    """Ann twice, and a journal."""
    site.add_department("Sales")
    site.add_employee("Ann", "Ann")
    journal.create(site.engine, site.tables.of(Employee))
    return site


def insert_until_stored(site: Site, isolation: str, sql: str) -> list[str | None]:
    """Insert a row as an application does that tries again; return why it was refused."""
    refusals = []
    with site.engine.connect().execution_options(isolation_level=isolation) as connection:
        while True:
            try:
                connection.exec_driver_sql(sql)
                connection.commit()
                return refusals
            except OperationalError as error:
                refusals.append(sqlstate(error))
                connection.rollback()


LATE_CHILD = "INSERT INTO note (who) VALUES (2)"


@pytest.mark.parametrize("action", ON_DELETE)
@pytest.mark.parametrize("isolation", ISOLATION)
def test_a_child_that_comes_before_the_lock_is_not_lost(
    anns: Site, action: str, isolation: str
) -> None:
    """The merge waits for its writer; if it does not see the child, a later purge does."""
    anns.run(f"CREATE TABLE note (id serial, who int REFERENCES employee ON DELETE {action})")
    with anns.engine.connect().execution_options(isolation_level=isolation) as writer:
        writer.exec_driver_sql(LATE_CHILD)
        merged = started(lambda: anns.merge(1, 2))
        eventually(lambda: waits(anns.engine) == 1)
        writer.commit()
    assert merged().duplicates == (2,)
    nothing_is_lost_by_a_purge(anns)


@pytest.mark.parametrize("action", ON_DELETE)
@pytest.mark.parametrize("isolation", ISOLATION)
def test_a_child_that_comes_after_the_lock_is_not_lost(
    anns: Site, action: str, isolation: str
) -> None:
    """Its writer waits for the merge, and then refers to a row that is there."""
    anns.run(f"CREATE TABLE note (id serial, who int REFERENCES employee ON DELETE {action})")
    with inserts_held(anns.engine, "rollcall_merge") as gate:
        merged = started(lambda: anns.merge(1, 2))
        gate.wait_for(1)
        written = started(lambda: insert_until_stored(anns, isolation, LATE_CHILD))
        eventually(lambda: waits(anns.engine) == 2)
        gate.open()
        assert merged().duplicates == (2,)
        assert written() == ([] if isolation == "READ COMMITTED" else ["40001"])
    nothing_is_lost_by_a_purge(anns)


def nothing_is_lost_by_a_purge(site: Site) -> None:
    assert len(site.rows("SELECT who FROM note")) == 1
    assert [one.deleted for one in site.purge()] == [1]
    assert site.rows("SELECT who FROM note") == [1]


@pytest.mark.parametrize("action", ON_DELETE)
def test_a_child_that_comes_while_its_row_is_purged_is_refused_or_moved(
    anns: Site, action: str
) -> None:
    """It waits, and then there is nothing left that it could refer to."""
    anns.run(f"CREATE TABLE note (id serial, who int REFERENCES employee ON DELETE {action})")
    anns.merge(1, 2)
    with inserts_held(anns.engine, "rollcall_merge") as gate:
        purged = started(anns.purge)
        gate.wait_for(1)
        written = started(lambda: anns.run(LATE_CHILD))
        eventually(lambda: waits(anns.engine) == 2)
        gate.open()
        assert [one.deleted for one in purged()] == [1]
        with pytest.raises(IntegrityError):
            written()


def test_changes_of_rows_that_are_being_merged_wait_and_then_know(
    anns: Site, make_app: Callable[..., Flask]
) -> None:
    """Nobody writes to a duplicate, deletes a row that is kept for one, or creates a second."""
    app = make_app(anns.engine.url.render_as_string(False))

    def in_app(work: Callable[[], Any]) -> Callable[[], Any]:
        def task() -> Any:
            with app.app_context():
                return work()

        return started(task)

    with inserts_held(anns.engine, "rollcall_merge") as gate:
        merged = started(lambda: anns.merge(1, 2))
        gate.wait_for(1)
        changes = [
            in_app(lambda: update(Employee, 1, {"title": "Boss"}).title),
            in_app(lambda: update(Employee, 2, {"title": "Clerk"})),
            in_app(lambda: delete_record(Employee, 1)),
            in_app(lambda: delete_record(Employee, 2)),
        ]
        eventually(lambda: waits(anns.engine) == 5)
        found = in_app(lambda: Employee.get_or_create(name="Ann", department_id=1)[0].id)
        assert found() == 1
        gate.open()
        assert merged().kept == 1
    assert changes[0]() == "Boss"
    for change, error in zip(
        changes[1:], (RecordIsDuplicate, RecordHasDuplicates, RecordIsDuplicate), strict=True
    ):
        with pytest.raises(error):
            change()
    assert anns.rows("SELECT title, duplicate_of_id FROM employee ORDER BY id") == [
        ("Boss", None),
        (None, 1),
    ]


def test_a_row_that_is_changed_before_the_lock_is_merged_as_it_is_then(anns: Site) -> None:
    """Or is no duplicate any more."""
    with anns.engine.connect() as writer:
        writer.exec_driver_sql("UPDATE employee SET title = 'Clerk' WHERE id = 2")
        merged = started(lambda: anns.merge(1, 2))
        eventually(lambda: waits(anns.engine) == 1)
        writer.commit()
    assert merged().filled == {"title": 2}
    anns.undo_all()
    with anns.engine.connect() as writer:
        writer.exec_driver_sql("UPDATE employee SET name = 'Anna' WHERE id = 2")
        merged = started(lambda: anns.merge(1, 2))
        eventually(lambda: waits(anns.engine) == 1)
        writer.commit()
    with pytest.raises(GroupChanged):
        merged()


def outcome_of(merged: Callable[[], Any]) -> Any:
    """Return what a merge returned or raised."""
    try:
        return merged()
    except AlreadyMerged as error:
        return error


def test_two_who_merge_the_same_rows_do_it_once(anns: Site) -> None:
    """The second finds nothing left to do, and journals nothing."""
    anns.run("UPDATE employee SET title = 'Clerk' WHERE id = 2")
    before = anns.image()
    with inserts_held(anns.engine, "rollcall_merge") as gate:
        merges = [started(lambda: anns.merge(1, 2)) for _ in range(2)]
        gate.wait_for(1)
        eventually(lambda: waits(anns.engine) == 2)
        gate.open()
        outcomes = [outcome_of(merged) for merged in merges]
    assert sorted(str(type(one).__name__) for one in outcomes) == ["AlreadyMerged", "Outcome"]
    anns.undo_all()
    assert anns.image() == before


def test_two_who_merge_crosswise_do_not_point_at_each_other(anns: Site) -> None:
    """One of them finds that its row is none to keep any more."""
    with inserts_held(anns.engine, "rollcall_merge") as gate:
        merges = [started(lambda: anns.merge(1, 2)), started(lambda: anns.merge(2, 1))]
        gate.wait_for(1)
        eventually(lambda: waits(anns.engine) == 2)
        gate.open()
        outcomes = together(merges)
    assert sorted(type(one).__name__ for one in outcomes) == ["GroupChanged", "Outcome"]
    assert len(anns.rows("SELECT FROM employee WHERE duplicate_of_id IS NULL")) == 1


def test_an_undo_and_a_purge_of_one_merge_exclude_each_other(anns: Site) -> None:
    """Whoever has the entry first wins."""
    entry = anns.merge(1, 2).id
    with inserts_held(anns.engine, "rollcall_merge") as gate:
        purged = started(anns.purge)
        gate.wait_for(1)
        undone = started(lambda: anns.undo(entry))
        eventually(lambda: waits(anns.engine) == 2)
        gate.open()
        assert [one.deleted for one in purged()] == [1]
        with pytest.raises(Exception, match="purged"):
            undone()


def test_two_guards_at_once_end_with_one(site: Site) -> None:
    """They mark the same rows, and build one index."""
    many_anns(site)
    journal.create(site.engine, site.tables.of(Employee))
    with inserts_held(site.engine, "rollcall_merge") as gate:
        guards = [started(lambda: guard(site.engine, Employee)) for _ in range(2)]
        gate.wait_for(1)
        eventually(lambda: waits(site.engine) == 2)
        gate.open()
        for guarded in guards:
            guarded()
    assert guarded_keys(site)


def many_anns(site: Site) -> None:
    """Put some of every kind of duplicate in; the same each time."""
    site.run(
        "INSERT INTO department (name) VALUES ('Sales'), (' Sales'), ('Lab')",
        "INSERT INTO employee (name, department_id, title)"
        " SELECT name || repeat(' ', n %% 2), 1 + n %% 3, CASE WHEN n > 4 THEN name END"
        " FROM generate_series(1, 6) AS n,"
        " unnest(ARRAY['Ann', 'Bob', 'Cid', 'Dan', 'Eve', 'Fay', 'Gus', 'Hal']) AS name"
        " ORDER BY n, name",
        "UPDATE employee SET manager_id = 17 WHERE name !~ 'Ann'",
        "UPDATE employee SET created_at = NULL, updated_at = NULL",
        "UPDATE department SET created_at = NULL, updated_at = NULL",
        "CREATE TABLE note (id serial PRIMARY KEY, who int REFERENCES employee)",
        "INSERT INTO note (who) SELECT id FROM employee ORDER BY id",
    )


def guarded_keys(site: Site) -> bool:
    """Tell whether both guards stand, and no key has two canonical rows."""
    valid = site.rows(
        "SELECT count(*) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        " WHERE c.relname ~ '^uq_.*_natural_key$' AND i.indisvalid AND i.indisready"
    )
    return valid == [2] and not site.look(Employee, which="unmarked")


KEYS = [f"New {number}" for number in range(5)]


@contextmanager
def creators(site: Site, app: Flask) -> Iterator[set[int]]:
    """Have writers create the same keys by get_or_create; yield the ids they were given."""
    done, ids = threading.Event(), set[int]()

    def create(number: int) -> None:
        with app.app_context():
            while not done.is_set():
                for key in KEYS:
                    ids.add(Employee.get_or_create(name=key, department_id=2 + number)[0].id)

    writers = [started(lambda number=number: create(number)) for number in range(2)]
    yield ids
    done.set()
    for writer in writers:
        writer()


def nobody_makes_a_duplicate(site: Site, app: Flask) -> None:
    assert guarded_keys(site)
    with pytest.raises(IntegrityError, match="uq_employee_natural_key") as caught:
        site.add_employee(KEYS[0], department=3)
    assert sqlstate(caught.value) == "23505"
    with app.app_context():
        assert not Employee.get_or_create(name=KEYS[0], department_id=3)[1]


def test_a_table_is_guarded_while_duplicates_arrive(
    site: Site, make_app: Callable[..., Flask]
) -> None:
    """From a stranger who looks for nothing, beside writers who do."""
    many_anns(site)
    app = make_app(site.engine.url.render_as_string(False))
    rounds = iter(range(3))

    def intrude(what: str, count: int) -> None:
        if what == "employee: building the guard" and next(rounds, None) is not None:
            site.add_employee(*KEYS, *KEYS, department=3)

    with creators(site, app) as ids:
        guarded = guard(site.engine, Employee, tell=intrude)
    assert guarded[1].passes == 4
    nobody_makes_a_duplicate(site, app)
    assert site.rows("SELECT count(*) FROM employee WHERE name ~ '^New'")[0] >= 30
    assert ids <= set(site.rows("SELECT id FROM employee"))


def test_a_table_is_guarded_while_a_stranger_never_stops(
    site: Site, make_app: Callable[..., Flask]
) -> None:
    """He is refused until the guard stands, and refused by it from then on."""
    many_anns(site)
    app = make_app(site.engine.url.render_as_string(False))
    stored: list[str] = []
    refusals: list[str | None] = []

    def intrude() -> None:
        while "23505" not in refusals:
            try:
                site.add_employee(*KEYS, department=3)
                stored.extend(KEYS)
            except DBAPIError as error:
                refusals.append(sqlstate(error))

    intruding = started(intrude)
    eventually(lambda: len(stored) > 10)
    with creators(site, app):
        guard(site.engine, Employee, refuse_unsafe=True)
    intruding()
    nobody_makes_a_duplicate(site, app)
    strangers = "name ~ '^New' AND creation_token IS NULL"
    assert site.rows(f"SELECT count(*) FROM employee WHERE {strangers}")[0] >= len(stored)


GUARD = """
from app.duplicates.guard import guard
guard(create_engine(sys.argv[1]), Employee)
"""
MERGE = """
for model in (Department, Employee):
    Site(create_engine(sys.argv[1])).merge_all(model, Rules(accept_homonyms=True))
"""
PRELUDE = """
import sys
from sqlalchemy import create_engine
from app.models import Department, Employee
from app.duplicates.merging import Rules
from tests.duplicated import Site
"""


@contextmanager
def running(site: Site, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on the site's database; kill it with -9 in the end."""
    url = site.engine.url.render_as_string(False)
    process = subprocess.Popen([sys.executable, "-c", PRELUDE + program, url], cwd=ROOT)
    yield process
    process.kill()
    process.wait()


def killed_at_entry(site: Site, program: str, entry: int) -> None:
    """Kill a program when it is about to make an entry in the journal."""
    journal.create(site.engine, site.tables.of(Employee))
    with inserts_held(site.engine, "rollcall_merge", f"NEW.id = {entry}") as gate:
        with running(site, program):
            gate.wait_for(1)
        gate.open()


def killed_while_it_builds(site: Site, program: str, table: str) -> None:
    """Kill a program while the server builds an index for it."""
    with site.engine.connect() as writer:
        writer.exec_driver_sql(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
        with running(site, program):
            eventually(lambda: building(site.engine.connect(), table))


def building(connection: Connection, table: str) -> bool:
    with connection:
        return bool(
            connection.scalar(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND query LIKE 'CREATE UNIQUE INDEX CONCURRENTLY%' || :table || '%'"
                ),
                {"table": f"uq_{table}_natural_key"},
            )
        )


@pytest.mark.parametrize(
    "kill",
    [
        lambda site: killed_at_entry(site, GUARD, 1),
        lambda site: killed_at_entry(site, GUARD, 3),
        lambda site: killed_while_it_builds(site, GUARD, "employee"),
    ],
)
def test_a_guard_that_was_killed_ends_as_any_other_when_it_is_run_again(
    site: Site, kill: Callable[[Site], None]
) -> None:
    """The rows are the same as after one that nobody disturbed."""
    many_anns(site)
    kill(site)
    guard(site.engine, Employee)
    assert guarded_keys(site)
    disturbed = site.image()
    start_again(site)
    guard(site.engine, Employee)
    assert site.image() == disturbed


@pytest.mark.parametrize("entry", [1, 4])
def test_a_merge_of_all_that_was_killed_ends_as_any_other_when_it_is_run_again(
    site: Site, entry: int
) -> None:
    """A group is merged or it is not."""
    many_anns(site)
    killed_at_entry(site, MERGE, entry)
    merge_everything(site)
    disturbed = site.image()
    start_again(site)
    merge_everything(site)
    assert site.image() == disturbed
    assert site.rows("SELECT DISTINCT who FROM note ORDER BY 1") == site.rows(
        "SELECT id FROM employee WHERE duplicate_of_id IS NULL ORDER BY 1"
    )


def merge_everything(site: Site) -> None:
    for outcome in [*site.merge_all(Department), *site.merge_all(Employee)]:
        assert isinstance(outcome, Outcome)


def start_again(site: Site) -> None:
    """Put the database back to what it was before."""
    site.run(
        "DROP TABLE note; DROP TABLE rollcall_change; DROP TABLE rollcall_merge",
        "DROP INDEX IF EXISTS uq_employee_natural_key, uq_department_natural_key",
        "TRUNCATE employee, department RESTART IDENTITY CASCADE",
    )
    many_anns(site)
