"""The whole way up, by any number of processes at once, and up again without a change."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, text

from migrations_bootstrap import (
    Bootstrap,
    ServerUnreachable,
    bootstrap,
    converge_indexes,
    is_current,
    upgrade,
)
from migrations_bootstrap.connection import connected, make_engine
from migrations_bootstrap.errors import LockTimeout
from migrations_bootstrap.lock import Wait, bootstrap_lock, watched
from tests.races import eventually, together

KEYS = {"department": ("name",), "employee": ("department_id", "name")}
PROCESSES = 8
ROUNDS = 2


@pytest.fixture
def engine(fresh_database: str) -> Engine:
    """An engine on an empty database."""
    return create_engine(fresh_database, poolclass=NullPool)


def bring_up(barrier: Any, outcomes: Any, urls: list[str]) -> None:
    """Be one process of many: bring each database up when all are there to do the same."""
    for url in urls:
        barrier.wait()
        done = bootstrap(url, KEYS)
        outcomes.put(
            (url, done.created, bool(done.upgrade.changes), any(t.actions for t in done.tables))
        )


def test_an_empty_cluster_is_brought_up_and_the_second_run_changes_nothing(
    empty_database: str,
) -> None:
    """It says what it did, and then that there was nothing to do."""
    first = bootstrap(empty_database, KEYS)
    assert (first.created, first.changed) == (True, True)
    assert first.upgrade.changes == (
        "created table department",
        "created table employee",
        "created the journal of merges",
        "created the table of tokens",
        "created the registry of tenants",
    )
    assert [table.guard for table in first.tables] == [True, True]
    second = bootstrap(empty_database, KEYS, adopt=True, count=True)
    assert (second.created, second.changed) == (False, False)
    assert [table.census and table.census.rows for table in second.tables] == [0, 0]
    assert is_current(empty_database)


def test_processes_bring_an_empty_cluster_up_at_once(empty_database: str, server_url: str) -> None:
    """Eight of them, over two rounds: none fails, and each step is done by one of them."""
    urls = [
        empty_database,
        *(f"{empty_database}".replace("missing", f"again_{n}") for n in range(1, ROUNDS)),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # instead of eight times the same imports
    barrier, outcomes = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=bring_up, args=(barrier, outcomes, urls)) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    said = [outcomes.get(timeout=60) for _ in range(PROCESSES * ROUNDS)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    for url in urls:
        done = [outcome[1:] for outcome in said if outcome[0] == url]
        assert [sum(step) for step in zip(*done, strict=True)] == [1, 1, 1]
    drop_all(server_url, urls[1:])


def drop_all(server_url: str, urls: list[str]) -> None:
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for url in urls:
            connection.exec_driver_sql(f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')


def test_a_legacy_database_is_adopted_with_its_duplicates(engine: Engine) -> None:
    """Two bare tables with a hundred groups of duplicates: served, and not a row changed."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE department (id int, name varchar(50));"
            "CREATE TABLE employee (id int, department_id int, name varchar(50));"
            "INSERT INTO department SELECT n, 'd' || n FROM generate_series(1, 5) AS n;"
            "INSERT INTO employee SELECT n, 1, 'e' || (n %% 100) FROM generate_series(1, 200) AS n"
        )
        before = list(connection.execute(text("SELECT xmin, ctid, id, name FROM employee")))
    done = bootstrap(engine.url, KEYS, adopt=True, count=True)
    assert done.changed
    assert done.upgrade.adopted == ("department", "employee")
    department, employee = done.tables
    assert (department.guard, employee.guard, employee.lookup) == (True, False, True)
    assert employee.census is not None
    assert (employee.census.groups, employee.census.redundant) == (100, 100)
    with engine.connect() as connection:
        assert before == list(connection.execute(text("SELECT xmin, ctid, id, name FROM employee")))
    assert not bootstrap(engine.url, KEYS, adopt=True, count=True).changed


def test_threads_that_wait_for_the_lock_are_let_in_one_by_one(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Each says once that it waits, and finds the work done."""
    caplog.set_level(logging.INFO)
    done: list[Any] = []
    with bootstrap_lock(make_engine(engine.url, 5), 5):
        thread = threading.Thread(
            target=lambda: done.extend(together([lambda: bootstrap(engine.url, KEYS)] * 4))
        )
        thread.start()
        eventually(lambda: waiters(caplog) == 4)
    thread.join()
    assert sorted(outcome.changed for outcome in done) == [False, False, False, True]
    assert waiters(caplog) == 4


def waiters(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.msg.startswith("bootstrap_waiting") for record in caplog.records)


def test_waiting_for_the_lock_has_an_end(engine: Engine) -> None:
    """The line says who holds it."""
    bootstrap_engine = make_engine(engine.url, 5)
    with (
        bootstrap_lock(bootstrap_engine, 5),
        pytest.raises(LockTimeout, match=r"not done after 0.2 s: pid \d+ \(rollcall-bootstrap"),
    ):
        upgrade(engine.url, lock_timeout=0.2)
    assert not is_current(engine.url)


@pytest.mark.usefixtures("many_waiters")
def test_an_index_build_waits_neither_for_the_holder_nor_for_those_who_wait(
    engine: Engine,
) -> None:
    """None of them has a snapshot for longer than a look at the lock takes."""
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (id int)")
        connection.commit()
    builder = engine.execution_options(isolation_level="AUTOCOMMIT")
    with builder.connect() as connection:
        connection.exec_driver_sql("SET lock_timeout = '60s'")
        connection.exec_driver_sql("CREATE INDEX CONCURRENTLY i ON t (id) WHERE id IS NOT NULL")


@pytest.fixture
def many_waiters(engine: Engine, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """One who holds the lock, and four who wait for it."""
    caplog.set_level(logging.INFO)
    with bootstrap_lock(make_engine(engine.url, 5), 5):
        thread = threading.Thread(
            target=together, args=([lambda: converge_indexes(engine.url, {})] * 4,)
        )
        thread.start()
        eventually(lambda: waiters(caplog) == 4)
        yield
    thread.join()


def test_the_time_outs_of_the_role_do_not_take_the_lock_away(engine: Engine) -> None:
    """An idle transaction is what they are made to end."""
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE drowsy LOGIN SUPERUSER")
        for setting in ("idle_in_transaction_session_timeout", "statement_timeout"):
            connection.exec_driver_sql(f"ALTER ROLE drowsy SET {setting} = '200ms'")
        connection.commit()
    url = engine.url.set(username="drowsy")
    with bootstrap_lock(make_engine(url, 5), 5):
        eventually(lambda: idle_for_longer_than(engine, "400 ms"))


def idle_for_longer_than(engine: Engine, age: str) -> bool:
    with engine.connect() as connection:
        statement = text(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            " AND usename = 'drowsy' AND clock_timestamp() - state_change > CAST(:age AS interval)"
        )
        return bool(connection.scalar(statement, {"age": age}))


def test_a_lock_that_was_lost_on_the_way_is_an_error(engine: Engine) -> None:
    """Somebody else may have been at work at the same time."""
    with pytest.raises(ServerUnreachable), bootstrap_lock(make_engine(engine.url, 5), 5):
        end_bootstraps(engine)


def end_bootstraps(engine: Engine) -> None:
    """End the sessions of every bootstrap of this database."""
    ended = count(
        engine,
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
        " WHERE application_name = 'rollcall-bootstrap' AND datname = current_database()",
    )
    assert ended == 1


def test_a_watch_that_cannot_connect_disturbs_nobody(engine: Engine) -> None:
    """It is there for the log; the statement it looks after goes on."""
    asked = threading.Event()

    nowhere = make_engine("postgresql://somebody@/some?host=/nowhere", 5)
    wait = Wait()

    def refuse(*arguments: Any) -> None:
        asked.set()

    event.listen(nowhere, "do_connect", refuse)
    with (
        connected(make_engine(engine.url, 5)) as connection,
        watched(nowhere, connection, "a test", 0.01, wait),
    ):
        assert asked.wait(60)
        assert connection.scalar(text("SELECT 1")) == 1
    assert wait.blockers == ""


KILLED = """
import sys
from migrations_bootstrap import bootstrap
bootstrap(sys.argv[1], {"department": ("name",)})
"""


def test_a_bootstrap_killed_in_the_middle_of_a_build_is_repaired(engine: Engine) -> None:
    """The build goes on in the server for a while; the next one waits for it or takes its place."""
    upgrade(engine.url)
    url = engine.url.render_as_string(hide_password=False)
    with engine.connect() as writer:
        writer.exec_driver_sql("INSERT INTO department (name) VALUES ('Sales')")
        killed = subprocess.Popen([sys.executable, "-c", KILLED, url])
        eventually(lambda: invalid(engine) == 1)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        done: list[Bootstrap] = []
        thread = threading.Thread(target=lambda: done.append(bootstrap(url, KEYS)))
        thread.start()
        eventually(lambda: queued(engine) == 2)
        writer.commit()
        thread.join()
    assert [table.guard for table in done[0].tables] == [True, True]
    assert invalid(engine) == 0


def invalid(engine: Engine) -> int:
    return count(engine, "SELECT count(*) FROM pg_index WHERE NOT indisvalid")


def queued(engine: Engine) -> int:
    """Return how many sessions of a bootstrap wait for a lock."""
    return count(
        engine,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database() AND application_name = 'rollcall-bootstrap'",
    )


def count(engine: Engine, statement: str) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text(statement)) or 0)
