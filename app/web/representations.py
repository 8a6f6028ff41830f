"""Records as they are sent, and what a request expects of them (RFC 9110, section 13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from marshmallow import Schema
from werkzeug.http import parse_etags

from app.directory import anything
from app.models import Record
from app.web.answers import encode
from app.web.requests import Request


class Representation(NamedTuple):
    """What is sent of a record, and the tag that says which state of it that is."""

    text: str
    tag: str  # without the quotes

    @property
    def headers(self) -> dict[str, str]:
        """The header that every answer about it has."""
        return {"ETag": f'"{self.tag}"'}


def represent(schema: Schema, record: Record | Mapping[str, Any]) -> Representation:
    """Return a record's representation. Its tag is a hash of it: a strong one."""
    text = encode(schema.dump(record))
    return Representation(text, sha256(text.encode()).hexdigest()[:32])


def meets_if_match(request: Request, tag: str) -> bool:
    """Tell whether the request's If-Match, if there is one, lists the tag, or is ``*``.

    Weak tags match nothing here, and a header without any tag no record.
    """
    listed = request.headers.get("If-Match")
    return listed is None or parse_etags(listed).contains(tag)


def meets_if_none_match(request: Request, tag: str) -> bool:
    """Tell whether the request's If-None-Match does not list the tag, not as a weak one either."""
    return not parse_etags(request.headers.get("If-None-Match")).contains_weak(tag)


def expectation(request: Request, schema: Schema) -> Callable[[Record], bool]:
    """Return what tells whether a record is as the request expects it, to change or delete it."""
    if "If-Match" not in request.headers and "If-None-Match" not in request.headers:
        return anything

    def is_as_expected(record: Record) -> bool:
        tag = represent(schema, record).tag
        return meets_if_match(request, tag) and meets_if_none_match(request, tag)

    return is_as_expected
