"""Guarding a table with its duplicates in place, and taking the guard off."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.duplicates import guard as guards
from app.duplicates import journal
from app.duplicates.guard import guard, unguard
from app.duplicates.marking import Marker
from app.duplicates.merging import Rules
from app.duplicates.plan import Decisions, PlannedGroup
from app.duplicates.writers import admit_all_writers, refuse_unsafe_writers
from app.errors import HomonymsFound, MergesRemain, NotGuarded, UnusablePlan
from app.models import Department, Employee
from app.transactions import RetryPolicy, sqlstate
from migrations_bootstrap import build_guard_at_once
from migrations_bootstrap.errors import BootstrapError
from tests.duplicated import Site
from tests.other_models import Legacy, Tag
from tests.proxy import lossy_proxy

MARKS = "SELECT id, duplicate_of_id FROM employee ORDER BY id"
GUARDS = """
SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
 WHERE c.relname LIKE 'uq%%natural_key' AND i.indisvalid AND i.indisready ORDER BY 1
"""


@pytest.fixture
def legacy(site: Site) -> Site:
    """Two spellings of a department; Ann in both, and twice in one."""
    site.add_department("Sales", " Sales", "Lab")
    site.add_employee("Ann", "Bob")
    site.add_employee("Ann  ", "Cid ", department=2)
    site.add_employee("Ann", department=2, title="Clerk")
    return site


def test_the_key_is_enforced_with_the_duplicates_in_place(legacy: Site) -> None:
    """Departments first, then employees; keys are stored as new ones are."""
    departments, employees = guard(legacy.engine, Employee)
    assert (departments.table, departments.marked, departments.normalised) == ("department", 1, 0)
    assert (employees.table, employees.marked, employees.normalised) == ("employee", 0, 1)
    assert legacy.rows(GUARDS) == ["uq_department_natural_key", "uq_employee_natural_key"]
    assert legacy.rows(MARKS) == [(1, None), (2, None), (3, 1), (4, None), (5, 1)]
    assert legacy.rows("SELECT DISTINCT department_id FROM employee") == [1]
    assert legacy.rows("SELECT name FROM employee WHERE id = 4") == ["Cid"]
    with pytest.raises(IntegrityError):
        legacy.add_employee("Ann")


def test_a_second_time_there_is_nothing_to_do(legacy: Site) -> None:
    """It may be run again."""
    guard(legacy.engine, Employee)
    with legacy.unchanged():
        outcomes = guard(legacy.engine, Employee)
    assert [(one.marked, one.normalised, one.actions) for one in outcomes] == [(0, 0, ())] * 2


def test_nothing_is_filled_or_repointed_by_a_guard(legacy: Site) -> None:
    """But for employees of a duplicate department, which its key needs together."""
    legacy.run("CREATE TABLE note (who int REFERENCES employee); INSERT INTO note VALUES (5)")
    guard(legacy.engine, Employee)
    assert legacy.rows("SELECT who FROM note") == [5]
    assert legacy.rows("SELECT title FROM employee WHERE id = 1") == [None]


def test_the_guard_taken_off_with_its_marks_gives_the_rows_back(legacy: Site) -> None:
    """Every one exactly as it was."""
    before = legacy.image()
    told: list[tuple[str, int]] = []
    guard(legacy.engine, Employee, tell=lambda what, count: told.append((what, count)))
    assert ("department: marked", 1) in told
    assert ("employee: building the guard", 0) in told
    assert unguard(legacy.engine, Employee, unmark=True) == 1
    assert unguard(legacy.engine, Department, unmark=True, tell=lambda what, count: None) > 0
    assert legacy.image() == before
    assert legacy.rows(GUARDS) == []


def test_the_guard_taken_off_without_its_marks_leaves_them(legacy: Site) -> None:
    """They are in nobody's way."""
    guard(legacy.engine, Employee)
    with legacy.unchanged():
        assert unguard(legacy.engine, Employee) == 0
    assert legacy.rows(GUARDS) == ["uq_department_natural_key"]


def test_a_table_that_was_never_guarded_can_be_unguarded(legacy: Site) -> None:
    """There is no journal then."""
    with legacy.unchanged():
        assert unguard(legacy.engine, Department, unmark=True) == 0


@pytest.mark.parametrize("model", [Department, Employee])
def test_marks_that_merges_rely_on_are_not_taken_off(legacy: Site, model: Any) -> None:
    """Those of employees too, which their department's mark has made."""
    guard(legacy.engine, Employee)
    legacy.merge_all()
    with legacy.unchanged(), pytest.raises(MergesRemain, match="undo them"):
        unguard(legacy.engine, model, unmark=True)
    assert len(legacy.rows(GUARDS)) == 2


def test_homonyms_stop_the_guard_before_anything_is_changed(legacy: Site) -> None:
    """They are listed; whoever accepts them has them marked."""
    legacy.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    with legacy.unchanged(), pytest.raises(HomonymsFound) as caught:
        guard(legacy.engine, Employee)
    (group,) = caught.value.groups
    assert (group.kept, group.duplicates, group.homonyms) == (1, (3, 5), ("title",))
    guard(legacy.engine, Employee, rules=Rules(accept_homonyms=True))
    assert len(legacy.rows(GUARDS)) == 2


def test_a_plan_says_who_is_the_same_and_which_row_is_kept(legacy: Site) -> None:
    """Also where the employees are in two departments yet, and where one of them is gone."""
    legacy.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    same = Decisions([PlannedGroup("employee", 3, (1, 5), "same")])
    guard(legacy.engine, Employee, decisions=same)
    assert legacy.rows(MARKS) == [(1, 3), (2, None), (3, None), (4, None), (5, 3)]


@pytest.mark.parametrize(
    ("decision", "change"),
    [
        ("leave", "SELECT"),
        (None, "SELECT"),
        ("same", "INSERT INTO employee (name, department_id, title) VALUES ('Ann', 1, 'New')"),
    ],
)
def test_homonyms_that_the_plan_leaves_or_does_not_know_stop_the_guard(
    legacy: Site, decision: str | None, change: str
) -> None:
    """Of a row that came later nobody has said who it is."""
    legacy.run("UPDATE employee SET title = 'Boss' WHERE id = 1", change)
    decisions = Decisions([PlannedGroup("employee", 1, (3, 5), decision)])
    with legacy.unchanged(), pytest.raises(HomonymsFound):
        guard(legacy.engine, Employee, decisions=decisions)


def test_a_plan_decides_on_rows_of_which_some_are_marked_or_gone(site: Site) -> None:
    """They were all said to be the same."""
    site.add_department("Sales")
    for title in ("Boss", "Clerk", "Smith"):
        site.add_employee("Ann", title=title)
    site.run("UPDATE employee SET duplicate_of_id = 1 WHERE id = 2")
    decisions = Decisions([PlannedGroup("employee", 2, (1, 3, 9), "same")])
    guard(site.engine, Employee, decisions=decisions)
    assert site.rows(MARKS) == [(1, None), (2, 1), (3, 1)]


def test_a_plan_gives_homonyms_another_name(legacy: Site) -> None:
    """The others are one then; the name is stored as new ones are."""
    legacy.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    before = legacy.image()
    renamed = PlannedGroup("employee", 1, (3, 5), rename={"1": {"name": "Ann  Boss"}})
    left = PlannedGroup("department", 3, (4,))
    _, employees = guard(legacy.engine, Employee, decisions=Decisions([renamed, left]))
    assert (employees.renamed, employees.normalised) == (1, 3)
    assert legacy.rows("SELECT name FROM employee WHERE id = 1") == ["Ann Boss"]
    assert legacy.rows(MARKS) == [(1, None), (2, None), (3, None), (4, None), (5, 3)]
    unguard(legacy.engine, Employee, unmark=True)
    unguard(legacy.engine, Department, unmark=True)
    assert legacy.image() == before


def test_renaming_one_homonym_does_not_decide_on_the_others(legacy: Site) -> None:
    """Nothing at all is changed before each group is decided on."""
    legacy.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    legacy.add_employee("Dan", "Dan", title="Clerk")
    legacy.run("UPDATE employee SET title = 'Smith' WHERE id = 7")
    renamed = Decisions([PlannedGroup("employee", 1, (3, 5), rename={"1": {"name": "Boss"}})])
    with legacy.unchanged(), pytest.raises(HomonymsFound) as caught:
        guard(legacy.engine, Employee, decisions=renamed)
    assert [group.kept for group in caught.value.groups] == [6]


@pytest.mark.parametrize(
    ("key", "guarded", "says"),
    [
        ({"title": "Boss"}, False, "the key of employee is department_id, name"),
        ({"department_id": "x"}, False, "employee 2 cannot be given"),
        ({"department_id": 99}, False, "employee 2 cannot be given"),
        ({"name": None}, False, "employee 2 cannot be given"),
        ({"name": "Ann"}, True, "employee 2 cannot be given"),
    ],
)
def test_a_name_that_cannot_be_given_makes_the_plan_unusable(
    site: Site, key: dict[str, Any], guarded: bool, says: str
) -> None:
    """No column of the key, no value of its type, a key that somebody has."""
    site.add_department("Sales")
    site.add_employee("Ann", "Bob")
    if guarded:
        guard(site.engine, Employee)
    plan = Decisions([PlannedGroup("employee", 1, (2,), rename={"2": key})])
    with site.unchanged(), pytest.raises(UnusablePlan, match=says):
        guard(site.engine, Employee, decisions=plan)


def test_other_parts_of_a_key_are_left_as_they_are(own: Engine) -> None:
    """Only what changes is written: a number would lose digits on the way."""
    site, digits = Site(own, Tag), "12345678901234567890.123456789"
    site.run(
        "ALTER TABLE tag ALTER label TYPE numeric",
        "INSERT INTO tag (scope_name, label, scalar, called, expression, numbered, color)"
        f" VALUES (' a ', {digits}, 's', 0, now(), 0, 'c')",
    )
    guard(own, Tag)
    assert site.rows("SELECT scope_name, label::text FROM tag") == [("a", digits)]
    unguard(own, Tag, unmark=True)
    assert site.rows("SELECT scope_name, label::text FROM tag") == [(" a ", digits)]


def test_a_key_in_its_normal_form_that_is_taken_is_left_for_the_next_look(site: Site) -> None:
    """The rows beside it get theirs; nobody waits for what does not change."""
    site.add_department("Sales")
    guard(site.engine, Employee)
    site.add_department(" Sales", " Lab ")
    tables = site.tables
    marker = Marker(site.engine, tables, tables.of(Department), Rules(), RetryPolicy(), Decisions())
    assert marker.normalise_all(lambda count: None) == 1
    assert site.rows("SELECT name FROM department ORDER BY id") == ["Sales", " Sales", "Lab"]
    (departments,) = guard(site.engine, Department)
    assert (departments.marked, departments.passes) == (1, 1)


def test_a_group_that_changes_before_it_is_marked_is_looked_at_again(legacy: Site) -> None:
    """The others are marked all the same."""
    legacy.add_employee("Dan", "Dan", "Eve", "Eve", department=3)
    tables = legacy.tables

    class Meddling(Decisions):
        def apply(self, group: Any) -> Any:
            if group.table == "employee" and group.kept == 6:
                legacy.run("DELETE FROM employee WHERE id = 7")
            return group

    guard(legacy.engine, Department)
    marker = Marker(legacy.engine, tables, tables.of(Employee), Rules(), RetryPolicy(), Meddling())
    marked: list[int] = []
    assert marker.mark_all(marked.append) == 1
    assert legacy.rows("SELECT duplicate_of_id FROM employee WHERE id IN (6, 9) ORDER BY id") == [
        None,
        8,
    ]


def test_a_department_that_changes_before_it_is_marked_waits_for_the_next_look(
    legacy: Site,
) -> None:
    """Nothing of it is marked."""
    tables = legacy.tables
    journal.create(legacy.engine, tables.of(Department))

    class Meddling(Decisions):
        def apply(self, group: Any) -> Any:
            legacy.run("UPDATE department SET name = 'Sale' WHERE id = 2")
            return group

    marker = Marker(
        legacy.engine, tables, tables.of(Department), Rules(), RetryPolicy(), Meddling()
    )
    assert marker.mark_all(lambda count: None) == 0
    assert legacy.rows("SELECT duplicate_of_id FROM department") == [None] * 3


def test_a_lost_reply_to_commit_marks_once(legacy: Site) -> None:
    """The journal says that it was done; so do keys that are normal already."""
    tables = legacy.tables
    journal.create(legacy.engine, tables.of(Employee))
    with lossy_proxy(legacy.engine.url.render_as_string(False)) as (proxy, through):
        lossy = create_engine(through, poolclass=NullPool)
        for model in (Department, Employee):
            marker = Marker(lossy, tables, tables.of(model), Rules(), RetryPolicy(), Decisions())
            proxy.lose_reply_to = b"COMMIT"
            marker.mark_all(lambda count: None)
        assert marker.normalise_all(lambda count: None) == 1
        assert proxy.lost == 2
    assert [entry.action for entry in legacy.entries()] == ["mark", "mark"]


def test_a_guard_that_writers_wait_for_is_built_once(legacy: Site) -> None:
    """A lost reply to COMMIT is no failure; what a build that failed has left goes."""
    tables = legacy.tables
    table = tables.of(Department)
    journal.create(legacy.engine, table)
    with pytest.raises(IntegrityError), legacy.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
            "CREATE UNIQUE INDEX CONCURRENTLY uq_department_natural_key ON department ((1))"
        )

    def build(connection: Connection) -> None:
        build_guard_at_once(connection, "department", ("name",))

    with lossy_proxy(legacy.engine.url.render_as_string(False)) as (proxy, through):
        lossy = create_engine(through, poolclass=NullPool)
        marker = Marker(lossy, tables, table, Rules(), RetryPolicy(), Decisions())
        proxy.lose_reply_to = b"COMMIT"
        assert marker.mark_last(build) == 1
        assert proxy.lost == 1
    assert legacy.rows(GUARDS) == ["uq_department_natural_key"]
    assert [entry.action for entry in legacy.entries()] == ["mark"]


def test_rows_that_are_gone_or_marked_get_no_other_key(legacy: Site) -> None:
    """Nor does one that has it already."""
    legacy.run("UPDATE employee SET duplicate_of_id = 1 WHERE id = 3")
    tables = legacy.tables
    table = tables.of(Employee)
    marker = Marker(legacy.engine, tables, table, Rules(), RetryPolicy(), Decisions())
    with legacy.unchanged():
        assert marker.rekey(dict.fromkeys([1, 3, 99])) == 0


def test_homonyms_that_appear_between_look_and_lock_stop_the_guard(legacy: Site) -> None:
    """They are never marked unseen."""
    legacy.add_employee("Dan", "Dan", department=3)

    class Meddling(Decisions):
        def apply(self, group: Any) -> Any:
            if group.kept == 6:
                legacy.run(
                    "UPDATE employee SET title = 'A' WHERE id = 6",
                    "UPDATE employee SET title = 'B' WHERE id = 7",
                )
            return group

    with pytest.raises(HomonymsFound) as caught:
        guard(legacy.engine, Employee, decisions=Meddling())
    assert [(one.kept, one.key["name"]) for one in caught.value.groups] == [(6, "Dan")]
    assert legacy.rows("SELECT duplicate_of_id FROM employee WHERE id = 7") == [None]


def test_where_duplicates_keep_arriving_writers_have_to_wait_at_last(
    legacy: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few builds in vain; whoever writes meanwhile does so before it or after it."""
    converge = guards.converge_indexes
    refused = []

    def too_late(*arguments: Any, **options: Any) -> Any:
        try:
            legacy.add_department("Dan", "Dan")
        except IntegrityError as error:
            refused.append(error)
        return converge(*arguments, **options)

    monkeypatch.setattr(guards, "converge_indexes", too_late)
    (done,) = guard(legacy.engine, Department)
    assert done.passes == guards.PASSES + 1
    assert len(refused) == 1
    assert "uq_department_natural_key" in legacy.rows(GUARDS)


def test_a_guard_that_somebody_takes_off_at_once_is_not_said_to_stand(
    legacy: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for a person to find out who that is."""
    converge = guards.converge_indexes

    def take_off(*arguments: Any, **options: Any) -> Any:
        legacy.run("DROP INDEX IF EXISTS uq_department_natural_key")
        legacy.add_department("Dan", "Dan")
        return converge(*arguments, **options)

    monkeypatch.setattr(guards, "converge_indexes", take_off)
    with pytest.raises(NotGuarded, match="run it again"):
        guard(legacy.engine, Department)


def test_writers_below_serializable_can_be_refused(legacy: Site) -> None:
    """They are told what to do instead; what changes no key goes on."""
    table = legacy.tables.of(Employee)
    refuse_unsafe_writers(legacy.engine, table, 5)
    refuse_unsafe_writers(legacy.engine, table, 5)
    for change in (
        "INSERT INTO employee (name, department_id) VALUES ('Eve', 1)",
        "UPDATE employee SET name = 'Eve' WHERE id = 1",
    ):
        with pytest.raises(DBAPIError, match="until it is guarded") as caught:
            legacy.run(change)
        assert sqlstate(caught.value) == "55000"
        legacy.run(f"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; {change}")
    legacy.run("UPDATE employee SET title = 'Boss'")
    admit_all_writers(legacy.engine, table, 5)
    admit_all_writers(legacy.engine, table, 5)
    legacy.run("UPDATE employee SET name = 'Eva' WHERE id = 1")
    assert legacy.rows("SELECT proname FROM pg_proc WHERE proname LIKE 'rollcall%%'") == []


def test_taking_the_guard_off_admits_writers_whom_a_broken_one_has_left_refused(
    legacy: Site,
) -> None:
    """The trigger stays up when a guard comes to no end: it is what keeps duplicates out."""
    refuse_unsafe_writers(legacy.engine, legacy.tables.of(Department), 5)
    with pytest.raises(DBAPIError, match="SERIALIZABLE"):
        legacy.add_department("Dan")
    unguard(legacy.engine, Department)
    legacy.add_department("Dan")


def test_the_trigger_of_another_table_stays(legacy: Site) -> None:
    """They have one function together."""
    department, employee = (legacy.tables.of(model) for model in (Department, Employee))
    refuse_unsafe_writers(legacy.engine, department, 5)
    refuse_unsafe_writers(legacy.engine, employee, 5)
    admit_all_writers(legacy.engine, department, 5)
    with pytest.raises(DBAPIError):
        legacy.add_employee("Eve")


def test_unsafe_writers_are_refused_until_the_guard_stands(legacy: Site) -> None:
    """And no longer."""
    refused = []

    def tell(what: str, count: int) -> None:
        if what == "employee: building the guard":
            with pytest.raises(DBAPIError, match="until it is guarded"):
                legacy.add_employee("Ann")
            refused.append(what)

    guard(legacy.engine, Employee, refuse_unsafe=True, tell=tell)
    assert refused
    legacy.add_employee("Eve")


def test_a_writer_who_does_not_end_blocks_the_trigger_and_nobody_else(legacy: Site) -> None:
    """It is tried again and again, so that others go in between."""
    table = legacy.tables.of(Employee)
    with legacy.engine.connect() as stranger:
        stranger.exec_driver_sql("UPDATE employee SET title = 'Boss' WHERE id = 1")
        with pytest.raises(NotGuarded, match="employee"):
            refuse_unsafe_writers(legacy.engine, table, 0.3)
    refuse_unsafe_writers(legacy.engine, table, 5)
    with legacy.engine.connect() as stranger:
        stranger.exec_driver_sql("SELECT FROM employee")
        with pytest.raises(NotGuarded, match="employee"):
            admit_all_writers(legacy.engine, table, 0.3)
    admit_all_writers(legacy.engine, table, 5)


def test_a_guard_that_has_no_trigger_to_take_down_waits_for_no_reader(legacy: Site) -> None:
    """A reader's lock would hold up everybody behind it."""
    with legacy.engine.connect() as stranger:
        stranger.exec_driver_sql("SELECT FROM employee")
        admit_all_writers(legacy.engine, legacy.tables.of(Employee), 0.3)


@pytest.mark.parametrize("namesake", [False, True])
def test_a_table_on_no_search_path_is_named(own: Engine, namesake: bool) -> None:
    """Indexes are built by bare names: that is said before anything is changed."""
    if namesake:
        Site(own).run("CREATE TABLE legacy (id int)")
    says = "another table is called 'legacy'" if namesake else "no table 'legacy'"
    with pytest.raises(BootstrapError, match=says):
        guard(own, Legacy)
    with pytest.raises(BootstrapError, match=says):
        unguard(own, Legacy)
    assert Site(own).rows("SELECT to_regclass('old.rollcall_merge')::text") == [None]


@pytest.mark.parametrize("broken", ["indisready = false, indisvalid = false", "indisvalid = false"])
def test_what_a_broken_build_left_is_repaired(legacy: Site, broken: str) -> None:
    """Of both kinds: one that enforces nothing, and one that enforces and is of no use."""
    legacy.run(
        "DELETE FROM employee WHERE id IN (3, 5)",
        "CREATE UNIQUE INDEX uq_employee_natural_key ON employee (department_id, name)"
        " NULLS NOT DISTINCT WHERE duplicate_of_id IS NULL",
        f"UPDATE pg_index SET {broken} WHERE indexrelid = 'uq_employee_natural_key'::regclass",
    )
    if "indisready" in broken:
        legacy.add_employee("Ann")
    guard(legacy.engine, Employee)
    assert legacy.rows(GUARDS) == ["uq_department_natural_key", "uq_employee_natural_key"]
    with pytest.raises(IntegrityError):
        legacy.add_employee("Ann")
