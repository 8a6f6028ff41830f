"""Departments over HTTP."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app import directory
from app.api import requests, responses
from app.api.documentation import describe
from app.api.representations import expectation
from app.models import Department
from app.schemas import DeleteDepartmentQuery, DepartmentSchema, PageQuery

namespace = Namespace("departments", "The departments of the directory.", path="/departments")
schema = DepartmentSchema()
changes = DepartmentSchema(partial=True)
page_query = PageQuery()
delete_query = DeleteDepartmentQuery()


@namespace.route("", endpoint="departments")
class Departments(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "DepartmentPage"}, refusals=(422,), query=page_query)
    def get(self) -> Response:
        """List departments in the order of their ids."""
        return responses.records(schema, *directory.page(Department, **requests.query(page_query)))

    @describe(
        namespace,
        {201: "Department", 200: "Department"},
        refusals=(400, 413, 415, 422),
        body="Department",
        headers=("Idempotency-Key",),
    )
    def post(self) -> Response:
        """Create a department, or find the one that has this name."""
        outcome = directory.create_department(**requests.body(schema), request=requests.key())
        return responses.created_or_found(schema, outcome)


@namespace.route("/<int:id>", endpoint="department")
class OneDepartment(Resource):  # type: ignore[misc]
    @describe(
        namespace,
        {200: "Department", 304: "", 308: ""},
        refusals=(404, 412),
        headers=("If-None-Match", "If-Match"),
    )
    def get(self, id: int) -> Response:
        """Show a department; the id of a duplicate leads to its canonical record."""
        return responses.shown(schema, directory.find(Department, id))

    @describe(
        namespace,
        {200: "Department"},
        refusals=(400, 404, 409, 412, 413, 415, 422),
        body="DepartmentChange",
        headers=("If-Match", "If-None-Match"),
    )
    def patch(self, id: int) -> Response:
        """Rename a department."""
        department = directory.update(Department, id, requests.body(changes), expectation(schema))
        return responses.changed(schema, department)

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 412, 422),
        query=delete_query,
        headers=("If-Match", "If-None-Match"),
    )
    def delete(self, id: int) -> Response:
        """Delete a department, with its employees if ``cascade`` is true."""
        cascade = requests.query(delete_query)["cascade"] == "true"
        directory.delete_record(Department, id, cascade, expectation(schema))
        return responses.nothing()
