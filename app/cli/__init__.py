"""The command line: ``flask …``."""

from __future__ import annotations

from flask import Flask

from app.cli import duplicate_guard, duplicate_merge, duplicates, employees, tenants, tokens
from app.cli.init_db import init_db


def init_app(app: Flask) -> None:
    """Add the commands to the application."""
    for command in (*duplicate_guard.COMMANDS, *duplicate_merge.COMMANDS):
        duplicates.group.add_command(command)
    app.cli.add_command(init_db)
    app.cli.add_command(employees.group)
    app.cli.add_command(duplicates.group)
    app.cli.add_command(tokens.group)
    app.cli.add_command(tenants.group)
