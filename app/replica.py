"""Answer reads by a replica, where nobody misses there what they have written, or what is old.

A write's answer says how far the primary's log (WAL) was when it had been committed. Who brings
that back is answered by the replica only when it has got as far, which is asked together with the
read's time limits, in no round trip of its own. All others are, when it has got as far as the
primary was some seconds ago. Where it has not, does not answer or fails, the primary answers.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from flask import Flask, Response, current_app, has_request_context, request
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app import transactions
from app.config import request_policy
from app.db import db
from app.errors import ContentionError, DatabaseAway, ReplicaBehind
from app.transactions import RetryPolicy, StatementText

logger = logging.getLogger(__name__)

on_read: set[Callable[[str], object]] = set()
"""Called for each read of the replica, with one of the outcomes below."""

OUTCOMES = ("answered", "behind", "unknown", "failed")

Result = TypeVar("Result")

HEADER = "X-Rollcall-Written"
COOKIE = "rollcall_written"
REMEMBERED = 3600  # seconds; a replica that lags further is not told of what was written before
MOST_LAG = 5.0  # seconds; what a reader is shown is at most twice as old
PAUSE = 5.0  # seconds, until a replica that did not answer is tried again
CONNECT_TIMEOUT = 2  # seconds: the primary is there

# As PostgreSQL writes a position in its log: two halves in hexadecimal.
POSITION = re.compile("([0-9A-F]{1,8})/([0-9A-F]{1,8})")
NEVER = 2**64 - 1  # a position that no replica gets to
# A server that is no standby may be an old primary, which nothing brings up to date any more.
HAS_REPLAYED = "SELECT pg_is_in_recovery() AND pg_last_wal_replay_lsn() >= '{}'"
# What is committed has been flushed, unless nobody waits for that. How far the log is inserted may
# be ahead of it for seconds on a primary with nothing to do.
WRITTEN = StatementText(
    "SELECT (CASE current_setting('synchronous_commit') WHEN 'off'"
    " THEN pg_current_wal_insert_lsn() ELSE pg_current_wal_flush_lsn() END)::text",
    (),
)
ASKING = RetryPolicy(attempts=2, deadline=1.0, lock_timeout=1.0, statement_timeout=1.0)
READING = frozenset({"GET", "HEAD"})
# Of those that are refused, these say that the client has seen too little.
TOLD_TOO = frozenset({409, 412})


def init_app(app: Flask, replica: Replica) -> None:
    """Have reads answered by the replica, and writes say what it must have for their writers."""
    app.extensions["rollcall_replica"] = replica
    app.after_request(_tell_position)


def look(
    query: Callable[[Session], Result],
    at_the_primary: Callable[[], Result],
    suffices: Callable[[Result], bool],
) -> Result:
    """Return what a query gives on the replica, if the request may be answered by it.

    Where it may not, the replica cannot tell, or what it says does not suffice, the primary is
    asked. Raises what that does.
    """
    replica = _replica()
    if replica is None or not _may_be_answered_by(replica):
        return at_the_primary()
    try:
        result = replica.read(query, _position_to_have())
    except (DatabaseAway, DBAPIError, PoolTimeout, ReplicaBehind) as error:
        replica.note(error)
        return at_the_primary()
    if not suffices(result):
        _tell("unknown")
        return at_the_primary()
    _tell("answered")
    return result


def _replica() -> Replica | None:
    """Return the replica of the Flask service; the asynchronous one has none."""
    return current_app.extensions.get("rollcall_replica") if has_request_context() else None


def _may_be_answered_by(replica: Replica) -> bool:
    """Tell whether the request reads, of that database, and not what somebody is about to change.

    Who sends a condition has read before, and wants to know whether that still holds.
    """
    return (
        request.method in READING
        and not {"If-Match", "If-None-Match"} & set(request.headers.keys())
        and db.engine is replica.primary
        and replica.is_worth_a_try()
    )


def _position_to_have() -> int:
    """Return how far the log has to be for whoever asks. What cannot be read is never reached."""
    brought = (request.headers.get(HEADER), request.cookies.get(COOKIE))
    return max((_read_position(text) for text in brought if text is not None), default=0)


def _read_position(text: str) -> int:
    found = POSITION.fullmatch(text)
    return NEVER if found is None else (int(found[1], 16) << 32) + int(found[2], 16)


def _write_position(position: int) -> str:
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def _tell_position(response: Response) -> Response:
    """Say in the answer to a write how far the log is: in a header, and for browsers in a cookie.

    Asked after the commit, so that what was committed is before it.
    """
    done = response.status_code < 400 or response.status_code in TOLD_TOO
    if request.method in READING or request.method == "OPTIONS" or not done:
        return response
    text = _write_position(_position_of(db.engine, NEVER))
    response.headers[HEADER] = text
    response.set_cookie(
        COOKIE,
        text,
        max_age=REMEMBERED,
        path=f"{request.script_root}/",
        secure=request.is_secure,
        httponly=True,
        samesite="Strict",
    )
    return response


def _position_of(primary: Engine, otherwise: int) -> int:
    """Return how far the primary's log is, or what is given where it cannot be asked."""
    try:
        ((text,),) = transactions.execute(primary, lambda attempt: (WRITTEN, {}), ASKING, ())
    except (ContentionError, DBAPIError) as error:
        logger.warning(
            "the primary does not say how far its log is: %s",
            type(error).__name__,
            extra={"event": "position_unknown", "sqlstate": transactions.sqlstate(error)},
        )
        return otherwise
    return _read_position(text)


def _tell(outcome: str) -> None:
    for tell in on_read:
        tell(outcome)


class Replica:
    """A streaming standby, and what this process knows of how far it has to be."""

    def __init__(self, engine: Engine, primary: Engine) -> None:
        self.engine = engine
        self.primary = primary
        self._lock = threading.Lock()
        self._failing = False
        self._shunned_until = 0.0
        self._looked_at = 0.0
        self._positions: deque[int] = deque([0], maxlen=2)

    def read(self, query: Callable[[Session], Result], position: int) -> Result:
        """Return what a query gives, once the replica has got to a position, if it has already.

        Raises ReplicaBehind, and what connecting and reading raise. The check is a statement of the
        query's own transaction, before it, so that it holds for the server and for what it sees.
        """
        position = max(position, self._least())
        limits = transactions.limits(request_policy())
        with Session(self.engine, expire_on_commit=False) as session:
            with transactions.reaching(self.engine):
                connection = session.connection()
            check = HAS_REPLAYED.format(_write_position(position))
            if not connection.exec_driver_sql(limits + check).scalar():
                raise ReplicaBehind
            result = query(session)
            session.commit()
        self._note_answer()
        return result

    def _least(self) -> int:
        """Return where the primary's log was some seconds ago, so that nobody sees what is older.

        One thread asks for it from time to time. While the primary is away nothing is written.
        """
        now = time.monotonic()
        with self._lock:
            passed = now - self._looked_at
            if passed < MOST_LAG:
                return self._positions[0]
            self._looked_at = now
        position = _position_of(self.primary, self._positions[-1])
        with self._lock:
            if passed > 2 * MOST_LAG:
                self._positions.clear()
            self._positions.append(position)
            return self._positions[0]

    def is_worth_a_try(self) -> bool:
        """Tell whether to ask it. One that did not answer is asked by one thread after a pause."""
        now = time.monotonic()
        with self._lock:
            if now < self._shunned_until:
                return False
            if self._failing:
                self._shunned_until = now + PAUSE
            return True

    def note(self, error: Exception) -> None:
        """Count a read that the primary has to answer; leave a replica alone that is not there."""
        if isinstance(error, ReplicaBehind):
            _tell("behind")
            return
        _tell("failed")
        logger.warning(
            "the replica does not answer a read, the primary does: %s, sqlstate=%s",
            type(error).__name__,
            transactions.sqlstate(error),
            extra={"event": "replica_failed", "sqlstate": transactions.sqlstate(error)},
        )
        if transactions.sqlstate(error) is None:
            with self._lock:
                self._failing, self._shunned_until = True, time.monotonic() + PAUSE

    def _note_answer(self) -> None:
        with self._lock:
            self._failing, self._shunned_until = False, 0.0
