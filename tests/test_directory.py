"""Units of work that meet others, or lose the reply to their COMMIT."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import directory
from app.batch import Row
from app.db import db
from app.errors import DepartmentNotEmpty, InvalidInput, NaturalKeyTaken, RecordNotFound
from app.models import Department, Employee
from tests.proxy import LossyProxy, before_each_rerun, lossy_proxy
from tests.races import inserts_held, terminate_backends, together


@pytest.fixture
def context(app: Flask) -> Any:
    with app.app_context():
        yield app


def within(app: Flask, task: Callable[[], Any]) -> Callable[[], Any]:
    """Give a task an application context of its own, as each request has."""

    def run() -> Any:
        with app.app_context():
            return task()

    return run


def lose_the_commit(proxy: LossyProxy) -> None:
    """Lose the reply to the next COMMIT."""
    proxy.lose_reply_to = b"COMMIT"


def test_a_lost_reply_to_a_deletion_is_no_404(make_app: Any, database_url: str) -> None:
    """The row is gone because this call deleted it."""
    with lossy_proxy(database_url) as (proxy, url), make_app(url).app_context():
        id = directory.create_department("Old")[0]["id"]
        lose_the_commit(proxy)
        directory.delete_record(Department, id)
        assert proxy.lost == 1
        with pytest.raises(RecordNotFound):
            directory.delete_record(Department, id)


def test_a_lost_reply_to_a_change_is_run_again(make_app: Any, database_url: str) -> None:
    """The change is in, and the answer is right."""
    with lossy_proxy(database_url) as (proxy, url), make_app(url).app_context():
        id = directory.create_department("Old")[0]["id"]
        lose_the_commit(proxy)
        assert directory.update(Department, id, {"name": "New"}).name == "New"
        assert proxy.lost == 1


def test_a_change_whose_row_was_deleted_before_the_rerun_happened_all_the_same(
    make_app: Any, database_url: str
) -> None:
    """It was committed, its reply was lost, and somebody deleted the row then."""
    with lossy_proxy(database_url) as (proxy, url), make_app(url).app_context():
        id = directory.create_department("Old")[0]["id"]
        lose_the_commit(proxy)
        with before_each_rerun(database_url, "DELETE FROM department"):
            assert directory.update(Department, id, {"name": "New"}).name == "New"


def test_two_renames_onto_one_name_cannot_both_win(
    make_app: Any, either_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both look first and find the name free; one is run again and finds it taken."""
    app = make_app(either_url)
    with app.app_context():
        ids = [directory.create_department(name)[0]["id"] for name in ("A", "B")]
        both_have_looked = threading.Barrier(2)

        def meet(*arguments: object) -> None:
            both_have_looked.wait(60)

        event.listen(Session, "before_flush", meet)
        try:
            rename = partial(directory.update, Department, changes={"name": "C"})
            outcomes = together([within(app, partial(rename, id)) for id in ids])
        finally:
            event.remove(Session, "before_flush", meet)

        assert sorted(type(outcome).__name__ for outcome in outcomes) == [
            "Department",
            "NaturalKeyTaken",
        ]
        (refused,) = (outcome for outcome in outcomes if isinstance(outcome, NaturalKeyTaken))
        (renamed,) = (outcome for outcome in outcomes if isinstance(outcome, Department))
        assert refused.id == renamed.id
        assert caplog.records


def counts() -> tuple[int, int]:
    """Return how many departments and employees there are."""
    sql = "SELECT (SELECT count(*) FROM department), (SELECT count(*) FROM employee)"
    departments, employees = db.session.execute(text(sql)).one()
    db.session.rollback()
    return departments, employees


def test_an_employee_is_not_added_to_a_department_that_is_being_deleted(
    make_app: Any, either_url: str
) -> None:
    """The department was there when the insert began, and is gone when it ends."""
    app = make_app(either_url)
    with app.app_context():
        id = directory.create_department("Short-lived")[0]["id"]
        add = within(app, partial(directory.create_employee, "Ann", department_id=id))
        with inserts_held(db.engine, "employee") as gate, ThreadPoolExecutor() as pool:
            added = pool.submit(add)
            gate.wait_for(1)
            directory.delete_record(Department, id)
            gate.open()
        assert isinstance(added.exception(), InvalidInput)
        assert counts() == (0, 0)


def test_a_department_is_not_deleted_from_under_a_new_employee(
    make_app: Any, either_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It was empty when the deletion looked; READ COMMITTED would cascade the employee away."""
    app = make_app(either_url)
    with app.app_context():
        id = directory.create_department("Research")[0]["id"]
        add = within(app, partial(directory.create_employee, "Ann", department_id=id))

        def add_meanwhile(*arguments: object) -> None:
            with ThreadPoolExecutor() as pool:
                pool.submit(add).result()

        event.listen(Session, "before_flush", add_meanwhile, once=True)
        with pytest.raises(DepartmentNotEmpty):
            directory.delete_record(Department, id)
        assert counts() == (1, 1)
        assert [record.sqlstate for record in caplog.records] == ["40001"]  # type: ignore[attr-defined]


def test_a_department_by_name_that_vanishes_is_made_again(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody deletes it between the two steps of a creation."""
    real, calls = directory.create_department, []

    def vanish_once(name: str) -> tuple[Row, bool]:
        outcome = real(name)
        calls.append(name)
        if len(calls) == 1:
            directory.delete_record(Department, outcome[0]["id"])
        return outcome

    monkeypatch.setattr(directory, "create_department", vanish_once)
    employee, created = directory.create_employee("Ann", department="Research")

    assert (created, calls) == (True, ["Research", "Research"])
    assert db.session.scalar(text("SELECT name FROM department")) == "Research"
    assert employee["department_id"] == 2


def test_a_reference_that_vanishes_and_is_no_department_is_a_conflict(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager deleted after the check: the foreign key's error passes, for a 409."""
    real = directory._require
    monkeypatch.setattr(
        directory, "_require", lambda model, *more: model is Employee or real(model, *more)
    )
    with pytest.raises(IntegrityError):
        directory.create_employee("Ann", department="Research", manager_id=99)


def test_a_request_has_one_deadline_for_all_that_it_does(
    make_app: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Department and employee are each held up for most of it; it ends in time all the same."""
    app = make_app(
        database_url,
        ROLLCALL_RETRY_ATTEMPTS=1000,
        ROLLCALL_RETRY_DEADLINE=10,
        ROLLCALL_LOCK_TIMEOUT=0.01,
    )
    now = 1000.0

    def sleep(seconds: float) -> None:
        """Let time pass, as nothing else does; the department is let go in due time."""
        nonlocal now
        now += seconds
        if now >= 1007:
            stranger.rollback()

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    for module in ("app.transactions", "app.config"):
        monkeypatch.setattr(f"{module}.time", clock)
    with app.app_context(), db.engine.connect() as stranger, db.engine.connect() as other:
        stranger.exec_driver_sql("LOCK TABLE department IN SHARE MODE")
        other.exec_driver_sql("LOCK TABLE employee IN SHARE MODE")
        body = {"name": "Ann", "department": "Research"}
        answer = app.test_client().post("/api/v1/employees", json=body)
    assert (answer.status_code, answer.get_json()["code"]) == (503, "contention")
    assert 1007 <= now < 1010
    with app.app_context():
        assert counts() == (1, 0)


def test_a_read_does_not_wait_for_a_lock_without_end(make_app: Any, database_url: str) -> None:
    """A stranger has the table for itself."""
    app = make_app(database_url, ROLLCALL_RETRY_DEADLINE=0.5, ROLLCALL_LOCK_TIMEOUT=0.1)
    with app.app_context(), db.engine.connect() as stranger:
        stranger.exec_driver_sql("LOCK TABLE employee IN ACCESS EXCLUSIVE MODE")
        answer = app.test_client().get("/api/v1/employees")
    assert (answer.status_code, answer.get_json()["code"]) == (503, "contention")


def test_the_request_holds_no_connection_while_the_mixin_works(
    make_app: Any, database_url: str
) -> None:
    """A pool of one connection is enough for every call."""
    app = make_app(
        database_url,
        ROLLCALL_POOL_SIZE=1,
        ROLLCALL_MAX_OVERFLOW=0,
        ROLLCALL_POOL_TIMEOUT=0.2,
        ROLLCALL_RETRY_DEADLINE=0.5,
    )
    client = app.test_client()
    boss = client.post("/api/v1/employees", json={"name": "Boss", "department": "R"}).get_json()
    body = {"name": "Ann", "department": "R", "manager_id": boss["id"]}
    assert client.post("/api/v1/employees", json=body).status_code == 201
    assert client.patch("/api/v1/employees/2", json={"department": "S"}).status_code == 200
    assert client.get("/api/v1/employees").status_code == 200
    assert client.delete("/api/v1/employees/2").status_code == 204


def test_a_read_survives_a_lost_connection(context: Flask, administrator: Any) -> None:
    """It is run again on another."""
    id = directory.create_employee("Ann", department="R")[0]["id"]
    db.session.rollback()
    terminate_backends(administrator)
    db.session.expunge_all()
    assert directory.find(Employee, id).name == "Ann"
