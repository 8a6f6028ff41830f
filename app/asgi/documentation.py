"""The Swagger document and its page: those of the Flask service, less what is not served here."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import NamedTuple

from fastapi import FastAPI, Request
from flask import Flask
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import api, headers
from app.config import load_settings
from app.web import BASE

DOCUMENT = f"{BASE}/swagger.json"
NOT_HERE = ("/duplicates", "/merges")
KEPT = ("Content-Type", "Content-Security-Policy", "Location")


class Page(NamedTuple):
    """What the Flask service answers."""

    status: int
    headers: dict[str, str]
    content: bytes


def init_app(app: FastAPI) -> None:
    """Serve the document, the page with its files, and the ways to it."""
    paths = {
        "/": "lead from /",
        BASE: f"lead from {BASE}",
        f"{BASE}/": "api.doc",
        DOCUMENT: "api.specs",
        "/swaggerui/{filename:path}": "restx_doc.static",
    }
    for path, name in paths.items():
        app.add_route(path, _show, name=name)


async def _show(request: Request) -> Response:
    page = await run_in_threadpool(_page, request.scope["path"])
    return Response(page.content, page.status, page.headers)


@lru_cache(maxsize=64)
def _page(path: str) -> Page:
    with _documented().test_client().get(path) as answer:
        content = answer.get_data()
        kept = {name: value for name, value in answer.headers if name in KEPT}
        status = answer.status_code
    if path == DOCUMENT:
        content = _without_what_is_not_here(content)
    return Page(status, kept, content)


@cache
def _documented() -> Flask:
    """Return an application that has the API, and nothing behind it."""
    app = Flask("app")
    api.init_app(app)
    headers.init_app(app, load_settings({"ROLLCALL_CORS_ORIGINS": ""}))
    return app


def _without_what_is_not_here(document: bytes) -> bytes:
    content = json.loads(document)
    content["paths"] = {
        path: operations
        for path, operations in content["paths"].items()
        if not path.startswith(NOT_HERE)
    }
    return json.dumps(content).encode()
