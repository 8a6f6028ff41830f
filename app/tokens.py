"""Who may use the service, and for what: tokens in the default database. Knows no HTTP.

A token is shown once, when it is issued, and only its SHA-256 is stored. It is 256 random bits, so
that neither a salt nor a slow hash would make it any harder to guess. For a token that an operator
has brought along (see ``token_file``) that is as true as it was made at random.

The token of one tenant is stored under another hash than that of all: a version of Rollcall that
knows no tenants, of before an upgrade or after it was taken back, does not find it, instead of
taking it for one that is good for the default database.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from hashlib import sha256
from typing import Any

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
    and_,
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
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import tenants, transactions
from app.config import request_policy
from app.db import default_engine
from app.errors import (
    DatabaseAway,
    TenantUnknown,
    TokenNameTaken,
    UnknownToken,
    UnusableName,
)
from app.natural_key import normalise
from app.tables_of_ours import table_required
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
    Column("tenant", Text),
)
RACE_INDEXES = frozenset({"uq_rollcall_token_name", "uq_rollcall_token_sha256"})
TODAY = cast(func.timezone("UTC", func.now()), Date)


@dataclass(frozen=True)
class Token:
    """Who sends a request: a token that was checked. An id is never given twice."""

    id: int
    name: str
    scope: str
    tenant: str | None = None  # None: of all, and of the service itself

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


def for_one_tenant(sha: bytes) -> bytes:
    """Return what is stored in the place of a token's SHA-256, if it belongs to one tenant."""
    return sha256(sha + b" of one tenant").digest()


def issue(
    engine: Engine,
    name: str,
    scope: str,
    lifetime: timedelta | None = None,
    tenant: str | None = None,
) -> str:
    """Store a new token, of all tenants or of one, and return it; nobody can show it again.

    Raises UnusableName, TokenNameTaken, also by one that has expired, TenantUnknown, and
    UnknownTable where the database is not up to date.
    """
    if not _is_readable(name):
        raise UnusableName(f"a name is 1 to {NAME_LENGTH} characters that can be read")
    if name == FROM_FILE:
        raise UnusableName(f"{FROM_FILE} is the name of ROLLCALL_ADMIN_TOKEN_FILE's token")
    issued = new_token()
    sha = sha256(issued.encode()).digest()
    stored = sha if tenant is None else for_one_tenant(sha)

    def work(session: Session, unanswered: bool | None) -> bool:
        found = session.scalar(select(token.c.sha256).where(token.c.name == name))
        if tenant is not None and session.scalar(KNOWN, {"tenant": tenant}) is None:
            raise TenantUnknown(tenant)
        if found is None:
            expires_at = None if lifetime is None else func.now() + lifetime
            values = {"name": name, "sha256": stored, "scope": scope, "expires_at": expires_at}
            session.execute(insert(token).values(**values, tenant=tenant))
        elif found != stored:
            raise TokenNameTaken(name)
        return True

    _write(engine, work)
    return issued


def _is_readable(name: str) -> bool:
    return 1 <= len(name) <= NAME_LENGTH and name.isprintable() and name == normalise(name)


def list_all(engine: Engine) -> list[Row[Any]]:
    """Return each one's name, scope, times and tenant, the oldest first."""
    shown = ("name", "scope", "created_at", "expires_at", "last_used_on", "tenant")
    query = select(*(token.c[name] for name in shown)).order_by(token.c.id)
    with table_required(token), transactions.connect(engine) as connection:
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
    with table_required(token):
        transactions.run(engine, work, request_policy(), RACE_INDEXES)


def find(sha: bytes) -> Found | None:
    """Return the token that has this SHA-256; None for one that is unknown, revoked or expired.

    Raises what a read raises: ContentionError where the database is away. Which bytes of a hash
    differ tells nobody anything about a token; they are compared in constant time all the same.
    """
    either = {"sha256": sha, "of_one_tenant": for_one_tenant(sha)}
    with table_required(token, INSUFFICIENT_PRIVILEGE):
        row = transactions.read(
            default_engine(),
            lambda connection: connection.execute(FIND, either).one_or_none(),
            request_policy(),
        )
    if row is None:
        return None
    remaining = math.inf if row.remaining is None else float(row.remaining)
    found = Found(
        Token(row.id, row.name, row.scope, row.tenant), remaining, row.last_used_on, row.today
    )
    wanted = either["sha256" if row.tenant is None else "of_one_tenant"]
    return found if hmac.compare_digest(row.sha256, wanted) else None


KNOWN = select(tenants.tenant.c.id).where(tenants.tenant.c.name == bindparam("tenant"))
FIND = select(
    token.c.id,
    token.c.name,
    token.c.scope,
    token.c.sha256,
    extract("epoch", token.c.expires_at - func.now()).label("remaining"),
    token.c.last_used_on,
    TODAY.label("today"),
    token.c.tenant,
).where(
    or_(
        and_(token.c.sha256 == bindparam("sha256"), token.c.tenant.is_(None)),
        and_(token.c.sha256 == bindparam("of_one_tenant"), token.c.tenant.is_not(None)),
    ),
    or_(token.c.expires_at.is_(None), token.c.expires_at > func.now()),
)


def note_use(found: Found) -> None:
    """Write that a token was used today. That it cannot be written is logged, and no more.

    Nobody is waited for: whoever holds the row just now is writing the same.
    """
    try:
        with transactions.connect(default_engine()) as connection:
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
