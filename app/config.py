"""From environment variables to settings. Nothing else reads the environment.

A bad value raises ConfigurationError with one clear line; an unknown ``ROLLCALL_`` variable is
only a warning; an empty variable counts as an unset one.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from flask import current_app, g, has_request_context
from limits import parse_many
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.storage import storage_from_string
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from app.duplicates.tables import SoftReference
from app.errors import ConfigurationError
from app.place import at_hand
from app.transactions import RetryPolicy

logger = logging.getLogger(__name__)

PREFIX = "ROLLCALL_"
DIALECTS = ("postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg")
DIGITS = re.compile(r"[0-9]{1,18}")
ORIGIN = re.compile(r"https?://[a-z0-9-]+(\.[a-z0-9-]+)*(:[0-9]{1,5})?")
# So that the names of tenants, and of templates, have room in the 63 bytes of an identifier.
PATTERN = re.compile(r"(?=.{6,46}\Z)[a-z0-9_-]*\{name\}[a-z0-9_-]*")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


# What names the tenant of a request.
HEADER, SUBDOMAIN, TOKEN = "header", "subdomain", "token"
TENANT_TEMPLATE = "+template_"  # in the place of a name; the plus keeps tenants from having it


def whole(low: int, high: int) -> Callable[[Any], int]:
    """Return a reader of whole numbers in a range."""

    def read(value: Any) -> int:
        if not DIGITS.fullmatch(str(value)) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def seconds(low: float, high: float) -> Callable[[Any], float]:
    """Return a reader of durations in a range."""

    def read(value: Any) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return number

    return read


def one_of(*choices: str) -> Callable[[Any], str]:
    """Return a reader of one word out of a few, in any case."""

    def read(value: Any) -> str:
        for choice in choices:
            if str(value).casefold() == choice.casefold():
                return choice
        raise ValueError(f"must be one of {', '.join(choices)}")

    return read


def switch(value: Any) -> bool:
    """Read on or off."""
    return one_of("on", "off", "true", "false", "1", "0")(value) in ("on", "true", "1")


def postgresql_url(value: Any) -> URL:
    """Read the URL of a PostgreSQL database, as psycopg2 takes it, whatever driver it names."""
    try:
        url = make_url(str(value))
    except (ArgumentError, ValueError):
        # The value may hold a password, so that neither it nor the parser's words are repeated.
        raise ValueError(
            "is not a database URL such as postgresql://user:password@host:5432/name "
            "(several hosts go into the query: ?host=h1:5432&host=h2:5432)"
        ) from None
    if url.drivername not in DIALECTS:
        raise ValueError(f"must begin with postgresql://, not {url.drivername}://")
    if "@" in (url.host or ""):
        raise ValueError("has an @ in its user or password, which must be written as %40")
    if isinstance(password := url.query.get("password"), str):
        url = url.set(password=password).difference_update_query(["password"])  # where it is hidden
    if "ssl" in url.query:  # asyncpg's name for it
        url = url.update_query_dict({"sslmode": url.query["ssl"]}).difference_update_query(["ssl"])
    if not url.database:
        raise ValueError("names no database: postgresql://user:password@host:5432/name")
    return url.set(drivername="postgresql+psycopg2")


def address(value: Any) -> str:
    """Read a host, a host with a port, or a Unix socket as gunicorn takes them."""
    if str(value).startswith("unix:"):
        return str(value)
    _, colon, port = str(value).rpartition("]")[2].partition(":")
    if colon and (not DIGITS.fullmatch(port) or int(port) > 65535):
        raise ValueError("must be host, host:port (IPv6 as [::1]:8000) or unix:PATH")
    return str(value)


def soft_references(value: Any) -> tuple[SoftReference, ...]:
    """Read columns that refer to rows without a foreign key: table.column=target, …"""
    found = []
    for item in str(value).split(","):
        referring, equals, target = (part.strip() for part in item.partition("="))
        table, dot, column = referring.rpartition(".")
        if not (equals and dot and table and column and target):
            raise ValueError("must be like ticket.employee_id=employee, separated by commas")
        found.append(SoftReference(table, column, target))
    return tuple(found)


def rate_limits(value: Any) -> str:
    """Read rate limits as the limits library writes them."""
    try:
        limits = parse_many(str(value))
    except ValueError:
        limits = []
    if not limits or any(limit.amount < 1 for limit in limits):
        raise ValueError("must be like 100/minute or 20 per second;1000 per hour")
    return str(value)


def redis_url(value: Any) -> str:
    """Read the URL of a Redis; nothing connects to it yet."""
    try:
        if urlsplit(str(value)).scheme not in ("redis", "rediss"):
            raise ValueError
        storage_from_string(str(value))
    except LimitsConfigurationError:
        raise ValueError("needs the package redis: install rollcall[redis]") from None
    except ValueError:
        # The value may hold a password, so that it is not repeated.
        raise ValueError("must be like redis://:password@host:6379/0, or rediss://…") from None
    return str(value)


def origins(value: Any) -> tuple[str, ...]:
    """Read origins as browsers send them, separated by commas, or ``*`` alone."""
    found = tuple(origin.strip() for origin in str(value).split(","))
    if found != ("*",) and not all(map(ORIGIN.fullmatch, found)):
        raise ValueError(
            "must be origins such as https://portal.example.com, separated by commas, or * alone"
        )
    return found


def database_pattern(value: Any) -> str:
    """Read how tenants' databases are called: plain characters, and {name} where the name goes."""
    if not PATTERN.fullmatch(str(value)):
        raise ValueError(
            "must be like rollcall_{name}: the letters a-z, digits, - and _, not more than 40 of"
            " them, and {name} once"
        )
    return str(value)


def text(value: Any) -> str:
    """Read any text."""
    return str(value)


def web_address(value: Any) -> str:
    """Read the address of a service that speaks HTTP."""
    if not re.match("https?://[^/]", str(value)):
        raise ValueError("must be an address such as http://127.0.0.1:4318")
    return str(value)


def setting(
    default: Any,
    read: Callable[[Any], Any],
    meaning: str,
    variable: str = "",
    shown: bool = True,
) -> Any:
    """Declare a setting: its default, its reader, what it means, its variable if not by rule.

    One that is not ``shown`` is not in the repr: it may hold a secret.
    """
    metadata = {"read": read, "meaning": meaning, "variable": variable}
    return field(default=default, repr=shown, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything an operator can set, validated. Times are in seconds."""

    database_url: URL | None = setting(
        None, postgresql_url, "the database; unset: the embedded server", "DATABASE_URL"
    )
    admin_url: URL | None = setting(
        None,
        postgresql_url,
        "a direct URL for the bootstrap where `DATABASE_URL` leads through a pooler",
    )
    read_url: URL | None = setting(
        None, postgresql_url, "a streaming standby of the database, which answers reads"
    )
    bind: str = setting(
        "127.0.0.1", address, "`host:port`, or a host to which `PORT` is added", "BIND"
    )
    port: int = setting(8000, whole(0, 65535), "the port to listen on", "PORT")
    workers: int = setting(2, whole(1, 256), "gunicorn worker processes", "WEB_CONCURRENCY")
    threads: int = setting(4, whole(1, 256), "threads in each worker")
    log_level: str = setting("INFO", one_of(*LOG_LEVELS), "how much is logged", "LOG_LEVEL")
    log_format: str = setting(
        "auto",
        one_of("auto", "json", "console"),
        "lines of the service's log; auto: for people on a terminal, and otherwise JSON",
    )
    sentry_dsn: str = setting(
        "", text, "where errors are reported, as Sentry gives it", "SENTRY_DSN", shown=False
    )
    otlp_endpoint: str = setting(
        "",
        web_address,
        "where traces go, by OpenTelemetry's OTLP over HTTP",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        shown=False,
    )
    pool_size: int = setting(5, whole(1, 1000), "connections that each worker keeps")
    max_overflow: int = setting(5, whole(0, 1000), "connections beyond those, when busy")
    pool_timeout: float = setting(5.0, seconds(0.1, 300), "longest wait for a connection")
    pool_recycle: float = setting(1800.0, seconds(1, 86400), "age at which one is replaced")
    pool_pre_ping: bool = setting(
        False,
        switch,
        "test each connection before use: one more round trip, and never needed, "
        "since reads and writes are run again when their connection turns out lost",
    )
    connect_timeout: int = setting(5, whole(1, 300), "longest wait for a new connection")
    statement_timeout: float = setting(10.0, seconds(0.01, 3600), "longest run of a statement")
    lock_timeout: float = setting(2.0, seconds(0.01, 3600), "longest wait for a lock, each try")
    retry_attempts: int = setting(50, whole(1, 1000), "tries of a unit of work")
    retry_deadline: float = setting(10.0, seconds(0.1, 300), "no further try begins after it")
    max_body: int = setting(2 * 1024 * 1024, whole(1024, 1 << 30), "longest request body, bytes")
    request_timeout: float = setting(
        30.0, seconds(0.1, 3600), "longest time a request may take to arrive, or an answer to leave"
    )
    rate_limit: str = setting(
        "", rate_limits, "requests of each token, or address, such as `100/minute`"
    )
    rate_limit_storage: str = setting(
        "", redis_url, "where they are counted: `redis://…`; unset: in each worker"
    )
    trusted_proxies: int = setting(
        0, whole(0, 10), "proxies in front, whose X-Forwarded-For and -Proto are believed"
    )
    cors_origins: tuple[str, ...] = setting(
        (), origins, "web pages that may call: `https://portal.example.com`, …, or `*` to read"
    )
    soft_references: tuple[SoftReference, ...] = setting(
        (),
        soft_references,
        "columns that refer to a record without a foreign key, which a merge repoints too",
    )
    auth: str = setting(
        "token", one_of("token", "off"), "who may use the service: token or, on loopback only, off"
    )
    admin_token_file: str = setting("", text, "a file with an admin token, for containers")
    tenant_database: str = setting(
        "rollcall_{name}", database_pattern, "how a new tenant's database is called"
    )
    tenant_source: str = setting(
        HEADER,
        one_of(HEADER, SUBDOMAIN, TOKEN),
        "what names a request's tenant: X-Tenant, the host's first label, or the token",
    )
    max_connections: int | None = setting(
        None,
        whole(2, 100_000),
        "most connections of each worker, to all databases; unset: pool size, overflow, and 1",
    )

    @property
    def connection_cap(self) -> int:
        """Most connections to databases, but for the one that looks tenants up in the registry."""
        if self.max_connections is None:
            return self.pool_size + self.max_overflow
        return self.max_connections - 1

    @property
    def bootstrap_url(self) -> URL | None:
        """The URL for creating and migrating the database."""
        return self.admin_url or self.database_url

    @property
    def address(self) -> str:
        """Where gunicorn listens: host:port, or a Unix socket as ``unix:PATH``."""
        if self.bind.startswith("unix:") or self.bind.rpartition("]")[2].count(":") == 1:
            return self.bind
        return f"{self.bind}:{self.port}"

    @cached_property
    def retry_policy(self) -> RetryPolicy:
        """The bounds of every unit of work."""
        return RetryPolicy(
            attempts=self.retry_attempts,
            deadline=self.retry_deadline,
            lock_timeout=self.lock_timeout,
            statement_timeout=self.statement_timeout,
        )


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    metadata = {item.name: item.metadata for item in fields(Settings)}[name]
    return str(metadata["variable"]) or PREFIX + name.upper()


VARIABLES = {variable_of(item.name): item for item in fields(Settings)}


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings from the environment; ``given``, by variable name, goes before it.

    Raises ConfigurationError for a value that cannot be used.
    """
    values = {**os.environ, **(given or {})}
    settings = Settings(
        **{
            item.name: _read(variable, item.metadata["read"], values[variable])
            for variable, item in VARIABLES.items()
            if values.get(variable) not in (None, "")
        }
    )
    if settings.database_url is None:
        for name in ("admin_url", "read_url"):
            if getattr(settings, name) is not None:
                raise ConfigurationError(f"{variable_of(name)} is set, but DATABASE_URL is not")
    return settings


def _read(variable: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigurationError(f"{variable} {error}") from None


def warn_of_unknown_settings() -> None:
    """Log each variable of the environment that looks like a setting and is none."""
    known = [name.removeprefix(PREFIX) for name in VARIABLES]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES:
            close = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1)
            hint = f"; did you mean {PREFIX}{close[0]}?" if close else ""
            logger.warning("unknown setting %s is ignored%s", name, hint)


def current_settings() -> Settings:
    """Return the settings of the application that is at work."""
    place = at_hand.get()
    settings: Settings = current_app.extensions["rollcall"] if place is None else place.settings
    return settings


def request_policy() -> RetryPolicy:
    """Return the bounds of a unit of work, with what is left of the request's one deadline."""
    policy = current_settings().retry_policy
    now = time.monotonic()
    return replace(policy, deadline=policy.deadline - (now - _began(now)))


def _began(now: float) -> float:
    """Return when the request's first unit of work began: now, unless there was one before."""
    place = at_hand.get()
    if place is not None:
        place.began = place.began or now
        return place.began
    began: float = g.setdefault("first_unit_of_work", now) if has_request_context() else now
    return began
