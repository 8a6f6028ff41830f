"""Rows with one natural key are found, whatever their spelling, and one of them is kept."""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, create_engine, text

from app.duplicates import journal
from app.duplicates.groups import Group, Page, Within, find_groups
from app.duplicates.tables import Model, SoftReference, read_tables
from app.models import Department, Employee
from app.natural_key import normalise
from tests.conftest import empty
from tests.other_models import Legacy, Stamp, Tag


@pytest.fixture(scope="module")
def engine(migrated_url: str) -> Iterator[Engine]:
    """An engine on a database with our tables, for transactions of which nothing stays."""
    empty(migrated_url)
    engine = create_engine(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        prepare(connection)
        yield connection


def prepare(connection: Connection) -> None:
    """Take the guards off, within the transaction."""
    connection.exec_driver_sql(
        "DROP INDEX IF EXISTS uq_department_natural_key, uq_employee_natural_key;"
        "INSERT INTO department (id, name) OVERRIDING SYSTEM VALUE VALUES (1, 'Sales'), (2, 'Ops')"
    )


def insert(connection: Connection, table: str, *rows: dict[str, Any]) -> None:
    """Insert rows; employees are in the first department and called Ann Lee if nothing is said."""
    for row in rows:
        values = {"name": "Ann Lee", "department_id": 1} | row if table == "employee" else row
        columns, parameters = ", ".join(values), ", ".join(f":{name}" for name in values)
        identity = "OVERRIDING SYSTEM VALUE" if "id" in values else ""
        connection.execute(
            text(f"INSERT INTO {table} ({columns}) {identity} VALUES ({parameters})"), values
        )


def people(connection: Connection, *rows: dict[str, Any]) -> None:
    insert(connection, "employee", *rows)


def groups(
    connection: Connection,
    keep: str = "oldest",
    model: Model = Employee,
    soft: Sequence[SoftReference] = (),
    **options: Any,
) -> list[Group]:
    tables = read_tables(connection, model, soft)
    return list(find_groups(connection, tables, tables.of(model), keep, **options))


def group(connection: Connection, keep: str = "oldest", **options: Any) -> Group:
    """Return the only group."""
    (found,) = groups(connection, keep, **options)
    return found


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("oldest", 11), ("newest", 14), ("most-referenced", 13), ("most-complete", 12)],
)
def test_the_policy_says_which_row_is_kept(connection: Connection, keep: str, kept: int) -> None:
    """A title of blanks fills nothing; of equal ones the oldest is kept."""
    people(
        connection,
        {"id": 11, "title": " "},
        {"id": 12, "title": "Staff", "email": "ann@example.org"},
        {"id": 13, "title": "Staff"},
        {"id": 14},
        {"id": 20, "name": "Bob", "manager_id": 13},
    )
    found = group(connection, keep)
    assert found.kept == kept
    assert {found.kept, *found.duplicates} == {11, 12, 13, 14}
    assert found.unmarked == found.duplicates
    assert not found.settled
    assert found.references == {"13": {"employee.manager_id": 1}}


@pytest.mark.parametrize("keep", ["oldest", "most-referenced", "most-complete"])
def test_of_rows_that_are_alike_the_oldest_is_kept(connection: Connection, keep: str) -> None:
    """Whatever the policy, if it is not the newest."""
    people(connection, {"id": 12}, {"id": 11}, {"id": 13})
    assert (group(connection, keep).kept, group(connection, keep).duplicates) == (11, (12, 13))


def test_rows_that_differ_in_what_people_filled_in_are_homonyms(connection: Connection) -> None:
    """A blank differs from nothing, nor does what Rollcall keeps for itself."""
    people(
        connection,
        {"id": 11, "title": "Staff", "created_at": "2020-01-01"},
        {"id": 12, "title": " Staff ", "email": "ann@example.org"},
        {"id": 13, "title": " ", "email": None},
        {"id": 21, "name": "Bob", "title": "Staff"},
        {"id": 22, "name": "Bob", "title": "Manager", "hired_on": "2020-01-01"},
    )
    same, others = sorted(groups(connection), key=lambda one: -len(one.duplicates))
    assert (same.homonyms, same.are_homonyms) == ((), False)
    assert (others.homonyms, others.are_homonyms) == (("title",), True)


def test_a_column_that_the_models_do_not_know_tells_people_apart(connection: Connection) -> None:
    """It is data all the same, whatever its name and type."""
    connection.exec_driver_sql("""ALTER TABLE employee ADD "Ph'one %%" json""")
    people(connection, {"id": 11}, {"id": 12})
    connection.exec_driver_sql("""UPDATE employee SET "Ph'one %%" = to_json(id)""")
    assert group(connection).homonyms == ("Ph'one %",)


def test_a_manager_and_their_duplicate_are_one(connection: Connection) -> None:
    """A reference to a marked row means the row that is kept."""
    people(
        connection,
        {"id": 1, "name": "Bob"},
        {"id": 2, "name": "Bob", "duplicate_of_id": 1},
        {"id": 11, "manager_id": 1},
        {"id": 12, "manager_id": 2},
    )
    found = next(one for one in groups(connection) if one.kept == 11)
    assert found.homonyms == ()


def test_spellings_of_one_key_are_one(connection: Connection) -> None:
    """White space of every kind, and how Unicode composes; not case or accents."""
    people(
        connection,
        {"id": 11, "name": "José  Li"},
        {"id": 12, "name": unicodedata.normalize("NFD", "José Li ")},
        {"id": 13, "name": "\u2003José\u00a0\tLi"},
        {"id": 14, "name": "Jose Li"},
        {"id": 15, "name": "josé li"},
    )
    found = group(connection)
    assert (found.kept, found.duplicates) == (11, (12, 13))
    assert found.key == {"department_id": 1, "name": "José  Li"}


def test_employees_of_departments_that_are_one_are_one(connection: Connection) -> None:
    """Though nothing is merged yet, and also by way of a marked department."""
    insert(
        connection,
        "department",
        {"id": 3, "name": "Sales "},
        {"id": 4, "name": "Gone", "duplicate_of_id": 1},
    )
    people(
        connection,
        {"id": 11, "department_id": 1},
        {"id": 12, "department_id": 3},
        {"id": 13, "department_id": 4},
        {"id": 14, "department_id": 2},
    )
    for keep in ("oldest", "newest", "most-referenced", "most-complete"):
        found = group(connection, keep)
        assert {found.kept, *found.duplicates} == {11, 12, 13}


def test_a_row_that_has_duplicates_stays_the_one_that_is_kept(connection: Connection) -> None:
    """Whatever the policy; the duplicates of all such rows are in the group."""
    people(
        connection,
        {"id": 11},
        {"id": 12},
        {"id": 13, "name": "Other", "duplicate_of_id": 12},
        {"id": 14, "title": "Staff"},
    )
    for keep in ("oldest", "newest", "most-complete"):
        found = group(connection, keep)
        assert (found.kept, found.settled) == (12, True)
        assert set(found.duplicates) == {11, 13, 14}
        assert (found.marked, set(found.unmarked)) == ((13,), {11, 14})
    people(connection, {"id": 15, "duplicate_of_id": 14})
    found = group(connection)
    assert (found.kept, set(found.marked)) == (12, {13, 15})


def test_marked_homonyms_are_decided(connection: Connection) -> None:
    """The mark says that somebody did."""
    people(
        connection,
        {"id": 11, "title": "Staff"},
        {"id": 12, "title": "Manager", "duplicate_of_id": 11},
    )
    found = group(connection)
    assert (found.homonyms, found.are_homonyms) == (("title",), False)


def test_which_groups_can_be_chosen(connection: Connection) -> None:
    """Those with marks, those without, those of some ids, those of some departments."""
    people(
        connection,
        {"id": 11},
        {"id": 12, "duplicate_of_id": 11},
        {"id": 13},
        {"id": 21, "name": "Bob"},
        {"id": 22, "name": "Bob"},
        {"id": 31, "name": "Cid", "department_id": 2},
        {"id": 32, "name": "Cid", "department_id": 2},
        {"id": 40, "name": "Dan"},
    )

    def ids(**options: Any) -> list[set[int]]:
        return [{one.kept, *one.duplicates} for one in groups(connection, **options)]

    assert ids() == [{11, 12, 13}, {21, 22}, {31, 32}]
    assert ids(which="marked") == [{11, 12}]
    assert ids(which="unmarked") == [{11, 13}, {21, 22}, {31, 32}]
    assert ids(of=[12]) == [{11, 12, 13}]
    assert ids(of=[22, 40, 32]) == [{21, 22}, {31, 32}]
    assert ids(of=[]) == []
    assert ids(within=Within("department_id", [2])) == [{31, 32}]


def test_merged_rows_are_left_out_unless_something_refers_to_them(connection: Connection) -> None:
    """A reference that arrived since has to be brought along; an undone merge is none."""
    people(
        connection,
        {"id": 11},
        {"id": 12, "duplicate_of_id": 11},
        {"id": 13, "duplicate_of_id": 11},
        {"id": 20, "name": "Bob", "manager_id": 13},
    )
    connection.exec_driver_sql(journal.CREATE.format(schema="public"))
    tables = read_tables(connection, Employee)
    employee = tables.of(Employee)
    journal.Journal(connection, employee).begin(journal.MERGE, employee, 11, [12, 13])
    assert group(connection).marked == (13,)
    assert groups(connection, which="unmarked") == []
    connection.exec_driver_sql("UPDATE rollcall_merge SET undone_at = now()")
    assert group(connection).marked == (12, 13)


def test_rows_that_refer_to_a_group_are_counted(connection: Connection) -> None:
    """By foreign keys of one column and of several, of partitions, and by declared columns."""
    connection.exec_driver_sql(
        "ALTER TABLE employee ADD UNIQUE (id, department_id);"
        "CREATE TABLE seat (d bigint, e bigint,"
        " FOREIGN KEY (e, d) REFERENCES employee (id, department_id));"
        "CREATE TABLE shift (e bigint REFERENCES employee, day int) PARTITION BY LIST (day);"
        "CREATE TABLE shift_1 PARTITION OF shift FOR VALUES IN (1);"
        "CREATE TABLE log (who bigint)"
    )
    people(connection, {"id": 11}, {"id": 12}, {"id": 20, "name": "Bob", "manager_id": 20})
    insert(connection, "seat", {"d": 1, "e": 12}, {"d": None, "e": 12}, {"d": 1, "e": 11})
    insert(connection, "shift", {"e": 12, "day": 1}, {"e": 12, "day": 1})
    insert(connection, "log", {"who": 11}, {"who": 99}, {"who": None})
    soft = [SoftReference("log", "who", "employee")]
    assert group(connection, soft=soft).references == {
        "11": {"log.who": 1, "seat.e+d": 1},
        "12": {"seat.e+d": 1, "shift.e": 2},
    }
    assert group(connection, "most-referenced", soft=soft).kept == 12


def test_the_largest_group_comes_first(connection: Connection) -> None:
    """And of equal ones the one with the oldest row."""
    people(connection, *({"id": n, "name": "Bob"} for n in (31, 32)))
    people(connection, *({"id": n} for n in (21, 22, 23)))
    people(connection, *({"id": n, "name": "Cid"} for n in (11, 12)))
    assert [one.kept for one in groups(connection)] == [21, 11, 31]


def test_nulls_are_one_key(own: Engine) -> None:
    """As the guard has them; of an integer and a nullable text."""
    with own.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO tag (scope_name, label, scalar, called, expression, numbered, color)"
            " SELECT s, l, 's', 0, now(), 0, n::text FROM (VALUES (1, NULL, 1), (2, NULL, 1),"
            " (3, NULL, 2), (4, '', 1), (5, ' ', 1), (6, 'a', 1)) AS v (n, s, l)"
        )
        found = groups(connection, model=Tag)
    assert [(one.kept, one.duplicates) for one in found] == [(1, (2,)), (4, (5,))]
    assert found[0].key == {"scope_name": None, "label": 1}
    assert found[0].homonyms == ("color",)


def test_a_table_without_references_has_groups(own: Engine) -> None:
    """Nothing refers to a stamp; its key is no text."""
    with own.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO stamp (at, blob, notes) VALUES (NULL, '', '{}'), (NULL, '', '[]')"
        )
        (found,) = groups(connection, "most-complete", model=Stamp)
    assert (found.kept, found.references, found.homonyms) == (1, {}, ("notes",))


def test_ids_may_be_of_any_type(own: Engine) -> None:
    """They are as JSON has them, such as those that PostgreSQL 17 knows no least of."""
    ids = [f"{digit * 8}-0000-4000-8000-000000000000" for digit in "1234"]
    with own.connect() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE old.legacy ALTER duplicate_of_id TYPE uuid USING NULL;"
            "INSERT INTO old.legacy (legacy_key, name, duplicate_of_id) VALUES"
            " (%(2)s, 'a', NULL), (%(0)s, 'a ', NULL), (%(1)s, 'a', %(2)s), (%(3)s, 'b', NULL)",
            dict(zip("0123", ids, strict=True)),
        )
        found = group(connection, model=Legacy)
        assert group(connection, model=Legacy, of=[ids[1]]) == found
    assert (found.kept, set(found.duplicates)) == (ids[2], {ids[0], ids[1]})
    assert found.marked == (ids[1],)


def test_groups_come_in_pages(connection: Connection) -> None:
    """In the order of their lowest canonical ids, so that the last of a page leads to the next."""
    people(connection, {"id": 11}, {"id": 21, "name": "Bob"}, {"id": 22, "name": "Bob"})
    people(connection, *({"id": id} for id in (12, 13)))
    people(connection, {"id": 5, "name": "Cid"}, {"id": 31, "name": "Cid", "duplicate_of_id": 5})
    people(connection, {"id": 4, "name": "Dan"}, {"id": 3, "name": "Dan", "duplicate_of_id": 4})
    first = groups(connection, page=Page(0, 2))
    assert [(one.kept, one.lowest) for one in first] == [(4, 4), (5, 5)]
    second = groups(connection, "newest", page=Page(first[-1].lowest, 2))
    assert [(one.kept, one.lowest) for one in second] == [(13, 11), (22, 21)]
    assert groups(connection, page=Page(second[-1].lowest, 2)) == []


def test_a_table_without_details_has_groups(connection: Connection) -> None:
    """There is nothing to fill in, so that no policy can count it, and no homonym."""
    insert(connection, "department", {"id": 3, "name": "Sales"}, {"id": 4, "name": " Sales"})
    found = group(connection, "most-complete", model=Department)
    assert (found.kept, found.duplicates, found.homonyms) == (1, (3, 4), ())


def test_the_connection_is_left_as_it_was(connection: Connection) -> None:
    """Statements that follow are not sent by way of a cursor, which takes no INSERT."""
    people(connection, {"id": 11}, {"id": 12})
    assert group(connection).kept == 11
    people(connection, {"id": 13})
    assert group(connection).duplicates == (12, 13)


NAMES = st.sampled_from(
    ["Bo Li", "Bo  Li", " Bo Li", "Bo\u00a0Li", "bo li", "Jose\u0301", "Jos\u00e9", "Jose", ""]
) | st.text("aé\u0301 \t\u2003", max_size=4)
ROWS = st.lists(st.tuples(st.integers(0, 3), NAMES, st.booleans()), max_size=12)


@settings(max_examples=30, deadline=None)
@given(departments=st.lists(st.tuples(NAMES, st.booleans()), min_size=4, max_size=4), rows=ROWS)
def test_every_redundant_row_is_planned_once(
    engine: Engine, departments: list[tuple[str, bool]], rows: list[tuple[int, str, bool]]
) -> None:
    """The groups are those that Python makes by the rule that new keys are stored by."""
    keys = [normalise(name) for name, _ in departments]
    with engine.connect() as connection:
        prepare(connection)
        connection.exec_driver_sql("DELETE FROM department")
        store(connection, "department", [({}, name, mark) for name, mark in departments], keys)
        store(
            connection,
            "employee",
            [({"department_id": 1 + place}, name, mark) for place, name, mark in rows],
            [(keys[place], normalise(name)) for place, name, _ in rows],
        )
        check(groups(connection, model=Department), keys)
        check(groups(connection), [(keys[place], normalise(name)) for place, name, _ in rows])


def store(
    connection: Connection,
    table: str,
    rows: list[tuple[dict[str, Any], str, bool]],
    keys: Sequence[Any],
) -> None:
    """Store rows with ids from 1; those that want to be are marked, if an earlier one is kept."""
    roots: dict[Any, int] = {}
    for id, ((more, name, mark), key) in enumerate(zip(rows, keys, strict=True), 1):
        root = roots.setdefault(key, id)
        kept = root if mark and root != id else None
        insert(connection, table, {"id": id, "name": name, "duplicate_of_id": kept, **more})


def check(found: list[Group], keys: Sequence[Any]) -> None:
    expected = defaultdict(set)
    for id, key in enumerate(keys, 1):
        expected[key].add(id)
    planned = list(itertools.chain.from_iterable(one.duplicates for one in found))
    assert len(planned) == len(set(planned)) == len(keys) - len(expected)
    assert {frozenset({one.kept, *one.duplicates}) for one in found} == {
        frozenset(ids) for ids in expected.values() if len(ids) > 1
    }
    assert all(one.kept == min(one.kept, *one.duplicates) for one in found)
