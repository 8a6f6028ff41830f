"""The API does what a directory of plain dictionaries does, whatever is asked in what order.

Names come from a small alphabet, each in several spellings, so that they meet all the time.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from werkzeug.test import TestResponse

from tests.conftest import empty

DEPARTMENTS = "/api/v1/departments"
EMPLOYEES = "/api/v1/employees"
NOBODY = 10**9  # an id that no row has

Record = dict[str, Any]


def spellings(name: str) -> list[str]:
    """Write a name as it is stored, with white space around and within, and decomposed."""
    decomposed = unicodedata.normalize("NFD", name)
    return [name, f" {name}\u00a0", name.replace(" ", " \u2003 "), decomposed, f"{decomposed} "]


def stored_as(name: str) -> str:
    """Return how a name is kept: composed, trimmed, one blank between words."""
    return " ".join(unicodedata.normalize("NFC", name).split())


names = st.sampled_from([*spellings("Zo\u00eb \u00c5s"), *spellings("Ann Lee"), "ann lee"])
titles = st.sampled_from([None, "Chief", "Analyst"])
# One of the ids given out so far, deleted ones too, or one that nothing has.
picks = st.integers(0, 7)


class Directory(RuleBasedStateMachine):
    """Asks the API, and a model of it, the same things."""

    client: FlaskClient

    def __init__(self) -> None:
        super().__init__()
        self.departments: dict[int, Record] = {}
        self.employees: dict[int, Record] = {}
        self.department_ids = [NOBODY]
        self.employee_ids = [NOBODY]

    # The model's questions.

    def department_named(self, name: str) -> int | None:
        return next((id for id, it in self.departments.items() if it["name"] == name), None)

    def employee_of(self, department_id: int | None, name: str) -> int | None:
        key = (department_id, name)
        found = (
            id for id, it in self.employees.items() if (it["department_id"], it["name"]) == key
        )
        return next(found, None)

    def keep_department(self, id: int, name: str) -> None:
        assert id not in self.department_ids
        self.department_ids.append(id)
        self.departments[id] = {"id": id, "name": name}

    def keep_employee(self, record: Record) -> None:
        assert record["id"] not in self.employee_ids
        self.employee_ids.append(record["id"])
        self.employees[record["id"]] = record

    def forget_employee(self, id: int) -> None:
        del self.employees[id]
        for other in self.employees.values():
            other["manager_id"] = None if other["manager_id"] == id else other["manager_id"]

    # What is asked.

    @rule(name=names)
    def create_department(self, name: str) -> None:
        answer = self.client.post(DEPARTMENTS, json={"name": name})
        known = self.department_named(stored_as(name))
        if known is None:
            self.keep_department(answer.json["id"], stored_as(name))
        expect(answer, 201 if known is None else 200, self.departments[known or answer.json["id"]])

    @rule(name=names, pick=picks, title=titles)
    def create_employee(self, name: str, pick: int, title: str | None) -> None:
        department_id = chosen(self.department_ids, pick)
        body = {"name": name, "department_id": department_id, "title": title}
        answer = self.client.post(EMPLOYEES, json=body)
        if department_id in self.departments:
            self.check_employee(answer, department_id, stored_as(name), title)
        else:
            expect(answer, 422, {"code": "invalid"})

    @rule(name=names, department=names, title=titles)
    def create_employee_by_department(self, name: str, department: str, title: str | None) -> None:
        body = {"name": name, "department": department, "title": title}
        answer = self.client.post(EMPLOYEES, json=body)
        department_id = self.department_got_or_created(department, answer)
        self.check_employee(answer, department_id, stored_as(name), title)

    def department_got_or_created(self, name: str, answer: TestResponse) -> int:
        """Return the department of an employee that was created in it or moved to it by name."""
        known = self.department_named(stored_as(name))
        if known is None:
            known = answer.json["department_id"]
            self.keep_department(known, stored_as(name))
        return known

    def check_employee(
        self, answer: TestResponse, department_id: int, name: str, title: str | None
    ) -> None:
        known = self.employee_of(department_id, name)
        if known is None:
            record = {"name": name, "department_id": department_id, "title": title}
            self.keep_employee({"id": answer.json["id"], **record, "manager_id": None})
        record = self.employees[known or answer.json["id"]]
        expect(answer, 201 if known is None else 200, record)

    @rule(pick=picks, name=names)
    def rename_department(self, pick: int, name: str) -> None:
        id = chosen(self.department_ids, pick)
        answer = self.client.patch(f"{DEPARTMENTS}/{id}", json={"name": name})
        holder = self.department_named(stored_as(name))
        self.check_change(answer, self.departments.get(id), holder, {"name": stored_as(name)})

    @rule(pick=picks, name=names, title=titles)
    def rename_employee(self, pick: int, name: str, title: str | None) -> None:
        id = chosen(self.employee_ids, pick)
        answer = self.client.patch(f"{EMPLOYEES}/{id}", json={"name": name, "title": title})
        record = self.employees.get(id, {})
        holder = self.employee_of(record.get("department_id"), stored_as(name))
        changes = {"name": stored_as(name), "title": title}
        self.check_change(answer, self.employees.get(id), holder, changes)

    @rule(pick=picks, to=picks)
    def move_employee(self, pick: int, to: int) -> None:
        id, department_id = chosen(self.employee_ids, pick), chosen(self.department_ids, to)
        answer = self.client.patch(f"{EMPLOYEES}/{id}", json={"department_id": department_id})
        if id in self.employees and department_id not in self.departments:
            expect(answer, 422, {"code": "invalid"})
        else:
            self.check_move(answer, id, department_id)

    @rule(pick=picks, department=names)
    def move_employee_by_department(self, pick: int, department: str) -> None:
        id = chosen(self.employee_ids, pick)
        answer = self.client.patch(f"{EMPLOYEES}/{id}", json={"department": department})
        department_id = self.department_named(stored_as(department))
        if id in self.employees:  # it is not created for somebody who is not there
            department_id = self.department_got_or_created(department, answer)
        self.check_move(answer, id, department_id)

    def check_move(self, answer: TestResponse, id: int, department_id: int | None) -> None:
        record = self.employees.get(id, {"name": ""})
        holder = self.employee_of(department_id, record["name"])
        changes = {"department_id": department_id}
        self.check_change(answer, self.employees.get(id), holder, changes)

    def check_change(
        self, answer: TestResponse, record: Record | None, holder: int | None, changes: Record
    ) -> None:
        """Expect 404, 409 where another record has the key already, or the changed record."""
        if record is None:
            expect(answer, 404, {"code": "not_found"})
        elif holder not in (None, record["id"]):
            expect(answer, 409, {"code": "key_taken", "id": holder})
        else:
            record.update(changes)
            expect(answer, 200, record)

    @rule(pick=picks, other=picks)
    def change_manager(self, pick: int, other: int) -> None:
        id, manager_id = chosen(self.employee_ids, pick), chosen(self.employee_ids, other)
        answer = self.client.patch(f"{EMPLOYEES}/{id}", json={"manager_id": manager_id})
        if id in self.employees and (manager_id not in self.employees or manager_id == id):
            expect(answer, 422, {"code": "invalid"})
        else:
            self.check_change(answer, self.employees.get(id), None, {"manager_id": manager_id})

    @rule(pick=picks)
    def delete_employee(self, pick: int) -> None:
        id = chosen(self.employee_ids, pick)
        answer = self.client.delete(f"{EMPLOYEES}/{id}")
        expect(answer, 204 if id in self.employees else 404)
        if id in self.employees:
            self.forget_employee(id)

    @rule(pick=picks, cascade=st.sampled_from(["", "?cascade=true"]))
    def delete_department(self, pick: int, cascade: str) -> None:
        id = chosen(self.department_ids, pick)
        answer = self.client.delete(f"{DEPARTMENTS}/{id}{cascade}")
        members = [it["id"] for it in self.employees.values() if it["department_id"] == id]
        if id not in self.departments:
            expect(answer, 404, {"code": "not_found"})
        elif members and not cascade:
            expect(answer, 409, {"code": "not_empty", "id": id})
        else:
            expect(answer, 204)
            del self.departments[id]
            for member in members:
                self.forget_employee(member)

    @rule(name=names, pick=picks)
    def list_some(self, name: str, pick: int) -> None:
        """Filter by name, in any spelling, and by department."""
        department_id = chosen(self.department_ids, pick)
        query = {"name": name, "department_id": department_id}
        answer = self.client.get(EMPLOYEES, query_string=query)
        found = self.employee_of(department_id, stored_as(name))
        assert [item["id"] for item in answer.json["items"]] == ([found] if found else [])

    @rule()
    def list_all(self) -> None:
        """Walk through the pages of both listings, and show each record by its id."""
        for url, model in ((DEPARTMENTS, self.departments), (EMPLOYEES, self.employees)):
            items = walk(self.client, f"{url}?limit=2")
            assert [item["id"] for item in items] == sorted(model)
            for item in items:
                assert item.items() >= model[item["id"]].items()
                assert self.client.get(f"{url}/{item['id']}").json == item

    def teardown(self) -> None:
        self.list_all()


def chosen(ids: list[int], pick: int) -> int:
    return ids[pick % len(ids)]


def expect(answer: TestResponse, status: int, content: Record | None = None) -> None:
    """Check an answer's status and, as far as given, its content."""
    assert answer.status_code == status, answer.text
    assert content is None or answer.json.items() >= content.items()


def walk(client: FlaskClient, url: str | None) -> list[Record]:
    """Return what is on all pages of a listing."""
    items = []
    while url is not None:
        page = client.get(url).json
        items += page["items"]
        url = page["next"]
    return items


@pytest.mark.timeout(420)  # Hypothesis may take five minutes to shorten what it found
def test_the_api_does_what_its_model_does(client: FlaskClient, either_url: str) -> None:
    """Create, find, rename, move, delete and list, in sequences that Hypothesis makes up."""

    class Emptied(Directory):
        def __init__(self) -> None:
            empty(either_url)
            super().__init__()

    Emptied.client = client
    bounds = settings(max_examples=16, stateful_step_count=40, derandomize=True, deadline=None)
    run_state_machine_as_test(Emptied, settings=bounds)


@pytest.fixture
def database_url(either_url: str) -> str:
    """Guarded, and then not."""
    return either_url
