"""Duplicates, merges and undo over HTTP, as data stewards use them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app import stewards
from app.db import db
from app.duplicates.plan import PlannedGroup
from tests.test_errors import assert_problem

BASE = "/api/v1"
URL = f"{BASE}/duplicates"
BEYOND_BIGINT = (2**63, 10**30, int("9" * 4000))


@pytest.fixture
def legacy(make_app: Callable[..., Flask], legacy_url: str) -> FlaskClient:
    """A client of an adopted legacy database that has no guard."""
    return make_app(legacy_url).test_client()


@pytest.fixture
def marked(make_app: Callable[..., Flask], marked_url: str) -> FlaskClient:
    """A client of a guarded one, with its duplicates in place."""
    return make_app(marked_url).test_client()


@pytest.fixture(params=["legacy_url", "marked_url"])
def either(make_app: Callable[..., Flask], request: pytest.FixtureRequest) -> FlaskClient:
    """A client of the one, and then of the other."""
    return make_app(request.getfixturevalue(request.param)).test_client()


def run(client: FlaskClient, statement: str) -> Any:
    """Run a statement on the client's database; return its rows, if it has any."""
    with client.application.app_context(), db.engine.begin() as connection:
        result = connection.execute(text(statement))
        return result.all() if result.returns_rows else None


def everything(client: FlaskClient) -> dict[str, list[Any]]:
    """Return every row of every table that is not the journal's."""
    tables = ("department", "employee", "ticket")
    return {name: run(client, f"SELECT * FROM {name} ORDER BY id") for name in tables}


def pages(client: FlaskClient, url: str) -> Iterator[Any]:
    """Yield the pages of a list, each answer as it is."""
    following: str | None = url
    while following:
        page = client.get(following)
        assert page.status_code == 200
        following = page.get_json()["next"]
        assert page.headers.get("Link") == (following and f'<{following}>; rel="next"')
        yield page


def groups(client: FlaskClient, url: str = URL) -> list[dict[str, Any]]:
    return [item for page in pages(client, url) for item in page.get_json()["items"]]


def merge(client: FlaskClient, table: str, id: Any, **body: Any) -> Any:
    return client.post(f"{URL}/{table}/{id}/merge", json=body)


def undo(client: FlaskClient, id: Any) -> Any:
    return client.post(f"{BASE}/merges/{id}/undo")


def test_groups_come_in_pages_over_the_tables_to_the_end(either: FlaskClient) -> None:
    """Each group once, by table and by lowest id, however long a page is; with a guard or none."""
    found = groups(either)
    assert [group["table"] for group in found] == ["department"] * 2 + ["employee"] * 33
    assert [group["kept"] for group in found] == [1, 2, *range(1, 34)]
    assert [group["duplicates"] for group in found] == [[4], [5], *([n] for n in range(201, 234))]
    for limit in (2, 17, 34, 35):
        assert groups(either, f"{URL}?limit={limit}") == found
    assert groups(either, f"{URL}?table=employee&limit=7") == found[2:]
    assert groups(either, f"{URL}?table=department") == found[:2]
    assert groups(either, f"{URL}?after=employee:31") == found[-2:]
    assert groups(either, f"{URL}?after=employee:{2**63 - 1}") == []


def test_a_group_says_what_would_be_merged(legacy: FlaskClient, marked: FlaskClient) -> None:
    """Key, homonyms, what refers to each; and with a guard, what is marked."""
    group = groups(legacy, f"{URL}?after=employee:32")[0]
    assert group == {
        "table": "employee",
        "kept": 33,
        "duplicates": [233],
        "marked": [],
        "key": {"name": "Person 33", "department_id": 2},
        "homonyms": ["title"],
        "references": {"33": {"ticket.employee_id": 2}},
    }
    assert groups(marked, f"{URL}?after=employee:32")[0] == {**group, "marked": [233]}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=501", "limit=x", "limit=1&limit=2", "table=zoo", "table=", "table=ticket",
        "after=1", "after=zoo:1", "after=employee:", "after=employee:-1", "after=employee:x",
        "after=employee:99999999999999999999", "after=employee:%D9%A3", "after=employee:1%0A",
        "table=employee&after=department:1", "colour=red", "after=%00",
    ],
)  # fmt: skip
def test_a_bad_query_is_refused_and_never_clamped(client: FlaskClient, query: str) -> None:
    """422 that names the parameter, and does not repeat what was sent."""
    answer = client.get(f"{URL}?{query}")
    assert_problem(answer, 422, "invalid")
    name = "after" if "after=department" in query else query.partition("=")[0]
    assert list(answer.get_json()["errors"]) == [name]
    assert "zoo" not in answer.text


def test_a_database_without_duplicates_has_no_groups(client: FlaskClient) -> None:
    """An empty page, the last one."""
    assert client.get(URL).get_json() == {"items": [], "next": None}


def test_a_merge_says_what_it_did(either: FlaskClient) -> None:
    """Rows repointed, blanks filled; the group is gone from the list, and none of the others."""
    run(either, "INSERT INTO ticket (employee_id) VALUES (201), (201)")
    before = groups(either)
    answer = either.post(f"{URL}/employee/1/merge")
    assert answer.status_code == 200
    content = answer.get_json()
    assert content == {
        "id": content["id"],
        "table": "employee",
        "kept": 1,
        "duplicates": [201],
        "repointed": {"ticket.employee_id": 4},
        "filled": {"phone": 201},
        "collapsed": {},
    }
    after = groups(either)
    assert after == [g for g in before if (g["table"], g["kept"]) != ("employee", 1)]
    assert run(either, "SELECT phone FROM employee WHERE id = 1") == [("123",)]


def test_departments_are_merged_with_the_employees_in_them(legacy: FlaskClient) -> None:
    """Those that are there twice then become duplicates, and the answer says how many."""
    assert_problem(merge(legacy, "department", 1), 409, "homonyms")  # 32 and 232
    content = merge(legacy, "department", 1, accept_homonyms=True).get_json()
    assert content["collapsed"] == {"employee": 16}
    assert content["repointed"]["employee.department_id"] == 0
    assert run(legacy, "SELECT id FROM employee WHERE department_id = 4") == []
    assert run(legacy, "SELECT duplicate_of_id FROM employee WHERE id = 222") == [(22,)]


def test_an_old_id_leads_to_the_record_that_was_kept(either: FlaskClient) -> None:
    """308 that nobody may cache; a change of it is a conflict that names the kept record."""
    for table, kept, old in (("employee", 1, 201), ("department", 2, 5)):
        assert merge(either, table, kept, accept_homonyms=True).status_code == 200
        url = f"{BASE}/{table}s"
        moved = either.get(f"{url}/{old}")
        assert (moved.status_code, moved.headers["Location"]) == (308, f"{url}/{kept}")
        assert moved.headers["Cache-Control"] == "no-store"
        for refused in (
            either.patch(f"{url}/{old}", json={"name": "X"}),
            either.delete(f"{url}/{old}"),
            merge(either, table, old),
        ):
            assert_problem(refused, 409, "is_duplicate")
            assert refused.get_json()["id"] == kept
            assert refused.headers["Location"] == f"{url}/{kept}"
        listed = [item["id"] for item in either.get(f"{url}?limit=500").get_json()["items"]]
        assert kept in listed
        assert old not in listed


def test_a_merged_record_is_never_got(either: FlaskClient) -> None:
    """POST finds the one that was kept, also by the old id of its department."""
    merge(either, "employee", 11)
    assert merge(either, "department", 2, accept_homonyms=True).status_code == 200
    for department in (2, 5):
        body = {"name": "Person  11", "department_id": department}
        answer = either.post(f"{BASE}/employees", json=body)
        assert (answer.status_code, answer.get_json()["id"]) == (200, 11)


def test_homonyms_are_merged_only_when_somebody_says_so(legacy: FlaskClient) -> None:
    """409 that names the fields which differ, and not what is in them."""
    before = everything(legacy)
    for body in ({}, {"accept_homonyms": False}):
        answer = merge(legacy, "employee", 31, **body)
        assert_problem(answer, 409, "homonyms")
        assert "title" in answer.get_json()["detail"]
        assert "Poet" not in answer.text
    assert everything(legacy) == before
    assert merge(legacy, "employee", 31, accept_homonyms=True).status_code == 200


def test_rows_that_collide_are_named(either: FlaskClient) -> None:
    """409 with the rows that are in each other's way; nothing is changed."""
    run(either, "INSERT INTO ticket (employee_id, subject) VALUES (3, 'x'), (203, 'x'), (203, 'y')")
    run(either, "ALTER TABLE ticket ADD UNIQUE (employee_id, subject)")
    before = everything(either)
    answer = merge(either, "employee", 3)
    assert_problem(answer, 409, "collision")
    first, other = run(either, "SELECT id FROM ticket WHERE subject = 'x' ORDER BY employee_id")
    assert answer.get_json()["collisions"] == [
        {
            "table": "ticket",
            "reason": "unique (employee_id, subject)",
            "first": {"id": first.id},
            "others": [{"id": other.id}],
        }
    ]
    assert everything(either) == before


def test_a_collision_that_only_the_database_sees_is_named_by_its_constraint(
    either: FlaskClient,
) -> None:
    """An exclusion constraint, and none of the driver's words, which quote rows."""
    run(either, "CREATE EXTENSION btree_gist")
    run(either, "INSERT INTO ticket (employee_id, subject) VALUES (4, 'Zebra'), (204, 'Zebra')")
    run(
        either,
        "ALTER TABLE ticket ADD CONSTRAINT one_each"
        " EXCLUDE USING gist (employee_id WITH =, subject WITH =)",
    )
    answer = merge(either, "employee", 4)
    assert_problem(answer, 409, "collision")
    assert answer.get_json()["collisions"] == [
        {"table": "ticket", "reason": "constraint one_each", "first": None, "others": []}
    ]


@pytest.mark.parametrize(("table", "id"), [("employee", 100), ("department", 3)])
def test_a_record_without_duplicates_is_a_conflict(
    either: FlaskClient, table: str, id: int
) -> None:
    """409 that names the record; so is one whose duplicates are merged already."""
    assert_problem(merge(either, table, id), 409, "no_duplicates")
    assert merge(either, "employee", 5).status_code == 200
    assert_problem(merge(either, "employee", 5), 409, "no_duplicates")


def test_any_record_of_a_group_can_be_the_one_that_is_kept(legacy: FlaskClient) -> None:
    """As long as no guard has marked it: the steward knows better than the oldest id."""
    assert merge(legacy, "employee", 201).get_json()["duplicates"] == [1]
    assert legacy.get(f"{BASE}/employees/1").headers["Location"] == f"{BASE}/employees/201"


def test_the_duplicates_of_a_merged_record_follow_it(legacy: FlaskClient) -> None:
    """They point at it, so that it is found with them; they are no rows of the other's own."""
    run(legacy, "INSERT INTO employee (name, department_id) VALUES ('Person 1', 2)")
    run(legacy, "INSERT INTO ticket (employee_id) SELECT max(id) FROM employee")
    run(legacy, "UPDATE employee SET duplicate_of_id = 1 WHERE id = 201")
    (newest,) = run(legacy, "SELECT max(id) AS id FROM employee")
    assert merge(legacy, "employee", newest.id).get_json()["duplicates"] == [1]
    marks = run(legacy, "SELECT duplicate_of_id FROM employee WHERE id IN (1, 201)")
    assert marks == [(newest.id,), (newest.id,)]
    assert merge(legacy, "employee", newest.id).get_json()["duplicates"] == [201]
    assert_problem(merge(legacy, "employee", newest.id), 409, "no_duplicates")


def test_a_group_that_changes_while_it_is_merged_is_a_conflict(
    legacy: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """409: somebody renames a duplicate between the look and the merge."""
    keeping = stewards._keeping

    def rename_first(id: int, group: Any) -> PlannedGroup:
        run(legacy, "UPDATE employee SET name = 'Another' WHERE id = 201")
        return keeping(id, group)

    monkeypatch.setattr(stewards, "_keeping", rename_first)
    assert_problem(merge(legacy, "employee", 1), 409, "changed")


def test_of_two_who_merge_at_once_one_has_nothing_to_merge(
    either: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry in the journal, so that one undo takes it back."""
    keeping, made = stewards._keeping, []

    def merge_first(id: int, group: Any) -> PlannedGroup:
        monkeypatch.setattr(stewards, "_keeping", keeping)
        made.append(merge(either.application.test_client(), "employee", 1).get_json()["id"])
        return keeping(id, group)

    listed = groups(either)
    monkeypatch.setattr(stewards, "_keeping", merge_first)
    assert_problem(merge(either, "employee", 1), 409, "no_duplicates")
    assert undo(either, made[0]).status_code == 200
    assert groups(either) == listed


def test_undo_gives_back_every_row(either: FlaskClient) -> None:
    """Marks, references, filled fields; once, and then there is nothing to undo."""
    before, listed = everything(either), groups(either)
    made = [
        merge(either, "department", 1, accept_homonyms=True).get_json()["id"],
        merge(either, "employee", 1).get_json()["id"],
    ]
    assert everything(either) != before
    answers = [undo(either, id) for id in reversed(made)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.get_json()["id"] for answer in answers] == made[::-1]
    assert answers[0].get_json()["restored"] > 0
    assert everything(either) == before
    assert groups(either) == listed
    again = undo(either, made[0])
    assert_problem(again, 409, "cannot_undo")
    assert "undone already" in again.get_json()["detail"]
    assert either.get(f"{BASE}/employees/201").status_code == (308 if listed[-1]["marked"] else 200)


def test_what_has_changed_since_is_not_undone(either: FlaskClient) -> None:
    """409 that says which row; all the others stay as they are, too."""
    id = merge(either, "employee", 3).get_json()["id"]
    run(either, "UPDATE employee SET phone = 'Zebra' WHERE id = 3")
    before = everything(either)
    answer = undo(either, id)
    assert_problem(answer, 409, "cannot_undo")
    assert "have been changed since: {'id': 3}" in answer.get_json()["detail"]
    assert everything(either) == before


def test_a_purged_merge_is_not_undone(either: FlaskClient) -> None:
    """409: what is deleted is gone; the old id is not found any more."""
    id = merge(either, "employee", 1).get_json()["id"]
    runner = either.application.test_cli_runner()
    purge = ["duplicates", "purge", "--older-than", "0d", "--yes"]
    assert runner.invoke(args=purge).exit_code == 0
    answer = undo(either, id)
    assert_problem(answer, 409, "cannot_undo")
    assert "purged" in answer.get_json()["detail"]
    assert_problem(either.get(f"{BASE}/employees/201"), 404)


def test_what_is_not_there_is_not_found(either: FlaskClient) -> None:
    """404 for ids beyond any type of the database too, and for tables that are not ours."""
    for id in (0, 999, *BEYOND_BIGINT):
        assert_problem(merge(either, "employee", id), 404, "not_found")
        assert_problem(merge(either, "department", id), 404, "not_found")
        assert_problem(undo(either, id), 404, "not_found")
    for table in ("zoo", "ticket", "rollcall_merge", "Employee", "employee%20", "a%00b", "%22"):
        answer = merge(either, table, 1)
        assert_problem(answer, 404, "not_found")
        assert "zoo" not in answer.text
    for path in ("merges/x/undo", "merges/-1/undo", "duplicates/employee/x/merge", "merges/1"):
        assert_problem(either.post(f"{BASE}/{path}"), 404, "not_found")
    assert_problem(either.post(f"{BASE}/merges/{'9' * 5000}/undo"), 404)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"accept_homonyms": true, "accept_homonyms": true}', "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", None, 415),
        (b"accept_homonyms=true", "application/x-www-form-urlencoded", 415),
        (b"{}" + b" " * 2_100_000, "application/json", 413),
        (b" " * 2_100_000, None, 413),
        (b'{"accept_homonyms": 1}', "application/json", 422),
        (b'{"accept_homonyms": "Zebra"}', "application/json", 422),
        (b'{"accept_homonyms": null}', "application/json", 422),
        (b'{"<Zebra>": true}', "application/json", 422),
        (b'[{"accept_homonyms": true}]', "application/json", 422),
        (b"true", "application/json", 422),
    ],
)
def test_a_bad_body_changes_nothing(
    client: FlaskClient, body: bytes, kind: str | None, status: int
) -> None:
    """400, 413, 415 or 422, as everywhere else, before anybody looks at the record."""
    assert_problem(client.post(f"{URL}/employee/1/merge", data=body, content_type=kind), status)


@pytest.mark.parametrize(
    "options", [{}, {"json": {}}, {"json": {"accept_homonyms": False}}, {"data": b""}]
)
def test_the_body_may_be_left_out(legacy: FlaskClient, options: Any) -> None:
    """And so may what is in it."""
    assert legacy.post(f"{URL}/employee/1/merge", **options).status_code == 200


@pytest.mark.parametrize("path", ["duplicates/employee/1/merge", "merges/1/undo"])
def test_only_post_changes_anything(client: FlaskClient, path: str) -> None:
    """405 that names it."""
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = client.open(f"{BASE}/{path}", method=method)
        assert_problem(answer, 405)
        assert "POST" in answer.headers["Allow"]


values = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.sampled_from(
        ["employee", "department:1", "employee:0", "'; DROP TABLE employee", "%", "%s"]
    ),
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(table=values, id=values, query=st.dictionaries(st.text(max_size=9), values, max_size=3))
def test_nothing_that_is_sent_is_a_servers_error(
    client: FlaskClient, table: str, id: str, query: dict[str, str]
) -> None:
    """Not a 500 for any path, query or body; and nothing is merged that nobody named."""
    from_query = {"limit": id, "after": table, "table": table, **query}
    answers = [
        client.get(URL, query_string=from_query),
        client.get(URL, query_string={"after": table}),
        client.post(f"{URL}/{table}/{id}/merge", json=query),
        client.post(f"{BASE}/merges/{id}/undo", data=table),
    ]
    for answer in answers:
        assert answer.status_code in {200, 302, 308, 400, 404, 405, 409, 415, 422}


def test_a_service_that_may_change_rows_and_no_table_can_merge(
    make_app: Callable[..., Flask], either: FlaskClient, administrator: Engine
) -> None:
    """The rights of docs/operations.md are enough for merge and undo."""
    url = either.application.config["SQLALCHEMY_DATABASE_URI"]
    role = f"clerk_of_{url.database}"
    run(either, f"CREATE ROLE {role} LOGIN")
    tables = "department, employee, ticket"
    run(either, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role}")
    run(either, f"GRANT SELECT, INSERT, UPDATE ON rollcall_merge, rollcall_change TO {role}")
    try:
        client = make_app(str(url.set(username=role))).test_client()
        before = everything(either)
        assert groups(client) == groups(either)
        answers = [merge(client, table, 1, accept_homonyms=True) for table in stewards.MODELS]
        made = [answer.get_json()["id"] for answer in answers]
        assert [undo(client, id).status_code for id in reversed(made)] == [200, 200]
        assert everything(either) == before
        made_by = run(either, f"SELECT DISTINCT made_by FROM rollcall_merge WHERE id = {made[0]}")
        assert made_by == [(role,)]
    finally:
        run(either, f"DROP OWNED BY {role}")
        with administrator.connect() as connection:
            connection.exec_driver_sql(f"DROP ROLE {role}")


def test_a_database_without_a_journal_has_to_be_brought_up_to_date(
    legacy: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    """503 for what needs it; the groups can be looked at all the same."""
    run(legacy, "DROP TABLE rollcall_change, rollcall_merge")
    before = everything(legacy)
    assert len(groups(legacy)) == 35
    for answer in (merge(legacy, "employee", 1), undo(legacy, 1)):
        assert_problem(answer, 503, "schema_behind")
        assert int(answer.headers["Retry-After"]) > 0
        assert "rollcall" not in answer.get_json()["detail"]
    assert everything(legacy) == before
    assert "there is no journal of merges beside the table" in caplog.text


def test_a_database_that_is_away_is_said_so(make_app: Callable[..., Flask]) -> None:
    """503, for each of the calls."""
    url = "postgresql://u@127.0.0.1:1/d"
    client = make_app(url, ROLLCALL_RETRY_ATTEMPTS=1).test_client()
    for answer in (client.get(URL), merge(client, "employee", 1), undo(client, 1)):
        assert_problem(answer, 503, "database_away")


def test_columns_without_a_foreign_key_are_repointed_where_they_are_declared(
    make_app: Callable[..., Flask], legacy_url: str
) -> None:
    """ROLLCALL_SOFT_REFERENCES; one that is not there is the operator's to mend."""
    client = make_app(legacy_url, ROLLCALL_SOFT_REFERENCES="note.about=employee").test_client()
    assert_problem(client.get(URL), 503, "schema_behind")
    run(client, "CREATE TABLE note (about bigint)")
    run(client, "INSERT INTO note VALUES (201), (201), (2)")
    found = groups(client, f"{URL}?table=employee")[0]
    assert found["references"]["201"] == {"note.about": 2, "ticket.employee_id": 2}
    made = merge(client, "employee", 1).get_json()
    assert made["repointed"] == {"note.about": 2, "ticket.employee_id": 2}
    assert run(client, "SELECT about FROM note ORDER BY about") == [(1,), (1,), (2,)]
    assert undo(client, made["id"]).status_code == 200
    assert run(client, "SELECT about FROM note ORDER BY about") == [(2,), (201,), (201,)]


def test_swagger_says_what_the_calls_take_and_give(client: FlaskClient) -> None:
    """The query's parameters, an optional body, and each status by its model."""
    paths = json.loads(client.get(f"{BASE}/swagger.json").text)["paths"]
    listed = paths["/duplicates"]["get"]
    names = {parameter["name"] for parameter in listed["parameters"]}
    assert names == {"limit", "after", "table", "X-Tenant"}
    made = paths["/duplicates/{table}/{id}/merge"]["post"]
    models = {
        status: re.findall(r"#/definitions/(\w+)", json.dumps(answer))
        for status, answer in made["responses"].items()
    }
    refusals = ("400", "401", "403", "404", "409", "413", "414", "415", "422", "429", "503")
    assert models == {"200": ["Merge"], **{status: ["Problem"] for status in refusals}}
    (body,) = [one for one in made["parameters"] if one.get("in") == "body"]
    assert body["required"] is False
    undo = paths["/merges/{id}/undo"]["post"]
    refusals = ("401", "403", "404", "409", "414", "422", "429", "503")
    assert set(undo["responses"]) == {"200", *refusals}
