"""Tokens are remembered for seconds; revocation takes effect, and a flood evicts nobody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, timedelta

import pytest
from flask import Flask

from app import tokens
from app.db import db
from app.errors import ContentionError
from app.token_cache import LIFETIME, MOST, TokenCache
from app.tokens import Found, Token, digest, new_token
from tests.races import together

TODAY = date(2030, 1, 31)


class Door:
    """A cache, a store that it asks, and a clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.known: dict[bytes, Found] = {}
        self.asked: list[bytes] = []
        self.noted: list[int] = []
        self.takes = 0.0
        self.cache = TokenCache(
            self.find, lambda found: self.noted.append(found.token.id), clock=lambda: self.now
        )

    def find(self, sha: bytes) -> Found | None:
        self.asked.append(sha)
        found = self.known.get(sha)
        self.now += self.takes
        return found

    def issue(self, remaining: float = math.inf, last_used_on: date | None = None) -> str:
        """Have the store know a new token."""
        token = new_token()
        sha = digest(token)
        assert sha is not None
        found = Token(len(self.known) + 1, "somebody", "read")
        self.known[sha] = Found(found, remaining, last_used_on, TODAY)
        return token

    def is_open_to(self, token: str) -> bool:
        return self.cache.check(token) is not None


@pytest.fixture
def door() -> Door:
    return Door()


def test_a_token_is_looked_up_once_in_its_time(door: Door) -> None:
    """Good or bad; what cannot be one is never looked up."""
    good, bad = door.issue(), new_token()
    for _ in range(3):
        assert door.is_open_to(good)
        assert not door.is_open_to(bad)
        assert not door.is_open_to("rollcall_zebra")
    assert len(door.asked) == 2
    door.now += LIFETIME
    assert door.is_open_to(good)
    assert not door.is_open_to(bad)
    assert len(door.asked) == 4


def test_revocation_takes_effect_within_ten_seconds(door: Door) -> None:
    """At the latest when its time is over, which counts from the moment of asking."""
    token = door.issue()
    door.takes = 4.0
    assert door.is_open_to(token)
    door.known.clear()
    assert door.is_open_to(token)
    door.now += LIFETIME - 4.0
    assert not door.is_open_to(token)
    assert LIFETIME < 10


def test_a_new_token_works_soon_after_it_was_tried_in_vain(door: Door) -> None:
    """That it was unknown is forgotten as well."""
    token = door.issue()
    issued, door.known = door.known, {}
    assert not door.is_open_to(token)
    door.known = issued
    assert not door.is_open_to(token)
    door.now += LIFETIME
    assert door.is_open_to(token)


def test_a_token_is_good_to_the_second_when_it_expires(door: Door) -> None:
    """It is not remembered for longer than it is valid."""
    token = door.issue(remaining=2.0)
    assert door.is_open_to(token)
    door.known.clear()
    door.now += 1.9
    assert door.is_open_to(token)
    door.now += 0.1
    assert not door.is_open_to(token)


def test_a_flood_of_unknown_tokens_evicts_no_good_one(door: Door) -> None:
    """And memory stays bounded."""
    good = door.issue()
    assert door.is_open_to(good)
    for _ in range(2 * MOST):
        assert not door.is_open_to(new_token())
    door.known.clear()
    assert door.is_open_to(good)
    assert len(door.cache._bad) == MOST


def test_more_tokens_than_are_remembered_still_work(door: Door) -> None:
    """They are looked up more often, that is all."""
    issued = [door.issue() for _ in range(MOST + 10)]
    assert all(door.is_open_to(token) for token in [*issued, *issued])
    assert len(door.cache._good) == MOST


def test_use_is_noted_once_a_day(door: Door) -> None:
    """By each process; not at all where another has noted it."""
    first, second = door.issue(), door.issue(last_used_on=TODAY)
    for _ in range(3):
        assert door.is_open_to(first)
        assert door.is_open_to(second)
        door.now += LIFETIME
    assert door.noted == [1]
    for sha, found in door.known.items():
        door.known[sha] = Found(found.token, math.inf, TODAY, TODAY + timedelta(days=1))
    door.is_open_to(first)
    door.is_open_to(second)
    assert door.noted == [1, 1, 2]


def test_what_a_look_up_raises_is_not_remembered(door: Door) -> None:
    """A database that is away is neither a yes nor a no."""
    token = door.issue()

    def away(sha: bytes) -> Found | None:
        raise ContentionError(1, 1.0, None)

    door.cache._find, find = away, door.cache._find
    with pytest.raises(ContentionError):
        door.cache.check(token)
    door.cache._find = find
    assert door.is_open_to(token)


def test_threads_share_it(door: Door) -> None:
    """Eight at once, with good and bad tokens, more than are remembered."""
    issued = [door.issue() for _ in range(50)]

    def knock() -> list[bool]:
        return [door.is_open_to(token) for token in issued for _ in range(20)] + [
            door.is_open_to(new_token()) for _ in range(MOST // 4)
        ]

    expected = [True] * 1000 + [False] * (MOST // 4)
    assert together([knock] * 8) == [expected] * 8


@pytest.fixture
def workers(app: Flask) -> Iterator[list[TokenCache]]:
    """What two workers remember, on the real store."""
    with app.app_context():
        yield [TokenCache(tokens.find, tokens.note_use, clock=lambda: 0.0) for _ in range(2)]


def test_each_process_learns_of_a_revocation(workers: list[TokenCache]) -> None:
    """By itself, from the store."""
    token = tokens.issue(db.engine, "ops", "read")
    assert all(worker.check(token) for worker in workers)
    tokens.revoke(db.engine, "ops")
    later = [TokenCache(tokens.find, tokens.note_use, lifetime=0) for _ in workers]
    assert all(worker.check(token) for worker in workers)
    assert not any(worker.check(token) for worker in later)
