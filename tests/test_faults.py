"""Whatever fails around it, the service makes no duplicate and loses nothing it acknowledged.

Each fault is brought about under load, with guards and without, and the ledger of what the clients
were answered is then held against the database. All that, the service is not restarted.
"""

from __future__ import annotations

import importlib
import itertools
import socket
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest
from flask import Flask
from sqlalchemy import create_engine

from app import transactions
from app.db import db
from app.models import NATURAL_KEYS, Department, Employee
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests import faults
from tests.conftest import UNHURRIED, empty, private_server, unguard
from tests.faults import Site
from tests.ledger import CUT, REFUSED, Answer, Key, Row, Stored, dropped, stored, verify
from tests.load import Load, close_if_stale, post, under_load
from tests.proxy import lossy_proxy
from tests.races import (
    commit_serializable,
    eventually,
    inserts_held,
    inserts_meet,
    started,
    together,
)
from tests.serving import free_port, serving_as_it_is

# Short enough for a test: a lock is waited for, and requests give up, soon.
IMPATIENT = {"ROLLCALL_LOCK_TIMEOUT": "0.2", "ROLLCALL_RETRY_DEADLINE": "1"}


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    """A server that may be killed and set as tests please."""
    with private_server() as server:
        yield server


@pytest.fixture(scope="module", params=["guarded", "unguarded"])
def own_url(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> str:
    """A database of that server with guards, and then one without."""
    url = own_server.url(request.param)
    bootstrap(url, NATURAL_KEYS)
    if request.param == "unguarded":
        unguard(url)
    return url


# For faults that guards have no part in.
without_guards = pytest.mark.parametrize("own_url", ["unguarded"], indirect=True)


@pytest.fixture(scope="module")
def site(own_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that meets one fault after the other, and is never restarted."""
    folder = tmp_path_factory.mktemp("site")
    with serving_as_it_is(own_url, folder, WEB_CONCURRENCY="3", **IMPATIENT) as service:
        yield Site(service, own_url)


def wrongs(load: Load, site: Site, expected: Collection[int | str] = ()) -> list[str]:
    """Return what the checker says of a load, what was not well again, and a fault that missed."""
    before, met, after = load.answers_around_the_fault()
    missed = [] if min(before, met, after) > 0 else [f"missed: {before}, {met}, {after}"]
    return load.ill + missed + verify(load.answers, stored(site.url), expected)


def test_postgresql_killed_under_load(site: Site, own_server: EmbeddedServer) -> None:
    """kill -9 of the postmaster, which is back at once: clients wait, or get a 503."""
    with site.under_load() as load, load.hit():
        before = site.execute("SELECT pg_postmaster_start_time()")
        faults.kill_postmaster(own_server)
    assert site.execute("SELECT pg_postmaster_start_time()") > before
    assert wrongs(load, site) == []


def test_backends_terminated_at_random(site: Site) -> None:
    """Each time about half of the connections, whatever they are doing."""
    terminated: list[int] = []

    def go_on() -> bool:
        terminated.append(faults.terminate_one_in_two(site))
        return len(terminated) >= 8 and sum(terminated) > 8

    with site.under_load() as load, load.hit():
        eventually(go_on)
    assert wrongs(load, site) == []


def test_a_worker_killed_under_load(site: Site) -> None:
    """kill -9 of one gunicorn worker after the other cuts connections, and does nothing worse."""
    killed = itertools.count(1)

    def go_on() -> bool:
        faults.kill_worker(site.service)
        load.pass_rounds(1)
        return next(killed) >= 3 and load.has(CUT, 1)

    with site.under_load() as load, load.hit():
        eventually(go_on)
    assert wrongs(load, site, {CUT}) == []


@without_guards
def test_a_table_locked_by_a_stranger(site: Site) -> None:
    """Clients get a 503 after their time, and all is well when the lock is gone."""
    with site.under_load() as load, load.hit(), faults.locked(site, "employee"):
        eventually(lambda: load.has(503, 8))
    assert wrongs(load, site) == []


@without_guards
def test_a_server_that_is_read_only(site: Site) -> None:
    """Every write is a 503 until it is over."""
    with site.under_load() as load, load.hit(), faults.read_only_server(site):
        eventually(lambda: load.has(503, 50))
    assert wrongs(load, site) == []


@without_guards
def test_connections_that_stay_read_only(site: Site) -> None:
    """What was made read-only in the pool does not outlive the fault there."""
    with site.under_load() as load, load.hit(), faults.read_only_newcomers(site):
        eventually(lambda: load.has(503, 50))
    assert wrongs(load, site) == []


def test_a_disk_that_is_full(site: Site) -> None:
    """Every insert fails as it does then: 503, no half record, and no wait for the next."""
    with site.under_load() as load, load.hit(), faults.full_disk(site):
        eventually(lambda: load.has(503, 50))
    assert wrongs(load, site) == []


def test_a_pool_that_is_exhausted(database_url: str, tmp_path: Path) -> None:
    """One connection for four threads, and that one is stuck: the others give up in time."""
    pool = {"POOL_SIZE": "1", "MAX_OVERFLOW": "0", "POOL_TIMEOUT": "0.25", "RETRY_DEADLINE": "0.75"}
    settings = {f"ROLLCALL_{name}": value for name, value in pool.items()}
    with serving_as_it_is(
        database_url, tmp_path, ROLLCALL_LOCK_TIMEOUT="60", **settings
    ) as service:
        site = Site(service, database_url)
        with site.under_load() as load, load.hit(), faults.locked(site, "employee"):
            # Nobody's wait for the lock ends before this does, so that it is the pool's. The load's
            # clients may all wait for two that are stuck; of others no more than two are.
            soon = time.monotonic() + 60
            guests = [started(partial(load.visit, f"Late {n}", soon)) for n in range(8)]
            eventually(lambda: load.has(503, 6))
        for guest in guests:
            guest()
        assert wrongs(load, site) == []


def test_replies_lost_under_load(either_url: str, tmp_path: Path) -> None:
    """The reply to the statement that commits is dropped, or cut after some of its bytes."""
    with lossy_proxy(either_url) as (proxy, through):
        with serving_as_it_is(through, tmp_path, **UNHURRIED) as service:
            site = Site(service, either_url)
            with (
                site.under_load() as load,
                load.hit(),
                proxy.lose_often(b"EXECUTE", every=7, passed=(0, 1, 5, 60, 200)),
            ):
                load.pass_rounds(2)
        assert proxy.lost > 10
    assert wrongs(load, site) == []
    assert {answer.status for answer in load.answers} == {200, 201}


def test_a_stop_under_load(unguarded_url: str, tmp_path: Path) -> None:
    """SIGTERM: what was accepted is answered, on old connections and new, then nobody listens."""
    with serving_as_it_is(unguarded_url, tmp_path) as service:
        empty(unguarded_url)
        with under_load(service) as load:
            assert service.stop() == 0
    assert load.has(201, 20)
    assert load.has(REFUSED, 1)
    assert dropped(load.answers) == []
    assert verify(load.answers, stored(unguarded_url), {REFUSED, CUT}) == []


@pytest.fixture(scope="module")
def patient(own_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that gives nothing up soon."""
    folder = tmp_path_factory.mktemp("patient")
    with serving_as_it_is(own_url, folder, WEB_CONCURRENCY="3", **UNHURRIED) as service:
        yield Site(service, own_url)


@without_guards
def test_a_reload_under_load(patient: Site) -> None:
    """SIGHUP replaces all workers, and no request shows it."""
    with patient.under_load() as load, load.hit():
        faults.reload(patient.service)
    assert wrongs(load, patient) == []
    assert {answer.status for answer in load.answers} == {200, 201}


def test_many_clients_of_many_workers(patient: Site) -> None:
    """Nothing fails but races are lost: no 503 either."""
    with patient.under_load(clients=16) as load, load.hit():
        load.pass_rounds(2)
    assert wrongs(load, patient) == []
    assert {answer.status for answer in load.answers} == {200, 201}


def overtaken(app: Flask, others: int) -> list[bool]:
    """Hold a call between look-up and insert while another creates the row, and others commit.

    Return what the two were told: whether they created it.
    """

    def create(title: str) -> bool:
        with app.app_context():
            key = {"department_id": 1, "name": "Ann Lee"}
            return Employee.get_or_create(defaults={"title": title}, **key)[1]

    with app.app_context(), ThreadPoolExecutor() as threads:
        assert Department.get_or_create(name="Sales")[0].id == 1
        with inserts_held(db.engine, "employee", which="NEW.title = 'slow'") as gate:
            slow = threads.submit(create, "slow")
            gate.wait_for(1)
            quick = create("quick")
            commit_serializable(db.engine, others)
            gate.open()
            return [quick, slow.result()]


@pytest.mark.parametrize("others", [0, 5000])
def test_the_guard_closes_the_hole_in_serializable(
    make_app: Callable[..., Flask],
    database_url: str,
    others: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However many commits come in between: one row and one creator.

    With thousands of them the guard refuses the second row where PostgreSQL does not.
    """
    assert overtaken(make_app(database_url), others) == [True, False]
    assert [row.title for row in stored(database_url).employees] == ["quick"]
    [refusal] = [getattr(record, "sqlstate", None) for record in caplog.records]
    assert refusal in ("40001", "23505")[: 1 + (others > 0)]


@pytest.mark.parametrize("others", [0, 5000])
def test_the_hole_in_serializable_without_a_guard(
    make_app: Callable[..., Flask],
    unguarded_url: str,
    others: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PostgreSQL forgets a transaction after two thousand others, and may miss the conflict.

    15.18 and 18.6 do. One that does not refuses the second; whoever is told that they created the
    row did, in either case.
    """
    empty(unguarded_url)
    told = overtaken(make_app(unguarded_url), others)
    refusals = [getattr(record, "sqlstate", None) for record in caplog.records]
    creators = [row.title for row in stored(unguarded_url).employees]
    assert (told, sorted(creators), refusals) in [
        ([True, False], ["quick"], ["40001"]),
        ([True, True], ["quick", "slow"], []),
    ][: 1 + (others > 0)]


@pytest.mark.parametrize("application", ["tests.naive:app", "tests.without_isolation:app"])
def test_the_checker_catches_what_is_wrong(
    application: str, unguarded_url: str, tmp_path: Path
) -> None:
    """The load can fail: a loop that loses its isolation level, and ours without any."""
    with serving_as_it_is(unguarded_url, tmp_path, application, WEB_CONCURRENCY="3") as service:
        site = Site(service, unguarded_url)
        with faults.slow_inserts(site, "department"), site.under_load() as load:
            eventually(lambda: "repeated" in kinds_after_a_round(load, site))


@pytest.mark.parametrize(
    ("module", "told"),
    [("tests.naive", [200, 201]), ("tests.without_isolation", [201, 201])],
)
def test_what_is_wrong_with_the_two_is_not_the_same(
    module: str, told: list[int], unguarded_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's first attempt is serializable: two clients of one key do not get past that."""
    empty(unguarded_url)
    monkeypatch.setenv("DATABASE_URL", unguarded_url)
    monkeypatch.setenv("ROLLCALL_AUTH", "off")
    monkeypatch.setattr(transactions, "SERIALIZABLE", transactions.SERIALIZABLE)  # back afterwards
    wrong = importlib.import_module(module).app
    assert wrong.test_client().get("/readyz").status_code == 200

    def create(name: str) -> int:
        body = {"name": name, "department": "Sales", "title": "Chief"}
        return int(wrong.test_client().post("/api/v1/employees", json=body).status_code)

    assert [create("Ann"), create("Ann")] == [201, 200]
    engine = create_engine(unguarded_url)
    with inserts_meet(engine, "employee", 2):
        assert sorted(together([partial(create, "Bob")] * 2)) == told
    engine.dispose()
    assert len(stored(unguarded_url).employees) == 1 + told.count(201)


def kinds_after_a_round(load: Load, site: Site) -> set[str]:
    """Return the kinds of wrongs that the checker finds when another round has begun."""
    load.pass_rounds(1)
    found = verify(list(load.answers), stored(site.url))
    return {wrong.partition(":")[0] for wrong in found}


def hang_up(listener: socket.socket, answer: bytes) -> None:
    """Take one connection, send this on it and close it."""
    server, _ = listener.accept()
    with server:
        server.sendall(answer)


ANN = Key("Sales", "Ann Lee")
SHOWN = {"id": 7, "department_id": 1, "name": "Ann Lee", "title": "Chief"}
CREATED = Answer(ANN, "Chief", 201, SHOWN)
FOUND = Answer(ANN, "Other", 200, SHOWN)
AWAY = Answer(ANN, "Other", 503, {"code": "database_away"}, "1")
LOST = Answer(ANN, "Other", CUT)
UNSENT = Answer(ANN, "Other", REFUSED)
ROW = Row(7, 1, "Sales", "Ann Lee", "Chief")


@pytest.mark.parametrize(
    ("answers", "rows"),
    [
        ([CREATED, FOUND, FOUND], [ROW]),
        ([FOUND, AWAY], [ROW]),  # the one that created it was told to try again
        ([AWAY], [ROW]),
        ([AWAY], []),
        ([LOST, FOUND], [ROW]),
        ([LOST, UNSENT], []),
    ],
)
def test_the_checker_finds_no_fault_with_what_is_right(
    answers: list[Answer], rows: list[Row]
) -> None:
    """Success, honest refusals, and what they leave open."""
    assert verify(answers, Stored(["Sales"], rows), {CUT, REFUSED}) == []


@pytest.mark.parametrize(
    ("answers", "rows", "wrong"),
    [
        ([CREATED], [], "lost"),
        ([CREATED], [ROW._replace(id=8)], "lost"),
        ([CREATED], [ROW._replace(title="Other")], "changed"),
        ([CREATED], [ROW._replace(department="Research")], "changed"),
        ([CREATED, replace(FOUND, content={**SHOWN, "title": "Other"})], [ROW], "changed"),
        ([replace(CREATED, title="Other")], [ROW], "changed"),
        ([CREATED], [ROW, ROW._replace(id=8)], "repeated"),
        ([CREATED, CREATED], [ROW], "miscounted"),
        ([FOUND, FOUND], [ROW], "miscounted"),
        ([], [ROW], "unaccounted"),
        ([UNSENT], [ROW], "unaccounted"),
        ([replace(AWAY, status=500)], [], "dishonest"),
        ([replace(AWAY, status=409)], [], "dishonest"),
        ([replace(AWAY, retry_after=None)], [], "dishonest"),
        ([replace(AWAY, content={"code": "internal_error"})], [], "dishonest"),
        ([LOST], [], "dishonest"),
    ],
)
def test_the_checker_finds_each_kind_of_fault(
    answers: list[Answer], rows: list[Row], wrong: str
) -> None:
    """In ledgers and tables made by hand."""
    found = verify(answers, Stored(["Sales"], rows), {REFUSED})
    assert wrong in {line.partition(":")[0] for line in found}


def test_the_checker_finds_a_department_twice() -> None:
    """Its employees may each be there once."""
    [wrong] = verify([CREATED], Stored(["Sales", "Sales"], [ROW]))
    assert wrong == "repeated: Sales has 2 canonical rows"


def test_who_came_too_late_was_not_dropped() -> None:
    """Whoever was in the middle of something was, and so was whoever came before another."""
    served = replace(CREATED, is_new=True, asked=5, answered=6)
    late = replace(LOST, is_new=True, asked=7, answered=8)
    early = replace(late, asked=3, answered=4)
    known = replace(late, is_new=False)
    assert dropped([served, late, replace(CREATED, asked=9)]) == []
    assert dropped([served, late, early, known]) == [early, known]


def test_a_client_notes_a_cut_connection_and_goes_on() -> None:
    """In the middle of an answer, between two, and where nobody listens at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = HTTPConnection(*listener.getsockname())
        server = Thread(target=hang_up, args=(listener, b"HTTP/1.1 200 OK\r\n\r\n{"))
        server.start()
        assert post(connection, ANN, "Chief").status == CUT
        server.join()
        connection.connect()
        hang_up(listener, b"")
        close_if_stale(connection)
        assert connection.sock is None
    assert post(connection, ANN, "Chief").status == REFUSED


def test_a_service_that_is_not_well_again_is_found_out() -> None:
    """What its clients met is shown; so is that there was no time to look."""
    load = Load(partial(HTTPConnection, "127.0.0.1", free_port()))
    assert "refused" in load.well_again(0.2)[0]
    assert load.well_again(0) == ["not well three times in succession in time"]


def test_a_fault_that_met_nobody_is_found_out() -> None:
    """A proof needs answers before the fault, while it lasts, and after it."""
    load = Load(HTTPConnection)
    load.fault = (10, 20)
    load.answers += [replace(CREATED, asked=1, answered=2), replace(CREATED, asked=8, answered=21)]
    assert load.answers_around_the_fault() == (1, 1, 0)
