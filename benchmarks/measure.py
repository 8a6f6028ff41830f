"""Measure the peers, one after the other, round by round."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.load import Load, wrk
from benchmarks.peers.statement import ask
from benchmarks.pgbench import pgbench
from benchmarks.plan import MAIN_SIZE, Plan
from benchmarks.postgres import Databases
from benchmarks.processes import BenchmarkError
from benchmarks.results import Measurement, Results
from benchmarks.roster import PEERS, Peer
from benchmarks.services import Service, serving

logger = logging.getLogger(__name__)


class Bench:
    """A run: its plan, its databases, and a folder for logs and lists of names."""

    def __init__(self, plan: Plan, databases: Databases, folder: Path, results: Results) -> None:
        self.plan = plan
        self.databases = databases
        self.folder = folder
        self.results = results

    def rounds(self) -> None:
        """Measure everything that is planned of the peers."""
        visits = list(self.plan.visits())
        for number, (round_, rows, name) in enumerate(visits, 1):
            logger.info(
                "%d of %d: round %d, %s rows, %s", number, len(visits), round_, f"{rows:,}", name
            )
            try:
                self._visit(PEERS[name], round_, rows, self.plan.workloads[rows])
            except BenchmarkError as error:  # the others can still be measured
                self.results.failures.append(f"round {round_}, {name}, {rows:,} rows: {error}")
                logger.error("  %s", error)

    def names(self, rows: int) -> Path:
        """Return a file with names that are in a table of that many rows."""
        path = self.folder / f"names-{rows}"
        if not path.exists():
            names = self.databases.ask(table.sample_sql(rows))
            path.write_text("\n".join(name for (name,) in names))
        return path

    def load(self, service: Service, workload: str, seconds: float) -> Load:
        """Put load on a service with a table of the main size. Raises BenchmarkError for errors."""
        load = wrk(service.url, workload, self.names(MAIN_SIZE), seconds, service.token)
        if any(load.errors.values()) or not load.requests:
            raise BenchmarkError(f"under load: {load}")
        return load

    def _visit(self, peer: Peer, round_: int, rows: int, workloads: Sequence[str]) -> None:
        with self.databases.copy(peer, rows) as database:
            url = None if database is None else self.databases.url(database)
            if not peer.command:
                self._pgbench(peer, round_, rows, workloads, str(url))
                return
            log = self.folder / f"{peer.name}.log"
            with serving(peer, url, database, log) as service:
                # What is asked makes no difference to a constant answer.
                for workload in workloads if database else workloads[:1]:
                    self._wrk(service, round_, rows, workload)

    def _wrk(self, service: Service, round_: int, rows: int, workload: str) -> None:
        def send(seconds: float) -> Load:
            return wrk(service.url, workload, self.names(rows), seconds)

        before = self._employees(service.database)
        self.databases.checkpoint()
        send(self.plan.warm_up)
        retries = service.retries()
        load = send(self.plan.seconds)
        grown = self._employees(service.database) - before
        self._note(
            Measurement(
                round=round_,
                rows=rows,
                peer=service.peer.name,
                workload=workload,
                load=load,
                retries=service.retries() - retries,
                fault=fault(service.peer, workload, load, grown),
            )
        )

    def _pgbench(
        self, peer: Peer, round_: int, rows: int, workloads: Sequence[str], url: str
    ) -> None:
        statement = ask()
        for workload in workloads:
            self.databases.checkpoint()
            pgbench(url, statement, workload, rows, self.plan.warm_up)
            load = pgbench(url, statement, workload, rows, self.plan.seconds)
            self._note(Measurement(round_, rows, peer.name, workload, load))

    def _employees(self, database: str | None) -> int:
        return 0 if database is None else self.databases.employees(database)

    def _note(self, one: Measurement) -> None:
        self.results.measurements.append(one)
        logger.info(
            "  %-8s %7.0f/s  p50 %6.1f ms  p99 %6.1f ms%s%s",
            one.workload,
            one.load.per_second,
            one.load.p50,
            one.load.p99,
            f"  {one.retries} retries" if one.retries else "",
            f"  DOES NOT COUNT: {one.fault}" if one.fault else "",
        )


def fault(peer: Peer, workload: str, load: Load, grown: int) -> str:
    """Return why a measurement does not count, or nothing.

    The table must tell the same as the answers: as many employees more as new names were
    acknowledged, none where all were known.
    """
    if errors := {kind: count for kind, count in load.errors.items() if count}:
        return ", ".join(f"{count} errors of {kind}" for kind, count in errors.items())
    if peer.layout is None:
        return ""
    if workload == "new" and grown < load.requests:
        return f"{load.requests} creations were acknowledged, {grown} are there"
    if workload in ("existing", "hot") and grown:
        return f"{grown} employees were created, of names that were known"
    return ""
