"""Departments over HTTP."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app.api.documentation import describe
from app.api.exchange import CURRENT, respond
from app.web.records import DEPARTMENTS

namespace = Namespace("departments", "The departments of the directory.", path="/departments")


@namespace.route("", endpoint="departments")
class Departments(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "DepartmentPage"}, refusals=(422,), query=DEPARTMENTS.page_query)
    def get(self) -> Response:
        """List departments in the order of their ids."""
        return respond(DEPARTMENTS.list(CURRENT))

    @describe(
        namespace,
        {201: "Department", 200: "Department"},
        refusals=(400, 413, 415, 422),
        body="Department",
        headers=("Idempotency-Key",),
    )
    def post(self) -> Response:
        """Create a department, or find the one that has this name."""
        return respond(DEPARTMENTS.create(CURRENT))


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
        return respond(DEPARTMENTS.show(CURRENT, id))

    @describe(
        namespace,
        {200: "Department"},
        refusals=(400, 404, 409, 412, 413, 415, 422),
        body="DepartmentChange",
        headers=("If-Match", "If-None-Match"),
    )
    def patch(self, id: int) -> Response:
        """Rename a department."""
        return respond(DEPARTMENTS.change(CURRENT, id))

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 412, 422),
        query=DEPARTMENTS.delete_query,
        headers=("If-Match", "If-None-Match"),
    )
    def delete(self, id: int) -> Response:
        """Delete a department, with its employees if ``cascade`` is true."""
        return respond(DEPARTMENTS.delete(CURRENT, id))
