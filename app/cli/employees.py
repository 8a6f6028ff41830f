"""``flask employees``: import them from CSV files, and export them."""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
from sqlalchemy.exc import SQLAlchemyError

from app import transfer
from app.cli.init_db import bring_up
from app.cli.long_work import STOPPED, now_and_then, words
from app.cli.tenant_option import TenantGroup
from app.csv_source import CsvSource, open_csv
from app.db import db
from app.errors import RollcallError, UnusableFile
from app.transfer import Refusal, Totals

group = TenantGroup("employees", help="Import employees from CSV files, and export them.")

Show = Callable[[Totals], None]


def _encoding(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        "".encode(value or "utf-8")
        return codecs.lookup(value).name if value else ""
    except LookupError:
        raise click.BadParameter("Python knows no text encoding of this name") from None


def _delimiter(context: click.Context, parameter: click.Parameter, value: str) -> str:
    character = "\t" if value == "tab" else value
    if len(character) > 1 or character in ('"', "\r", "\n"):
        raise click.BadParameter("must be one character, or tab")
    return character


@group.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--encoding", default="", callback=_encoding, help="Detected if not given.")
@click.option(
    "--delimiter",
    default="",
    callback=_delimiter,
    help="One character, or tab. Detected if not given.",
)
@click.option(
    "--rejects",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write rows that cannot be stored; FILE.rejects.csv if not given. Replaced.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def import_command(
    file: BinaryIO, encoding: str, delimiter: str, rejects: Path | None, as_json: bool
) -> None:
    """Get or create the employees in FILE, a CSV file, or - for standard input.

    The first line names the columns: name and department, and if you like title, email and
    hired_on, in any order; others are ignored. Departments are created where they are missing. Rows
    are stored a thousand at a time. You may stop it and run it again: employees who are there
    already stay as they are.
    """
    if db.engine is db.default_engine:  # a tenant's database is there
        bring_up()
    name = getattr(file, "name", "<stdin>")
    path = rejects or Path(f"{name}.rejects.csv" if Path(name).is_file() else "rejects.csv")
    _check_rejects(path, file)
    totals, started, fault, status = Totals(), time.monotonic(), "", 1
    try:
        with open_csv(file, transfer.REQUIRED, encoding, delimiter) as source:
            _describe(source)
            with _rejects(path, source) as reject, _progress(Path(name), file) as show:
                for totals in transfer.import_employees(source, reject):
                    show(totals)
    except KeyboardInterrupt:
        fault, status = "Stopped.", STOPPED
    except UnusableFile as error:
        fault = f"Error: {name}: {error}"
    except (RollcallError, SQLAlchemyError, OSError) as error:
        fault = f"Error: {words(error)}. Run it again to go on."
    if totals.read or not fault:
        _summarise(totals, time.monotonic() - started, path, as_json)
        fault = fault and f"{fault} What the summary counts is stored."
    if fault:
        click.echo(fault, err=True)
        raise SystemExit(status)


def _check_rejects(rejects: Path, file: BinaryIO) -> None:
    """Refuse to write rejects over what is read: a file of rejects is one to import, too."""
    if not rejects.parent.is_dir():
        raise click.BadParameter(f"there is no folder {rejects.parent} for the rejects")
    with suppress(OSError):  # no such file yet, or a stream that is none
        if os.path.samestat(os.fstat(file.fileno()), rejects.stat()):
            raise click.BadParameter(f"{rejects} is being read; name another file in --rejects")


def _describe(source: CsvSource) -> None:
    ignored = [name for name in source.header if name not in transfer.schema.fields]
    note = f"; ignored columns: {', '.join(ignored)}" if ignored else ""
    click.echo(f"Encoding {source.encoding}, delimiter {source.delimiter!r}{note}.", err=True)


@contextmanager
def _rejects(path: Path, source: CsvSource) -> Iterator[Callable[[Refusal], None]]:
    """Yield what writes a row and its fault to the file, which is made for the first of them."""
    if path.is_file():
        path.unlink()  # of an earlier run
    with ExitStack() as stack:
        writer: Any = None

        def reject(refusal: Refusal) -> None:
            nonlocal writer
            if writer is None:
                file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
                writer = csv.writer(stack.enter_context(file), delimiter=source.delimiter)
                writer.writerow(["line", "reason", *source.header])
            writer.writerow([refusal.row.line, refusal.reason, *refusal.row.cells])

        yield reject


@contextmanager
def _progress(path: Path, file: BinaryIO) -> Iterator[Show]:
    """Yield what shows how far it is: a bar on a terminal, a line now and then elsewhere."""
    if not (path.is_file() and sys.stderr.isatty()):
        say = now_and_then()
        yield lambda totals: say(f"{_counts(totals)} so far")
        return
    with click.progressbar(
        length=path.stat().st_size, file=sys.stderr, item_show_func=_short
    ) as bar:

        def show(totals: Totals) -> None:
            bar.update(file.tell() - bar.pos, totals)
            bar.render_progress()

        yield show


def _short(totals: Totals | None) -> str:
    return "" if totals is None else f"{totals.read} rows, {totals.rejected} rejected"


def _counts(totals: Totals) -> str:
    return (
        f"read {totals.read}, created {totals.created}, existing {totals.existing}, "
        f"rejected {totals.rejected}"
    )


def _summarise(totals: Totals, seconds: float, rejects: Path, as_json: bool) -> None:
    rate = round(totals.read / seconds)
    written = str(rejects) if totals.rejected else None
    if as_json:
        summary = {**asdict(totals), "seconds": round(seconds, 3), "rows_per_second": rate}
        click.echo(json.dumps({**summary, "rejects": written}))
        return
    click.echo(f"{_counts(totals)}; {rate} rows/s".capitalize())
    if written:
        click.echo(f"The rejected rows are in {written}, each with its line and the reason.")


@group.command("export")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@click.option("--delimiter", default=",", callback=_delimiter, help="One character, or tab.")
def export_command(file: str, delimiter: str) -> None:
    """Write all employees to FILE, or to standard output, in the columns of an import.

    FILE appears when it is complete, and only then.
    """
    bring_up()
    written, say = 0, now_and_then()
    try:
        with _whole(file) as output:
            for written in transfer.export_employees(output, delimiter or ","):
                say(f"exported {written} so far")
    except (RollcallError, SQLAlchemyError, OSError, UnicodeError) as error:
        raise click.ClickException(words(error)) from None
    click.echo(f"Exported {written} employees.", err=True)


@contextmanager
def _whole(path: str) -> Iterator[TextIO]:
    """Yield what to write to; a file takes its place when all of it is written."""
    if path == "-":
        yield sys.stdout
        return
    if Path(path).exists() and not Path(path).is_file():  # a pipe, or a device
        with open(path, "w", encoding="utf-8", newline="") as file:
            yield file
        return
    part = Path(f"{path}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
