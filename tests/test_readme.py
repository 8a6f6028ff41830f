"""The README and the docs: every command they show exists and does what they say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.db import db

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHELL = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def send(client: FlaskClient, line: str) -> Any:
    """Do what curl would do."""
    words = shlex.split(line.partition("  # ")[0])
    options = dict(pairwise(words))
    (url,) = [word for word in words if word.startswith("localhost:8000")]
    return client.open(
        url.removeprefix("localhost:8000"),
        method=options.get("-X", "GET"),
        data=options.get("-d"),
        content_type="application/json" if "-H" in options else None,
    )


def test_every_curl_line_answers_as_it_says(client: FlaskClient) -> None:
    """In the order of the README, on an empty directory."""
    lines = [line for line in SHELL if line.startswith("curl ")]
    answers = [send(client, line) for line in lines]
    assert len(lines) > 10
    assert [answer.status_code for answer in answers] == [
        int(line.rpartition("# ")[2]) for line in lines
    ]


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_every_make_target_exists(line: str) -> None:
    """And says what it is for in `make help`."""
    target = line.split()[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_every_flask_line_runs(
    legacy_url: str,
    make_app: Callable[..., Flask],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order of the README; there are duplicates to merge, and no homonyms among them."""
    monkeypatch.chdir(tmp_path)
    Path("people.csv").write_text("name,department\nAda Lovelace,Research\n", "utf-8")
    app = make_app(legacy_url)
    with app.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE employee SET title = NULL")
    runner = app.test_cli_runner()
    lines = [line for line in SHELL if line.startswith(".venv/bin/flask ")]
    assert len(lines) > 9
    for line in lines:
        outcome = runner.invoke(args=shlex.split(line)[1:])
        assert outcome.exit_code == 0, f"{line}: {outcome.output}"


def test_every_flask_command_exists(app: Flask) -> None:
    """In the README and in the docs; and every command of ours is in the README."""
    texts = [README, *(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md"))]
    named = {name for text in texts for name in re.findall(r"`?flask ([a-z]+(?:-[a-z]+)*)`?", text)}
    ours = set(app.cli.list_commands(None)) - {"routes", "run", "shell"}  # type: ignore[arg-type]
    assert ours <= named
    assert {"duplicates", "employees", "init-db", "tenants", "tokens"} == ours


def test_every_shell_line_is_checked() -> None:
    """There is no other kind of line in the README."""
    assert all(line.split()[0] in {"curl", ".venv/bin/flask", "make"} for line in SHELL)


def test_every_link_leads_somewhere() -> None:
    """Links between the project's own files."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_swagger_describes_every_route_and_nothing_else(client: FlaskClient, app: Flask) -> None:
    """Each resource of the API with each of its methods, and every definition that is used."""
    document = json.loads(client.get("/api/v1/swagger.json").text)
    described = {
        (path, method.upper())
        for path, methods in document["paths"].items()
        for method in methods
        if method != "parameters"
    }
    served = {
        (re.sub(r"<\w+:(\w+)>", r"{\1}", rule.rule.removeprefix("/api/v1")), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint.startswith(
            ("api.department", "api.duplicate", "api.employee", "api.merge", "api.tenant")
        )
    }
    assert described == served
    used = set(re.findall(r'"#/definitions/(\w+)"', json.dumps(document)))
    assert used == document["definitions"].keys()


def test_the_swagger_ui_is_served_without_the_network(client: FlaskClient) -> None:
    """Every script and style comes from here, and `/` leads there."""
    assert client.get("/").headers["Location"] == "/api/v1/"
    page = client.get("/api/v1/").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert source.startswith("/")
        with client.get(source) as answer:
            assert answer.status_code == 200
