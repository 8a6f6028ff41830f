"""What can go wrong around the service, brought about on purpose."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from sqlalchemy import Engine, NullPool, create_engine, make_url

from migrations_bootstrap import keeper
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import empty
from tests.load import Load, under_load
from tests.races import eventually, terminate_backends
from tests.serving import Service


@dataclass(frozen=True)
class Site:
    """A service that runs, and its database."""

    service: Service
    url: str

    @property
    def engine(self) -> Engine:
        """An engine that keeps no connection, for the test's own statements."""
        return create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def execute(self, sql: str) -> Any:
        """Run statements as superuser; return the first value of a query."""
        with self.engine.connect() as connection:
            result = connection.exec_driver_sql(sql)
            return result.scalar() if result.returns_rows else None

    @contextmanager
    def under_load(self, clients: int = 8) -> Iterator[Load]:
        """Put load on the service; the database is empty at first."""
        empty(self.url)
        with under_load(self.service, clients) as load:
            yield load


def kill_postmaster(server: EmbeddedServer) -> None:
    """End the server as a power cut would; return when it is back."""
    postmaster = int(keeper.postmaster_file(str(server.home))[0])
    os.kill(postmaster, signal.SIGKILL)
    eventually(lambda: keeper.postmaster_file(str(server.home))[:1] != [str(postmaster)])
    server.attach()


def workers_of(service: Service) -> list[psutil.Process]:
    """Return gunicorn's workers, the oldest first."""
    children = psutil.Process(service.process.pid).children()
    return sorted(children, key=lambda child: child.create_time())


def kill_worker(service: Service) -> None:
    """Kill the oldest worker; return when gunicorn has replaced it."""
    before = workers_of(service)
    before[0].kill()
    eventually(lambda: len(set(workers_of(service)) - set(before)) == 1)


def reload(service: Service) -> None:
    """Have gunicorn replace all its workers; return when the old ones are gone."""
    before = set(workers_of(service))
    service.process.send_signal(signal.SIGHUP)
    eventually(lambda: not before & set(workers_of(service)))


def terminate_one_in_two(site: Site) -> int:
    """Cut about half of the service's connections, at random; return how many."""
    return int(
        site.execute(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
            " WHERE application_name = 'rollcall' AND datname = current_database()"
            " AND random() < 0.5"
        )
    )


@contextmanager
def locked(site: Site, table: str) -> Iterator[None]:
    """Hold a lock that lets nobody else read or write the table."""
    with site.engine.connect() as connection:
        connection.exec_driver_sql(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        connection.exec_driver_sql("ROLLBACK")


@contextmanager
def read_only_server(site: Site) -> Iterator[None]:
    """Have the whole server refuse writes, on connections old and new."""
    site.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    site.execute("SELECT pg_reload_conf()")
    yield
    site.execute("ALTER SYSTEM RESET default_transaction_read_only")
    site.execute("SELECT pg_reload_conf()")


@contextmanager
def read_only_newcomers(site: Site) -> Iterator[None]:
    """Have connections refuse writes that are made meanwhile, for as long as they live.

    So does a standby's to which the service was led by mistake, or until it was promoted.
    """
    database = make_url(site.url).database
    site.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    terminate_backends(site.engine)
    yield
    site.execute(
        f"SET TRANSACTION READ WRITE; ALTER DATABASE {database} RESET default_transaction_read_only"
    )


@contextmanager
def full_disk(site: Site, sqlstate: str = "53100") -> Iterator[None]:
    """Have each insert of an employee fail as it does where no room is left."""
    site.execute(NO_ROOM.format(sqlstate=sqlstate))
    yield
    site.execute("DROP TRIGGER no_room ON employee; DROP FUNCTION no_room()")


@contextmanager
def slow_inserts(site: Site, table: str) -> Iterator[None]:
    """Have others look before a row is committed, also where one processor does all the work."""
    site.execute(TAKES_TIME.format(table=table))
    try:
        yield
    finally:
        site.execute(f"DROP TRIGGER takes_time ON {table}; DROP FUNCTION takes_time()")


TAKES_TIME = """
CREATE FUNCTION takes_time() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM pg_sleep(0.05);
  RETURN NEW;
END $$;
CREATE TRIGGER takes_time BEFORE INSERT ON {table}
  FOR EACH ROW EXECUTE FUNCTION takes_time();
"""
NO_ROOM = """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  RAISE 'could not extend file: No space left on device' USING ERRCODE = '{sqlstate}';
END $$;
CREATE TRIGGER no_room BEFORE INSERT ON employee FOR EACH ROW EXECUTE FUNCTION no_room();
"""
