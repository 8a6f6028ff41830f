"""What is done before the first request: the database is brought up, and the log set up."""

from __future__ import annotations

import asyncio
import logging
import sys

from fastapi import FastAPI
from sqlalchemy import make_url

from app import token_file
from app.asgi.work import Work
from app.async_database import abootstrap
from app.config import Settings, warn_of_unknown_settings
from app.database import EMBEDDED_NAME
from app.observability import configure_service
from migrations_bootstrap.embedded import EmbeddedServer

logger = logging.getLogger(__name__)


async def start(app: FastAPI) -> None:
    """Do so. Raises ConfigurationError, and BootstrapError."""
    settings: Settings = app.state.settings
    configure_service(settings.log_level, settings.log_format, sys.stdout)
    warn_of_unknown_settings()
    token = token_file.read_token(settings)
    server: EmbeddedServer | None = app.state.server
    if server is None:
        url = settings.bootstrap_url
    else:
        logger.warning(
            "DATABASE_URL is not set: using the embedded PostgreSQL server, data in %s. "
            "Set DATABASE_URL in production.",
            server.home,
        )
        await asyncio.to_thread(server.attach)
        url = make_url(server.url(EMBEDDED_NAME))
    assert url is not None  # noqa: S101 - one of the two is there, tells mypy so
    outcome = await abootstrap(url, connect_timeout=settings.connect_timeout)
    for change in outcome.upgrade.changes:
        logger.info("the schema was changed: %s", change)
    if token is not None:
        work: Work = app.state.work
        await work.do_alone(lambda: token_file.keep_token(work.engine, token))
