"""Between Flask and what is the same for every server: a request in, an answer out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flask import Response, g, request
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge

from app.web.answers import Answer


def respond(answer: Answer) -> Response:
    """Return an answer as Flask's response."""
    response = Response(answer.text, answer.status, answer.headers, mimetype=answer.kind)
    if answer.text is None:
        del response.headers["Content-Type"]
    return response


class CurrentRequest:
    """The request that Flask has at hand, whichever that is."""

    @property
    def method(self) -> str:
        return request.method

    @property
    def root(self) -> str:
        return request.script_root

    @property
    def path(self) -> str:
        return request.path

    @property
    def headers(self) -> Mapping[str, str]:
        return request.headers  # type: ignore[return-value]

    @property
    def query(self) -> Mapping[str, list[str]]:
        return request.args.to_dict(flat=False)

    @property
    def mimetype(self) -> str:
        return request.mimetype

    @property
    def caller(self) -> str | None:
        token = g.get("token")
        return None if token is None else str(token.id)

    def body(self) -> bytes:
        return _raw_body()


CURRENT = CurrentRequest()


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
