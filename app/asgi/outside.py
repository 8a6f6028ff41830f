"""Around everything, at the start: the server is stopped with one line where it must not serve."""

from __future__ import annotations

import logging
import socket
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.asgi.start import start
from app.errors import ConfigurationError
from app.loopback import require_loopback
from migrations_bootstrap import BootstrapError


class Outside:
    """An application that gets ready before the server takes its first request.

    Around FastAPI's, which lets nobody see whose lifespan it is.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            _join_logs()
            try:
                require_loopback(self._app.state.settings, _addresses(receive))
                await start(self._app)
            except (ConfigurationError, BootstrapError) as error:
                await receive()
                failed = {"type": "lifespan.startup.failed", "message": f"rollcall: {error}"}
                await send(failed)
                return
        await self._app(scope, receive, send)


def _join_logs() -> None:
    """Have uvicorn's own lines go where all others go; it need not log requests, which we do."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers.clear()
        log.propagate = name != "uvicorn.access"


def _addresses(receive: Any) -> list[Any]:
    """Return where uvicorn is going to listen; nothing of a server that does not say so.

    Its sockets are not there yet, but its configuration is at hand. Where another server listens
    shows with the first request: see ``gate``.
    """
    config = getattr(getattr(receive, "__self__", None), "config", None)
    if config is None or getattr(config, "uds", None):
        return []
    if getattr(config, "fd", None) is not None:
        with socket.socket(fileno=socket.dup(config.fd)) as inherited:
            return [inherited.getsockname()]
    return [(config.host, config.port)]
