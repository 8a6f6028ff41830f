"""What a request is to us, and how its body and query string are read: strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from marshmallow import Schema, ValidationError
from werkzeug.exceptions import UnsupportedMediaType

from app.creation_token import RequestKey
from app.errors import InvalidInput, MalformedBody
from app.schemas import messages_by_field


class Request(Protocol):
    """A request, as each framework gives it."""

    @property
    def method(self) -> str:
        """In capitals."""

    @property
    def root(self) -> str:
        """The path that the service is mounted at; usually none."""

    @property
    def path(self) -> str:
        """The path below the root, decoded."""

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names, in whatever case."""

    @property
    def query(self) -> Mapping[str, list[str]]:
        """The values of each parameter."""

    @property
    def mimetype(self) -> str:
        """The type of the body without parameters, in small letters; "" if there is none."""

    @property
    def caller(self) -> str | None:
        """The id of the token that was shown."""

    def body(self) -> bytes:
        """Return the whole body. Raises RequestEntityTooLarge, and BadRequest if it was cut off."""


def body(request: Request, schema: Schema, optional: bool = False) -> dict[str, Any]:
    """Return the validated JSON body; one that is ``optional`` may be empty, and of no type.

    Raises UnsupportedMediaType, MalformedBody, InvalidInput, which names the fields, and what
    reading it raises.
    """
    if optional and not request.mimetype and not request.body():
        return _validated(schema, {})
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    return _validated(schema, _json(request.body()))


def query(request: Request, schema: Schema) -> dict[str, Any]:
    """Return the validated query string. Raises InvalidInput, also for a repeated parameter."""
    values = request.query
    repeated = {name: ["Given more than once."] for name, given in values.items() if len(given) > 1}
    if repeated:
        raise InvalidInput(messages_by_field(repeated))
    return _validated(schema, first_of_each(values))


def first_of_each(values: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the first value of each parameter."""
    return {name: given[0] for name, given in values.items()}


# Visible ASCII, with the quotes of a structured string (RFC 9651) or without. What a server makes
# of a repeated header is a list, and neither of the two.
KEY = re.compile(r'"(?P<quoted>[!#-\[\]-~]{1,255})"|(?P<bare>[!#-+\--\[\]-~]{1,255})')
NO_KEY = (
    'Give one key of 1 to 255 visible ASCII characters, none of them \\ or "; a comma in quotes.'
)


def key(request: Request) -> RequestKey | None:
    """Return the request's Idempotency-Key, which is its caller's own; None if it has none.

    Raises InvalidInput.
    """
    header = request.headers.get("Idempotency-Key")
    if header is None:
        return None
    found = KEY.fullmatch(header.strip(" \t"))
    if found is None:
        raise InvalidInput({"idempotency_key": [NO_KEY]})
    return RequestKey(request.caller, found["quoted"] or found["bare"])


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
