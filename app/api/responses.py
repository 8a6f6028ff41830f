"""Write records and pages as JSON responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from flask import Response, request
from marshmallow import Schema

from app.models import Record


def representation(schema: Schema, record: Record) -> Response:
    """Return one record."""
    return as_json(schema.dump(record))


def created_or_found(schema: Schema, outcome: tuple[Mapping[str, Any], bool]) -> Response:
    """Return 201 with Location for a record that was created, 200 for one that was there.

    Its own address is below that of the collection that it was posted to.
    """
    record, created = outcome
    path = f"{request.script_root}{request.path}/{record['id']}"
    if created:
        return as_json(schema.dump(record), 201, {"Location": path})
    return as_json(schema.dump(record), 200, {"Content-Location": path})


def batch(outcomes: Sequence[tuple[int, bool]]) -> Response:
    """Return the id of each record and whether it was created, and how many were."""
    created = sum(new for _, new in outcomes)
    items = [{"id": id, "created": new} for id, new in outcomes]
    return as_json({"items": items, "created": created, "existing": len(items) - created})


def records(schema: Schema, found: Sequence[Record], more: bool) -> Response:
    """Return a page of records."""
    return page(schema.dump(found, many=True), found[-1].id if more else None)


def page(items: Any, after: int | str | None) -> Response:
    """Return a page, with the way to the next one, if there is one, in the body and as a Link."""
    following = None if after is None else _following(after)
    headers = {"Link": f'<{following}>; rel="next"'} if following else {}
    return as_json({"items": items, "next": following}, 200, headers)


def nothing() -> Response:
    """Return 204: done, and nothing to say."""
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def _following(after: int | str) -> str:
    query = urlencode({**request.args.to_dict(), "after": after})
    return f"{request.script_root}{request.path}?{query}"


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return any content, as compact JSON in UTF-8."""
    text = f"{ENCODER.encode(content)}\n"
    return Response(text, status, headers, mimetype="application/json")


# One for all: json.dumps would make another for each answer.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
