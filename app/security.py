"""Who may ask what: every request needs a token of some scope, unless it is named here.

The one place that wires Flask-HTTPAuth. What comes new is locked without anybody thinking of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from flask import Flask, current_app, g, request
from flask_httpauth import HTTPTokenAuth

from app import tokens
from app.config import Settings
from app.errors import CrossOrigin, NotAuthenticated, ScopeMissing
from app.token_cache import TokenCache
from app.tokens import ADMIN, READ, WRITE, Token

OPEN = frozenset({"health.healthz", "health.readyz"})
FOR_ADMINS = frozenset(
    {
        "api.duplicates",
        "api.duplicates_merge",
        "api.merge_undo",
        "api.tenant",
        "api.tenants",
        "health.metrics",
    }
)
READING = frozenset({"GET", "HEAD", "OPTIONS"})

auth = HTTPTokenAuth("Bearer", realm="rollcall")


def required_scope(endpoint: str | None, method: str) -> str | None:
    """Return the scope that a request needs, None for one that is open to everybody.

    ``endpoint`` is None for an unknown path and for a method that a path does not have.
    """
    if endpoint in OPEN:
        return None
    if endpoint in FOR_ADMINS:
        return ADMIN
    return READ if method in READING else WRITE


def init_app(app: Flask, settings: Settings) -> None:
    """Have each request show its token first, unless authentication is off.

    CORS preflights, which browsers send without one, have been answered by then if they are wanted.
    Whoever looks for it finds the token at ``flask.g.token``: an object with ``id``, ``name`` and
    ``scope``, or None for a request that needs none.
    """
    app.extensions["rollcall_tokens"] = TokenCache(tokens.find, tokens.note_use)

    @app.before_request
    def ask_for_token() -> None:
        g.token = None
        require_known_page(
            request.method,
            request.headers,  # type: ignore[arg-type]
            request.host,
            settings.cors_origins,
        )
        scope = required_scope(request.endpoint, request.method)
        if settings.auth != "off" and scope is not None:
            _authorize(scope)


def require_known_page(
    method: str, headers: Mapping[str, str], host: str, allowed: Collection[str]
) -> None:
    """Raise CrossOrigin where a page of another origin, which may not call, changes something.

    A merge has no body, and a browser sends that without a preflight; where no token is asked for,
    or a proxy adds one for people whom it knows, nothing else stands in the way. Browsers tell of
    the page by themselves, old ones at least its origin. Other clients have nothing to tell.
    """
    origin = headers.get("Origin")
    if method in READING or origin in allowed:
        return
    site = headers.get("Sec-Fetch-Site")
    if site is None:
        is_known = origin in (None, f"http://{host}", f"https://{host}")
    else:
        is_known = site in ("same-origin", "none")
    if not is_known:
        raise CrossOrigin


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """Tell whether a request is what a browser asks before a call of another origin's page."""
    return method == "OPTIONS" and "Access-Control-Request-Method" in headers


def _authorize(scope: str) -> None:
    """Check the request's token. Raises NotAuthenticated, ScopeMissing, and what a look-up does.

    Not by the library's decorator, which leaves OPTIONS open.
    """
    credentials = auth.get_auth()
    token: Token | None = auth.authenticate(credentials, None)
    if token is None:
        raise NotAuthenticated(presented=credentials is not None)
    g.token = token
    if not auth.authorize(scope, token, credentials):
        raise ScopeMissing(scope)


def _check(presented: str) -> Token | None:
    cache: TokenCache = current_app.extensions["rollcall_tokens"]
    return cache.check(presented)


auth.verify_token(_check)
auth.get_user_roles(lambda token: list(token.scopes))
