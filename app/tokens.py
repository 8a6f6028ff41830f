"""Who may use the service, and for what: tokens in the default database. Knows no HTTP.

A token is shown once, when it is issued, and only its SHA-256 is stored. It is 256 random bits, so
that neither a salt nor a slow hash would make it any harder to guess. For a token that an operator
has brought along (see ``token_file``) that is as true as it was made at random.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from hashlib import sha256

from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    DateTime,
    Engine,
    Identity,
    LargeBinary,
    MetaData,
    Row,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    extract,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from app import transactions
from app.config import request_policy
from app.db import current_engine
from app.directory import read
from app.errors import DatabaseAway, TokenNameTaken, UnknownTable, UnknownToken, UnusableName
from app.natural_key import normalise
from app.transactions import INSUFFICIENT_PRIVILEGE, RetryPolicy

logger = logging.getLogger(__name__)

PREFIX = "rollcall_"
# Also of one that an operator has brought along: the characters of RFC 6750, section 2.1.
SHORTEST, LONGEST = 20, 512
FORM = re.compile(rf"[A-Za-z0-9._~+/-]{{{SHORTEST},{LONGEST}}}=*")
NAME_LENGTH = 64
FROM_FILE = "admin-file"  # the name of the token that ROLLCALL_ADMIN_TOKEN_FILE holds

READ, WRITE, ADMIN = SCOPES = ("read", "write", "admin")
"""Each includes those before it."""

# Not a table of the directory: apart from the models, so that nothing takes it for one of theirs.
token = Table(
    "rollcall_token",
    MetaData(),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("scope", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True)),
    Column("last_used_on", Date),
)
RACE_INDEXES = frozenset({"uq_rollcall_token_name", "uq_rollcall_token_sha256"})
TODAY = cast(func.timezone("UTC", func.now()), Date)


@dataclass(frozen=True)
class Token:
    """Who sends a request: a token that was checked. An id is never given twice."""

    id: int
    name: str
    scope: str

    @property
    def scopes(self) -> Sequence[str]:
        """What it is good for."""
        return SCOPES[: SCOPES.index(self.scope) + 1]


@dataclass(frozen=True)
class Found:
    """A valid token, for how many seconds it still is, and when it was used before."""

    token: Token
    remaining: float
    last_used_on: date | None
    today: date


def new_token() -> str:
    """Return a token that nobody has."""
    return PREFIX + secrets.token_hex(32)


def digest(presented: str) -> bytes | None:
    """Return what is stored of a token; None for what cannot be one."""
    return sha256(presented.encode()).digest() if FORM.fullmatch(presented) else None


def issue(engine: Engine, name: str, scope: str, lifetime: timedelta | None = None) -> str:
    """Store a new token and return it; nobody can show it again.

    Raises UnusableName, TokenNameTaken, also by one that has expired, and UnknownTable where the
    database is not up to date.
    """
    if not _is_readable(name):
        raise UnusableName(f"a name is 1 to {NAME_LENGTH} characters that can be read")
    if name == FROM_FILE:
        raise UnusableName(f"{FROM_FILE} is the name of ROLLCALL_ADMIN_TOKEN_FILE's token")
    issued = new_token()
    stored = digest(issued)

    def work(session: Session, unanswered: bool | None) -> bool:
        found = session.scalar(select(token.c.sha256).where(token.c.name == name))
        if found is None:
            expires_at = None if lifetime is None else func.now() + lifetime
            values = {"name": name, "sha256": stored, "scope": scope, "expires_at": expires_at}
            session.execute(insert(token).values(values))
        elif found != stored:
            raise TokenNameTaken(name)
        return True

    _write(engine, work)
    return issued


def _is_readable(name: str) -> bool:
    return 1 <= len(name) <= NAME_LENGTH and name.isprintable() and name == normalise(name)


def list_all(engine: Engine) -> list[Row[tuple[str, str, datetime, datetime | None, date | None]]]:
    """Return name, scope, created_at, expires_at and last_used_on of each, the oldest first."""
    shown = (token.c[name] for name in ("name", "scope", "created_at", "expires_at"))
    query = select(*shown, token.c.last_used_on).order_by(token.c.id)
    with _table_required(), transactions.connect(engine) as connection:
        return list(connection.execute(query))


def revoke(engine: Engine, name: str) -> None:
    """Delete a token; its name is free again. Raises UnknownToken and UnknownTable."""

    def work(session: Session, unanswered: bool | None) -> bool:
        gone = session.execute(delete(token).where(token.c.name == name).returning(token.c.id))
        if gone.scalar() is None and unanswered is None:
            raise UnknownToken(name)
        return True

    if not _is_readable(name):
        raise UnknownToken(name)
    _write(engine, work)


def keep_from_file(engine: Engine, presented: str) -> None:
    """Have this token, and no other, be the admin token that comes from a file.

    Any number of processes may do so at once. Raises TokenNameTaken where somebody was issued it.
    """
    stored = digest(presented)

    def work(session: Session, unanswered: bool | None) -> bool:
        query = select(token.c.name).where(token.c.sha256 == stored)
        holder = session.scalar(query)
        if holder is None:
            session.execute(delete(token).where(token.c.name == FROM_FILE))
            values = {"name": FROM_FILE, "sha256": stored, "scope": ADMIN}
            session.execute(insert(token).values(values))
        elif holder != FROM_FILE:
            raise TokenNameTaken(holder)
        return True

    _write(engine, work)


def _write(engine: Engine, work: Callable[[Session, bool | None], bool]) -> None:
    with _table_required():
        transactions.run(engine, work, request_policy(), RACE_INDEXES)


def find(sha: bytes) -> Found | None:
    """Return the token that has this SHA-256; None for one that is unknown, revoked or expired.

    Raises what a read raises: ContentionError where the database is away. Which bytes of a hash
    differ tells nobody anything about a token; they are compared in constant time all the same.
    """
    with _table_required(INSUFFICIENT_PRIVILEGE):
        row = read(lambda session: session.execute(FIND, {"sha256": sha}).one_or_none())
    if row is None:
        return None
    remaining = math.inf if row.remaining is None else float(row.remaining)
    found = Found(Token(row.id, row.name, row.scope), remaining, row.last_used_on, row.today)
    return found if hmac.compare_digest(row.sha256, sha) else None


FIND = select(
    token.c.id,
    token.c.name,
    token.c.scope,
    token.c.sha256,
    extract("epoch", token.c.expires_at - func.now()).label("remaining"),
    token.c.last_used_on,
    TODAY.label("today"),
).where(
    token.c.sha256 == bindparam("sha256"),
    or_(token.c.expires_at.is_(None), token.c.expires_at > func.now()),
)


def note_use(found: Found) -> None:
    """Write that a token was used today. That it cannot be written is logged, and no more.

    Nobody is waited for: whoever holds the row just now is writing the same.
    """
    try:
        with transactions.connect(current_engine()) as connection:
            transactions.begin(connection, transactions.limits(NOT_WAITING))
            connection.execute(NOTE, {"token": found.token.id})
            connection.commit()
    except (SQLAlchemyError, DatabaseAway) as error:
        logger.warning(
            "the use of token %d is not noted: sqlstate=%s",
            found.token.id,
            transactions.sqlstate(error),
            extra={"event": "token_use_not_noted", "token_id": found.token.id},
        )


NOT_WAITING = RetryPolicy(lock_timeout=0.1, statement_timeout=0.5)
_unmarked = (
    select(token.c.id)
    .where(token.c.id == bindparam("token"), token.c.last_used_on.is_distinct_from(TODAY))
    .with_for_update(skip_locked=True)
)
NOTE = update(token).where(token.c.id.in_(_unmarked)).values(last_used_on=TODAY)

UNDEFINED_TABLE = "42P01"


@contextmanager
def _table_required(*others: str) -> Iterator[None]:
    """Raise UnknownTable where the table of tokens is not there, and for other SQLSTATEs."""
    try:
        yield
    except DBAPIError as error:
        state = transactions.sqlstate(error)
        if state not in (UNDEFINED_TABLE, *others):
            raise
        missing = "is not there" if state == UNDEFINED_TABLE else "may not be used by this role"
        raise UnknownTable(f"the table {token.name} {missing}") from error
