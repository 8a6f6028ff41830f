"""What is measured of Rollcall alone: bulk, who creates beside it, the time of a start, memory."""

from __future__ import annotations

import csv
import json
import logging
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks import table
from benchmarks.measure import Bench
from benchmarks.plan import MAIN_SIZE
from benchmarks.processes import BenchmarkError, run
from benchmarks.production import Production
from benchmarks.road import Road
from benchmarks.roster import PEERS, PROCESSES, program
from benchmarks.services import PATH, Service, serving, somebody

logger = logging.getLogger(__name__)

BATCH = 1_000
LIST_SENDERS = 2
SINGLE_CREATORS = 6
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
        parts = (self.plan, self.databases, self.folder, self.results)
        kinds = {
            "batch": self._batch,
            "beside": self._beside,
            "production": Production(*parts).compare,
            "import": self._import,
            "start": self._start,
            "memory": self._memory,
            "road": Road(*parts).walk,
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

    def _beside(self) -> dict[str, float]:
        """Return how long a single create takes at most while others send lists back to back."""
        with self._service() as service:
            _send_batches(service, 1, 2)
            before = self.databases.employees(str(service.database))
            self.databases.checkpoint()
            until = partial(_until, time.monotonic() + self.plan.beside)
            with ThreadPoolExecutor(LIST_SENDERS + SINGLE_CREATORS) as pool:
                sending = [
                    pool.submit(_send, service, f"{PATH}/batch", until(_batch_body))
                    for _ in range(LIST_SENDERS)
                ]
                creating = [
                    pool.submit(_send, service, PATH, until(_single_body))
                    for _ in range(SINGLE_CREATORS)
                ]
            lists = [answer for one in sending for answer in one.result()]
            singles = [answer for one in creating for answer in one.result()]
            grown = self.databases.employees(str(service.database)) - before
        created = len(lists) * BATCH + len(singles)
        if grown != created:
            raise BenchmarkError(f"{created} creations were acknowledged, {grown} are there")
        return {
            "batches": len(lists),
            "single creates": len(singles),
            "longest single create in seconds": max(answer.seconds for answer in singles),
        }

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
            load = self.load(service, "mixed", seconds)
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
    send = partial(_send, service, f"{PATH}/batch")
    started = time.perf_counter()
    with ThreadPoolExecutor(senders) as pool:
        answers = [each for one in pool.map(send, bodies) for each in one]
    seconds = time.perf_counter() - started
    created = sum(int(json.loads(answer.content)["created"]) for answer in answers)
    if created != batches * BATCH:
        raise BenchmarkError(f"{created} of {batches * BATCH} employees were created by batches")
    return created / seconds


def _batch_body() -> bytes:
    items = [{"name": name, "department_id": table.DEPARTMENT_ID} for name in new_names(BATCH)]
    return json.dumps({"items": items}).encode()


def _single_body() -> bytes:
    (name,) = new_names(1)
    return json.dumps(somebody(name)).encode()


def _until(deadline: float, body: Callable[[], bytes]) -> Iterator[bytes]:
    """Yield one body after the other until it is late."""
    while time.monotonic() < deadline:
        yield body()


class Answer(NamedTuple):
    """What a request was answered, and after how many seconds."""

    content: bytes
    seconds: float


def _send(service: Service, path: str, bodies: Iterable[bytes]) -> list[Answer]:
    """Send one body after the other on one connection and return the answers."""
    answers = []
    with closing(HTTPConnection("127.0.0.1", service.port, timeout=60)) as connection:
        for body in bodies:
            started = time.perf_counter()
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException) as error:
                raise BenchmarkError(f"{path} gives no answer: {error!r}") from error
            if response.status not in (200, 201):
                raise BenchmarkError(f"{path} answers {response.status}: {content[:200]!r}")
            answers.append(Answer(content, time.perf_counter() - started))
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
