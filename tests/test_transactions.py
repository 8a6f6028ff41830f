"""The retry loop, what is retryable, and what a lost reply means."""

from __future__ import annotations

import logging
import socket
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.errors import ContentionError, DatabaseAway, LostRace
from app.transactions import (
    RetryPolicy,
    StatementText,
    backoff,
    connect,
    execute,
    execute_prepared,
    is_away,
    is_retryable,
    retry,
    run,
    sqlstate,
)
from migrations_bootstrap.connection import addresses, first_answer
from tests.proxy import lossy_proxy
from tests.races import together

POLICY = RetryPolicy(attempts=4, deadline=60, lock_timeout=60, wait_initial=0, wait_max=0)


def database_error(
    state: str | None = None, constraint: str | None = None, lost: bool = False
) -> DBAPIError:
    """Return an error as SQLAlchemy raises it for psycopg2."""
    original = Exception()
    original.pgcode = state  # type: ignore[attr-defined]
    original.diag = types.SimpleNamespace(constraint_name=constraint)  # type: ignore[attr-defined]
    return DBAPIError("SELECT", {}, original, connection_invalidated=lost)


def asyncpg_error(state: str) -> DBAPIError:
    original = Exception()
    original.sqlstate = state  # type: ignore[attr-defined]
    return DBAPIError("SELECT", {}, original)


@pytest.mark.parametrize(
    "error",
    [
        database_error("40001"),
        database_error("40P01"),
        database_error("55P03"),
        database_error("23505", "uq_t_natural_key"),
        database_error(lost=True),
        asyncpg_error("40001"),
        PoolTimeout(),
        DatabaseAway(),
        LostRace(),
    ],
)
def test_a_lost_race_and_a_lost_connection_are_retryable(error: Exception) -> None:
    """Running the whole again can help."""
    assert is_retryable(error, {"uq_t_natural_key"})


@pytest.mark.parametrize(
    "error",
    [
        database_error("23505", "uq_t_email"),
        database_error("23503"),
        database_error("57014"),
        database_error("40003"),
        database_error("42P01"),
        database_error(),
        ValueError(),
    ],
)
def test_other_errors_are_the_callers(error: Exception) -> None:
    """Running the whole again would only fail again, or is not known to be safe."""
    assert not is_retryable(error, {"uq_t_natural_key"})


def test_the_first_retry_is_at_once() -> None:
    """The victim of a serialization failure can succeed straight away."""
    assert backoff(1, RetryPolicy()) == 0


@given(retry_number=st.integers(2, 10_000), share=st.floats(0, 1))
def test_back_off_is_jitter_under_a_doubling_capped_bound(retry_number: int, share: float) -> None:
    """The wait is uniform from nothing to the bound."""
    policy = RetryPolicy(wait_initial=0.005, wait_max=0.5)
    bound = min(0.5, 0.005 * 2 ** min(retry_number - 2, 40))

    wait = backoff(retry_number, policy, lambda low, high: low + (high - low) * share)

    assert wait == pytest.approx(bound * share)


def test_retry_runs_again_until_it_works(caplog: pytest.LogCaptureFixture) -> None:
    """Two failures, then success; each retry is a warning with attempt and SQLSTATE."""
    calls = []

    def attempt(number: int) -> str:
        calls.append(number)
        if number < 3:
            raise database_error("40001")
        return "done"

    assert retry(attempt, POLICY) == "done"
    assert calls == [1, 2, 3]
    assert [(r.levelno, r.attempt, r.sqlstate) for r in caplog.records] == [  # type: ignore[attr-defined]
        (logging.WARNING, 1, "40001"),
        (logging.WARNING, 2, "40001"),
    ]


def test_retry_waits_in_between() -> None:
    """The back-off is slept, the first time not at all."""
    waits: list[float] = []

    def attempt(number: int) -> None:
        if number < 4:
            raise database_error("40001")

    retry(attempt, RetryPolicy(wait_initial=0.1, wait_max=0.1), sleep=waits.append)

    assert waits[0] == 0
    assert all(0 <= wait <= 0.1 for wait in waits)
    assert len(waits) == 3


def test_retry_gives_up_after_its_attempts() -> None:
    """ContentionError says how often, how long and what the last SQLSTATE was."""

    def attempt(number: int) -> None:
        raise database_error("40P01")

    with pytest.raises(ContentionError) as caught:
        retry(attempt, POLICY)

    assert caught.value.attempts == 4
    assert caught.value.sqlstate == "40P01"
    assert 0 <= caught.value.elapsed < 60
    assert isinstance(caught.value.__cause__, DBAPIError)


class Clock:
    """Time that passes only where it is slept, or a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that retries look at."""
    clock = Clock()
    monkeypatch.setattr("app.transactions.time", clock)
    return clock


def test_retry_gives_up_at_its_deadline(clock: Clock) -> None:
    """No attempt begins after the deadline; what attempts take counts as well."""
    policy = RetryPolicy(attempts=1000, deadline=2.0, wait_initial=0.01, wait_max=0.05)
    began: list[float] = []

    def attempt(number: int) -> None:
        began.append(clock.now - 1000)
        clock.now += 0.25
        raise database_error("55P03")

    with pytest.raises(ContentionError) as caught:
        retry(attempt, policy)

    assert caught.value.attempts == len(began) == 8
    assert began[-1] < 2
    assert caught.value.elapsed == pytest.approx(began[-1] + 0.25)


def test_an_error_that_is_not_retryable_passes_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """It keeps its traceback, and nothing is logged."""
    error = database_error("42P01")

    def attempt(number: int) -> None:
        raise error

    with pytest.raises(DBAPIError) as caught:
        retry(attempt, POLICY)

    assert caught.value is error
    assert caught.traceback[-1].name == "attempt"
    assert not caplog.records


@pytest.fixture
def engine(fresh_database: str) -> Iterator[Engine]:
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE counter (id int PRIMARY KEY, value int)")
        connection.exec_driver_sql("INSERT INTO counter VALUES (1, 0)")
    yield engine
    engine.dispose()


READ = text("SELECT value FROM counter WHERE id = 1")
WRITE = text("UPDATE counter SET value = :value WHERE id = 1")


def test_run_retries_a_race_that_happened(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Two that both read before either wrote: one fails, runs again, and no update is lost."""
    both_have_read = threading.Barrier(2)
    first = threading.local()

    def increment(session: Session, unanswered: None) -> None:
        value = session.scalar(READ)
        if not hasattr(first, "over"):
            first.over = True
            both_have_read.wait(60)
        session.execute(WRITE, {"value": value + 1})

    assert together([lambda: run(engine, increment, POLICY)] * 2) == [None, None]

    with engine.connect() as connection:
        assert connection.scalar(READ) == 2
    assert [r.sqlstate for r in caplog.records] == ["40001"]  # type: ignore[attr-defined]


def test_run_retries_a_race_that_shows_at_commit_only(engine: Engine) -> None:
    """Write skew: each reads what the other writes, and no statement fails but a COMMIT."""
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO counter SELECT n, 0 FROM generate_series(2, 3) n")
    both_have_written = threading.Barrier(2)
    unanswered_seen = []

    def work_on(mine: int, other: int) -> Callable[[Session, str | None], str]:
        calls = []

        def work(session: Session, unanswered: str | None) -> str:
            unanswered_seen.append(unanswered)
            calls.append(mine)
            sql = text("SELECT value FROM counter WHERE id = :id")
            value = session.scalar(sql, {"id": other})
            update = text("UPDATE counter SET value = :value WHERE id = :id")
            session.execute(update, {"value": value + 1, "id": mine})
            if len(calls) == 1:
                both_have_written.wait(60)
            return "done"

        return work

    tasks = [lambda: run(engine, work_on(2, 3), POLICY), lambda: run(engine, work_on(3, 2), POLICY)]
    assert together(tasks) == ["done", "done"]

    assert unanswered_seen == [None, None, None]
    with engine.connect() as connection:
        values = connection.scalars(text("SELECT value FROM counter WHERE id > 1"))
        assert sorted(values) == [1, 2]


def test_run_retries_a_deadlock(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Each has locked what the other wants next; PostgreSQL ends one, which runs again."""
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO counter SELECT n, 0 FROM generate_series(2, 3) n")
    both_have_one = threading.Barrier(2)
    lock = text("SELECT value FROM counter WHERE id = :id FOR UPDATE")

    def work_on(first: int, second: int) -> Callable[[Session, str | None], str]:
        calls = []

        def work(session: Session, unanswered: str | None) -> str:
            session.execute(lock, {"id": first})
            calls.append(first)
            if len(calls) == 1:
                both_have_one.wait(60)
            session.execute(lock, {"id": second})
            return "done"

        return work

    tasks = [lambda: run(engine, work_on(2, 3), POLICY), lambda: run(engine, work_on(3, 2), POLICY)]
    assert together(tasks) == ["done", "done"]
    assert "40P01" in [record.sqlstate for record in caplog.records]  # type: ignore[attr-defined]


def test_run_gives_each_attempt_a_session_at_serializable(engine: Engine) -> None:
    """Also the second attempt, where a naive loop is back at READ COMMITTED."""
    levels, sessions = [], []

    def work(session: Session, unanswered: None) -> str:
        sessions.append(session)
        levels.append(session.scalar(text("SHOW transaction_isolation")))
        if len(levels) < 3:
            raise database_error("40001")
        return "done"

    assert run(engine, work, POLICY) == "done"
    assert levels == ["serializable"] * 3
    assert len(set(map(id, sessions))) == 3


def test_run_rolls_back_and_gives_its_connection_back_on_every_way_out(engine: Engine) -> None:
    """Success, failure of the work, failure of the database."""

    def succeed(session: Session, unanswered: None) -> None:
        session.execute(WRITE, {"value": 1})

    def fail(session: Session, unanswered: None) -> None:
        session.execute(WRITE, {"value": 2})
        raise LookupError

    def refused(session: Session, unanswered: None) -> None:
        session.execute(WRITE, {"value": 3})
        session.execute(text("INSERT INTO counter VALUES (1, 1)"))

    run(engine, succeed, POLICY)
    with pytest.raises(LookupError):
        run(engine, fail, POLICY)
    with pytest.raises(IntegrityError):
        run(engine, refused, POLICY)

    with engine.connect() as connection:
        assert connection.scalar(READ) == 1
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_run_tells_the_work_of_a_commit_without_an_answer(fresh_database: str) -> None:
    """The re-run learns what the earlier attempt had returned, and that it was committed."""
    with lossy_proxy(fresh_database) as (proxy, url):
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE t (id int)")
            connection.exec_driver_sql("INSERT INTO t VALUES (7)")
        seen = []

        def delete(session: Session, unanswered: int | None) -> int:
            gone = session.execute(text("DELETE FROM t RETURNING id")).scalar()
            seen.append((gone, unanswered))
            proxy.lose_reply_to = b"COMMIT" if gone else None
            return gone or unanswered or 0

        assert run(engine, delete, POLICY) == 7
        engine.dispose()
        assert proxy.lost == 1
        assert seen == [(7, None), (None, 7)]


def test_a_connection_lost_before_commit_leaves_nothing_unanswered(
    engine: Engine, administrator: Engine
) -> None:
    """The transaction was rolled back for certain, so that the re-run starts from nothing."""
    seen = []

    def work(session: Session, unanswered: str | None) -> str:
        seen.append(unanswered)
        if len(seen) == 1:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
            with administrator.connect() as connection:
                connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
            session.execute(READ)
        return "done"

    assert run(engine, work, POLICY) == "done"
    assert seen == [None, None]


def send(
    engine: Engine, sql: str, policy: RetryPolicy = POLICY, **values: Any
) -> list[tuple[Any, ...]]:
    statement = StatementText(sql, tuple(values))
    return execute(engine, lambda attempt: (statement, values), policy, ())


def test_execute_is_one_serializable_transaction_of_one_round_trip(engine: Engine) -> None:
    """The isolation level holds for the statement and is gone after it."""
    sql = "SELECT current_setting('transaction_isolation'), %(value)s::int, 'x' LIKE '%%'"

    assert send(engine, sql, value=5) == [("serializable", 5, True)]
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
        assert connection.scalar(text("SHOW enable_seqscan")) == "on"
        assert connection.connection.driver_connection.autocommit is False  # type: ignore[union-attr]


def test_a_statement_is_prepared_once_a_connection(fresh_database: str) -> None:
    """The second time only its name and the values are sent."""
    with lossy_proxy(fresh_database) as (proxy, url):
        engine = create_engine(url)
        send(engine, "SELECT %(value)s::int", value=1)
        proxy.sent.clear()
        assert send(engine, "SELECT %(value)s::int", value=2) == [(2,)]
        (message,) = proxy.sent
        assert b"EXECUTE rollcall_" in message
        assert b"SELECT" not in message
        engine.dispose()


SQL = "SELECT value FROM counter WHERE id = %(id)s"


def test_a_name_that_the_server_does_not_know_is_no_error(engine: Engine) -> None:
    """A pooler may lead the same connection to another server process."""
    send(engine, SQL, id=1)
    for _ in range(2):
        with engine.connect() as connection:
            connection.exec_driver_sql("DEALLOCATE ALL")
        assert send(engine, SQL, id=1) == send(engine, SQL, id=1)
        assert prepared(engine) == 1


def test_a_name_that_the_server_knows_already_is_no_error(engine: Engine) -> None:
    """From another connection that the pooler led there."""
    name = StatementText(SQL, ("id",)).name
    with engine.connect() as connection:
        connection.exec_driver_sql(f"PREPARE {name} AS {SQL % {'id': '$1'}}")
    assert send(engine, SQL, id=1) == send(engine, SQL, id=1)
    assert prepared(engine) == 1


def prepared(engine: Engine) -> int:
    """Return how many statements are prepared on the engine's one idle connection."""
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM pg_prepared_statements")) or 0


def test_a_column_of_another_type_does_not_break_what_is_prepared(engine: Engine) -> None:
    """PostgreSQL refuses the old plan for good, and the statement is sent in full."""
    before = send(engine, SQL, id=1)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE counter ALTER value TYPE text")
    for _ in range(2):
        assert send(engine, SQL, id=1) == [(str(before[0][0]),)]


def test_only_so_many_statements_are_prepared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes memory of the server's; the others are sent in full."""
    monkeypatch.setattr("app.transactions.MOST_PREPARED", 2)
    for value in (1, 2, 3, 3):
        assert send(engine, f"SELECT {value}") == [(value,)]
    assert prepared(engine) == 2


def increment(session: Session, unanswered: None) -> int:
    sql = "UPDATE counter SET value = value + %(by)s WHERE id = 1 RETURNING value"
    return int(execute_prepared(session.connection(), sql, {"by": 1}).scalar_one())


def forget(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("DEALLOCATE ALL")


def retype(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE counter ALTER value TYPE bigint")


@pytest.mark.parametrize("lose", [forget, retype])
def test_a_transaction_is_run_again_without_what_was_prepared(
    engine: Engine, lose: Callable[[Engine], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a pooler another server process answers, which knows nothing of it; once is enough."""
    assert run(engine, increment, POLICY) == 1
    assert prepared(engine) == 1
    lose(engine)
    assert [run(engine, increment, POLICY) for _ in range(3)] == [2, 3, 4]
    assert len(caplog.records) == 1


def test_an_error_of_a_prepared_statement_is_passed_on(engine: Engine) -> None:
    """It is the statement's, sent in full or not."""
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        execute_prepared(connection, "SELECT 1 / %(by)s", {"by": 0})
    assert sqlstate(caught.value) == "22012"


def test_an_interrupted_statement_leaves_the_connection_as_it_was(engine: Engine) -> None:
    """Not in autocommit, which the next transaction on it would not survive."""

    broken = StatementText("SELECT %(value)s", ("value",))
    with pytest.raises(KeyboardInterrupt):
        execute(engine, lambda attempt: (broken, {"value": Interrupting()}), POLICY, ())
    with engine.connect() as connection:
        assert connection.connection.driver_connection.autocommit is False  # type: ignore[union-attr]


class Interrupting:
    """A value whose conversion is where Ctrl-C hits."""

    def __conform__(self, protocol: object) -> object:
        raise KeyboardInterrupt


def test_a_lock_held_by_a_stranger_is_waited_for_within_the_limits(engine: Engine) -> None:
    """Each attempt waits lock_timeout; in the end it is contention."""
    policy = RetryPolicy(attempts=2, deadline=60, lock_timeout=0.05)
    write = "UPDATE counter SET value = 9 WHERE id = 1 RETURNING value"
    with engine.begin() as stranger:
        stranger.execute(WRITE, {"value": 1})
        with pytest.raises(ContentionError) as caught:
            send(engine, write, policy)

    assert (caught.value.attempts, caught.value.sqlstate) == (2, "55P03")


def test_a_statement_that_runs_too_long_is_cut_and_not_run_again(engine: Engine) -> None:
    """57014 passes at once."""
    with pytest.raises(OperationalError) as caught:
        send(engine, "SELECT pg_sleep(5)", RetryPolicy(statement_timeout=0.05))

    assert caught.value.orig.pgcode == "57014"  # type: ignore[union-attr]


def test_a_pool_that_is_used_up_ends_as_contention(fresh_database: str) -> None:
    """The wait for the pool counts against the deadline."""
    engine = create_engine(fresh_database, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with engine.connect(), pytest.raises(ContentionError) as caught:
        run(engine, lambda session, unanswered: None, RetryPolicy(deadline=0.3))
    engine.dispose()

    assert caught.value.sqlstate is None
    assert caught.value.attempts < RetryPolicy().attempts


def test_a_refused_connection_is_tried_again_until_the_deadline() -> None:
    """Nobody listens there: ContentionError, because of DatabaseAway."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    engine = create_engine(f"postgresql+psycopg2://u@127.0.0.1:{port}/d")
    policy = RetryPolicy(attempts=3, wait_initial=0.01, wait_max=0.01)

    with pytest.raises(ContentionError) as caught:
        run(engine, lambda session, unanswered: None, policy)

    assert caught.value.attempts == 3
    assert isinstance(caught.value.__cause__, DatabaseAway)


def test_a_server_that_says_no_is_not_asked_again(server_url: str) -> None:
    """No such role: the driver's error, at once."""
    engine = create_engine(server_url.replace("//postgres@", "//nobody_by_this_name@"))

    with pytest.raises(OperationalError):
        connect(engine)


@pytest.mark.parametrize("state", [b"57P03", b"53300"])
def test_a_server_that_starts_up_or_is_full_is_away_for_now(state: bytes) -> None:
    """Its first answer is an error with that SQLSTATE."""
    answer = b"E\x00\x00\x00\x20SFATAL\x00C" + state + b"\x00Mnot now\x00\x00"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer, args=(listener, answer)).start()
        port = listener.getsockname()[1]
        engine = create_engine(f"postgresql+psycopg2://u@127.0.0.1:{port}/d")

        assert is_away(engine)


def _answer(listener: socket.socket, answer: bytes) -> None:
    client, _ = listener.accept()
    with client:
        client.recv(1024)
        client.sendall(answer)


def test_a_server_is_away_when_none_of_its_hosts_takes_connections(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for where libpq looks, and as the bootstrap sees it."""
    folder = str(create_engine(server_url).url.query["host"])
    here, nowhere = "postgresql+psycopg2://postgres@/none?host=", "/nowhere"

    def verdicts(url: str) -> set[bool]:
        engine = create_engine(url)
        asked = [first_answer(host, port, "postgres") for host, port in addresses(engine)]
        return {is_away(engine), all(answer is None for answer in asked)}

    assert verdicts(f"{here}{folder}") == {False}
    assert verdicts(f"{here}{nowhere}&host={folder}") == {False}
    assert verdicts(f"{here}{nowhere}:5432&host={nowhere}:5433") == {True}
    assert verdicts("postgresql+psycopg2://postgres@a..b/none") == {True}
    awaited = f"{here}{nowhere}&host={folder}&target_session_attrs=read-write"
    assert is_away(create_engine(awaited))
    monkeypatch.setenv("PGHOST", folder)
    assert verdicts("postgresql+psycopg2://postgres@/none") == {False}
    monkeypatch.setenv("PGHOST", f"/nowhere,{folder}")
    monkeypatch.setenv("PGPORT", "1,5432")
    assert verdicts("postgresql+psycopg2://postgres@/none") == {False}
    monkeypatch.setenv("PGPORT", "1")
    assert verdicts("postgresql+psycopg2://postgres@/none") == {True}


def test_attempts_that_take_no_time_are_spent_before_the_deadline(clock: Clock) -> None:
    """By the default policy, if nothing is waited for."""

    def attempt(number: int) -> None:
        raise database_error("40001")

    with pytest.raises(ContentionError) as caught:
        retry(attempt, RetryPolicy(), sleep=lambda seconds: None)

    assert (caught.value.attempts, caught.value.elapsed) == (RetryPolicy().attempts, 0)
