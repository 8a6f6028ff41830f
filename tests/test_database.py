"""A database is created where it is missing, and nothing else is ever taken for "missing"."""

from __future__ import annotations

import itertools
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url, text

from migrations_bootstrap import connection as connection_module
from migrations_bootstrap import database as database_module
from migrations_bootstrap import ensure_database
from migrations_bootstrap.connection import addresses, connected, make_engine, postgres_url
from migrations_bootstrap.errors import (
    AccessRefused,
    BootstrapError,
    DatabaseMissing,
    ServerUnreachable,
)
from tests.races import together

numbers = itertools.count(1)


@pytest.fixture
def make_role(administrator: Engine) -> Callable[[str], str]:
    """Make roles with the options given."""

    def make(options: str) -> str:
        name = f"role_{next(numbers)}"
        with administrator.connect() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {name} {options}")
        return name

    return make


@pytest.fixture
def no_maintenance(administrator: Engine) -> Iterator[None]:
    """Keep ordinary roles out of the maintenance databases."""
    with administrator.connect() as connection:
        connection.exec_driver_sql("REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC")
        yield
        connection.exec_driver_sql("GRANT CONNECT ON DATABASE postgres, template1 TO PUBLIC")


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="rollcall-"))
    yield folder
    shutil.rmtree(folder)


def as_role(url: str, role: str) -> URL:
    return make_url(url).set(username=role)


def query(url: str | URL, statement: str) -> Any:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return connection.scalar(text(statement))


@contextmanager
def false_server(folder: Path, answer: bytes) -> Iterator[URL]:
    """Answer everybody who connects with the same bytes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/.s.PGSQL.5432")
    listener.listen()

    def serve() -> None:
        while True:
            client, _ = listener.accept()
            with client:
                if not client.recv(1000):
                    return
                client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield make_url(f"postgresql://somebody:secret@/some?host={folder}")
    with socket.socket(socket.AF_UNIX) as last:
        last.connect(f"{folder}/.s.PGSQL.5432")
    thread.join()
    listener.close()


def lose(connection: Connection, administrator: Engine) -> None:
    """Have the server end the session, and find out."""
    pid = connection.scalar(text("SELECT pg_backend_pid()"))
    with administrator.connect() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    connection.scalar(text("SELECT 1"))


def error_response(sqlstate: str) -> bytes:
    body = b"".join(
        field + b"\0" for field in (b"SFATAL", b"C" + sqlstate.encode(), b"Mcannot now", b"")
    )
    return b"E" + struct.pack("!i", len(body) + 4) + body


def test_a_missing_database_is_created_and_the_next_call_finds_it(empty_database: str) -> None:
    """It says True the one time, and False from then on."""
    assert [ensure_database(empty_database) for _ in range(2)] == [True, False]
    assert query(empty_database, "SHOW server_encoding") == "UTF8"


def test_owner_encoding_and_template_can_be_given(
    make_role: Callable[[str], str], empty_database: str
) -> None:
    """They reach CREATE DATABASE as they are."""
    owner = make_role("LOGIN")
    assert ensure_database(empty_database, owner=owner, encoding="SQL_ASCII", template="template0")
    assert query(empty_database, "SHOW server_encoding") == "SQL_ASCII"
    owned = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    assert query(empty_database, owned) == owner


@pytest.mark.parametrize(
    "name",
    ["with space", 'quo"te', "per%cent %s %(x)s", "col:on", "Grün ☃", "semi;colon--", "ö" * 31],
)
def test_any_name_is_quoted(administrator: Engine, server_url: str, name: str) -> None:
    """Neither SQL nor the driver's placeholders read anything into a name."""
    url = make_url(server_url).set(database=name)
    assert ensure_database(url)
    assert query(url, "SELECT current_database()") == name
    with administrator.connect() as connection:
        quoted = connection.dialect.identifier_preparer.quote_identifier(name)
        connection.exec_driver_sql(f"DROP DATABASE {quoted}")


def test_a_name_may_have_63_bytes_and_no_more(administrator: Engine, server_url: str) -> None:
    """PostgreSQL would cut a longer one off, and lead to somebody else's database."""
    with pytest.raises(BootstrapError, match="longer than 63 bytes"):
        ensure_database(make_url(server_url).set(database="ö" * 32))
    with pytest.raises(BootstrapError, match="longer than 63 bytes"):
        ensure_database(server_url, owner="o" * 64)
    assert ensure_database(make_url(server_url).set(database="n" * 63))
    with administrator.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {'n' * 63}")


def test_creators_that_all_found_it_missing_make_it_once(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight says that it was the one; the others were refused by PostgreSQL and go on."""
    barrier = threading.Barrier(8)
    create = database_module.send_creation
    returned = []

    def create_together(*arguments: Any) -> bool:
        barrier.wait()
        returned.append(create(*arguments))
        return returned[-1]

    monkeypatch.setattr(database_module, "send_creation", create_together)
    outcomes = together([lambda: ensure_database(empty_database)] * 8)
    assert sorted(returned) == [False] * 7 + [True]
    assert sorted(outcomes) == [False] * 7 + [True]


def test_a_database_made_between_probe_and_look_up_is_there(
    empty_database: str, administrator: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Being in pg_database after a failed probe is no error as long as a second probe succeeds."""
    look = database_module._create_if_absent

    def look_late(connection: Any, url: URL, *arguments: Any) -> bool:
        connection.exec_driver_sql(f"CREATE DATABASE {url.database}")
        return look(connection, url, *arguments)

    monkeypatch.setattr(database_module, "_create_if_absent", look_late)
    assert ensure_database(empty_database) is False


def test_a_template_in_use_is_waited_for(
    server_url: str, empty_database: str, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """55006 is tried again, until whoever uses the template has left."""
    url = make_url(fresh_database).set(database=f"copy_{next(numbers)}")
    user = create_engine(fresh_database, poolclass=NullPool).connect()
    naps = []

    def leave(seconds: float) -> None:
        naps.append(seconds)
        user.close()

    monkeypatch.setattr(time, "sleep", leave)
    assert ensure_database(url, template=str(make_url(fresh_database).database))
    assert naps


def test_a_template_in_use_is_not_waited_for_without_end(
    fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the bound it is one clear line."""
    monkeypatch.setattr(database_module, "TEMPLATE_WAIT", 0)
    url = make_url(fresh_database).set(database="never_made")
    with (
        create_engine(fresh_database, poolclass=NullPool).connect(),
        pytest.raises(DatabaseMissing, match="is being accessed by other users"),
    ):
        ensure_database(url, template=str(make_url(fresh_database).database))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"owner": "nobody_of_this_name"}, 'role "nobody_of_this_name" does not exist'),
        ({"encoding": "KLINGON"}, "KLINGON is not a valid encoding name"),
        ({"template": "no_such_template"}, 'template database "no_such_template" does not exist'),
    ],
)
def test_what_create_database_refuses_is_one_clear_line(
    empty_database: str, options: dict[str, str], line: str
) -> None:
    """The server's own words, after which database it is about."""
    with pytest.raises(DatabaseMissing) as caught:
        ensure_database(empty_database, **options)
    assert str(caught.value).endswith(line)
    assert str(make_url(empty_database).database) in str(caught.value)


def test_a_role_that_may_not_create_needs_the_database_to_be_there(
    make_role: Callable[[str], str], empty_database: str
) -> None:
    """Without CREATEDB it is told what is missing, and starts well once it is there."""
    url = as_role(empty_database, make_role("LOGIN"))
    with pytest.raises(DatabaseMissing, match="permission denied to create database"):
        ensure_database(url)
    ensure_database(empty_database)
    assert ensure_database(url) is False


@pytest.mark.usefixtures("no_maintenance")
def test_a_role_without_maintenance_databases_starts_where_its_own_is_there(
    make_role: Callable[[str], str], empty_database: str
) -> None:
    """The target is asked first; where it is missing, what *it* said is what is told."""
    url = as_role(empty_database, make_role("LOGIN CREATEDB"))
    with pytest.raises(AccessRefused, match=f'database "{url.database}" does not exist'):
        ensure_database(url)
    ensure_database(empty_database)
    assert ensure_database(url) is False


def test_template1_serves_where_postgres_is_closed(
    administrator: Engine, make_role: Callable[[str], str], empty_database: str
) -> None:
    """Some hosts close `postgres`; the other maintenance database does as well."""
    url = as_role(empty_database, make_role("LOGIN CREATEDB"))
    with administrator.connect() as connection:
        connection.exec_driver_sql("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
        try:
            assert ensure_database(url) is True
        finally:
            connection.exec_driver_sql("GRANT CONNECT ON DATABASE postgres TO PUBLIC")


def test_a_database_that_lets_nobody_in_is_not_taken_for_missing(
    administrator: Engine, make_role: Callable[[str], str], fresh_database: str
) -> None:
    """It is in pg_database, so the answer is why this role is refused."""
    url = as_role(fresh_database, make_role("LOGIN CREATEDB"))
    with administrator.connect() as connection:
        connection.exec_driver_sql(f"REVOKE CONNECT ON DATABASE {url.database} FROM PUBLIC")
    with pytest.raises(AccessRefused, match="permission denied for database"):
        ensure_database(url)


def test_an_unknown_role_is_refused_not_unreachable(empty_database: str) -> None:
    """A wrong name or password must not read as an outage; and it creates nothing."""
    with pytest.raises(AccessRefused, match='role "nobody_here" does not exist'):
        ensure_database(as_role(empty_database, "nobody_here"))


def test_a_role_that_may_not_log_in_is_refused(
    make_role: Callable[[str], str], empty_database: str
) -> None:
    """The same for a role that is there."""
    with pytest.raises(AccessRefused, match="is not permitted to log in"):
        ensure_database(as_role(empty_database, make_role("NOLOGIN")))


def test_a_closed_port_is_an_outage_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by TCP: one line with the address, no password, and no waiting."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ServerUnreachable) as caught:
        ensure_database(f"postgresql://somebody:secret@127.0.0.1:{port}/some?password=hidden")
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_an_outage_within_the_timeout() -> None:
    """One connect_timeout for each host, and not for each database that could be tried."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ServerUnreachable):
            ensure_database(f"postgresql://somebody@127.0.0.1:{port}/some", connect_timeout=2)
        silent.setblocking(False)
        asked = []
        with suppress(BlockingIOError):
            while True:
                asked.append(silent.accept()[0])
    for connection in asked:
        connection.close()
    assert len(asked) == 2  # the driver, and the look at why it failed


def test_one_live_host_among_several_is_enough(empty_database: str) -> None:
    """libpq goes on to the next host, and so does telling missing from unreachable."""
    url = make_url(empty_database)
    folder = str(url.query["host"])
    several = url.set(query={"host": f"/nowhere,{folder}", "port": "5432,5432"})
    assert [ensure_database(several) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (error_response("57P03"), ServerUnreachable),
        (error_response("53300"), ServerUnreachable),
        (error_response("28P01"), AccessRefused),
        (b"E\0\0\0\x09SERR\0", AccessRefused),
        (b"E\0", ServerUnreachable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ServerUnreachable),
        (b"", ServerUnreachable),
    ],
    ids=["starting up", "too many clients", "password", "no code", "cut short", "http", "nothing"],
)
def test_what_the_server_says_first_tells_an_outage_from_a_refusal(
    socket_folder: Path, answer: bytes, meaning: type[BootstrapError]
) -> None:
    """By its SQLSTATE, which libpq does not hand on, and not by the words."""
    with false_server(socket_folder, answer) as url, pytest.raises(meaning) as caught:
        ensure_database(url)
    assert type(caught.value) is meaning
    assert "secret" not in str(caught.value)


def test_addresses_are_those_that_libpq_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the URL, several hosts too, else from the environment, else libpq's defaults."""

    def of(url: str) -> list[tuple[str, str]]:
        return addresses(make_engine(url, 5))

    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.delenv("PGPORT", raising=False)
    assert of("postgresql://u@h/d") == [("h", "5432")]
    assert of("postgresql://u@/d?host=h:1&host=i:2") == [("h", "1"), ("i", "2")]
    assert of("postgresql://u@/d?host=h,i") == [("h", "5432"), ("i", "5432")]
    assert ("localhost", "5432") in of("postgresql:///d")
    monkeypatch.setenv("PGHOST", "there")
    monkeypatch.setenv("PGPORT", "99")
    assert of("postgresql:///d") == [("there", "99")]


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_postgresql_scheme_means_psycopg2(scheme: str) -> None:
    """A URL object or text, whatever driver it was meant for."""
    assert postgres_url(f"{scheme}://u@h/d").drivername == "postgresql+psycopg2"
    assert postgres_url(URL.create(scheme, host="h")).drivername == "postgresql+psycopg2"


def test_other_databases_are_refused() -> None:
    """One dialect, one behaviour."""
    with pytest.raises(BootstrapError, match="needs PostgreSQL, not sqlite"):
        ensure_database("sqlite://")


def test_an_older_server_is_refused(fresh_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lacks is told by its version, not by a syntax error on the way."""
    monkeypatch.setattr(connection_module, "OLDEST_SERVER", 99)
    with pytest.raises(BootstrapError, match="PostgreSQL 99 or newer is needed, this is 1"):
        ensure_database(fresh_database)


def test_a_connection_lost_on_the_way_is_an_outage(
    fresh_database: str, administrator: Engine
) -> None:
    """No SQLSTATE comes with it, and no word decides."""
    with (
        pytest.raises(ServerUnreachable, match="the connection was lost"),
        connected(make_engine(fresh_database, 5)) as connection,
    ):
        lose(connection, administrator)
