"""Rollcall: an employee directory that never stores the same record twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask

from app import (
    api,
    cli,
    database,
    headers,
    limits,
    observability,
    routing,
    security,
    telemetry,
)
from app.config import PREFIX, VARIABLES, load_settings


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Wire an application together.

    ``config`` may hold settings by the name of their variable, which go before the environment,
    and Flask's own configuration. Raises ConfigurationError for a setting that cannot be used.
    """
    given = dict(config or {})
    settings = load_settings({name: given[name] for name in given if is_setting(name)})
    app = Flask(__name__)
    telemetry.init_app(app, settings)
    observability.init_app(app, settings)
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_body,
    )
    app.config.update({name: given[name] for name in given if not is_setting(name)})
    app.extensions["rollcall"] = settings
    database.init_app(app, settings)
    api.init_app(app)
    headers.init_app(app, settings)  # answers preflights before anybody asks for a token
    security.init_app(app, settings)
    limits.init_app(app, settings)  # counts by token, so that it comes after whoever reads it
    routing.init_app(app, settings)  # after the limits: it may ask the database
    cli.init_app(app)
    return app


def is_setting(name: str) -> bool:
    """Tell whether a configuration name is one of Rollcall's."""
    return name in VARIABLES or name.startswith(PREFIX)
