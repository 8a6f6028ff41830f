"""Read a request's body and query string, strictly."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NoReturn

from flask import g, request
from marshmallow import Schema, ValidationError
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

from app.creation_token import RequestKey
from app.errors import InvalidInput, MalformedBody
from app.schemas import messages_by_field


def body(schema: Schema, optional: bool = False) -> dict[str, Any]:
    """Return the validated JSON body; one that is ``optional`` may be empty, and of no type.

    Raises UnsupportedMediaType, RequestEntityTooLarge, BadRequest for a body that was cut off,
    MalformedBody, and InvalidInput, which names the fields.
    """
    if optional and not request.mimetype and not _raw_body():
        return _validated(schema, {})
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    return _validated(schema, _json(_raw_body()))


def query(schema: Schema) -> dict[str, Any]:
    """Return the validated query string. Raises InvalidInput, also for a repeated parameter."""
    values = request.args.to_dict(flat=False)
    repeated = {name: ["Given more than once."] for name, given in values.items() if len(given) > 1}
    if repeated:
        raise InvalidInput(messages_by_field(repeated))
    return _validated(schema, request.args.to_dict())


# Visible ASCII, with the quotes of a structured string (RFC 9651) or without. What a server makes
# of a repeated header is a list, and neither of the two.
KEY = re.compile(r'"(?P<quoted>[!#-\[\]-~]{1,255})"|(?P<bare>[!#-+\--\[\]-~]{1,255})')
NO_KEY = (
    'Give one key of 1 to 255 visible ASCII characters, none of them \\ or "; a comma in quotes.'
)


def key() -> RequestKey | None:
    """Return the request's Idempotency-Key, which is its caller's own; None if it has none.

    Raises InvalidInput.
    """
    header = request.headers.get("Idempotency-Key")
    if header is None:
        return None
    found = KEY.fullmatch(header.strip(" \t"))
    if found is None:
        raise InvalidInput({"idempotency_key": [NO_KEY]})
    token = g.get("token")
    return RequestKey(None if token is None else str(token.id), found["quoted"] or found["bare"])


def _raw_body() -> bytes:
    """Return the body, whole.

    werkzeug takes what there is of a body whose client hung up, and cuts one of unannounced length
    off at the limit.
    """
    announced, limit = request.content_length, request.max_content_length or sys.maxsize
    if announced is None:
        return _unannounced(limit)
    if announced > limit:
        raise RequestEntityTooLarge
    raw = _read(request.environ["wsgi.input"], announced)
    if len(raw) < announced:
        raise BadRequest
    return raw


def _unannounced(limit: int) -> bytes:
    """Return a body that ends where the server says so; none if it would not say."""
    if not request.environ.get("wsgi.input_terminated"):
        return b""
    stream = request.environ["wsgi.input"]
    raw = _read(stream, limit)
    if _read(stream, 1):
        raise RequestEntityTooLarge
    return raw


def _read(stream: Any, size: int) -> bytes:
    """Return what is next in a body.

    Raises BadRequest where the client has hung up, which is an OSError, gunicorn's own included.
    """
    try:
        raw: bytes = stream.read(size)
    except OSError:
        raise BadRequest from None
    return raw


def _json(raw: bytes) -> Any:
    try:
        return DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise MalformedBody from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member is given more than once")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# One for all: json.loads would make another for each body.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_distinct)


def _validated(schema: Schema, data: Any) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = schema.load(data)
    except ValidationError as error:
        # ValidationError holds the client's input; our own exception holds only the messages.
        raise InvalidInput(messages_by_field(error.messages_dict)) from None
    return loaded
