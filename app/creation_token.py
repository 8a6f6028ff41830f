"""The tokens that rows are created with: new for each call, or the same for each repeated request.

Both are UUIDs (RFC 9562), of different versions, so that one is never taken for the other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

from app.natural_key import normalise

NEW = 7
REPEATABLE = 8
VARIANT = 2 << 62
VERSION_AND_VARIANT = 0xF << 76 | 3 << 62
RECORD_BITS = 48  # the last group of digits of a UUID
RECORD_MASK = (1 << RECORD_BITS) - 1


class RequestKey(NamedTuple):
    """What a client calls a request by, to be able to send it again."""

    caller: str | None  # None: whoever they are
    key: str


def new_tokens(count: int) -> Iterator[UUID]:
    """Yield UUIDs of version 7: the time, then 74 random bits.

    Tokens are indexed. Random ones would each touch another page of the index, and write it whole
    after each checkpoint; those of one time are neighbours.
    """
    milliseconds = time.time_ns() // 1_000_000
    fixed = milliseconds << 80 | NEW << 76 | VARIANT
    random = os.urandom(10 * count)
    for at in range(0, len(random), 10):
        bits = int.from_bytes(random[at : at + 10], "big")
        yield UUID(int=fixed | bits & ~VERSION_AND_VARIANT)


def repeatable_token(request: RequestKey, table: str, sent: Mapping[str, Any]) -> UUID:
    """Return the token of a request to create a row of this natural key, as it was sent.

    A UUID of version 8 with two parts. The first 74 bits stand for the caller, the table and the
    request's key: they find the row that such a request created, whatever it is called by now. The
    last 48 stand for the natural key, and tell a repeated request from another one.
    """
    whose = _hash([request.caller, table, request.key])
    which = _hash(sorted((name, normalise(value)) for name, value in sent.items()))
    bits = whose & ~RECORD_MASK | which & RECORD_MASK
    return UUID(int=bits & ~VERSION_AND_VARIANT | REPEATABLE << 76 | VARIANT)


def span(token: UUID) -> tuple[UUID, UUID]:
    """Return the lowest and the highest of the tokens that stand for the same request."""
    if token.version != REPEATABLE:
        return token, token
    return UUID(int=token.int & ~RECORD_MASK), UUID(int=token.int | RECORD_MASK)


def _hash(content: Any) -> int:
    return int.from_bytes(sha256(json.dumps(content).encode()).digest()[:16], "big")
