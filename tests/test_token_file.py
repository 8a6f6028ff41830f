"""The admin token of a container comes from a file, and is the only one that does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import create_engine

from app import tokens
from app.config import load_settings
from app.db import db
from app.errors import ConfigurationError
from app.token_file import keep_token, read_token
from app.tokens import new_token
from tests.races import together


@pytest.fixture(autouse=True)
def _context(app: Flask) -> Iterator[None]:
    with app.app_context():
        yield


def read(file: Path | str, auth: str = "token") -> str | None:
    settings = {"ROLLCALL_ADMIN_TOKEN_FILE": str(file), "ROLLCALL_AUTH": auth}
    return read_token(load_settings(settings))


def holder(token: str) -> str | None:
    """Return whose token it is, by name and scope."""
    sha = tokens.digest(token)
    assert sha is not None
    found = tokens.find(sha)
    return None if found is None else f"{found.token.name} {found.token.scope}"


def test_a_token_is_read_from_a_file(tmp_path: Path) -> None:
    """With a line's end or without, as openssl rand -hex 32 makes its digits."""
    token = new_token()
    for content in (token, f"{token}\n", f" {token}\r\n"):
        (tmp_path / "token").write_text(content)
        assert read(tmp_path / "token") == token


def test_a_token_of_another_maker_is_as_good(tmp_path: Path) -> None:
    """It need not have our prefix; it is compared as it is."""
    token = secrets.token_urlsafe(32)
    (tmp_path / "token").write_text(token)
    assert read(tmp_path / "token") == token
    keep_token(db.engine, token)
    assert holder(token) == "admin-file admin"


def test_no_file_is_read_unless_it_is_asked_for() -> None:
    """Neither where none is set, nor with authentication off."""
    assert read("") is None
    assert read("/nosuch", auth="off") is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "must hold"),
        (b"swordfish", "must hold"),
        (b"rollcall_swordfish", "must hold"),
        (b"rollcall swordfish swordfish", "must hold"),
        (b"\xff\xfe\x00" * 20, "must hold"),
        (b"rollcall_" + b"a1b2c3d4" * 64, "must hold"),
        (b"rollcall_" + b"a1b2c3d4" * 1_000_000, "must hold"),
        (b"rollcall_" + b"0" * 64, "can be guessed"),
        (b"rollcall_" + b"deadbeef" * 8, "can be guessed"),
    ],
)
def test_what_is_no_strong_token_is_one_clear_line(
    content: bytes, complaint: str, tmp_path: Path
) -> None:
    """It says what would be right, and nothing of what is there."""
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(
        ConfigurationError, match=f"^ROLLCALL_ADMIN_TOKEN_FILE .*{complaint}"
    ) as caught:
        read(tmp_path / "token")
    assert "\n" not in str(caught.value)
    assert "swordfish" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    """Which does not say where it should be: that may be the token, by mistake."""
    for file in (tmp_path, tmp_path / "nosuch", new_token()):
        with pytest.raises(ConfigurationError, match=r"cannot be read: [A-Z]") as caught:
            read(file)
        assert str(file) not in str(caught.value)


def test_the_token_is_good_for_everything_and_kept(app: Flask) -> None:
    """A second start changes nothing, also of several at once."""
    token = new_token()

    def start() -> None:
        with app.app_context():
            keep_token(db.engine, token)

    assert together([start] * 6) == [None] * 6
    assert holder(token) == "admin-file admin"
    before = tokens.list_all(db.engine)
    start()
    assert tokens.list_all(db.engine) == before
    assert len(before) == 1


def test_another_token_takes_the_place_of_the_one_before() -> None:
    """That one is good no more; whatever else was issued stays."""
    first, second = new_token(), new_token()
    other = tokens.issue(db.engine, "ops", "read")
    keep_token(db.engine, first)
    keep_token(db.engine, second)
    assert [holder(token) for token in (first, second, other)] == [
        None,
        "admin-file admin",
        "ops read",
    ]


def test_a_token_that_somebody_was_issued_is_refused() -> None:
    """It would come back with each start after it was revoked."""
    token = tokens.issue(db.engine, "ops", "admin")
    with pytest.raises(ConfigurationError, match="holds the token named ops: revoke that"):
        keep_token(db.engine, token)


def test_a_database_that_is_only_read_is_enough_once_it_is_kept(database_url: str) -> None:
    """A new token is one clear line there."""
    token = new_token()
    keep_token(db.engine, token)
    reader = create_engine(
        database_url, connect_args={"options": "-c default_transaction_read_only=on"}
    )
    keep_token(reader, token)
    with pytest.raises(ConfigurationError, match=r"cannot be stored: SQLSTATE 25006$"):
        keep_token(reader, new_token())
    reader.dispose()


def test_a_missing_table_is_one_clear_line(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """As it is before the database was brought up to date."""
    with (
        make_app(fresh_database).app_context(),
        pytest.raises(ConfigurationError, match="the table rollcall_token is not there"),
    ):
        keep_token(db.engine, new_token())
