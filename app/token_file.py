"""The first admin token, for containers: from a file that the operator has made."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings
from app.errors import ConfigurationError, RollcallError, TokenNameTaken
from app.tokens import FORM, PREFIX, SHORTEST, keep_from_file
from app.transactions import sqlstate

VARIABLE = "ROLLCALL_ADMIN_TOKEN_FILE"
LONGEST = 1024  # bytes that are read
LEAST_DIFFERENT = 8  # characters; of 64 digits at random, one in 10^18 has fewer


def read_token(settings: Settings) -> str | None:
    """Return the token in the file that is set; None where none is set, or none is asked for.

    Raises ConfigurationError, whose line repeats nothing of the file, nor where it should be:
    that may be the token itself, by mistake.
    """
    if settings.auth == "off" or not settings.admin_token_file:
        return None
    try:
        with Path(settings.admin_token_file).open("rb") as opened:
            token = opened.read(LONGEST).strip().decode("ascii", "replace")
    except OSError as error:
        raise ConfigurationError(f"{VARIABLE} cannot be read: {error.strerror}") from None
    if not FORM.fullmatch(token):
        raise ConfigurationError(
            f"{VARIABLE} must hold a token of at least {SHORTEST} letters and digits,"
            f" such as {PREFIX} and what openssl rand -hex 32 makes"
        )
    if len(set(token.removeprefix(PREFIX))) < LEAST_DIFFERENT:
        raise ConfigurationError(
            f"{VARIABLE} holds a token that can be guessed: make one at random"
        )
    return token


def keep_token(engine: Engine, token: str) -> None:
    """Have the token of the file, and no other from a file, be good for everything.

    Raises ConfigurationError.
    """
    try:
        keep_from_file(engine, token)
    except TokenNameTaken as error:
        raise ConfigurationError(
            f"{VARIABLE} holds the token named {error.name}: revoke that, or make another"
        ) from None
    except (SQLAlchemyError, RollcallError) as error:
        reason = error if isinstance(error, RollcallError) else f"SQLSTATE {sqlstate(error)}"
        raise ConfigurationError(f"{VARIABLE}: its token cannot be stored: {reason}") from error
