"""The get-or-create loop that Rollcall replaces, served so that the same load can be put on it.

As such loops go: the isolation level is set once, before the loop, on a session of its own; after
the first rollback every further attempt runs at READ COMMITTED.
"""

from __future__ import annotations

import os
import time

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
def create_employee() -> tuple[dict[str, int], int]:
    """Find or create an employee, the naive way."""
    body = request.get_json()
    department_id = naive_get_or_create(Department, name=body["department"])
    return {
        "id": naive_get_or_create(Employee, name=body["name"], department_id=department_id)
    }, 200


def naive_get_or_create(model: type[Department] | type[Employee], **key: object) -> int:
    session = Session(engine, expire_on_commit=False)
    session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
    while True:
        try:
            found = session.scalars(select(model).filter_by(**key)).first()
            if found is None:
                found = model(**key)
                session.add(found)
            session.commit()
        except OperationalError:
            session.rollback()
            time.sleep(0.005)
        else:
            session.close()
            return found.id
