"""How often a client may call, by token or address, and how often with a token that is wrong."""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict
from typing import Any

from flask import Flask, Response, g, request
from flask_limiter import HeaderNames, Limiter, RateLimitExceeded, RequestLimit
from werkzeug.middleware.proxy_fix import ProxyFix

from app.api import health
from app.api.exchange import respond
from app.config import Settings
from app.web.problems import Problem, http_problem, problem_of

FAILURES = 60  # of each address, in each window and worker
WINDOW = 60.0  # seconds
ADDRESSES = 10_000  # that are remembered
REDIS_PATIENCE = 0.5  # seconds
# The names of the IETF's draft, in which the reset is in seconds. Retry-After is left to refusals.
NAMES = {
    HeaderNames.LIMIT: "RateLimit-Limit",
    HeaderNames.REMAINING: "RateLimit-Remaining",
    HeaderNames.RESET: "RateLimit-Reset",
    HeaderNames.RETRY_AFTER: "RateLimit-Reset",
}


def init_app(app: Flask, settings: Settings) -> None:
    """Limit an application's clients. Whatever authenticates them has to be there already."""
    if settings.trusted_proxies:
        proxies = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies)  # type: ignore[method-assign]
    app.after_request(Failures().limit)
    if settings.rate_limit:
        # It says of each call that is refused who made it.
        logging.getLogger("flask-limiter").setLevel(logging.WARNING)
        limiter = Limiter(
            client,
            application_limits=[settings.rate_limit],
            storage_uri=settings.rate_limit_storage or "memory://",
            storage_options=_options(settings.rate_limit_storage),
            # Without its Redis each worker counts for itself, and looks now and then for it.
            in_memory_fallback_enabled=True,
            headers_enabled=True,
            header_name_mapping=NAMES,
            on_breach=_remember_wait,
            # Otherwise what is nowhere could be asked for without end.
            request_identifier=lambda: request.endpoint or "nowhere",
        )
        limiter.exempt(health.blueprint)
        limiter.init_app(app)


def _options(storage: str) -> dict[str, Any]:
    names = ("socket_connect_timeout", "socket_timeout")
    return dict.fromkeys(names, REDIS_PATIENCE) if storage else {}


def client() -> str:
    """Return who calls: the token, or else the address; of IPv6 the network that one client has."""
    token = getattr(g.get("token"), "id", None)
    return f"token {token}" if token is not None else address()


def address() -> str:
    """Return what the client is counted by."""
    return network_of(request.remote_addr or "local")


def network_of(address: str) -> str:
    """Return an address, or the /64 of it that one client is usually given.

    What a proxy has written may be no address: it is taken as it stands.
    """
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def _remember_wait(limit: RequestLimit) -> None:
    g.wait = limit.reset_at - time.time()


@problem_of.register
def _(error: RateLimitExceeded) -> Problem:
    return too_many_requests(g.wait)


def too_many_requests(wait: float) -> Problem:
    """Return the problem of a client that has to wait for so many seconds."""
    return http_problem(429, {"Retry-After": str(max(1, math.ceil(wait)))})


class Failures:
    """Counts 401s by address, and turns those beyond a number into 429s.

    What anybody does who has a token that is right is not affected.
    """

    def __init__(self) -> None:
        self.window_ends = 0.0
        self.counts: OrderedDict[str, int] = OrderedDict()
        self.lock = threading.Lock()

    def limit(self, response: Response) -> Response:
        """Return the answer, or a 429 in the place of a 401."""
        if response.status_code != 401:
            return response
        wait = self.count(address(), time.monotonic())
        return response if wait is None else respond(too_many_requests(wait).answer())

    def count(self, address: str, now: float) -> float | None:
        """Count a failure; return how long to wait, if there were too many."""
        with self.lock:
            if now >= self.window_ends:
                self.counts.clear()
                self.window_ends = now + WINDOW
            self.counts[address] = count = self.counts.get(address, 0) + 1
            if len(self.counts) > ADDRESSES:
                self.counts.popitem(last=False)
            return self.window_ends - now if count > FAILURES else None
