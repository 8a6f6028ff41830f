"""The road out of duplicates, walked: each command of the page prints what stands there."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import create_engine, text

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of the page's console blocks, and the lines that it prints."""
    for block in BLOCK.findall(page):
        for step in block.split("$ ")[1:]:
            command, *printed = step.splitlines()
            yield command, printed


def test_every_command_prints_what_stands_there(
    make_app: Callable[..., Flask],
    fresh_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the legacy dump to a clean, guarded database."""
    runner = make_app(fresh_database).test_cli_runner()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.cli.long_work.PROGRESS_EVERY", math.inf)  # however slow it is
    for command, expected in steps((ROOT / "docs" / "road-out.md").read_text("utf-8")):
        program, *arguments = shlex.split(command)
        if program == "psql":
            load(fresh_database, ROOT / arguments[-1].removeprefix("--file="))
            continue
        if program == "flask":
            said = runner.invoke(args=arguments).output
        else:
            said = subprocess.check_output([program, *arguments], text=True)
        assert [line.rstrip() for line in said.splitlines() if line.strip()] == expected, command

    engine = create_engine(fresh_database)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM employee")) == 10_001
        assert connection.scalar(text("SELECT count(*) FROM department")) == 9
        assert connection.scalar(text("SELECT count(*) FROM ticket")) == 3500
    engine.dispose()


def load(url: str, file: Path) -> None:
    """Run an SQL file as psql does."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(file.read_text("utf-8").replace("%", "%%"))
    engine.dispose()
