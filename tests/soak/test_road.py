"""The road out is walked while clients write through the API, and a stranger past it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
from psycopg2.errors import UniqueViolation

from tests.conftest import empty
from tests.ledger import Key, stored, verify
from tests.load import Load, post, under_load
from tests.races import eventually
from tests.serving import serving_as_it_is
from tests.test_cli import flask

# Whom the clients were just told of, again: READ COMMITTED, and nothing of Rollcall's is asked.
ENTERED_AGAIN = """
INSERT INTO employee (name, department_id)
SELECT name, department_id FROM employee ORDER BY id DESC LIMIT 1 OFFSET %(skip)s
"""


class Stranger:
    """Enters people again who are there, below SERIALIZABLE, for as long as that is possible."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.entered = 0
        self.refused = 0
        self.over = threading.Event()

    def write(self) -> None:
        connection = psycopg2.connect(self.url)
        connection.autocommit = True
        with connection.cursor() as cursor:
            for number in itertools.takewhile(lambda _: not self.over.is_set(), itertools.count()):
                try:
                    cursor.execute(ENTERED_AGAIN, {"skip": number % 20})
                    self.entered += cursor.rowcount
                except UniqueViolation:
                    self.refused += 1
                self.over.wait(0.01)
        connection.close()


@contextmanager
def stranger_at_work(url: str) -> Iterator[Stranger]:
    """Have somebody write who knows nothing of Rollcall."""
    stranger = Stranger(url.replace("+psycopg2", ""))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(stranger.write)
        try:
            yield stranger
        finally:
            stranger.over.set()
        writing.result()


def test_all_of_it_while_sixteen_clients_and_a_stranger_write(
    unguarded_url: str, tmp_path: Path
) -> None:
    """Nothing acknowledged is lost, and once the guard stands the stranger is refused."""
    empty(unguarded_url)

    def run(*arguments: str) -> None:
        done = flask("duplicates", *arguments, DATABASE_URL=unguarded_url)
        assert done.returncode == 0, done.stderr

    with (
        serving_as_it_is(unguarded_url, tmp_path) as service,
        under_load(service, clients=16) as load,
        stranger_at_work(unguarded_url) as stranger,
    ):
        eventually(lambda: stranger.entered > 50)
        run("guard")
        entered, refused = stranger.entered, stranger.refused
        eventually(lambda: stranger.refused > refused + 50)
        assert stranger.entered == entered
        with closing(service.connect()) as connection:
            assert post(connection, load.answers[-1].key, "Again").status == 200
        run("merge", "--all")
        run("purge", "--older-than", "0d", "--yes")
        assert load.well_again() == []

    found = stored(unguarded_url)
    assert verify(load.answers, found) == []
    assert no_canonical_twins(load, [row.key for row in found.employees])


def no_canonical_twins(load: Load, keys: list[Key]) -> bool:
    """Tell whether everybody whom a client was told of is there once."""
    return all(keys.count(answer.key) == 1 for answer in load.answers if answer.acknowledged)
