"""Where a request ends, however its bytes arrive."""

from __future__ import annotations

import pytest
from gunicorn.http.errors import InvalidChunkSize, LimitRequestHeaders, LimitRequestLine
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import RequestEntityTooLarge

from app.framing import LONGEST_CHUNK_LINE, LONGEST_HEAD, LONGEST_LINE, Framing

LONGEST_BODY = 100
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
REQUESTS = [
    GET,
    b"\r\n" + GET,
    POST + b"Content-Length: 5\r\n\r\nabcde",
    POST + b"Host: x\r\ncontent-length:\t0005 \r\nX: y\r\n\r\nab\r\n\r",
    POST + b"Content-Length: 0\r\n\r\n",
    CHUNKED + b"0\r\n\r\n",
    CHUNKED + b"3\r\n\r\n\r\r\nA ;x=y\r\n0123456789\r\n0\r\n\r\n",
    CHUNKED + b"1\r\na\r\n000\r\nX: y\r\nY: z\r\n\r\n",
]


@given(st.sampled_from(REQUESTS), st.binary(max_size=20), st.lists(st.integers(1, 90)))
def test_a_request_ends_where_it_does(request: bytes, more: bytes, cuts: list[int]) -> None:
    """Whatever pieces it comes in, and whatever follows it."""
    framing, sent = Framing(LONGEST_BODY), request + more
    ends = [framing.end(bytearray(sent[:cut])) for cut in sorted({*cuts, len(sent)})]
    first = next(end for end in ends if end is not None)
    assert first == len(request)


@pytest.mark.parametrize("request_", REQUESTS)
def test_nothing_less_than_a_request_is_one(request_: bytes) -> None:
    """Byte by byte, it is there with the last."""
    framing = Framing(LONGEST_BODY)
    ends = [framing.end(bytearray(request_[:at])) for at in range(len(request_) + 1)]
    assert ends == [None] * len(request_) + [len(request_)]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"GET /" + b"x" * LONGEST_LINE, LimitRequestLine),
        (b"\r\nGET /" + b"x" * LONGEST_LINE, LimitRequestLine),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * LONGEST_HEAD, LimitRequestHeaders),
        (CHUNKED + b"0\r\n" + b"X: y\r\n" * LONGEST_HEAD, LimitRequestHeaders),
        (CHUNKED + b"65\r\n", RequestEntityTooLarge),
        (CHUNKED + b"FFFFFFFFFFFFFFFF\r\n", RequestEntityTooLarge),
        (CHUNKED + b"1;" + b"x" * 8000 + b"\r\na\r\n" * 20, InvalidChunkSize),
        (CHUNKED + (b"1;" + b"x" * 8000 + b"\r\na\r\n") * 20, RequestEntityTooLarge),
        (CHUNKED + b"zz\r\n", InvalidChunkSize),
        (CHUNKED + b"\r\n", InvalidChunkSize),
        (CHUNKED + b"1" * 17 + b"\r\n", InvalidChunkSize),
        (CHUNKED + b"1;" + b"x" * LONGEST_CHUNK_LINE, InvalidChunkSize),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_there(
    sent: bytes, error: type[Exception]
) -> None:
    """Nothing without end is kept in memory."""
    with pytest.raises(error):
        Framing(LONGEST_BODY).end(bytearray(sent))


@pytest.mark.parametrize("length", [b"101", b"9" * 5000])
def test_a_body_that_is_announced_as_too_large_is_not_waited_for(length: bytes) -> None:
    """Its head goes to the application, which asks who sends it before it says that it is."""
    framing, head = Framing(LONGEST_BODY), POST + b"Content-Length: " + length + b"\r\n\r\n"
    assert framing.end(bytearray(head + b"some")) == len(head)
    assert framing.is_cut


@pytest.mark.parametrize(
    ("head", "expects"),
    [
        (b"Content-Length: 5\r\nExpect: 100-continue\r\n", True),
        (b"expect:100-Continue\r\nTransfer-Encoding: gzip, chunked\r\n", True),
        (b"Content-Length: 5\r\n", False),
        (b"Content-Length: 5\r\nX: Expect: 100-continue\r\n", False),
    ],
)
def test_who_waits_to_be_told_to_go_on_is_noticed(head: bytes, expects: bool) -> None:
    """Once the head is there."""
    framing = Framing(LONGEST_BODY)
    assert framing.end(bytearray(POST + head + b"\r\n")) is None
    assert framing.expects is expects
