"""What browsers are told of how to treat answers: security headers on each of them, and CORS."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flask import Flask, Response, request
from flask_cors import CORS
from secure import (
    ContentSecurityPolicy,
    CrossOriginOpenerPolicy,
    CrossOriginResourcePolicy,
    PermissionsPolicy,
    ReferrerPolicy,
    Secure,
    StrictTransportSecurity,
    XContentTypeOptions,
)

from app.config import Settings
from app.security import is_preflight

Headers = list[tuple[str, str]]

# No browser has to do anything with an answer of the API but to hand it to a script.
OURS: Headers = list(
    Secure(
        csp=ContentSecurityPolicy().default_src("'none'").frame_ancestors("'none'"),
        xcto=XContentTypeOptions(),
        referrer=ReferrerPolicy().no_referrer(),
        permissions=PermissionsPolicy().camera().geolocation().microphone(),
        coop=CrossOriginOpenerPolicy().same_origin(),
        corp=CrossOriginResourcePolicy().same_origin(),
    ).header_items()
)
OURS_BY_HTTPS: Headers = [
    *OURS,
    *Secure(hsts=StrictTransportSecurity().max_age(365 * 24 * 3600)).header_items(),
]
NOT_STORED = ("Cache-Control", "no-store")
STORED_BY_THE_CLIENT = ("Cache-Control", "private, no-cache")

DOCUMENTATION = "api.doc"
SCRIPT = re.compile(r"<script[^>]*>([^<]+)</script>")
STYLE = re.compile(r"<style[^>]*>([^<]+)</style>|\sstyle=\"([^\"]+)\"")

ALLOWED = ["Authorization", "If-None-Match", "X-Request-ID", "X-Rollcall-Written", "X-Tenant"]
ALLOWED_TO_WRITE = ["Content-Type", "If-Match", "Idempotency-Key"]
EXPOSED = [
    "Content-Location",
    "ETag",
    "Link",
    "Location",
    "Retry-After",
    "X-Request-ID",
    "X-Rollcall-Written",
]


def init_app(app: Flask, settings: Settings) -> None:
    """Add the headers to every answer. The API has to be there, and nothing else wrap it yet."""
    app.view_functions[DOCUMENTATION] = _with_a_policy_of_its_own(app.view_functions[DOCUMENTATION])
    app.wsgi_app = _with_headers(app.wsgi_app)  # type: ignore[method-assign]
    if settings.cors_origins:
        _share(app, settings.cors_origins)


def with_ours(headers: Headers, by_https: bool = False) -> Headers:
    """Return the headers of an answer with ours added, as far as it does not have them."""
    names = {name for name, _ in headers}
    ours = OURS_BY_HTTPS if by_https else OURS
    added = [pair for pair in ours if pair[0] not in names]
    if "Cache-Control" not in names:
        added.append(STORED_BY_THE_CLIENT if "ETag" in names else NOT_STORED)
    return headers + added


def _with_headers(application: Any) -> Any:
    """Return a WSGI application that answers as the other does, with our headers."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        by_https = environ["wsgi.url_scheme"] == "https"

        def start(status: str, headers: Headers, exc_info: Any = None) -> Any:
            return start_response(status, with_ours(headers, by_https), exc_info)

        return application(environ, start)  # type: ignore[no-any-return]

    return answer


def _with_a_policy_of_its_own(page: Any) -> Callable[[], Response]:
    """Let a page run the scripts and use the styles that stand in it, and those from here."""

    def answer() -> Response:
        response = Response(page())
        response.headers["Content-Security-Policy"] = _policy_for(response.get_data(as_text=True))
        return response

    return answer


def _policy_for(page: str) -> str:
    styles = [block or attribute for block, attribute in STYLE.findall(page)]
    policy = (
        ContentSecurityPolicy()
        .default_src("'none'")
        .base_uri("'none'")
        .connect_src("'self'")
        .font_src("'self'")
        .form_action("'none'")
        .frame_ancestors("'none'")
        .img_src("'self'", "data:")
        .script_src("'self'", *map(_hash, SCRIPT.findall(page)))
        .style_src("'self'", "'unsafe-hashes'", *map(_hash, styles))
    )
    return policy.header_value


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


class Sharing(NamedTuple):
    """What pages of other origins may do, and what they may send and see."""

    reads_only: bool
    methods: list[str]
    headers: list[str]
    exposed: list[str]
    max_age: int  # seconds that a browser remembers it


def sharing(origins: tuple[str, ...]) -> Sharing:
    """Return what pages of some origins may do; those of any origin only read."""
    if origins == ("*",):
        return Sharing(True, ["GET", "HEAD"], ALLOWED, EXPOSED, 600)
    methods = ["GET", "HEAD", "POST", "PATCH", "DELETE"]
    return Sharing(False, methods, ALLOWED + ALLOWED_TO_WRITE, EXPOSED, 600)


def _share(app: Flask, origins: tuple[str, ...]) -> None:
    """Let pages of other origins call the API."""
    shared = sharing(origins)
    app.before_request(_answer_preflight)
    CORS(
        app,
        origins="*" if shared.reads_only else list(origins),
        methods=shared.methods,
        allow_headers=shared.headers,
        expose_headers=shared.exposed,
        send_wildcard=shared.reads_only,
        max_age=shared.max_age,
    )


def _answer_preflight() -> Response | None:
    """Answer what a browser asks before a call: it sends no token with it."""
    if is_preflight(request.method, request.headers):  # type: ignore[arg-type]
        response = Response(status=204)
        del response.headers["Content-Type"]
        return response
    return None
