"""What clients were answered under load, held against what the database has afterwards.

What is wrong comes back as a list of sentences, so that tests can also see it find fault.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import NullPool, create_engine, text

CUT = "cut"  # the connection ended before the answer was whole
REFUSED = "refused"  # nobody listened, so that nothing was sent
SUCCESS = (200, 201)
UNCERTAIN = (503, CUT)


class Key(NamedTuple):
    """The natural key of an employee, as clients send it."""

    department: str
    name: str


@dataclass(frozen=True)
class Answer:
    """What became of one request to create an employee."""

    key: Key
    title: str
    status: int | str
    content: Mapping[str, Any] = field(default_factory=dict)
    retry_after: str | None = None
    is_new: bool = False  # the connection
    asked: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)

    @property
    def acknowledged(self) -> bool:
        return self.status in SUCCESS

    @property
    def honest(self) -> bool:
        """Tell whether it is a success, or a 503 that says why and when to try again."""
        if self.acknowledged:
            return True
        codes = ("contention", "database_away")
        waits = (self.retry_after or "").isdigit()
        return self.status == 503 and waits and self.content.get("code") in codes


class Row(NamedTuple):
    """A canonical employee as stored."""

    id: int
    department_id: int
    department: str
    name: str
    title: str | None

    @property
    def key(self) -> Key:
        return Key(self.department, self.name)


@dataclass(frozen=True)
class Stored:
    """The canonical rows of a database."""

    departments: Sequence[str]
    employees: Sequence[Row]


def stored(url: str) -> Stored:
    """Read the canonical rows of a database."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        departments = connection.scalars(text(DEPARTMENTS)).all()
        employees = [Row(*row) for row in connection.execute(text(EMPLOYEES))]
    return Stored(departments, employees)


DEPARTMENTS = "SELECT name FROM department WHERE duplicate_of_id IS NULL"
EMPLOYEES = """
SELECT employee.id, department_id, department.name, employee.name, title
FROM employee JOIN department ON department.id = department_id
WHERE employee.duplicate_of_id IS NULL
"""


def verify(
    answers: Sequence[Answer], found: Stored, expected: Collection[int | str] = ()
) -> list[str]:
    """Return what is wrong, as sentences; nothing, if all is well.

    ``expected`` are outcomes beyond success and an honest 503 that the test itself brought about.
    """
    return [
        *_dishonest(answers, expected),
        *_lost(answers, found),
        *_repeated(found),
        *_miscounted(answers),
        *_unaccounted(answers, found),
    ]


def dropped(answers: Sequence[Answer]) -> list[Answer]:
    """Return the requests that were cut though a service that stops had accepted their connection.

    Whoever connects between its last look for connections and the close is reset by the kernel: it
    is new to the service then, and nobody connects after it.
    """
    served = [one.asked for one in answers if one.is_new and one.status not in (CUT, REFUSED)]
    return [
        one
        for one in answers
        if one.status == CUT and (not one.is_new or one.answered < max(served, default=0.0))
    ]


def _dishonest(answers: Sequence[Answer], expected: Collection[int | str]) -> Iterator[str]:
    bad = [answer for answer in answers if not answer.honest and answer.status not in expected]
    kinds = Counter((answer.status, answer.content.get("code")) for answer in bad)
    for (status, code), times in kinds.items():
        yield f"dishonest: {times} times {status} ({code})"


def _lost(answers: Sequence[Answer], found: Stored) -> Iterator[str]:
    rows = {row.id: row for row in found.employees}
    for answer in filter(lambda answer: answer.acknowledged, answers):
        row = rows.get(answer.content["id"])
        if row is None:
            yield f"lost: {answer.key} was acknowledged as {answer.content['id']}"
        elif row.key != answer.key or not _shows(answer, row):
            yield f"changed: {answer.key} was acknowledged as {answer.content}, stored is {row}"


def _shows(answer: Answer, row: Row) -> bool:
    """Tell whether an answer is the row, and that of who created it is what they sent."""
    names = ("id", "department_id", "name", "title")
    same = all(answer.content[name] == getattr(row, name) for name in names)
    return same and (answer.status != 201 or row.title == answer.title)


def _repeated(found: Stored) -> Iterator[str]:
    keys: list[Any] = [*found.departments, *(row.key for row in found.employees)]
    for key, times in Counter(keys).items():
        if times > 1:
            yield f"repeated: {key} has {times} canonical rows"


def _miscounted(answers: Sequence[Answer]) -> Iterator[str]:
    """Find keys that not exactly one client is said to have created.

    Where an answer was lost or withheld, that may have been the one.
    """
    for key, given in _by_key(answers).items():
        created = given.count(201)
        if created > 1:
            yield f"miscounted: {key} was created {created} times"
        elif created == 0 and 200 in given and not set(UNCERTAIN) & set(given):
            yield f"miscounted: {key} was created by nobody"


def _unaccounted(answers: Sequence[Answer], found: Stored) -> Iterator[str]:
    may_be_stored = {*SUCCESS, *UNCERTAIN}
    outcomes = _by_key(answers)
    for row in found.employees:
        if not may_be_stored & set(outcomes[row.key]):
            yield f"unaccounted: {row} is stored, and nobody was told"


def _by_key(answers: Sequence[Answer]) -> defaultdict[Key, list[int | str]]:
    outcomes: defaultdict[Key, list[int | str]] = defaultdict(list)
    for answer in answers:
        outcomes[answer.key].append(answer.status)
    return outcomes
