"""Employees over HTTP."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app.api.documentation import describe
from app.api.exchange import CURRENT, respond
from app.web.records import EMPLOYEES, create_batch

namespace = Namespace("employees", "The employees of the directory.", path="/employees")


@namespace.route("", endpoint="employees")
class Employees(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "EmployeePage"}, refusals=(422,), query=EMPLOYEES.page_query)
    def get(self) -> Response:
        """List employees in the order of their ids."""
        return respond(EMPLOYEES.list(CURRENT))

    @describe(
        namespace,
        {201: "Employee", 200: "Employee"},
        refusals=(400, 413, 415, 422),
        body="Employee",
        headers=("Idempotency-Key",),
    )
    def post(self) -> Response:
        """Create an employee, or find the one of this name and department."""
        return respond(EMPLOYEES.create(CURRENT))


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
        return respond(create_batch(CURRENT))


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
        return respond(EMPLOYEES.show(CURRENT, id))

    @describe(
        namespace,
        {200: "Employee"},
        refusals=(400, 404, 409, 412, 413, 415, 422),
        body="EmployeeChange",
        headers=("If-Match", "If-None-Match"),
    )
    def patch(self, id: int) -> Response:
        """Change an employee: rename, move, or any other field."""
        return respond(EMPLOYEES.change(CURRENT, id))

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 412),
        headers=("If-Match", "If-None-Match"),
    )
    def delete(self, id: int) -> Response:
        """Delete an employee."""
        return respond(EMPLOYEES.delete(CURRENT, id))
