"""Tenants over HTTP: onboard one, look at them, let one go."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource

from app import onboarding, tenants
from app.api.documentation import describe
from app.api.exchange import CURRENT, respond
from app.db import db
from app.schemas import DeleteTenantQuery, TenantQuery, TenantSchema
from app.web import answers, requests
from app.web.answers import NOTHING

namespace = Namespace("tenants", "Who has a database of their own.", path="/tenants")
schema = TenantSchema()
page_query = TenantQuery()
delete_query = DeleteTenantQuery()


@namespace.route("", endpoint="tenants")
class Tenants(Resource):  # type: ignore[misc]
    @describe(
        namespace, {200: "TenantPage"}, refusals=(422,), query=page_query, of_the_service=True
    )
    def get(self) -> Response:
        """List tenants in the order of their names."""
        query = requests.query(CURRENT, page_query)
        found = tenants.list_all(db.default_engine, query["after"], query["limit"] + 1)
        shown, more = found[: query["limit"]], len(found) > query["limit"]
        after = shown[-1].name if more else None
        return respond(answers.page(CURRENT, schema.dump(shown, many=True), after))

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
        tenant, created = onboarding.create(**requests.body(CURRENT, schema))
        path = f"{CURRENT.root}{CURRENT.path}/{tenant.name}"
        status, header = (201, "Location") if created else (200, "Content-Location")
        return respond(answers.as_json(schema.dump(tenant), status, {header: path}))


@namespace.route("/<string:name>", endpoint="tenant")
class OneTenant(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "Tenant"}, refusals=(404,), of_the_service=True)
    def get(self, name: str) -> Response:
        """Show a tenant, also one that is being created or dropped."""
        return respond(answers.as_json(schema.dump(tenants.get(db.default_engine, name))))

    @describe(
        namespace,
        {204: ""},
        refusals=(404, 409, 422),
        query=delete_query,
        of_the_service=True,
    )
    def delete(self, name: str) -> Response:
        """Drop a tenant with its database and its tokens, for good."""
        query = requests.query(CURRENT, delete_query)
        onboarding.drop(name, force=query["force"] == "true")
        return respond(NOTHING)
