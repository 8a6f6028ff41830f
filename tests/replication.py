"""A primary and its streaming standby, on loopback ports, made of the binaries that tests have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import NullPool, create_engine

from migrations_bootstrap.embedded import find_binaries, runnable, server_account
from tests.races import eventually
from tests.serving import free_port

USUAL = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # which keeps every commit through kill -9 of the processes
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
}
FOLLOWS = "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = '{}'"


class Node:
    """A PostgreSQL server in a folder, as the user that the embedded server has too."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.account = server_account()
        self.binaries, _ = runnable(find_binaries(None), self.account)
        self.data = folder / name
        self.log = folder / f"{name}.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        """Return SQLAlchemy's URL of a database of this server alone."""
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/{database}"

    def initialise(self) -> None:
        """Make the data of a new server."""
        arguments = ["--username=postgres", "--auth=trust", "--locale=C.UTF-8", "--encoding=UTF8"]
        self._run("initdb", "-D", str(self.data), "--no-sync", *arguments)

    def copy(self, primary: Node) -> None:
        """Make the data of a standby, which streams from the primary under its own name."""
        source = f"host=127.0.0.1 port={primary.port} user=postgres application_name={self.name}"
        self._run(
            "pg_basebackup", "-d", source, "-D", str(self.data), "-R", "-c", "fast", "--no-sync"
        )

    def _run(self, program: str, *arguments: str) -> None:
        done = self.account.run(self.binaries / program, *arguments)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start the server; return when it takes connections."""
        settings = {**USUAL, "port": str(self.port)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binaries / "postgres", "-D", self.data, *options],
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.account.popen,
            )
        eventually(self.is_up)

    def is_up(self) -> bool:
        """Tell whether the server takes connections."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        asked = self.account.run(
            self.binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)
        )
        return asked.returncode == 0

    def kill(self) -> None:
        """End the server and all that belongs to it as a power cut would."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        # Its children are no group: each is the leader of one of its own.
        everybody = [postmaster, *postmaster.children(recursive=True)]
        for process in everybody:
            with suppress(psutil.NoSuchProcess):  # without the postmaster they end by themselves
                process.kill()
        self.process.wait()
        eventually(lambda: not living().intersection(everybody))

    def execute(self, sql: str, database: str = "postgres") -> Any:
        """Run a statement as superuser; return the first value of a query."""
        engine = create_engine(self.url(database), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.exec_driver_sql(sql)
            return result.scalar() if result.returns_rows else None

    def configure(self, name: str, value: str) -> None:
        """Change a setting, for good; an empty value is none."""
        self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute("SELECT pg_reload_conf()")


def living() -> set[psutil.Process]:
    """Return the processes that have not ended; whoever has to bury those that have may be slow."""
    found = psutil.process_iter(["status"])
    return {one for one in found if one.info["status"] != psutil.STATUS_ZOMBIE}


@contextmanager
def pair(synchronous: bool = False) -> Iterator[tuple[Node, Node]]:
    """Run a primary and a standby that streams from it, for whose receipt each commit may wait."""
    folder = Path(tempfile.mkdtemp(prefix="rollcall-pair-"))
    primary, standby = Node(folder, "primary"), Node(folder, "standby")
    os.chown(folder, primary.account.uid, primary.account.gid)
    try:
        primary.initialise()
        primary.start()
        primary.configure("synchronous_standby_names", standby.name if synchronous else "")
        standby.copy(primary)
        standby.start()
        eventually(lambda: primary.execute(FOLLOWS.format("sync" if synchronous else "async")))
        yield primary, standby
    finally:
        for process in filter(None, (standby.process, primary.process)):
            process.send_signal(signal.SIGQUIT)  # ends it at once, with all that belongs to it
            process.wait()
        shutil.rmtree(folder)
