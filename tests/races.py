"""Make races happen, rather than hope for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, text

INSERTS_WAIT = """
CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$;
CREATE TRIGGER wait BEFORE {event} ON {table} FOR EACH ROW WHEN ({which})
EXECUTE FUNCTION wait_for_the_test();
"""
INSERTS_WAIT_NO_MORE = "DROP TRIGGER wait ON {table}; DROP FUNCTION wait_for_the_test();"
WAITING = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")


class Gate:
    """Holds inserts back that have done their look-up."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = engine.connect()
        self.lock.exec_driver_sql("SELECT pg_advisory_lock(1)")

    def wait_for(self, count: int) -> None:
        """Wait until so many inserts are held."""
        eventually(lambda: waiting(self.engine) == count)

    def open(self) -> None:
        """Let them go on, and whatever comes later."""
        self.lock.exec_driver_sql("SELECT pg_advisory_unlock(1)")


@contextmanager
def inserts_held(
    engine: Engine, table: str, which: str = "true", event: str = "INSERT"
) -> Iterator[Gate]:
    """Hold back what is inserted into the table, or some of it, until the gate is opened."""
    with engine.begin() as connection:
        connection.exec_driver_sql(INSERTS_WAIT.format(table=table, which=which, event=event))
    gate = Gate(engine)
    yield gate
    gate.lock.close()
    with engine.begin() as connection:
        connection.exec_driver_sql(INSERTS_WAIT_NO_MORE.format(table=table))


@contextmanager
def inserts_meet(engine: Engine, table: str, count: int, which: str = "true") -> Iterator[None]:
    """Hold inserts back, all or some, until ``count`` of them have all done their look-up."""

    def open_when_all_are_there() -> None:
        gate.wait_for(count)
        gate.open()

    with inserts_held(engine, table, which) as gate:
        opener = threading.Thread(target=open_when_all_are_there)
        opener.start()
        yield
        opener.join()


def waiting(engine: Engine) -> int:
    """Return how many sessions wait for the test."""
    with engine.connect() as connection:
        return int(connection.scalar(WAITING) or 0)


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition holds; fail after a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run the tasks in threads of their own; return what each returned or raised."""
    outcomes: list[Any] = [None] * len(tasks)

    def run(number: int) -> None:
        try:
            outcomes[number] = tasks[number]()
        except Exception as error:  # the test looks at it
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def started(task: Callable[[], Any]) -> Callable[[], Any]:
    """Start a task in a thread; return what waits for it, and returns or raises what it does."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(task())
        except Exception as error:  # whoever waits for it gets it
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return lambda: outcome.result(60)


def commit_serializable(engine: Engine, count: int) -> None:
    """Commit so many serializable transactions that write, to a table of their own.

    Within the server, where two thousand take no longer than a hundredth of a second.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS filler (number int)")
        connection.exec_driver_sql("SET default_transaction_isolation = serializable")
        connection.exec_driver_sql(
            f"DO $$ BEGIN FOR number IN 1..{count} LOOP"
            " INSERT INTO filler VALUES (number); COMMIT; END LOOP; END $$"
        )
        connection.exec_driver_sql("RESET default_transaction_isolation; DROP TABLE filler")


def terminate_backends(engine: Engine) -> None:
    """Cut all connections of the service."""
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
            " WHERE application_name = 'rollcall'"
        )
