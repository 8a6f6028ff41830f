"""``flask init-db``: create, migrate or adopt the database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import click
from flask.cli import with_appcontext

from app.database import bootstrap_database
from migrations_bootstrap import Bootstrap, BootstrapError, Census, TableIndexes


@click.command("init-db")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@with_appcontext
def init_db(as_json: bool) -> None:
    """Create the database, its tables and its indexes, or adopt those of a legacy application.

    Adds what is missing, changes no row, and can be run again at any time.
    """
    outcome = bring_up(adopt=True, count=True)
    if as_json:
        click.echo(json.dumps({**asdict(outcome), "changed": outcome.changed}))
    else:
        click.echo("\n".join(_report(outcome)))


def bring_up(**options: bool) -> Bootstrap:
    """Bring the database up for a command, which ends with the bootstrap's line if that fails."""
    try:
        return bootstrap_database(**options)
    except BootstrapError as error:
        raise click.ClickException(str(error)) from None


def _report(outcome: Bootstrap) -> Iterator[str]:
    if outcome.created:
        yield "Created the database."
    if outcome.upgrade.adopted:
        yield f"Adopted: {', '.join(outcome.upgrade.adopted)}."
    for change in outcome.upgrade.changes:
        yield f"  {change}"
    if outcome.upgrade.before != outcome.upgrade.after:
        yield f"Brought the schema to revision {outcome.upgrade.after}."
    for table in outcome.tables:
        yield from _table(table)
    if not outcome.changed:
        yield "Nothing to do: the database was up to date."


def _table(table: TableIndexes) -> Iterator[str]:
    for action in table.actions:
        yield f"  {table.table}: {action}"
    state = "guarded" if table.guard else "not guarded yet"
    counts = "" if table.census is None else _counts(table.census)
    yield f"{table.table}: {state}{counts}."


def _counts(census: Census) -> str:
    return (
        f"; records: {census.rows}, groups of duplicates: {census.groups}, "
        f"redundant rows: {census.redundant}, keys stored un-normalised: {census.unnormalised}"
    )
