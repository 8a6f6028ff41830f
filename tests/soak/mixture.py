"""Clients that do what people do to a directory, each to records of its own and to everybody's."""

from __future__ import annotations

import http.client
import itertools
import math
import random
import threading
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tests.ledger import Answer, Key
from tests.load import close_if_stale
from tests.serving import Service, ask

EMPLOYEES = "/api/v1/employees"
OWN = 40  # records that a client has at a time; whoever has more lets one go
BATCH = 20
SLICE = 10.0  # seconds
# A connection belongs to the worker that accepted it; so they are shared out anew now and then.
REQUESTS_OF_A_CONNECTION = 200


class Pace:
    """When each request is due, by the clock and not by how long the one before it took."""

    def __init__(self, per_second: float, seconds: float) -> None:
        self.gap = 1 / per_second
        self.began = time.monotonic()
        self.ends = self.began + seconds
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def next(self) -> float | None:
        """Wait until the next request is due; return when that was, None when all is over.

        Where there is no pace, it is due as soon as its client is free.
        """
        with self._lock:
            number = next(self._numbers)
        due = self.began + number * self.gap if self.gap else time.monotonic()
        time.sleep(max(0.0, due - time.monotonic()))
        return due if due < self.ends else None


AS_FAST_AS_CAN_BE = math.inf


@dataclass
class Diary:
    """What all clients met."""

    began: float = field(default_factory=time.monotonic)
    served: int = 0
    surprises: Counter[str] = field(default_factory=Counter)
    took: defaultdict[int, array[float]] = field(
        default_factory=lambda: defaultdict(partial(array, "d"))
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, due: float) -> None:
        """Note that a request that was due then has been answered."""
        now = time.monotonic()
        with self.lock:
            self.served += 1
            self.took[int((now - self.began) / SLICE)].append(now - due)


@dataclass
class Own:
    """A record that nobody else changes, as it was last acknowledged."""

    answer: Answer
    tag: str

    @property
    def url(self) -> str:
        return f"{EMPLOYEES}/{self.answer.content['id']}"


class Client:
    """One client, who knows what each of its requests has to be answered."""

    def __init__(self, number: int, service: Service, token: str, known: list[Answer]) -> None:
        self.name = f"client-{number}"
        self.service = service
        self.known = known  # whom everybody may look at, and nobody changes
        self.own: list[Own] = []
        self.dice = random.Random(number)  # noqa: S311 - dice, not a secret
        self.numbers = itertools.count()
        self.authorization = {"Authorization": f"Bearer {token}"}
        self.connection: http.client.HTTPConnection
        self.diary = Diary()

    def run(self, pace: Pace, diary: Diary) -> None:
        """Send requests, each when it is due, until all is over."""
        self.diary = diary
        requests, weights = zip(*MIXTURE.items(), strict=True)
        self.connection = self.service.connect()
        with closing(self.connection):
            while (due := pace.next()) is not None:
                [request] = self.dice.choices(requests, weights)
                request(self)
                diary.note(due)
                if next(self.numbers) % REQUESTS_OF_A_CONNECTION == 0:
                    self.connection.close()

    def send(
        self, status: int, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[Mapping[str, str], Any]:
        """Send one request; note it if the answer's status is another than this."""
        close_if_stale(self.connection)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            given, headers_given, content = ask(
                self.connection, method, path, body, {**self.authorization, **named}
            )
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            self.surprise(f"{method}: {type(error).__name__}")
            return {}, None
        if given != status:
            self.surprise(f"{method} {given} {content}, not {status}"[:200])
        return headers_given, content

    def surprise(self, what: str) -> None:
        with self.diary.lock:
            self.diary.surprises[what] += 1

    def somebody(self) -> Answer:
        return self.dice.choice(self.known)

    def new_body(self) -> dict[str, str]:
        """Return a person whom nobody else enters; names are spread, as people's are."""
        name = f"{self.dice.random():.6f} {self.name} {next(self.numbers)}"
        return {"name": name, "department": self.somebody().key.department, "title": "New"}

    def keep(self, body: Mapping[str, str], headers: Mapping[str, str], content: Any) -> None:
        """Remember a record of ours, if that is what came."""
        if content is not None and "id" in content:
            key = Key(body["department"], body["name"])
            self.own.append(Own(Answer(key, body["title"], 201, content), headers["ETag"]))


def show(client: Client) -> None:
    client.send(200, "GET", f"{EMPLOYEES}/{client.somebody().content['id']}")


def show_what_is_known(client: Client) -> None:
    if client.own:
        one = client.dice.choice(client.own)
        client.send(304, "GET", one.url, If_None_Match=one.tag)


def page(client: Client) -> None:
    after = client.somebody().content["id"]
    client.send(200, "GET", f"{EMPLOYEES}?limit=20&after={after}")


def search(client: Client) -> None:
    client.send(200, "GET", f"{EMPLOYEES}?limit=5&q=Person%20{client.dice.randrange(1000)}")


def find(client: Client) -> None:
    """Create somebody who is there."""
    key = client.somebody().key
    client.send(200, "POST", EMPLOYEES, key._asdict())


def come_or_go(client: Client) -> None:
    """Create somebody new; or delete one of them, so that the table does not grow."""
    if len(client.own) > OWN:
        one = client.own.pop(client.dice.randrange(len(client.own)))
        client.send(204, "DELETE", one.url, If_Match=one.tag)
    else:
        body = client.new_body()
        client.keep(body, *client.send(201, "POST", EMPLOYEES, body))


def create_twice(client: Client) -> None:
    """The answer to the first was lost, as far as the client knows."""
    body = client.new_body()
    key = f"{client.name}-{next(client.numbers)}"
    first = client.send(201, "POST", EMPLOYEES, body, Idempotency_Key=key)
    client.send(201, "POST", EMPLOYEES, body, Idempotency_Key=key)
    client.keep(body, *first)


def change(client: Client) -> None:
    """Change what one has seen; what one has seen before that no more."""
    if not client.own:
        return
    one = client.dice.choice(client.own)
    title = f"Title {next(client.numbers)}"
    headers, content = client.send(200, "PATCH", one.url, {"title": title}, If_Match=one.tag)
    client.send(412, "PATCH", one.url, {"title": "Lost"}, If_Match=one.tag)
    if content is not None and "ETag" in headers:
        one.answer = replace(one.answer, title=title, content=content)
        one.tag = headers["ETag"]


def enter_many(client: Client) -> None:
    """A batch of people who are there."""
    items = [client.somebody().key._asdict() for _ in range(BATCH)]
    client.send(200, "POST", f"{EMPLOYEES}/batch", {"items": items})


def err(client: Client) -> None:
    """Send what cannot be done, of each kind the same."""
    status, method, path, body = client.dice.choice(MISTAKES)
    client.send(status, method, path, body)


MISTAKES: list[tuple[int, str, str, Any]] = [
    (404, "GET", f"{EMPLOYEES}/999999999", None),
    (404, "GET", "/api/v1/nowhere", None),
    (405, "PUT", EMPLOYEES, None),
    (422, "GET", f"{EMPLOYEES}?limit=0", None),
    (422, "POST", EMPLOYEES, {"name": " ", "department": "D"}),
    (422, "POST", EMPLOYEES, {"name": "Ann", "department_id": 999999999}),
    (403, "GET", "/api/v1/duplicates", None),
]

MIXTURE: dict[Callable[[Client], None], int] = {
    show: 30,
    show_what_is_known: 8,
    page: 8,
    search: 4,
    find: 16,
    come_or_go: 16,
    create_twice: 4,
    change: 8,
    enter_many: 1,
    err: 5,
}
