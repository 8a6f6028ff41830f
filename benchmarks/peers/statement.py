"""Rollcall's own statement, for those that send it without Rollcall around it.

It is asked for in a process of its own, so that nothing of Rollcall is loaded where it is used:
``python -m benchmarks.peers.statement`` prints it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Statement:
    """SQL for psycopg2 in its three forms, and what each of its parameters stands for.

    ``plain`` is the whole statement; the two others are what Rollcall sends on a new connection and
    afterwards.
    """

    plain: str
    prepare_and_execute: str
    execute: str
    roles: Mapping[str, str]

    def parameters(self, **given: Any) -> dict[str, Any]:
        """Return all parameters: of ``name``, ``department_id``, ``title`` and ``token``."""
        return {name: given[role] for name, role in self.roles.items()}


def ask() -> Statement:
    """Return what Rollcall sends to create an employee."""
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.statement"], stdout=subprocess.PIPE, check=True
    ).stdout
    return Statement(**json.loads(said))


def _answer() -> Statement:
    from sqlalchemy.dialects.postgresql import psycopg2

    from app.call import read_call
    from app.models import Employee
    from app.statement import plan_for, shape_of, values_of
    from app.transactions import SERIALIZABLE, RetryPolicy, limits

    call = read_call(Employee, {"title": "title"}, name="name", department_id="department_id")
    plan = plan_for(shape_of(Employee, call, by_token=False), psycopg2.dialect())
    beginning = SERIALIZABLE + limits(RetryPolicy())
    roles = {**values_of(call), "token": "token"}
    return Statement(
        beginning + plan.text.sql,
        beginning + plan.text.prepare_and_execute,
        beginning + plan.text.execute,
        roles,
    )


if __name__ == "__main__":
    json.dump(asdict(_answer()), sys.stdout)
