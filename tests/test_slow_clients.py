"""Clients that are slow, idle, deaf or many, and others that are served at once all the same."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import resource
import select
import selectors
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from werkzeug.exceptions import RequestTimeout

from app import worker
from app.connection import Connection
from app.worker import LARGE, Worker
from tests.races import eventually
from tests.serving import Service, serving

IDLE = 2000
CONNECTIONS = 2100
PATH = "/api/v1/departments"
POST = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
LARGE_FILE = b"GET /swaggerui/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
MANY = 40
NOWHERE = b"POST /nowhere HTTP/1.1\r\nHost: x\r\n"


def one_worker(
    url: str, folder: Path, seconds: int, *arguments: str
) -> AbstractContextManager[Service]:
    """Serve by one worker of four threads, which waits for its clients for so long."""
    return serving(
        folder,
        measured=True,
        DATABASE_URL=url,
        WEB_CONCURRENCY="1",
        ROLLCALL_REQUEST_TIMEOUT=str(seconds),
        GUNICORN_CMD_ARGS=" ".join([f"--keep-alive {seconds}", *arguments]),
    )


@pytest.fixture(scope="module")
def service(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that waits for longer than any test takes."""
    most = f"--worker-connections {CONNECTIONS}"
    with one_worker(guarded_url, tmp_path_factory.mktemp("slow"), 600, most) as service:
        yield service


@pytest.fixture(scope="module")
def hasty(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that waits for a second."""
    with one_worker(guarded_url, tmp_path_factory.mktemp("hasty"), 1) as service:
        yield service


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is open until the end of a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        yield opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connected(service: Service, opened: ExitStack, sent: bytes = b"") -> socket.socket:
    """Return a connection on which something has been sent."""
    raw = opened.enter_context(socket.create_connection(("127.0.0.1", service.port), 30))
    raw.sendall(sent)
    return raw


def is_served_meanwhile(service: Service, others: list[socket.socket]) -> bool:
    """Tell whether another client is, and nothing has come to these until then, not even an end."""
    return service.call("GET", PATH)[0] == 200 and not select.select(others, [], [], 0)[0]


def everything(raw: socket.socket) -> bytes:
    """Return what comes until the server hangs up."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := raw.recv(1 << 20):
            received += data
    return bytes(received)


def test_two_thousand_idle_connections_hold_up_nobody(service: Service, opened: ExitStack) -> None:
    """Where there are more than a worker takes, the oldest are closed."""
    idle = [connected(service, opened) for _ in range(IDLE)]
    assert is_served_meanwhile(service, idle[:500])  # select takes no more than a thousand files
    more = [connected(service, opened) for _ in range(CONNECTIONS - IDLE + 10)]
    assert everything(idle[0]) == b""
    assert service.call("GET", PATH)[0] == 200
    more[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert _answer(more[-1]) == 200


def test_an_idle_connection_is_closed_after_a_while(hasty: Service, opened: ExitStack) -> None:
    """Without a word."""
    assert everything(connected(hasty, opened)) == b""


SLOW = [
    POST,
    POST + b"Content-Length: 500\r\n\r\n{",
    POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
]


def test_slow_requests_hold_no_thread(service: Service, opened: ExitStack) -> None:
    """Many that stop in the middle do no harm."""
    slow = [connected(service, opened, sent) for sent in SLOW * 50]
    assert is_served_meanwhile(service, slow)


def test_slow_requests_are_told_so_after_their_time(hasty: Service, opened: ExitStack) -> None:
    """With an answer like any other."""
    for raw in [connected(hasty, opened, sent) for sent in SLOW * 5]:
        head, _, body = everything(raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"X-Content-Type-Options: nosniff" in head
        assert b"Cache-Control: no-store" in head
        assert json.loads(body)["code"] == "request_timeout"


def test_a_byte_now_and_then_gives_no_more_time(hasty: Service, opened: ExitStack) -> None:
    """The time is that of the whole request."""
    raw = connected(hasty, opened, POST)
    raw.settimeout(0.2)
    answer = b""
    while not answer:
        raw.sendall(b"x")
        with contextlib.suppress(TimeoutError):
            answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_answers_that_are_not_read_hold_no_thread(service: Service, opened: ExitStack) -> None:
    """Of however many clients."""
    deaf = [connected(service, opened, LARGE_FILE * MANY) for _ in range(10)]
    assert service.call("GET", PATH)[0] == 200
    theirs = {raw.getsockname()[1] for raw in deaf}
    assert theirs <= {one.raddr.port for one in connections(service)}


def test_answers_that_are_not_read_are_dropped_after_their_time(
    hasty: Service, opened: ExitStack
) -> None:
    """What the kernel has taken of them arrives."""
    deaf = connected(hasty, opened, LARGE_FILE * MANY)
    eventually(lambda: has_come(deaf))  # before, nobody may have it yet
    eventually(lambda: not connections(hasty))
    assert len(everything(deaf)) < MANY * 1_000_000


def connections(service: Service) -> list[Any]:
    """Return the connections that the worker has with clients."""
    (process,) = psutil.Process(service.process.pid).children()
    found = process.net_connections("tcp")
    return [one for one in found if one.laddr.port == service.port and one.status == "ESTABLISHED"]


def test_an_answer_is_taken_bit_by_bit(service: Service, opened: ExitStack) -> None:
    """It comes whole, and the next request is answered on the same connection."""
    raw = connected(service, opened, LARGE_FILE)
    for _ in range(2):
        eventually(lambda: has_come(raw))
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert len(answer.read()) == int(answer.headers["Content-Length"]) > 1_000_000
        raw.sendall(LARGE_FILE)


def test_a_request_in_small_pieces_is_served(service: Service, opened: ExitStack) -> None:
    """And two that come at once, and one whose client waits to be told to go on."""
    raw = connected(service, opened)
    body = b'{"name": "Pieces"}'
    for byte in POST + b"Content-Length: 18\r\n\r\n" + body:
        raw.sendall(bytes([byte]))
    assert _answer(raw) == 201
    twice = POST + b"Content-Length: 18\r\n\r\n" + body
    raw.sendall(twice + twice[:-5])
    assert _answer(raw) == 200
    raw.sendall(twice[-5:])
    assert _answer(raw) == 200
    raw.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 18\r\n\r\n")
    assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    raw.sendall(body)
    assert raw.recv(12) == b"HTTP/1.1 200"


def _answer(raw: socket.socket) -> int:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    answer.read()
    return answer.status


@pytest.mark.parametrize(
    ("sent", "start"),
    [
        (NOWHERE + b"Content-Length: 1\r\n\r\n{", b"HTTP/1.1 404 "),
        (NOWHERE + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc0\r\n\r\n", b"HTTP/1.1 404 "),
        (POST + b"Content-Length: 9999999\r\n\r\n", b"HTTP/1.1 413 "),
        (b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\nmore", b"HTTP/1.1 200 "),
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 "),
    ],
)
def test_an_answer_arrives_whatever_was_not_read(
    service: Service, opened: ExitStack, sent: bytes, start: bytes
) -> None:
    """Once: nothing of a body is taken for the next request."""
    raw = connected(service, opened, sent)
    raw.shutdown(socket.SHUT_WR)
    answer = everything(raw)
    assert answer.startswith(start)
    assert answer.count(b"HTTP/1.") == 1


def test_half_a_head_is_judged_by_what_there_is_of_it(service: Service, opened: ExitStack) -> None:
    """When its client sends no more: a line that is wrong is said to be, the rest is left alone."""
    for sent, start in ((b"GARBAGE\r\n", b"HTTP/1.1 400 "), (b"GET / HT", b"")):
        raw = connected(service, opened, sent)
        raw.shutdown(socket.SHUT_WR)
        assert everything(raw)[:13] == start


def test_a_stop_waits_for_what_has_begun(service: Service, opened: ExitStack) -> None:
    """A request of which a part is there is answered, the connection of an idle client closed."""
    body = b'{"name": "Late"}'
    half = connected(service, opened, POST + b"Content-Length: 16\r\n\r\n" + body[:8])
    idle = connected(service, opened)
    kept = connected(service, opened, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert _answer(kept) == 200
    assert not _refuses(service)
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: _refuses(service))
    half.sendall(body[8:])
    assert everything(half).startswith(b"HTTP/1.1 201 ")
    assert everything(idle) == everything(kept) == b""
    assert service.process.wait(60) == 0


def _refuses(service: Service) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", service.port), 1):
            return False
    except OSError:
        return True


@pytest.fixture
def idler() -> Iterator[Worker]:
    """A worker that does nothing by itself."""
    config = Config()
    idler = Worker(1, 1, [], None, 30, config, Logger(config))
    idler.poller = selectors.DefaultSelector()
    with closing(idler.poller):
        yield idler
        idler.murder_keepalived(force=True)
    idler.tmp.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection: the server's and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        return listener.accept()[0], theirs


def waiting(idler: Worker, sent: bytes = b"") -> tuple[Connection, socket.socket]:
    """Return a connection that waits for its request, and its client, who has sent something."""
    mine, theirs = pair()
    theirs.sendall(sent)
    connection = Connection(idler.cfg, mine, ("127.0.0.1", 1), idler.longest_body)
    idler.nr_conns += 1
    idler._await_request(connection)
    return connection, theirs


def has_come(raw: socket.socket) -> bool:
    """Tell whether anything has, or an end."""
    return bool(select.select([raw], [], [], 0)[0])


def reset(client: socket.socket) -> None:
    """Have a client go away without a word."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read(idler: Worker, connection: Connection) -> None:
    """Have a worker read what a client has sent, once it has come."""
    eventually(lambda: has_come(connection.socket))
    idler._read(connection)


class Full:
    """A listener that cannot accept."""

    def __init__(self, number: int) -> None:
        self.number = number

    def accept(self) -> Any:
        raise OSError(self.number, "no")


@pytest.mark.parametrize(
    ("sent", "start"),
    [
        (b"GET /" + b"x" * 9000, b"HTTP/1.1 414 "),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 400 "),
        (POST + b"Content-Length: 500\r\n\r\n{", b"HTTP/1.1 400 "),
    ],
)
def test_what_no_thread_is_to_see_is_refused(idler: Worker, sent: bytes, start: bytes) -> None:
    """A head without an end, a body that is malformed, and one that breaks off."""
    connection, client = waiting(idler, sent)
    with client:
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: idler._read(connection) or bool(connection.ends))
        assert everything(client).startswith(start)
    assert connection.lingers


def test_a_client_that_ends_without_a_request_is_let_go(idler: Worker) -> None:
    """Nothing is to be said to it."""
    connection, client = waiting(idler)
    with client:
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: idler._read(connection) or connection not in idler.waiting)
        assert everything(client) == b""
    assert idler.nr_conns == 0


def test_without_file_descriptors_the_oldest_makes_room(idler: Worker) -> None:
    """Nor does any other error of accept end the worker."""
    (first, client), (second, other) = waiting(idler), waiting(idler)
    with client, other:
        idler.accept(Full(errno.ECONNABORTED))
        assert list(idler.waiting) == [first, second]
        idler.accept(Full(errno.EMFILE))
        assert list(idler.waiting) == [second]
        assert client.recv(1) == b""
        idler.accept(Full(errno.ENFILE))
        idler.accept(Full(errno.ENFILE))
        assert idler.nr_conns == 0


def test_connections_that_hold_much_are_few(idler: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has for longest is given up, with an answer if it can still have one."""
    monkeypatch.setattr(worker, "MOST_LARGE", 1)
    much = POST + b"Content-Length: 1000000\r\n\r\n" + b" " * 2 * LARGE
    (first, client), (second, other), (third, last) = (waiting(idler, much) for _ in range(3))
    with client, other, last:
        for connection in (first, second):
            while connection.held <= LARGE:
                idler._read(connection)
        assert everything(client).startswith(b"HTTP/1.1 503 ")
        assert list(idler.large) == [second]
        second.forget_request()
        second.sock.sendall(b"x" * 50_000_000)
        idler._wait_no_more(second)
        idler._send(second)
        idler._write(second)
        idler._write(second)
        assert second in idler.waiting
        while third.held <= LARGE:
            idler._read(third)
        assert list(idler.large) == [third]
        assert len(everything(other)) < 50_000_000


def test_the_next_request_is_awaited_once_an_answer_is_taken(idler: Worker) -> None:
    """However many times the socket was full until then."""
    connection, client = waiting(idler, b"")
    with client:
        connection.sock.sendall(b"x" * 50_000_000)
        idler._wait_no_more(connection)
        idler._send(connection)
        received = 0
        while connection.sock.left:
            idler._write(connection)
            received += len(client.recv(1 << 20))
        while received < 50_000_000:
            received += len(client.recv(1 << 20))
        assert idler.waiting[connection] == idler._read
        assert not idler.large


def test_a_client_that_goes_away_is_let_go(idler: Worker) -> None:
    """While it sends, waits to be told to go on, has an answer coming, or should hang up."""
    (sending, client), (told, other), (answered, third), (ending, last) = (
        waiting(idler, sent)
        for sent in (b"", POST + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n", b"G", b"G")
    )
    reset(client)
    read(idler, sending)
    told.socket.shutdown(socket.SHUT_WR)
    read(idler, told)
    read(idler, answered)
    reset(third)
    eventually(lambda: has_come(answered.socket))
    idler._refuse(answered, RequestTimeout())
    assert list(idler.waiting) == [ending]
    read(idler, ending)
    idler._refuse(ending, RequestTimeout())
    idler._discard(ending)
    assert list(idler.waiting) == [ending]
    last.sendall(b"more")
    eventually(lambda: has_come(ending.socket))
    idler._discard(ending)
    assert list(idler.waiting) == [ending]
    reset(last)
    eventually(lambda: has_come(ending.socket))
    idler._discard(ending)
    assert not idler.waiting
    assert idler.nr_conns == 0
    other.close()


def test_who_had_to_make_room_is_not_read_from(idler: Worker) -> None:
    """Though the news that it has sent something came together with the one that took its place."""
    (first, client), (second, other) = (waiting(idler, b"GET") for _ in range(2))
    with client, other:
        eventually(lambda: len(idler.poller.select(0)) == 2)
        events = idler.poller.select(0)
        idler.accept(Full(errno.EMFILE))
        for key, _ in events:
            key.data(key.fileobj)
        assert list(idler.waiting) == [second]
        assert second.held == 3
        assert first.held == 0
        assert idler.nr_conns == 1


def test_an_answer_that_breaks_off_is_not_sent(idler: Worker) -> None:
    """Not the part that is there either; nor does a thread wait for the client to hang up."""

    def breaks_off(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"some"
        raise LookupError

    idler.wsgi = breaks_off
    connection, client = waiting(idler, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with client:
        eventually(lambda: has_come(connection.socket))
        connection.receive()
        assert connection.next_request()
        idler._wait_no_more(connection)
        work: Future[bool] = Future()
        work.set_result(idler.handle(connection))
        idler.finish_request(connection, work)
        assert everything(client) == b""


def test_what_waits_to_be_accepted_is_taken_before_the_stop(idler: Worker) -> None:
    """All of it, and the listener is closed then."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    idler.sockets = [listener]
    idler.set_accept_enabled(True)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    idler.alive = False
    idler.set_accept_enabled(False)
    assert idler.nr_conns == len(idler.waiting) == 3
    assert listener.fileno() == -1
    for client in clients:
        client.close()


def test_tls_has_to_end_elsewhere() -> None:
    """The start stops with one line."""
    config = Config()
    config.set("certfile", "cert.pem")
    with pytest.raises(SystemExit, match="TLS has to end at a proxy"):
        Worker.check_config(config, None)
    Worker.check_config(Config(), None)
