"""``flask duplicates merge``, ``undo`` and ``purge``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TextIO

import click
from flask.cli import with_appcontext
from sqlalchemy import Engine

from app.cli.duplicate_guard import (
    MOST_SHOWN,
    accept_option,
    json_option,
    keep_option,
    output_option,
    plan_option,
    planned,
    require_one_way,
    write,
)
from app.cli.durations import duration
from app.cli.long_work import Progress, one_line_ends, progress
from app.config import current_settings
from app.database import administering, patient_policy
from app.duplicates import journal
from app.duplicates.merge import Left, merge_all, merge_planned
from app.duplicates.merging import MERGE_CHILDREN, SKIP, Outcome, Rules
from app.duplicates.purge import Purged, old_merges, purge_merge
from app.duplicates.report import reading
from app.duplicates.tables import KeyedTable, Tables, read_tables
from app.duplicates.undo import undo
from app.errors import CannotUndo, UnknownMerge
from app.models import RECORDS
from app.schemas import TABLES
from migrations_bootstrap.catalogue import find_table


@dataclass
class Totals:
    """What became of the groups of one table."""

    merges: list[int] = field(default_factory=list)
    duplicates: int = 0
    repointed: Counter[str] = field(default_factory=Counter)
    filled: Counter[str] = field(default_factory=Counter)
    collapsed: Counter[str] = field(default_factory=Counter)
    stayed: int = 0  # rows that would have collided, and were skipped
    left: list[dict[str, Any]] = field(default_factory=list)

    def count(self, outcome: Outcome | Left) -> None:
        """Add the outcome of one group."""
        if isinstance(outcome, Left):
            self.left.append(_left(outcome))
            return
        self.merges.append(outcome.id)
        self.duplicates += len(outcome.duplicates)
        self.repointed.update(outcome.repointed)
        self.filled.update(outcome.filled.keys())
        self.collapsed.update(outcome.collapsed)
        self.stayed += sum(len(collision.others) for collision in outcome.left)


def _left(left: Left) -> dict[str, Any]:
    collisions = getattr(left.error, "collisions", ())
    return {
        "kept": left.group.kept,
        "duplicates": list(left.group.duplicates),
        "reason": str(left.error),
        "collisions": [collision._asdict() for collision in collisions],
    }


def _policies(
    context: click.Context, parameter: click.Parameter, values: Iterable[str]
) -> dict[str, str]:
    found = {}
    for value in values:
        table, _, policy = value.partition("=")
        if not table or policy not in (SKIP, MERGE_CHILDREN):
            raise click.BadParameter(f"must be TABLE={SKIP} or TABLE={MERGE_CHILDREN}")
        found[table] = policy
    return found


@click.command("merge")
@with_appcontext
@click.option("--all", "everything", is_flag=True, help="Merge every group.")
@plan_option
@click.option("--table", type=click.Choice(TABLES), help="Only groups of this table.")
@keep_option
@accept_option
@click.option(
    "--on-collision",
    multiple=True,
    metavar="TABLE=skip|merge",
    callback=_policies,
    help="What happens to rows of a table that would break a rule of it: they stay as they are, "
    "and with merge the row in their way gets what refers to them. May be given again.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; write what would be done as a plan.")
@output_option
@json_option
def merge_command(
    everything: bool,
    plan_file: TextIO | None,
    table: str | None,
    keep: str,
    accept_homonyms: bool,
    on_collision: dict[str, str],
    dry_run: bool,
    output: TextIO,
    as_json: bool,
) -> None:
    """Repoint whatever refers to duplicates to the row that is kept, and fill its blanks.

    One transaction a group; each can be taken back with undo. It may be stopped and run again.
    Groups that cannot be merged are left as they were and listed, and the exit status is 1.
    """
    if (plan_file is None) != everything and not dry_run:
        raise click.UsageError("Give either --all or --plan FILE.")
    require_one_way(dry_run, plan_file)
    models = [model for model in RECORDS if table in (None, model.__tablename__)]
    rules = Rules(keep, accept_homonyms, on_collision)
    with one_line_ends(), progress() as show, administering() as engine:
        if dry_run:
            with reading(engine) as connection:
                write(connection, output, models, keep, "all", show)
            return
        plan = planned(plan_file)
        tables = _read(engine)
        _require_tables(engine, on_collision)
        totals = {}
        for model in models:
            name = model.__tablename__
            arguments = (rules, patient_policy())
            outcomes = (
                merge_all(engine, tables, tables.of(model), *arguments)
                if everything
                else merge_planned(engine, tables, tables.of(model), plan, *arguments)
            )
            totals[name] = _count(outcomes, name, show)
        show.clear()
    _print(totals, as_json)
    if any(one.left for one in totals.values()):
        raise SystemExit(1)


def _require_tables(engine: Engine, names: Iterable[str]) -> None:
    with engine.connect() as connection:
        for name in names:
            schema, _, bare_name = name.rpartition(".")
            if find_table(connection, bare_name, schema or None) is None:
                raise click.ClickException(f"--on-collision: there is no table {name}")


def _read(engine: Engine) -> Tables:
    with engine.connect() as connection:
        tables = read_tables(connection, RECORDS[0], current_settings().soft_references)
        journal.require(connection, tables.of(RECORDS[0]))
        return tables


def _count(outcomes: Iterable[Outcome | Left], name: str, show: Progress) -> Totals:
    totals = Totals()
    for outcome in outcomes:
        totals.count(outcome)
        show.update(f"{name}: merged {len(totals.merges)} groups, left {len(totals.left)}")
    return totals


def _print(totals: dict[str, Totals], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({table: _as_json(one) for table, one in totals.items()}))
        return
    for table, one in totals.items():
        click.echo(f"{table}: merged {len(one.merges)} groups, {one.duplicates} duplicates.")
        click.echo("".join(f"  {line}\n" for line in _details(one)), nl=False)
    left = [_explained(table, group) for table, one in totals.items() for group in one.left]
    for line in left[:MOST_SHOWN]:
        click.echo(line, err=True)
    if len(left) > MOST_SHOWN:
        click.echo(f"  and {len(left) - MOST_SHOWN} more; --json shows all", err=True)
    if left:
        click.echo(f"{len(left)} groups were left as they were.", err=True)
    if any(one.merges for one in totals.values()):
        click.echo(
            "Take a merge back with: flask duplicates undo NUMBER. Next: flask duplicates status"
        )


def _as_json(one: Totals) -> dict[str, Any]:
    return {"merged": len(one.merges), **vars(one)}


def _details(one: Totals) -> Iterator[str]:
    if one.merges:
        yield f"merges {min(one.merges)} to {max(one.merges)}"
    for name, count in one.repointed.items():
        yield f"repointed {count} rows: {name}"
    for name, count in one.filled.items():
        yield f"filled {count} blanks: {name}"
    for name, count in one.collapsed.items():
        yield f"became duplicates themselves, and were merged: {count} rows of {name}"
    if one.stayed:
        yield f"stayed where they were, for they would collide: {one.stayed} rows"


def _explained(table: str, left: dict[str, Any]) -> str:
    ids = ", ".join(map(str, (left["kept"], *left["duplicates"])))
    rows = [row for one in left["collisions"] for row in (one["first"], *one["others"]) if row]
    shown = f" ({', '.join(json.dumps(row) for row in rows[:5])})" if rows else ""
    return f"  left: {table} {ids}: {left['reason']}{shown}"


@click.command("undo")
@with_appcontext
@click.argument("merges", metavar="[MERGE_ID]...", type=click.IntRange(min=1), nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Undo every merge, the newest first.")
@json_option
def undo_command(merges: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Put every row that a merge changed back to what it was, or change nothing and say why."""
    if bool(merges) == everything:
        raise click.UsageError("Give the numbers of merges, or --all.")
    undone: dict[int, int] = {}
    refused: list[CannotUndo] = []
    with one_line_ends(), progress() as show, administering() as engine:
        table = _read(engine).of(RECORDS[0])
        for merge in merges or _undoable(engine, table):
            try:
                undone[merge] = undo(engine, table, merge, patient_policy())
            except CannotUndo as error:
                refused.append(error)
            except UnknownMerge:
                refused.append(CannotUndo(merge, "there is no such merge"))
            show.update(f"undone {len(undone)} merges, refused {len(refused)}")
        show.clear()
    if as_json:
        failed = {refusal.id: refusal.reason for refusal in refused}
        click.echo(json.dumps({"undone": undone, "refused": failed}))
    else:
        click.echo(f"Undone {len(undone)} merges, restored {sum(undone.values())} rows.")
    for refusal in refused[:MOST_SHOWN]:
        click.echo(f"  {refusal}", err=True)
    if refused:
        raise click.ClickException(f"{len(refused)} merges were not undone.")


def _undoable(engine: Engine, table: KeyedTable) -> list[int]:
    condition = "action = 'merge' AND undone_at IS NULL AND purged_at IS NULL"
    with engine.connect() as connection:
        return [entry.id for entry in journal.entries(connection, table, condition, {})]


@click.command("purge")
@with_appcontext
@click.option(
    "--older-than",
    required=True,
    metavar="AGE",
    callback=duration,
    help="Only what was merged so long ago: 30d, 12h; 0d is all.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def purge_command(older_than: timedelta, yes: bool, as_json: bool) -> None:
    """Delete merged duplicates for good. Nothing takes this back.

    What has come to refer to them since is repointed first; what cannot be is kept, and listed.
    """
    with one_line_ends(), progress() as show, administering() as engine:
        tables = _read(engine)
        with engine.connect() as connection:
            merges = {
                model: old_merges(connection, tables.of(model), older_than)
                for model in reversed(RECORDS)
            }
        _confirm(sum(map(len, merges.values())), yes)
        purged: dict[str, list[Purged]] = {}
        for model, entries in merges.items():
            done = purged.setdefault(model.__tablename__, [])
            for entry in entries:
                table = tables.of(model)
                done.append(purge_merge(engine, tables, table, entry, Rules(), patient_policy()))
                show.update(f"{table.name}: purged {len(done)} of {len(entries)} merges")
        show.clear()
    _print_purged(purged, as_json)


def _confirm(merges: int, yes: bool) -> None:
    if yes or not merges:
        return
    if not sys.stdin.isatty():
        raise click.ClickException("this cannot be undone, so it needs --yes")
    question = f"Delete the duplicates of {merges} merges for good?"
    click.confirm(question, abort=True, err=True)


def _print_purged(purged: dict[str, list[Purged]], as_json: bool) -> None:
    kept = {table: [one for one in done if one.kept_back] for table, done in purged.items()}
    counts = {
        table: {
            "merges": len(done) - len(kept[table]),
            "deleted": sum(one.deleted for one in done),
            "repointed": sum(one.repointed for one in done),
            "kept_back": {one.merge: one.kept_back for one in kept[table]},
        }
        for table, done in purged.items()
    }
    if as_json:
        click.echo(json.dumps(counts))
    else:
        for table, one in counts.items():
            click.echo(
                f"{table}: deleted {one['deleted']} rows of {one['merges']} merges, which cannot "
                f"be undone any more; repointed {one['repointed']} rows that had come since."
            )
    back = [(table, merge) for table, found in kept.items() for merge in found]
    for table, merge in back[:MOST_SHOWN]:
        reasons = "; ".join(merge.kept_back)
        click.echo(f"  kept: {table}, merge {merge.merge}: {reasons}", err=True)
    if back:
        raise click.ClickException(f"the duplicates of {len(back)} merges were kept.")


COMMANDS = (merge_command, undo_command, purge_command)
