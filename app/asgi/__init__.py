"""The API as an ASGI application, but for duplicates: FastAPI, asyncpg, and no thread a request.

Schemas, problems, statements and units of work are those of the Flask service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flask import Flask
from sqlalchemy import make_url
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from app import metrics, telemetry, transactions
from app.aio import perform
from app.asgi import documentation, routes
from app.asgi.administration import Administration
from app.asgi.gate import Gate
from app.asgi.observed import Observed
from app.asgi.work import Work
from app.async_database import make_async_engine, make_sessions, make_tenant_engines
from app.config import Settings, load_settings
from app.database import EMBEDDED_NAME, bind_models
from app.headers import sharing
from app.models import Record
from app.observability import count_retry
from app.pool import AwaitedCap
from migrations_bootstrap.embedded import EmbeddedServer

TICK = 1.0  # seconds


def create_app(config: Mapping[str, Any] | None = None) -> FastAPI:
    """Wire an application together; ``config`` holds settings, which go before the environment.

    Raises ConfigurationError for a setting that cannot be used.
    """
    settings = load_settings(config)
    server = None if settings.database_url else EmbeddedServer(Path(Flask("app").instance_path))
    url = make_url(server.url(EMBEDDED_NAME)) if server else settings.database_url
    assert url is not None  # noqa: S101 - one of the two is there, tells mypy so
    attach, cap = server.attach if server else None, AwaitedCap(settings.connection_cap)
    engine = make_async_engine(url, settings, attach, cap, at_once=True)
    tenants = make_tenant_engines(url, settings, attach, cap)
    bind_models()
    Record.abind(engine, settings.retry_policy)
    if settings.sentry_dsn:
        telemetry.report_to_sentry(settings.sentry_dsn)
    metrics.init_app()
    transactions.on_retry.add(count_retry)
    app = FastAPI(
        openapi_url=None,  # the document is the Flask service's
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=[Middleware(Observed), *_cors(settings), Middleware(Gate)],
    )
    app.state.settings = settings
    app.state.server = server
    app.state.engine = engine
    app.state.sessions = make_sessions(engine)
    app.state.work = Work(settings, engine.sync_engine, tenants)
    routes.init_app(app, Administration(settings, url, attach))
    documentation.init_app(app)
    return app


def _cors(settings: Settings) -> list[Middleware]:
    """Let pages of other origins call the API."""
    if not settings.cors_origins:
        return []
    shared = sharing(settings.cors_origins)
    return [
        Middleware(
            Cors,
            allow_origins=settings.cors_origins,
            allow_methods=shared.methods,
            allow_headers=shared.headers,
            expose_headers=shared.exposed,
            max_age=shared.max_age,
        )
    ]


class Cors(CORSMiddleware):
    """Starlette's, which would answer what a browser asks before a call with words of its own."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        kept = ("vary", "access-control-") if answer.status_code == 200 else ("vary",)
        headers = {name: value for name, value in answer.headers.items() if name.startswith(kept)}
        return Response(status_code=204, headers=headers)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    ticking = asyncio.create_task(_tick())
    try:
        yield
    finally:
        ticking.cancel()
        await app.state.engine.dispose()
        await perform(app.state.work.tenants.dispose)


async def _tick() -> None:
    """Bring the metrics up to date, every second."""
    while True:
        await asyncio.sleep(TICK)
        metrics.bring_up_to_date()
