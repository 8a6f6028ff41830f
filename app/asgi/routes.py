"""The API's routes, named as the Flask service's endpoints are: scopes go by these names."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app import metrics
from app.asgi.administration import Administration
from app.asgi.exchange import AsgiRequest, respond
from app.asgi.work import Work
from app.web import BASE, probes, problems
from app.web.answers import Answer
from app.web.records import DEPARTMENTS, EMPLOYEES, create_batch
from app.web.tenants import Tenants

Operation = Callable[..., Answer]  # of a request, and of an id or name if the path has one


def init_app(app: FastAPI, administer: Administration) -> None:
    """Add the API and the probes to the application."""
    for kind, records in (("department", DEPARTMENTS), ("employee", EMPLOYEES)):
        collection = f"{BASE}/{kind}s"
        one = f"{collection}/{{id:int}}"
        _add(app, collection, f"api.{kind}s", GET=records.list, POST=records.create)
        if records is EMPLOYEES:
            _add(app, f"{collection}/batch", "api.employees_batch", POST=create_batch)
        _add(
            app,
            one,
            f"api.{kind}",
            GET=records.show,
            PATCH=records.change,
            DELETE=records.delete,
        )
    tenants = Tenants(administer)
    _add(app, f"{BASE}/tenants", "api.tenants", GET=tenants.list, POST=tenants.create)
    _add(app, f"{BASE}/tenants/{{name}}", "api.tenant", GET=tenants.show, DELETE=tenants.delete)
    app.add_route("/healthz", _healthz, name="health.healthz")
    app.add_route("/readyz", _readyz, name="health.readyz")
    app.add_route("/metrics", _metrics, name="health.metrics")


def _add(app: FastAPI, path: str, name: str, **operations: Operation) -> None:
    app.router.routes.append(Route(path, Resource(operations), methods=[*operations], name=name))


class Resource:
    """What can be done at a path, by method.

    It needs nothing of what FastAPI does for a route, which takes longer than much of the rest:
    ``gate`` calls it.
    """

    def __init__(self, operations: dict[str, Operation]) -> None:
        self._operations = operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked: AsgiRequest = scope["rollcall.request"]
        work: Work = scope["app"].state.work
        operation = self._operations["GET" if asked.method == "HEAD" else asked.method]
        ids = scope["path_params"].values()
        try:
            answer = await work.do(lambda: operation(asked, *ids), asked.tenant)
        except Exception as error:
            answer = problems.respond(error, asked)
        response = respond(answer)
        response.headers.update(scope["rollcall.headers"])
        await response(scope, receive, send)


async def _healthz(request: Request) -> Response:
    return respond(probes.healthz())


async def _readyz(request: Request) -> Response:
    work: Work = request.app.state.work
    return respond(await work.do(probes.readyz))


async def _metrics(request: Request) -> Response:
    work: Work = request.app.state.work
    text = await work.do(metrics.exposition)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})
