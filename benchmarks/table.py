"""What is in the tables: one department, and employees with random names."""

from __future__ import annotations

DEPARTMENT = "Research"
DEPARTMENT_ID = 1
TITLE = "Analyst"


def name_sql(number: str) -> str:
    """Return SQL for the name of an employee by number.

    Such as "Tmsbihaf Orcnelisadgt": a hash in letters. Unlike a serial number it is spread over the
    whole index; and no two are the same.
    """
    letters = f"translate(md5(({number})::text), '0123456789', 'ghilmnorst')"
    return f"initcap(substr({letters}, 1, 8) || ' ' || substr({letters}, 9, 12))"


def fill_sql(rows: int) -> tuple[str, ...]:
    """Return the statements that fill a peer's empty tables."""
    return (
        f"INSERT INTO department (name) VALUES ('{DEPARTMENT}')",
        "INSERT INTO employee (name, department_id, title)"
        f" SELECT {name_sql('number')}, {DEPARTMENT_ID}, '{TITLE}'"
        f" FROM generate_series(1, {rows}) AS number",
        "VACUUM (ANALYZE)",
    )


def sample_sql(rows: int, size: int = 100_000) -> str:
    """Return a query for the names of some of the employees, the first one's first."""
    step = max(1, rows // size)
    return f"SELECT {name_sql('number')} FROM generate_series(1, {rows}, {step}) AS number"
