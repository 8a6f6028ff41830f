"""What is answered, and how content is written: as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from app.web.requests import Request, first_of_each

# One for all: json.dumps would make another for each answer.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Answer(NamedTuple):
    """A status, a body of some kind (None: there is none, nor a Content-Type), and headers."""

    status: int
    text: str | None = None
    headers: Mapping[str, str] = {}
    kind: str = "application/json"


NOTHING = Answer(204)


def encode(content: Any) -> str:
    """Return any content as compact JSON."""
    return f"{ENCODER.encode(content)}\n"


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """Return any content, as compact JSON in UTF-8."""
    return Answer(status, encode(content), headers or {})


def page(request: Request, items: Any, after: int | str | None) -> Answer:
    """Return a page, with the way to the next one, if there is one, in the body and as a Link."""
    following = None if after is None else _following(request, after)
    headers = {"Link": f'<{following}>; rel="next"'} if following else {}
    return as_json({"items": items, "next": following}, 200, headers)


def _following(request: Request, after: int | str) -> str:
    query = urlencode({**first_of_each(request.query), "after": after})
    return f"{request.root}{request.path}?{query}"
