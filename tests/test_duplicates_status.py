"""Where a table stands, and who may still make duplicates of its rows."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine

from app.duplicates.guard import guard, unguard
from app.duplicates.merging import Rules
from app.duplicates.status import Status, status, which_there_can_be
from app.models import Department, Employee
from tests.duplicated import Site
from tests.other_models import Tag


@pytest.fixture
def anns(site: Site) -> Site:
    """Ann twice and Bob, older than the adoption."""
    site.add_department("Sales")
    site.add_employee("Ann", "Ann", "Bob")
    site.run("UPDATE employee SET created_at = NULL")
    return site


def look(site: Site, model: Any = Employee) -> Status:
    with site.engine.connect() as connection:
        tables = site.tables
        return status(connection, tables, tables.of(model))


def test_a_table_climbs_rung_by_rung(anns: Site) -> None:
    """Adopted, guarded, merged, clean; and down again."""
    adopted = look(anns)
    assert (adopted.rung, adopted.guard, adopted.rows) == ("adopted", "none", 3)
    assert (adopted.unmarked, adopted.marked, adopted.merges) == (1, 0, 0)
    guard(anns.engine, Employee)
    guarded = look(anns)
    assert (guarded.rung, guarded.guard) == ("guarded", "valid")
    assert (guarded.unmarked, guarded.marked, guarded.waiting) == (0, 1, 1)
    anns.merge_all()
    merged = look(anns)
    assert (merged.rung, merged.waiting, merged.merges) == ("merged", 0, 1)
    anns.undo(anns.entries()[0].id)
    assert (look(anns).rung, look(anns).merges) == ("guarded", 0)


def test_a_table_without_duplicates_is_clean(anns: Site) -> None:
    """Once they are purged, or if there never were any."""
    guard(anns.engine, Employee)
    anns.merge_all()
    anns.purge()
    clean = look(anns)
    assert (clean.rung, clean.rows, clean.marked, clean.merges) == ("clean", 2, 0, 0)
    unguard(anns.engine, Employee)
    assert look(anns).rung == "adopted"


def test_what_was_marked_without_a_guard_is_adopted_still(anns: Site) -> None:
    """Only a guard keeps others out."""
    anns.merge_all()
    merged = look(anns)
    assert (merged.rung, merged.unmarked, merged.merges) == ("adopted", 0, 1)


@pytest.mark.parametrize("broken", ["indisready", "indisvalid"])
def test_a_broken_guard_is_none(anns: Site, broken: str) -> None:
    """It is told as what it is."""
    guard(anns.engine, Employee)
    anns.run(
        f"UPDATE pg_index SET {broken} = false"
        " WHERE indexrelid = 'uq_employee_natural_key'::regclass"
    )
    assert (look(anns).rung, look(anns).guard) == ("adopted", "invalid")


def test_duplicates_without_a_mark_are_looked_for_until_all_guards_stand(anns: Site) -> None:
    """Those of the departments too: theirs make duplicates of employees."""
    tables = anns.tables
    with anns.engine.connect() as connection:
        for model, table in ((None, Employee), (Department, Employee), (None, Department)):
            guard(anns.engine, Employee)
            if model is not None:
                unguard(anns.engine, model)
            which = which_there_can_be(connection, tables, tables.of(table))
            assert which == ("marked" if model is None else "all")
            connection.commit()


def test_the_planner_knows_of_marks_and_merges(anns: Site) -> None:
    """At once: it would plan for none until autovacuum comes by, and take minutes for many."""
    marks = "SELECT null_frac < 1 FROM pg_stats WHERE attname = 'duplicate_of_id'"
    entries = "SELECT reltuples FROM pg_class WHERE relname = 'rollcall_merge'"
    guard(anns.engine, Employee)
    assert anns.rows(f"{marks} AND tablename = 'employee'") == [True]
    assert anns.rows(entries) == [1]
    anns.merge_all()
    assert anns.rows(entries) == [2]


def test_rows_that_no_get_or_create_made_are_counted(anns: Site) -> None:
    """Since the adoption: older ones have no time."""
    assert (look(anns).written_by_others, look(anns).last_written_by_others) == (0, None)
    anns.add_employee("Eve")
    anns.run(
        "INSERT INTO employee (name, department_id, creation_token)"
        " VALUES ('Fay', 1, gen_random_uuid())"
    )
    now = look(anns)
    assert now.written_by_others == 1
    assert [now.last_written_by_others] == anns.rows(
        "SELECT created_at FROM employee WHERE name = 'Eve'"
    )


def test_a_model_without_a_time_counts_none(own: Engine) -> None:
    """Nothing says when its rows were made."""
    site = Site(own, Tag)
    assert look(site, Tag).written_by_others == 0


def test_writers_below_serializable_are_named(anns: Site) -> None:
    """Until there is a guard."""
    with (
        anns.engine.connect() as stranger,
        anns.engine.connect().execution_options(isolation_level="SERIALIZABLE") as ours,
    ):
        stranger.exec_driver_sql("SET application_name = 'psql'")
        stranger.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('Eve', 1)")
        ours.exec_driver_sql("SELECT FROM employee WHERE name = 'Fay'")
        ours.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('Fay', 1)")
        (writer,) = look(anns).unsafe_writers
        assert (writer.application, writer.role) == ("psql", anns.engine.url.username)
        assert writer.seconds >= 0
    guard(anns.engine, Employee)
    with anns.engine.connect() as stranger:
        stranger.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('Eve', 1)")
        assert look(anns).unsafe_writers == ()


def test_the_status_of_rows_that_collide_is_guarded(anns: Site) -> None:
    """They wait for somebody to decide."""
    anns.run("CREATE TABLE badge (who int UNIQUE REFERENCES employee)")
    anns.run("INSERT INTO badge VALUES (1), (2)")
    guard(anns.engine, Employee)
    anns.merge_all()
    assert (look(anns).rung, look(anns).waiting) == ("guarded", 1)
    anns.merge_all(rules=Rules(on_collision={"badge": "skip"}))
    assert look(anns).rung == "merged"
