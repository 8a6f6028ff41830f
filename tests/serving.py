"""The real service: gunicorn with worker processes, and clients that talk HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from sqlalchemy import NullPool, create_engine, text

from app.tokens import new_token
from tests.conftest import unguard
from tests.measuring import MEASURING
from tests.races import eventually

ROOT = Path(__file__).parent.parent
GUNICORN = str(Path(sys.executable).with_name("gunicorn"))
UVICORN = str(Path(sys.executable).with_name("uvicorn"))
# Less than gunicorn's graceful_timeout: a worker that hangs is still there to be looked at.
PATIENCE = 25.0
# A signal of faulthandler's that gunicorn leaves alone.
DUMP = signal.SIGBUS


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Service:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request on a connection of its own; return status and content."""
        with closing(self.connect()) as connection:
            return exchange(connection, method, path, body)

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        """Return a connection, which opens with its first request."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def stop(self, how: int = signal.SIGTERM, patience: float = PATIENCE) -> int:
        """End the service and return its exit status.

        Fails when it is not gone in time, and says then what each of its processes was doing.
        """
        self.process.send_signal(how)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self._dump()
            log = self.log.read_text(errors="replace")
            raise AssertionError(f"not gone {patience:g} s after signal {how}:\n{log}") from None

    def _dump(self) -> None:
        """End each process with its stacks in the log, one by one, so that they do not mix."""
        master = psutil.Process(self.process.pid)
        for process in [master, *master.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended by itself
                process.send_signal(DUMP)
                process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    """Send one request and read its answer; the connection stays open if the server lets it."""
    status, _, content = ask(connection, method, path, body)
    return status, content


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, Message, Any]:
    """Send one request; return status, headers and content."""
    typed = {"Content-Type": "application/json"} if body is not None else {}
    content = json.dumps(body) if body is not None else None
    connection.request(method, path, content, {**typed, **headers})
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, answer.headers, json.loads(content) if content else None


@contextmanager
def serving(
    folder: Path,
    application: str = "wsgi:app",
    *,
    project: Path = ROOT,
    ready: bool = True,
    measured: bool = False,
    **environment: str,
) -> Iterator[Service]:
    """Serve an application; the log goes to the folder.

    ``measured`` is for what no other test reaches: see tests/measuring.py.
    """
    port = free_port()
    address = {"BIND": "127.0.0.1", "PORT": str(port), "ROLLCALL_AUTH": "off"}
    environment = {**address, **(MEASURING if measured else {}), **environment}
    log = folder / "gunicorn.log"
    with running([GUNICORN, application], port, log, project, environment) as service:
        if ready:
            eventually(service.is_ready)
        yield service


@contextmanager
def serving_by_uvicorn(folder: Path, *arguments: str, **environment: str) -> Iterator[Service]:
    """Serve the asynchronous application as its documentation says."""
    port = free_port()
    command = [UVICORN, "asgi:app", f"--port={port}", *arguments]
    with running(command, port, folder / "log", ROOT, environment) as service:
        eventually(service.is_ready)
        yield service


@contextmanager
def running(
    command: list[str], port: int, log: Path, folder: Path, environment: Mapping[str, str]
) -> Iterator[Service]:
    """Run a server in a folder, with more in its environment; stop it if it is still there."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(process, port, log)
    try:
        yield service
    finally:
        if process.poll() is None:
            service.stop()


def settings_with_token(url: str, folder: Path) -> dict[str, str]:
    """Return the settings of a service whose first token, for all, is put into the folder."""
    (folder / "token").write_text(new_token())
    return {
        "DATABASE_URL": url,
        "ROLLCALL_AUTH": "token",
        "ROLLCALL_ADMIN_TOKEN_FILE": str(folder / "token"),
    }


@contextmanager
def serving_as_it_is(url: str, folder: Path, *arguments: str, **options: Any) -> Iterator[Service]:
    """Serve a database; where it had no guards they are gone again when the service is up."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        unguarded = connection.scalar(text("SELECT to_regclass('uq_employee_natural_key') IS NULL"))
    with serving(folder, *arguments, DATABASE_URL=url, **options) as service:
        if unguarded:
            unguard(url)
        yield service
