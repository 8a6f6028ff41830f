"""``python -m benchmarks``: the command line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from benchmarks import chart, machine, report
from benchmarks.extras import Extras
from benchmarks.load import require_wrk
from benchmarks.measure import Bench
from benchmarks.plan import EXTRAS, FULL, QUICK, WORKLOADS, Plan
from benchmarks.postgres import databases
from benchmarks.processes import BenchmarkError
from benchmarks.results import Results, load
from benchmarks.roster import PEERS, PROJECT, variant

logger = logging.getLogger("benchmarks")

CORES = 2
RESULTS = PROJECT / "benchmarks" / "results"
DOCUMENT = PROJECT / "docs" / "benchmarks.md"


def names(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Read what to measure."""
    given = value and tuple(value.split(","))
    for word in given or ():
        if word not in EXTRAS:
            try:
                PEERS.setdefault(word, variant(word))
            except (KeyError, ValueError) as error:
                raise click.BadParameter(f"what is {word}? {error}") from None
    return given


def workloads(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Read a list of workloads, and put them in the order in which they are measured."""
    given = set(value.split(",")) if value else set()
    if unknown := given.difference(WORKLOADS):
        raise click.BadParameter(f"what is {', '.join(unknown)}?")
    return tuple(name for name in WORKLOADS if name in given)


def sizes(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Read a list of numbers."""
    try:
        return value and tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter("numbers, separated by commas") from None


@click.command()
@click.option("--quick", is_flag=True, help="Two minutes: one short round on one size of table.")
@click.option(
    "--only",
    callback=names,
    help=f"Measure only these of: {', '.join((*PEERS, *EXTRAS))}. "
    "bare:8 is bare with 8 threads, bare:sync with sync workers.",
)
@click.option(
    "--workload", callback=workloads, help=f"Only these workloads of: {', '.join(WORKLOADS)}."
)
@click.option("--rows", callback=sizes, help="Only tables of these sizes.")
@click.option("--rounds", type=click.IntRange(1), help="How many rounds.")
@click.option("--seconds", type=click.IntRange(1), help="How long each measurement takes.")
@click.option("--warm-up", type=click.IntRange(1), help="How long each warm-up takes, in seconds.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the report here; a full run writes docs/benchmarks.md.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure nothing: report these raw results, a file of benchmarks/results.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the databases in this folder, and use those that are there.",
)
def main(
    quick: bool,
    only: Any,
    output: Path | None,
    results: Path | None,
    data: Path | None,
    **chosen: Any,
) -> None:
    """Measure Rollcall beside its peers, on one PostgreSQL and two cores."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # SIGTERM too ends everything that was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = narrowed(QUICK if quick else FULL, only, **chosen)
    if output is None and plan == FULL and results is None:
        output = DOCUMENT
    try:
        measured = measure(plan, data) if results is None else load(results)
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks: stopped")
    click.echo(report.tables(measured))
    if output is not None:
        chart.write(measured, output.with_suffix(".svg"))
        report.write(measured, output)
        logger.info("wrote %s", output)


def narrowed(plan: Plan, only: Any, workload: Any, rows: Any, **numbers: Any) -> Plan:
    """Return the plan without what was not asked for."""
    if only:
        plan = replace(
            plan,
            peers=tuple(name for name in PEERS if name in only),
            extras=tuple(name for name in EXTRAS if name in only),
        )
    if rows:
        plan = replace(plan, workloads={size: plan.workloads.get(size, WORKLOADS) for size in rows})
    if workload:
        plan = replace(plan, workloads=dict.fromkeys(plan.workloads, workload))
    return replace(plan, **{name: value for name, value in numbers.items() if value})


def measure(plan: Plan, data: Path | None) -> Results:
    """Do what is planned; what was measured is saved even if it is cut short."""
    require_wrk()
    started = time.monotonic()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)  # of everything that we start, too
    results = Results()
    raw = RESULTS / f"{datetime.now(timezone.utc):%Y-%m-%dT%H%M%SZ}.json"
    with tempfile.TemporaryDirectory(prefix="rollcall-bench-") as folder, databases(data) as served:
        machine.describe(results, served, plan)
        try:
            Bench(plan, served, Path(folder), results).rounds()
            Extras(plan, served, Path(folder), results).measure()
        finally:
            results.save(raw)
            logger.info("raw results: %s; %.0f s", raw, time.monotonic() - started)
    return results


if __name__ == "__main__":
    main()
