"""The one PostgreSQL that all work on: as it comes, on disk, with fsync on."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection

from benchmarks import table
from benchmarks.processes import BenchmarkError, run
from benchmarks.roster import LAYOUTS, Peer
from migrations_bootstrap.embedded import EmbeddedServer
from migrations_bootstrap.keeper import give_back, take_lock

logger = logging.getLogger(__name__)

SETTINGS = {"max_connections": "200"}
# Not the usual temporary folder, which is in memory on many systems: the disk is to be measured.
ON_DISK = Path("/var/tmp")  # noqa: S108 - the folders made in it are new
PATIENCE = 120.0


class Databases:
    """The databases of a server: filled once for each layout and size, and copied for each use."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server

    def url(self, database: str) -> str:
        """Return the URL of a database, as libpq reads it."""
        return self.server.url(database).replace("+psycopg2", "", 1)

    def ask(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement, outside of a transaction, and return its rows."""
        with closing(self.connect(database)) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def connect(self, database: str) -> Connection:
        """Return a new connection."""
        connection: Connection = psycopg2.connect(self.url(database))
        connection.autocommit = True
        return connection

    def checkpoint(self) -> None:
        """Write what is dirty now, so that none of the next seconds have to."""
        self.ask("CHECKPOINT")

    def employees(self, database: str) -> int:
        """Return how many there are."""
        return int(self.ask("SELECT count(*) FROM employee", database)[0][0])

    @contextmanager
    def copy(self, peer: Peer, rows: int) -> Iterator[str | None]:
        """Make a fresh copy of the tables for a peer, and drop it at the end."""
        if peer.layout is None:
            yield None
            return
        original, name = self._original(peer.layout, rows), f"{peer.name.replace(':', '_')}_{rows}"
        self._drop(name)
        self.ask(f"CREATE DATABASE {name} TEMPLATE {original} STRATEGY file_copy")
        try:
            yield name
        finally:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self.ask(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _original(self, layout: str, rows: int) -> str:
        """Return the database to copy; it gets its name when it is complete."""
        name = f"original_{layout}_{rows}"
        if self.ask(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
            return name
        logger.info("filling %s employees into the tables of %s", f"{rows:,}", layout)
        new = f"new_{name}"
        self._drop(new)
        self.ask(f"CREATE DATABASE {new}")
        run(LAYOUTS[layout].command, {"DATABASE_URL": self.url(new)})
        for statement in table.fill_sql(rows):
            self.ask(statement, new)
        self.ask(f"ALTER DATABASE {new} RENAME TO {name}")
        return name


@contextmanager
def databases(folder: Path | None) -> Iterator[Databases]:
    """Keep a server running; without a folder its data go with it."""
    home = folder or Path(tempfile.mkdtemp(prefix="rollcall-bench-", dir=ON_DISK))
    if folder is None:
        home.chmod(0o755)  # as root the server runs as another user, who has to get in
    server = EmbeddedServer(home, settings=SETTINGS)
    try:
        server.attach()
        served = Databases(server)
        if served.ask("SHOW fsync") != [("on",)]:
            raise BenchmarkError("fsync must be on")
        yield served
    finally:
        server.release()
        _wait_for_the_end(server)
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)


def _wait_for_the_end(server: EmbeddedServer) -> None:
    """Return when the server is down: what keeps it holds a lock for as long as it runs."""
    started = time.monotonic()
    if server.directory.exists():
        give_back(take_lock(server.directory / "keeper.lock", fcntl.LOCK_SH, PATIENCE))
    logger.debug("PostgreSQL stopped in %.1f s", time.monotonic() - started)
