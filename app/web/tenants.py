"""What is done about each request for tenants, from the request to the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app import onboarding, tenants
from app.db import default_engine
from app.schemas import DeleteTenantQuery, TenantQuery, TenantSchema
from app.web import answers, requests
from app.web.answers import NOTHING, Answer
from app.web.requests import Request

SCHEMA = TenantSchema()
PAGE_QUERY = TenantQuery()
DELETE_QUERY = DeleteTenantQuery()


@dataclass(frozen=True)
class Tenants:
    """Each method raises what reading the request, and tenants' coming and going, do.

    ``administer`` does what makes and drops databases, which knows no other way than to block, and
    returns what that does.
    """

    administer: Callable[[Callable[[], Any]], Any]

    def list(self, request: Request) -> Answer:
        """Return a page of tenants."""
        query = requests.query(request, PAGE_QUERY)
        found = tenants.list_all(default_engine(), query["after"], query["limit"] + 1)
        shown, more = found[: query["limit"]], len(found) > query["limit"]
        after = shown[-1].name if more else None
        return answers.page(request, SCHEMA.dump(shown, many=True), after)

    def create(self, request: Request) -> Answer:
        """Return 201 with Location for a tenant that was created, 200 for one that was there."""
        sent = requests.body(request, SCHEMA)
        tenant, created = self.administer(lambda: onboarding.create(**sent))
        path = f"{request.root}{request.path}/{tenant.name}"
        status, header = (201, "Location") if created else (200, "Content-Location")
        return answers.as_json(SCHEMA.dump(tenant), status, {header: path})

    def show(self, request: Request, name: str) -> Answer:
        """Return one tenant."""
        return answers.as_json(SCHEMA.dump(tenants.get(default_engine(), name)))

    def delete(self, request: Request, name: str) -> Answer:
        """Return 204: the tenant is gone."""
        query = requests.query(request, DELETE_QUERY)
        self.administer(lambda: onboarding.drop(name, force=query["force"] == "true"))
        return NOTHING
