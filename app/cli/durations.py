"""How lengths of time are written on the command line: 30d, 12h, 15m, 0s."""

from __future__ import annotations

import re
from datetime import timedelta

import click

FORM = re.compile(r"([0-9]{1,6})([smhd])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def duration(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> timedelta | None:
    """Read the value of an option, if it is given: its callback."""
    if value is None:
        return None
    found = FORM.fullmatch(value)
    if found is None:
        raise click.BadParameter("must be a number and a unit: 30d, 12h, 15m, 0s")
    return timedelta(**{UNITS[found[2]]: int(found[1])})
