"""``flask tenants``: who has a database of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click
from flask.cli import AppGroup

from app import onboarding, tenants
from app.cli.long_work import Progress, one_line_ends, progress, words
from app.cli.text import make_console, text_table
from app.db import db
from app.onboarding import Details
from app.tenants import READY, Tenant
from migrations_bootstrap import Bootstrap

group = AppGroup("tenants", help="Say who has a database of their own.")

AT_ONCE = 4
MIB = 1024 * 1024

json_option = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=AT_ONCE,
    show_default=True,
    help="How many databases are worked on at once.",
)


@group.command("create")
@click.argument("name")
@click.option("--owner", metavar="ROLE", help="Who is to own the database.")
def create_command(name: str, owner: str | None) -> None:
    """Create the tenant NAME and its database. Run it again if it was broken off."""
    with one_line_ends():
        tenant, created = onboarding.create(name, owner)
    done = "Created the tenant" if created else "There is already a tenant"
    click.echo(f"{done} {tenant.name}, database {tenant.database}.")


@group.command("list")
@jobs_option
@json_option
def list_command(jobs: int, as_json: bool) -> None:
    """List the tenants: state, size, revision of the schema, rows marked as duplicates."""
    with one_line_ends(), progress(in_place=not as_json) as show:
        known = tenants.list_all(db.default_engine)
        found: dict[str, Details | Exception] = {}
        ready = [tenant for tenant in known if tenant.state == READY]
        for tenant, details in onboarding.for_each(ready, onboarding.look_into, jobs):
            found[tenant.name] = details
            show.update(f"looked into {len(found)} of {len(ready)} tenants")
        show.clear()
    rows = [_row(tenant, found.get(tenant.name)) for tenant in known]
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        make_console().print(text_table(HEADER, map(_cells, rows)))
    else:
        click.echo("There is no tenant: flask tenants create NAME makes one.")
    if any(row["error"] for row in rows):
        sys.exit(1)


HEADER = ("name", "state", "database", "size", "revision", "duplicates", "created")


def _row(tenant: Tenant, details: Details | Exception | None) -> dict[str, Any]:
    known = details if isinstance(details, Details) else None
    return {
        "name": tenant.name,
        "state": tenant.state,
        "database": tenant.database,
        "owner": tenant.owner,
        "created_at": tenant.created_at.isoformat(),
        "size": known and known.size,
        "revision": known and known.revision,
        "duplicates": known and known.duplicates,
        "error": words(details) if isinstance(details, Exception) else None,
    }


def _cells(row: dict[str, Any]) -> Sequence[str]:
    day = row["created_at"][:10]
    first = (row["name"], row["state"], row["database"])
    if row["size"] is None:
        return (*first, "", "", row["error"] or "", day)
    size = f"{row['size'] / MIB:.1f} MiB"
    return (*first, size, str(row["revision"]), str(sum(row["duplicates"].values())), day)


@group.command("upgrade")
@jobs_option
@json_option
def upgrade_command(jobs: int, as_json: bool) -> None:
    """Bring the databases of all tenants up to date, and the template that new ones are made from.

    Where one fails the others go on; run it again when that is repaired.
    """
    with one_line_ends(), progress(in_place=not as_json) as show:
        onboarding.renew_template()
        known = tenants.list_all(db.default_engine)
        outcomes = _upgrade(known, jobs, show)
        show.clear()
    left = [tenant.name for tenant in known if tenant.state != READY]
    if as_json:
        click.echo(json.dumps({"tenants": outcomes, "left": left}))
    else:
        _tell(outcomes, left)
    if any(outcome["error"] for outcome in outcomes.values()):
        sys.exit(1)


def _upgrade(known: Sequence[Tenant], jobs: int, show: Progress) -> dict[str, dict[str, Any]]:
    ready = [tenant for tenant in known if tenant.state == READY]
    outcomes: dict[str, dict[str, Any]] = {}
    work = onboarding.for_each(ready, lambda tenant: onboarding.upgrade(tenant.name), jobs)
    for tenant, outcome in work:
        outcomes[tenant.name] = _outcome(outcome)
        show.update(f"upgraded {len(outcomes)} of {len(ready)} tenants")
    return dict(sorted(outcomes.items()))


def _outcome(outcome: Bootstrap | Exception) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"before": None, "after": None, "changed": False, "error": words(outcome)}
    revisions = {"before": outcome.upgrade.before, "after": outcome.upgrade.after}
    return {**revisions, "changed": outcome.changed, "error": None}


def _tell(outcomes: dict[str, dict[str, Any]], left: Sequence[str]) -> None:
    for name, outcome in outcomes.items():
        if outcome["error"]:
            click.echo(f"{name}: {outcome['error']}", err=True)
        elif outcome["before"] != outcome["after"]:
            click.echo(f"{name}: brought from revision {outcome['before']} to {outcome['after']}.")
        elif outcome["changed"]:
            click.echo(f"{name}: indexes were repaired.")
    for name in left:
        click.echo(f"{name}: left alone, since it is being created or dropped.", err=True)
    failed = sum(1 for outcome in outcomes.values() if outcome["error"])
    click.echo(f"Up to date: {len(outcomes) - failed} of {len(outcomes)} tenants.")


@group.command("drop")
@click.argument("name")
@click.option("--confirm", metavar="NAME", help="The name once more, instead of being asked.")
@click.option("--force", is_flag=True, help="End the sessions of others in the database.")
def drop_command(name: str, confirm: str | None, force: bool) -> None:
    """Drop the tenant NAME with all its data and tokens, for good.

    Run it again if it was broken off.
    """
    with one_line_ends():
        tenant = tenants.get(db.default_engine, name)
        if confirm is None and sys.stdin.isatty():
            confirm = click.prompt(f"This deletes database {tenant.database}. The name again")
        if confirm != name:
            raise click.UsageError(f"Nothing is dropped without --confirm {tenant.name}.")
        onboarding.drop(name, force)
    click.echo(f"Dropped the tenant {name}, database {tenant.database}.")
