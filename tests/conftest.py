"""A real PostgreSQL for every test: the embedded server, in a folder that goes with the run."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import settings as hypothesis_settings
from sqlalchemy import (
    Connection,
    Engine,
    NullPool,
    create_engine,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.orm import scoped_session, sessionmaker

from app import create_app, is_setting
from app.database import tenant_engines
from app.db import db
from app.duplicates.guard import guard
from app.duplicates.merging import Rules
from app.models import NATURAL_KEYS, Department, Employee
from app.transactions import RetryPolicy
from migrations_bootstrap import bootstrap, ensure_database
from migrations_bootstrap.embedded import EmbeddedServer
from tests import small_legacy
from tests.asgi_client import AsgiApplication, AsgiClient
from tests.duplicated import Site
from tests.legacy import LegacyRows, make_legacy
from tests.measuring import measure_no_children
from tests.other_models import Badge, Basket, Car, Fussy, Legacy, Own, Stamp, Tag

numbers = itertools.count(1)
# What a test holds up is let go on by the test, and not by a limit, however slow the machine is.
UNHURRIED = {
    "ROLLCALL_LOCK_TIMEOUT": "60",
    "ROLLCALL_STATEMENT_TIMEOUT": "60",
    "ROLLCALL_RETRY_DEADLINE": "60",
}
USUAL = {"ROLLCALL_AUTH": "off", "TESTING": True, "PROPAGATE_EXCEPTIONS": False, **UNHURRIED}
hypothesis_settings.register_profile("unhurried", deadline=None)
hypothesis_settings.load_profile("unhurried")
# The files that take longest. They go first, so that all processes end at about the same time.
LONGEST = (
    "test_faults",
    "test_embedded",
    "test_serving",
    "test_duplicate_guard_cli",
    "test_duplicate_merge_cli",
    "test_duplicates_races",
    "test_duplicates_api",
    "test_transfer",
    "test_contract",
    "test_idempotency",
    "test_duplicates_merge",
    "test_slow_clients",
    "test_indexes",
    "test_duplicates_properties",
    "test_duplicates_guard",
    "test_database",
    "test_security",
    "test_tenants",
    "test_health",
    "test_duplicates_cli",
    "test_get_or_create",
    "test_stateful",
    "test_upgrade",
    "test_tenants_api",
    "test_employees",
    "test_batch",
    "test_asgi",
    "test_road_out",
    "test_tenants_cli",
    "test_bootstrap",
    "test_aio",
    "test_conditional",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order is otherwise that of their names."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# The files whose tests are run against both servers, Flask's and the asynchronous one.
BOTH = (
    "test_employees",
    "test_departments",
    "test_conditional",
    "test_idempotency",
    "test_errors",
    "test_security",
    "test_tenants_api",
    "test_tenants_isolation",
    "test_tenants_served",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of HTTP once for each server, unless it is marked as one of Flask's own."""
    both = metafunc.module.__name__.rpartition(".")[2] in BOTH
    if both and "service_kind" in metafunc.fixturenames:
        flask_only = metafunc.definition.get_closest_marker("flask_only") is not None
        metafunc.parametrize("service_kind", ["flask"] if flask_only else ["flask", "asgi"])


@pytest.fixture
def service_kind() -> str:
    """Which server a test's clients talk to."""
    return "flask"


@pytest.fixture(scope="session", autouse=True)
def unmeasured_children() -> None:
    """Measure in the tests' own process alone, and in those that a test says."""
    measure_no_children()


@contextmanager
def private_server(**settings: str) -> Iterator[EmbeddedServer]:
    """Run a server; fsync is off, which keeps every commit through kill -9 of its processes."""
    folder = Path(tempfile.mkdtemp(prefix="rollcall-tests-"))
    folder.chmod(0o755)  # as root the server runs as another user, who has to get in
    server = EmbeddedServer(folder, settings={"fsync": "off", **settings})
    server.attach()
    yield server
    server.release()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The server of the run."""
    with private_server() as server:
        yield server


@pytest.fixture(scope="session")
def server_url(server: EmbeddedServer) -> str:
    """The maintenance database, as superuser."""
    return server.url("postgres")


@pytest.fixture(scope="session")
def administrator(server_url: str) -> Iterator[Engine]:
    """An engine on the maintenance database, for creating and dropping others."""
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


def drop(administrator: Engine, url: str) -> None:
    with administrator.connect() as connection:
        connection.exec_driver_sql(
            f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)'
        )


@pytest.fixture
def empty_database(server: EmbeddedServer, administrator: Engine) -> Iterator[str]:
    """The URL of a database that does not exist."""
    url = server.url(f"missing_{next(numbers)}")
    yield url
    drop(administrator, url)


@pytest.fixture
def fresh_database(empty_database: str, administrator: Engine) -> str:
    """The URL of a database with nothing in it."""
    with administrator.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{make_url(empty_database).database}"')
    return empty_database


@pytest.fixture(scope="session")
def guarded_url(server: EmbeddedServer) -> str:
    """A migrated database with its guards, emptied before each test."""
    url = server.url("guarded")
    bootstrap(url, NATURAL_KEYS)
    return url


@pytest.fixture(scope="session")
def migrated_url(server: EmbeddedServer) -> str:
    """Another migrated database, which unguarded_url takes the guards off."""
    url = server.url("unguarded")
    bootstrap(url, NATURAL_KEYS)
    return url


@pytest.fixture(scope="session")
def legacy_database(server: EmbeddedServer) -> tuple[str, LegacyRows]:
    """The URL of an adopted legacy database, to be read and not changed, and what is in it."""
    url = server.url("legacy")
    ensure_database(url)
    made = make_legacy(url)
    bootstrap(url, NATURAL_KEYS, adopt=True)
    return url, made


@pytest.fixture
def unguarded_url(migrated_url: str) -> str:
    """A migrated database as a legacy one is: with look-up indexes, without guards."""
    unguard(migrated_url)
    return migrated_url


def unguard(url: str) -> None:
    """Replace the guards by look-up indexes. A start of the service puts the guards back."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for table, key in NATURAL_KEYS.items():
            connection.exec_driver_sql(
                f"DROP INDEX IF EXISTS uq_{table}_natural_key;"
                f"CREATE INDEX IF NOT EXISTS ix_{table}_natural_key ON {table} ({', '.join(key)})"
                " WHERE duplicate_of_id IS NULL"
            )
    engine.dispose()


def execute(url: str, *statements: str) -> None:
    """Run statements on a database, each on its own, and leave it."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def empty(url: str) -> None:
    with emptying(url).begin() as connection:
        connection.exec_driver_sql(
            "TRUNCATE employee, department, rollcall_token, rollcall_tenant"
            " RESTART IDENTITY CASCADE"
        )


@cache
def emptying(url: str) -> Engine:
    """Return an engine that keeps its connection: most tests begin with an empty database."""
    return create_engine(url, pool_size=1, pool_pre_ping=True)


def count(model: type[Any]) -> int:
    """Return how many rows the model's table has, as the session at hand sees it."""
    return db.session.scalar(select(func.count()).select_from(model)) or 0


@contextmanager
def stranger_with_a_tag(own: Engine) -> Iterator[Connection]:
    """Put a constraint on the key of tags; yield a stranger who has inserted one, uncommitted."""
    with own.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tag ADD UNIQUE (scope_name, label)")
    with own.connect() as stranger:
        columns = "scope_name, label, scalar, called, expression, numbered, color"
        stranger.exec_driver_sql(
            f"INSERT INTO tag ({columns}) VALUES ('a', 1, 's', 0, now(), 0, 'c')"
        )
        yield stranger


def waits(engine: Engine) -> int:
    """Return how many sessions wait for a lock."""
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) or 0


@pytest.fixture(scope="session")
def legacy_template(server: EmbeddedServer, administrator: Engine) -> str:
    """An adopted legacy database, which others are cloned from."""
    with administrator.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE legacy_template")
    url = server.url("legacy_template")
    small_legacy.build(url)
    bootstrap(url, NATURAL_KEYS, adopt=True)
    return url


@pytest.fixture(scope="session")
def marked_template(server: EmbeddedServer, administrator: Engine, legacy_template: str) -> str:
    """A legacy database with its guards up and its duplicates in place."""
    url = server.url("marked_template")
    clone(administrator, legacy_template, url)
    engine = create_engine(url)
    guard(engine, Employee, rules=Rules(accept_homonyms=True))
    engine.dispose()
    return url


@contextmanager
def cloned(administrator: Engine, template: str, url: str) -> Iterator[str]:
    """Yield the URL of a database that is as the template is."""
    clone(administrator, template, url)
    yield url
    drop(administrator, url)


def clone(administrator: Engine, template: str, url: str) -> None:
    names = (make_url(one).database for one in (url, template))
    with administrator.connect() as connection:
        connection.exec_driver_sql('CREATE DATABASE "{}" TEMPLATE "{}"'.format(*names))


@pytest.fixture
def legacy_url(
    server: EmbeddedServer, administrator: Engine, legacy_template: str
) -> Iterator[str]:
    """An adopted legacy database: see tests/small_legacy.py for its duplicates."""
    with cloned(administrator, legacy_template, server.url(f"legacy_{next(numbers)}")) as url:
        yield url


@pytest.fixture
def marked_url(
    server: EmbeddedServer, administrator: Engine, marked_template: str
) -> Iterator[str]:
    """The same with its guards up, and nothing merged yet."""
    with cloned(administrator, marked_template, server.url(f"marked_{next(numbers)}")) as url:
        yield url


@pytest.fixture
def database_url(guarded_url: str) -> str:
    """The database that a test uses; a test of races overrides this to use both kinds."""
    empty(guarded_url)
    return guarded_url


@pytest.fixture(params=["guarded_url", "unguarded_url"])
def either_url(request: pytest.FixtureRequest) -> str:
    """A database with guards, and then one without."""
    url: str = request.getfixturevalue(request.param)
    empty(url)
    return url


@pytest.fixture
def make_app(service_kind: str) -> Iterator[Callable[..., Flask]]:
    """Make applications that answer errors as production does.

    The clients of one talk to the asynchronous service with the same settings, if the test says so.
    """
    made: list[Flask] = []
    asynchronous: list[AsgiApplication] = []

    def make(url: str, **config: object) -> Flask:
        app = create_app({"DATABASE_URL": url, **USUAL, **config})
        made.append(app)
        if service_kind == "asgi":
            asynchronous.append(asgi_of(url, config))
            app.test_client_class = partial(AsgiClient, asgi=asynchronous[-1])  # type: ignore[assignment]
        return app

    yield make
    for one in asynchronous:
        one.dispose()
    for app in made:
        hang_up(app)


@pytest.fixture(scope="session")
def applications() -> dict[str, Flask]:
    """The applications that tests share, by the URL of their database."""
    return {}


@pytest.fixture
def app(applications: dict[str, Flask], database_url: str) -> Iterator[Flask]:
    """The database's application, with no connection yet.

    Making one takes longer than most tests; a test that changes an application makes its own.
    """
    if database_url not in applications:
        applications[database_url] = create_app({"DATABASE_URL": database_url, **USUAL})
    app = applications[database_url]
    yield app
    hang_up(app)


def hang_up(app: Flask) -> None:
    """Close an application's connections, those to its tenants' databases too."""
    with app.app_context():
        db.default_engine.dispose()
        tenant_engines().dispose()


def asgi_of(url: str, config: dict[str, Any] | None = None) -> AsgiApplication:
    """Return the asynchronous service with the settings that an application has."""
    given = {"DATABASE_URL": url, **USUAL, **(config or {})}
    return AsgiApplication({name: given[name] for name in given if is_setting(name)})


@cache
def shared_asgi(url: str) -> AsgiApplication:
    """Return the asynchronous service that tests share."""
    return asgi_of(url)


@pytest.fixture
def client(app: Flask, service_kind: str, database_url: str) -> Iterator[FlaskClient]:
    """A client of one of the servers; its application is Flask's either way."""
    if service_kind == "flask":
        yield app.test_client()
        return
    asgi = shared_asgi(database_url)
    yield AsgiClient(app, app.response_class, asgi=asgi)
    asgi.dispose()


@pytest.fixture
def context(make_app: Callable[..., Flask], either_url: str) -> Iterator[Flask]:
    """An application context, on a guarded database and on one that is not."""
    app = make_app(either_url)
    with app.app_context():
        yield app


@pytest.fixture
def sales(context: Flask) -> int:
    return Department.get_or_create(name="Sales")[0].id


@pytest.fixture
def own(fresh_database: str) -> Iterator[Engine]:
    """The other application's database; its models are bound to plain objects, not callables."""
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA old; CREATE EXTENSION citext")
    Own.metadata.create_all(engine)
    session = scoped_session(sessionmaker(engine))
    for model in (Tag, Legacy, Fussy, Badge, Stamp, Basket, Car):
        model.bind(engine, session, RetryPolicy(attempts=3, deadline=60, lock_timeout=60))
    yield engine
    session.remove()
    engine.dispose()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Have the root logger, and warnings, as they were."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    switches = logging.logThreads, logging.logProcesses, logging.logMultiprocessing
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logging.logThreads, logging.logProcesses, logging.logMultiprocessing = switches


@pytest.fixture(scope="session")
def shared_site(server: EmbeddedServer, administrator: Engine) -> Iterator[Engine]:
    """A database for the tests of duplicates; one for each would take them most of their time."""
    engine = create_engine(server.url("site"))
    with administrator.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE site")
    yield engine
    engine.dispose()


@pytest.fixture
def site(shared_site: Engine) -> Iterator[Site]:
    """The service's tables as a legacy database has them: without guards, and empty."""
    db.Model.metadata.create_all(shared_site)
    site = Site(shared_site)
    site.run(
        *indexes_of_a_legacy_table("department"),
        *indexes_of_a_legacy_table("employee"),
        "CREATE INDEX ix_employee_department_id ON employee (department_id)",
        "CREATE INDEX ix_employee_manager_id ON employee (manager_id)",
    )
    yield site
    shared_site.dispose()
    site.run(
        "DO $$ DECLARE name text; BEGIN FOR name IN SELECT nspname FROM pg_namespace"
        " WHERE nspname !~ '^(pg_|information_schema)'"
        " LOOP EXECUTE format('DROP SCHEMA %%I CASCADE', name); END LOOP; END $$",
        "CREATE SCHEMA public",
    )


def indexes_of_a_legacy_table(table: str) -> Iterator[str]:
    """Yield the statements that index a table as its adoption does."""
    key = ", ".join(NATURAL_KEYS[table])
    canonical, created = "duplicate_of_id IS NULL", "creation_token IS NOT NULL"
    yield f"CREATE INDEX ix_{table}_natural_key ON {table} ({key}) WHERE {canonical}"
    yield (
        f"CREATE UNIQUE INDEX uq_{table}_creation_token ON {table} (creation_token) WHERE {created}"
    )
    yield f"CREATE INDEX ix_{table}_duplicate_of_id ON {table} (duplicate_of_id)"
