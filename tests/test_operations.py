"""The operator's guide: a guarded database is dumped and restored as it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flask import Flask
from sqlalchemy import create_engine, make_url

from migrations_bootstrap.embedded import find_binaries
from tests.serving import ROOT
from tests.test_road_out import steps

GUIDE = (ROOT / "docs" / "operations.md").read_text("utf-8")


def for_libpq(url: str) -> str:
    """Return a URL as PostgreSQL's own programs take it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def test_a_restored_database_is_guarded_and_remembers_its_merges(
    marked_url: str, fresh_database: str, make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    """Each command prints what stands there, and what was merged before can be undone after."""
    original = make_app(marked_url).test_cli_runner()
    assert original.invoke(args=["duplicates", "merge", "--all"]).exit_code == 0
    programs = [Path(sys.executable).parent, find_binaries(None)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        "FLASK_APP": str(ROOT / "wsgi.py"),
        "LOG_LEVEL": "WARNING",
        "DATABASE_URL": for_libpq(marked_url),
        "RESTORED_URL": for_libpq(fresh_database),
    }
    for command, expected in steps(GUIDE):
        said = subprocess.check_output(
            ["bash", "-c", command], cwd=tmp_path, env=environment, text=True
        )
        assert said.splitlines() == expected

    assert contents(fresh_database) == contents(marked_url)
    restored = make_app(fresh_database).test_cli_runner()
    for runner in (original, restored):
        assert runner.invoke(args=["duplicates", "undo", "--all"]).exit_code == 0
    assert contents(fresh_database) == contents(marked_url)


def contents(url: str) -> list[object]:
    """Return the rows of every table, and the definition of every index."""
    engine = create_engine(url)
    with engine.connect() as connection:
        queries = [
            f"SELECT * FROM {table} ORDER BY 1"
            for table in ("department", "employee", "ticket", "rollcall_version")
        ]
        queries.append("SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1")
        found = [connection.exec_driver_sql(query).all() for query in queries]
    engine.dispose()
    return list(found)
