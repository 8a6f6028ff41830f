"""Employees over HTTP."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app import directory
from app.api import requests, responses
from app.api.documentation import describe
from app.api.representations import expectation
from app.models import Employee
from app.schemas import EmployeeBatchSchema, EmployeePageQuery, EmployeeSchema

namespace = Namespace("employees", "The employees of the directory.", path="/employees")
schema = EmployeeSchema()
changes = EmployeeSchema(partial=True)
batch = EmployeeBatchSchema()
page_query = EmployeePageQuery()


@namespace.route("", endpoint="employees")
class Employees(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "EmployeePage"}, refusals=(422,), query=page_query)
    def get(self) -> Response:
        """List employees in the order of their ids."""
        return responses.records(schema, *directory.page(Employee, **requests.query(page_query)))

    @describe(
        namespace,
        {201: "Employee", 200: "Employee"},
        refusals=(400, 413, 415, 422),
        body="Employee",
        headers=("Idempotency-Key",),
    )
    def post(self) -> Response:
        """Create an employee, or find the one of this name and department."""
        outcome = directory.create_employee(**requests.body(schema), request=requests.key())
        return responses.created_or_found(schema, outcome)


@namespace.route("/batch", endpoint="employees_batch")
class EmployeesBatch(Resource):  # type: ignore[misc]
    @describe(
        namespace,
        {200: "EmployeeBatchOutcome"},
        refusals=(400, 413, 415, 422),
        body="EmployeeBatch",
    )
    def post(self) -> Response:
        """Create up to 1,000 employees, or find them: all of it in one transaction."""
        outcomes = directory.create_employees(requests.body(batch)["items"])
        return responses.batch(outcomes)


@namespace.route("/<int:id>", endpoint="employee")
class OneEmployee(Resource):  # type: ignore[misc]
    @describe(
        namespace,
        {200: "Employee", 304: "", 308: ""},
        refusals=(404, 412),
        headers=("If-None-Match", "If-Match"),
    )
    def get(self, id: int) -> Response:
        """Show an employee; the id of a duplicate leads to their canonical record."""
        return responses.shown(schema, directory.find(Employee, id))

    @describe(
        namespace,
        {200: "Employee"},
        refusals=(400, 404, 409, 412, 413, 415, 422),
        body="EmployeeChange",
        headers=("If-Match", "If-None-Match"),
    )
    def patch(self, id: int) -> Response:
        """Change an employee: rename, move, or any other field."""
        employee = directory.update(Employee, id, requests.body(changes), expectation(schema))
        return responses.changed(schema, employee)

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 412),
        headers=("If-Match", "If-None-Match"),
    )
    def delete(self, id: int) -> Response:
        """Delete an employee."""
        directory.delete_record(Employee, id, expected=expectation(schema))
        return responses.nothing()
