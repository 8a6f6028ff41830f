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
from app.db import current_engine, current_session, db
from app.engines import TenantEngines
from app.errors import DatabaseAway
from app.models import NATURAL_KEYS, Record
from app.pool import ConnectionCap, CountingPool
from app.transactions import RetryPolicy
from migrations_bootstrap import Bootstrap, BootstrapError, bootstrap
from migrations_bootstrap.clones import url_of
from migrations_bootstrap.embedded import EmbeddedServer

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "rollcall"
APPLICATION_NAME = "rollcall"


def init_app(app: Flask, settings: Settings) -> None:
    """Give the application its engine and session, and the models theirs; connect nowhere yet."""
    server = None if settings.database_url else EmbeddedServer(Path(app.instance_path))
    app.extensions["rollcall_embedded"] = server
    cap = ConnectionCap(settings.connection_cap)
    app.config.update(
        SQLALCHEMY_DATABASE_URI=make_url(server.url(EMBEDDED_NAME))
        if server
        else settings.database_url,
        SQLALCHEMY_ENGINE_OPTIONS=engine_options(settings, cap),
    )
    db.init_app(app)
    with app.app_context():
        default = db.default_engine
    engines = TenantEngines(default.url, engine_options(settings, cap))
    app.extensions["rollcall_tenants"] = engines
    if server is not None:
        _start_when_needed(default, server)
        _start_when_needed(engines.registry, server)
    if settings.read_url is not None:
        _read_from_replica(app, settings, settings.read_url, default)
    bind_models()


def bind_models() -> None:
    """Have the models work wherever the work at hand is done."""
    Record.bind(current_engine, current_session, request_policy)


def engine_options(settings: Settings, cap: ConnectionCap | None = None) -> dict[str, Any]:
    """Return the pool and connection options of the service's engines, which may share a cap."""
    return {
        "poolclass": CountingPool,
        "cap": cap,
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
            "application_name": APPLICATION_NAME,
            # A host that vanished is noticed in seconds: by probes while we wait for it (two hours
            # otherwise), which are not sent while it has yet to confirm a statement (15 minutes).
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    }


def _read_from_replica(app: Flask, settings: Settings, url: URL, primary: Engine) -> None:
    options = engine_options(settings)
    options["connect_args"]["connect_timeout"] = min(
        settings.connect_timeout, replica.CONNECT_TIMEOUT
    )
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
    server: EmbeddedServer | None = current_app.extensions["rollcall_embedded"]
    if server is not None:
        warn_of_embedded(server)
    outcome = bootstrap(
        administration_url(),
        NATURAL_KEYS,
        adopt=adopt,
        count=count,
        connect_timeout=current_settings().connect_timeout,
    )
    tell_of_changes(outcome)
    return outcome


def warn_of_embedded(server: EmbeddedServer) -> None:
    """Log that no database is configured, and where the data are."""
    logger.warning(
        "DATABASE_URL is not set: using the embedded PostgreSQL server, data in %s. "
        "Set DATABASE_URL in production.",
        server.home,
    )


def tell_of_changes(outcome: Bootstrap) -> None:
    """Log what a bootstrap has changed in the schema."""
    for change in outcome.upgrade.changes:
        logger.info("the schema was changed: %s", change)


def administration_url() -> URL:
    """Return how the default database is administered; start the embedded server, if it is that."""
    server: EmbeddedServer | None = current_app.extensions["rollcall_embedded"]
    if server is not None:
        server.attach()
    return current_settings().bootstrap_url or db.default_engine.url


@contextmanager
def administering(usual: Engine | None = None) -> Iterator[Engine]:
    """Yield an engine for commands that change tables: past poolers, as the role that owns them.

    It is for the database that is at work, or for that of another engine of ours.
    """
    usual, settings = usual or db.engine, current_settings()
    if settings.admin_url is None:
        yield usual
        return
    url = settings.admin_url
    if usual is not db.default_engine:
        url = url_of(url, str(usual.url.database))
    engine = create_engine(url, **engine_options(settings))
    try:
        yield engine
    finally:
        engine.dispose()


def tenant_engines() -> TenantEngines:
    """Return the engines of the tenants of the application that is at work."""
    engines: TenantEngines = current_app.extensions["rollcall_tenants"]
    return engines


def work_for(name: str) -> None:
    """Work on a tenant's database from now on, until the request or command ends.

    Raises TenantUnknown.
    """
    db.use(tenant_engines().of(name))


def forget_connections() -> None:
    """Begin the life of a forked process with no connection that another process opened."""
    tenant_engines().forget_connections()
    db.default_engine.dispose(close=False)


def patient_policy() -> RetryPolicy:
    """Return the bounds of a unit of work that nobody waits for with a request in hand."""
    policy = current_settings().retry_policy
    return replace(policy, attempts=1000, deadline=300.0, statement_timeout=3600.0)
