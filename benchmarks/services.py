"""Serve a peer, and know when it is ready."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.processes import BenchmarkError, eventually, running
from benchmarks.roster import PROCESSES, Peer

PATH = "/api/v1/employees"
RETRY = "transaction retry"  # what Rollcall logs for each


@dataclass
class Service:
    """A peer that is being served."""

    peer: Peer
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    database: str | None
    token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PATH}"

    def post(self, body: Any, path: str = PATH) -> tuple[int, Any]:
        """Send one request on a connection of its own; return status and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            headers = {"Content-Type": "application/json", **bearing(self.token)}
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(content) if is_json else content

    def retries(self) -> int:
        """Return how many retries the log tells of so far."""
        return self.log.read_text(errors="replace").count(RETRY)


@contextmanager
def serving(
    peer: Peer,
    url: str | None,
    database: str | None,
    log: Path,
    token: str | None = None,
    **settings: str,
) -> Iterator[Service]:
    """Serve a peer on a database; when this gives the service, it answers as it should."""
    port = free_port()
    environment = {
        "PORT": str(port),
        "BIND": "127.0.0.1",
        "WEB_CONCURRENCY": str(PROCESSES),
        "ROLLCALL_AUTH": "off",
        **settings,
    }
    command = list(peer.command)
    if Path(command[0]).name == "uvicorn":  # reads no such variable
        command.append(f"--port={port}")
    if url is not None:
        environment["DATABASE_URL"] = url
    with running(command, environment, log) as process:
        service = Service(peer, process, port, log, database, token)
        eventually(lambda: is_ready(service), f"{peer.name} is ready")
        yield service


def is_ready(service: Service) -> bool:
    """Tell whether the service answers a request for somebody who exists; see that it is right."""
    if service.process.poll() is not None:
        raise BenchmarkError(f"{service.peer.name} ended:\n{service.log.read_text()}")
    try:
        status, answer = service.post(somebody("Ada Lovelace"))
    except OSError:
        return False
    if not 200 <= status < 300:
        raise BenchmarkError(f"{service.peer.name} answers {status}: {answer!r}")
    if service.peer.answers_employee and answer.get("name") != "Ada Lovelace":
        raise BenchmarkError(f"{service.peer.name} answers {answer!r}")
    return True


def bearing(token: str | None) -> dict[str, str]:
    """Return the header that shows a token, if there is one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def somebody(name: str) -> dict[str, Any]:
    """Return the body of a request for an employee."""
    return {"name": name, "department_id": table.DEPARTMENT_ID, "title": table.TITLE}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
