"""A host that is gone without a word: no packet comes back, not even a refusal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import OperationalError

from app.config import Settings
from app.database import engine_options
from app.errors import DatabaseAway
from app.transactions import connect
from tests.races import eventually, started
from tests.replication import Node

OURS, THEIRS = "10.77.0.1", "10.77.0.2"
NOTICED = 20.0  # seconds


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def another_host() -> Iterator[str]:
    """Make a network namespace that is reached by a cable; yield its name."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.fail("another host takes root and iproute2: apt-get install iproute2", pytrace=False)
    name = f"rollcall-{os.getpid()}"
    run(f"ip netns add {name}")
    try:
        run(f"ip link add rollcall0 type veth peer name rollcall1 netns {name}")
        try:
            run(f"ip addr add {OURS}/24 dev rollcall0")
            run("ip link set rollcall0 up")
            run(f"ip -n {name} addr add {THEIRS}/24 dev rollcall1")
            run(f"ip -n {name} link set rollcall1 up")
            yield name
        finally:
            run("ip link delete rollcall0")  # and its other end
    finally:
        run(f"ip netns delete {name}")


def vanish() -> None:
    """Send what is for the other host to an address that nobody has."""
    run(f"ip neigh replace {THEIRS} lladdr 02:00:00:00:00:99 dev rollcall0 nud permanent")


@contextmanager
def server_on(host: str) -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="rollcall-host-"))
    node = Node(folder, "server")
    os.chown(folder, node.account.uid, node.account.gid)
    node.initialise()
    with (node.data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {OURS}/32 trust\n")
    ids = f"--reuid={node.account.uid} --regid={node.account.gid} --clear-groups"
    options = f"-c listen_addresses={THEIRS} -c port={node.port} -c unix_socket_directories="
    command = (
        f"ip netns exec {host} setpriv {ids} {node.binaries}/postgres -D {node.data} {options}"
    )
    process = subprocess.Popen(command.split(), cwd="/", stderr=subprocess.DEVNULL)
    try:
        yield node
    finally:
        process.send_signal(signal.SIGQUIT)  # it waits for no client
        process.wait()
        shutil.rmtree(folder)


def test_a_server_that_vanished_is_noticed() -> None:
    """By a statement that is sent to it, by one that waits for its answer, and by a new one."""
    with another_host() as host, server_on(host) as node:
        url = f"postgresql+psycopg2://postgres@{THEIRS}:{node.port}/postgres"
        engine = create_engine(url, **engine_options(Settings()))

        def is_up() -> bool:
            try:
                connect(engine).close()
            except DatabaseAway:
                return False
            return True

        eventually(is_up)
        with connect(engine) as idle, connect(engine) as busy:
            waiting = started(lambda: seconds_until_lost(busy, "SELECT pg_sleep(600)"))
            asleep = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            eventually(lambda: bool(idle.exec_driver_sql(asleep).scalar()))
            vanish()
            assert seconds_until_lost(idle, "SELECT 1") < NOTICED
            assert waiting() < NOTICED
            with pytest.raises(DatabaseAway):
                connect(engine)


def seconds_until_lost(connection: Connection, sql: str) -> float:
    began = time.monotonic()
    with pytest.raises(OperationalError) as error:
        connection.exec_driver_sql(sql)
    assert error.value.connection_invalidated
    return time.monotonic() - began
