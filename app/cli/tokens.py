"""``flask tokens``: say who may use the service."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta

import click
from flask.cli import AppGroup

from app import tokens
from app.cli.durations import duration
from app.cli.long_work import one_line_ends
from app.cli.text import make_console, text_table
from app.database import administering
from app.natural_key import normalise

group = AppGroup("tokens", help="Say who may use the service.")

name_argument = click.argument("name", callback=lambda context, name, value: normalise(value))

COLUMNS = ("name", "scope", "created_at", "expires_at", "last_used_on", "tenant")


@group.command("create")
@name_argument
@click.option(
    "--scope",
    type=click.Choice(tokens.SCOPES),
    required=True,
    help="What it is good for: to read; to write as well; for duplicates and merges as well.",
)
@click.option(
    "--expires",
    callback=duration,
    metavar="TIME",
    help="How long it is good: 90d, 12h. Without it, until it is revoked.",
)
@click.option("--tenant", metavar="NAME", help="Whose it is. Without it, it is good for all.")
def create_command(name: str, scope: str, expires: timedelta | None, tenant: str | None) -> None:
    """Create a token and print it. It is shown this once: only its SHA-256 is stored."""
    if expires == timedelta():
        raise click.BadParameter("a token has to be good for some time", param_hint="--expires")
    with one_line_ends(), administering() as engine:
        token = tokens.issue(engine, name, scope, expires, tenant)
    click.echo(token)
    whose = "" if tenant is None else f", tenant {tenant}"
    click.echo(f"Created the token {name}, scope {scope}{whose}. It is not shown again.", err=True)


@group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def list_command(as_json: bool) -> None:
    """List the tokens: name, scope, when they were created, expire, were last used, and whose."""
    with one_line_ends(), administering() as engine:
        rows = [row._asdict() for row in tokens.list_all(engine)]
    if as_json:
        click.echo(json.dumps([{name: _plain(row[name]) for name in COLUMNS} for row in rows]))
    elif rows:
        header = ("name", "scope", "created", "expires", "last used", "tenant")
        shown = ([*map(_day, map(row.get, COLUMNS[:-1])), row["tenant"] or "all"] for row in rows)
        make_console().print(text_table(header, shown))
    else:
        click.echo("There is no token: flask tokens create NAME --scope admin makes one.")


def _plain(value: str | date | None) -> str | None:
    return value.isoformat() if isinstance(value, date) else value


def _day(value: str | date | None) -> str:
    day = value.date() if isinstance(value, datetime) else value
    return "never" if day is None else str(day)


@group.command("revoke")
@name_argument
def revoke_command(name: str) -> None:
    """Revoke a token: no worker takes it any more after ten seconds. Its name is free again."""
    with one_line_ends(), administering() as engine:
        tokens.revoke(engine, name)
    click.echo(f"Revoked the token {name}.")
