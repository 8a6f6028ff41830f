"""A small legacy database, known row by row: two tables, and one that no model knows."""

from __future__ import annotations

from sqlalchemy import create_engine

TABLES = """
CREATE TABLE department (id serial PRIMARY KEY, name varchar(50) NOT NULL);
CREATE TABLE employee (
    id serial PRIMARY KEY,
    name varchar(100) NOT NULL,
    department_id int NOT NULL REFERENCES department ON DELETE CASCADE,
    title varchar(60),
    hired_on date,
    phone text
);
CREATE TABLE ticket (
    id serial PRIMARY KEY,
    employee_id int NOT NULL REFERENCES employee ON DELETE CASCADE,
    subject text
);
"""

# Departments 4 and 5 are 1 and 2 again. Of the employees 1 to 200 some are there twice: 1 to 10
# exactly, but for blanks, 11 to 20 with more white space, 21 to 30 in the other department of one
# name, and 31 to 33, as 231 to 233, with another title: they may be different people. Every third
# employee has two tickets.
ROWS = """
INSERT INTO department (name)
VALUES ('Sales'), ('Research'), ('Letters'), ('Sales '), ('Research ');
INSERT INTO employee (name, department_id, title, hired_on)
SELECT 'Person ' || n, 1 + n % 2, 'Clerk', DATE '2020-01-01' + n FROM generate_series(1, 200) AS n;
INSERT INTO employee (name, department_id, phone)
SELECT 'Person ' || n, 1 + n % 2, '123' FROM generate_series(1, 10) AS n;
INSERT INTO employee (name, department_id)
SELECT ' Person  ' || n, 1 + n % 2 FROM generate_series(11, 20) AS n;
INSERT INTO employee (name, department_id)
SELECT 'Person ' || n, 4 + n % 2 FROM generate_series(21, 30) AS n;
INSERT INTO employee (name, department_id, title)
SELECT 'Person ' || n, 1 + n % 2, 'Poet' FROM generate_series(31, 33) AS n;
INSERT INTO ticket (employee_id, subject)
SELECT id, 'ticket ' || n FROM employee, generate_series(1, 2) AS n WHERE id % 3 = 0 ORDER BY id, n;
"""


def build(url: str) -> None:
    """Create the tables and their rows in a database that has neither."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execution_options(no_parameters=True).exec_driver_sql(TABLES + ROWS)
    engine.dispose()
