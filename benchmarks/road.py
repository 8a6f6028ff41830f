"""The road out of duplicates on a large legacy table: how long, how much memory, who waits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.load import BURST, burst, summed
from benchmarks.measure import Bench
from benchmarks.plan import MAIN_SIZE
from benchmarks.processes import BenchmarkError
from benchmarks.roster import PEERS, PROJECT, program
from benchmarks.services import Service, serving

ROLLCALL = PEERS["rollcall"]
GROUP_OF = 20  # one employee in so many was entered twice
BEFORE = 10  # bursts of load before the guard
REPORT = ("duplicates", "report", "--json")
GUARD = ("duplicates", "guard", "--json")
MERGE = ("duplicates", "merge", "--all", "--json")


class Run(NamedTuple):
    """What a command took."""

    seconds: float
    megabytes: float


class Waiting(NamedTuple):
    """By what factor the p99 of new names is longer: of all of them, and burst by burst."""

    together: float
    at_worst: float


class Road(Bench):
    """Walks from a legacy database to one that is guarded and merged."""

    def walk(self) -> dict[str, float]:
        """Return seconds, megabytes and rates, and how much longer writers waited."""
        rows = self.plan.road_rows
        groups = rows // GROUP_OF
        with self._legacy(rows) as original, self._copy(original, "walked") as database:
            report = self._flask(database, *REPORT)
            guard = self._flask(database, *GUARD)
            merge = self._flask(database, *MERGE)
            merged = "SELECT count(*) FROM rollcall_merge WHERE action = 'merge'"
            if self.databases.ask(merged, database) != [(groups,)]:
                raise BenchmarkError(f"not all of {groups} groups were merged")
            with self._copy(original, "written") as another:
                waiting = self._writers_wait(another)
        return {
            "rows": rows,
            "groups": groups,
            "report in seconds": report.seconds,
            "its MB": report.megabytes,
            "guard in seconds": guard.seconds,
            "groups merged a second": groups / merge.seconds,
            "writers' p99 during the guard, against before": waiting.together,
            "in their worst two seconds, against the worst before": waiting.at_worst,
        }

    @contextmanager
    def _legacy(self, rows: int) -> Iterator[str]:
        """Keep a legacy database with duplicates, adopted."""
        name = f"legacy_{rows}"
        self.databases.ask(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.databases.ask(f"CREATE DATABASE {name}")
        for statement in legacy_sql(rows):
            self.databases.ask(statement, name)
        self._flask(name, "init-db")
        self.databases.ask("VACUUM (ANALYZE)", name)
        try:
            yield name
        finally:
            self.databases.ask(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def _copy(self, original: str, use: str) -> Iterator[str]:
        name = f"{original}_{use}"
        self.databases.ask(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.databases.ask(f"CREATE DATABASE {name} TEMPLATE {original} STRATEGY file_copy")
        self.databases.checkpoint()
        try:
            yield name
        finally:
            self.databases.ask(f"DROP DATABASE {name} WITH (FORCE)")

    def _flask(self, database: str, *arguments: str) -> Run:
        """Run a command to its end and return what it took, its start included."""
        log = self.folder / "flask.log"
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program("flask"), "--app=wsgi", *arguments],
                cwd=PROJECT,
                env={**os.environ, "DATABASE_URL": self.databases.url(database)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise BenchmarkError(f"flask {' '.join(arguments)}: {log.read_text()[-500:]}")
        return Run(time.perf_counter() - started, usage.ru_maxrss / 1024)

    def _writers_wait(self, database: str) -> Waiting:
        """Compare writers while the table is guarded with writers before."""
        url, log = self.databases.url(database), self.folder / "rollcall.log"
        with serving(ROLLCALL, url, database, log) as service, ThreadPoolExecutor(1) as pool:
            self.load(service, "new", self.plan.warm_up)
            before = [self._burst(service) for _ in range(BEFORE)]
            guarding = pool.submit(self._flask, database, *GUARD)
            during = [self._burst(service)]
            while not guarding.done():
                during.append(self._burst(service))
            guarding.result()
        return Waiting(
            summed(during).p99 / summed(before).p99,
            max(summed([one]).p99 for one in during) / max(summed([one]).p99 for one in before),
        )

    def _burst(self, service: Service) -> dict[str, Any]:
        sent = burst(service.url, "new", self.names(MAIN_SIZE), BURST)
        if any(sent["errors"].values()):
            raise BenchmarkError(f"under load: {sent['errors']}")
        return sent


def legacy_sql(rows: int) -> tuple[str, ...]:
    """Return the statements that make a legacy database of so many employees.

    Of 500 departments; one in twenty was entered again, a quarter of them with another white space;
    a table refers to some, and has an index for it.
    """
    people = rows - rows // GROUP_OF
    return (
        "CREATE TABLE department (id serial PRIMARY KEY, name varchar(50) NOT NULL)",
        "CREATE TABLE employee (id serial PRIMARY KEY, name varchar(100) NOT NULL,"
        " department_id integer NOT NULL REFERENCES department ON DELETE CASCADE,"
        " title varchar(60), email text, hired_on date)",
        "CREATE TABLE ticket (id serial PRIMARY KEY,"
        " employee_id integer NOT NULL REFERENCES employee ON DELETE CASCADE)",
        "INSERT INTO department (name) SELECT 'Department ' || n FROM generate_series(1, 500) AS n",
        "INSERT INTO employee (name, department_id, title, email)"
        " SELECT md5(n::text), 1 + n % 500, 'Analyst',"
        " CASE WHEN n % 3 = 0 THEN n || '@example.org' END"
        f" FROM generate_series(1, {people}) AS n",
        "INSERT INTO employee (name, department_id, title, email)"
        " SELECT md5(n::text) || CASE WHEN n % 4 = 0 THEN ' ' ELSE '' END, 1 + n % 500, 'Analyst',"
        f" n || '@example.org' FROM generate_series(1, {rows // GROUP_OF}) AS n",
        "INSERT INTO ticket (employee_id) SELECT id FROM employee WHERE id % 2 = 0",
        "CREATE INDEX ON ticket (employee_id)",
        "VACUUM (ANALYZE)",
    )
