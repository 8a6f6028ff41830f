"""`flask tokens`: prints a token once and alone, and fails with one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from click.testing import Result
from flask import Flask
from flask.testing import FlaskCliRunner


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


def call(runner: FlaskCliRunner, *arguments: str) -> Result:
    return runner.invoke(args=["tokens", *arguments])


def done(runner: FlaskCliRunner, *arguments: str) -> str:
    """Return what a command prints that ends well."""
    result = call(runner, *arguments)
    assert result.exit_code == 0, result.output
    printed: str = result.stdout
    return printed


def test_create_prints_the_token_alone_and_once(runner: FlaskCliRunner) -> None:
    """What is for people goes to standard error; the list does not show it."""
    result = call(runner, "create", "importer", "--scope", "write")
    assert result.exit_code == 0
    assert re.fullmatch(r"rollcall_[0-9a-f]{64}\n", result.stdout)
    assert result.stderr == ("Created the token importer, scope write. It is not shown again.\n")
    assert result.stdout.strip() not in done(runner, "list") + done(runner, "list", "--json")


def test_list_shows_what_can_be_told_of_each(runner: FlaskCliRunner) -> None:
    """To the day for people, in full as JSON."""
    assert done(runner, "list").startswith("There is no token: flask tokens create")
    assert json.loads(done(runner, "list", "--json")) == []
    done(runner, "create", "portal", "--scope", "read", "--expires", "90d")
    done(runner, "create", "ops", "--scope", "admin")
    portal, ops = json.loads(done(runner, "list", "--json"))
    assert [portal["name"], portal["scope"], portal["last_used_on"]] == ["portal", "read", None]
    assert [ops["name"], ops["scope"], ops["expires_at"]] == ["ops", "admin", None]
    made, end = (datetime.fromisoformat(portal[name]) for name in ("created_at", "expires_at"))
    assert end - made == timedelta(days=90)
    assert abs(datetime.now(timezone.utc) - made) < timedelta(hours=1)
    lines = [line.split() for line in done(runner, "list").splitlines() if "never" in line]
    assert lines == [
        ["portal", "read", str(made.date()), str(end.date()), "never", "all"],
        ["ops", "admin", ops["created_at"][:10], "never", "never", "all"],
    ]


def test_revoke_frees_the_name(runner: FlaskCliRunner) -> None:
    """And says so."""
    done(runner, "create", "ops", "--scope", "read")
    assert done(runner, "revoke", "ops") == "Revoked the token ops.\n"
    assert done(runner, "create", "ops", "--scope", "admin")


def test_names_are_compared_as_they_are_meant(runner: FlaskCliRunner) -> None:
    """A terminal that decomposes its accents names the same token."""
    done(runner, "create", "Zoe\u0308 ", "--scope", "read")
    assert call(runner, "create", "Zo\u00eb", "--scope", "read").exit_code == 1
    assert done(runner, "revoke", " Zoe\u0308") == "Revoked the token Zo\u00eb.\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "taken", "--scope", "read"], "there is a token named taken: revoke it first"),
        (["create", "\x1b[1m", "--scope", "read"], "a name is 1 to 64 characters"),
        (["create", "", "--scope", "read"], "a name is 1 to 64 characters"),
        (["create", "admin-file", "--scope", "read"], "is the name of ROLLCALL_ADMIN_TOKEN_FILE's"),
        (["create", "new"], "Missing option '--scope'"),
        (["create", "new", "--scope", "root"], "'root' is not one of 'read', 'write', 'admin'"),
        (["create", "new", "--scope", "read", "--expires", "soon"], "a number and a unit: 30d"),
        (["create", "new", "--scope", "read", "--expires", "-1d"], "a number and a unit: 30d"),
        (["create", "new", "--scope", "read", "--expires", "0d"], "good for some time"),
        (["revoke", "nobody"], "there is no token named nobody"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    runner: FlaskCliRunner, arguments: list[str], complaint: str
) -> None:
    """With an exit status, and nothing on standard output."""
    done(runner, "create", "taken", "--scope", "read")
    result = call(runner, *arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert complaint in line


@pytest.mark.parametrize(
    "command", [["create", "ops", "--scope", "read"], ["list"], ["revoke", "x"]]
)
def test_a_database_that_is_away_or_behind_is_one_clear_line(
    command: list[str], make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """It says what to do where something can be done."""
    away = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    results = [call(one.test_cli_runner(), *command) for one in (away, make_app(fresh_database))]
    assert [result.exit_code for result in results] == [1, 1]
    assert results[1].stderr == (
        "Error: the table rollcall_token is not there: run flask init-db first\n"
    )
    assert results[0].stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in results[0].stderr
