"""Tables are read as the database has them: keys, columns, and whatever refers to their rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.duplicates.tables import (
    KeyedTable,
    Reference,
    SoftReference,
    Tables,
    plain_table,
    read_tables,
)
from app.errors import UnknownTable
from app.get_or_create import GetOrCreateMixin
from app.models import Department, Employee
from tests.other_models import Legacy, Tag


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A transaction in a database with our tables, of which nothing stays."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def read(connection: Connection, *soft: SoftReference) -> tuple[Tables, KeyedTable]:
    tables = read_tables(connection, Employee, soft)
    return tables, tables.of(Employee)


def reference(connection: Connection, name: str, *soft: SoftReference) -> Reference:
    """Return the reference to employees that has the name."""
    (found,) = [one for one in read(connection, *soft)[1].references if one.name == name]
    return found


def test_a_table_is_read_with_its_key_and_what_people_fill_in(connection: Connection) -> None:
    """Columns that the models do not know are filled in by people, too; ours are not."""
    connection.exec_driver_sql(
        "ALTER TABLE employee ADD phone text,"
        " ADD shout text GENERATED ALWAYS AS (upper(name)) STORED, ADD gone int;"
        "ALTER TABLE employee DROP gone"
    )
    tables, employee = read(connection)
    assert employee.key == ("department_id", "name")
    assert employee.texts == {"name"}
    assert employee.details == ("title", "email", "hired_on", "manager_id", "phone")
    assert tables.parents(employee) == [tables.of(Department)]
    assert tables.children(tables.of(Department)) == [(employee, "department_id")]
    assert [one.name for one in employee.references] == ["employee.manager_id"]


def test_references_come_from_every_schema(connection: Connection) -> None:
    """And are named by it where it is not on the search path."""
    connection.exec_driver_sql(
        'CREATE SCHEMA "O\'ther"; CREATE TABLE "O\'ther"."Vis%%it" ('
        ' id int PRIMARY KEY, "emp%%loyee" bigint REFERENCES employee);'
        'CREATE INDEX ON "O\'ther"."Vis%%it" ("emp%%loyee")'
    )
    found = reference(connection, "O'ther.Vis%it.emp%loyee")
    assert (found.columns, found.targets, found.identity) == (("emp%loyee",), ("id",), ("id",))
    assert found.table_name == "O'ther.Vis%it"
    assert found.indexed


def test_a_composite_reference_is_one(connection: Connection) -> None:
    """In the order of its foreign key, whatever order the columns have."""
    connection.exec_driver_sql(
        "ALTER TABLE employee ADD UNIQUE (id, department_id);"
        "CREATE TABLE seat (department bigint, person bigint, place int NOT NULL UNIQUE,"
        " FOREIGN KEY (person, department) REFERENCES employee (id, department_id))"
    )
    found = reference(connection, "seat.person+department")
    assert found.targets == ("id", "department_id")
    assert found.identity == ("place",)
    assert not found.indexed
    assert found.uniques == ()


def test_a_reference_twice_over_is_one(connection: Connection) -> None:
    """Two foreign keys on the same column repoint the same rows."""
    connection.exec_driver_sql(
        "CREATE TABLE note (employee_id bigint REFERENCES employee REFERENCES employee)"
    )
    assert reference(connection, "note.employee_id").identity == ()


def test_a_partitioned_table_refers_once(connection: Connection) -> None:
    """Its partitions are reached by way of it."""
    connection.exec_driver_sql(
        "CREATE TABLE shift (employee_id bigint REFERENCES employee, day int)"
        " PARTITION BY RANGE (day);"
        "CREATE TABLE shift_1 PARTITION OF shift FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE shift_2 PARTITION OF shift FOR VALUES FROM (10) TO (20)"
    )
    names = [one.name for one in read(connection)[1].references]
    assert names == ["employee.manager_id", "shift.employee_id"]


def test_soft_references_are_declared(connection: Connection) -> None:
    """By table and column; those to other tables are not this table's."""
    connection.exec_driver_sql("CREATE TABLE log (id int PRIMARY KEY, who bigint, what text)")
    to_employees = SoftReference("log", "who", "employee")
    to_departments = SoftReference("log", "id", "department")
    found = reference(connection, "log.who", to_employees, to_departments)
    assert (found.targets, found.identity) == (("id",), ("id",))
    with pytest.raises(UnknownTable, match=r"there is no column log\.whom"):
        read(connection, SoftReference("log", "whom", "employee"))
    with pytest.raises(UnknownTable, match=r"log\.who: there is no table employe$"):
        read(connection, SoftReference("log", "who", "employe"))


def test_a_unique_index_that_a_reference_is_in_is_known(connection: Connection) -> None:
    """Repointing could violate it; one on an expression, or without the column, is left out."""
    connection.exec_driver_sql(
        "CREATE TABLE badge (id int PRIMARY KEY, employee_id bigint REFERENCES employee,"
        " kind text, UNIQUE (kind, employee_id));"
        "CREATE UNIQUE INDEX ON badge (lower(kind), employee_id);"
        "CREATE INDEX ON badge (employee_id)"
    )
    found = reference(connection, "badge.employee_id")
    assert [unique.columns for unique in found.uniques] == [("kind", "employee_id")]


def test_a_table_without_a_natural_key_can_be_looked_at_too(connection: Connection) -> None:
    """If one column tells its rows apart; what repointing may not touch is left out."""
    connection.exec_driver_sql(
        "CREATE TABLE badge (id int PRIMARY KEY, employee_id bigint UNIQUE REFERENCES employee,"
        " label text);"
        "CREATE TABLE note (employee_id bigint REFERENCES employee)"
    )
    tables, employee = read(connection)
    badge = plain_table(connection, tables, reference(connection, "badge.employee_id"))
    assert badge is not None
    assert (badge.id, badge.details, badge.key) == ("id", ("label",), ())
    assert plain_table(connection, tables, reference(connection, "note.employee_id")) is None
    manager = reference(connection, "employee.manager_id")
    assert plain_table(connection, tables, manager) is employee


def test_a_table_that_is_not_adopted_is_named(connection: Connection) -> None:
    """With the first column that it lacks."""
    connection.exec_driver_sql("ALTER TABLE department DROP COLUMN duplicate_of_id")
    with pytest.raises(UnknownTable, match="the table department has no column duplicate_of_id"):
        read(connection)


def test_a_table_that_is_not_there_is_named(connection: Connection) -> None:
    """Only when it is wanted."""
    connection.exec_driver_sql("DROP TABLE employee")
    tables = read_tables(connection, Department)
    assert tables.of(Department).references == ()
    with pytest.raises(UnknownTable, match="there is no table employee"):
        tables.of(Employee)


class Garage(DeclarativeBase):
    """The models of an application in which not every table has a natural key."""


class Country(Garage):
    __tablename__ = "country"

    id: Mapped[int] = mapped_column(primary_key=True)


class Maker(GetOrCreateMixin, Garage):
    __tablename__ = "maker"
    __natural_key__ = ("country_id", "name")

    id: Mapped[int] = mapped_column(primary_key=True)
    country_id: Mapped[int] = mapped_column(ForeignKey("country.id"))
    name: Mapped[str]


def test_a_key_may_refer_to_a_table_that_has_none(connection: Connection) -> None:
    """Which is no parent: its rows are what they are."""
    Garage.metadata.create_all(connection)
    tables = read_tables(connection, Maker)
    maker = tables.of(Maker)
    assert list(tables.by_oid.values()) == [maker]
    assert (maker.parents, tables.parents(maker)) == ({}, [])


def test_the_tables_of_another_application_are_read(own: Engine) -> None:
    """In a schema, with a column that has another name than its attribute, and no text key."""
    with own.connect() as connection:
        tables = read_tables(connection, Tag)
    tag, legacy = tables.of(Tag), tables.of(Legacy)
    assert (tag.key, tag.texts) == (("scope_name", "label"), {"scope_name"})
    assert (legacy.table, legacy.id, legacy.id_type) == ('"old"."legacy"', "legacy_key", "uuid")
    assert legacy.ids("some") == "CAST(CAST(%(some)s AS text[]) AS uuid[])"
