"""get_or_create_many: what get_or_create does, for a list, in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from threading import Event
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from app import directory
from app.db import db
from app.errors import NaturalKeyTaken, NotStored
from app.models import Department, Employee
from app.natural_key import normalise
from app.transactions import RetryPolicy
from tests.conftest import count, stranger_with_a_tag, waits
from tests.other_models import Badge, Basket, Car, Legacy, Stamp, Tag
from tests.proxy import before_each_rerun, lossy_proxy
from tests.races import eventually, inserts_held, together


def people(department_id: int, *names: str) -> list[dict[str, Any]]:
    return [{"department_id": department_id, "name": name} for name in names]


def test_results_are_in_the_order_of_the_items(sales: int) -> None:
    """Some are there, some are created; each has what its own item gave."""
    Employee.get_or_create(department_id=sales, name="B", defaults={"title": "old"})
    items = people(sales, "C", "B", "A")
    for item in items:
        item["defaults"] = {"title": f"{item['name']}'s"}

    results = Employee.get_or_create_many(items)

    found = [(employee.name, employee.title, created) for employee, created in results]
    assert found == [("C", "C's", True), ("B", "old", False), ("A", "A's", True)]
    assert all(employee in db.session for employee, _ in results)
    assert [employee.id for employee, _ in results] == [2, 1, 3]


def test_repeats_are_collapsed(sales: int) -> None:
    """The first creates, in whatever spelling; the later ones find its row."""
    names = ["Ann Lee", " Ann  Lee ", "Bob", "Ann\u00a0Lee", "Bob"]
    results = Employee.get_or_create_many(
        {**item, "defaults": {"title": str(number)}}
        for number, item in enumerate(people(sales, *names))
    )
    assert [created for _, created in results] == [True, False, True, False, False]
    assert [employee.title for employee, _ in results] == ["0", "0", "2", "0", "2"]
    assert count(Employee) == 2


def test_an_empty_list_is_well(sales: int) -> None:
    """Nothing comes of nothing."""
    assert Employee.get_or_create_many([]) == []


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.sampled_from(["a", " a", "b", "b ", "c  d", "c d", "\u00e9", "e\u0301"])),
    run=st.integers(0, 1),
)
def test_a_list_is_as_good_as_its_items_one_by_one(sales: int, names: list[str], run: int) -> None:
    """The same rows, the same answers, whatever is there already and repeats itself."""
    db.session.execute(text("TRUNCATE employee"))
    db.session.commit()
    for name in names[: len(names) * run // 2]:
        Employee.get_or_create(department_id=sales, name=name)
    expected, seen = [], set(db.session.scalars(select(Employee.name)))
    db.session.rollback()
    for name in names:
        expected.append((normalise(name), normalise(name) not in seen))
        seen.add(normalise(name))

    results = Employee.get_or_create_many(people(sales, *names))

    assert [(employee.name, created) for employee, created in results] == expected
    db.session.rollback()


def test_items_may_give_different_columns(sales: int) -> None:
    """What an item does not give is NULL, as in a call of its own."""
    one, two = people(sales, "One", "Two")
    one["defaults"] = {"title": "T"}
    two["defaults"] = {"email": "two@example.org"}
    results = Employee.get_or_create_many([one, two])
    assert [(e.title, e.email) for e, _ in results] == [("T", None), (None, "two@example.org")]


def test_a_legacy_spelling_is_found(sales: int) -> None:
    """As sent, also beside items that have one spelling only."""
    db.session.execute(text(f"INSERT INTO employee (name, department_id) VALUES ('A  B', {sales})"))
    db.session.commit()
    results = Employee.get_or_create_many(people(sales, "A  B", "C"))
    assert [(employee.name, created) for employee, created in results] == [
        ("A  B", False),
        ("C", True),
    ]


def test_references_to_duplicates_are_led_to_canonical_rows(sales: int) -> None:
    """Also where that makes two items of the list the same."""
    db.session.execute(
        text(f"INSERT INTO department (name, duplicate_of_id) VALUES ('Sales', {sales})")
    )
    db.session.commit()
    results = Employee.get_or_create_many(people(sales + 1, "Ann") + people(sales, "Ann"))
    assert [(e.department_id, created) for e, created in results] == [(sales, True), (sales, False)]


def test_nulls_in_keys_are_values_like_others(own: Engine) -> None:
    """NULL finds NULL and nothing else, also beside items without."""
    items = [{"scope": scope, "label": 1} for scope in (None, "x", None, "y ", "y")]
    results = Tag.get_or_create_many(items)
    assert [(tag.scope, created) for tag, created in results] == [
        (None, True),
        ("x", True),
        (None, False),
        ("y", True),
        ("y", False),
    ]
    assert [created for _, created in Tag.get_or_create_many(items)] == [False] * 5


def test_only_nulls_in_a_part_of_the_key(own: Engine) -> None:
    """There is no array for it then."""
    items = [{"scope": None, "label": label} for label in (1, 2, 1)]
    assert [created for _, created in Tag.get_or_create_many(items)] == [True, True, False]


def test_column_defaults_are_evaluated_for_each_item(own: Engine) -> None:
    """Python callables, sequences and expressions as in calls of their own."""
    (one, _), (two, _) = Tag.get_or_create_many([{"scope": "a", "label": n} for n in (1, 2)])
    assert two.called == one.called + 1
    assert (one.numbered, two.numbered) == (1, 2)
    assert (one.scalar, one.served, one.expression) == ("fixed", "server", two.expression)
    assert one.color != two.color


def test_values_go_before_the_databases_defaults_in_all_items_or_in_none(own: Engine) -> None:
    """One insert cannot do both, and says so rather than storing NULL."""
    items: list[dict[str, Any]] = [
        {"scope": "a", "label": n, "defaults": {"served": "me", "numbered": 7}} for n in (1, 2)
    ]
    assert [tag.served for tag, _ in Tag.get_or_create_many(items)] == ["me", "me"]
    del items[0]["defaults"]["numbered"]
    with pytest.raises(TypeError, match="numbered: give it for every item"):
        Tag.get_or_create_many(items)


def test_keys_are_compared_as_the_database_compares_them(own: Engine) -> None:
    """Repeats too: citext knows no case, and nobody in Python could tell."""
    items = [{"label": label, "position": "1"} for label in ("Ann", "ann", "ANN", "bob")]
    results = Badge.get_or_create_many(items)
    assert [created for _, created in results] == [True, False, False, True]
    assert {badge.label for badge, _ in results} == {"Ann", "bob"}


def test_a_table_of_a_schema_with_keys_of_its_own(own: Engine) -> None:
    """UUID keys, a column by another name."""
    results = Legacy.get_or_create_many([{"name": name} for name in ("a", "b", "a")])
    assert [created for _, created in results] == [True, True, False]
    assert results[0][0] is results[2][0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "A"}, "natural key"),
        ({"department_id": 1, "name": "A", "defaults": {"x": 1}}, "x"),
    ],
)
def test_a_wrong_item_is_a_type_error(context: Flask, item: Any, message: str) -> None:
    """Before the database is touched."""
    event.listen(db.engine, "checkout", lambda *args: pytest.fail("touched"))
    with pytest.raises(TypeError, match=message):
        Employee.get_or_create_many([*people(1, "Good"), item])


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ({"name": "x" * 256, "department_id": 1}, DataError),
        ({"name": "Lost", "department_id": 99}, IntegrityError),
    ],
)
def test_one_refused_item_leaves_nothing(
    sales: int, item: dict[str, Any], error: type[Exception]
) -> None:
    """A list is stored whole or not at all; too long a name is refused, not cut off."""
    with pytest.raises(error):
        Employee.get_or_create_many([*people(sales, "Good"), item])
    assert count(Employee) == 0


def test_lists_that_want_the_same_make_it_once(
    context: Flask, sales: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Single creates and lists, in different orders, while all of them look: no row twice."""
    names = [f"Person {number}" for number in range(60)]

    def many(order: int) -> list[tuple[str, bool]]:
        with context.app_context():
            results = Employee.get_or_create_many(people(sales, *names[:: order or 1]))
            return [(employee.name, created) for employee, created in results]

    def singles() -> list[tuple[str, bool]]:
        with context.app_context():
            calls = (Employee.get_or_create(**item) for item in people(sales, *names))
            return [(employee.name, created) for employee, created in calls]

    outcomes = together([partial(many, 1), partial(many, -1), singles, singles])

    created = [name for outcome in outcomes for name, new in outcome if new]
    assert sorted(created) == sorted(names)
    assert count(Employee) == len(names)


def test_a_single_create_that_has_looked_is_not_overtaken(
    context: Flask, sales: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds its look-up's result; a list creates the same key meanwhile, without the lock."""

    def single() -> bool:
        with context.app_context():
            return Employee.get_or_create(department_id=sales, name="Ann")[1]

    db.session.rollback()
    with inserts_held(db.engine, "employee") as gate, ThreadPoolExecutor() as pool:
        first = pool.submit(single)
        gate.wait_for(1)

        def many() -> list[bool]:
            with context.app_context():
                return [new for _, new in Employee.get_or_create_many(people(sales, "Ann", "Bob"))]

        second = pool.submit(many)
        gate.wait_for(2)  # the list has waited for the lock, and then gone on without
        gate.open()
        assert first.result() + sum(second.result()) == 2
    assert sorted(db.session.scalars(select(Employee.name))) == ["Ann", "Bob"]
    assert caplog.records  # one of them lost, and looked again


def test_a_list_waits_for_a_vacuum_only_a_moment(context: Flask, sales: int) -> None:
    """What holds the lock off, such as an index that is being built, does not hold us up."""
    db.session.rollback()
    with db.engine.connect() as other:
        other.exec_driver_sql("LOCK TABLE employee IN SHARE UPDATE EXCLUSIVE MODE")
        results = Employee.get_or_create_many(people(sales, "Ann", "Bob"))
    assert [created for _, created in results] == [True, True]


def test_a_table_that_cannot_be_locked_for_another_reason_is_an_error(own: Engine) -> None:
    """Only the wait is given up on; what is wrong is told."""
    with own.begin() as connection:
        connection.exec_driver_sql("DROP TABLE tag")
    with pytest.raises(Exception, match="tag"):
        Tag.get_or_create_many([{"scope": "a", "label": 1}])


def test_a_statement_that_is_cut_while_it_waits_for_the_lock_is_an_error(own: Engine) -> None:
    """57014 passes, as everywhere."""
    Tag.bind(own, lambda: Session(own), RetryPolicy(statement_timeout=0.05))
    with own.connect() as other:
        other.exec_driver_sql("LOCK TABLE tag IN SHARE UPDATE EXCLUSIVE MODE")
        with pytest.raises(OperationalError) as caught:
            Tag.get_or_create_many([{"scope": "a", "label": 1}])
    assert caught.value.orig.pgcode == "57014"  # type: ignore[union-attr]


def test_arrays_carry_every_character_and_type(own: Engine) -> None:
    """Quotes, backslashes, braces, the word NULL, and what is not plain text."""
    scopes = ['"', "\\", "{a,b}", "NULL", "null", ",", "a'b", "%", "%(x)s", None]
    items: list[dict[str, Any]] = [
        {"scope": scope, "label": 1, "defaults": {"color": f"{scope} is a color"}}
        for scope in scopes
    ]
    results = Tag.get_or_create_many(items)
    assert [(tag.scope, tag.color, new) for tag, new in results] == [
        (scope, f"{scope} is a color", True) for scope in scopes
    ]
    stamps = [datetime(2020, 1, 1, 12, 30), None]
    blobs = Stamp.get_or_create_many(
        {"at": stamp, "defaults": {"blob": b'\x00"', "notes": {"a": [1]}}} for stamp in stamps
    )
    own_session = Session(own)
    rows = own_session.execute(select(Stamp.at, Stamp.blob, Stamp.notes).order_by(Stamp.id)).all()
    own_session.close()
    assert len(blobs) == 2
    assert [tuple(row) for row in rows] == [(stamp, b'\x00"', {"a": [1]}) for stamp in stamps]


@pytest.mark.parametrize("which", ["a create", "a change"])
def test_other_writers_wait_for_a_list_to_end(
    which: str, context: Flask, sales: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What is sent meanwhile looks when it has waited: its first attempt sees what is new."""
    zoe = Employee.get_or_create(department_id=sales, name="Zoe")[0].id
    inserted, go_on = Event(), Event()

    def hold(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "unnest" in statement:
            inserted.set()
            go_on.wait(60)

    def many() -> int:
        with context.app_context():
            return Employee.get_or_create_many(people(sales, "Ann", "Bob"))[0][0].id

    def single() -> int:
        with context.app_context():
            if which == "a create":
                return Employee.get_or_create(department_id=sales, name="Ann")[0].id
            with pytest.raises(NaturalKeyTaken) as taken:
                directory.update(Employee, zoe, {"name": "Ann"})
            return taken.value.id

    db.session.rollback()
    event.listen(db.engine, "after_cursor_execute", hold)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(many)
        inserted.wait(60)
        second = pool.submit(single)
        observer = create_engine(db.engine.url)
        eventually(lambda: waits(observer) == 1)
        go_on.set()
        assert first.result() == second.result()
    observer.dispose()
    assert "transaction retry" not in caplog.text


def test_a_lost_reply_to_the_commit_does_not_make_created_wrong(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """Not even where somebody renamed one of the rows before the re-run."""
    with lossy_proxy(either_url) as (proxy, url), make_app(url).app_context():
        Department.get_or_create_many([{"name": "Warm"}])
        proxy.lose_reply_to = b"COMMIT"
        names = ("Old", "Warm", "Other")
        with before_each_rerun(either_url, "UPDATE department SET name = 'New' WHERE name = 'Old'"):
            results = Department.get_or_create_many([{"name": name} for name in names])

        assert proxy.lost == 1
        assert [(department.name, created) for department, created in results] == [
            ("New", True),
            ("Warm", False),
            ("Other", True),
        ]
        assert count(Department) == 3


def test_a_unique_constraint_that_the_key_had_before_is_a_race_too(own: Engine) -> None:
    """A stranger's row is committed while the list waits for it: found, not refused."""
    with stranger_with_a_tag(own) as stranger, ThreadPoolExecutor() as pool:
        items = [{"scope": "a", "label": label} for label in (1, 2)]
        ours = pool.submit(lambda: [new for _, new in Tag.get_or_create_many(items)])
        eventually(lambda: waits(own) == 1)
        stranger.commit()
        assert ours.result() == [False, True]


def test_employees_and_their_departments_are_one_transaction(context: Flask) -> None:
    """Departments that are named are created with them, or not at all."""
    items = [
        {"name": "Ann", "department": "Sales"},
        {"name": "Bob", "department": " Sales "},
        {"name": "Ann", "department": "Research"},
    ]
    assert [created for _, created in directory.create_employees(items)] == [True, True, True]
    assert count(Department) == 2
    with pytest.raises(DataError):
        directory.create_employees([{"name": "x" * 256, "department": "Lost"}])
    db.session.rollback()
    assert count(Department) == 2


def test_array_columns_cannot_be_in_a_list(own: Engine) -> None:
    """Alone they can."""
    apple = {"label": "a", "defaults": {"fruits": ["apple"]}}
    with pytest.raises(TypeError, match="arrays"):
        Basket.get_or_create_many([apple])
    assert Basket.get_or_create(**apple)[0].fruits == ["apple"]


def test_types_that_convert_their_values_do(own: Engine) -> None:
    """In a list as in a single call."""
    one, _ = Basket.get_or_create(label="ABC")
    assert Basket.get_or_create_many([{"label": "ABC"}, {"label": "abc"}]) == [
        (one, False),
        (one, False),
    ]


def test_a_key_may_be_called_as_we_call_things(own: Engine) -> None:
    """Its names are the application's."""
    car, created = Car.get_or_create(model="T")
    assert Car.get_or_create_many([{"model": "T"}]) == [(car, False)]
    assert created


def test_a_row_that_a_trigger_discards_is_an_error(own: Engine) -> None:
    """Not an endless search for it."""
    with own.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER discard BEFORE INSERT ON basket FOR EACH ROW EXECUTE FUNCTION discard()"
        )
    with pytest.raises(NotStored):
        Basket.get_or_create_many([{"label": "a"}])
    with pytest.raises(NotStored):
        Basket.get_or_create(label="a")
