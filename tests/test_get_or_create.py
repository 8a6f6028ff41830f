"""The mixin: one path that finds or creates, and never makes a second row."""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    Engine,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import (
    Session,
)

from app import directory
from app.db import db
from app.errors import ContentionError
from app.models import Department, Employee
from app.natural_key import normalise
from tests.conftest import count, stranger_with_a_tag, waits
from tests.other_models import Fussy, Legacy, Tag
from tests.proxy import before_each_rerun, lossy_proxy
from tests.races import eventually, inserts_meet, together


@given(st.text())
def test_normalising_twice_changes_nothing(value: str) -> None:
    """NFC, trimmed, inner white space folded."""
    once = normalise(value)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once.split() == unicodedata.normalize("NFC", value).split()


def test_only_strings_are_normalised() -> None:
    """A number is what it is."""
    assert normalise(5) == 5


def test_the_first_call_creates_and_the_second_finds(sales: int) -> None:
    """The instance is loaded, attached to the session and usable."""
    ann, created = Employee.get_or_create(
        department_id=sales,
        name="Ann Lee",
        defaults={"title": "Chief", "hired_on": date(2020, 2, 1)},
    )
    again, created_again = Employee.get_or_create(
        department_id=sales, name="Ann Lee", defaults={"title": "Other"}
    )

    assert (created, created_again) == (True, False)
    assert again is ann
    assert (ann.id, ann.title, ann.hired_on) == (1, "Chief", date(2020, 2, 1))
    assert ann.created_at is not None
    assert ann in db.session
    assert ann.department.name == "Sales"
    assert count(Employee) == 1


def test_the_row_is_committed_when_the_call_returns(sales: int) -> None:
    """Whatever becomes of the caller's transaction."""
    Employee.get_or_create(department_id=sales, name="Ann Lee")
    db.session.rollback()
    assert count(Employee) == 1


def test_a_later_change_of_the_instance_is_flushed_as_usual(sales: int) -> None:
    """It is an ordinary persistent instance."""
    ann, _ = Employee.get_or_create(department_id=sales, name="Ann Lee")
    ann.title = "Chief"
    db.session.commit()
    assert db.session.scalar(select(Employee.title)) == "Chief"


def test_it_is_one_round_trip_at_serializable(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """One message goes to the server, also after other work, and begins with the level."""
    with lossy_proxy(either_url) as (proxy, url), make_app(url).app_context():
        sales = Department.get_or_create(name="Sales")[0].id
        directory.update(Department, sales, {"name": "Sale"})
        proxy.sent.clear()

        Employee.get_or_create(department_id=sales, name="Ann Lee")

        (message,) = proxy.sent
        assert message.startswith(b"Q")
        assert b"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SET LOCAL " in message
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [{}, {"name": "Ann"}, {"department_id": 1, "name": "Ann", "x": 1}])
def test_a_key_that_is_not_the_natural_key_is_a_type_error(
    context: Flask, key: dict[str, Any]
) -> None:
    """It is raised before the database is touched."""
    event.listen(db.engine, "checkout", lambda *args: pytest.fail("touched"))
    with pytest.raises(TypeError, match="natural key of Employee is department_id, name"):
        Employee.get_or_create(**key)


@pytest.mark.parametrize("column", ["nickname", "name", "creation_token", "duplicate_of_id"])
def test_a_default_that_cannot_be_one_is_a_type_error(context: Flask, column: str) -> None:
    """Unknown columns, the key's own, and those that the mixin keeps."""
    with pytest.raises(TypeError, match=column):
        Employee.get_or_create(department_id=1, name="Ann", defaults={column: 1})


@pytest.mark.parametrize("sent", ["Ann Lee", "  Ann \t Lee\n", "Ann\u00a0Lee"])
def test_a_key_is_stored_and_found_normalised(sales: int, sent: str) -> None:
    """Every spelling leads to the one row."""
    ann, created = Employee.get_or_create(department_id=sales, name=sent)
    assert (ann.name, created) == ("Ann Lee", True)
    for spelling in (sent, "Ann Lee", " Ann Lee"):
        assert Employee.get_or_create(department_id=sales, name=spelling) == (ann, False)


def test_unicode_forms_are_one_key(context: Flask) -> None:
    """A composed letter and a letter with a combining mark."""
    first, _ = Department.get_or_create(name="Cafe\u0301")
    second, created = Department.get_or_create(name="Caf\u00e9")
    assert second is first
    assert not created


def test_a_legacy_row_is_found_as_it_is_stored(context: Flask) -> None:
    """Its name was never normalised; the spelling as sent is tried as well."""
    db.session.execute(text("INSERT INTO department (name) VALUES ('Old  Dept')"))
    db.session.commit()
    department, created = Department.get_or_create(name="Old  Dept")
    assert (department.name, created) == ("Old  Dept", False)


def test_the_oldest_of_equals_is_found(make_app: Callable[..., Flask], unguarded_url: str) -> None:
    """Duplicates of a legacy table that nobody has marked yet."""
    with make_app(unguarded_url).app_context():
        db.session.execute(text("TRUNCATE department RESTART IDENTITY CASCADE"))
        db.session.execute(
            text("INSERT INTO department (name) SELECT 'X' FROM generate_series(1, 9)")
        )
        db.session.execute(text("DELETE FROM department WHERE id < 4"))
        db.session.commit()
        department, created = Department.get_or_create(name="X")
        assert (department.id, created) == (4, False)


def test_a_duplicate_is_never_returned(context: Flask) -> None:
    """Only canonical rows count; a key that has none gets one."""
    kept, _ = Department.get_or_create(name="Kept")
    db.session.execute(
        text("INSERT INTO department (name, duplicate_of_id) VALUES ('Other', :id)"),
        {"id": kept.id},
    )
    db.session.commit()
    other, created = Department.get_or_create(name="Other")
    assert created
    assert other.duplicate_of_id is None


def test_a_reference_to_a_duplicate_is_led_to_its_canonical_row(sales: int) -> None:
    """In the key and in the defaults, when finding and when creating."""
    db.session.execute(
        text("INSERT INTO department (name, duplicate_of_id) VALUES ('Sales', :id)"), {"id": sales}
    )
    boss, _ = Employee.get_or_create(department_id=sales, name="Boss")
    old_boss = db.session.scalar(
        text(
            "INSERT INTO employee (department_id, name, duplicate_of_id)"
            " VALUES (:d, 'B', :id) RETURNING id"
        ),
        {"d": sales, "id": boss.id},
    )
    db.session.commit()
    duplicate = sales + 1

    ann, created = Employee.get_or_create(
        department_id=duplicate, name="Ann", defaults={"manager_id": old_boss}
    )

    assert (ann.department_id, ann.manager_id, created) == (sales, boss.id, True)
    assert Employee.get_or_create(department_id=duplicate, name="Ann") == (ann, False)


def test_an_unknown_reference_is_refused_by_the_foreign_key(context: Flask) -> None:
    """The driver's error passes, and nothing is stored."""
    with pytest.raises(IntegrityError) as caught:
        Employee.get_or_create(department_id=999, name="Ann")
    assert caught.value.orig.pgcode == "23503"  # type: ignore[union-attr]
    assert count(Employee) == 0


def test_a_value_the_database_refuses_passes_as_its_error(sales: int) -> None:
    """Too long for the column: 22001."""
    with pytest.raises(DataError):
        Employee.get_or_create(department_id=sales, name="A", defaults={"title": "t" * 300})


def test_pending_changes_of_a_loaded_instance_are_kept(sales: int) -> None:
    """The rest of it is brought up to date."""
    ann, _ = Employee.get_or_create(department_id=sales, name="Ann")
    ann.title = "pending"
    with db.engine.begin() as elsewhere:
        elsewhere.execute(text("UPDATE employee SET title = 'stored', email = 'a@example.org'"))

    again, _ = Employee.get_or_create(department_id=sales, name="Ann")

    assert again is ann
    assert (ann.title, ann.email) == ("pending", "a@example.org")
    assert inspect(ann).attrs.title.history.has_changes()


def test_an_expired_instance_comes_back_loaded(sales: int) -> None:
    """As after a rollback of the session."""
    ann, _ = Employee.get_or_create(department_id=sales, name="Ann")
    db.session.expire(ann)
    Employee.get_or_create(department_id=sales, name="Ann")
    assert not inspect(ann).expired_attributes & {"name", "title", "id"}


def test_a_race_that_happened_leaves_one_row(
    context: Flask, sales: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Four look up, find nothing and insert at the same time: retries, one row, one creator."""

    def create() -> tuple[int, bool]:
        with context.app_context():
            ann, created = Employee.get_or_create(department_id=sales, name="Ann Lee")
            return ann.id, created

    db.session.rollback()
    with inserts_meet(db.engine, "employee", 4):
        outcomes = together([create] * 4)

    assert len({id for id, _ in outcomes}) == 1
    assert sorted(created for _, created in outcomes) == [False, False, False, True]
    assert count(Employee) == 1
    assert len(caplog.records) >= 3


def test_the_guards_refusal_of_a_stranger_is_a_race_too(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """A writer at READ COMMITTED has inserted the key and commits while we wait: 23505, re-run."""
    with app.app_context(), db.engine.connect() as stranger, ThreadPoolExecutor() as pool:
        stranger.execute(text("INSERT INTO department (name) VALUES ('Sales')"))

        def create() -> tuple[int, bool]:
            with app.app_context():
                department, created = Department.get_or_create(name="Sales")
                return department.id, created

        ours = pool.submit(create)
        eventually(lambda: waits(db.engine) == 1)
        stranger.commit()
        assert ours.result() == (1, False)
    assert [record.sqlstate for record in caplog.records] == ["23505"]  # type: ignore[attr-defined]


def test_without_the_isolation_level_the_same_race_makes_duplicates(
    make_app: Callable[..., Flask], unguarded_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race of the test above is a real one: only SERIALIZABLE prevents it."""
    monkeypatch.setattr("app.transactions.SERIALIZABLE", "")
    app = make_app(unguarded_url)

    def create() -> bool:
        with app.app_context():
            return Department.get_or_create(name="Twice")[1]

    with app.app_context():
        db.session.execute(text("TRUNCATE department RESTART IDENTITY CASCADE"))
        db.session.commit()
        with inserts_meet(db.engine, "department", 2):
            outcomes = together([create] * 2)
        assert outcomes == [True, True]
        assert count(Department) == 2


def test_a_lost_reply_does_not_make_created_wrong(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """The row was created, the reply was lost, and the re-run still says created."""
    with lossy_proxy(either_url) as (proxy, url), make_app(url).app_context():
        Department.get_or_create(name="Warm")
        proxy.lose_reply_to = b"EXECUTE"

        department, created = Department.get_or_create(name="Sales")

        assert proxy.lost == 1
        assert (department.id, department.name, created) == (2, "Sales", True)
        assert count(Department) == 2


def test_a_lost_reply_to_a_look_up_does_not_make_created_wrong(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """Nor the other way round: somebody else had created the row before."""
    with lossy_proxy(either_url) as (proxy, url), make_app(url).app_context():
        Department.get_or_create(name="Sales")
        proxy.lose_reply_to = b"EXECUTE"
        assert Department.get_or_create(name="Sales")[1] is False
        assert proxy.lost == 1


def test_a_row_renamed_before_the_rerun_is_found_by_its_token(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """The reply was lost, and somebody renamed the row before the re-run: it is still ours."""
    with lossy_proxy(either_url) as (proxy, url), make_app(url).app_context():
        Department.get_or_create(name="Warm")
        proxy.lose_reply_to = b"EXECUTE"
        with before_each_rerun(either_url, "UPDATE department SET name = 'New' WHERE name = 'Old'"):
            department, created = Department.get_or_create(name="Old")

        assert (department.name, created) == ("New", True)
        assert count(Department) == 2


def test_a_caller_that_holds_the_key_uncommitted_is_not_waited_for_forever(
    make_app: Callable[..., Flask], guarded_url: str, database_url: str
) -> None:
    """Its own transaction blocks the dedicated connection: lock_timeout, then ContentionError."""
    app = make_app(database_url, ROLLCALL_LOCK_TIMEOUT=0.05, ROLLCALL_RETRY_ATTEMPTS=2)
    with app.app_context():
        db.session.add(Department(name="Mine"))
        db.session.flush()
        with pytest.raises(ContentionError) as caught:
            Department.get_or_create(name="Mine")
        assert caught.value.sqlstate == "55P03"


def test_column_defaults_apply_as_in_a_flush(own: Engine) -> None:
    """Python values, callables, SQL expressions, sequences, and those of the server."""
    tag, created = Tag.get_or_create(scope="a", label=1)

    assert created
    assert (tag.scalar, tag.numbered, tag.served) == ("fixed", 1, "server")
    assert tag.expression == datetime(1970, 1, 1, tzinfo=timezone.utc).astimezone().replace(
        tzinfo=None
    )
    following, _ = Tag.get_or_create(scope="a", label=2)
    assert following.called == tag.called + 1


def test_given_values_go_before_column_defaults(own: Engine) -> None:
    """Each kind of default can be overridden, also by NULL's opposite."""
    tag, _ = Tag.get_or_create(
        {"scalar": "given", "called": -1, "numbered": 77, "served": "me"}, scope="a", label=1
    )
    assert (tag.scalar, tag.called, tag.numbered, tag.served) == ("given", -1, 77, "me")


def test_a_null_in_the_key_is_a_value_like_others(own: Engine) -> None:
    """NULL finds NULL, and nothing else."""
    first, created = Tag.get_or_create(scope=None, label=1)
    assert (first.scope, created) == (None, True)
    assert Tag.get_or_create(scope=None, label=1) == (first, False)
    assert Tag.get_or_create(scope="x", label=1)[1]


def test_a_table_need_not_be_as_ours(own: Engine) -> None:
    """Schema, key, types and what is mapped are the application's."""
    row, created = Legacy.get_or_create(name=" a  b ")
    assert (row.name, created) == ("a b", True)
    assert isinstance(row.key, uuid.UUID)
    assert Legacy.get_or_create(name="a b") == (row, False)


def test_a_default_that_reads_its_context_is_a_type_error(own: Engine) -> None:
    """It is raised before the database is touched."""
    with pytest.raises(TypeError, match="reads its context"):
        Fussy.get_or_create(name="x")


def test_a_unique_constraint_that_the_key_had_before_is_a_race_too(own: Engine) -> None:
    """A stranger's row is committed while we wait for it: found, not refused."""
    with stranger_with_a_tag(own) as stranger, ThreadPoolExecutor() as pool:
        ours = pool.submit(lambda: Tag.get_or_create(scope="a", label=1)[1])
        eventually(lambda: waits(own) == 1)
        stranger.commit()
        assert ours.result() is False


def test_another_unique_constraint_is_the_callers(own: Engine) -> None:
    """23505 of a constraint that is not ours, nor the key's, passes."""
    Tag.get_or_create({"color": "red"}, scope="a", label=1)
    with pytest.raises(IntegrityError) as caught:
        Tag.get_or_create({"color": "red"}, scope="a", label=2)
    assert caught.value.orig.pgcode == "23505"  # type: ignore[union-attr]


def test_an_instance_can_live_in_a_session_of_the_callers(own: Engine) -> None:
    """bind takes a session, a scoped session, or a callable that gives one."""
    with Session(own) as session:
        Tag.bind(lambda: own, lambda: session)
        tag, _ = Tag.get_or_create(scope="a", label=1)
        assert tag in session
