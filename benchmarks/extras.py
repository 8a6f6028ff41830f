"""What is measured of Rollcall alone: bulk, the time of a start, memory."""

from __future__ import annotations

import csv
import json
import logging
import secrets
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

from benchmarks import table
from benchmarks.load import wrk
from benchmarks.measure import Bench
from benchmarks.plan import MAIN_SIZE
from benchmarks.processes import BenchmarkError, run
from benchmarks.roster import PEERS, PROCESSES, program
from benchmarks.services import PATH, Service, serving

logger = logging.getLogger(__name__)

BATCH = 1_000
ROLLCALL = PEERS["rollcall"]
START = """
import time
started = time.perf_counter()
from app import create_app
create_app()
print(time.perf_counter() - started)
"""


class Extras(Bench):
    """The further measurements; each adds to the results' extras under its name."""

    def measure(self) -> None:
        """Take those that are planned."""
        kinds = {
            "batch": self._batch,
            "import": self._import,
            "start": self._start,
            "memory": self._memory,
        }
        for name in self.plan.extras:
            logger.info("rollcall: %s", name)
            try:
                self.results.extras[name] = kinds[name]()
            except BenchmarkError as error:
                self.results.extras[name] = {"fault": str(error)}
            logger.info("  %s", json.dumps(self.results.extras[name]))

    @contextmanager
    def _service(self) -> Iterator[Service]:
        with self.databases.copy(ROLLCALL, MAIN_SIZE) as database:
            url = self.databases.url(str(database))
            with serving(ROLLCALL, url, database, self.folder / "rollcall.log") as service:
                yield service

    def _batch(self) -> dict[str, float]:
        """Return employees a second by the number of senders, each sending one after the other."""
        rates = {}
        with self._service() as service:
            _send_batches(service, 1, 2)  # the first are slower
            for senders in (1, 2):
                self.databases.checkpoint()
                rates[f"senders: {senders}"] = _send_batches(service, senders, self.plan.batches)
        return rates

    def _import(self) -> dict[str, float]:
        """Return employees a second of a whole run of the command, its start included."""
        file = self.folder / "employees.csv"
        write_csv(file, self.plan.import_rows)
        with self.databases.copy(ROLLCALL, MAIN_SIZE) as database:
            before = self.databases.employees(str(database))
            self.databases.checkpoint()
            started = time.perf_counter()
            run(
                [program("flask"), "--app=wsgi", "employees", "import", str(file)],
                {"DATABASE_URL": self.databases.url(str(database))},
            )
            seconds = time.perf_counter() - started
            grown = self.databases.employees(str(database)) - before
        if grown != self.plan.import_rows:
            raise BenchmarkError(f"{grown} of {self.plan.import_rows} employees were imported")
        return {"rows": grown, "seconds": seconds, "rows/s": grown / seconds}

    def _start(self) -> dict[str, float]:
        """Return the median seconds from nothing imported to an application, in new processes."""
        environment = {"DATABASE_URL": self.databases.url("postgres")}
        command = [sys.executable, "-c", START]
        run(command, environment)  # compiles what is not compiled yet
        times = [float(run(command, environment)) for _ in range(self.plan.starts)]
        return {"median": statistics.median(times), "min": min(times), "max": max(times)}

    def _memory(self) -> dict[str, list[float]]:
        """Return the workers' resident MB by the number of requests that each has answered."""
        found = {}
        with self._service() as service:
            answered = 0
            for wanted in self.plan.memory_requests:
                answered += self._load_until(service, wanted * PROCESSES - answered)
                found[str(wanted)] = resident_megabytes(service)
        return found

    def _load_until(self, service: Service, wanted: int) -> int:
        """Send at least so many requests and return how many they were."""
        sent, rate = 0, 1_000.0
        while sent < wanted:
            seconds = min(10.0, (wanted - sent) / rate + 1)
            names = self.names(MAIN_SIZE)
            load = wrk(service.url, "mixed", names, seconds)
            if any(load.errors.values()) or not load.requests:
                raise BenchmarkError(f"under load: {load}")
            sent, rate = sent + load.requests, load.per_second
        return sent


def resident_megabytes(service: Service) -> list[float]:
    """Return the memory of each worker."""
    workers = psutil.Process(service.process.pid).children()
    return sorted(round(worker.memory_info().rss / 2**20, 1) for worker in workers)


def new_names(count: int) -> Iterator[str]:
    """Yield names that nobody has, spread over the index as those of the load are."""
    for _ in range(count):
        letters = secrets.token_hex(10)
        yield f"{letters[:8]} {letters[8:]}".title()


def _send_batches(service: Service, senders: int, batches: int) -> float:
    """Send batches of new employees and return employees a second."""
    shares = [batches // senders + (number < batches % senders) for number in range(senders)]
    # Written beforehand: what the client does must not count.
    bodies = [[_batch_body() for _ in range(share)] for share in shares]
    started = time.perf_counter()
    with ThreadPoolExecutor(senders) as pool:
        answers = [each for one in pool.map(partial(_send, service), bodies) for each in one]
    seconds = time.perf_counter() - started
    created = sum(int(json.loads(answer)["created"]) for answer in answers)
    if created != batches * BATCH:
        raise BenchmarkError(f"{created} of {batches * BATCH} employees were created by batches")
    return created / seconds


def _batch_body() -> bytes:
    items = [{"name": name, "department_id": table.DEPARTMENT_ID} for name in new_names(BATCH)]
    return json.dumps({"items": items}).encode()


def _send(service: Service, bodies: Sequence[bytes]) -> list[bytes]:
    """Send one batch after the other on one connection and return the answers."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    answers = []
    for body in bodies:
        connection.request("POST", f"{PATH}/batch", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise BenchmarkError(f"a batch is answered {answer.status}: {content[:200]!r}")
        answers.append(content)
    connection.close()
    return answers


def write_csv(path: Path, rows: int) -> None:
    """Write a file of new employees to import."""
    with path.open("w", newline="") as file:
        lines: Any = csv.writer(file)
        lines.writerow(["name", "department", "title", "email", "hired_on"])
        for number, name in enumerate(new_names(rows)):
            address = f"{name.replace(' ', '.').lower()}@example.org"
            lines.writerow(
                [name, table.DEPARTMENT, table.TITLE, address, f"20{number % 20:02}-01-15"]
            )
