"""Where a request ends: how much of what a client has sent is its next request, head and body.

It decides only when a request is there to be worked on. gunicorn's parser, which is given those
bytes and no others, decides what they mean; where it leaves any, the connection is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from gunicorn.http.errors import InvalidChunkSize, LimitRequestHeaders, LimitRequestLine
from werkzeug.exceptions import RequestEntityTooLarge

LONGEST_HEAD = 64 * 1024  # bytes; the parser has closer limits for each line
LONGEST_LINE = 4094  # bytes, as the parser has it
LONGEST_CHUNK_LINE = 8190  # bytes, as the parser has it
LONGEST_NUMBER = 18  # digits
END_OF_HEAD = b"\r\n\r\n"
BODY = re.compile(
    rb"\r\n(?:content-length:[ \t]*0*(\d+)[ \t]*\r|transfer-encoding:[^\r\n]*(chunked))",
    re.IGNORECASE,
)
EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r", re.IGNORECASE)


class Framing:
    """Finds the end of one request in bytes that arrive bit by bit."""

    def __init__(self, longest_body: int) -> None:
        self.longest_body = longest_body
        self.in_body = False
        self.expects = False  # that somebody tells the client to go on with the body
        self.is_cut = False  # the body is too large to be waited for; the request is its head alone
        self._step: Callable[[bytearray], int | None] = self._head

    def end(self, received: bytearray) -> int | None:
        """Return where the request that begins ``received`` ends, or None if more has to come.

        Each call needs what the last one had, and more. Raises LimitRequestLine,
        LimitRequestHeaders, RequestEntityTooLarge, or InvalidChunkSize.
        """
        return self._step(received)

    def _head(self, received: bytearray) -> int | None:
        found = received.find(END_OF_HEAD)
        if found < 0:
            _refuse_long_head(received)
            return None
        begin = found + len(END_OF_HEAD)
        body = BODY.search(received, 0, found + 1)
        if body is None:
            return begin
        self.expects = EXPECTS.search(received, 0, found + 1) is not None
        if body[1] is None:
            self._step = Chunks(begin, self.longest_body).end
        elif len(body[1]) > LONGEST_NUMBER or int(body[1]) > self.longest_body:
            self.is_cut = True
            return begin
        else:
            self._step = partial(_length, begin + int(body[1]))
        self.in_body = True
        return self._step(received)


def _refuse_long_head(received: bytearray) -> None:
    if len(received) > LONGEST_LINE + 2 and received.find(b"\r\n", 2, LONGEST_LINE + 2) < 0:
        raise LimitRequestLine(len(received), LONGEST_LINE)
    if len(received) > LONGEST_HEAD:
        raise LimitRequestHeaders("head")


def _length(end: int, received: bytearray) -> int | None:
    return end if len(received) >= end else None


class Chunks:
    """Finds the end of a body in chunks (RFC 9112, section 7.1)."""

    def __init__(self, begin: int, longest_body: int) -> None:
        self.at = begin  # of the next chunk's line
        self.content = 0  # bytes that the chunks so far hold
        self.longest_body = longest_body
        # What chunks add to their content; a client that sends byte by byte adds more.
        self.longest = begin + 2 * longest_body + LONGEST_HEAD

    def end(self, received: bytearray) -> int | None:
        """Return where the last chunk's trailers end, or None if more has to come."""
        while self.at < len(received):
            line = received.find(b"\r\n", self.at)
            if line < 0:
                if len(received) - self.at > LONGEST_CHUNK_LINE:
                    raise InvalidChunkSize(b"")
                break
            size = _size(received[self.at : line])
            if size == 0:
                return _end_of_trailers(received, line)
            self.content += size
            self.at = line + 2 + size + 2
            if self.content > self.longest_body:
                raise RequestEntityTooLarge
        if len(received) > self.longest:
            raise RequestEntityTooLarge
        return None


def _size(line: bytearray) -> int:
    digits = bytes(line.partition(b";")[0]).strip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", digits):
        raise InvalidChunkSize(digits)
    return int(digits, 16)


def _end_of_trailers(received: bytearray, line: int) -> int | None:
    """Trailers are lines as headers are, and an empty one ends them; often it is the only one."""
    found = received.find(END_OF_HEAD, line)
    if found >= 0:
        return found + len(END_OF_HEAD)
    if len(received) - line > LONGEST_HEAD:
        raise LimitRequestHeaders("trailers")
    return None
