"""Where the service's database is, and how it is reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flask import Flask, current_app
from sqlalchemy import URL, Engine, create_engine, event, make_url

from app import replica
from app.config import (
    Settings,
    current_settings,
    request_policy,
    warn_of_unknown_settings,
)
from app.db import db
from app.errors import DatabaseAway
from app.models import NATURAL_KEYS, Record
from app.pool import CountingPool
from app.transactions import RetryPolicy
from migrations_bootstrap import Bootstrap, BootstrapError, bootstrap
from migrations_bootstrap.embedded import EmbeddedServer

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "rollcall"


def init_app(app: Flask, settings: Settings) -> None:
    """Give the application its engine and session, and the models theirs; connect nowhere yet."""
    server = None if settings.database_url else EmbeddedServer(Path(app.instance_path))
    app.extensions["rollcall_embedded"] = server
    app.config.update(
        SQLALCHEMY_DATABASE_URI=make_url(server.url(EMBEDDED_NAME))
        if server
        else settings.database_url,
        SQLALCHEMY_ENGINE_OPTIONS=engine_options(settings),
    )
    db.init_app(app)
    if server is not None:
        with app.app_context():
            _start_when_needed(db.engine, server)
    if settings.read_url is not None:
        _read_from_replica(app, settings, settings.read_url)
    Record.bind(
        engine=lambda: db.engine,
        session=db.session,
        policy=request_policy,
    )


def engine_options(settings: Settings) -> dict[str, Any]:
    """Return the pool and connection options of the service's engine."""
    return {
        "poolclass": CountingPool,
        # What clients send is not for logs.
        "hide_parameters": True,
        "pool_size": settings.pool_size,
        "max_overflow": settings.max_overflow,
        "pool_timeout": settings.pool_timeout,
        "pool_recycle": settings.pool_recycle,
        "pool_pre_ping": settings.pool_pre_ping,
        # Nothing here stores hstore, and looking for it costs a round trip a connection.
        "use_native_hstore": False,
        "connect_args": {
            "connect_timeout": settings.connect_timeout,
            "application_name": "rollcall",
            # A host that vanished is noticed in seconds: by probes while we wait for it (two hours
            # otherwise), which are not sent while it has yet to confirm a statement (15 minutes).
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    }


def _read_from_replica(app: Flask, settings: Settings, url: URL) -> None:
    options = engine_options(settings)
    options["connect_args"]["connect_timeout"] = min(
        settings.connect_timeout, replica.CONNECT_TIMEOUT
    )
    with app.app_context():
        primary = db.engine
    replica.init_app(app, replica.Replica(create_engine(url, **options), primary))


def _start_when_needed(engine: Engine, server: EmbeddedServer) -> None:
    """Start or attach to the embedded server before each connect: it may be gone by then."""

    @event.listens_for(engine, "do_connect")
    def attach(*arguments: object) -> None:
        try:
            server.attach()
        except BootstrapError as error:
            raise DatabaseAway from error


def bootstrap_database(adopt: bool = False, count: bool = False) -> Bootstrap:
    """Create and migrate the current application's database and converge its indexes.

    ``adopt`` takes over tables of a legacy application, ``count`` counts their duplicates. Raises
    BootstrapError, whose text is the one line that an operator needs.
    """
    warn_of_unknown_settings()
    settings = current_settings()
    server: EmbeddedServer | None = current_app.extensions["rollcall_embedded"]
    if server is not None:
        logger.warning(
            "DATABASE_URL is not set: using the embedded PostgreSQL server, data in %s. "
            "Set DATABASE_URL in production.",
            server.home,
        )
        server.attach()
    outcome = bootstrap(
        settings.bootstrap_url or db.engine.url,
        NATURAL_KEYS,
        adopt=adopt,
        count=count,
        connect_timeout=settings.connect_timeout,
    )
    for change in outcome.upgrade.changes:
        logger.info("the schema was changed: %s", change)
    return outcome


@contextmanager
def administering() -> Iterator[Engine]:
    """Yield an engine for commands that change tables: past poolers, as the role that owns them."""
    settings = current_settings()
    if settings.admin_url is None:
        yield db.engine
        return
    engine = create_engine(settings.admin_url, **engine_options(settings))
    try:
        yield engine
    finally:
        engine.dispose()


def patient_policy() -> RetryPolicy:
    """Return the bounds of a unit of work that nobody waits for with a request in hand."""
    policy = current_settings().retry_policy
    return replace(policy, attempts=1000, deadline=300.0, statement_timeout=3600.0)
