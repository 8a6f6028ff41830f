"""What is counted, by one process and by several, and that the dashboard asks for what there is."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app import get_or_create, metrics
from app.db import db
from app.errors import ContentionError, LostRace
from app.metrics import OUR_OWN
from app.models import Department
from app.pool import CountingPool, pool_state
from app.transactions import RetryPolicy, retry
from tests.conftest import empty, unguard
from tests.faults import kill_worker, workers_of
from tests.races import eventually
from tests.serving import Service, serving

ROOT = Path(__file__).parent.parent


def value(name: str, **labels: str) -> float:
    """Return what this process has counted."""
    metrics.bring_up_to_date()
    return OUR_OWN.get_sample_value(name, labels) or 0.0


def scraped(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return an exposition by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tables looked at by each scrape."""
    monkeypatch.setattr(metrics, "LOOK_EVERY", 0.0)


@pytest.fixture
def gained() -> Callable[..., float]:
    """Return by how much a sample has grown since it was first asked for."""
    before: dict[Any, float] = {}

    def since(name: str, **labels: str) -> float:
        now = value(name, **labels)
        return now - before.setdefault(key(name, **labels), now)

    return since


def test_requests_are_counted_by_route_and_status(
    client: FlaskClient, gained: Callable[..., float]
) -> None:
    """The rule is the label, not the path; and what a client makes up is one label for all."""
    known = {"method": "GET", "route": "/api/v1/departments/<int:id>", "status": "404"}
    unknown = {"method": "GET", "route": "none", "status": "404"}
    odd = {"method": "other", "route": "none", "status": "404"}
    series = (known, unknown, odd)
    for labels in series:
        gained("rollcall_requests_total", **labels)
    gained("rollcall_request_seconds_count", route=known["route"])
    for number in range(3):
        client.get(f"/api/v1/departments/{number}")
        client.get(f"/made-up/{number}")
        client.open(f"/made-up/{number}", method=f"MADE-UP-{number}")
    assert [gained("rollcall_requests_total", **labels) for labels in series] == [3, 3, 3]
    assert gained("rollcall_request_seconds_count", route=known["route"]) == 3


def test_outcomes_are_counted_by_table(client: FlaskClient, gained: Callable[..., float]) -> None:
    """Single records, and each of a list, with the departments that it names."""

    def outcomes() -> list[float]:
        return [
            gained("rollcall_get_or_create_total", table=table, outcome=outcome)
            for table in ("department", "employee")
            for outcome in ("created", "existing")
        ]

    outcomes()
    for _ in range(3):
        client.post("/api/v1/departments", json={"name": "Counted"})
    assert outcomes() == [1, 2, 0, 0]
    items = [{"name": name, "department": "Counted"} for name in ("A", "B", "A")]
    client.post("/api/v1/employees/batch", json={"items": items})
    assert outcomes() == [1, 3, 2, 1]
    with client.application.app_context():
        Department.get_or_create_many([{"name": "Counted"}, {"name": "New"}])
    assert outcomes() == [2, 4, 2, 1]
    for _ in range(2):  # counted as it is answered
        repeated = client.post(
            "/api/v1/employees",
            json={"name": "Repeated", "department": "Counted"},
            headers={"Idempotency-Key": "k"},
        )
        assert repeated.status_code == 201
    assert outcomes() == [2, 5, 4, 1]


def test_counts_do_not_pile_up(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, gained: Callable[..., float]
) -> None:
    """Where nobody brings them in every second, every so many do."""
    monkeypatch.setattr(metrics, "MOST_PENDING", 3)
    gained("rollcall_requests_total", method="GET", route="/healthz", status="200")
    for expected in (1, 2, 0, 1):
        client.get("/healthz")
        assert len(metrics._pending) == expected
    assert gained("rollcall_requests_total", method="GET", route="/healthz", status="200") == 4


def test_what_is_given_up_is_contention(
    make_app: Callable[..., Flask], gained: Callable[..., float]
) -> None:
    """One record, and each of a list."""
    app = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    labels = {"table": "department", "outcome": "contention"}
    gained("rollcall_get_or_create_total", **labels)
    assert app.test_client().post("/api/v1/departments", json={"name": "A"}).status_code == 503
    with app.app_context(), pytest.raises(ContentionError):
        Department.get_or_create_many([{"name": "A"}, {"name": "B"}])
    assert gained("rollcall_get_or_create_total", **labels) == 3


def test_a_core_that_nobody_listens_to_tells_nobody(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, gained: Callable[..., float]
) -> None:
    """As in another application."""
    monkeypatch.setattr(get_or_create, "on_outcome", set())
    gained("rollcall_get_or_create_total", table="department", outcome="created")
    assert client.post("/api/v1/departments", json={"name": "A"}).status_code == 201
    assert gained("rollcall_get_or_create_total", table="department", outcome="created") == 0


@pytest.mark.usefixtures("app")
def test_retries_are_counted_by_sqlstate(gained: Callable[..., float]) -> None:
    """A lost connection has none."""
    failures = [LostRace(), LostRace()]

    def attempt(number: int) -> int:
        if failures:
            raise failures.pop()
        return number

    gained("rollcall_retries_total", sqlstate="none")
    assert retry(attempt, RetryPolicy()) == 3
    assert gained("rollcall_retries_total", sqlstate="none") == 2


def test_a_pool_knows_who_waits_for_it(database_url: str) -> None:
    """As many as threads find it empty; none when it has given them a connection, or up."""
    engine = create_engine(
        database_url, poolclass=CountingPool, pool_size=1, max_overflow=0, pool_timeout=30
    )
    before = pool_state()
    held = engine.connect()
    threads = [threading.Thread(target=lambda: engine.connect().close()) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: pool_state().waiting == before.waiting + 3)
    assert pool_state().in_use == before.in_use + 1
    assert value("rollcall_pool_waiting") == before.waiting + 3
    assert value("rollcall_pool_connections", state="in_use") == before.in_use + 1
    held.close()
    for thread in threads:
        thread.join()
    after = pool_state()
    assert (after.waiting, after.idle) == (before.waiting, before.idle + 1)
    engine.dispose()


def test_who_gives_up_waiting_does_not_wait(database_url: str) -> None:
    """The pool's time-out is an error, and the count goes back."""
    engine = create_engine(
        database_url, poolclass=CountingPool, pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    before = pool_state()
    with engine.connect(), pytest.raises(PoolTimeout):
        engine.connect()
    assert pool_state().waiting == before.waiting
    engine.dispose()


@pytest.mark.usefixtures("always_due")
def test_duplicates_and_guards_are_shown_by_table(
    make_app: Callable[..., Flask], unguarded_url: str
) -> None:
    """Rows that are marked, and whether the guard is in force."""
    empty(unguarded_url)
    unguard(unguarded_url)
    engine = create_engine(unguarded_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO department (name) VALUES ('D'), ('D'), ('D');"
            "UPDATE department SET duplicate_of_id = 1 WHERE id > 1"
        )
    engine.dispose()
    samples = scraped(make_app(unguarded_url).test_client().get("/metrics").text)
    assert samples[key("rollcall_duplicates", table="department")] == 2
    assert samples[key("rollcall_duplicates", table="employee")] == 0
    assert samples[key("rollcall_guarded", table="department")] == 0


def test_the_tables_are_looked_at_once_a_minute(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of the processes, and one scrape at a time."""
    looks = []
    monkeypatch.setattr(metrics, "look_at_tables", lambda: looks.append(1) or {})
    monkeypatch.setattr(metrics, "_tables", metrics._Tables())
    metrics.LOOKED.set(0)
    for _ in range(3):
        assert client.get("/metrics").status_code == 200
    assert len(looks) == 1
    monkeypatch.setattr(metrics, "_tables", metrics._Tables())
    client.get("/metrics")
    assert len(looks) == 1, "another process has looked just now"
    metrics.LOOKED.set(0)
    monkeypatch.setattr(metrics, "_tables", metrics._Tables())
    with metrics._tables._looking:
        assert client.get("/metrics").status_code == 200
    assert len(looks) == 1


@pytest.mark.usefixtures("always_due")
def test_metrics_are_shown_without_a_database(
    make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    """What was known of the tables stays, with the time of it."""
    client = make_app("postgresql://u@127.0.0.1:1/d").test_client()
    metrics.LOOKED.set(7)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert scraped(answer.text)[key("rollcall_tables_looked_at_timestamp_seconds")] == 7
    assert "could not be looked at" in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def service(guarded_url: str, folder: Path) -> Iterator[Service]:
    """Two workers that keep their counts in the folder for temporary files, until they stop."""
    empty(guarded_url)
    with serving(
        folder, DATABASE_URL=guarded_url, WEB_CONCURRENCY="2", TMPDIR=str(folder)
    ) as service:
        assert list(folder.glob("rollcall-metrics-*"))
        yield service
    assert not list(folder.glob("rollcall-metrics-*"))


def ask(service: Service, path: str) -> str:
    connection = service.connect()
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def counted(service: Service) -> float:
    samples = scraped(ask(service, "/metrics"))
    return samples.get(
        key("rollcall_requests_total", method="GET", route="none", status="404"), 0.0
    )


def test_the_counts_of_all_workers_add_up(service: Service, folder: Path) -> None:
    """Whichever of them is asked, and also when one of them has died."""
    pids = {worker.pid for worker in workers_of(service)}

    def both_have_counted() -> bool:
        nonlocal sent
        ask(service, "/nothing-here")
        sent += 1
        return {int(path.stem.split("_")[1]) for path in folder.rglob("counter_*.db")} >= pids

    sent = 0
    eventually(both_have_counted)
    eventually(lambda: counted(service) == sent)  # a worker catches up every second
    assert [counted(service) for _ in range(5)] == [sent] * 5
    assert scraped(ask(service, "/metrics"))[key("rollcall_guarded", table="employee")] == 1
    oldest = workers_of(service)[0].pid
    kill_worker(service)
    assert counted(service) == sent
    eventually(lambda: not any(folder.rglob(f"gauge_livesum_{oldest}.db")))


def test_one_process_of_several_answers_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder, where nothing has been counted yet."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    assert list(metrics._registry().collect()) == []
    monkeypatch.delenv(metrics.FOLDER)
    assert metrics._registry() is OUR_OWN


def test_a_file_that_is_just_being_made_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that begins makes it, and then writes into it."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    file = tmp_path / "counter_1.db"
    file.touch()
    monkeypatch.setattr(metrics.time, "sleep", lambda seconds: file.write_bytes(bytes(4096)))
    assert list(metrics._registry().collect()) == []
    assert file.stat().st_size == 4096


def test_the_pools_of_all_workers_are_seen(service: Service) -> None:
    """Also of one that has nothing to do."""
    service.call("POST", "/api/v1/departments", {"name": "D"})
    idle = key("rollcall_pool_connections", state="idle")
    eventually(lambda: scraped(ask(service, "/metrics"))[idle] >= 1)


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    """As a stop does, see above. And it removes what a master left that was killed, no other's."""
    made = tmp_path / "tmp"
    killed, in_use, new, other = (
        made / name
        for name in ("rollcall-metrics-a", "rollcall-metrics-b", "rollcall-metrics-c", "other")
    )
    for folder in (killed, in_use, new, other):
        folder.mkdir(parents=True)
        (folder / "counter_1.db").touch()
    for folder in (killed, in_use, other):
        os.utime(folder, (0, 0))
    held = os.open(in_use, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    with serving(tmp_path, ready=False, PORT="x", TMPDIR=str(made)) as service:
        assert service.process.wait(60) == 1
        log = service.log.read_text()
    assert log.startswith("rollcall: PORT ")
    os.close(held)
    assert sorted(made.iterdir()) == sorted([in_use, new, other])


def test_the_dashboard_asks_for_metrics_that_there_are(client: FlaskClient) -> None:
    """Each expression names some, and each metric is in some expression."""
    client.get("/readyz")
    families = text_string_to_metric_families(client.get("/metrics").text)
    exported = {sample.name for family in families for sample in family.samples}
    dashboard = json.loads((ROOT / "docs/grafana/rollcall.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = [set(re.findall(r"\brollcall_\w+", expression)) for expression in expressions]
    assert all(named)
    assert set().union(*named) <= exported
    families = {re.sub("_(total|bucket|sum|count|created)$", "", name) for name in exported}
    asked = {re.sub("_(total|bucket|sum|count)$", "", name) for name in set().union(*named)}
    assert families == asked


def test_the_guide_explains_every_metric(client: FlaskClient) -> None:
    """Each has a row in docs/observing.md, and no other has."""
    guide = (ROOT / "docs/observing.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `(rollcall_\w+)", guide, re.MULTILINE))
    text = client.get("/metrics").text
    assert rows == set(re.findall(r"^# TYPE (rollcall_\w+)", text, re.MULTILINE)) - {
        name for name in re.findall(r"^# TYPE (rollcall_\w+_created)", text, re.MULTILINE)
    }


def test_an_engine_of_ours_counts(app: Flask) -> None:
    """The service's pool is one that knows who waits."""
    with app.app_context():
        assert isinstance(db.engine.pool, CountingPool)
