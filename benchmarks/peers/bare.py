"""The ceiling of this stack: Flask, psycopg2 and Rollcall's statement; nothing is validated."""

from __future__ import annotations

import os
import threading
import uuid
from typing import Any

import psycopg2
from flask import Flask, request
from psycopg2.errors import SerializationFailure, UniqueViolation
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from benchmarks.peers.statement import ask

URL = os.environ["DATABASE_URL"]
PREPARED = os.environ.get("BARE_PREPARED") == "1"
statement = ask()
app = Flask(__name__)
local = threading.local()


def this_threads_connection() -> Connection:
    """Return a connection that stays open as long as the thread."""
    if not hasattr(local, "connection"):
        local.connection = psycopg2.connect(URL)
        local.connection.autocommit = True
    connection: Connection = local.connection
    return connection


@app.post("/api/v1/employees")
def create_employee() -> tuple[dict[str, Any], int]:
    """Find or create an employee."""
    token = str(uuid.uuid4())
    with this_threads_connection().cursor() as cursor:
        send(cursor, statement.parameters(token=token, **request.get_json()))
        names = [column.name for column in cursor.description or ()]
        row = dict(zip(names, cursor.fetchone() or (), strict=True))
    del row[names[0]]  # how the row was found
    return row, 201 if row.pop("creation_token") == token else 200


def send(cursor: Cursor, parameters: dict[str, Any]) -> None:
    """Send the statement until it wins its race; prepared, if so asked, once a connection."""
    while True:
        try:
            return cursor.execute(text(), parameters)
        except (SerializationFailure, UniqueViolation):
            continue


def text() -> str:
    """Return what to send on this thread's connection."""
    if not PREPARED:
        return statement.plain
    if hasattr(local, "is_prepared"):
        return statement.execute
    local.is_prepared = True
    return statement.prepare_and_execute
