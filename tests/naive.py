"""The get-or-create loop that Rollcall replaces, served so that the same load can be put on it.

As such loops go: the isolation level is set once, before the loop, on a session of its own; after
the first rollback every further attempt runs at READ COMMITTED.
"""

from __future__ import annotations

import os
import time
from typing import Any

from flask import Flask, request
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.models import Department, Employee

app = Flask(__name__)
engine = create_engine(os.environ["DATABASE_URL"], pool_size=8)


@app.get("/readyz")
def readyz() -> str:
    """Stand in for the real service's probe."""
    return "{}"


@app.post("/api/v1/employees")
def create_employee() -> tuple[dict[str, Any], int]:
    """Find or create an employee, the naive way."""
    body = request.get_json()
    department, _ = naive_get_or_create(Department, {}, name=body["department"])
    key = {"name": body["name"], "department_id": department.id}
    employee, created = naive_get_or_create(Employee, {"title": body["title"]}, **key)
    shown = ("id", "department_id", "name", "title")
    return {name: getattr(employee, name) for name in shown}, 201 if created else 200


def naive_get_or_create(
    model: type[Any], defaults: dict[str, str], **key: object
) -> tuple[Any, bool]:
    session = Session(engine, expire_on_commit=False)
    session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
    while True:
        try:
            found = session.scalars(select(model).filter_by(**key)).first()
            created = found is None
            if created:
                found = model(**key, **defaults)
                session.add(found)
            session.commit()
        except OperationalError:
            session.rollback()
            time.sleep(0.005)
        else:
            session.close()
            return found, created
