"""Employees over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.db import db
from tests.test_departments import mark_as_duplicate

URL = "/api/v1/employees"
DEPARTMENTS = "/api/v1/departments"


@pytest.fixture
def research(client: FlaskClient) -> int:
    id: int = client.post(DEPARTMENTS, json={"name": "Research"}).get_json()["id"]
    return id


def create(client: FlaskClient, department_id: int, name: str = "Ann Lee", **more: Any) -> int:
    answer = client.post(URL, json={"name": name, "department_id": department_id, **more})
    id: int = answer.get_json()["id"]
    return id


def test_the_first_post_creates_and_the_second_finds(client: FlaskClient, research: int) -> None:
    """The rest of the body is used only when the employee is created."""
    body = {
        "name": "Ann Lee",
        "department_id": research,
        "title": " Chief  Analyst ",
        "email": "ann@example.org",
        "hired_on": "2020-02-01",
    }
    first = client.post(URL, json=body)
    second = client.post(URL, json={**body, "title": "Other"})

    assert (first.status_code, first.headers["Location"]) == (201, f"{URL}/1")
    assert (second.status_code, second.headers["Content-Location"]) == (200, f"{URL}/1")
    assert first.get_json() == second.get_json()
    stamps = {"created_at", "updated_at"}
    assert {k: v for k, v in first.get_json().items() if k not in stamps} == {
        **body,
        "id": 1,
        "title": "Chief Analyst",
        "manager_id": None,
        "duplicate_of_id": None,
    }


def test_a_department_can_be_given_by_name(client: FlaskClient, research: int) -> None:
    """It is found, or created."""
    found = client.post(URL, json={"name": "Ann", "department": " Research"})
    made = client.post(URL, json={"name": "Ann", "department": "New"})
    assert found.get_json()["department_id"] == research
    assert made.get_json()["department_id"] == research + 1
    assert found.status_code == made.status_code == 201


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"name": "Ann"}, {"department", "department_id"}),
        ({"name": "Ann", "department": "New", "department_id": 1}, {"department", "department_id"}),
        ({"name": "Ann", "department": "New", "hired_on": "soon"}, {"hired_on"}),
        ({"name": " ", "department": "New"}, {"name"}),
        ({"department": "New"}, {"name"}),
        ({"name": "Ann", "department": "New", "manager_id": 99}, {"manager_id"}),
        ({"name": "Ann", "department": "New", "manager_id": 1.0}, {"manager_id"}),
        ({"name": "Ann", "department": "New", "manager_id": True}, {"manager_id"}),
        ({"name": "Ann", "department_id": 99}, {"department_id"}),
        ({"name": "Ann", "department_id": "1"}, {"department_id"}),
        ({"name": "Ann", "department_id": 2**63}, {"department_id"}),
        ({"name": "Ann", "department_id": 0}, {"department_id"}),
        ({"name": "Ann", "department_id": None}, {"department_id"}),
        ({"name": "Ann", "department": "New", "email": "nobody"}, {"email"}),
        ({"name": "Ann", "department": "New", "salary": 5}, {"salary"}),
        ({"name": "Ann", "department": "New", "id": 5}, {"id"}),
        ({"name": "A" * 256, "department": "New"}, {"name"}),
        ({"name": 5, "department": ["New"]}, {"name", "department"}),
    ],
)
def test_a_body_that_breaks_a_rule_creates_nothing(
    client: FlaskClient, body: dict[str, Any], fields: set[str]
) -> None:
    """422 that names the fields; not even the department is made."""
    answer = client.post(URL, json=body)
    assert answer.status_code == 422
    assert answer.get_json()["errors"].keys() == fields
    assert client.get(DEPARTMENTS).get_json()["items"] == []


def test_an_unknown_manager_is_refused_under_a_known_department(
    client: FlaskClient, research: int
) -> None:
    """Whether the employee is there already or not."""
    body = {"name": "Ann", "department_id": research, "manager_id": 99}
    for _ in ("not there yet", "there"):
        answer = client.post(URL, json=body)
        assert (answer.status_code, [*answer.get_json()["errors"]]) == (422, ["manager_id"])
        create(client, research, "Ann")


def test_a_manager_is_kept(client: FlaskClient, research: int) -> None:
    """By department id and by department name."""
    boss = create(client, research, "Boss")
    ann = create(client, research, "Ann", manager_id=boss)
    bob = client.post(URL, json={"name": "Bob", "department": "Research", "manager_id": boss})
    assert client.get(f"{URL}/{ann}").get_json()["manager_id"] == boss
    assert bob.get_json()["manager_id"] == boss


def test_a_list_can_be_filtered_by_department(client: FlaskClient, research: int) -> None:
    """Also by the id of its duplicate."""
    ann = create(client, research)
    client.post(URL, json={"name": "Bob", "department": "Other"})
    mark_as_duplicate(client, "department", research + 1, of=research)
    for id in (research, research + 1):
        items = client.get(f"{URL}?department_id={id}").get_json()["items"]
        assert [item["id"] for item in items] == [ann]


def test_the_way_to_the_next_page_keeps_the_filters(client: FlaskClient, research: int) -> None:
    """And leads there."""
    for number in range(3):
        create(client, research, f"Ann & {number}")
    page = client.get(f"{URL}?limit=1&q=n+%26&department_id={research}").get_json()
    assert page["next"] == f"{URL}?limit=1&q=n+%26&department_id={research}&after=1"
    assert client.get(page["next"]).get_json()["items"][0]["name"] == "Ann & 1"


def test_every_field_can_be_changed(client: FlaskClient, research: int) -> None:
    """And an optional one emptied."""
    boss, ann = create(client, research, "Boss"), create(client, research, title="Chief")
    changes = {
        "name": "Ann Low",
        "title": None,
        "email": "ann@example.org",
        "hired_on": "2020-02-01",
        "manager_id": boss,
    }
    answer = client.patch(f"{URL}/{ann}", json=changes)
    assert answer.status_code == 200
    assert changes.items() <= answer.get_json().items()
    assert client.get(f"{URL}/{ann}").get_json() == answer.get_json()
    assert client.patch(f"{URL}/{ann}", json={"manager_id": None}).get_json()["manager_id"] is None


def test_an_employee_can_move(client: FlaskClient, research: int) -> None:
    """By the id of the department, of its duplicate, or by its name, found or created."""
    ann = create(client, research)
    other = client.post(DEPARTMENTS, json={"name": "Other"}).get_json()["id"]
    old = client.post(DEPARTMENTS, json={"name": "Old"}).get_json()["id"]
    mark_as_duplicate(client, "department", old, of=other)

    def move(**to: Any) -> Any:
        return client.patch(f"{URL}/{ann}", json=to).get_json()["department_id"]

    assert move(department_id=other) == other
    assert move(department="Research") == research
    assert move(department_id=old) == other
    assert move(department="New") == old + 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"department_id": 99}, "department_id"),
        ({"department_id": None}, "department_id"),
        ({"department_id": 1, "department": "X"}, "department"),
        ({"manager_id": 99}, "manager_id"),
        ({"manager_id": 1}, "manager_id"),
        ({"name": None}, "name"),
        ({"duplicate_of_id": 1}, "duplicate_of_id"),
    ],
)
def test_a_change_that_breaks_a_rule_changes_nothing(
    client: FlaskClient, research: int, changes: dict[str, Any], field: str
) -> None:
    """Among the rules: nobody is their own manager."""
    ann = create(client, research)
    before = client.get(f"{URL}/{ann}").get_json()
    answer = client.patch(f"{URL}/{ann}", json={"title": "New", **changes})
    assert answer.status_code == 422
    assert field in answer.get_json()["errors"]
    assert client.get(f"{URL}/{ann}").get_json() == before


def test_a_change_onto_a_taken_key_is_a_conflict(client: FlaskClient, research: int) -> None:
    """By name or by department; the record that has the key is named, and nothing was changed."""
    ann = create(client, research)
    bob = create(client, research, "Bob")
    carl = client.post(URL, json={"name": "Ann Lee", "department": "Other"}).get_json()["id"]
    for id, changes in ((bob, {"name": "Ann  Lee"}), (carl, {"department": "Research"})):
        answer = client.patch(f"{URL}/{id}", json=changes)
        assert (answer.status_code, answer.get_json()["id"]) == (409, ann)
        assert answer.headers["Location"] == f"{URL}/{ann}"


def test_a_department_made_for_a_change_that_fails_is_not_kept(
    client: FlaskClient, research: int
) -> None:
    """The whole change is one transaction."""
    ann = create(client, research)
    assert (
        client.patch(f"{URL}/{ann}", json={"department": "New", "manager_id": 99}).status_code
        == 422
    )
    assert len(client.get(DEPARTMENTS).get_json()["items"]) == 1


def test_a_deleted_manager_is_forgotten(client: FlaskClient, research: int) -> None:
    """Their reports stay, without a manager."""
    boss = create(client, research, "Boss")
    ann = create(client, research, "Ann", manager_id=boss)
    assert client.delete(f"{URL}/{boss}").status_code == 204
    assert client.get(f"{URL}/{boss}").status_code == 404
    assert client.get(f"{URL}/{ann}").get_json()["manager_id"] is None


def test_a_duplicate_leads_to_its_canonical_record(client: FlaskClient, research: int) -> None:
    """As for departments."""
    ann, old = create(client, research), create(client, research, "Old")
    mark_as_duplicate(client, "employee", old, of=ann)
    moved = client.get(f"{URL}/{old}")
    assert (moved.status_code, moved.headers["Location"]) == (308, f"{URL}/{ann}")
    assert client.get(f"{URL}/{old}", follow_redirects=True).get_json()["id"] == ann
    boss = create(client, research, "Bob", manager_id=old)
    assert client.get(f"{URL}/{boss}").get_json()["manager_id"] == ann
    assert client.patch(f"{URL}/{boss}", json={"manager_id": old}).get_json()["manager_id"] == ann


def test_a_legacy_row_keeps_its_name_until_it_is_changed(
    client: FlaskClient, research: int
) -> None:
    """A change of another field leaves an un-normalised key alone."""
    with client.application.app_context(), db.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO employee (department_id, name) VALUES (:id, 'Old  Name')"),
            {"id": research},
        )
    assert client.patch(f"{URL}/1", json={"title": "T"}).get_json()["name"] == "Old  Name"
    assert (
        client.post(URL, json={"name": "Old  Name", "department_id": research}).status_code == 200
    )
    assert client.patch(f"{URL}/1", json={"name": "Old  Name"}).get_json()["name"] == "Old Name"


def test_a_change_finds_legacy_rows_as_they_are_spelled(client: FlaskClient, research: int) -> None:
    """A department and a key that were never normalised make no second row."""
    with client.application.app_context(), db.engine.begin() as connection:
        connection.execute(text("INSERT INTO department (name) VALUES ('R&D  Lab')"))
        connection.execute(
            text("INSERT INTO employee (department_id, name) VALUES (:id, 'Old  Name')"),
            {"id": research},
        )
    ann = create(client, research)
    moved = client.patch(f"{URL}/{ann}", json={"department": "R&D  Lab"})
    assert moved.get_json()["department_id"] == research + 1
    assert len(client.get(DEPARTMENTS).get_json()["items"]) == 2
    client.patch(f"{URL}/{ann}", json={"department_id": research})
    assert client.patch(f"{URL}/{ann}", json={"name": "Old  Name"}).get_json()["id"] == 1
    renamed = client.patch(f"{DEPARTMENTS}/{research}", json={"name": "R&D  Lab"})
    assert (renamed.status_code, renamed.get_json()["id"]) == (409, research + 1)


def test_a_department_goes_with_no_employee_that_has_duplicates(
    client: FlaskClient, research: int
) -> None:
    """They would be left without their canonical record."""
    ann, old = create(client, research), create(client, research, "Old")
    mark_as_duplicate(client, "employee", old, of=ann)
    answer = client.delete(f"{DEPARTMENTS}/{research}?cascade=true")
    assert (answer.status_code, answer.get_json()["code"]) == (409, "has_duplicates")
    assert answer.get_json()["id"] == ann
    assert client.get(f"{URL}/{ann}").status_code == 200


def test_the_way_to_the_next_page_knows_where_the_application_is_mounted(
    client: FlaskClient, research: int
) -> None:
    """Under a prefix, as Location does."""
    for number in range(2):
        create(client, research, f"Ann {number}")
    page = client.get(f"{URL}?limit=1", base_url="http://localhost/rollcall/")
    assert page.get_json()["next"] == f"/rollcall{URL}?limit=1&after=1"


BATCH = f"{URL}/batch"


def test_a_batch_answers_in_the_order_of_its_items(client: FlaskClient, research: int) -> None:
    """Ids, what was created, and the sums; departments by id or by name."""
    ann = create(client, research)
    answer = client.post(
        BATCH,
        json={
            "items": [
                {"name": "Bob", "department": "New", "title": "Cook"},
                {"name": " Ann  Lee", "department_id": research},
                {"name": "Bob", "department": " New"},
            ]
        },
    )
    assert answer.status_code == 200
    assert answer.get_json() == {
        "items": [
            {"id": ann + 1, "created": True},
            {"id": ann, "created": False},
            {"id": ann + 1, "created": False},
        ],
        "created": 1,
        "existing": 2,
    }
    assert client.get(f"{URL}/{ann + 1}").get_json()["title"] == "Cook"


def test_an_empty_batch_is_well(client: FlaskClient) -> None:
    """Nothing was asked for."""
    answer = client.post(BATCH, json={"items": []})
    assert answer.get_json() == {"items": [], "created": 0, "existing": 0}


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"name": " ", "department_id": 1}, "items.1.name"),
        ({"name": "A"}, "items.1.department_id"),
        ({"name": "A", "department_id": 99}, "items.1.department_id"),
        ({"name": "A", "department_id": 1, "manager_id": 99}, "items.1.manager_id"),
        ({"name": "A", "department_id": 1, "nickname": "x"}, "items.1.nickname"),
        ({"name": "A", "department_id": 1, "<b>": "x"}, "items.1"),
        ("A", "items.1"),
        (None, "items.1"),
    ],
)
def test_an_invalid_item_is_named_by_its_index_and_nothing_is_written(
    client: FlaskClient, research: int, item: Any, field: str
) -> None:
    """Neither its neighbours nor the departments that they name."""
    answer = client.post(BATCH, json={"items": [{"name": "Good", "department": "New"}, item]})
    assert (answer.status_code, answer.get_json()["code"]) == (422, "invalid")
    assert field in answer.get_json()["errors"]
    assert client.get(URL).get_json()["items"] == []
    assert len(client.get(DEPARTMENTS).get_json()["items"]) == 1


def test_too_long_a_batch_is_refused_before_its_items_are_looked_at(client: FlaskClient) -> None:
    """Their errors would be a longer answer than the batch."""
    answer = client.post(BATCH, json={"items": [{}] * 50_000})
    assert answer.get_json()["errors"] == {"items": ["Longer than maximum length 1000."]}


@pytest.mark.parametrize(
    "body", [{}, [], {"items": 1}, {"items": {}}, {"items": [], "more": 1}, {"items": [1] * 1001}]
)
def test_what_is_no_batch_is_refused(client: FlaskClient, body: Any) -> None:
    """422, with the field that is wrong."""
    answer = client.post(BATCH, json=body)
    assert (answer.status_code, answer.get_json()["code"]) == (422, "invalid")


def test_a_batch_may_have_a_thousand_items(client: FlaskClient, research: int) -> None:
    """And no more: 1,001 are refused for their number alone."""
    items = [{"name": f"Person {number}", "department_id": research} for number in range(1001)]
    assert client.post(BATCH, json={"items": items[:1000]}).get_json()["created"] == 1000
    assert client.post(BATCH, json={"items": items}).get_json()["errors"] == {
        "items": ["Longer than maximum length 1000."]
    }


def test_a_department_that_goes_while_a_batch_looks_is_named(
    client: FlaskClient, app: Flask, research: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The foreign key refuses it, and a second look finds it gone."""

    def known_at_first(session: Session, items: Any) -> None:
        monkeypatch.undo()

    monkeypatch.setattr("app.directory._require_known", known_at_first)
    answer = client.post(BATCH, json={"items": [{"name": "A", "department_id": 99}]})
    assert answer.status_code == 422
    assert answer.get_json()["errors"].keys() == {"items.0.department_id"}
