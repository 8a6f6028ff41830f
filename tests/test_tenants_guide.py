"""docs/tenants.md: every request and every command that it shows does what it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask

from tests.serving import ROOT
from tests.tenancy import tenants_app
from tests.test_api_guide import send

PAGE = (ROOT / "docs" / "tenants.md").read_text("utf-8")
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_every_request_is_answered_as_the_page_says(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """In its order, on a service without tenants."""
    client = tenants_app(make_app, database_url).test_client()
    requests = [line.split("  # ") for line in LINES if line.startswith("curl ")]
    assert len(requests) > 10
    assert [send(client, command, "").status_code for command, _ in requests] == [
        int(status) for _, status in requests
    ]


def test_every_command_runs(
    make_app: Callable[..., Flask],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its order."""
    monkeypatch.chdir(tmp_path)
    runner = tenants_app(make_app, database_url).test_cli_runner()
    commands = [line for line in LINES if line.startswith("flask ")]
    assert len(commands) == len(LINES) - 12
    for line in commands:
        outcome = runner.invoke(args=shlex.split(line)[1:])
        assert outcome.exit_code == 0, f"{line}: {outcome.output}"
