"""Idempotency-Key: a creation that is sent again is answered as the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import inspect, select

from app import tokens
from app.call import read_call
from app.creation_token import RequestKey, new_tokens, repeatable_token, span
from app.db import db
from app.models import Department, Employee
from app.statement import plan_for, plan_for_token, shape_of, tokens_of, values_of
from tests.conftest import count
from tests.proxy import before_each_rerun, lossy_proxy
from tests.races import inserts_held, inserts_meet, started, together
from tests.test_departments import mark_as_duplicate

DEPARTMENTS = "/api/v1/departments"
EMPLOYEES = "/api/v1/employees"
ANN = {"name": "Ann", "department": "Research"}


def create(client: FlaskClient, body: Any, key: str = "k", url: str = EMPLOYEES) -> Any:
    return client.post(url, json=body, headers={"Idempotency-Key": key})


def assert_reused(answer: Any) -> None:
    assert (answer.status_code, answer.get_json()["code"]) == (422, "idempotency_key_reused")
    assert answer.content_type == "application/problem+json"


def rows(client: FlaskClient, url: str = EMPLOYEES) -> list[str]:
    """Return the names of all rows, duplicates too."""
    items = client.get(f"{url}?include=duplicates").get_json()["items"]
    return [item["name"] for item in items]


@pytest.mark.parametrize(("url", "body"), [(DEPARTMENTS, {"name": "Research"}), (EMPLOYEES, ANN)])
def test_a_creation_that_is_sent_again_is_answered_the_same(
    client: FlaskClient, url: str, body: Any
) -> None:
    """201 with the representation, Location and all; without the key it is a 200."""
    first, again = create(client, body, url=url), create(client, body, url=url)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.text == again.text
    for header in ("Location", "ETag"):
        assert first.headers[header] == again.headers[header]
    assert client.post(url, json=body).status_code == 200
    assert create(client, body, "other", url).status_code == 200
    assert len(rows(client, url)) == 1


@pytest.mark.parametrize("sent", [{"department": "Research"}, {"department_id": 1}])
def test_it_is_found_by_what_it_is_called_now(client: FlaskClient, sent: Any) -> None:
    """Renamed and moved since, its department renamed: the same record, and no new department."""
    client.post(DEPARTMENTS, json={"name": "Research"})
    body = {"name": "Ann", **sent}
    assert create(client, body).status_code == 201
    client.patch(f"{EMPLOYEES}/1", json={"name": "Eve", "department": "Sales"})
    client.patch(f"{DEPARTMENTS}/1", json={"name": "R and D"})
    client.post(EMPLOYEES, json={"name": "Ann", "department_id": 1})

    again = create(client, body)
    assert (again.status_code, again.headers["Location"]) == (201, f"{EMPLOYEES}/1")
    assert again.get_json()["name"] == "Eve"
    assert rows(client, DEPARTMENTS) == ["R and D", "Sales"]
    assert rows(client) == ["Eve", "Ann"]


def test_a_department_is_found_by_what_it_is_called_now(client: FlaskClient) -> None:
    """Even where another one has the name that it was created with."""
    assert create(client, {"name": "Old"}, url=DEPARTMENTS).status_code == 201
    client.patch(f"{DEPARTMENTS}/1", json={"name": "New"})
    client.post(DEPARTMENTS, json={"name": "Old"})
    again = create(client, {"name": " Old "}, url=DEPARTMENTS)
    assert (again.status_code, again.get_json()["name"]) == (201, "New")


@pytest.mark.parametrize(
    "other",
    [
        {"name": "Bob", "department": "Research"},
        {"name": "Ann", "department": "Sales"},
        {"name": "Ann", "department_id": 1},
        {"name": "Bob", "department_id": 1},
    ],
)
def test_the_same_key_with_another_natural_key_is_refused(client: FlaskClient, other: Any) -> None:
    """422, nothing is made, not even a department; the natural key is taken as it was sent."""
    assert create(client, ANN).status_code == 201
    assert_reused(create(client, other))
    assert (rows(client), rows(client, DEPARTMENTS)) == (["Ann"], ["Research"])


def test_the_same_key_with_another_name_of_a_department_is_refused(client: FlaskClient) -> None:
    """Also where the other one is there."""
    client.post(DEPARTMENTS, json={"name": "There"})
    assert create(client, {"name": "Research"}, url=DEPARTMENTS).status_code == 201
    for name in ("There", "Not there"):
        assert_reused(create(client, {"name": name}, url=DEPARTMENTS))
    assert rows(client, DEPARTMENTS) == ["There", "Research"]


def test_spellings_and_details_make_no_other_request(client: FlaskClient) -> None:
    """The answer is what is stored, not what is sent the second time."""
    assert create(client, {**ANN, "title": "Chief"}).status_code == 201
    again = create(client, {"name": " Ann ", "department": "Research ", "title": "Cook"})
    assert (again.status_code, again.get_json()["title"]) == (201, "Chief")


def test_what_was_found_is_not_remembered(client: FlaskClient) -> None:
    """A key is used up by a creation alone."""
    client.post(EMPLOYEES, json=ANN)
    assert create(client, ANN).status_code == 200
    assert create(client, {**ANN, "name": "Bob"}).status_code == 201
    assert_reused(create(client, ANN))


def test_what_was_refused_is_not_remembered(client: FlaskClient) -> None:
    """Nothing was created by it."""
    assert create(client, {**ANN, "manager_id": 99}).status_code == 422
    assert create(client, {**ANN, "name": "Bob"}).status_code == 201


def test_what_was_deleted_is_created_anew(client: FlaskClient) -> None:
    """There is no other memory than the row."""
    assert create(client, ANN).headers["Location"] == f"{EMPLOYEES}/1"
    client.delete(f"{EMPLOYEES}/1")
    for _ in range(2):
        again = create(client, ANN)
        assert (again.status_code, again.headers["Location"]) == (201, f"{EMPLOYEES}/2")


@pytest.mark.parametrize("sent", [{"department": "Research"}, {"department_id": 1}])
def test_what_was_merged_leads_to_the_record_that_is_kept(client: FlaskClient, sent: Any) -> None:
    """Its address and its representation; also where the key is free again."""
    client.post(EMPLOYEES, json={**ANN, "name": "Kept"})
    body = {"name": "Ann", **sent}
    assert create(client, body).headers["Location"] == f"{EMPLOYEES}/2"
    mark_as_duplicate(client, "employee", 2, of=1)
    for _ in range(2):
        again = create(client, body)
        assert (again.status_code, again.headers["Location"]) == (201, f"{EMPLOYEES}/1")
        assert (again.get_json()["id"], again.get_json()["name"]) == (1, "Kept")
    assert_reused(create(client, {**body, "name": "Kept"}))
    assert len(rows(client)) == 2


def test_a_merged_department_leads_to_the_one_that_is_kept(client: FlaskClient) -> None:
    """In one statement."""
    client.post(DEPARTMENTS, json={"name": "Kept"})
    assert create(client, {"name": "Other"}, url=DEPARTMENTS).status_code == 201
    mark_as_duplicate(client, "department", 2, of=1)
    again = create(client, {"name": "Other"}, url=DEPARTMENTS)
    assert (again.status_code, again.get_json()["name"]) == (201, "Kept")


def test_what_a_creation_referred_to_may_be_gone(client: FlaskClient) -> None:
    """A manager and a department that were deleted since do not refuse what is done already."""
    boss = client.post(EMPLOYEES, json={"name": "Boss", "department": "Top"}).get_json()
    client.post(DEPARTMENTS, json={"name": "Research"})
    body = {**ANN, "manager_id": boss["id"]}
    by_id = {"name": "Eve", "department_id": 2}
    assert create(client, body).status_code == 201
    assert create(client, by_id, "by-id").status_code == 201
    client.delete(f"{EMPLOYEES}/{boss['id']}")
    for id in (2, 3):
        client.patch(f"{EMPLOYEES}/{id}", json={"department": "Top"})
    assert client.delete(f"{DEPARTMENTS}/2").status_code == 204
    assert create(client, body).status_code == create(client, by_id, "by-id").status_code == 201


KEYS = ["k", "!", "#$%&'()*+-./:;<=>?@[]^_`{|}~", "x" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_may_be_in_quotes(client: FlaskClient, key: str) -> None:
    """As the draft has it; it is the same key without."""
    assert create(client, ANN, key).status_code == 201
    assert create(client, ANN, f'"{key}"').status_code == 201
    assert_reused(create(client, {**ANN, "name": "Bob"}, f' "{key}"'))


@pytest.mark.parametrize(
    "key",
    [
        "", " ", '""', '"', '"k', 'k"', "a b", '"a b"', "a,b", '"a", "b"', '"a";p=1', "x" * 256,
        f'"{"x" * 256}"', "Z\u00e9bra", "\\", '"\\""', "\x7f", "\x00",
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused(client: FlaskClient, key: str) -> None:
    """422, nothing is made, and nothing of it is in the answer."""
    answer = create(client, ANN, key)
    assert (answer.status_code, answer.get_json()["code"]) == (422, "invalid")
    assert answer.get_json()["errors"].keys() == {"idempotency_key"}
    assert "bra" not in answer.text
    assert rows(client) == []


def test_a_repeated_header_is_refused(client: FlaskClient) -> None:
    """With or without quotes."""
    for keys in (("a", "b"), ('"a"', '"b"'), ("a", "a")):
        headers = [("Idempotency-Key", key) for key in keys]
        answer = client.post(EMPLOYEES, json=ANN, headers=headers)
        assert answer.status_code == 422
        assert answer.get_json()["errors"].keys() == {"idempotency_key"}


def test_tables_have_keys_of_their_own(client: FlaskClient) -> None:
    """A key of a department's is another one than the same of an employee's."""
    assert create(client, {"name": "Research"}, url=DEPARTMENTS).status_code == 201
    assert create(client, ANN).status_code == 201


def test_callers_have_keys_of_their_own(make_app: Callable[..., Flask], database_url: str) -> None:
    """By the id of their token; whoever has none is one caller."""
    locked, open_to_all = make_app(database_url, ROLLCALL_AUTH="token"), make_app(database_url)
    with locked.app_context():
        issued = [tokens.issue(db.engine, name, "write") for name in ("portal", "importer")]
    callers = [(locked, {"Authorization": f"Bearer {token}"}) for token in issued]
    callers.append((open_to_all, {}))

    def create_as(number: int, name: str) -> int:
        app, shown = callers[number]
        headers = {"Idempotency-Key": "k", **shown}
        answer = app.test_client().post(EMPLOYEES, json={**ANN, "name": name}, headers=headers)
        return int(answer.status_code)

    for _ in range(2):
        assert [create_as(number, f"Ann {number}") for number in range(3)] == [201] * 3
    assert [create_as(number, "Eve") for number in range(3)] == [422] * 3


def test_it_means_nothing_elsewhere(client: FlaskClient) -> None:
    """Not for batches, nor for anything but the creation of one record."""
    assert create(client, ANN).status_code == 201
    headers = {"Idempotency-Key": "k"}
    batch = client.post(f"{EMPLOYEES}/batch", json={"items": [ANN]}, headers=headers)
    assert batch.get_json()["existing"] == 1
    assert client.patch(f"{EMPLOYEES}/1", json={"name": "B"}, headers=headers).status_code == 200
    assert client.get(f"{EMPLOYEES}/1", headers={"Idempotency-Key": ""}).status_code == 200


def sender(app: Flask, body: Any, url: str = EMPLOYEES) -> Callable[[], Any]:
    return partial(create, app.test_client(), body, url=url)


@pytest.fixture
def racing(make_app: Callable[..., Flask], either_url: str) -> Iterator[Flask]:
    """An application whose clients meet, on a guarded database and on one that is not."""
    app = make_app(either_url)
    with app.app_context():
        db.session.add_all(Department(name=f"D{number}") for number in range(1, 5))
        db.session.commit()
        yield app


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (DEPARTMENTS, {"name": "Research"}),
        (EMPLOYEES, {"name": "Ann", "department_id": 1}),
        (EMPLOYEES, {"name": "Ann", "department": "D1"}),
    ],
)
def test_requests_that_are_sent_at_once_are_one(
    racing: Flask, url: str, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All have looked and found nothing; all are told of the same creation."""
    table = url.rpartition("/")[2][:-1]
    with inserts_meet(db.engine, table, 4):
        answers = together([sender(racing, body, url) for _ in range(4)])
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len({answer.text for answer in answers}) == 1
    assert (count(Department), count(Employee)) == ((5, 0) if url == DEPARTMENTS else (4, 1))
    assert len(caplog.records) >= 3


@pytest.mark.parametrize("kind", ["department", "employee"])
def test_of_different_requests_with_one_key_one_is_done(
    racing: Flask, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They have nothing in common but the key: no row, and on the guard no index entry."""
    bodies: list[Any] = [{"name": f"N{number}"} for number in range(1, 5)]
    if kind == "employee":
        bodies = [{**body, "department_id": id} for id, body in enumerate(bodies, 1)]
    with inserts_meet(db.engine, kind, 4):
        answers = together([sender(racing, body, f"/api/v1/{kind}s") for body in bodies])
    (done,) = [answer for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer is not done:
            assert_reused(answer)
    model = Department if kind == "department" else Employee
    names = db.session.scalars(select(model.name).where(model.name.startswith("N"))).all()
    assert names == [done.get_json()["name"]]
    assert {record.sqlstate for record in caplog.records} == {"40001"}  # type: ignore[attr-defined]


def test_a_request_that_is_sent_again_waits_for_the_first(racing: Flask) -> None:
    """It is still being done when the second arrives."""
    body = {"name": "Ann", "department_id": 1}
    with inserts_held(db.engine, "employee") as gate:
        first = started(sender(racing, body))
        gate.wait_for(1)
        second = started(sender(racing, body))
        gate.wait_for(2)
        gate.open()
        answers = [first(), second()]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].text == answers[1].text


@pytest.fixture
def last_sent(service_kind: str) -> bytes:
    """What a creation's last message to the server has in it."""
    return b"Old" if service_kind == "asgi" else b"EXECUTE"  # asyncpg's has the values alone


def test_a_lost_reply_is_no_other_request(
    make_app: Callable[..., Flask], either_url: str, last_sent: bytes
) -> None:
    """The row was created, the reply was lost, and somebody has renamed it since."""
    renaming = "UPDATE department SET name = 'New' WHERE name = 'Old'"
    with lossy_proxy(either_url) as (proxy, url):
        client = make_app(url).test_client()
        create(client, {"name": "Warm"}, "warm", DEPARTMENTS)
        proxy.lose_reply_to = last_sent
        with before_each_rerun(either_url, renaming):
            for _ in range(2):
                answer = create(client, {"name": "Old"}, url=DEPARTMENTS)
                assert (answer.status_code, answer.get_json()["name"]) == (201, "New")
        assert proxy.lost == 1


def test_a_new_row_that_was_merged_before_the_rerun_leads_to_the_one_that_is_kept(
    make_app: Callable[..., Flask], either_url: str, last_sent: bytes
) -> None:
    """Without any key of the client's: the call's own token is taken, and no loop is made of it."""
    merge = "UPDATE department SET name = 'Old one', duplicate_of_id = 1 WHERE name = 'Old'"
    with lossy_proxy(either_url) as (proxy, url):
        client = make_app(url).test_client()
        client.post(DEPARTMENTS, json={"name": "Kept"})
        proxy.lose_reply_to = last_sent
        with before_each_rerun(either_url, merge):
            answer = client.post(DEPARTMENTS, json={"name": "Old"})
        assert (answer.status_code, answer.get_json()["name"]) == (201, "Kept")
        assert proxy.lost == 1


def test_a_token_has_a_part_for_the_request_and_one_for_the_record() -> None:
    """A UUID of version 8, which no call of its own has; one part is the same for one request."""
    sent = {"name": "Ann", "department": "Research"}
    token = repeatable_token(RequestKey("1", "k"), "employee", sent)
    spelled = {"department": " Research", "name": "Ann "}
    assert repeatable_token(RequestKey("1", "k"), "employee", spelled) == token
    other = repeatable_token(RequestKey("1", "k"), "employee", {**sent, "name": "Bob"})
    assert (token.version, token.variant) == (8, other.variant)
    assert str(token).rpartition("-")[0] == str(other).rpartition("-")[0]
    assert token != other
    lowest, highest = span(token)
    assert lowest <= token <= highest
    assert (lowest, highest) == span(other)
    assert str(highest)[:-12] == str(token)[:-12]
    for request_key, table in (
        (RequestKey("1", "k"), "department"),
        (RequestKey("1", "l"), "employee"),
        (RequestKey("2", "k"), "employee"),
        (RequestKey(None, "k"), "employee"),
        (RequestKey("None", "k"), "employee"),
    ):
        assert not lowest <= repeatable_token(request_key, table, sent) <= highest
    (new,) = new_tokens(1)
    assert (new.version, span(new)) == (7, (new, new))


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
def test_looking_by_token_reads_an_index_whatever_the_plan(racing: Flask, mode: str) -> None:
    """A prepared statement's plan does not know how few rows a range of tokens holds."""
    token = repeatable_token(RequestKey(None, "k"), "employee", ANN)
    call = read_call(Employee, None, token, name="Ann", department_id=1)
    dialect = db.engine.dialect
    create_plan = plan_for(shape_of(Employee, call, by_token=True), dialect)
    look_up_plan = plan_for_token(inspect(Employee), dialect)
    with db.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO employee (department_id, name, creation_token)"
            " SELECT 1, 'N' || number, gen_random_uuid() FROM generate_series(1, 5000) number;"
            f"ANALYZE employee; SET LOCAL plan_cache_mode = {mode}; SET LOCAL enable_seqscan = off"
        )
        for plan, values in (
            (create_plan, values_of(call, by_token=True)),
            (look_up_plan, tokens_of(token)),
        ):
            explain = plan.text.prepare_and_execute.replace("; EXECUTE", "; EXPLAIN EXECUTE")
            found = connection.exec_driver_sql(explain, plan.parameters(values))
            lines = "\n".join(found.scalars())
            connection.exec_driver_sql(f"DEALLOCATE {plan.text.name}")
            assert "Index Scan using uq_employee_creation_token" in lines
            assert "Seq Scan" not in lines
            assert lines.count("Index Cond: (id = (COALESCE(") == 1
