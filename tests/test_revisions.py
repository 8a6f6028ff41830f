"""The schema is brought up to date while workers of the first revision serve."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from alembic import command
from flask import Flask
from sqlalchemy import Engine, create_engine, text

from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap, schema
from tests.first_revision import FirstRevision
from tests.races import eventually, started

REVISIONS = [script.revision for script in reversed(list(schema._scripts().walk_revisions()))]
CLIENTS = 4
ROUNDS = 3
STAFF = text("SELECT id, department_id, name, title FROM employee ORDER BY id")


class OldClient:
    """A client of an old worker that uses all it can do, and notes down what it was told."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.service = FirstRevision(engine)
        self.number = number
        self.rounds = 0
        self.created: list[str] = []  # of the employees that all clients want
        self.own: dict[int, tuple[int, int, str, str]] = {}

    def work(self, over: threading.Event) -> None:
        """Go round until it is over. Whatever goes wrong is raised."""
        for number in itertools.takewhile(lambda number: not over.is_set(), itertools.count(1)):
            self.go_round(number)
            self.rounds = number

    def go_round(self, number: int) -> None:
        """Create two employees, one of whom all want; change, find, list and delete."""
        service = self.service
        department = service.department(f"Department {number % 5}")
        _, created = service.employee(department, f"Wanted {number}", "By all")
        self.created += [f"Wanted {number}"] * created
        id, created = service.employee(department, self.name(number), "New")
        assert created
        service.retitle(id, "Older")
        service.rename(id, department, f"{self.name(number)}, renamed")
        self.own[id] = (id, department, f"{self.name(number)}, renamed", "Older")
        (found,) = service.get(id)
        assert (found.id, found.department_id, found.name, found.title) == self.own[id]
        assert id in [row.id for row in service.page(after=id - 1)]
        leaver, _ = service.employee(department, f"{self.name(number)}, leaving", "New")
        service.delete(leaver)
        assert service.get(leaver) == []

    def name(self, number: int) -> str:
        return f"Of {self.number} in {number}"


@contextmanager
def old_workers(engine: Engine) -> Iterator[list[OldClient]]:
    """Have old workers serve while the block runs; their errors are raised at its end."""
    clients = [OldClient(engine, number) for number in range(CLIENTS)]
    over = threading.Event()
    with ExitStack() as ends:
        for client in clients:
            ends.callback(started(lambda client=client: client.work(over)))
        ends.callback(over.set)
        yield clients


def pass_rounds(clients: list[OldClient]) -> None:
    """Wait until each of them has begun and ended some more rounds."""
    wanted = {client: client.rounds + ROUNDS for client in clients}
    eventually(lambda: all(client.rounds >= rounds for client, rounds in wanted.items()))


def bring_up(url: str, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `flask init-db` of the version does whose newest revision this is."""
    with monkeypatch.context() as patched:
        patched.setattr(schema, "head", lambda: revision)
        to = partial(command.upgrade, revision=revision)
        patched.setattr(schema.command, "upgrade", lambda config, head: to(config))
        assert bootstrap(url, NATURAL_KEYS).upgrade.after == revision


def rows(engine: Engine) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(STAFF)]


def test_old_workers_serve_through_every_revision(
    empty_database: str, make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first, with data in it: no error, nothing lost, nothing twice.

    An old worker waits two seconds for a lock, ten for a statement, ten in all: what keeps it
    longer is an error here.
    """
    engine = create_engine(empty_database)
    bring_up(empty_database, REVISIONS[0], monkeypatch)
    veteran = OldClient(engine, -1)
    for number in range(1, 21):
        veteran.go_round(number)
    before = rows(engine)

    with old_workers(engine) as clients:
        for revision in REVISIONS[1:]:
            pass_rounds(clients)
            bring_up(empty_database, revision, monkeypatch)
        pass_rounds(clients)

    after = rows(engine)
    assert after[: len(before)] == before
    assert len({(department, name) for _, department, name, _ in after}) == len(after)
    everybody = [veteran, *clients]
    told = [row for client in everybody for row in client.own.values()]
    assert set(told) <= set(after)
    wanted = Counter(name for client in everybody for name in client.created)
    assert set(wanted.values()) == {1}
    assert len(after) == len(told) + len(wanted)

    client = make_app(empty_database).test_client()
    assert client.get("/readyz").get_json()["schema"] == "current"
    page = client.get("/api/v1/employees?limit=500").get_json()
    assert [record["id"] for record in page["items"]] == [id for id, *_ in after][:500]
    engine.dispose()
