"""The road out of duplicates, walked: each command of the page prints what stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import create_engine, text

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of the page's console blocks, and the lines that it prints."""
    for block in BLOCK.findall(page):
        for step in block.split("$ ")[1:]:
            command, *printed = step.splitlines()
            yield command, printed


def test_every_command_prints_what_stands_there(fresh_database: str, tmp_path: Path) -> None:
    """From the legacy dump to a clean, guarded database."""
    environment = {
        **os.environ,
        "DATABASE_URL": fresh_database,
        "LOG_LEVEL": "WARNING",
        "FLASK_APP": str(ROOT / "wsgi.py"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for command, expected in steps((ROOT / "docs" / "road-out.md").read_text("utf-8")):
        if command.startswith("psql "):
            load(fresh_database, ROOT / shlex.split(command)[-1].removeprefix("--file="))
            continue
        result = subprocess.run(  # noqa: S602 - the page's own commands
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        printed = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
        assert printed == expected, command

    engine = create_engine(fresh_database)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM employee")) == 10_001
        assert connection.scalar(text("SELECT count(*) FROM department")) == 9
        lost = "SELECT count(*) FROM ticket WHERE subject = 'Ticket ' || employee_id"
        tickets = connection.scalar(text("SELECT count(*) FROM ticket"))
        assert connection.scalar(text(lost)) == 3333
        assert tickets == 3500
    engine.dispose()


def load(url: str, file: Path) -> None:
    """Run an SQL file as psql does."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(file.read_text("utf-8").replace("%", "%%"))
    engine.dispose()
