"""PgBouncer in transaction mode, in front of a database on a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from migrations_bootstrap.embedded import server_account
from tests.races import eventually
from tests.serving import free_port

CONFIGURATION = """
[databases]
{database} = host={sockets} port=5432 user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
logfile = {folder}/pgbouncer.log
"""


@contextmanager
def pgbouncer(url: str) -> Iterator[str]:
    """Start one for a database; yield the URL through it."""
    binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.fail("pgbouncer is not installed: apt-get install pgbouncer", pytrace=False)
    direct = make_url(url)
    folder = Path(tempfile.mkdtemp(prefix="rollcall-pgbouncer-"))
    configure(folder, direct.database, direct.query["host"], port := free_port())
    # It refuses to run as root, and then takes the account that the server has.
    account = server_account().popen
    process = subprocess.Popen([binary, "--quiet", folder / "pgbouncer.ini"], **account)
    try:
        eventually(lambda: "process up" in (folder / "pgbouncer.log").read_text())
        through = direct.set(host="127.0.0.1", port=port, query={})
        yield through.render_as_string(hide_password=False)
    finally:
        process.terminate()  # at once, whatever clients it has
        process.wait(30)
        shutil.rmtree(folder)


def configure(folder: Path, database: str | None, sockets: object, port: int) -> None:
    """Write the configuration, for an account that may be another than ours."""
    text = CONFIGURATION.format(database=database, sockets=sockets, port=port, folder=folder)
    (folder / "pgbouncer.ini").write_text(text)
    (folder / "pgbouncer.log").touch()
    folder.chmod(0o755)
    (folder / "pgbouncer.log").chmod(0o666)
