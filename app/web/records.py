"""What is done about each request for departments and employees, from the request to the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from marshmallow import Schema

from app import directory
from app.errors import RecordChanged
from app.models import Department, Employee, Record
from app.schemas import (
    DeleteDepartmentQuery,
    DepartmentSchema,
    EmployeeBatchSchema,
    EmployeePageQuery,
    EmployeeSchema,
    PageQuery,
)
from app.web import answers, requests
from app.web.answers import NOTHING, Answer
from app.web.representations import (
    Representation,
    expectation,
    meets_if_match,
    meets_if_none_match,
    represent,
)
from app.web.requests import Request


@dataclass(frozen=True)
class Records:
    """The records of a model. Each method raises what reading the request and the directory do."""

    model: type[Record]
    schema: Schema
    changes: Schema
    page_query: Schema
    delete_query: Schema | None
    find_or_create: Callable[..., tuple[Mapping[str, Any], bool]]

    def list(self, request: Request) -> Answer:
        """Return a page of records."""
        found, more = directory.page(self.model, **requests.query(request, self.page_query))
        items = self.schema.dump(found, many=True)
        return answers.page(request, items, found[-1].id if more else None)

    def create(self, request: Request) -> Answer:
        """Return 201 with Location for a record that was created, 200 for one that was there.

        Its own address is below that of the collection that it was posted to.
        """
        sent = requests.body(request, self.schema)
        record, created = self.find_or_create(**sent, request=requests.key(request))
        path = f"{request.root}{request.path}/{record['id']}"
        representation = represent(self.schema, record)
        if created:
            return _one(representation, 201, {"Location": path})
        return _one(representation, 200, {"Content-Location": path})

    def show(self, request: Request, id: int) -> Answer:
        """Return one record to whoever asks for it, or 304 where they have it already.

        Raises RecordChanged for an If-Match that does not list what it is.
        """
        record = directory.find(self.model, id)
        representation = represent(self.schema, record)
        if not meets_if_match(request, representation.tag):
            raise RecordChanged(self.model.__name__, record.id)
        if not meets_if_none_match(request, representation.tag):
            return Answer(304, headers=representation.headers)
        return _one(representation)

    def change(self, request: Request, id: int) -> Answer:
        """Return the record as it is after the change."""
        sent = requests.body(request, self.changes)
        record = directory.update(self.model, id, sent, expectation(request, self.schema))
        return _one(represent(self.schema, record))

    def delete(self, request: Request, id: int) -> Answer:
        """Return 204: it is gone, and what goes with it."""
        query = {} if self.delete_query is None else requests.query(request, self.delete_query)
        cascade = query.get("cascade") == "true"
        directory.delete_record(self.model, id, cascade, expectation(request, self.schema))
        return NOTHING


def _one(
    representation: Representation, status: int = 200, headers: Mapping[str, str] | None = None
) -> Answer:
    return Answer(status, representation.text, {**representation.headers, **(headers or {})})


DEPARTMENTS = Records(
    Department,
    DepartmentSchema(),
    DepartmentSchema(partial=True),
    PageQuery(),
    DeleteDepartmentQuery(),
    directory.create_department,
)
EMPLOYEES = Records(
    Employee,
    EmployeeSchema(),
    EmployeeSchema(partial=True),
    EmployeePageQuery(),
    None,
    directory.create_employee,
)
BATCH = EmployeeBatchSchema()


def create_batch(request: Request) -> Answer:
    """Return the id of each employee and whether they were created, and how many were."""
    outcomes = directory.create_employees(requests.body(request, BATCH)["items"])
    created = sum(new for _, new in outcomes)
    items = [{"id": id, "created": new} for id, new in outcomes]
    return answers.as_json({"items": items, "created": created, "existing": len(items) - created})
