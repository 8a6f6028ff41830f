"""ROLLCALL_READ_URL: a real standby answers reads, and nobody misses what they have written."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import create_engine, func, select
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app import replica
from app.db import db
from app.directory import look
from app.models import NATURAL_KEYS, Department
from app.transactions import RetryPolicy, StatementText
from migrations_bootstrap import bootstrap
from tests.conftest import empty
from tests.races import eventually, started
from tests.replication import Node, pair

DATABASE = "rollcall"
NEVER = "FFFFFFFF/FFFFFFFF"
Make = Callable[..., Flask]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    with pair() as (primary, standby):
        standby.configure("max_standby_streaming_delay", "0")
        bootstrap(primary.url(DATABASE), NATURAL_KEYS)
        yield primary, standby


@pytest.fixture
def primary(nodes: tuple[Node, Node]) -> Node:
    """The primary, empty."""
    empty(nodes[0].url(DATABASE))
    return nodes[0]


@pytest.fixture
def standby(nodes: tuple[Node, Node], primary: Node) -> Iterator[Node]:
    """The standby, which has caught up."""
    catch_up(primary, nodes[1])
    yield nodes[1]
    catch_up(primary, nodes[1])


def catch_up(primary: Node, standby: Node) -> None:
    standby.execute("SELECT pg_wal_replay_resume()")
    position = primary.execute("SELECT pg_current_wal_flush_lsn()")
    eventually(lambda: standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{position}'"))


def fall_behind(standby: Node) -> None:
    """Have it replay nothing from now on."""
    standby.execute("SELECT pg_wal_replay_pause()")
    eventually(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state() = 'paused'"))


@pytest.fixture
def outcomes() -> Iterator[Counter[str]]:
    """How often the replica was asked, and what came of it."""
    counted: Counter[str] = Counter()

    def count(outcome: str) -> None:
        counted[outcome] += 1

    replica.on_read.add(count)
    yield counted
    replica.on_read.remove(count)


@pytest.fixture
def client(
    make_app: Make, primary: Node, standby: Node, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FlaskClient]:
    """A client of a service with a replica, which may be as old, and as slow, as it likes.

    One that has failed is left alone until the test says otherwise.
    """
    monkeypatch.setattr(replica, "MOST_LAG", 3600.0)
    monkeypatch.setattr(replica, "PAUSE", 3600.0)
    monkeypatch.setattr(replica, "CONNECT_TIMEOUT", 60)
    monkeypatch.setattr(replica, "ASKING", RetryPolicy())
    app = make_app(primary.url(DATABASE), ROLLCALL_READ_URL=standby.url(DATABASE))
    client = app.test_client()
    client.get("/api/v1/departments")  # it knows from now on where the primary was
    yield client
    app.extensions["rollcall_replica"].engine.dispose()


def stranger(client: FlaskClient) -> FlaskClient:
    """Return another client of the same service, who brings nothing."""
    return client.application.test_client()


def create(client: FlaskClient, name: str) -> Any:
    return client.post("/api/v1/departments", json={"name": name})


def names(client: FlaskClient, **headers: str) -> list[str]:
    """Return the names of the departments, as this client is shown them."""
    answer = client.get("/api/v1/departments", headers=headers)
    assert answer.status_code == 200, answer.text
    return [item["name"] for item in answer.get_json()["items"]]


def test_reads_are_the_replicas(
    client: FlaskClient, primary: Node, standby: Node, outcomes: Counter[str]
) -> None:
    """Single records, lists and groups of duplicates: as the replica has them."""
    path = create(client, "Research").headers["Location"]
    catch_up(primary, standby)
    fall_behind(standby)
    primary.execute("UPDATE department SET name = 'Renamed'", DATABASE)
    reader = stranger(client)
    assert reader.get(path).get_json()["name"] == "Research"
    assert reader.head(path).status_code == 200
    assert names(reader) == ["Research"]
    assert reader.get("/api/v1/duplicates").get_json()["items"] == []
    assert outcomes == {"answered": 4}


def test_who_wrote_is_shown_what_they_wrote(
    client: FlaskClient, standby: Node, outcomes: Counter[str]
) -> None:
    """By a cookie, or by the header; whoever brings neither is shown what the replica has."""
    fall_behind(standby)
    written = create(client, "Research")
    assert names(client) == ["Research"]
    reader = stranger(client)
    assert names(reader) == []
    assert names(reader, **{replica.HEADER: written.headers[replica.HEADER]}) == ["Research"]
    assert outcomes == {"behind": 2, "answered": 1}


def test_the_replica_answers_its_writers_as_soon_as_it_can(
    client: FlaskClient, primary: Node, standby: Node, outcomes: Counter[str]
) -> None:
    """The position is compared, and nothing is waited for."""
    create(client, "Research")
    catch_up(primary, standby)
    assert names(client) == ["Research"]
    assert outcomes == {"answered": 1}


def test_every_write_says_where_it_is(client: FlaskClient, standby: Node) -> None:
    """Also one that found the record, and one that was refused for what its client had not seen."""
    fall_behind(standby)
    path = create(client, "Research").headers["Location"]
    other = create(client, "Letters").headers["Location"]
    person = {"name": "Ada", "department": "Research"}
    answers = [
        create(client, "Research"),
        client.post("/api/v1/employees", json=person),
        client.post("/api/v1/employees/batch", json={"items": [person]}),
        client.patch(path, json={"name": "Sciences"}),
        client.patch(other, json={"name": "Sciences"}),
        client.patch(other, json={"name": "Arts"}, headers={"If-Match": '"old"'}),
        client.delete(other),
    ]
    assert [answer.status_code for answer in answers] == [200, 201, 200, 200, 409, 412, 204]
    positions = [replica._read_position(answer.headers[replica.HEADER]) for answer in answers]
    assert positions == sorted(positions)
    assert positions[-1] < replica.NEVER
    assert names(client) == ["Sciences"]


def test_the_cookie_is_the_services_alone(client: FlaskClient) -> None:
    """No script reads it, no other site has it sent, and it is gone after an hour."""
    answer = client.post(
        "/api/v1/departments", json={"name": "Research"}, base_url="https://localhost"
    )
    name, _, rest = answer.headers["Set-Cookie"].partition("=")
    value, *attributes = rest.split("; ")
    assert (name, value) == (replica.COOKIE, answer.headers[replica.HEADER])
    assert set(attributes) == {
        "Secure", "HttpOnly", "Path=/", "SameSite=Strict", f"Max-Age={replica.REMEMBERED}",
        *[attribute for attribute in attributes if attribute.startswith("Expires=")],
    }  # fmt: skip


def test_what_changed_nothing_says_nothing(client: FlaskClient) -> None:
    """Reads, and what was refused."""
    answers = [
        client.get("/api/v1/departments"),
        client.options("/api/v1/departments"),
        client.post("/api/v1/departments", json={"name": " "}),
        client.delete("/api/v1/departments/99"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 404]
    for answer in answers:
        assert not {replica.HEADER, "Set-Cookie"} & set(answer.headers.keys())


def test_a_new_record_is_found_by_whoever_has_its_address(
    client: FlaskClient, standby: Node, outcomes: Counter[str]
) -> None:
    """What the replica does not know is looked up at the primary; so is what nobody knows."""
    fall_behind(standby)
    path = create(client, "Research").headers["Location"]
    reader = stranger(client)
    assert reader.get(path).get_json()["name"] == "Research"
    assert reader.get("/api/v1/departments/999").status_code == 404
    assert outcomes == {"unknown": 2}


def test_conditions_are_for_the_primary(
    client: FlaskClient, primary: Node, standby: Node, outcomes: Counter[str]
) -> None:
    """Whoever sends one wants to know whether what they have is still right."""
    written = create(client, "Research")
    path, tag = written.headers["Location"], written.headers["ETag"]
    catch_up(primary, standby)
    fall_behind(standby)
    reader = stranger(client)
    assert reader.get(path, headers={"If-None-Match": tag}).status_code == 304
    primary.execute("UPDATE department SET name = 'Renamed'", DATABASE)
    assert reader.get(path, headers={"If-None-Match": tag}).status_code == 200
    assert reader.get(path, headers={"If-Match": tag}).status_code == 412
    assert not outcomes


@pytest.mark.parametrize("position", ["", "0/", "0/0 OR true", "0/123456789", "٣/٣", NEVER])
def test_what_is_no_position_is_never_reached(client: FlaskClient, position: str) -> None:
    """It may be anything; the primary has to answer then, and does."""
    with client.application.test_request_context(headers={replica.HEADER: position}):
        assert replica._position_to_have() == replica.NEVER
    assert names(client, **{replica.HEADER: position.encode().decode("latin-1")}) == []


def test_nobody_is_shown_what_is_old(
    client: FlaskClient, primary: Node, standby: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is further behind than some seconds is left alone, whoever asks."""
    fall_behind(standby)
    primary.execute("INSERT INTO department (name) VALUES ('Research')", DATABASE)
    assert names(stranger(client)) == []
    monkeypatch.setattr(replica, "MOST_LAG", 0.0)  # from now on, what is old at all
    assert names(stranger(client)) == ["Research"]


def test_the_position_is_asked_for_from_time_to_time(
    client: FlaskClient, primary: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader has to be shown is what there was one to two such times ago."""
    known: Any = client.application.extensions["rollcall_replica"]
    first = known._positions[0]
    primary.execute("INSERT INTO department (name) VALUES ('Research')", DATABASE)
    with client.application.app_context():
        assert known._least() == first
        known._looked_at -= replica.MOST_LAG
        assert known._least() == first
        assert known._positions[-1] > first
        known._looked_at -= replica.MOST_LAG
        assert known._least() > first


def test_a_replica_that_is_away_is_no_error(
    client: FlaskClient,
    primary: Node,
    standby: Node,
    outcomes: Counter[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The primary answers; the replica is left alone, tried after a pause, and used again."""
    known: Any = client.application.extensions["rollcall_replica"]
    standby.kill()
    assert [names(client) for _ in range(3)] == [[]] * 3
    assert outcomes == {"failed": 1}
    known._shunned_until = time.monotonic()
    assert known.is_worth_a_try()
    assert not known.is_worth_a_try()  # one finds out for all
    known._shunned_until = time.monotonic()
    assert names(client) == []
    assert outcomes == {"failed": 2}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning.event for warning in warnings] == ["replica_failed"] * 2  # type: ignore[attr-defined]
    standby.start()
    catch_up(primary, standby)
    known._shunned_until = time.monotonic()
    assert [names(client) for _ in range(3)] == [[]] * 3
    assert outcomes == {"failed": 2, "answered": 3}


def test_a_conflict_with_recovery_is_no_error(
    client: FlaskClient, primary: Node, standby: Node, outcomes: Counter[str]
) -> None:
    """The standby cancels a query that is in the way of what it has to replay."""
    create(client, "Research")
    catch_up(primary, standby)
    slow = select(Department.name, func.pg_sleep(60))

    def read() -> Any:
        with client.application.test_request_context():
            return look(lambda session: session.scalars(on_a_standby(session, slow)).all())

    def on_a_standby(session: Any, query: Any) -> Any:
        in_recovery = session.scalar(select(func.pg_is_in_recovery()))
        return query if in_recovery else select(Department.name)

    answer = started(read)
    asleep = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    eventually(lambda: standby.execute(asleep))
    primary.execute("BEGIN; LOCK TABLE department IN ACCESS EXCLUSIVE MODE; COMMIT", DATABASE)
    assert answer() == ["Research"]
    assert outcomes == {"failed": 1}
    assert client.application.extensions["rollcall_replica"].is_worth_a_try()


def test_a_server_that_is_no_standby_is_not_read_from(
    make_app: Make, primary: Node, outcomes: Counter[str]
) -> None:
    """It was promoted, or was the primary once: nothing brings it up to date."""
    app = make_app(primary.url(DATABASE), ROLLCALL_READ_URL=primary.url(DATABASE))
    assert names(app.test_client()) == []
    assert outcomes == {"behind": 1}
    app.extensions["rollcall_replica"].engine.dispose()


def test_writes_are_the_primarys(client: FlaskClient, outcomes: Counter[str]) -> None:
    """And what they look up, and commands."""
    create(client, "Research")
    person = {"name": "Ada", "department_id": 999, "manager_id": 999}
    assert client.post("/api/v1/employees", json=person).status_code == 422
    with client.application.app_context():
        assert look(lambda session: session.scalar(select(Department.name))) == "Research"
    assert not outcomes


def test_another_database_is_not_the_replicas(
    client: FlaskClient, primary: Node, outcomes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a copy of one; whoever works on another is answered by that."""
    other = create_engine(primary.url())
    with client.application.test_request_context():
        monkeypatch.setattr(type(db), "engine", property(lambda self: other))
        assert replica.look(lambda session: "replica", lambda: "primary", bool) == "primary"
    assert not outcomes


def test_a_position_that_cannot_be_had_is_never_reached(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, outcomes: Counter[str]
) -> None:
    """The write is done; its writer reads from the primary."""
    monkeypatch.setattr(replica, "WRITTEN", StatementText("SELECT pg_last_wal_of_mars()", ()))
    written = create(client, "Research")
    assert (written.status_code, written.headers[replica.HEADER]) == (201, NEVER)
    assert names(client) == ["Research"]
    assert outcomes == {"behind": 1}


def test_a_pool_that_is_used_up_is_no_error(
    client: FlaskClient, outcomes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the primary's has a connection left."""

    def wait(*arguments: object) -> None:
        raise PoolTimeout

    monkeypatch.setattr(replica.Replica, "read", wait)
    assert names(client) == []
    assert outcomes == {"failed": 1}


def test_without_a_replica_nothing_is_said(make_app: Make, primary: Node) -> None:
    """Nor asked."""
    answer = create(make_app(primary.url(DATABASE)).test_client(), "Research")
    assert not {replica.HEADER, "Set-Cookie"} & set(answer.headers.keys())


def test_a_standby_takes_no_writes(make_app: Make, standby: Node) -> None:
    """A service that was led to one by mistake says 503; SERIALIZABLE is refused there at once."""
    client = make_app(standby.url(DATABASE)).test_client()
    answers = [create(client, "Research"), client.delete("/api/v1/departments/1")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {answer.get_json()["code"] for answer in answers} == {"database_away"}
    assert names(client) == []
