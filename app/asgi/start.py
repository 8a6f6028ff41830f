"""What is done before the first request: the database is brought up, and the log set up."""

from __future__ import annotations

import asyncio
import sys

from fastapi import FastAPI

from app import token_file
from app.asgi.work import Work
from app.async_database import abootstrap
from app.config import Settings, warn_of_unknown_settings
from app.database import tell_of_changes, warn_of_embedded
from app.observability import configure_service
from migrations_bootstrap.embedded import EmbeddedServer


async def start(app: FastAPI) -> None:
    """Do so. Raises ConfigurationError, and BootstrapError."""
    settings: Settings = app.state.settings
    configure_service(settings.log_level, settings.log_format, sys.stdout)
    warn_of_unknown_settings()
    token = token_file.read_token(settings)
    server: EmbeddedServer | None = app.state.server
    if server is not None:
        warn_of_embedded(server)
        await asyncio.to_thread(server.attach)
    url = settings.bootstrap_url or app.state.engine.url
    tell_of_changes(await abootstrap(url, connect_timeout=settings.connect_timeout))
    if token is not None:
        work: Work = app.state.work
        await work.do(lambda: token_file.keep_token(work.engine, token))
