"""``flask duplicates guard``, ``unguard`` and ``status``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TextIO

import click
from flask.cli import with_appcontext
from sqlalchemy import Connection, Engine

from app.cli.long_work import Progress, one_line_ends, progress
from app.cli.text import make_console, text_table
from app.config import current_settings
from app.database import administering, patient_policy
from app.duplicates.groups import KEEP, Group, Which, find_groups
from app.duplicates.guard import Guarded, guard, require_unmerged, unguard
from app.duplicates.merging import Rules
from app.duplicates.plan import Decisions, PlannedGroup, describe, read_plan, write_plan
from app.duplicates.report import reading
from app.duplicates.status import ADOPTED, CLEAN, GUARDED, MERGED, Status, status
from app.duplicates.tables import read_tables
from app.errors import HomonymsFound, UnusablePlan
from app.models import RECORDS, Record
from app.schemas import TABLES

MOST_SHOWN = 20

keep_option = click.option(
    "--keep",
    type=click.Choice(KEEP),
    default=KEEP[0],
    show_default=True,
    help="Which row of a group is kept. One that has duplicates already always is.",
)
accept_option = click.option(
    "--accept-homonyms",
    is_flag=True,
    help="Take rows of one key for one record even where other columns differ.",
)
plan_option = click.option(
    "--plan", "plan_file", type=click.File("r"), help="Follow a plan that was reviewed."
)
output_option = click.option(
    "--output", type=click.File("w"), default="-", help="Where --dry-run writes the plan."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")


@click.command("guard")
@with_appcontext
@keep_option
@accept_option
@plan_option
@click.option("--dry-run", is_flag=True, help="Change nothing; write what would be done as a plan.")
@output_option
@click.option(
    "--refuse-unsafe-writers",
    is_flag=True,
    help="Until the guard stands, have writers below SERIALIZABLE fail.",
)
@click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0.1),
    default=300,
    show_default=True,
    help="Seconds that an index build may wait for other sessions.",
)
@json_option
def guard_command(
    keep: str,
    accept_homonyms: bool,
    plan_file: TextIO | None,
    dry_run: bool,
    output: TextIO,
    refuse_unsafe_writers: bool,
    lock_timeout: float,
    as_json: bool,
) -> None:
    """Enforce the natural keys at once, with the duplicates still in place.

    Marks duplicates, stores keys in their normal form, and builds a unique index on what is not
    marked, while the service works. It may be stopped and run again.
    """
    require_one_way(dry_run, plan_file)
    rules = Rules(keep, accept_homonyms)
    with one_line_ends(), progress() as show, administering() as engine:
        if dry_run:
            with reading(engine) as connection:
                write(connection, output, RECORDS, keep, "unmarked", show)
            return
        try:
            outcomes = guard(
                engine,
                RECORDS[-1],
                rules=rules,
                decisions=Decisions(planned(plan_file)),
                policy=patient_policy(),
                refuse_unsafe=refuse_unsafe_writers,
                soft_references=current_settings().soft_references,
                lock_timeout=lock_timeout,
                tell=lambda what, count: show.update(f"{what} {count or ''}".strip()),
            )
        except HomonymsFound as error:
            show.clear()
            refuse_homonyms(error.groups)
        show.clear()
        if as_json:
            click.echo(json.dumps({one.table: asdict(one) for one in outcomes}))
        else:
            click.echo("\n".join(_told(outcomes)))


def _told(outcomes: Sequence[Guarded]) -> Iterator[str]:
    for one in outcomes:
        yield (
            f"{one.table}: guarded. Marked {one.marked} duplicates, normalised {one.normalised} "
            f"keys, renamed {one.renamed} rows."
        )
        yield from (f"  moved {count} rows: {name}" for name, count in one.moved.items() if count)
        for name, count in one.collapsed.items():
            yield f"  became duplicates by that, and were marked: {count} rows of {name}"
        yield from (f"  {action}" for action in one.actions)
    yield "From now on PostgreSQL refuses new duplicates. Next: flask duplicates merge --all"


def require_one_way(dry_run: bool, plan_file: TextIO | None) -> None:
    """Refuse a plan beside --dry-run, which would not look at it."""
    if dry_run and plan_file is not None:
        raise click.UsageError("--dry-run writes a plan, and follows none.")


def planned(file: TextIO | None) -> list[PlannedGroup]:
    """Return the groups of a reviewed plan; none without a file."""
    if file is None:
        return []
    try:
        groups = read_plan(file)
        for number, group in enumerate(groups, 1):
            if group.table not in TABLES:
                raise UnusablePlan(f"group {number}: there is no table {group.table}")
    except UnusablePlan as error:
        raise click.ClickException(f"{file.name}: {error}") from None
    return groups


def refuse_homonyms(groups: Sequence[Group]) -> None:
    """End the command with a list of groups that a person has to decide on."""
    for one in groups[:MOST_SHOWN]:
        ids = ", ".join(map(str, (one.kept, *one.duplicates)))
        key = ", ".join(map(str, one.key.values()))
        reason = f"differ in {', '.join(one.homonyms)}" if one.homonyms else "left by the plan"
        click.echo(f"  {one.table} {ids} ({key}): {reason}", err=True)
    if len(groups) > MOST_SHOWN:
        click.echo(f"  and {len(groups) - MOST_SHOWN} more", err=True)
    raise click.ClickException(
        f"{len(groups)} groups may be different people of one name; nothing was changed. "
        "Write a plan with --dry-run --output plan.json, say in it of each whether it is the "
        '"same" or give a row another key with "rename", and run it with --plan plan.json; '
        "or take them all for the same with --accept-homonyms."
    )


def write(
    connection: Connection,
    output: TextIO,
    models: Sequence[type[Record]],
    keep: str,
    which: Which,
    show: Progress,
) -> None:
    """Write a plan of what would be done, for a person to review."""
    tables = read_tables(connection, RECORDS[0], current_settings().soft_references)
    groups = (
        describe(connection, tables, tables.of(model), one)
        for model in models
        for one in list(find_groups(connection, tables, tables.of(model), keep, which=which))
    )
    written = 0
    try:
        for written in write_plan(output, groups):
            show.update(f"planned {written} groups")
        output.flush()
    except OSError as error:
        with suppress(OSError):  # or it would be written once more, when the command ends
            output.close()
        raise click.ClickException(f"{output.name}: {error.strerror}") from None
    show.clear()
    click.echo(f"Planned {written} groups; nothing was changed.", err=True)


@click.command("unguard")
@with_appcontext
@click.option("--unmark", is_flag=True, help="Take the marks off and put stored keys back, too.")
@json_option
def unguard_command(unmark: bool, as_json: bool) -> None:
    """Put the look-up indexes back and drop the guards, until you guard the tables again.

    With --unmark every row is as it was before the guard; refused while merges are journalled.
    """
    restored = {}
    with one_line_ends(), progress() as show, administering() as engine:
        if unmark:
            for model in RECORDS:
                require_unmerged(engine, model)
        for model in reversed(RECORDS):
            restored[model.__tablename__] = unguard(
                engine,
                model,
                unmark=unmark,
                policy=patient_policy(),
                tell=lambda what, count: show.update(f"{what} {count}"),
            )
        show.clear()
    if as_json:
        click.echo(json.dumps({table: {"restored": count} for table, count in restored.items()}))
        return
    for table, count in restored.items():
        click.echo(f"{table}: not guarded any more. Restored {count} rows.")


@click.command("status")
@with_appcontext
@json_option
def status_command(as_json: bool) -> None:
    """Show how far each table is: adopted, guarded, merged, clean; and who may spoil it."""
    with one_line_ends(), progress(in_place=not as_json) as show, administering() as engine:
        show.update("counting")
        found = list(_statuses(engine))
        show.clear()
    if as_json:
        click.echo(json.dumps({one.table: asdict(one) for one in found}, default=str))
        return
    make_console().print(text_table(COLUMNS, map(_row, found)))
    click.echo("\n".join(_advice(found)))


def _statuses(engine: Engine) -> Iterator[Status]:
    with reading(engine) as connection:
        tables = read_tables(connection, RECORDS[0], current_settings().soft_references)
        for model in RECORDS:
            yield status(connection, tables, tables.of(model))


COLUMNS = ("table", "is", "guard", "rows", "unmarked", "marked", "to merge", "merges")


def _row(one: Status) -> list[str]:
    counts = (one.rows, one.unmarked, one.marked, one.waiting, one.merges)
    return [one.table, one.rung, one.guard, *map(str, counts)]


def _advice(found: Sequence[Status]) -> Iterator[str]:
    for one in found:
        if one.guard == "invalid":
            yield f"{one.table}: the build of its guard failed; flask duplicates guard repairs it."
        if one.guard != "valid" and one.written_by_others:
            yield (
                f"{one.table}: {one.written_by_others} rows were written past get_or_create, the "
                f"last at {one.last_written_by_others:%Y-%m-%d %H:%M}. Below SERIALIZABLE such "
                "writers can make duplicates until the guard stands."
            )
        for writer in one.unsafe_writers:
            yield (
                f"{one.table}: is being written by pid {writer.pid} "
                f"({writer.application or writer.role}, for {writer.seconds:.0f} s), which is not "
                "seen to be at SERIALIZABLE."
            )
    lowest = min((one.rung for one in found), key=[ADOPTED, GUARDED, MERGED, CLEAN].index)
    yield f"Next: {NEXT[lowest]}"


NEXT = {
    ADOPTED: "flask duplicates guard",
    GUARDED: "flask duplicates merge --all",
    MERGED: "flask duplicates purge --older-than 30d",
    CLEAN: "nothing, there are no duplicates and there can be none",
}


COMMANDS = (guard_command, unguard_command, status_command)
