"""Write records and pages as JSON responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from flask import Response, request
from marshmallow import Schema

from app.api.representations import (
    Representation,
    encode,
    meets_if_match,
    meets_if_none_match,
    represent,
)
from app.errors import RecordChanged
from app.models import Record


def shown(schema: Schema, record: Record) -> Response:
    """Return one record to whoever asks for it, or 304 where they have it already.

    Raises RecordChanged for an If-Match that does not list what it is.
    """
    representation = represent(schema, record)
    if not meets_if_match(representation.tag):
        raise RecordChanged(type(record).__name__, record.id)
    if not meets_if_none_match(representation.tag):
        return _bare(304, representation.headers)
    return _one(representation)


def changed(schema: Schema, record: Record) -> Response:
    """Return one record as it is after a change."""
    return _one(represent(schema, record))


def created_or_found(schema: Schema, outcome: tuple[Mapping[str, Any], bool]) -> Response:
    """Return 201 with Location for a record that was created, 200 for one that was there.

    Its own address is below that of the collection that it was posted to.
    """
    record, created = outcome
    path = f"{request.script_root}{request.path}/{record['id']}"
    representation = represent(schema, record)
    if created:
        return _one(representation, 201, {"Location": path})
    return _one(representation, 200, {"Content-Location": path})


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
    return _bare(204)


def _bare(status: int, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(status=status, headers=headers)
    del response.headers["Content-Type"]
    return response


def _one(
    representation: Representation, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _json(representation.text, status, {**representation.headers, **(headers or {})})


def _following(after: int | str) -> str:
    query = urlencode({**request.args.to_dict(), "after": after})
    return f"{request.script_root}{request.path}?{query}"


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return any content, as compact JSON in UTF-8."""
    return _json(encode(content), status, headers)


def _json(text: str, status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(text, status, headers, mimetype="application/json")
