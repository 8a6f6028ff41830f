"""Departments over HTTP."""

from __future__ import annotations

import pytest
from flask.testing import FlaskClient
from sqlalchemy import text

from app.db import db

URL = "/api/v1/departments"


def create(client: FlaskClient, name: str = "Research") -> int:
    id: int = client.post(URL, json={"name": name}).get_json()["id"]
    return id


def mark_as_duplicate(client: FlaskClient, table: str, id: int, of: int) -> None:
    """Do what the guard will do to a duplicate."""
    with client.application.app_context(), db.engine.begin() as connection:
        connection.execute(
            text(f"UPDATE {table} SET duplicate_of_id = :of WHERE id = :id"),
            {"of": of, "id": id},
        )


def test_the_first_post_creates_and_the_second_finds(client: FlaskClient) -> None:
    """201 with Location, then 200 with Content-Location, the representation either way."""
    first = client.post(URL, json={"name": "Research"})
    second = client.post(URL, json={"name": " Research "})

    assert (first.status_code, first.headers["Location"]) == (201, f"{URL}/1")
    assert (second.status_code, second.headers["Content-Location"]) == (200, f"{URL}/1")
    assert "Location" not in second.headers
    assert first.get_json() == second.get_json()
    assert first.get_json().keys() == {
        "id", "name", "duplicate_of_id", "created_at", "updated_at",
    }  # fmt: skip


def test_a_department_is_read_by_its_id(client: FlaskClient) -> None:
    """GET gives what POST gave."""
    made = client.post(URL, json={"name": "Research"})
    assert client.get(made.headers["Location"]).get_json() == made.get_json()


def test_an_unknown_id_is_not_found(client: FlaskClient) -> None:
    """For every method, also beyond bigint."""
    for id in (1, 2**63, 10**30):
        assert client.get(f"{URL}/{id}").status_code == 404
        assert client.patch(f"{URL}/{id}", json={"name": "X"}).status_code == 404
        assert client.delete(f"{URL}/{id}").status_code == 404


def test_a_list_is_paged_by_id(client: FlaskClient) -> None:
    """Every record once, in order, and the last page says that it is the last."""
    ids = [create(client, f"D{number}") for number in range(5)]
    found, url, links = [], f"{URL}?limit=2&q=d", 0
    while url:
        page = client.get(url)
        found += [item["id"] for item in page.get_json()["items"]]
        url = page.get_json()["next"]
        links += page.headers.get("Link") == f'<{url}>; rel="next"'

    assert found == ids
    assert links == 2


def test_a_page_that_is_just_full_has_no_next(client: FlaskClient) -> None:
    """There is nothing after it."""
    create(client)
    page = client.get(f"{URL}?limit=1")
    assert page.get_json()["next"] is None
    assert "Link" not in page.headers


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("name=Research", ["Research"]),
        ("name=%20Research%20", ["Research"]),
        ("name=research", []),
        ("q=SEAR", ["Research"]),
        ("q=100%25", ["100% sure"]),
        ("q=%25", ["100% sure"]),
        ("q=_", []),
        ("q=e&after=1", ["100% sure"]),
    ],
)
def test_a_list_can_be_filtered(client: FlaskClient, query: str, names: list[str]) -> None:
    """By name, exactly or normalised, and by a part of it in any case, taken literally."""
    create(client, "Research")
    create(client, "100% sure")
    items = client.get(f"{URL}?{query}").get_json()["items"]
    assert [item["name"] for item in items] == names


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=501", "limit=-1", "limit=x", "limit=", "limit=+5", "limit=1.0",
        "limit=%D9%A3", "after=-1", "after=9223372036854775808", "include=all", "name=", "q=%00",
        "colour=red", "limit=1&limit=2", "q=" + "x" * 256,
    ],
)  # fmt: skip
def test_a_bad_query_is_refused_and_never_clamped(client: FlaskClient, query: str) -> None:
    """422 that names the parameter."""
    answer = client.get(f"{URL}?{query}")
    assert answer.status_code == 422
    assert query.partition("=")[0] in answer.get_json()["errors"]


def test_a_duplicate_is_left_out_and_leads_to_its_canonical_record(client: FlaskClient) -> None:
    """308 that nobody may cache; PATCH and DELETE are conflicts that name the canonical record."""
    kept, duplicate = create(client, "Kept"), create(client, "Other")
    mark_as_duplicate(client, "department", duplicate, of=kept)

    moved = client.get(f"{URL}/{duplicate}")
    assert (moved.status_code, moved.headers["Location"]) == (308, f"{URL}/{kept}")
    assert moved.headers["Cache-Control"] == "no-store"
    for refused in (
        client.patch(f"{URL}/{duplicate}", json={"name": "X"}),
        client.delete(f"{URL}/{duplicate}"),
    ):
        assert (refused.status_code, refused.get_json()["code"]) == (409, "is_duplicate")
        assert refused.get_json()["id"] == kept
        assert refused.headers["Location"] == f"{URL}/{kept}"
    assert len(client.get(URL).get_json()["items"]) == 1
    everything = client.get(f"{URL}?include=duplicates").get_json()["items"]
    assert [item["duplicate_of_id"] for item in everything] == [None, kept]


def test_a_record_with_duplicates_neither_goes_nor_changes_its_key(client: FlaskClient) -> None:
    """Its duplicates would be left without a canonical record."""
    kept, duplicate = create(client, "Kept"), create(client, "Other")
    mark_as_duplicate(client, "department", duplicate, of=kept)

    for refused in (
        client.patch(f"{URL}/{kept}", json={"name": "X"}),
        client.delete(f"{URL}/{kept}"),
    ):
        assert (refused.status_code, refused.get_json()["code"]) == (409, "has_duplicates")
    assert client.patch(f"{URL}/{kept}", json={"name": "Kept"}).status_code == 200


def test_a_rename_is_stored_normalised(client: FlaskClient) -> None:
    """And changes the time of the last change."""
    made = client.post(URL, json={"name": "Research"}).get_json()
    renamed = client.patch(f"{URL}/1", json={"name": " R  and D "})
    assert (renamed.status_code, renamed.get_json()["name"]) == (200, "R and D")
    assert renamed.get_json()["updated_at"] > made["updated_at"]
    assert client.get(f"{URL}/1").get_json() == renamed.get_json()


def test_an_empty_change_changes_nothing(client: FlaskClient) -> None:
    """200 with the record as it is."""
    made = client.post(URL, json={"name": "Research"}).get_json()
    answer = client.patch(f"{URL}/1", json={})
    assert (answer.status_code, answer.get_json()) == (200, made)


def test_a_rename_onto_a_taken_name_is_a_conflict(client: FlaskClient) -> None:
    """The record that has the name is named."""
    taken, other = create(client, "Taken"), create(client, "Other")
    answer = client.patch(f"{URL}/{other}", json={"name": " Taken"})
    assert (answer.status_code, answer.get_json()["code"]) == (409, "key_taken")
    assert answer.get_json()["id"] == taken
    assert client.get(f"{URL}/{other}").get_json()["name"] == "Other"


def test_an_empty_department_can_be_deleted(client: FlaskClient) -> None:
    """204, and it is gone."""
    id = create(client)
    answer = client.delete(f"{URL}/{id}")
    assert (answer.status_code, answer.data) == (204, b"")
    assert client.get(f"{URL}/{id}").status_code == 404


def test_a_department_with_employees_goes_only_with_them(client: FlaskClient) -> None:
    """409, unless cascade is true."""
    id = create(client)
    client.post("/api/v1/employees", json={"name": "Ann", "department_id": id})

    refused = client.delete(f"{URL}/{id}")
    assert (refused.status_code, refused.get_json()["code"]) == (409, "not_empty")
    assert client.delete(f"{URL}/{id}?cascade=false").status_code == 409
    assert client.delete(f"{URL}/{id}?cascade=maybe").status_code == 422
    assert client.delete(f"{URL}/{id}?cascade=true").status_code == 204
    assert client.get("/api/v1/employees").get_json()["items"] == []


def test_a_department_that_strangers_refer_to_is_in_use(client: FlaskClient) -> None:
    """A table that the application does not know still points at it."""
    id = create(client)
    with client.application.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE badge (department_id bigint REFERENCES department (id));"
            f"INSERT INTO badge VALUES ({id})"
        )
    try:
        answer = client.delete(f"{URL}/{id}")
        assert (answer.status_code, answer.get_json()["code"]) == (409, "in_use")
    finally:
        with client.application.app_context(), db.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE badge")
