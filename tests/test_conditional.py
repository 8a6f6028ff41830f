"""Conditional requests: entity tags, and changes that are made only to what the client has seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.db import db
from tests.proxy import before_each_rerun, lossy_proxy
from tests.races import together
from tests.test_departments import mark_as_duplicate
from tests.test_directory import lose_the_commit

DEPARTMENTS = "/api/v1/departments"
EMPLOYEES = "/api/v1/employees"
ANN = f"{EMPLOYEES}/1"


@pytest.fixture
def tag(client: FlaskClient) -> str:
    """The tag of an employee, the only one of the only department."""
    made = client.post(EMPLOYEES, json={"name": "Ann", "department": "Research"})
    return made.headers["ETag"]


def is_strong(tag: str) -> bool:
    return tag.startswith('"') and tag.endswith('"') and len(tag) == 34


def assert_precondition_failed(answer: Any) -> None:
    assert (answer.status_code, answer.get_json()["code"]) == (412, "precondition_failed")
    assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize(
    ("url", "body"),
    [(DEPARTMENTS, {"name": "Research"}), (EMPLOYEES, {"name": "Ann", "department": "R"})],
)
def test_one_state_has_one_tag(client: FlaskClient, url: str, body: Any) -> None:
    """Whether the record is created, found, shown or changed; another state has another one."""
    made, found = client.post(url, json=body), client.post(url, json=body)
    shown, seen = client.get(f"{url}/1"), client.head(f"{url}/1")
    same = client.patch(f"{url}/1", json={})
    assert (made.status_code, found.status_code) == (201, 200)
    tags = [answer.headers["ETag"] for answer in (made, found, shown, seen, same)]
    assert is_strong(tags[0])
    assert set(tags) == {tags[0]}

    changed = client.patch(f"{url}/1", json={"name": "New"})
    back = client.patch(f"{url}/1", json={"name": body["name"]})
    assert len({tags[0], changed.headers["ETag"], back.headers["ETag"]}) == 3
    assert client.get(f"{url}/1").headers["ETag"] == back.headers["ETag"]


def test_what_is_no_single_record_has_no_tag(client: FlaskClient, tag: str) -> None:
    """Lists, batches, deletions, errors, and the way to a canonical record."""
    client.post(EMPLOYEES, json={"name": "Old", "department": "Research"})
    mark_as_duplicate(client, "employee", 2, of=1)
    answers = [
        client.get(EMPLOYEES),
        client.post(f"{EMPLOYEES}/batch", json={"items": []}),
        client.get(f"{EMPLOYEES}/2", headers={"If-None-Match": "*", "If-Match": tag}),
        client.get(f"{EMPLOYEES}/3", headers={"If-None-Match": "*", "If-Match": tag}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 308, 404]
    assert all("ETag" not in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"other", {tag}', 304),
        ('"other",W/{tag} ,"more"', 304),
        ("*", 304),
        ('"other"', 200),
        ('W/"other"', 200),
        ("", 200),
        (",", 200),
        ('"', 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_the_client_has_is_not_sent_again(
    client: FlaskClient, tag: str, method: str, header: str, status: int
) -> None:
    """304 without a body where If-None-Match lists the tag, weak ones too."""
    headers = {"If-None-Match": header.format(tag=tag)}
    answer = client.open(ANN, method=method, headers=headers)
    assert (answer.status_code, answer.headers["ETag"]) == (status, tag)
    if status == 304:
        assert answer.data == b""
        assert "Content-Type" not in answer.headers


# Whatever is not a tag of ours matches nothing: a change that was to be safe is not made blindly.
MATCHES = ["{tag}", '"other", {tag}', "*", "{tag},"]
MATCHES_NOT = ['"other"', "W/{tag}", "", ",", '"', '"other", *', "{tag}x"]


@pytest.mark.parametrize("header", MATCHES)
def test_what_is_as_the_client_has_it_is_changed(
    client: FlaskClient, tag: str, header: str
) -> None:
    """Shown, changed and deleted; `*` means that it is there."""
    headers = {"If-Match": header.format(tag=tag)}
    assert client.get(ANN, headers=headers).status_code == 200
    assert client.patch(ANN, json={}, headers=headers).status_code == 200
    assert client.delete(ANN, headers=headers).status_code == 204


@pytest.mark.parametrize("header", MATCHES_NOT)
def test_what_is_not_as_the_client_has_it_is_left_alone(
    client: FlaskClient, tag: str, header: str
) -> None:
    """412, and the record is as it was."""
    headers = {"If-Match": header.format(tag=tag)}
    assert_precondition_failed(client.get(ANN, headers=headers))
    assert_precondition_failed(client.patch(ANN, json={"title": "Chief"}, headers=headers))
    assert_precondition_failed(client.delete(ANN, headers=headers))
    assert client.get(ANN).headers["ETag"] == tag


@pytest.mark.parametrize(("header", "changes"), [("*", 0), ("{tag}", 0), ('"other"', 1)])
def test_a_change_can_be_asked_for_unless_the_record_is_as_known(
    client: FlaskClient, tag: str, header: str, changes: int
) -> None:
    """If-None-Match with another method than GET is a 412 where it would be a 304."""
    headers = {"If-None-Match": header.format(tag=tag)}
    statuses = [
        client.patch(ANN, json={}, headers=headers).status_code,
        client.delete(ANN, headers=headers).status_code,
    ]
    assert statuses == [[412, 412], [200, 204]][changes]


def test_a_department_is_deleted_with_its_employees_only_as_it_was_seen(
    client: FlaskClient, tag: str
) -> None:
    """If-Match goes before what is left to be said of the department."""
    url = f"{DEPARTMENTS}/1"
    seen = client.get(url).headers["ETag"]
    now = client.patch(url, json={"name": "New"}).headers["ETag"]
    cascade = f"{url}?cascade=true"
    assert_precondition_failed(client.delete(url, headers={"If-Match": seen}))
    assert_precondition_failed(client.delete(cascade, headers={"If-Match": seen}))
    assert client.delete(url, headers={"If-Match": now}).status_code == 409
    assert client.delete(cascade, headers={"If-Match": now}).status_code == 204


def test_what_cannot_be_changed_at_all_is_said_first(client: FlaskClient, tag: str) -> None:
    """404 and the 409 of a duplicate go before 412; a taken key comes after it."""
    client.post(EMPLOYEES, json={"name": "Old", "department": "Research"})
    client.post(EMPLOYEES, json={"name": "Bob", "department": "Research"})
    mark_as_duplicate(client, "employee", 2, of=1)
    stale = {"If-Match": '"stale"'}
    for id, status in ((9, 404), (2, 409)):
        assert client.patch(f"{EMPLOYEES}/{id}", json={}, headers=stale).status_code == status
        assert client.delete(f"{EMPLOYEES}/{id}", headers=stale).status_code == status
    assert_precondition_failed(client.patch(f"{EMPLOYEES}/3", json={"name": "Ann"}, headers=stale))


def test_a_list_takes_no_conditions(client: FlaskClient, tag: str) -> None:
    """Nor does a creation: the collection has no tag."""
    anything = {"If-None-Match": "*", "If-Match": '"stale"'}
    assert client.get(EMPLOYEES, headers=anything).status_code == 200
    body = {"name": "Bob", "department": "Research"}
    assert client.post(EMPLOYEES, json=body, headers=anything).status_code == 201


def patch(app: Flask, tag: str, title: str) -> Any:
    """Change Ann's title as a client of its own that has seen this state."""
    return app.test_client().patch(ANN, json={"title": title}, headers={"If-Match": tag})


@pytest.mark.flask_only  # the barrier would hold the event loop up
def test_no_update_is_lost(
    make_app: Callable[..., Flask], either_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two clients change what both have seen; both are found up to date before either commits."""
    app = make_app(either_url)
    body = {"name": "Ann", "department": "Research"}
    tag = app.test_client().post(EMPLOYEES, json=body).headers["ETag"]
    both_were_checked = threading.Barrier(2, timeout=60)
    first_two = iter([both_were_checked.wait, both_were_checked.wait])

    def meet(*arguments: object) -> None:
        next(first_two, bool)()  # who comes later, with a change that is run again, passes

    event.listen(Session, "before_flush", meet)
    try:
        tasks = [partial(patch, app, tag, title) for title in ("Chief", "Cook")]
        answers = sorted(together(tasks), key=lambda answer: answer.status_code)
    finally:
        event.remove(Session, "before_flush", meet)

    assert [answer.status_code for answer in answers] == [200, 412]
    assert [record.sqlstate for record in caplog.records] == ["40001"]  # type: ignore[attr-defined]
    winner = answers[0]
    now = app.test_client().get(ANN)
    assert (now.get_json(), now.headers["ETag"]) == (winner.get_json(), winner.headers["ETag"])
    again = patch(app, now.headers["ETag"], "Third")
    assert (again.status_code, again.get_json()["title"]) == (200, "Third")


@pytest.mark.flask_only  # as above
def test_a_change_is_not_deleted_unseen(make_app: Callable[..., Flask], either_url: str) -> None:
    """A deletion that has checked the tag meets a change of the record."""
    app = make_app(either_url)
    body = {"name": "Ann", "department": "Research"}
    tag = app.test_client().post(EMPLOYEES, json=body).headers["ETag"]
    changes: list[Any] = []

    def change_meanwhile(*arguments: object) -> None:
        changes.extend(together([partial(patch, app, tag, "Chief")]))

    event.listen(Session, "before_flush", change_meanwhile, once=True)
    answer = app.test_client().delete(ANN, headers={"If-Match": tag})
    assert_precondition_failed(answer)
    assert [change.status_code for change in changes] == [200]
    assert app.test_client().get(ANN).get_json()["title"] == "Chief"


def test_a_lost_reply_to_ones_own_change_is_no_412(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """The row is not as it was expected because this call has changed it."""
    with lossy_proxy(either_url) as (proxy, url):
        client = make_app(url).test_client()
        made = client.post(EMPLOYEES, json={"name": "Ann", "department": "Research"})
        headers = {"If-Match": made.headers["ETag"]}

        lose_the_commit(proxy)
        changed = client.patch(ANN, json={"title": "Chief"}, headers=headers)
        assert (changed.status_code, changed.get_json()["title"]) == (200, "Chief")
        assert client.get(ANN).headers["ETag"] == changed.headers["ETag"]
        assert_precondition_failed(client.patch(ANN, json={"title": "Cook"}, headers=headers))

        lose_the_commit(proxy)
        headers = {"If-Match": changed.headers["ETag"]}
        assert client.delete(ANN, headers=headers).status_code == 204
        assert proxy.lost == 2


def test_a_change_of_ones_own_that_was_changed_since_is_not_made_again(
    make_app: Callable[..., Flask], either_url: str
) -> None:
    """Its reply was lost, and somebody else has seen and changed it: theirs stays."""
    promotion = "UPDATE employee SET title = title || ' Cook', updated_at = now()"
    with lossy_proxy(either_url) as (proxy, url):
        client = make_app(url).test_client()
        made = client.post(EMPLOYEES, json={"name": "Ann", "department": "Research"})
        lose_the_commit(proxy)
        headers = {"If-Match": made.headers["ETag"]}
        with before_each_rerun(either_url, promotion):
            answer = client.patch(ANN, json={"title": "Chief"}, headers=headers)
        assert_precondition_failed(answer)
        assert client.get(ANN).get_json()["title"] == "Chief Cook"
        assert proxy.lost == 1


def test_a_tag_does_not_depend_on_how_the_record_was_read(client: FlaskClient, tag: str) -> None:
    """By the statement that creates, as an instance, or after a change in the same transaction."""
    body = {"title": "Chief", "hired_on": "2020-02-01", "email": "ann@example.org"}
    changed = client.patch(ANN, json=body)
    found = client.post(EMPLOYEES, json={"name": "Ann", "department_id": 1})
    with client.application.app_context():
        db.session.expunge_all()
    shown = client.get(ANN)
    assert changed.text == found.text == shown.text
    assert len({answer.headers["ETag"] for answer in (changed, found, shown)}) == 1


def test_swagger_shows_conditions_and_tags(client: FlaskClient) -> None:
    """Request headers as parameters, ETag and the statuses that come of them as responses."""
    document = client.get("/api/v1/swagger.json").get_json()
    for kind in ("departments", "employees"):
        paths = {path: document["paths"][path] for path in (f"/{kind}", f"/{kind}/{{id}}")}
        get, change, delete = (
            paths[f"/{kind}/{{id}}"][method] for method in ("get", "patch", "delete")
        )
        for operation in (get, change, delete):
            names = {one["name"] for one in operation["parameters"] if one["in"] == "header"}
            assert names - {"X-Tenant"} == {"If-Match", "If-None-Match"}
            assert "412" in operation["responses"]
        assert "ETag" in get["responses"]["304"]["headers"]
        post = paths[f"/{kind}"]["post"]
        assert {"ETag", "Location"} <= post["responses"]["201"]["headers"].keys()
        assert "ETag" in change["responses"]["200"]["headers"]
        assert "ETag" not in paths[f"/{kind}"]["get"]["responses"]["200"]["headers"]
        names = {one["name"] for one in post["parameters"] if one["in"] == "header"}
        assert names - {"X-Tenant"} == {"Idempotency-Key"}
