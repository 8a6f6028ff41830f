"""Before every route: is there one, who asks, and may they? Whatever goes wrong is a problem."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import MethodNotAllowed, NotFound, RequestURITooLarge

from app.asgi.exchange import AsgiRequest, address, respond
from app.asgi.rates import Rates
from app.asgi.routes import Resource
from app.asgi.work import Work
from app.errors import (
    ConfigurationError,
    NotAuthenticated,
    ScopeMissing,
)
from app.limits import Failures, too_many_requests
from app.loopback import require_loopback
from app.observability import Exchange
from app.routing import tenant_of
from app.security import require_known_page, required_scope
from app.tokens import Token
from app.web import problems

logger = logging.getLogger(__name__)

LONGEST_TARGET = 4094  # bytes of path and query, as the Flask service has it


class Gate:
    """Lets those requests through to their route that may be answered there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._failures = Failures()
        self._rates: Rates | None = None
        self._proven: Any = None  # where the last request came by: nearly always the same

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        work: Work = scope["app"].state.work
        settings = work.settings
        request = AsgiRequest(scope, receive, settings.max_body, settings.request_timeout)
        scope["rollcall.request"] = request
        headers: dict[str, str] = {}
        try:
            answer = await self._stop(scope, request, work, headers)
        except Exception as error:
            answer = respond(problems.respond(error, request))
            if answer.status_code == 401:
                wait = self._failures.count(_caller(scope, request, work), time.monotonic())
                if wait is not None:
                    answer = respond(too_many_requests(wait).answer())
        if answer is not None:
            answer.headers.update(headers)
            await answer(scope, receive, send)
            return
        scope["rollcall.headers"] = headers
        resource = scope["endpoint"]
        past_the_rest = isinstance(resource, Resource)
        await (resource if past_the_rest else self._app)(scope, receive, send)

    async def _stop(
        self,
        scope: Scope,
        request: AsgiRequest,
        work: Work,
        headers: dict[str, str],
    ) -> Response | None:
        """Return the answer of a request that no route is to have; raise why it may not."""
        if scope.get("server") != self._proven:
            _require_known_place(scope, work)
            self._proven = scope.get("server")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_TARGET:
            raise RequestURITooLarge
        require_known_page(
            request.method,
            request.headers,
            request.headers.get("Host", ""),
            work.settings.cors_origins,
        )
        route, allowed = _find(scope)
        name = None if route is None else route.name
        known: Exchange = scope["rollcall.known"]
        known.route = None if route is None else route.path
        wanted = required_scope(name if request.method in allowed else None, request.method)
        if work.settings.auth != "off" and wanted is not None:
            request.token = await _authorize(work, request, wanted)
            known.token = request.token.name
        if work.settings.rate_limit and name not in NEVER_LIMITED:
            token = request.token
            self._rates = self._rates or Rates(work.settings)
            whose = _caller(scope, request, work) if token is None else f"token {token.id}"
            headers.update(await self._rates.count(whose))
        if route is None:
            raise NotFound
        if request.method not in allowed:
            raise MethodNotAllowed(allowed)
        source = work.settings.tenant_source
        tenant = tenant_of(name, request.method, request.headers, request.token, source)
        request.tenant = tenant
        if request.method == "OPTIONS":
            if tenant is not None:
                await work.do(lambda: work.tenants.of(tenant))
            return Response(headers={"Allow": ", ".join(allowed)})
        return None


NEVER_LIMITED = frozenset({"health.healthz", "health.readyz", "health.metrics"})


def _caller(scope: Scope, request: AsgiRequest, work: Work) -> str:
    return address(scope, request.headers, work.settings.trusted_proxies)


def _require_known_place(scope: Scope, work: Work) -> None:
    """Refuse who comes by an address that is not this machine's own, with authentication off.

    A server that does not say where it listens could not be kept from starting.
    """
    server = scope.get("server")
    if server is not None and server[1] is not None:
        require_loopback(work.settings, [tuple(server)])


@problems.problem_of.register
def _(error: ConfigurationError) -> problems.Problem:
    logger.error("nobody is served: %s", error)
    return problems.http_problem(403)


def _find(scope: Scope) -> tuple[Route | None, Sequence[str]]:
    """Return the route of a path, if there is one, and the methods that it, and others, take.

    The scope is that of the route then, where it takes the request's own.
    """
    found: list[Route] = []
    routes: Sequence[BaseRoute] = scope["app"].router.routes
    for route in routes:
        try:
            match, known = route.matches(scope)
        except ValueError:  # an id of thousands of digits
            raise NotFound from None
        if match is Match.FULL and isinstance(route, Route):
            scope.update(known)
            return route, sorted(route.methods or ())
        if match is not Match.NONE and isinstance(route, Route):
            found.append(route)
    methods = {method for route in found for method in route.methods or ()}
    return (found[0] if found else None), sorted(methods | {"OPTIONS"} if found else methods)


async def _authorize(work: Work, request: AsgiRequest, wanted: str) -> Token:
    """Return the request's token. Raises NotAuthenticated, ScopeMissing, what a look-up does."""
    credentials = Authorization.from_header(request.headers.get("Authorization"))
    if credentials is not None and credentials.type != "bearer":
        credentials = None
    token = None if credentials is None else await work.check(credentials.token or "")
    if token is None:
        raise NotAuthenticated(presented=credentials is not None)
    request.token = token
    if wanted not in token.scopes:
        raise ScopeMissing(wanted)
    return token
