"""The engines of the tenants' databases: one a tenant, under one cap of connections.

What a process knows of a tenant is an engine and the connections in its pool. There is no other
memory of whether a tenant is there: a connection is only ever opened to one that the registry has
as ready, before and after, and the drop of a tenant ends every connection. So whoever is dropped is
unknown from the next request on, in every process, and a request costs no look into the registry.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL, Dialect, Engine, create_engine

from app import tenants
from app.errors import DatabaseAway, LostRace, SchemaBehind, TenantUnknown
from app.pool import ConnectionCap
from app.tables_of_ours import UNDEFINED_TABLE
from app.transactions import is_connection_lost
from migrations_bootstrap.clones import url_of
from migrations_bootstrap.schema import VERSION_TABLE, is_served

logger = logging.getLogger(__name__)

WHERE_AM_I = f"SELECT current_database(), (SELECT max(version_num) FROM {VERSION_TABLE})"  # noqa: S608


class TenantEngines:
    """Makes engines as they are needed, and forgets them when their tenant is no more.

    All of them share the dialect of the ``registry``, and the statements that were compiled for it:
    an engine of create_engine() takes four times the memory, before it has compiled its own copy of
    them. The registry is asked on a connection that the cap leaves free for it: a thread that is
    about to open another one never waits for what other threads hold, who may be about to do the
    same.

    ``make`` makes an engine of a URL and options, ``open`` a connection to a tenant's database. Of
    asyncio's (see ``async_database``) all of this is run as it stands.
    """

    def __init__(
        self,
        url: URL,
        options: Mapping[str, Any],
        make: Callable[..., Engine] = create_engine,
        open: Callable[[Dialect, URL], Any] | None = None,
    ) -> None:
        self._registry_cap: ConnectionCap = type(options["cap"])(1)
        alone = {"pool_size": 1, "max_overflow": 0, "cap": self._registry_cap}
        self.registry = make(url, **{**options, **alone})
        self._options = options
        self._open = open or self._open_blocking
        self._engines: dict[str, Engine] = {}
        self._changing = threading.Lock()

    def of(self, name: str) -> Engine:
        """Return the engine of a tenant.

        Raises TenantUnknown, now or, of a tenant that was there before, when a connection is made.
        """
        engine = self._engines.get(name)
        if engine is None:
            database = tenants.ready_database(self.registry, name)
            with self._changing:
                engine = self._engines.setdefault(name, self._make(name, database))
        return engine

    def forget_connections(self) -> None:
        """Forget the connections of the process that this one was forked from."""
        self._engines.clear()
        self.registry.dispose(close=False)
        for cap in (self._registry_cap, self._options["cap"]):
            cap.forget_all()

    def dispose(self) -> None:
        """Close what is idle; what is lent is closed when it comes back."""
        for engine in (self.registry, *self._engines.values()):
            engine.dispose()

    def _make(self, name: str, database: str) -> Engine:
        url = url_of(self.registry.url, database)
        options, dialect = self._options, self.registry.dialect
        pool = options["poolclass"](
            lambda: self._connect(name, url),
            pool_size=options["pool_size"],
            max_overflow=options["max_overflow"],
            timeout=options["pool_timeout"],
            cap=options["cap"],
            recycle=options["pool_recycle"],
            pre_ping=options["pool_pre_ping"],
            dialect=dialect,
        )
        return Engine(
            pool,
            dialect,
            url,
            query_cache_size=0,
            execution_options={"compiled_cache": self.registry._compiled_cache},
            hide_parameters=options["hide_parameters"],
        )

    def _connect(self, name: str, url: URL) -> Any:
        """Open a connection to a tenant's database.

        The registry is asked before, for what is called so may be somebody else's by now, and
        after, for a drop in between has not ended what was opened since. Raises TenantUnknown,
        SchemaBehind, DatabaseAway, and the driver's errors.
        """
        self._require(name, url)
        dialect = self.registry.dialect
        try:
            connection = self._open(dialect, url)
        except Exception:
            self._require(name, url)
            raise
        try:
            self._set_up(connection, name, url)
            self._require(name, url)
        except BaseException:
            dialect.do_terminate(connection)
            raise
        return connection

    def _open_blocking(self, dialect: Dialect, url: URL) -> Any:
        arguments, parameters = dialect.create_connect_args(url)
        return dialect.connect(*arguments, **{**parameters, **self._options["connect_args"]})

    def _require(self, name: str, url: URL) -> None:
        """Raise TenantUnknown unless the registry has the tenant, in this database, as ready."""
        try:
            if tenants.ready_database(self.registry, name) == url.database:
                return
        except TenantUnknown:
            logger.info(
                "tenant unknown: %s", name, extra={"event": "tenant_unknown", "tenant": name}
            )
        with self._changing:
            self._engines.pop(name, None)
        raise TenantUnknown(name)

    def _set_up(self, connection: Any, name: str, url: URL) -> None:
        """Do what create_engine() does with each connection, and ask which database it is in."""
        dialect = self.registry.dialect
        on_connect = dialect.on_connect_url(url)
        assert on_connect is not None  # noqa: S101 - both drivers' types need it; tells mypy so
        on_connect(connection)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(WHERE_AM_I)
                ((database, revision),) = cursor.fetchall()
        except dialect.loaded_dbapi.Error as error:
            state = getattr(error, "pgcode", None)
            if dialect.is_disconnect(error, connection, None) or is_connection_lost(state):
                raise LostRace from error  # ended as soon as it was there: another may do
            if state != UNDEFINED_TABLE:
                raise
            raise SchemaBehind(name) from error
        connection.autocommit = False
        if database != url.database:
            raise DatabaseAway(f"{url.database} leads to another database")
        if not is_served(revision):
            raise SchemaBehind(name)
