"""The same promises under asyncio: one row a key, retries, lost connections, and cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from typing import Any

import pytest
from sqlalchemy import Engine, String, create_engine, func, make_url, select, text
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from app.aio import AsyncGetOrCreate, aexecute, aretry, arun, perform
from app.async_database import make_async_engine
from app.call import read_call
from app.config import load_settings
from app.errors import ContentionError, LostRace, NotStored
from app.statement import plan_for, shape_of, values_of
from app.transactions import RetryPolicy, read, sqlstate
from migrations_bootstrap.embedded import EmbeddedServer
from tests.cancelling import is_cancelled_at
from tests.conftest import waits
from tests.proxy import before_each_rerun, lossy_proxy
from tests.races import eventually, inserts_held, inserts_meet, started

GUARD = (
    "CREATE UNIQUE INDEX uq_pet_natural_key ON pet (owner, name) NULLS NOT DISTINCT"
    " WHERE duplicate_of_id IS NULL"
)
IN_TRANSACTIONS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
)
PATIENT = RetryPolicy(attempts=20, deadline=60, lock_timeout=60)


class Theirs(DeclarativeBase):
    """The models of another application."""


class Pet(AsyncGetOrCreate, Theirs):
    """A key with a part that may be NULL, and columns of several types."""

    __tablename__ = "pet"
    __natural_key__ = ("owner", "name")

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str | None] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(20))
    born: Mapped[date | None]
    legs: Mapped[int] = mapped_column(default=4)


@pytest.fixture(scope="module")
def pets(server: EmbeddedServer, administrator: Engine) -> Iterator[Engine]:
    """A database of pets, by psycopg2."""
    with administrator.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE pets")
    engine = create_engine(server.url("pets"), pool_pre_ping=True)
    Theirs.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE INDEX ix_pet_natural_key ON pet (owner, name) WHERE duplicate_of_id IS NULL;"
            "CREATE UNIQUE INDEX uq_pet_creation_token ON pet (creation_token)"
        )
    yield engine
    engine.dispose()


@pytest.fixture(params=["guarded", "unguarded"])
def url(request: pytest.FixtureRequest, pets: Engine) -> str:
    """The database, empty, with a guard and then without."""
    guard = GUARD if request.param == "guarded" else "SELECT 1"
    with pets.begin() as connection:
        connection.exec_driver_sql("TRUNCATE pet RESTART IDENTITY")
        connection.exec_driver_sql("DROP INDEX IF EXISTS uq_pet_natural_key")
        connection.exec_driver_sql(guard)
    return pets.url.render_as_string(hide_password=False)


def asynchronous(url: str, **options: Any) -> AsyncEngine:
    return create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **options)


def at_once(url: str) -> AsyncEngine:
    """Return an engine as the service has it, whose connections begin with PATIENT's limits."""
    limits = {"ROLLCALL_LOCK_TIMEOUT": PATIENT.lock_timeout}
    settings = load_settings({"DATABASE_URL": url, "ROLLCALL_AUTH": "off", **limits})
    return make_async_engine(make_url(url), settings, at_once=True)


def run(
    url: str,
    work: Callable[[AsyncEngine], Coroutine[Any, Any, Any]],
    make: Callable[..., AsyncEngine] = asynchronous,
    **options: Any,
) -> Any:
    """Run some work on an event loop and an engine of its own, to which pets are bound."""

    async def main() -> Any:
        engine = make(url, **options)
        Pet.abind(engine, PATIENT)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def rows(pets: Engine) -> list[tuple[str | None, str]]:
    with Session(pets) as session:
        return [tuple(row) for row in session.execute(select(Pet.owner, Pet.name))]


def test_the_first_call_creates_and_the_second_finds(url: str) -> None:
    """Normalised, with defaults that are the first one's."""

    async def work(engine: AsyncEngine) -> None:
        born = date(2020, 2, 1)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            rex, created = await Pet.aget_or_create(
                session, owner=" Ann  Lee", name="Rex", defaults={"born": born}
            )
            assert (created, rex.owner, rex.born, rex.legs) == (True, "Ann Lee", born, 4)
            assert rex in session
            rex.legs = 3
            again, created = await Pet.aget_or_create(
                session, owner="Ann Lee", name="Rex", defaults={"legs": 5}
            )
            assert (again is rex, created, rex.legs) == (True, False, 3)
            await session.commit()
        known, created = await Pet.aget_or_create(owner="Ann Lee", name="Rex")
        assert (known.id, known.legs, created) == (rex.id, 3, False)

    run(url, work)


def test_an_instance_without_a_session_is_detached(url: str) -> None:
    """Its columns are loaded; it can be merged into any session. NULL is a key's part, too."""

    async def work(engine: AsyncEngine) -> None:
        stray, created = await Pet.aget_or_create(owner=None, name="Tom")
        again, found = await Pet.aget_or_create(owner=None, name="Tom")
        assert (created, found, stray.id) == (True, False, again.id)
        async with AsyncSession(engine) as session:
            assert (await session.merge(stray)).name == "Tom"

    run(url, work)


@pytest.mark.parametrize("bound", [True, False])
def test_a_factory_of_sessions_says_where_to_work(
    url: str, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """Before what was bound, and where nothing was."""

    async def work(engine: AsyncEngine) -> None:
        if bound:
            Pet.abind(asynchronous("postgresql://u@127.0.0.1:1/nowhere"))
        else:
            monkeypatch.delattr(Pet, "__async_binding__")
        sessions = async_sessionmaker(engine)
        tom, created = await Pet.aget_or_create(sessions, owner="A", name="Tom")
        ((again, new),) = await Pet.aget_or_create_many(sessions, [{"owner": "A", "name": "Tom"}])
        assert (created, new, tom.id) == (True, False, again.id)

    run(url, work)


def test_a_list_is_done_in_one_transaction(url: str, pets: Engine) -> None:
    """In the order of the items, those of one key collapsed; all of it, or nothing."""

    async def work(engine: AsyncEngine) -> None:
        await Pet.aget_or_create(owner="A", name="1")
        items: list[Mapping[str, Any]] = [{"owner": "A", "name": str(n % 3)} for n in range(5)]
        async with AsyncSession(engine) as session:
            found = await Pet.aget_or_create_many(session, items)
            assert [(pet.name, new) for pet, new in found] == [
                ("0", True),
                ("1", False),
                ("2", True),
                ("0", False),
                ("1", False),
            ]
            assert all(pet in session for pet, _ in found)
        with pytest.raises(DBAPIError) as refused:
            await Pet.aget_or_create_many(
                None, [{"owner": "A", "name": "new"}, {"owner": "A", "name": "x" * 21}]
            )
        assert sqlstate(refused.value) == "22001"
        assert await Pet.aget_or_create_many(None, []) == []

    run(url, work)
    assert len(rows(pets)) == 3


@pytest.mark.parametrize("make", [asynchronous, at_once])
def test_tasks_that_meet_make_one_row(
    url: str,
    pets: Engine,
    caplog: pytest.LogCaptureFixture,
    make: Callable[..., AsyncEngine],
) -> None:
    """All have looked and found nothing; one of them is told that it created the row."""

    async def work(engine: AsyncEngine) -> list[tuple[int, bool]]:
        calls = (Pet.aget_or_create(owner="A", name="Rex") for _ in range(4))
        return [(pet.id, created) for pet, created in await asyncio.gather(*calls)]

    with inserts_meet(pets, "pet", 4):
        found = run(url, work, make)
    assert len({id for id, _ in found}) == 1
    assert sum(created for _, created in found) == 1
    assert len(rows(pets)) == 1
    assert len(caplog.records) >= 3


@pytest.mark.parametrize(("make", "last"), [(asynchronous, b"COMMIT"), (at_once, b"Rex")])
def test_a_lost_reply_is_looked_up_by_its_token(
    url: str, pets: Engine, make: Callable[..., AsyncEngine], last: bytes
) -> None:
    """The COMMIT happened, its reply was lost, and somebody has renamed the row since."""

    async def work(engine: AsyncEngine) -> tuple[str, bool]:
        await Pet.aget_or_create(owner="A", name="Warm")
        proxy.lose_reply_to = last
        pet, created = await Pet.aget_or_create(owner="A", name="Rex")
        return pet.name, created

    with (
        lossy_proxy(url) as (proxy, through),
        before_each_rerun(url, "UPDATE pet SET name = 'Max' WHERE name = 'Rex'"),
    ):
        assert run(through, work, make) == ("Max", True)
        assert proxy.lost == 1
    assert sorted(rows(pets)) == [("A", "Max"), ("A", "Warm")]


def test_a_lost_reply_to_a_unit_of_work_is_told_to_it(url: str, pets: Engine) -> None:
    """The second run is given what the first returned."""
    seen: list[int | None] = []

    def rename(session: Session, unanswered: int | None) -> int:
        seen.append(unanswered)
        return session.query(Pet).where(Pet.name == "Rex").update({"name": "Max"})

    async def work(engine: AsyncEngine) -> int:
        await Pet.aget_or_create(owner="A", name="Rex")
        proxy.lose_reply_to = b"COMMIT"
        return await arun(engine, rename, PATIENT)

    with lossy_proxy(url) as (proxy, through):
        assert run(through, work) == 0
    assert seen == [None, 1]


def cut(pets: Engine) -> None:
    """End all connections but those of the test."""
    with pets.connect() as connection:
        connection.exec_driver_sql(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND application_name = 'asyncpg'"
        )


NAMED = {"connect_args": {"server_settings": {"application_name": "asyncpg"}}}


def test_connections_that_were_cut_in_the_pool_never_show(url: str, pets: Engine) -> None:
    """Each is found out by the call that gets it, which is run again."""

    async def work(engine: AsyncEngine) -> None:
        for _ in range(2):
            calls = [Pet.aget_or_create(owner="A", name=str(number)) for number in range(3)]
            await asyncio.gather(*calls)
            await asyncio.to_thread(cut, pets)
        many = await Pet.aget_or_create_many(None, [{"owner": "A", "name": "1"}])
        assert [created for _, created in many] == [False]

    run(url, work, **NAMED)


@pytest.mark.parametrize("many", [False, True])
def test_a_connection_that_is_cut_at_work_is_replaced(url: str, pets: Engine, many: bool) -> None:
    """While it waits within the statement."""

    async def work(engine: AsyncEngine) -> bool:
        if many:
            found = await Pet.aget_or_create_many(None, [{"owner": "A", "name": "Rex"}])
            return found[0][1]
        return (await Pet.aget_or_create(owner="A", name="Rex"))[1]

    with inserts_held(pets, "pet") as gate:
        created = started(lambda: run(url, work, **NAMED))
        gate.wait_for(1)
        cut(pets)
        gate.open()
        assert created() is True
    assert rows(pets) == [("A", "Rex")]


def test_a_server_that_is_away_is_waited_for_and_a_refusal_is_not(url: str) -> None:
    """The one is contention in the end; the other passes at once, with its SQLSTATE."""

    async def ask(engine: AsyncEngine) -> None:
        Pet.abind(engine, RetryPolicy(attempts=3))
        await Pet.aget_or_create(owner="A", name="Rex")

    with pytest.raises(ContentionError) as away:
        run("postgresql://nobody@127.0.0.1:1/nowhere", ask)
    assert (away.value.attempts, away.value.sqlstate) == (3, None)
    missing = make_url(url).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(DBAPIError) as refused:
        run(missing, ask)
    assert sqlstate(refused.value) == "3D000"


def test_a_server_that_has_no_connection_left_is_waited_for(url: str, pets: Engine) -> None:
    """It says so by a SQLSTATE."""

    async def ask(engine: AsyncEngine) -> None:
        Pet.abind(engine, RetryPolicy(attempts=2))
        await Pet.aget_or_create(owner="A", name="Rex")

    with pets.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE latecomer LOGIN CONNECTION LIMIT 0")
    late = make_url(url).set(username="latecomer").render_as_string(hide_password=False)
    with pytest.raises(ContentionError) as away:
        run(late, ask)
    with pets.begin() as connection:
        connection.exec_driver_sql("DROP ROLE latecomer")
    assert away.value.attempts == 2


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_list_does_not_wait_long_for_its_lock(
    url: str, pets: Engine, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on without, and begins anew where its connection is cut meanwhile."""
    monkeypatch.setattr("app.batch.LOCK_WAIT", 60 if is_cut else 0.01)

    async def work(engine: AsyncEngine) -> list[bool]:
        found = await Pet.aget_or_create_many(None, [{"owner": "A", "name": "Rex"}])
        return [created for _, created in found]

    with pets.connect() as holder:
        holder.exec_driver_sql("LOCK TABLE pet IN ROW EXCLUSIVE MODE")
        created = started(lambda: run(url, work, **NAMED))
        if is_cut:
            eventually(lambda: waits(pets) == 1)
            cut(pets)
            holder.rollback()
        assert created() == [True]


def test_a_pool_that_is_used_up_is_contention(url: str) -> None:
    """After as many attempts as there may be."""

    async def work(engine: AsyncEngine) -> None:
        Pet.abind(engine, RetryPolicy(attempts=2))
        async with engine.connect():
            await Pet.aget_or_create(owner="A", name="Rex")

    with pytest.raises(ContentionError):
        run(url, work, pool_size=1, max_overflow=0, pool_timeout=0.01)


def test_what_the_database_or_the_driver_refuses_is_said_with_its_state(url: str) -> None:
    """As SQLAlchemy's errors; the connection is good for the next one."""

    async def work(engine: AsyncEngine) -> list[Any]:
        states: list[Any] = []
        for defaults in ({"legs": None}, {"legs": 2**40}, {"born": "yesterday"}):
            with pytest.raises(DBAPIError) as refused:
                await Pet.aget_or_create(owner="A", name="Rex", defaults=defaults)
            states.append((sqlstate(refused.value), isinstance(refused.value, IntegrityError)))
        await Pet.aget_or_create(owner="A", name="Rex")
        assert engine.sync_engine.pool.checkedin() == 1  # type: ignore[attr-defined]
        return states

    states = run(url, work, hide_parameters=True)
    assert states == [("23502", True), ("22000", False), ("22000", False)]


def test_a_column_that_has_another_type_by_now_is_no_error(url: str, pets: Engine) -> None:
    """The prepared statement does not fit any more: it is prepared anew."""

    def alter(kind: str) -> None:
        with pets.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE pet ALTER COLUMN legs TYPE {kind}")

    async def work(engine: AsyncEngine) -> None:
        await Pet.aget_or_create(owner="A", name="Rex")
        await asyncio.to_thread(alter, "bigint")
        _, created = await Pet.aget_or_create(owner="A", name="Rex")
        assert not created

    run(url, work)
    alter("int")


def test_a_call_is_one_packet_where_connections_are_as_it_needs_them(
    url: str, pets: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """At SERIALIZABLE, with the limits, and no sequential scan; what loses begins with the lock."""

    async def work(engine: AsyncEngine) -> list[list[bytes]]:
        sent = []
        await Pet.aget_or_create(owner="A", name="Warm")
        for name in ("Rex", "Rex"):
            proxy.sent.clear()
            await Pet.aget_or_create(owner="A", name=name)
            sent.append(list(proxy.sent))
        proxy.sent.clear()
        with inserts_meet(pets, "pet", 2):
            await asyncio.gather(*[Pet.aget_or_create(owner="A", name="Tom") for _ in "ab"])
        return [*sent, list(proxy.sent)]

    with lossy_proxy(url) as (proxy, through), recorded(pets) as settings:
        *alone, raced = run(through, work, at_once)
    assert [len(packets) for packets in alone] == [1, 1]
    assert not any(b"BEGIN" in packet for (packet,) in alone)
    assert [b"LOCK TABLE pet" in packet for packet in raced if b"BEGIN" in packet] == [True]
    assert len(caplog.records) == 1
    assert set(settings) == {("serializable", "1min", "10s", "off")}


def test_what_is_read_there_is_read_as_anywhere(url: str) -> None:
    """With sequential scans, at READ COMMITTED; a unit of work has neither."""
    names = ("transaction_isolation", "enable_seqscan")

    def current(connection: Any) -> list[str]:
        return [connection.scalar(select(func.current_setting(name))) for name in names]

    async def work(engine: AsyncEngine) -> list[list[str]]:
        found = await perform(lambda: read(engine.sync_engine, current, PATIENT))
        return [found, await arun(engine, lambda session, unanswered: current(session), PATIENT)]

    assert run(url, work, at_once) == [["read committed", "on"], ["serializable", "off"]]


@contextmanager
def recorded(pets: Engine) -> Iterator[list[tuple[str, ...]]]:
    """Have each insert note the settings that it is made with; they are there at the end."""
    names = ("transaction_isolation", "lock_timeout", "statement_timeout", "enable_seqscan")
    current = ", ".join(f"current_setting('{name}')" for name in names)
    with pets.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE noted (level text, lock text, statement text, scans text);"
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN INSERT INTO noted VALUES ({current}); RETURN NEW; END $$;"
            "CREATE TRIGGER note BEFORE INSERT ON pet FOR EACH ROW EXECUTE FUNCTION note()"
        )
    found: list[tuple[str, ...]] = []
    try:
        yield found
        with pets.connect() as connection:
            found += [tuple(row) for row in connection.exec_driver_sql("SELECT * FROM noted")]
    finally:
        with pets.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER note ON pet; DROP FUNCTION note")
            connection.exec_driver_sql("DROP TABLE noted")


def test_a_connection_that_is_not_as_it_was_told_to_be_writes_nothing_below_serializable(
    url: str, pets: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its calls begin their transactions themselves from then on, and race as well as any."""

    def forget(connection: Any, *others: Any) -> None:
        connection.run_async(lambda own: own.execute(TO_READ_COMMITTED))

    async def work(engine: AsyncEngine) -> list[tuple[int, bool]]:
        listen(engine.sync_engine, "connect", forget)
        await Pet.aget_or_create(owner="A", name="Warm")
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            assert raw.begins_with is None
        calls = (Pet.aget_or_create(owner="A", name="Rex") for _ in range(3))
        return [(pet.id, created) for pet, created in await asyncio.gather(*calls)]

    with recorded(pets) as settings, inserts_meet(pets, "pet", 3, "NEW.name = 'Rex'"):
        found = run(url, work, at_once)
    assert len({id for id, _ in found}) == 1
    assert sum(created for _, created in found) == 1
    assert len(caplog.records) >= 2
    assert {level for level, *_ in settings} == {"serializable"}


# As behind a pooler that takes a client's options and does nothing about them.
TO_READ_COMMITTED = "SET default_transaction_isolation = 'read committed'"


def test_a_row_that_a_trigger_discards_is_tried_once(url: str, pets: Engine) -> None:
    """Nothing was returned, which is not to say that the connection was not at SERIALIZABLE."""

    async def work(engine: AsyncEngine) -> None:
        await Pet.aget_or_create(owner="A", name="Warm")
        with pytest.raises(NotStored):
            await Pet.aget_or_create(owner="A", name="Rex")

    with recorded(pets) as settings, discarded(pets):
        run(url, work, at_once)
    assert len(settings) == 2


@contextmanager
def discarded(pets: Engine) -> Iterator[None]:
    """Have a trigger, the last of them, discard every pet that is called Rex."""
    with pets.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RETURN NULL; END $$;"
            "CREATE TRIGGER zebra BEFORE INSERT ON pet FOR EACH ROW"
            " WHEN (NEW.name = 'Rex') EXECUTE FUNCTION nothing()"
        )
    yield
    with pets.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER zebra ON pet; DROP FUNCTION nothing")


def test_what_may_be_tried_again_is_awaited_again() -> None:
    """As often as the policy says; anything else passes."""
    calls: list[int] = []

    async def attempt(number: int) -> str:
        calls.append(number)
        await asyncio.sleep(0)
        if number < 3:
            raise LostRace
        return "done"

    async def never(number: int) -> str:
        raise LostRace

    async def wrong(number: int) -> str:
        raise LookupError

    assert asyncio.run(aretry(attempt, RetryPolicy())) == "done"
    assert calls == [1, 2, 3]
    with pytest.raises(ContentionError):
        asyncio.run(aretry(never, RetryPolicy(attempts=2)))
    with pytest.raises(LookupError):
        asyncio.run(aretry(wrong, RetryPolicy()))


def test_a_statement_can_be_executed_by_itself(url: str) -> None:
    """At SERIALIZABLE, and with the limits of the policy."""

    async def work(engine: AsyncEngine) -> None:
        call = read_call(Pet, owner="A", name="Rex")
        plan = plan_for(shape_of(Pet, call, by_token=False), engine.dialect)
        values = plan.parameters(values_of(call))
        ((ours, *row),) = await aexecute(engine, lambda n: (plan.text, values), PATIENT, ())
        assert (ours, plan.read(row)["name"]) == (True, "Rex")

    def level(session: Session, unanswered: list[str] | None) -> list[str]:
        names = ("transaction_isolation", "lock_timeout", "enable_seqscan")
        return [session.scalar(select(func.current_setting(name))) or "" for name in names]

    run(url, work)
    found = run(url, lambda engine: arun(engine, level, PATIENT))
    assert found == ["serializable", "1min", "off"]


def create(engine: AsyncEngine) -> Coroutine[Any, Any, Any]:
    return Pet.aget_or_create(owner="A", name="Rex")


def create_many(engine: AsyncEngine) -> Coroutine[Any, Any, Any]:
    return Pet.aget_or_create_many(None, [{"owner": "A", "name": "Rex"}])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize(
    ("call", "make"), [(create, asynchronous), (create_many, asynchronous), (create, at_once)]
)
def test_whoever_is_cancelled_leaves_nothing_behind(
    pets: Engine,
    call: Callable[[AsyncEngine], Coroutine[Any, Any, Any]],
    make: Callable[..., AsyncEngine],
    is_warm: bool,
    times: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At each await, connecting included, and again while it cleans up: no transaction, no row.

    Unless the COMMIT had been sent: then there is a whole one.
    """
    caplog.set_level(logging.CRITICAL)  # SQLAlchemy says of each connection that it closes it
    counting = pets.connect().execution_options(isolation_level="AUTOCOMMIT")

    async def work(engine: AsyncEngine) -> int:
        pool: Any = engine.sync_engine.pool
        number = 0
        while True:
            counting.exec_driver_sql("TRUNCATE pet")
            if is_warm:
                async with engine.connect():
                    pass
            else:
                await engine.dispose()
                pool = engine.sync_engine.pool
            if not await is_cancelled_at(call(engine), number, times):
                return number
            assert pool.checkedout() == 0
            eventually(lambda: counting.scalar(IN_TRANSACTIONS) == 0)
            assert counting.exec_driver_sql("SELECT count(*) FROM pet").scalar() in (0, 1)
            found = await call(engine)
            assert found
            assert counting.exec_driver_sql("SELECT count(*) FROM pet").scalar() == 1
            number += 1

    with counting:
        counting.exec_driver_sql("DROP INDEX IF EXISTS uq_pet_natural_key")
        awaits = run(pets.url.render_as_string(hide_password=False), work, make)
    assert awaits >= (3 if is_warm else 5) - 2 * (make is at_once)
