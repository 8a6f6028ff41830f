"""How a report of duplicates looks: as text, JSON and CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import click
from rich.console import Console

from app.cli.long_work import Progress
from app.cli.text import make_console, text_table
from app.duplicates.groups import Group
from app.duplicates.near import Near, find_near
from app.duplicates.report import Survey, TableReport, reason

MOST_IDS = 20  # shown of one group


def write_csv(surveys: Sequence[Survey], show: Progress) -> None:
    """Write each row of each group, the tables below each other."""
    keys = dict.fromkeys(name for survey in surveys for name in survey.table.key)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["table", "group", "id", "state", "marked", *keys, "homonyms", "references"])
    for survey in surveys:
        for number, group in enumerate(_watched(survey, show), 1):
            key = [group.key.get(name, "") for name in keys]
            for id in (group.kept, *group.duplicates):
                state = "kept" if id == group.kept else "duplicate"
                marked = "yes" if id in group.marked else "no"
                own = [survey.table.name, number, id, state, marked]
                references = sum(group.references.get(str(id), {}).values())
                writer.writerow([*own, *key, " ".join(group.homonyms), references])


def write_json(
    surveys: Sequence[Survey], shown: int | None, suggestions: int, show: Progress
) -> None:
    """Write an object by table, piece by piece: all groups need not fit into memory."""
    for number, survey in enumerate(surveys):
        click.echo("{" if number == 0 else ", ", nl=False)
        click.echo(f'{json.dumps(survey.table.name)}: {{"largest": [', nl=False)
        groups = _watched(survey, show)
        for place, group in enumerate(islice(groups, shown)):
            click.echo((", " if place else "") + json.dumps(_group(group, survey.keep)), nl=False)
        for _ in groups:
            pass
        counts = _counts(survey.report)
        if suggestions:
            counts["near"] = _near(_find_near(survey, suggestions, show))
        click.echo(f"], {json.dumps(counts)[1:]}", nl=False)
    click.echo("}")


def _watched(survey: Survey, show: Progress) -> Iterator[Group]:
    show.update(f"{survey.table.name}: reading")
    for number, group in enumerate(survey, 1):
        show.update(f"{survey.table.name}: {number} groups so far")
        yield group


def _find_near(survey: Survey, suggestions: int, show: Progress) -> Near:
    name = survey.table.name
    show.update(f"{name}: reading for near duplicates")
    return find_near(
        survey.connection,
        survey.tables,
        survey.table,
        survey.keep,
        limit=suggestions,
        seen=lambda rows: show.update(f"{name}: {rows} rows compared so far"),
    )


def _counts(report: TableReport) -> dict[str, Any]:
    return {
        "rows": report.rows,
        "groups": report.groups,
        "redundant": report.redundant,
        "marked": report.marked,
        "homonyms": report.homonyms,
        "references": report.references,
        "keep": report.keep,
    }


def _group(group: Group, keep: str) -> dict[str, Any]:
    return {
        "kept": group.kept,
        "why": reason(group, keep),
        "duplicates": group.duplicates,
        "marked": group.marked,
        "key": group.key,
        "homonyms": group.homonyms,
        "references": group.references,
    }


def _near(near: Near) -> dict[str, Any]:
    return {
        "compared": near.compared,
        "incomplete": near.incomplete,
        "pairs": [
            {"score": one.score, "reasons": one.reasons, "ids": one.ids, "keys": one.keys}
            for one in near.suggestions
        ],
    }


def print_text(surveys: Sequence[Survey], suggestions: int, show: Progress) -> None:
    """Print a summary and the largest groups of each table, and what to do next."""
    reports = []
    console = make_console()
    for survey in surveys:
        for _ in _watched(survey, show):
            pass
        near = _find_near(survey, suggestions, show) if suggestions else None
        show.clear()
        _print_table(console, survey.report)
        if near is not None:
            _print_near(console, survey.table.name, near)
        reports.append(survey.report)
    console.print(_next_step(reports))


def _print_table(console: Console, report: TableReport) -> None:
    for line in _summary(report):
        console.print(line)
    if report.largest:
        console.print(f"The largest groups, {len(report.largest)} of {report.groups}:")
        rows = (_row(group, report.keep) for group in report.largest)
        header = ("kept", "why", "duplicates", "key", "differ in", "referred to by")
        console.print(text_table(header, rows))
    console.print()


def _summary(report: TableReport) -> Iterator[str]:
    waiting = f", {report.marked} of them marked and not merged yet" if report.marked else ""
    yield (
        f"{report.table}: {_count(report.rows, 'row')},"
        f" {_count(report.groups, 'group')} of duplicates,"
        f" {_count(report.redundant, 'redundant row')}{waiting}."
    )
    if report.homonyms:
        yield f"  Homonyms: {_count(report.homonyms, 'group')} that may be different people."
    for name, number in report.references.items():
        if number:
            yield f"  Referring to redundant rows: {_count(number, 'row')} by {name}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _row(group: Group, keep: str) -> Sequence[str]:
    totals: dict[str, int] = {}
    for counts in group.references.values():
        for name, number in counts.items():
            totals[name] = totals.get(name, 0) + number
    return (
        str(group.kept),
        reason(group, keep),
        _ids(group.duplicates),
        _key(group.key),
        ", ".join(group.homonyms),
        ", ".join(f"{name} {number}" for name, number in sorted(totals.items())),
    )


def _ids(ids: Sequence[Any]) -> str:
    shown = ", ".join(map(str, ids[:MOST_IDS]))
    more = len(ids) - MOST_IDS
    return f"{shown} and {more} more" if more > 0 else shown


def _key(key: Any) -> str:
    """Return a key so that blanks show, and that nothing in it reaches a terminal as a command."""
    return " ".join(f"{name}={value!r}" for name, value in key.items())


def _print_near(console: Console, name: str, near: Near) -> None:
    if near.suggestions:
        console.print(f"Rows of {name} that may be one record, for a person to judge:")
        rows = [
            (str(one.score), str(id), _key(key), ", ".join(one.reasons) if place == 0 else "")
            for one in near.suggestions
            for place, (id, key) in enumerate(zip(one.ids, one.keys, strict=True))
        ]
        console.print(text_table(("score", "id", "key", "differ in"), rows))
    else:
        console.print(f"No near duplicates among {_count(near.compared, 'key')} of {name}.")
    if near.incomplete:
        console.print(
            f"Not all is compared: {_count(near.incomplete, 'set')} of similar keys had too many."
        )
    console.print()


def _next_step(reports: Sequence[TableReport]) -> str:
    homonyms = sum(report.homonyms for report in reports)
    if homonyms:
        return (
            f"Next: look at the {_count(homonyms, 'group')} of homonyms (--csv has them all),"
            " then run flask duplicates guard, which stops at them."
        )
    if any(report.unmarked for report in reports):
        return "Next: run flask duplicates guard, so that no more can come; it merges nothing."
    if any(report.marked for report in reports):
        return "Next: run flask duplicates merge."
    return "No duplicates: there is nothing to do."
