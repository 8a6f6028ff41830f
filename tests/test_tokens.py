"""Tokens are issued once, found by their SHA-256, revoked, and marked as used once a day."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, create_engine, make_url, text

from app import tokens
from app.db import db
from app.errors import (
    ContentionError,
    TokenNameTaken,
    UnknownTable,
    UnknownToken,
    UnusableName,
)
from app.tokens import SCOPES, Found
from tests.proxy import lossy_proxy
from tests.races import together


@pytest.fixture(autouse=True)
def _context(app: Flask) -> Iterator[None]:
    with app.app_context():
        yield


def find(token: str) -> Found | None:
    """Look a token up, past any cache."""
    sha = tokens.digest(token)
    assert sha is not None
    return tokens.find(sha)


def run(sql: str) -> Any:
    with db.engine.begin() as connection:
        result = connection.execute(text(sql))
        return result.scalar() if result.returns_rows else None


def last_used_on(name: str) -> Any:
    rows = {row.name: row for row in tokens.list_all(db.engine)}
    return rows[name].last_used_on


def test_a_token_is_256_bits_with_a_prefix_and_only_its_hash_is_stored() -> None:
    """And no two are the same."""
    issued = [tokens.issue(db.engine, name, "read") for name in ("a", "b")]
    assert all(re.fullmatch(r"rollcall_[0-9a-f]{64}", token) for token in issued)
    assert len(set(issued)) == 2
    stored = run("SELECT string_agg(t::text, ' ') FROM rollcall_token AS t")
    for token in issued:
        assert sha256(token.encode()).hexdigest() in stored
        assert token.removeprefix("rollcall_") not in stored


def test_a_scope_includes_those_before_it() -> None:
    """Admin is good for everything."""
    for place, scope in enumerate(SCOPES):
        found = find(tokens.issue(db.engine, scope, scope))
        assert found is not None
        assert (found.token.name, found.token.scope) == (scope, scope)
        assert tuple(found.token.scopes) == ("read", "write", "admin")[: place + 1]
        assert found.remaining == math.inf


def test_a_token_is_found_until_it_expires() -> None:
    """By the clock of the database; its name stays taken."""
    token = tokens.issue(db.engine, "guest", "write", timedelta(hours=1))
    found = find(token)
    assert found is not None
    assert 3500 < found.remaining <= 3600
    run("UPDATE rollcall_token SET expires_at = now()")
    assert find(token) is None
    with pytest.raises(TokenNameTaken):
        tokens.issue(db.engine, "guest", "write")


def test_a_revoked_token_is_gone_and_its_name_is_free() -> None:
    """The next of that name is another, also by its id."""
    first = tokens.issue(db.engine, "ops", "admin")
    before = find(first)
    tokens.revoke(db.engine, "ops")
    assert find(first) is None
    after = find(tokens.issue(db.engine, "ops", "read"))
    assert before is not None
    assert after is not None
    assert before.token.id < after.token.id
    tokens.revoke(db.engine, "ops")
    with pytest.raises(UnknownToken, match="no token named ops"):
        tokens.revoke(db.engine, "ops")


def test_of_those_who_take_a_name_at_once_one_gets_it(app: Flask) -> None:
    """The others are told that it is taken."""
    outcomes = together([lambda: issue_in_context(app, "same")] * 6)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["TokenNameTaken"] * 5 + [
        "str"
    ]
    assert len(tokens.list_all(db.engine)) == 1


def issue_in_context(app: Flask, name: str) -> str:
    with app.app_context():
        return tokens.issue(db.engine, name, "read")


def test_a_lost_reply_to_the_commit_is_no_failure(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """What was done is found to be done."""
    with lossy_proxy(database_url) as (proxy, url), make_app(url).app_context():
        tokens.list_all(db.engine)
        proxy.lose_reply_to = b"COMMIT"
        token = tokens.issue(db.engine, "ops", "admin")
        assert find(token) is not None
        proxy.lose_reply_to = b"COMMIT"
        tokens.revoke(db.engine, "ops")
        assert find(token) is None
        proxy.lose_reply_to = b"COMMIT"
        tokens.keep_from_file(db.engine, token)
        assert find(token) is not None
        assert proxy.lost == 3


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, "a\nb", "\x1b[31m", " a", "a  b", "e\u0301", "\u202e", "\ud800", "admin-file"],
)
def test_a_name_is_readable_text(name: str) -> None:
    """It goes into logs and onto terminals; one is kept for the token from a file."""
    with pytest.raises(UnusableName):
        tokens.issue(db.engine, name, "read")
    assert tokens.list_all(db.engine) == []
    with pytest.raises(UnknownToken):
        tokens.revoke(db.engine, name)


@pytest.mark.parametrize("name", ["x" * 64, "Zoë's importer (staging)", "採用"])
def test_a_name_can_be_any_readable_text(name: str) -> None:
    """In any language."""
    tokens.issue(db.engine, name, "read")
    assert [row.name for row in tokens.list_all(db.engine)] == [name]


@pytest.mark.parametrize(
    "presented",
    ["", "x", "rollcall_", "a" * 513, "rollcall_" + "0" * 31 + " " + "0" * 32, "=" * 64, "a" * 19,
     " rollcall_" + "0" * 64, "rollcall_" + "0" * 64 + "\n", "rollcall_" + "\u0660" * 64, "\ud800"],
)  # fmt: skip
def test_what_has_not_the_form_of_a_token_is_none(presented: str) -> None:
    """The database is not even asked."""
    assert tokens.digest(presented) is None


def test_use_is_noted_by_the_day() -> None:
    """Once: the row is not written again the same day."""
    token = tokens.issue(db.engine, "ops", "read")
    found = find(token)
    assert found is not None
    assert found.last_used_on is None
    tokens.note_use(found)
    assert last_used_on("ops") == found.today
    before = run("SELECT xmin::text FROM rollcall_token")
    tokens.note_use(found)
    assert run("SELECT xmin::text FROM rollcall_token") == before
    run("UPDATE rollcall_token SET last_used_on = last_used_on - 1")
    tokens.note_use(found)
    assert last_used_on("ops") == found.today


def test_nobody_waits_for_the_note_of_use(caplog: pytest.LogCaptureFixture) -> None:
    """Neither for somebody else's hold on the row, nor long for one on the table."""
    found = find(tokens.issue(db.engine, "ops", "read"))
    assert found is not None
    with db.engine.connect() as other:
        other.exec_driver_sql("SELECT * FROM rollcall_token FOR UPDATE")
        tokens.note_use(found)
        assert caplog.messages == []
        other.rollback()
        other.exec_driver_sql("LOCK TABLE rollcall_token IN ACCESS EXCLUSIVE MODE")
        tokens.note_use(found)
    assert caplog.messages == [f"the use of token {found.token.id} is not noted: sqlstate=55P03"]
    assert last_used_on("ops") is None


def test_a_read_only_database_keeps_nobody_out(
    caplog: pytest.LogCaptureFixture, make_app: Callable[..., Flask], database_url: str
) -> None:
    """Tokens are found; that their use is not noted is logged."""
    token = tokens.issue(db.engine, "ops", "read")
    url = f"{database_url}{'&' if '?' in database_url else '?'}"
    read_only = make_app(f"{url}options=-c%20default_transaction_read_only%3Don")
    with read_only.app_context(), caplog.at_level(logging.WARNING):
        found = find(token)
        assert found is not None
        tokens.note_use(found)
    assert caplog.messages == [f"the use of token {found.token.id} is not noted: sqlstate=25006"]


def test_a_database_that_is_away_is_not_an_unknown_token(
    caplog: pytest.LogCaptureFixture, make_app: Callable[..., Flask]
) -> None:
    """Whoever asks is told so; a note of use is only logged."""
    away = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    found = find(tokens.issue(db.engine, "ops", "read"))
    assert found is not None
    with away.app_context():
        with pytest.raises(ContentionError):
            find(tokens.new_token())
        tokens.note_use(found)
    assert caplog.messages[-1].endswith("is not noted: sqlstate=None")


@pytest.fixture
def bare(make_app: Callable[..., Flask], fresh_database: str) -> Iterator[Engine]:
    """A database without the table."""
    with make_app(fresh_database).app_context():
        yield db.engine


def test_a_missing_table_is_said(bare: Engine) -> None:
    """By all that use it."""
    for use in (
        lambda: tokens.issue(bare, "ops", "read"),
        lambda: tokens.list_all(bare),
        lambda: tokens.revoke(bare, "ops"),
        lambda: find(tokens.new_token()),
    ):
        with pytest.raises(UnknownTable, match="rollcall_token is not there"):
            use()


def test_a_role_has_to_read_tokens_and_may_note_their_use(
    make_app: Callable[..., Flask], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not that the token is unknown; SELECT is enough."""
    token = tokens.issue(db.engine, "ops", "read")
    run("CREATE ROLE clerk LOGIN")
    url = make_url(database_url).set(username="clerk").render_as_string(hide_password=False)
    try:
        with make_app(url).app_context():
            with pytest.raises(UnknownTable, match="may not be used by this role"):
                find(token)
            grant("SELECT ON rollcall_token TO clerk", database_url)
            found = find(token)
            assert found is not None
            tokens.note_use(found)
            assert caplog.messages[-1].endswith("is not noted: sqlstate=42501")
            grant("UPDATE ON rollcall_token TO clerk", database_url)
            tokens.note_use(found)
        assert last_used_on("ops") == found.today
    finally:
        run("DROP OWNED BY clerk; DROP ROLE clerk")


def grant(what: str, url: str) -> None:
    """As the owner of the table, also where another role is at work."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT {what}")
    engine.dispose()


def test_nothing_shows_a_token() -> None:
    """Neither its repr nor what SQLAlchemy says of the statement that looks for it."""
    token = tokens.issue(db.engine, "ops", "admin")
    secret = token.removeprefix("rollcall_")
    assert secret not in repr(find(token))
    with pytest.raises(TokenNameTaken) as caught:
        tokens.issue(db.engine, "ops", "admin")
    assert secret not in repr(caught.value)
