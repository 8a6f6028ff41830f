"""Load at eighty per cent of what the service can bear leaves it as it was.

SOAK_MINUTES=30 is the proof; a run of two minutes finds what grows quickly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles

import psutil
import pytest
from sqlalchemy import create_engine, text

from app import create_app, tokens
from app.config import load_settings
from app.db import db
from tests.conftest import private_server
from tests.ledger import Answer, stored, verify
from tests.serving import Service, ask, serving
from tests.soak.minutes import MINUTES
from tests.soak.mixture import AS_FAST_AS_CAN_BE, EMPLOYEES, SLICE, Client, Diary, Pace
from tests.steadiness import MB, Sample, Slice, judge

CLIENTS = 16
SEEDED = 5000  # records
DEPARTMENTS = 10
SHARE = 0.8  # of the capacity
CAPACITY_TAKES = 15.0  # seconds
SAMPLE_EVERY = 1.0  # seconds
SCRAPE_EVERY = 5  # samples
CONNECTIONS = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rollcall'")


@pytest.fixture
def url() -> Iterator[str]:
    """A database on a server of its own."""
    with private_server() as server:
        yield server.url("steady")


@pytest.fixture
def service(url: str, tmp_path: Path) -> Iterator[Service]:
    """Two workers that ask for tokens, count and log."""
    with serving(
        tmp_path, DATABASE_URL=url, WEB_CONCURRENCY="2", ROLLCALL_AUTH="token", LOG_LEVEL="INFO"
    ) as service:
        yield service


@pytest.mark.timeout(MINUTES * 60 + 300)
def test_steady(service: Service, url: str, pytestconfig: pytest.Config) -> None:
    """Memory, connections, descriptors, threads and latency stay; nothing fails or is lost."""
    writer, admin = issue(url, tokens.WRITE), issue(url, tokens.ADMIN)
    known = enter(service, url, writer)
    clients = [Client(number, service, writer, known) for number in range(CLIENTS)]
    send(clients, AS_FAST_AS_CAN_BE, CAPACITY_TAKES / 3)
    full = send(clients, AS_FAST_AS_CAN_BE, CAPACITY_TAKES)
    rate = SHARE * full.served / CAPACITY_TAKES
    with sampling(service, url, admin) as samples:
        steady = send(clients, rate, MINUTES * 60)
    lasted = slices(steady)
    terminal = pytestconfig.pluginmanager.getplugin("terminalreporter")
    for line in ["", f"{rate:.0f} operations a second", *report(samples, lasted)]:
        terminal.write_line(line)
    assert full.surprises + steady.surprises == {}
    assert steady.served > 0.98 * rate * MINUTES * 60
    own = [one.answer for client in clients for one in client.own]
    assert verify(known + own, stored(url)) == []
    assert judge(samples, lasted, most_connections()) == []


def issue(url: str, scope: str) -> str:
    with create_app({"DATABASE_URL": url}).app_context():
        token = tokens.issue(db.engine, f"A {scope}", scope)
        db.engine.dispose()
    return token


def enter(service: Service, url: str, token: str) -> list[Answer]:
    """Fill the directory; return who is there, as if each had been acknowledged."""
    people = [
        {"name": f"Person {n}", "department": f"Department {n % DEPARTMENTS}", "title": "Known"}
        for n in range(SEEDED)
    ]
    authorization = {"Authorization": f"Bearer {token}"}
    with closing(service.connect()) as connection:
        for first in range(0, SEEDED, 1000):
            items = {"items": people[first : first + 1000]}
            path = f"{EMPLOYEES}/batch"
            status, _, content = ask(connection, "POST", path, items, authorization)
            assert (status, content["created"]) == (200, 1000)
    return [Answer(row.key, "Known", 201, row._asdict()) for row in stored(url).employees]


def send(clients: list[Client], rate: float, seconds: float) -> Diary:
    """Have all clients send at this rate together, for so long; return what they met."""
    pace, diary = Pace(rate, seconds), Diary()
    with ThreadPoolExecutor(len(clients)) as threads:
        running = [threads.submit(client.run, pace, diary) for client in clients]
    for client in running:
        client.result()
    return diary


@contextmanager
def sampling(service: Service, url: str, admin: str) -> Iterator[list[Sample]]:
    """Look at the service each second, and at its metrics as Prometheus does, while it works."""
    samples: list[Sample] = []
    over = threading.Event()
    engine = create_engine(url, pool_size=1)

    def look() -> None:
        began = time.monotonic()
        while not over.wait(SAMPLE_EVERY):
            with engine.connect() as connection:
                connections = connection.scalar(CONNECTIONS) or 0
            samples.append(sample(service, time.monotonic() - began, connections))
            if len(samples) % SCRAPE_EVERY == 0:
                scrape(service, admin)

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        try:
            yield samples
        finally:
            over.set()
    looking.result()
    engine.dispose()


def scrape(service: Service, token: str) -> None:
    with closing(service.connect()) as connection:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        assert (answer.status, b"rollcall_requests_total" in answer.read()) == (200, True)


def sample(service: Service, at: float, connections: int) -> Sample:
    master = psutil.Process(service.process.pid)
    named = {"master": master}
    named |= {f"worker {child.pid}": child for child in master.children()}
    everybody = list(named.values())
    return Sample(
        at,
        {name: process.memory_info().rss for name, process in named.items()},
        sum(process.num_fds() for process in everybody),
        sum(process.num_threads() for process in everybody),
        connections,
    )


def slices(diary: Diary) -> list[Slice]:
    """Return how long requests took, without the last stretch, which is not whole."""
    whole = sorted(diary.took.items())[:-1]
    return [
        Slice(number * SLICE, median(took), quantiles(took, n=100)[-1]) for number, took in whole
    ]


def most_connections() -> int:
    """Return how many connections two workers may have, by the settings."""
    settings = load_settings()
    return 2 * min(settings.threads, settings.pool_size + settings.max_overflow)


def report(samples: list[Sample], lasted: list[Slice]) -> Iterator[str]:
    """Yield lines that show how it went, some ten of each kind."""
    yield "seconds  MB of each process           descriptors threads connections"
    for one in samples[:: max(1, len(samples) // 10)]:
        sizes = " ".join(f"{size / MB:7.1f}" for size in one.memory.values())
        yield f"{one.at:7.0f} {sizes} {one.descriptors:7} {one.threads:7} {one.connections:7}"
    yield "seconds  median  p99, ms"
    for slice in lasted[:: max(1, len(lasted) // 10)]:
        yield f"{slice.at:7.0f} {slice.median * 1000:7.1f} {slice.p99 * 1000:7.1f}"
