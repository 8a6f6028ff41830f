"""How commands print for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDE = 10_000  # columns, where there is no terminal to fit into


def make_console() -> Console:
    """Return a console that writes what it is given as it is, and cuts nothing off."""
    width = None if sys.stdout.isatty() else WIDE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def text_table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table to print."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
