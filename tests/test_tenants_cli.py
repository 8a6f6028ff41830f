"""`flask tenants`, and `--tenant`: each says what it did, and fails with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import Result
from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine, NullPool, create_engine

from app import onboarding, tenants
from app.cli import tenants as commands
from app.db import db
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import execute
from tests.races import inserts_held
from tests.serving import ROOT
from tests.tenancy import (
    PATTERN,
    database_of,
    departments,
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
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


def call(runner: FlaskCliRunner, *arguments: str) -> Result:
    return runner.invoke(args=["tenants", *arguments])


def done(runner: FlaskCliRunner, *arguments: str) -> str:
    """Return what a command prints that ends well."""
    result = call(runner, *arguments)
    assert result.exit_code == 0, result.output
    printed: str = result.stdout
    return printed


def test_a_tenant_is_created_listed_and_dropped(runner: FlaskCliRunner, app: Flask) -> None:
    """And each command says so."""
    assert done(runner, "list").startswith("There is no tenant: flask tenants create")
    assert json.loads(done(runner, "list", "--json")) == []
    name = new_name()
    database = database_of(name)
    assert done(runner, "create", name) == f"Created the tenant {name}, database {database}.\n"
    assert done(runner, "create", name) == (
        f"There is already a tenant {name}, database {database}.\n"
    )
    (row,) = json.loads(done(runner, "list", "--json"))
    assert row.pop("size") > 1_000_000
    assert row.pop("created_at")
    assert row == {
        "name": name,
        "state": "ready",
        "database": database,
        "owner": None,
        "revision": "0004",
        "duplicates": {"department": 0, "employee": 0},
        "error": None,
    }
    (line,) = [line.split() for line in done(runner, "list").splitlines() if name in line]
    assert [*line[:3], *line[4:7]] == [name, "ready", database, "MiB", "0004", "0"]
    assert done(runner, "drop", name, "--confirm", name) == (
        f"Dropped the tenant {name}, database {database}.\n"
    )
    assert states(app) == {}


def test_the_list_tells_what_it_cannot_look_into(
    runner: FlaskCliRunner, app: Flask, administrator: Engine
) -> None:
    """With an exit status; who is coming or going has no size."""
    gone, coming = new_name(), new_name()
    onboard(app, gone)
    execute_in(administrator, f'DROP DATABASE "{database_of(gone)}"')
    with app.app_context():
        tenants.register(db.default_engine, coming, database_of(coming), 1, None)
    result = call(runner, "list", "--json")
    assert result.exit_code == 1
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert "does not exist" in rows[gone]["error"]
    assert (rows[coming]["state"], rows[coming]["error"]) == ("creating", None)
    assert "does not exist" in call(runner, "list").stdout


def test_upgrade_goes_on_where_one_fails(
    runner: FlaskCliRunner, app: Flask, server: EmbeddedServer, administrator: Engine
) -> None:
    """It says who was brought up, who could not be, and who was left alone; exit status 1."""
    behind, unindexed, gone, coming = (new_name() for _ in range(4))
    onboard(app, behind, unindexed, gone)
    assert done(runner, "upgrade") == "Up to date: 3 of 3 tenants.\n"
    execute(
        server.url(database_of(behind)),
        "UPDATE rollcall_version SET version_num = '0003'",
        "ALTER TABLE rollcall_token DROP COLUMN tenant",
        "DROP TABLE rollcall_tenant",
    )
    execute(server.url(database_of(unindexed)), "DROP INDEX uq_department_natural_key")
    execute_in(administrator, f'ALTER DATABASE "{database_of(gone)}" ALLOW_CONNECTIONS false')
    with app.app_context():
        tenants.register(db.default_engine, coming, database_of(coming), 1, None)
    result = call(runner, "upgrade", "--jobs", "2")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{behind}: brought from revision 0003 to 0004.",
        f"{unindexed}: indexes were repaired.",
        "Up to date: 2 of 3 tenants.",
    ]
    errors = [line for line in result.stderr.splitlines() if line.startswith("tenant-")]
    assert errors[0].startswith(f"{gone}: PostgreSQL at ")
    assert errors[1] == f"{coming}: left alone, since it is being created or dropped."
    told = call(runner, "upgrade", "--json")
    assert told.exit_code == 1
    outcome = json.loads(told.stdout)
    assert outcome["left"] == [coming]
    assert outcome["tenants"][behind] == {
        "before": "0004",
        "after": "0004",
        "changed": False,
        "error": None,
    }
    assert outcome["tenants"][gone]["error"]


@pytest.mark.parametrize("confirm", [[], ["--confirm", "another"]])
def test_nothing_is_dropped_without_the_name_again(
    runner: FlaskCliRunner, app: Flask, confirm: list[str], administrator: Engine
) -> None:
    """Without a terminal nobody is asked."""
    name = new_name()
    onboard(app, name)
    result = call(runner, "drop", name, *confirm)
    assert result.exit_code == 2
    assert f"Nothing is dropped without --confirm {name}." in result.stderr
    assert exists(administrator, name)


def test_on_a_terminal_the_name_is_asked_for(
    runner: FlaskCliRunner, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the database that will be gone."""
    name = new_name()
    onboard(app, name)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(commands, "sys", SimpleNamespace(stdin=terminal, exit=sys.exit))
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return name

    monkeypatch.setattr(click, "prompt", answer)
    assert done(runner, "drop", name).startswith("Dropped the tenant")
    assert asked == [f"This deletes database {database_of(name)}. The name again"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "Acme"], "a tenant's name is 1 to 63 of"),
        (["create", "postgres"], "the name is reserved: take another"),
        (["create", "a" * 60], f"the name of its database, {PATTERN}, would be longer than 63"),
        (["create", "acme", "--owner", "nobody at all"], "there is no such role"),
        (["drop", "nobody", "--confirm", "nobody"], "there is no tenant named nobody"),
        (["upgrade", "--jobs", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    runner: FlaskCliRunner, arguments: list[str], complaint: str
) -> None:
    """With an exit status, and nothing on standard output."""
    result = call(runner, *arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert complaint in line


@pytest.mark.parametrize("command", [["create", "acme"], ["list"], ["drop", "acme"], ["upgrade"]])
def test_a_database_that_is_away_or_behind_is_one_clear_line(
    command: list[str], make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """It says what to do where something can be done."""
    away = tenants_app(make_app, "postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    behind = tenants_app(make_app, fresh_database)
    results = [call(one.test_cli_runner(), *command) for one in (away, behind)]
    assert [result.exit_code for result in results] == [1, 1]
    assert results[1].stderr.splitlines()[-1] == (
        "Error: the table rollcall_tenant is not there: run flask init-db first"
    )
    assert results[0].stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in results[0].stderr


def test_commands_of_stewards_work_for_one_tenant(
    runner: FlaskCliRunner, app: Flask, tmp_path: Path
) -> None:
    """What they import, report and change is that tenant's; an unknown one is one line."""
    name = new_name()
    onboard(app, name)
    people = tmp_path / "people.csv"
    people.write_text("name,department\nAda Lovelace,Research\n", "utf-8")
    for arguments in (
        ["employees", "import", str(people), "--tenant", name],
        ["duplicates", "guard", "--tenant", name],
        ["duplicates", "merge", "--all", "--tenant", name],
        ["duplicates", "purge", "--older-than", "0d", "--yes", "--tenant", name],
    ):
        outcome = runner.invoke(args=arguments)
        assert outcome.exit_code == 0, outcome.output
    client = app.test_client()
    assert departments(client, name) == ["Research"]
    assert departments(client, None) == []
    exported = [
        runner.invoke(args=["employees", "export", "-", *whose]).stdout.count("Ada")
        for whose in ([], ["--tenant", name])
    ]
    assert exported == [0, 1]
    unknown = runner.invoke(args=["duplicates", "status", "--tenant", "nobody"])
    assert (unknown.exit_code, unknown.stderr) == (1, "Error: there is no tenant named nobody\n")


def test_an_administrators_url_leads_to_the_tenants_database(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Past a pooler, as it does for the service's own."""
    app = tenants_app(make_app, database_url, ROLLCALL_ADMIN_URL=database_url)
    name = new_name()
    onboard(app, name)
    runner = app.test_cli_runner()
    outcome = runner.invoke(args=["duplicates", "unguard", "--tenant", name])
    assert outcome.exit_code == 0, outcome.output
    states = [
        json.loads(runner.invoke(args=["duplicates", "status", "--json", *whose]).stdout)
        for whose in ([], ["--tenant", name])
    ]
    assert states[0] != states[1]
    with app.app_context():
        onboarding.drop(name)


def test_a_tokens_tenant_is_told(runner: FlaskCliRunner, app: Flask) -> None:
    """When it is made, and in the list; it has to be a tenant."""
    name = new_name()
    onboard(app, name)
    arguments = ["tokens", "create", "portal", "--scope", "read", "--tenant"]
    made = runner.invoke(args=[*arguments, name])
    assert f"scope read, tenant {name}. It is not shown again." in made.stderr
    (listed,) = json.loads(runner.invoke(args=["tokens", "list", "--json"]).stdout)
    assert listed["tenant"] == name
    arguments[2] = "other"
    unknown = runner.invoke(args=[*arguments, "nobody"])
    assert unknown.stderr == "Error: there is no tenant named nobody\n"


def test_a_creation_that_is_killed_is_finished(database_url: str, app: Flask) -> None:
    """By kill -9, while it writes that all is done; the same command again."""
    name = new_name()
    flask = str(Path(sys.executable).with_name("flask"))
    environment = {"DATABASE_URL": database_url, "ROLLCALL_TENANT_DATABASE": PATTERN}
    engine = create_engine(database_url, poolclass=NullPool)
    with (
        inserts_held(engine, "rollcall_tenant", "NEW.state = 'ready'", event="UPDATE") as gate,
        subprocess.Popen(
            [flask, "tenants", "create", name], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
        ) as killed,
    ):
        gate.wait_for(1)
        killed.kill()
        killed.wait()
        gate.open()
    assert states(app) == {name: "creating"}
    assert call(app.test_cli_runner(), "create", name).stdout.startswith("Created the tenant")
    assert departments(app.test_client(), name) == []
