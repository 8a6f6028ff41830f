"""Tenants over HTTP: onboard one, look at them, let one go."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app.api.documentation import describe
from app.api.exchange import CURRENT, respond
from app.web.tenants import DELETE_QUERY, PAGE_QUERY, Tenants

namespace = Namespace("tenants", "Who has a database of their own.", path="/tenants")
tenants = Tenants(lambda work: work())


@namespace.route("", endpoint="tenants")
class ManyTenants(Resource):  # type: ignore[misc]
    @describe(
        namespace, {200: "TenantPage"}, refusals=(422,), query=PAGE_QUERY, of_the_service=True
    )
    def get(self) -> Response:
        """List tenants in the order of their names."""
        return respond(tenants.list(CURRENT))

    @describe(
        namespace,
        {201: "Tenant", 200: "Tenant"},
        refusals=(400, 409, 413, 415, 422),
        body="Tenant",
        of_the_service=True,
    )
    def post(self) -> Response:
        """Create a tenant and its database, or find the one that has this name.

        What was begun and broken off is finished.
        """
        return respond(tenants.create(CURRENT))


@namespace.route("/<string:name>", endpoint="tenant")
class OneTenant(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "Tenant"}, refusals=(404,), of_the_service=True)
    def get(self, name: str) -> Response:
        """Show a tenant, also one that is being created or dropped."""
        return respond(tenants.show(CURRENT, name))

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 422),
        query=DELETE_QUERY,
        of_the_service=True,
    )
    def delete(self, name: str) -> Response:
        """Drop a tenant with its database and its tokens, for good."""
        return respond(tenants.delete(CURRENT, name))
