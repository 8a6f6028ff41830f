"""The real service: gunicorn with worker processes, and clients that talk HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.races import eventually, together

ROOT = Path(__file__).parent.parent
GUNICORN = str(Path(sys.executable).with_name("gunicorn"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Service:
    """A running gunicorn."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request on a connection of its own; return status and content."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            return exchange(connection, method, path, body)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End the service and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(30)


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    """Send one request and read its answer; the connection stays open if the server lets it."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, json.loads(content) if content else None


@contextmanager
def serving(
    folder: Path,
    application: str = "wsgi:app",
    *,
    project: Path = ROOT,
    ready: bool = True,
    **environment: str,
) -> Iterator[Service]:
    """Serve an application; the log goes to the folder."""
    port, log = free_port(), folder / "gunicorn.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [GUNICORN, application],
            cwd=project,
            env={**os.environ, "BIND": "127.0.0.1", "PORT": str(port), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(process, port, log)
    try:
        if ready:
            eventually(service.is_ready, 30)
        yield service
    finally:
        if process.poll() is None:
            service.stop()


@dataclass
class Tally:
    """What clients were answered: how often each status, and how often each key was created."""

    statuses: Counter[int] = field(default_factory=Counter)
    created: Counter[tuple[str, str]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, row: dict[str, str], status: int) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.created[row["department"], row["name"]] += status == 201


def race(service: Service, rows: Sequence[dict[str, str]], clients: int, keys: int = 8) -> Tally:
    """Post every row from every client, in rounds of a few keys that all want at once.

    Rounds of one hot key would show little: it is false conflicts between different keys that
    drive a loop into its second attempt.
    """
    tally = Tally()
    rounds = [rows[at : at + keys] for at in range(0, len(rows), keys)]
    start = threading.Barrier(clients)

    def work(number: int) -> None:
        order = random.Random(number)  # noqa: S311 - an order, not a secret
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        with closing(connection):
            for wanted in rounds:
                start.wait(60)
                for row in order.sample(wanted, len(wanted)):
                    tally.note(row, exchange(connection, "POST", "/api/v1/employees", row)[0])

    outcomes = together([partial(work, number) for number in range(clients)])
    assert outcomes == [None] * clients
    return tally
