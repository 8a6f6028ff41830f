"""``--tenant NAME``: a command for the database of one tenant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from flask.cli import AppGroup, with_appcontext

from app.cli.long_work import one_line_ends
from app.database import work_for


class TenantGroup(AppGroup):
    """A group each command of which takes ``--tenant``, and works on that tenant's database."""

    def add_command(self, command: click.Command, name: str | None = None) -> None:
        """Give the command its option, unless the group has it already."""
        if command is not self.commands.get(name or str(command.name)):
            assert command.callback is not None  # noqa: S101 - it is no group; tells mypy so
            command.params.append(
                click.Option(["--tenant"], metavar="NAME", help="Work on this tenant's database.")
            )
            command.callback = with_appcontext(_for_tenant(command.callback))
        super().add_command(command, name)


def _for_tenant(callback: Callable[..., Any]) -> Callable[..., Any]:
    def work(*arguments: Any, tenant: str | None, **options: Any) -> Any:
        if tenant is not None:
            with one_line_ends():
                work_for(tenant)
        return callback(*arguments, **options)

    return work
