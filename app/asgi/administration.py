"""How tenants come and go here: in a thread, since that knows no other way than to block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from flask import Flask
from sqlalchemy import URL

from app import database
from app.config import Settings
from app.observability import Exchange, at_work
from app.transactions import driver

Result = TypeVar("Result")


class Administration:
    """A place for such work: a Flask application's context, with the database and without routes.

    No connection is kept. ``attach`` is called first: an embedded server may be gone by then.
    """

    def __init__(
        self, settings: Settings, url: URL, attach: Callable[[], object] | None = None
    ) -> None:
        most = settings.connection_cap
        own = replace(settings, database_url=url, read_url=None, pool_size=0, max_overflow=most)
        self._attach = attach
        self._app = Flask("app")
        self._app.extensions["rollcall"] = own
        database.init_app(self._app, own)

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Do some work there, from a greenlet."""
        known = at_work.get()
        return driver.get().elsewhere(lambda: self._do(work, known))

    def _do(self, work: Callable[[], Result], known: Exchange | None) -> Result:
        before = at_work.set(known)
        try:
            if self._attach is not None:
                self._attach()
            with self._app.app_context():
                return work()
        finally:
            at_work.reset(before)
