"""Clients that all want the same records at once, and note down what they are answered."""

from __future__ import annotations

import http.client
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from tests.ledger import CUT, REFUSED, Answer, Key
from tests.races import eventually, together
from tests.serving import Service, ask

CLIENTS = 8
KEYS = 8
PATIENCE = 60.0  # longer than any request may take
WELL_WITHIN = 30.0  # whoever is not by then will not be
# More than the threads of all workers, so that none is left out.
CONNECTIONS = 16

Connect = Callable[..., http.client.HTTPConnection]


class Load:
    """Clients in rounds: each posts every key of a round in an order of its own.

    Rounds of one hot key would show little: it is false conflicts between different keys that
    drive a loop into its second attempt. Each client sends a title of its own, so that the stored
    one says whose data won, and one client in four opens a connection for each request.
    """

    def __init__(self, connect: Connect, clients: int = CLIENTS, keys: int = KEYS) -> None:
        self.connect = connect
        self.clients = clients
        self.keys = keys
        self.answers: list[Answer] = []
        self.over = threading.Event()
        self.ended = False
        self.round = 0
        self.start = threading.Barrier(clients, self._begin_round)
        self.fault: tuple[float, float] = (0.0, 0.0)
        self.ill: list[str] = []

    def _begin_round(self) -> None:
        self.round += 1
        self.ended = self.over.is_set()

    def _another_round(self) -> bool:
        self.start.wait(2 * PATIENCE)
        return not self.ended

    def wanted(self) -> list[Key]:
        """Return the keys of this round, in two departments that are new as well."""
        numbers = range(self.keys)
        return [Key(f"D {self.round} {n % 2}", f"Person {self.round} {n}") for n in numbers]

    def run(self, client: int) -> None:
        """Be one client, until the load is over."""
        order = random.Random(client)  # noqa: S311 - an order, not a secret
        connection = self.connect(timeout=PATIENCE)
        with closing(connection):
            while self._another_round():
                close_if_stale(connection)
                for key in order.sample(self.wanted(), self.keys):
                    self.answers.append(post(connection, key, f"Title of {client}"))
                    if client % 4 == 0:
                        connection.close()

    def pass_rounds(self, count: int) -> None:
        """Wait until so many rounds have begun from now on."""
        last = self.round + count
        eventually(lambda: self.round >= last, 2 * PATIENCE)

    def has(self, status: int | str, times: int) -> bool:
        """Tell whether clients were given this answer so often."""
        return [answer.status for answer in list(self.answers)].count(status) >= times

    @contextmanager
    def hit(self) -> Iterator[None]:
        """Note when the fault begins and ends, and what is still not well some time after it."""
        began = time.monotonic()
        yield
        self.fault = (began, time.monotonic())
        self.ill = self.well_again()

    def answers_around_the_fault(self) -> tuple[int, int, int]:
        """Return how many requests succeeded before the fault and after it, and met it between."""
        began, ended = self.fault
        successes = [answer for answer in self.answers if answer.acknowledged]
        before = sum(answer.answered < began for answer in successes)
        met = sum(answer.answered >= began and answer.asked <= ended for answer in self.answers)
        return before, met, sum(answer.asked > ended for answer in successes)

    def well_again(self, seconds: float = WELL_WITHIN) -> list[str]:
        """Return what is not well this time from now; nothing, as soon as all is.

        Well is three times in succession: one by one, connections of a pool may still be ill.
        """
        deadline = time.monotonic() + seconds
        ill: list[str] = []
        well = attempt = 0
        while well < 3 and time.monotonic() < deadline:
            attempt += 1
            ill = self._ill(f"{time.monotonic():.6f}", deadline)
            well = 0 if ill else well + 1
        return ill or ["not well three times in succession in time"] * (well < 3)

    def _ill(self, attempt: str, deadline: float) -> list[str]:
        numbers = range(CONNECTIONS)
        visits = [partial(self.visit, f"Guest {attempt} {n}", deadline) for n in numbers]
        return [str(outcome) for outcome in together(visits) if outcome != (201, 200)]

    def visit(self, name: str, deadline: float) -> tuple[Any, Any]:
        """Create and list, on a connection of its own; it may last as long as we have."""
        connection = self.connect(timeout=max(0.1, deadline - time.monotonic()))
        with closing(connection):
            answer = post(connection, Key("Guests", name), "Guest")
            self.answers.append(answer)
            return answer.status, ask(connection, "GET", "/api/v1/employees?limit=5")[0]


@contextmanager
def under_load(service: Service, clients: int = CLIENTS, keys: int = KEYS) -> Iterator[Load]:
    """Put load on a service for as long as the block takes, and a round before and after."""
    load = Load(service.connect, clients, keys)
    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(load.run, client) for client in range(clients)]
        try:
            load.pass_rounds(2)
            yield load
            load.pass_rounds(2)
        finally:
            load.over.set()
    for client in running:
        client.result()


def post(connection: http.client.HTTPConnection, key: Key, title: str) -> Answer:
    """Ask for an employee; a connection that broke is closed, and opened again by the next."""
    asked, is_new = time.monotonic(), connection.sock is None
    body = {**key._asdict(), "title": title}
    try:
        status, headers, content = ask(connection, "POST", "/api/v1/employees", body)
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        outcome = REFUSED if isinstance(error, ConnectionRefusedError) else CUT
        return Answer(key, title, outcome, is_new=is_new, asked=asked)
    return Answer(key, title, status, content, headers["Retry-After"], is_new, asked)


def close_if_stale(connection: http.client.HTTPConnection) -> None:
    """Close a connection that the server has closed, as a pool of connections does.

    Clients wait for each other before a round, and the server keeps idle connections for a time.
    """
    if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
        connection.close()
