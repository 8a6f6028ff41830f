"""Tenants come and go: what breaks off can be finished, and no other database is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Flask
from sqlalchemy import Connection, Engine, create_engine, make_url, text

from app import engines, onboarding, tenants, transactions
from app.config import load_settings
from app.database import forget_connections, tenant_engines, work_for
from app.db import db
from app.errors import (
    ConfigurationError,
    DatabaseAway,
    DatabaseTaken,
    TenantGoing,
    TenantInUse,
    TenantUnknown,
    UnknownRole,
    UnusableName,
)
from app.models import Department
from app.tenants import database_for, template_prefix
from migrations_bootstrap import DatabaseMissing, clones
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import execute, numbers
from tests.tenancy import (
    PATTERN,
    database_of,
    execute_in,
    exists,
    new_name,
    onboard,
    states,
    tenants_app,
)


@pytest.fixture
def app(make_app: Callable[..., Flask], database_url: str) -> Flask:
    return tenants_app(make_app, database_url)


@pytest.fixture
def context(app: Flask) -> Iterator[Flask]:
    with app.app_context():
        yield app


@pytest.mark.parametrize("name", ["a", "acme", "7-eleven", "a_b", "0", "a" * 54])
def test_a_name_is_a_label_of_a_host(name: str) -> None:
    """It is in the database's name as it stands."""
    assert database_for(name, "rollcall_{name}", []) == f"rollcall_{name}"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "Acme",
            "acme ",
            "-a",
            "a-",
            "_a",
            "a_",
            "a.b",
            "a/b",
            "a b",
            'a"b',
            "a\n",
            "a;b",
        ),
        *("münchen", "a\x00", "a%", "+template_0004", "\uff11", "a" * 55, "a" * 64),
        *("postgres", "template0", "template1", "www", "api", "rollcall", "own", "admins"),
    ],
)
def test_a_name_that_would_be_anything_else_is_refused(name: str) -> None:
    """Also what is too long by its bytes, reserved, or another database's."""
    with pytest.raises(UnusableName):
        database_for(name, "rollcall_{name}", ["rollcall_own", "rollcall_admins", None])


def test_without_a_pattern_databases_of_the_server_are_still_reserved() -> None:
    """A tenant cannot have the service's own."""
    for name in ("postgres", "template1", "service"):
        with pytest.raises(UnusableName):
            database_for(name, "{name}", ["service"])


def test_no_tenant_can_have_the_name_of_a_template() -> None:
    """It has a plus in it, which no name and no pattern can have."""
    assert "+" in template_prefix("{name}")
    assert not tenants.is_name(template_prefix("{name}"))


@pytest.mark.parametrize(
    "pattern",
    [
        "rollcall",
        "{name}{name}",
        "A_{name}",
        "a+{name}",
        "{name!r}",
        "x" * 41 + "{name}",
        '"{name}',
    ],
)
def test_a_pattern_that_could_lead_astray_stops_the_start(pattern: str) -> None:
    """It has to hold the name once, and plain characters."""
    with pytest.raises(ConfigurationError, match="ROLLCALL_TENANT_DATABASE must be like"):
        load_settings({"ROLLCALL_TENANT_DATABASE": pattern})


def test_a_tenant_is_made_once(context: Flask, administrator: Engine) -> None:
    """It has a guarded database at the newest revision; who asks again finds it."""
    name = new_name()
    made, created = onboarding.create(name)
    assert (made.name, made.database, made.state, created) == (
        name,
        database_of(name),
        "ready",
        True,
    )
    assert onboarding.create(name, owner="nobody at all") == (made, False)
    details = onboarding.look_into(made)
    assert (details.revision, details.duplicates) == ("0004", {"department": 0, "employee": 0})
    assert details.size > 1_000_000
    with administrator.connect() as connection:
        oid = connection.scalar(clones.OID, {"name": made.database})
    assert oid == made.database_oid
    work_for(name)
    assert Department.get_or_create(name="Sales")[1]
    with db.engine.connect() as connection:
        guarded = connection.scalar(text("SELECT to_regclass('uq_department_natural_key')"))
    assert guarded is not None


def test_creators_of_one_tenant_make_it_once(app: Flask) -> None:
    """Of six at a time one is told that it was the one; those of others do not wait for them."""
    name, other = new_name(), new_name()

    def create(which: str) -> bool:
        with app.app_context():
            return onboarding.create(which)[1]

    with ThreadPoolExecutor(7) as pool:
        outcomes = list(pool.map(create, [name] * 6 + [other]))
    assert sorted(outcomes[:6]) == [False] * 5 + [True]
    assert outcomes[6]
    assert states(app) == {name: "ready", other: "ready"}


class PowerCut(BaseException):
    """Ends everything at once, as far as that can be had in a test."""


STEPS = [
    (tenants, "register"),
    (clones, "ensure_template"),
    (clones, "clone"),
    (onboarding, "bootstrap"),
    (tenants, "note"),
]


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_creation_that_broke_off_is_finished(
    context: Flask, monkeypatch: pytest.MonkeyPatch, module: object, step: str
) -> None:
    """Between any two steps; until then nobody finds the tenant."""
    name = new_name()
    with monkeypatch.context() as patched:
        patched.setattr(module, step, cut_the_power)
        with pytest.raises(PowerCut):
            onboarding.create(name)
    with pytest.raises(TenantUnknown):
        tenant_engines().of(name)
    assert onboarding.create(name)[1]
    work_for(name)
    assert Department.get_or_create(name="Sales")[1]


def cut_the_power(*arguments: object, **options: object) -> None:
    raise PowerCut


@pytest.mark.parametrize(("module", "step"), [(clones, "drop"), (tenants, "forget")])
def test_a_drop_that_broke_off_is_finished(
    context: Flask,
    administrator: Engine,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    step: str,
) -> None:
    """From its first step on nobody finds the tenant, and nobody else is given the name."""
    name = new_name()
    onboarding.create(name)
    with monkeypatch.context() as patched:
        patched.setattr(module, step, cut_the_power)
        with pytest.raises(PowerCut):
            onboarding.drop(name)
    with pytest.raises(TenantGoing):
        onboarding.create(name)
    for find in (tenant_engines().of, onboarding.upgrade):
        with pytest.raises(TenantUnknown):
            find(name)
    onboarding.drop(name)
    assert not exists(administrator, name)
    with pytest.raises(TenantUnknown):
        onboarding.drop(name)


def test_a_database_that_was_there_is_not_taken_over(context: Flask, administrator: Engine) -> None:
    """Whoever made it. Nothing stays behind of the attempt."""
    name = new_name()
    execute_in(administrator, f'CREATE DATABASE "{database_of(name)}"')
    with pytest.raises(DatabaseTaken):
        onboarding.create(name)
    assert states(context) == {}
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')
    assert onboarding.create(name)[1]


@pytest.mark.parametrize("step", ["ensure_template", "clone"])
def test_a_database_that_comes_in_between_is_not_taken_over(
    context: Flask, administrator: Engine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """After the tenant was registered, or between a creation that broke off and its end."""
    name = new_name()
    with monkeypatch.context() as patched:
        patched.setattr(clones, step, cut_the_power)
        with pytest.raises(PowerCut):
            onboarding.create(name)
    execute_in(administrator, f'CREATE DATABASE "{database_of(name)}"')
    with pytest.raises(DatabaseTaken):
        onboarding.create(name)
    assert states(context) == {}
    assert exists(administrator, name)
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')


def test_a_drop_leaves_a_database_alone_that_is_not_the_tenants(
    context: Flask, administrator: Engine
) -> None:
    """Somebody dropped the tenant's and made another under its name."""
    name = new_name()
    onboarding.create(name)
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')
    execute_in(administrator, f'CREATE DATABASE "{database_of(name)}"')
    onboarding.drop(name)
    assert states(context) == {}
    assert exists(administrator, name)
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')


def test_a_database_that_cannot_be_made_leaves_nothing_behind(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's answer is what the operator gets."""
    name = new_name()
    monkeypatch.setattr(clones, "ensure_template", lambda *given, **options: "no such template")
    with pytest.raises(DatabaseMissing, match="no such template"):
        onboarding.create(name)
    assert states(context) == {}


def test_a_database_may_have_an_owner(context: Flask, administrator: Engine) -> None:
    """A role that there is."""
    role, name = f"owner_{next(numbers)}", new_name()
    execute_in(administrator, f"CREATE ROLE {role}")
    with pytest.raises(UnknownRole):
        onboarding.create(name, owner="nobody at all")
    assert onboarding.create(name, owner=role)[0].owner == role
    owner = text("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = :name")
    with administrator.connect() as connection:
        assert connection.scalar(owner, {"name": database_of(name)}) == role
    work_for(name)
    assert Department.get_or_create(name="Sales")[1]


def test_a_database_that_others_use_is_dropped_only_by_force(
    context: Flask, server: EmbeddedServer, administrator: Engine
) -> None:
    """A drop that is refused changes nothing."""
    name = new_name()
    onboarding.create(name)
    stranger = create_engine(server.url(database_of(name)))
    with stranger.connect():
        with pytest.raises(TenantInUse, match="1"):
            onboarding.drop(name)
        assert states(context) == {name: "ready"}
        work_for(name)
        assert Department.get_or_create(name="Sales")[1]
        onboarding.drop(name, force=True)
    stranger.dispose()
    assert not exists(administrator, name)


def test_a_stranger_who_slips_in_keeps_the_database_and_no_more(
    context: Flask, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenant is gone for everybody by then; the drop is finished later."""
    name = new_name()
    onboarding.create(name)
    stranger = create_engine(server.url(database_of(name)))
    with stranger.connect():
        monkeypatch.setattr(clones, "strangers", lambda *given: 0)
        with pytest.raises(TenantInUse):
            onboarding.drop(name)
        assert states(context) == {name: "dropping"}
    stranger.dispose()
    onboarding.drop(name)
    assert states(context) == {}


def test_a_drop_while_a_connection_is_opened_is_seen(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is asked again when it is open: that drop has not ended it."""
    name = new_name()
    onboarding.create(name)
    set_up = engines.TenantEngines._set_up

    def drop_meanwhile(self: engines.TenantEngines, *given: object) -> None:
        set_up(self, *given)  # type: ignore[arg-type]
        tenants.note(db.default_engine, name, "dropping")

    monkeypatch.setattr(engines.TenantEngines, "_set_up", drop_meanwhile)
    engine = tenant_engines().of(name)
    with pytest.raises(TenantUnknown):
        engine.connect()
    assert engine.pool.status() == "0 connections in use, 0 idle"


def test_a_connection_that_leads_elsewhere_is_not_used(context: Flask) -> None:
    """Whatever stands between us and the server."""
    name = new_name()
    onboarding.create(name)
    known, found = tenant_engines(), tenant_engines().of(name)
    with found.connect() as connection:
        driver = connection.connection.driver_connection
        with pytest.raises(DatabaseAway, match="leads to another"):
            known._set_up(driver, name, found.url.set(database="other"))


def test_a_database_that_refuses_to_say_what_it_is_is_not_used(
    context: Flask, server: EmbeddedServer
) -> None:
    """The driver's error is the caller's, as for any other statement."""
    name = new_name()
    onboarding.create(name)
    execute(server.url(database_of(name)), "ALTER TABLE rollcall_version RENAME version_num TO x")
    with pytest.raises(Exception, match="version_num"):
        tenant_engines().of(name).connect()


def test_a_url_cannot_lead_all_tenants_to_one_database(server: EmbeddedServer) -> None:
    """What its query says of a database is left out."""
    url = make_url(server.url("own")).update_query_dict({"dbname": "own", "database": "own"})
    found = clones.url_of(url, "tenant")
    assert found.database == "tenant"
    assert not {"dbname", "database"} & found.query.keys()


def test_tenants_share_what_is_large(context: Flask) -> None:
    """The dialect, by which statements are compiled, and what is compiled."""
    names = [new_name(), new_name()]
    for name in names:
        onboarding.create(name)
    one, two = (tenant_engines().of(name) for name in names)
    assert one.dialect is two.dialect is tenant_engines().registry.dialect
    assert one.get_execution_options() == two.get_execution_options()
    assert one.pool is not two.pool
    assert one.url.database != two.url.database


def test_a_forked_process_begins_with_no_connection(context: Flask) -> None:
    """Those that are there are the parent's to close."""
    name = new_name()
    onboarding.create(name)
    engine = tenant_engines().of(name)
    with engine.connect() as parents:
        forget_connections()
        assert db.default_engine.pool._cap.held == 0  # type: ignore[attr-defined]
        assert tenant_engines().of(name) is not engine
        work_for(name)
        Department.get_or_create(name="Sales")
        assert parents.scalar(text("SELECT name FROM department")) == "Sales"
        parents.detach()


def test_the_template_is_renewed(
    context: Flask, administrator: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an older revision goes; one that this version does not know is another's."""
    older, newer = (f"{template_prefix(PATTERN)}{revision}" for revision in ("0003", "9999"))
    for name in (older, newer):
        execute_in(administrator, f'CREATE DATABASE "{name}" IS_TEMPLATE true')
    assert onboarding.renew_template() == [older]
    assert onboarding.renew_template() == []
    for statement in ("ALTER DATABASE {} IS_TEMPLATE false", "DROP DATABASE {}"):
        execute_in(administrator, statement.format(f'"{newer}"'))


def test_a_template_that_was_made_meanwhile_is_taken(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever had the lock before."""
    onboarding.renew_template()
    look, answers = clones._is_template, [False]

    def look_late(connection: Connection, name: str) -> bool:
        return answers.pop() if answers else look(connection, name)

    monkeypatch.setattr(clones, "_is_template", look_late)
    monkeypatch.setattr(clones, "bootstrap", cut_the_power)
    assert onboarding.renew_template() == []
    assert answers == []


def test_a_tenant_that_moved_is_looked_for_anew(context: Flask) -> None:
    """Its old engine leads to another database than the registry says."""
    name, other = new_name(), new_name()
    for one in (name, other):
        onboarding.create(one)
    engine = tenant_engines().of(name)
    moved = text("UPDATE rollcall_tenant SET database = :to WHERE name = :name")
    with db.engine.begin() as connection:
        connection.execute(moved, {"name": other, "to": "away"})
        connection.execute(moved, {"name": name, "to": database_of(other)})
    with pytest.raises(TenantUnknown):
        engine.connect()
    found = tenant_engines().of(name)
    assert found.url.database == database_of(other)
    found.connect().close()


def test_a_connection_that_is_lost_at_once_is_made_again(
    context: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has relied on it."""
    name = new_name()
    onboarding.create(name)
    work_for(name)
    question = "SELECT 1, pg_terminate_backend(pg_backend_pid())"

    def mend(state: str | None) -> None:
        monkeypatch.undo()

    monkeypatch.setattr(engines, "WHERE_AM_I", question)
    monkeypatch.setattr(transactions, "on_retry", {mend})
    assert Department.get_or_create(name="Sales")[1]
    assert question != engines.WHERE_AM_I


def test_a_request_that_nobody_observes_finds_its_tenant_too(app: Flask) -> None:
    """As in a shell or a test."""
    name = new_name()
    onboard(app, name)
    with app.test_request_context("/api/v1/departments", headers={"X-Tenant": name}):
        assert app.preprocess_request() is None
        assert db.engine.url.database == database_of(name)
