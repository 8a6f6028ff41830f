"""What browsers are told: security headers on every answer, and CORS where it is set."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.datastructures import Headers

from app.headers import OURS, with_ours

PAGE = "https://portal.example.com"
DEPARTMENTS = "/api/v1/departments"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", DEPARTMENTS, 200),
        ("POST", DEPARTMENTS, 415),
        ("GET", "/api/v1/departments/7", 404),
        ("GET", "/nowhere", 404),
        ("PUT", DEPARTMENTS, 405),
        ("GET", "/", 302),
        ("GET", "/healthz", 200),
        ("GET", "/swaggerui/droid-sans.css", 200),
    ],
)
def test_every_answer_has_the_headers(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    """Once each; errors too."""
    with client.open(path, method=method) as answer:
        assert answer.status_code == status
        for name, value in OURS:
            assert answer.headers.getlist(name) == [value]


def test_the_headers_are_those_of_an_api() -> None:
    """Nothing in an answer may be run, framed or guessed at."""
    assert dict(OURS) == {
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def test_answers_are_kept_by_nobody_unless_they_have_a_tag(client: FlaskClient) -> None:
    """What has an ETag may be kept by the client, which asks again; what says otherwise, does."""
    assert client.get(DEPARTMENTS).headers["Cache-Control"] == "no-store"
    assert ("Cache-Control", "private, no-cache") in with_ours([("ETag", '"1"')])
    given = [("ETag", '"1"'), ("Cache-Control", "max-age=60")]
    assert Headers(with_ours(given)).getlist("Cache-Control") == ["max-age=60"]
    with client.get("/swaggerui/droid-sans.css") as asset:
        assert asset.headers.getlist("Cache-Control") == ["no-cache"]


def test_https_is_to_stay_https(make_app: Callable[..., Flask], database_url: str) -> None:
    """A proxy that is trusted says that the client came so; a stranger's word is not taken."""
    came = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https"}
    trusting = make_app(database_url, ROLLCALL_TRUSTED_PROXIES=1).test_client()
    answer = trusting.get("/healthz", headers=came)
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "Strict-Transport-Security" not in trusting.get("/healthz").headers
    distrusting = make_app(database_url).test_client()
    answer = distrusting.get("/healthz", headers=came)
    assert "Strict-Transport-Security" not in answer.headers


def test_the_swagger_ui_may_run_its_own_scripts_and_no_other(client: FlaskClient) -> None:
    """Each inline script and style is there by its hash; everything else comes from here."""
    answer = client.get("/api/v1/")
    (policy,) = answer.headers.getlist("Content-Security-Policy")
    rules = {name: values for name, *values in (rule.split() for rule in policy.split("; "))}
    assert "'unsafe-inline'" not in policy
    assert "'unsafe-eval'" not in policy
    assert rules["default-src"] == rules["frame-ancestors"] == ["'none'"]
    scripts = re.findall(r"<script(?: [^>]*)?>(.*?)</script>", answer.text, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    styles += re.findall(r' style="(.*?)"', answer.text)
    assert rules["script-src"] == ["'self'", *(sha256(text) for text in scripts if text)]
    assert rules["style-src"] == ["'self'", "'unsafe-hashes'", *map(sha256, styles)]
    for address in re.findall(r'(?:src|href|url)(?:="|: ")([^"]+)"', answer.text):
        assert address.startswith(("/swaggerui/", "/api/v1/"))
        with client.get(address) as found:
            assert found.status_code == 200


def test_the_styles_of_the_swagger_ui_come_from_here(client: FlaskClient) -> None:
    """Fonts and images are of the package, or in the style sheet itself."""
    for sheet in ("droid-sans.css", "swagger-ui.css"):
        with client.get(f"/swaggerui/{sheet}") as answer:
            addresses = re.findall(r"url\(\s*['\"]?([^)'\"]+)", answer.text)
        for address in addresses:
            assert re.match(r"data:image/|\./files/|files/", address), address[:80]


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def preflight(client: FlaskClient, origin: str, method: str, *headers: str) -> Headers:
    """Return the headers that a browser gets before it calls."""
    answer = client.options(
        DEPARTMENTS,
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": ", ".join(headers),
        },
    )
    assert answer.status_code < 300
    assert not answer.data
    return answer.headers


def names(value: str) -> set[str]:
    return set(value.split(", "))


def test_other_origins_may_not_call_unless_it_is_set(client: FlaskClient) -> None:
    """No header of CORS at all."""
    answers = [preflight(client, PAGE, "GET"), client.get(DEPARTMENTS).headers]
    assert not [name for headers in answers for name, _ in headers if "Access" in name]


def test_origins_that_are_set_may_call(make_app: Callable[..., Flask], database_url: str) -> None:
    """Exactly those; they may send and read the headers that the API uses."""
    origins = f"https://other.example, {PAGE}"
    client = make_app(database_url, ROLLCALL_CORS_ORIGINS=origins).test_client()
    answer = preflight(client, PAGE, "PATCH", "authorization", "if-match", "idempotency-key")
    assert answer["Access-Control-Allow-Origin"] == PAGE
    assert names(answer["Access-Control-Allow-Methods"]) == {
        "DELETE",
        "GET",
        "HEAD",
        "PATCH",
        "POST",
    }
    assert names(answer["Access-Control-Allow-Headers"].lower()) == {
        "authorization",
        "idempotency-key",
        "if-match",
    }
    for answer in (
        client.get(DEPARTMENTS, headers={"Origin": PAGE}).headers,
        client.get("/nowhere", headers={"Origin": PAGE}).headers,
    ):
        assert answer["Access-Control-Allow-Origin"] == PAGE
        assert "Origin" in answer["Vary"]
        assert names(answer["Access-Control-Expose-Headers"]) == {
            "Content-Location",
            "ETag",
            "Link",
            "Location",
            "Retry-After",
            "X-Request-ID",
            "X-Rollcall-Written",
        }
    for stranger in (f"{PAGE}.evil.example", "http://portal.example.com", "null"):
        assert "Access-Control-Allow-Origin" not in preflight(client, stranger, "GET")
        answer = client.get(DEPARTMENTS, headers={"Origin": stranger}).headers
        assert "Access-Control-Allow-Origin" not in answer
    assert "OPTIONS" in client.options(DEPARTMENTS).headers["Allow"]


def test_all_origins_may_only_read(make_app: Callable[..., Flask], database_url: str) -> None:
    """A browser sends no JSON of theirs, and neither PATCH nor DELETE."""
    client = make_app(database_url, ROLLCALL_CORS_ORIGINS="*").test_client()
    answer = preflight(client, PAGE, "POST", "authorization", "content-type")
    assert answer["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Methods" not in answer
    assert "Access-Control-Allow-Headers" not in answer
    answer = preflight(client, PAGE, "GET", "authorization", "content-type")
    assert answer["Access-Control-Allow-Headers"].lower() == "authorization"
    assert names(answer["Access-Control-Allow-Methods"]) == {"GET", "HEAD"}
    assert "Access-Control-Allow-Credentials" not in answer
