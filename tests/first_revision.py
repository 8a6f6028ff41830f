"""What the first revision's code sends to the database, as its server logged it.

Word for word, but for white space. It is frozen: older workers go on serving while the schema is
brought up to date, so no revision may make a database that this can no longer work with.
"""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import Engine

from app import transactions
from app.get_or_create import race_indexes

# As they were by default. An old worker answers 503, or 500, where these do not suffice.
POLICY = transactions.RetryPolicy(
    attempts=20, deadline=10.0, lock_timeout=2.0, statement_timeout=10.0
)
LIMITS = (
    "SET LOCAL enable_seqscan = off; SET LOCAL lock_timeout = 2000;"
    " SET LOCAL statement_timeout = 10000; "
)
DEPARTMENT = f"""
SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; {LIMITS}
WITH matching AS MATERIALIZED (SELECT department.id AS id, department.name AS name,
department.created_at AS created_at, department.updated_at AS updated_at,
department.creation_token AS creation_token, department.duplicate_of_id AS duplicate_of_id FROM
department WHERE department.duplicate_of_id IS NULL AND department.name = %(name)s), found AS
(SELECT matching.id AS id, matching.name AS name, matching.created_at AS created_at,
matching.updated_at AS updated_at, matching.creation_token AS creation_token,
matching.duplicate_of_id AS duplicate_of_id FROM matching ORDER BY matching.id LIMIT 1), created
AS (INSERT INTO department (name, creation_token) SELECT %(name)s AS anon_1, %(token)s::UUID AS
anon_2 WHERE NOT (EXISTS (SELECT found.id, found.name, found.created_at, found.updated_at,
found.creation_token, found.duplicate_of_id FROM found)) RETURNING department.id,
department.name, department.created_at, department.updated_at, department.creation_token,
department.duplicate_of_id) SELECT found.id, found.name, found.created_at, found.updated_at,
found.creation_token, found.duplicate_of_id FROM found UNION ALL SELECT created.id,
created.name, created.created_at, created.updated_at, created.creation_token,
created.duplicate_of_id FROM created
"""
EMPLOYEE = f"""
SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; {LIMITS}
WITH matching AS MATERIALIZED (SELECT employee.department_id AS department_id, employee.title AS
title, employee.email AS email, employee.hired_on AS hired_on, employee.manager_id AS
manager_id, employee.id AS id, employee.name AS name, employee.created_at AS created_at,
employee.updated_at AS updated_at, employee.creation_token AS creation_token,
employee.duplicate_of_id AS duplicate_of_id FROM employee WHERE employee.duplicate_of_id IS NULL
AND employee.department_id = coalesce((SELECT coalesce(department.duplicate_of_id,
department.id) AS coalesce_1 FROM department WHERE department.id = %(department_id)s),
%(department_id)s) AND employee.name = %(name)s), found AS (SELECT matching.department_id AS
department_id, matching.title AS title, matching.email AS email, matching.hired_on AS hired_on,
matching.manager_id AS manager_id, matching.id AS id, matching.name AS name, matching.created_at
AS created_at, matching.updated_at AS updated_at, matching.creation_token AS creation_token,
matching.duplicate_of_id AS duplicate_of_id FROM matching ORDER BY matching.id LIMIT 1), created
AS (INSERT INTO employee (department_id, title, name, creation_token) SELECT coalesce((SELECT
coalesce(department.duplicate_of_id, department.id) AS coalesce_1 FROM department WHERE
department.id = %(department_id)s), %(department_id)s) AS coalesce_2, %(title)s AS anon_1,
%(name)s AS anon_2, %(token)s::UUID AS anon_3 WHERE NOT (EXISTS (SELECT found.department_id,
found.title, found.email, found.hired_on, found.manager_id, found.id, found.name,
found.created_at, found.updated_at, found.creation_token, found.duplicate_of_id FROM found))
RETURNING employee.department_id, employee.title, employee.email, employee.hired_on,
employee.manager_id, employee.id, employee.name, employee.created_at, employee.updated_at,
employee.creation_token, employee.duplicate_of_id) SELECT found.department_id, found.title,
found.email, found.hired_on, found.manager_id, found.id, found.name, found.created_at,
found.updated_at, found.creation_token, found.duplicate_of_id FROM found UNION ALL SELECT
created.department_id, created.title, created.email, created.hired_on, created.manager_id,
created.id, created.name, created.created_at, created.updated_at, created.creation_token,
created.duplicate_of_id FROM created
"""
COLUMNS = """
employee.department_id, employee.title, employee.email, employee.hired_on, employee.manager_id,
employee.id, employee.name, employee.created_at, employee.updated_at, employee.creation_token,
employee.duplicate_of_id
"""
PAGE = f"""
SELECT {COLUMNS} FROM employee
WHERE employee.id > %(after)s AND employee.duplicate_of_id IS NULL ORDER BY employee.id LIMIT 51
"""
GET = f"SELECT {COLUMNS} FROM employee WHERE employee.id = %(id)s"
HAS_DUPLICATES = """
SELECT EXISTS (SELECT * FROM employee WHERE employee.duplicate_of_id = %(id)s) AS anon_1
"""
OTHERS = """
SELECT employee.id FROM employee WHERE employee.duplicate_of_id IS NULL AND
employee.department_id = coalesce((SELECT coalesce(department.duplicate_of_id, department.id) AS
coalesce_1 FROM department WHERE department.id = %(department_id)s), %(department_id)s) AND
employee.name = %(name)s AND employee.id != %(id)s ORDER BY employee.id LIMIT 1
"""
RETITLE = """
UPDATE employee SET title=%(title)s, updated_at=now() WHERE employee.id = %(id)s
RETURNING employee.updated_at
"""
RENAME = """
UPDATE employee SET name=%(name)s, updated_at=now() WHERE employee.id = %(id)s
RETURNING employee.updated_at
"""
DELETE = "DELETE FROM employee WHERE employee.id = %(id)s"


class FirstRevision:
    """A service of the first revision, as the database knows it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def department(self, name: str) -> int:
        """Get or create a department; return its id."""
        given = {"name": name, "token": str(uuid.uuid4())}
        (row,) = self._unit("AUTOCOMMIT", DEPARTMENT, **given)
        return int(row.id)

    def employee(self, department_id: int, name: str, title: str) -> tuple[int, bool]:
        """Get or create an employee; return their id, and whether this call created them."""
        token = uuid.uuid4()
        given = {"department_id": department_id, "name": name, "title": title, "token": str(token)}
        (row,) = self._unit("AUTOCOMMIT", EMPLOYEE, **given)
        return row.id, str(row.creation_token) == str(token)

    def page(self, after: int) -> list[Any]:
        """List employees by id."""
        return self._unit("READ COMMITTED", PAGE, after=after)

    def get(self, id: int) -> list[Any]:
        """Return the employee of an id, if there is one."""
        return self._unit("READ COMMITTED", GET, id=id)

    def retitle(self, id: int, title: str) -> None:
        """Change what is no part of the key."""
        self._unit("SERIALIZABLE", LIMITS, GET, RETITLE, id=id, title=title)

    def rename(self, id: int, department_id: int, name: str) -> None:
        """Change the key."""
        statements = (LIMITS, GET, HAS_DUPLICATES, OTHERS, RENAME)
        self._unit("SERIALIZABLE", *statements, id=id, department_id=department_id, name=name)

    def delete(self, id: int) -> None:
        """Delete an employee."""
        self._unit("SERIALIZABLE", LIMITS, GET, HAS_DUPLICATES, DELETE, id=id)

    def _unit(self, level: str, *statements: str, **given: Any) -> list[Any]:
        """Run a unit of work, again when it loses a race; return the rows of its last statement."""

        def attempt(number: int) -> list[Any]:
            with self.engine.connect() as connection:
                connection.execution_options(isolation_level=level)
                with connection.begin():
                    results = [connection.exec_driver_sql(text, given) for text in statements]
                    return list(results[-1]) if results[-1].returns_rows else []

        return transactions.retry(attempt, POLICY, RACES)


RACES = race_indexes("department") | race_indexes("employee")
