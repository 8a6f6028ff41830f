"""The service under gunicorn: its start, its settings, and what is not even a request."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from app.worker import Worker
from tests.conftest import UNHURRIED, empty
from tests.ledger import stored, verify
from tests.load import under_load
from tests.races import eventually, terminate_backends, together
from tests.serving import Service, exchange, serving, serving_as_it_is


@pytest.fixture
def unguarded(unguarded_url: str) -> Iterator[Engine]:
    """An engine on an empty database without guards: nothing else would refuse a duplicate."""
    empty(unguarded_url)
    engine = create_engine(unguarded_url)
    yield engine
    engine.dispose()


def scalar(engine: Engine, sql: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(text(sql))


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def test_a_start_brings_the_database_up(empty_database: str, tmp_path: Path) -> None:
    """Created, migrated and guarded before the first request, and the log says where to look."""
    with serving(tmp_path, DATABASE_URL=empty_database) as service:
        status, state = service.call("GET", "/readyz")
        assert (status, state["guards"]) == (200, {"department": True, "employee": True})
        assert f"Swagger UI: http://127.0.0.1:{service.port}/api/v1/" in service.log.read_text()


def test_a_start_on_a_legacy_database_says_what_to_run(fresh_database: str, tmp_path: Path) -> None:
    """Nothing is touched, and gunicorn stops."""
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE department (id int, name text)")
    with serving(tmp_path, ready=False, DATABASE_URL=fresh_database) as service:
        assert service.process.wait(60) == 1
        log = service.log.read_text()
    assert "run flask init-db" in log
    assert "Traceback" not in log
    assert scalar(engine, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("name", "value"),
    [("DATABASE_URL", "mysql://u:secret@h/d"), ("ROLLCALL_POOL_SIZE", "many")],
)
def test_a_bad_setting_stops_the_start_with_one_line(name: str, value: str, tmp_path: Path) -> None:
    """No traceback, no worker that boots again and again, no secret."""
    with serving(tmp_path, ready=False, **{name: value}) as service:
        assert service.process.wait(60) == 1
        log = service.log.read_text()
    assert log.startswith(f"rollcall: {name} ")
    assert log.count("\n") == 1
    assert "secret" not in log


def test_an_unreachable_server_stops_the_start_with_one_line(tmp_path: Path) -> None:
    """Within the connect time-out."""
    with serving(
        tmp_path, ready=False, DATABASE_URL="postgresql://u:secret@127.0.0.1:1/d"
    ) as service:
        assert service.process.wait(60) == 1
        log = service.log.read_text()
    assert "Traceback" not in log
    assert "secret" not in log


HASTY = """
import os, signal
exec(open("gunicorn.conf.py").read())
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.{}))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_a_worker_that_is_told_to_stop_at_its_very_start_does(
    name: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes before the worker has any handler but the master's, and is not lost."""
    hasty = tmp_path / "hasty.py"
    hasty.write_text(HASTY.format(name))
    monkeypatch.setenv("GUNICORN_CMD_ARGS", f"--config {hasty}")
    with serving(tmp_path, ready=False, DATABASE_URL=database_url) as service:
        eventually(lambda: f"was sent {name}!" in service.log.read_text())
        assert service.stop() == 0


def test_a_connection_that_was_cut_does_not_show(unguarded: Engine, tmp_path: Path) -> None:
    """Backends are terminated between requests: reads and writes are run again."""
    with serving_as_it_is(url_of(unguarded), tmp_path, WEB_CONCURRENCY="1") as service:
        for number in range(5):
            assert service.call("POST", "/api/v1/departments", {"name": f"D{number}"})[0] == 201
            terminate_backends(unguarded)
            assert service.call("GET", "/api/v1/departments")[0] == 200
            terminate_backends(unguarded)


def test_a_preloaded_application_shares_no_connection(
    unguarded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--preload loads it in the master, and each worker connects for itself."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--preload")
    with (
        serving_as_it_is(url_of(unguarded), tmp_path, WEB_CONCURRENCY="2") as service,
        under_load(service) as load,
    ):
        assert load.well_again() == []
    assert verify(load.answers, stored(url_of(unguarded))) == []


POST = b"POST /api/v1/departments HTTP/1.1\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WITH_LENGTH = POST + b"Content-Length: 500\r\n\r\n"


def test_a_body_of_unannounced_length_has_the_same_limit(service: Service) -> None:
    """It is not cut off at the limit and taken for whole."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    # No more than the server still reads after its answer: it would hang up on who sends on.
    too_large = (b'{"name": "big"}', *[b" " * 65536] * 32, b"garbage")
    headers = {"Content-Type": "application/json"}
    with closing(connection):
        connection.request("POST", "/api/v1/departments", iter([b'{"name": "A"}']), headers)
        assert json.load(connection.getresponse())["name"] == "A"
        connection.request("POST", "/api/v1/departments", iter(too_large), headers)
        assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n", 400),
        (CHUNKED + b"3\r\nabcXX0\r\n\r\n", 400),
        (CHUNKED + b"0\r\n" + b"x: y\r\n" * 9000 + b"\r\n", 431),
        (WITH_LENGTH + b'{"name": "cut"}', 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: zebra\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    ],
)
def test_what_is_not_even_http_is_a_problem_too(service: Service, sent: bytes, status: int) -> None:
    """It never reaches the application."""
    with socket.create_connection(("127.0.0.1", service.port), 30) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Content-Type: application/problem+json" in head
    assert json.loads(body)["status"] == status


def test_an_error_of_the_worker_itself_is_a_problem(caplog: pytest.LogCaptureFixture) -> None:
    """500 and a traceback in the log; a client that is gone does not matter."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        worker = Worker.__new__(Worker)
        worker.handle_error(None, mine, None, LookupError("Zebra"))
        answer = theirs.recv(65536)
        theirs.close()
        worker.handle_error(None, mine, None, LookupError("Zebra"))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"Zebra" not in answer
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


@pytest.fixture(scope="module")
def service(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that several tests share."""
    with serving(tmp_path_factory.mktemp("service"), DATABASE_URL=guarded_url) as service:
        yield service


def test_batches_and_single_creates_do_not_starve_each_other(
    either_url: str, tmp_path: Path
) -> None:
    """Two clients send batches of a thousand back to back, six single employees: all get on.

    Names are spread as people's are: neighbours in an index are a race of their own.
    """
    batches: list[list[int]] = [[], []]
    singles: list[list[int]] = [[], [], [], [], [], []]

    def send(answers: list[int], number: int, path: str, size: int) -> None:
        """Send new employees until all have got on; note each status."""
        spread = random.Random(f"{path} {number}")  # noqa: S311 - names, not secrets
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        with closing(connection):
            for sent in itertools.takewhile(lambda sent: not all_get_on(), itertools.count()):
                items = [
                    {"name": f"{spread.random()} {number} {sent} {at}", "department_id": 1}
                    for at in range(size)
                ]
                body = {"items": items} if size > 1 else items[0]
                status, _ = exchange(connection, "POST", f"/api/v1/{path}", body)
                answers.append(status)

    def all_get_on() -> bool:
        return min(map(len, batches + singles)) >= 3

    with serving_as_it_is(either_url, tmp_path, **UNHURRIED) as service:
        empty(either_url)
        service.call("POST", "/api/v1/departments", {"name": "D"})
        senders = [
            *(partial(send, one, n, "employees/batch", 1000) for n, one in enumerate(batches)),
            *(partial(send, one, n, "employees", 1) for n, one in enumerate(singles)),
        ]
        assert together(senders) == [None] * 8

    assert {status for answers in batches for status in answers} == {200}
    assert {status for answers in singles for status in answers} == {201}


HANGS = """
import os, signal, time
def hang():
    time.sleep(60)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("started", flush=True)
hang()
"""


def test_a_service_that_does_not_stop_says_what_it_is_doing(tmp_path: Path) -> None:
    """The failure shows the stacks of each of its processes, and none of them is left."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", HANGS],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    eventually(lambda: "started" in log.read_text())
    with pytest.raises(AssertionError, match=r"not gone 0\.1 s after signal 15") as caught:
        Service(process, 0, log).stop(patience=0.1)
    assert str(caught.value).count(" in hang") == 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
