"""Which tenant a request is for: the one place that decides whose database it works on."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping

from flask import Flask, g, request

from app.config import HEADER, SUBDOMAIN, TOKEN, Settings
from app.database import work_for
from app.errors import InvalidInput, TenantForbidden
from app.observability import at_work
from app.security import OPEN, is_preflight
from app.tenants import RESERVED, is_name
from app.tokens import Token

NAMED_BY = "X-Tenant"
# What belongs to the service as a whole: a token of one tenant is not good for it.
OF_THE_SERVICE = frozenset({"api.tenants", "api.tenant", "health.metrics"})
# What is the same for everybody, and looks at no database.
OF_NOBODY = OPEN | {
    "api.doc",
    "api.root",
    "api.specs",
    "lead from /",
    "lead from /api/v1",
    "restx_doc.static",
    "static",
}
NOT_A_NAME = ["Must be a tenant's name: a-z, digits, - and _, at most 63."]
ANOTHER = ["Another tenant is named by the host: leave this header out."]


def init_app(app: Flask, settings: Settings) -> None:
    """Have each request work on its tenant's database. Whoever reads its token is there already."""

    @app.before_request
    def choose() -> None:
        name = tenant_of(
            request.endpoint,
            request.method,
            request.headers,  # type: ignore[arg-type]
            g.get("token"),
            settings.tenant_source,
        )
        if name is not None:
            work_for(name)


def tenant_of(
    endpoint: str | None,
    method: str,
    headers: Mapping[str, str],
    token: Token | None,
    source: str,
) -> str | None:
    """Return the tenant that a request is for, None for the service's own database; log lines know.

    ``endpoint`` is None for an unknown path and for a method that a path does not have. Raises
    TenantForbidden, InvalidInput.
    """
    if endpoint is None or endpoint in OF_NOBODY or is_preflight(method, headers):
        return None
    own = None if token is None else token.tenant
    name = None if endpoint in OF_THE_SERVICE else SOURCES[source](headers, own)
    if own is not None and own != name:
        raise TenantForbidden
    known = at_work.get()
    if name is not None and known is not None:
        known.tenant = name
    return name


def _by_header(headers: Mapping[str, str], own: str | None) -> str | None:
    """Return the tenant that X-Tenant names. Raises InvalidInput for what cannot be a name."""
    name = headers.get(NAMED_BY)
    if name is not None and not is_name(name):
        raise InvalidInput({"x_tenant": NOT_A_NAME})
    return name


def _by_token(headers: Mapping[str, str], own: str | None) -> str | None:
    """Return the token's own tenant; who has a token of all names one by X-Tenant."""
    return _by_header(headers, own) or own


def _by_subdomain(headers: Mapping[str, str], own: str | None) -> str | None:
    """Return the tenant that the first label of the request's host names.

    No tenant has a reserved name, so that such hosts, www and api among them, stand for the service
    itself. So do addresses, localhost, and hosts of two labels: a domain has at least these.
    """
    # Not request.host, which is empty for what werkzeug takes for no host: a_b.example.com, too.
    host = headers.get("Host", "").rpartition("]")[2].partition(":")[0].rstrip(".").lower()
    label, _, domain = host.partition(".")
    is_below = "." in domain or domain == "localhost"
    name = label if is_below and label not in RESERVED and not _is_address(host) else None
    if name is not None and not is_name(name):
        raise InvalidInput({"host": NOT_A_NAME})
    if _by_header(headers, own) not in (None, name):
        raise InvalidInput({"x_tenant": ANOTHER})
    return name


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


SOURCES: dict[str, Callable[[Mapping[str, str], str | None], str | None]] = {
    HEADER: _by_header,
    SUBDOMAIN: _by_subdomain,
    TOKEN: _by_token,
}
