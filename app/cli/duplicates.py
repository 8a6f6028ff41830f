"""``flask duplicates``: find them, guard against new ones, merge them."""

from __future__ import annotations

import click
from sqlalchemy import Connection

from app.cli import duplicate_report
from app.cli.long_work import one_line_ends, progress
from app.cli.tenant_option import TenantGroup
from app.config import current_settings
from app.db import db
from app.duplicates.groups import KEEP
from app.duplicates.near import SUGGESTIONS
from app.duplicates.report import LARGEST, Survey, reading
from app.duplicates.tables import read_tables
from app.models import RECORDS
from app.schemas import TABLES

group = TenantGroup("duplicates", help="Find duplicates, guard against new ones, merge them.")


@group.command("report")
@click.option(
    "--keep",
    type=click.Choice(KEEP),
    default=KEEP[0],
    show_default=True,
    help="Which row of a group would be kept. One that has duplicates already always is.",
)
@click.option("--table", type=click.Choice(TABLES), help="Report this table only.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=LARGEST,
    show_default=True,
    help="How many of the largest groups of a table are shown.",
)
@click.option("--all", "everything", is_flag=True, help="Show all groups.")
@click.option("--near", is_flag=True, help="Suggest rows whose keys are nearly the same, too.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, by table.")
@click.option("--csv", "as_csv", is_flag=True, help="Print each row of each group as CSV.")
def report_command(
    keep: str,
    table: str | None,
    limit: int,
    everything: bool,
    near: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Report the rows that have one natural key, what refers to them, and which would be kept.

    Rows are homonyms where other columns are filled in several of them and differ: they may be
    different people. Nothing in the database changes, and nobody waits.
    """
    if as_csv and (as_json or near):
        raise click.UsageError("--csv goes neither with --json nor with --near.")
    shown = None if everything else limit
    suggestions = SUGGESTIONS if near else 0
    with (
        one_line_ends(),
        progress(in_place=not (as_json or as_csv)) as show,
        reading(db.engine) as connection,
    ):
        surveys = _surveys(connection, keep, table, 0 if as_json or as_csv else shown)
        if as_csv:
            duplicate_report.write_csv(surveys, show)
        elif as_json:
            duplicate_report.write_json(surveys, shown, suggestions, show)
        else:
            duplicate_report.print_text(surveys, suggestions, show)


def _surveys(
    connection: Connection, keep: str, table: str | None, largest: int | None
) -> list[Survey]:
    tables = read_tables(connection, RECORDS[0], current_settings().soft_references)
    models = [model for model in RECORDS if table in (None, model.__tablename__)]
    return [Survey(connection, tables, tables.of(model), keep, largest) for model in models]
