"""A legacy database: two bare tables, a third that the models do not know, years of duplicates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

from sqlalchemy import Connection, create_engine, text

DEPARTMENTS = ("Research", "Sales", "Production", "Finance", "Quality Management")
# Written once more, the one with a blank behind it.
DEPARTMENTS_AGAIN = ("Research", "Sales ")
FIRST_NAMES = (
    "Ada Alan Barbara Claude Donald Edsger Frances Grace Hedy Ivan Jean Katherine Linus Margaret"
    " Niklaus Radia Sophie Tim Ursula Vint"
)
LAST_NAMES = (
    "Abelson Backus Cerf Dijkstra Engelbart Floyd Goldberg Hopper Iverson Johnson Knuth Lamport"
    " McCarthy Naur Perlman Ritchie Shannon Turing Wilkes Zuse"
)

KINDS = ("identical", "blank", "spaces", "trailing", "homonym", "twice")

SCHEMA = """
CREATE TABLE department (id serial PRIMARY KEY, name varchar(50) NOT NULL);
CREATE TABLE employee (
    id serial PRIMARY KEY,
    name varchar(100) NOT NULL,
    department_id int NOT NULL REFERENCES department ON DELETE CASCADE,
    title varchar(60),
    hired_on date,
    phone text);
CREATE TABLE ticket (
    id serial PRIMARY KEY,
    employee_id int NOT NULL REFERENCES employee ON DELETE CASCADE,
    subject text);
"""


@dataclass(frozen=True)
class LegacyRows:
    """What :func:`make_legacy` put in, by table."""

    rows: dict[str, int]
    groups: dict[str, int]
    redundant: dict[str, int]
    homonyms: dict[str, int]


def make_legacy(url: str, people: int = 300, duplicated: int = 60) -> LegacyRows:
    """Make the tables in an empty database, the same each time; at most 400 people.

    The first of the people are there again, each in another way: see KINDS.
    """
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(SCHEMA)
        _insert_departments(connection)
        employees = [_person(number) for number in range(people)]
        again = [copy for number in range(duplicated) for copy in _again(number)]
        _insert_employees(connection, [*employees, *again])
        connection.exec_driver_sql(
            "INSERT INTO ticket (employee_id, subject)"
            " SELECT id, 'Ticket ' || n FROM employee, generate_series(1, 2) AS n WHERE id %% 3 = 0"
        )
    engine.dispose()
    kinds = Counter(KINDS[number % len(KINDS)] for number in range(duplicated))
    departments = len(DEPARTMENTS) + len(DEPARTMENTS_AGAIN)
    return LegacyRows(
        rows={"department": departments, "employee": people + len(again)},
        groups={"department": len(DEPARTMENTS_AGAIN), "employee": duplicated},
        redundant={"department": len(DEPARTMENTS_AGAIN), "employee": len(again)},
        homonyms={"department": 0, "employee": kinds["homonym"]},
    )


def _person(number: int) -> dict[str, Any]:
    first, last = list(product(FIRST_NAMES.split(), LAST_NAMES.split()))[number]
    return {
        "name": f"{first} {last}",
        "department_id": 1 + number % len(DEPARTMENTS),
        "title": ("Engineer", "Staff", "Manager")[number % 3],
        "hired_on": f"19{80 + number % 20}-0{1 + number % 9}-15",
        "phone": None,
    }


def _again(number: int) -> list[dict[str, Any]]:
    """Return how a person is there again; in the department that is there again, if theirs is."""
    person = _person(number)
    if person["department_id"] <= len(DEPARTMENTS_AGAIN) and number % 2:
        person["department_id"] += len(DEPARTMENTS)
    changes: dict[str, list[dict[str, Any]]] = {
        "identical": [{"phone": "555-0100"}],
        "blank": [{"title": None, "hired_on": None}],
        "spaces": [{"name": person["name"].replace(" ", "  ")}],
        "trailing": [{"name": person["name"] + " ", "title": " "}],
        "homonym": [{"title": "Director"}],
        "twice": [{}, {}],
    }
    return [person | change for change in changes[KINDS[number % len(KINDS)]]]


def _insert_departments(connection: Connection) -> None:
    names = [{"name": name} for name in (*DEPARTMENTS, *DEPARTMENTS_AGAIN)]
    connection.execute(text("INSERT INTO department (name) VALUES (:name)"), names)


def _insert_employees(connection: Connection, employees: list[dict[str, Any]]) -> None:
    statement = (
        "INSERT INTO employee (name, department_id, title, hired_on, phone)"
        " VALUES (:name, :department_id, :title, CAST(:hired_on AS date), :phone)"
    )
    connection.execute(text(statement), employees)
