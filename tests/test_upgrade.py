"""Tables are created where there are none, and legacy ones adopted without a row changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, NullPool, Table, create_engine, inspect, text

from app import tenants, tokens
from app.duplicates import journal
from app.duplicates.tables import read_tables
from app.models import Department
from migrations_bootstrap import catalogue, head, is_current, schema, upgrade
from migrations_bootstrap.embedded import EmbeddedServer
from migrations_bootstrap.errors import (
    AccessRefused,
    Blocked,
    BootstrapError,
    CannotAdopt,
    NotAdopted,
    ServerUnreachable,
)
from tests.races import together

numbers = itertools.count(1)

# The least that can be adopted: two bare tables with nothing around them.
BARE = """
    CREATE TABLE department (id integer, name varchar(50));
    CREATE TABLE employee (id integer, department_id integer, name varchar(50));
"""
ROWS = """
    INSERT INTO department (id, name) VALUES (1, 'Sales'), (2, 'Sales'), (4, 'Ops');
    INSERT INTO employee (id, department_id, name)
    SELECT n, CASE WHEN n % 7 = 0 THEN 99 ELSE 1 + n % 2 END, 'Ann ' || n % 5
      FROM generate_series(1, 40) AS n;
"""


@pytest.fixture(scope="module")
def own_database(server: EmbeddedServer, administrator: Engine) -> Iterator[Engine]:
    """A database for the tests here; making one for each would take them most of their time."""
    engine = create_engine(server.url("upgraded"), poolclass=NullPool)
    run_autocommit(administrator, "CREATE DATABASE upgraded")
    yield engine
    run_autocommit(administrator, "DROP DATABASE upgraded WITH (FORCE)")


@pytest.fixture
def engine(own_database: Engine) -> Iterator[Engine]:
    """An engine on the database that the test brings up; it is emptied after."""
    yield own_database
    run(
        own_database,
        'DROP SCHEMA IF EXISTS public, "Old %s" CASCADE',
        "CREATE SCHEMA public",
        "GRANT USAGE ON SCHEMA public TO PUBLIC",
        "ALTER DATABASE upgraded RESET ALL",
    )


def run(engine: Engine, *statements: str) -> None:
    """Run the statements in one transaction, every % in them as it stands."""
    with engine.begin() as connection:
        for statement in statements:
            connection.execution_options(no_parameters=True).exec_driver_sql(statement)


def run_autocommit(engine: Engine, statement: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


def rows(engine: Engine, table: str) -> list[Any]:
    """Return every row with its place and the transaction that wrote it; no write goes unseen."""
    statement = f"SELECT xmin, ctid, t.* FROM {table} AS t ORDER BY ctid"
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def shape(engine: Engine) -> dict[str, Any]:
    """Return what there is: tables with columns and constraints, the revision, by name."""
    with engine.connect() as connection:
        inspector = inspect(connection)
        return {
            table: [
                [(column["name"], str(column["type"]), column["default"]) for column in columns],
                inspector.get_pk_constraint(table)["constrained_columns"],
                sorted(
                    (key["constrained_columns"], key["referred_table"], key["options"])
                    for key in inspector.get_foreign_keys(table)
                ),
            ]
            for table in inspector.get_table_names()
            for columns in [inspector.get_columns(table)]
        }


def insert_works(engine: Engine) -> None:
    """Insert as the service does, and let the database number and stamp the rows."""
    with engine.begin() as connection:
        department = connection.scalar(
            text("INSERT INTO department (name) VALUES ('New') RETURNING id")
        )
        stamped = connection.execute(
            text(
                "INSERT INTO employee (department_id, name) VALUES (:id, 'Bo')"
                " RETURNING id, created_at IS NOT NULL AND updated_at IS NOT NULL,"
                " duplicate_of_id IS NULL AND creation_token IS NULL"
            ),
            {"id": department},
        ).one()
    assert tuple(stamped)[1:] == (True, True)


def test_an_empty_database_gets_its_tables(engine: Engine) -> None:
    """With adopt or without; named by the convention; no index but the primary keys."""
    done = upgrade(engine.url)
    assert (done.before, done.after, done.adopted) == (None, head(), ())
    assert done.changes == (
        "created table department",
        "created table employee",
        "created the journal of merges",
        "created the table of tokens",
        "created the registry of tenants",
    )
    with engine.connect() as connection:
        inspector = inspect(connection)
        assert {key["name"] for key in inspector.get_foreign_keys("employee")} == {
            "fk_employee_department_id_department",
            "fk_employee_manager_id_employee",
            "fk_employee_duplicate_of_id_employee",
        }
        assert inspector.get_pk_constraint("department")["name"] == "pk_department"
        assert inspector.get_indexes("employee") == []
    insert_works(engine)


def test_a_second_upgrade_changes_nothing(engine: Engine) -> None:
    """It says so, too."""
    upgrade(engine.url)
    before = shape(engine)
    done = upgrade(engine.url, adopt=True)
    assert (done.before, done.after, done.changes) == (head(), head(), ())
    assert shape(engine) == before


def test_the_schema_is_current_once_upgraded(engine: Engine) -> None:
    """A readiness probe asks with its own connection or with a URL."""
    with engine.connect() as connection:
        assert not is_current(connection)
        connection.rollback()
        upgrade(engine.url)
        assert is_current(connection)
    assert is_current(engine.url)


def test_a_legacy_database_is_not_touched_unless_told_to(engine: Engine) -> None:
    """A start that was not asked to adopt stops, and says what to run."""
    run(engine, BARE)
    before = shape(engine)
    with pytest.raises(NotAdopted, match="run flask init-db"):
        upgrade(engine.url)
    assert shape(engine) == before


def test_the_alembic_table_of_a_legacy_application_is_left_alone(engine: Engine) -> None:
    """Ours has a name of its own, so an unknown revision in theirs means nothing."""
    run(engine, BARE, "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    run(engine, "INSERT INTO alembic_version VALUES ('abcdef')")
    upgrade(engine.url, adopt=True)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "abcdef"
        assert is_current(connection)


def test_the_adoption_of_bare_tables_says_what_it_did(engine: Engine) -> None:
    """One line a change, department first."""
    run(engine, BARE, ROWS)
    done = upgrade(engine.url, adopt=True)
    assert done.adopted == ("department", "employee")
    assert done.changes == (
        "added column department.duplicate_of_id",
        "added column department.creation_token",
        "added column department.created_at",
        "added column department.updated_at",
        "set the default of department.created_at",
        "set the default of department.updated_at",
        "set department.id NOT NULL",
        "added the primary key of department",
        "made department.id number itself",
        "added foreign key department.duplicate_of_id",
        "added column employee.title",
        "added column employee.email",
        "added column employee.hired_on",
        "added column employee.manager_id",
        "added column employee.duplicate_of_id",
        "added column employee.creation_token",
        "added column employee.created_at",
        "added column employee.updated_at",
        "set the default of employee.created_at",
        "set the default of employee.updated_at",
        "set employee.id NOT NULL",
        "added the primary key of employee",
        "made employee.id number itself",
        "added foreign key employee.department_id",
        "added foreign key employee.manager_id",
        "added foreign key employee.duplicate_of_id",
        "created the journal of merges",
        "created the table of tokens",
        "created the registry of tenants",
    )


IDS = st.sampled_from(
    ["integer", "bigint", "serial", "bigserial", "int GENERATED ALWAYS AS IDENTITY"]
)
KEYS = st.sampled_from(["", "PRIMARY KEY", "UNIQUE", "UNIQUE NOT NULL", "UNIQUE DEFERRABLE"])
NAMES = st.sampled_from(["varchar(50)", "varchar", "text NOT NULL", "varchar(400) DEFAULT ''"])
TIMES = st.sampled_from(["timestamp", "timestamptz", "timestamptz NOT NULL DEFAULT now()"])
OPTIONAL = {
    "title": ["text", "varchar(20) NOT NULL DEFAULT 'none'"],
    "email": ["varchar(100)"],
    "hired_on": ["date"],
    "manager_id": ["int", "bigint"],
    "duplicate_of_id": ["int", "bigint"],
    "creation_token": ["uuid"],
    "legacy_note": ["text", "text NOT NULL DEFAULT ''", "int GENERATED ALWAYS AS (1) STORED"],
}


SITUATIONS = ["no foreign key", "foreign key", "orphans", "one table", "empty"]


@st.composite
def legacy_tables(draw: st.DrawFn, situation: str) -> list[str]:
    """Draw the statements that make a legacy schema and fill it."""

    def table(name: str, *columns: str, optional: list[str]) -> str:
        chosen = draw(st.lists(st.sampled_from(optional), unique=True))
        given_columns = [f"{column} {draw(st.sampled_from(OPTIONAL[column]))}" for column in chosen]
        times = [f"{column} {draw(TIMES)}" for column in ("created_at", "updated_at")]
        kept = times[: draw(st.integers(0, 2))]
        return f"CREATE TABLE {name} ({', '.join([*columns, *given_columns, *kept])})"

    # What a foreign key refers to has to be unique, at every statement.
    key = draw(st.sampled_from(["PRIMARY KEY", "UNIQUE"]) if situation == "foreign key" else KEYS)
    bookkeeping = ["duplicate_of_id", "creation_token", "legacy_note"]
    statements = [
        table(
            "department",
            f"id {draw(IDS)} {key}",
            f"name {draw(NAMES)}",
            optional=bookkeeping,
        ),
        table(
            "employee",
            f"id {draw(IDS)} {draw(KEYS)}",
            f"department_id {draw(st.sampled_from(['int', 'bigint NOT NULL']))}",
            f"name {draw(NAMES)}",
            optional=["title", "email", "hired_on", "manager_id", *bookkeeping],
        ),
        "CREATE INDEX legacy ON employee (name)",
    ]
    fill = (
        "INSERT INTO department (id, name) OVERRIDING SYSTEM VALUE"
        " VALUES (1, 'Sales'), (2, 'Sales'), (4, 'Ops')",
        "INSERT INTO employee (id, department_id, name) OVERRIDING SYSTEM VALUE"
        " SELECT n, 1 + n % 2, 'Ann ' || n % 5 FROM generate_series(1, 40) AS n",
    )
    match situation:
        case "foreign key":
            action = draw(st.sampled_from(["", "ON DELETE CASCADE", "ON DELETE RESTRICT"]))
            statements += [
                *fill,
                "ALTER TABLE employee ADD CONSTRAINT theirs FOREIGN KEY (department_id)"
                f" REFERENCES department (id) {action}",
            ]
        case "orphans":
            statements += [*fill, "UPDATE employee SET department_id = 99 WHERE id % 7 = 0"]
        case "one table":
            statements += [*fill, f"DROP TABLE {draw(st.sampled_from(['department', 'employee']))}"]
        case "empty":
            pass
        case _:
            statements += fill
    return statements


# The engine is the same for all examples, each of which empties the schema first.
@pytest.mark.parametrize("situation", SITUATIONS)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_adoption_changes_no_row_and_leaves_tables_that_work(
    engine: Engine, situation: str, data: st.DataObject
) -> None:
    """Whatever is there: each row keeps its place, its writer and its values; inserts work."""
    statements = data.draw(legacy_tables(situation))
    run(engine, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public", *statements)
    found = [name for name in ("department", "employee") if name in shape(engine)]
    before = {name: rows(engine, name) for name in found}
    done = upgrade(engine.url, adopt=True)
    assert done.adopted == tuple(found)
    for name in found:
        width = len(before[name][0]) if before[name] else 0
        assert [row[:width] for row in rows(engine, name)] == before[name]
    insert_works(engine)
    assert upgrade(engine.url).changes == ()


def test_old_rows_are_not_stamped_and_new_ones_are(engine: Engine) -> None:
    """ADD COLUMN with a default would say that every old row was made today."""
    run(engine, BARE, ROWS)
    upgrade(engine.url, adopt=True)
    insert_works(engine)
    with engine.connect() as connection:
        stamped = connection.scalars(text("SELECT id FROM employee WHERE created_at IS NOT NULL"))
        assert list(stamped) == [41]


def test_orphans_stay_and_new_ones_are_refused(engine: Engine) -> None:
    """A foreign key that is not validated binds new rows only."""
    run(engine, BARE, ROWS)
    upgrade(engine.url, adopt=True)
    with engine.connect() as connection:
        assert (
            connection.scalar(text("SELECT count(*) FROM employee WHERE department_id = 99")) == 5
        )
        validated = text(
            "SELECT bool_or(convalidated) FROM pg_constraint WHERE contype = 'f'"
            " AND conrelid IN ('department'::regclass, 'employee'::regclass)"
        )
        assert connection.scalar(validated) is False
    with pytest.raises(Exception, match="fk_employee_department_id_department"):
        run(engine, "INSERT INTO employee (department_id, name) VALUES (98, 'Cy')")


def test_an_own_foreign_key_is_left_as_it_is(engine: Engine) -> None:
    """A second one beside it would change what a delete does."""
    run(
        engine,
        "CREATE TABLE department (id serial PRIMARY KEY, name text)",
        "CREATE TABLE employee (id serial PRIMARY KEY, name text,"
        " department_id int REFERENCES department ON DELETE RESTRICT)",
    )
    done = upgrade(engine.url, adopt=True)
    assert "added foreign key employee.department_id" not in done.changes


def test_a_sequence_left_behind_by_a_copy_is_moved(engine: Engine) -> None:
    """Rows that came with their ids would meet the next ones the sequence gives."""
    run(
        engine,
        "CREATE TABLE department (id serial PRIMARY KEY, name text)",
        "INSERT INTO department (id, name) VALUES (1, 'Sales'), (70, 'Ops')",
    )
    assert "moved the sequence of department.id past 70" in upgrade(engine.url, adopt=True).changes
    insert_works(engine)
    assert [row[2] for row in rows(engine, "department")] == [1, 70, 71]


def test_a_primary_key_on_other_columns_stays(engine: Engine) -> None:
    """The id becomes unique beside it, for references need that."""
    run(
        engine,
        "CREATE TABLE department (id int, code text DEFAULT md5(random()::text) PRIMARY KEY,"
        " name text)",
        "INSERT INTO department (id, name) VALUES (1, 'Sales')",
    )
    assert "made department.id unique" in upgrade(engine.url, adopt=True).changes
    assert shape(engine)["department"][1] == ["code"]
    insert_works(engine)


def test_tables_are_found_on_the_search_path(engine: Engine) -> None:
    """A legacy schema need not be the first one; what is missing goes to the first."""
    run(
        engine,
        'CREATE SCHEMA "Old %s"',
        'ALTER DATABASE upgraded SET search_path = public, "Old %s"',
        'CREATE TABLE "Old %s".department (id int, name text)',
    )
    done = upgrade(engine.url, adopt=True)
    assert done.adopted == ("department",)
    with engine.connect() as connection:
        inspector = inspect(connection)
        assert set(inspector.get_table_names("public")) == {"employee", "rollcall_version"}
        assert set(inspector.get_table_names("Old %s")) == {
            "department",
            *JOURNAL,
            "rollcall_tenant",
            "rollcall_token",
        }
    insert_works(engine)


UNFIT = [
    (
        "CREATE VIEW department AS SELECT 1 AS id, 'a' AS name",
        "department is not an ordinary table",
    ),
    (
        "CREATE TABLE department (id int, name text) PARTITION BY LIST (id)",
        "department is not an ordinary table",
    ),
    (
        "CREATE UNLOGGED TABLE department (id int, name text)",
        "department is not an ordinary table",
    ),
    (
        "CREATE TABLE department (id int, name text);CREATE TABLE child () INHERITS (department)",
        "department is not an ordinary table",
    ),
    ("CREATE TABLE department (id int)", "department has no column name"),
    (
        "CREATE TABLE department (id uuid, name text)",
        "department.id is uuid, not bigint or integer",
    ),
    (
        "CREATE TABLE department (id int, name char(9))",
        "department.name is character, not character varying or text",
    ),
    (
        "CREATE TABLE department (id int, name text, created_at date)",
        "department.created_at is date,"
        " not timestamp with time zone or timestamp without time zone",
    ),
    (
        "CREATE TABLE employee (id int, name text, department_id int, hired_on timestamp)",
        "employee.hired_on is timestamp without time zone, not date",
    ),
    (
        "CREATE DOMAIN label AS text; CREATE TABLE department (id int, name label)",
        "department.name is label, not character varying or text",
    ),
    (
        "CREATE TABLE department (id int, name text); INSERT INTO department VALUES (NULL, 'a')",
        "department.id is NULL in 1 rows",
    ),
    (
        "CREATE TABLE department (id int, name text);"
        "INSERT INTO department VALUES (1, 'a'), (1, 'b'), (2, 'c')",
        "department.id has 1 values that are there more than once",
    ),
    (
        "CREATE TABLE department (id int, name text GENERATED ALWAYS AS ('a') STORED)",
        "department.name is generated and cannot be written",
    ),
    (
        "CREATE TABLE department (id int GENERATED ALWAYS AS (1) STORED, name text)",
        "department.id is generated and cannot be written",
    ),
    (
        "CREATE TABLE department (id int, name text, code text NOT NULL)",
        "department.code is NOT NULL without a default: nothing could be inserted",
    ),
    (
        "CREATE TABLE department (id int, name text, duplicate_of_id int NOT NULL DEFAULT 0)",
        "department.duplicate_of_id is NOT NULL, but is to be empty in most rows",
    ),
    (
        "CREATE TABLE employee (id int, name text, department_id int, title text NOT NULL)",
        "employee.title is NOT NULL, but is to be empty in most rows",
    ),
    (
        "CREATE TABLE department (id int, name text);"
        "INSERT INTO department SELECT 1, string_agg(md5(n::text), '')"
        " FROM generate_series(1, 200) AS n",
        "department has 1 rows with a key too long to be indexed",
    ),
]


@pytest.mark.parametrize(("statements", "problem"), UNFIT, ids=[line for _, line in UNFIT])
def test_what_cannot_be_adopted_is_named(engine: Engine, statements: str, problem: str) -> None:
    """Before anything is changed, and as the one problem there is."""
    run(engine, statements)
    before = shape(engine)
    with pytest.raises(CannotAdopt) as caught:
        upgrade(engine.url, adopt=True)
    assert caught.value.problems == [problem]
    assert problem in str(caught.value)
    assert shape(engine) == before


def test_all_problems_are_named_at_once(engine: Engine) -> None:
    """So that nobody has to try again and again; those of both tables."""
    run(
        engine,
        "CREATE TABLE department (id int, name char(5), x int NOT NULL)",
        "INSERT INTO department VALUES (NULL, 'a', 1), (2, 'b', 1), (2, 'c', 1)",
        "CREATE TABLE employee (id uuid, department_id int)",
    )
    with pytest.raises(CannotAdopt) as caught:
        upgrade(engine.url, adopt=True)
    assert len(caught.value.problems) == 6


def test_missing_rights_are_problems_like_others(engine: Engine) -> None:
    """Tables of somebody else, with rows hidden, in a schema where nothing may be made."""
    role = f"guest_{next(numbers)}"
    run(
        engine,
        f"CREATE ROLE {role} LOGIN",
        "CREATE TABLE department (id int, name text)",
        f"GRANT SELECT ON department TO {role}",
        "ALTER TABLE department ENABLE ROW LEVEL SECURITY",
    )
    with pytest.raises(CannotAdopt) as caught:
        upgrade(engine.url.set(username=role), adopt=True)
    assert caught.value.problems == [
        "no right to create tables in schema public",
        "department belongs to a role that this one is not a member of",
        "no right to create indexes in schema public, which department is in",
        "department hides rows from this role (row level security)",
    ]


def test_a_member_of_the_owning_role_may_adopt(engine: Engine) -> None:
    """Ownership by a group is ownership."""
    owner, member = f"owner_{next(numbers)}", f"member_{next(numbers)}"
    run(
        engine,
        f"CREATE ROLE {owner}",
        f"CREATE ROLE {member} LOGIN IN ROLE {owner}",
        f"GRANT CREATE ON SCHEMA public TO {owner}",
        BARE,
        f"ALTER TABLE department OWNER TO {owner}",
        f"ALTER TABLE employee OWNER TO {owner}",
    )
    assert upgrade(engine.url.set(username=member), adopt=True).adopted


def test_a_fresh_database_without_the_right_to_create_is_one_clear_line(engine: Engine) -> None:
    """Since PostgreSQL 15 not everybody may create in public."""
    role = f"guest_{next(numbers)}"
    run(engine, f"CREATE ROLE {role} LOGIN")
    with pytest.raises(AccessRefused, match=f"permission denied for schema public.*{role}"):
        upgrade(engine.url.set(username=role))


def test_a_revision_from_a_newer_version_is_one_clear_line(engine: Engine) -> None:
    """After a roll back of the code the schema is ahead of it."""
    upgrade(engine.url)
    run(engine, "UPDATE rollcall_version SET version_num = '9999'")
    with pytest.raises(BootstrapError, match="revision 9999, which this version of Rollcall"):
        upgrade(engine.url)


def test_an_older_revision_of_ours_is_upgraded_without_adopt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once adopted or created the tables are ours; every start may bring them up to date."""
    upgrade(engine.url)
    monkeypatch.setattr(schema, "head", lambda: "a later one")
    done = upgrade(engine.url)
    assert (done.before, done.after, done.adopted) == ("0004", "a later one", ())


JOURNAL = ("rollcall_change", "rollcall_merge")


def go_back_to_the_first_revision(engine: Engine) -> None:
    """Make the database what it was before there was a journal, and whatever came later."""
    run(
        engine,
        "DROP TABLE rollcall_change, rollcall_merge, rollcall_token, rollcall_tenant",
        "UPDATE rollcall_version SET version_num = '0001'",
    )


def test_the_journal_comes_to_a_database_with_data(engine: Engine) -> None:
    """From the first revision: by a start that does not adopt, without a row changed."""
    run(engine, BARE, ROWS)
    upgrade(engine.url, adopt=True)
    with_journal = shape(engine)
    go_back_to_the_first_revision(engine)
    assert not is_current(engine.url)
    before = {table: rows(engine, table) for table in ("department", "employee")}
    done = upgrade(engine.url)
    assert (done.before, done.after, done.adopted) == ("0001", "0004", ())
    assert done.changes == (
        "created the journal of merges",
        "created the table of tokens",
        "created the registry of tenants",
    )
    assert {table: rows(engine, table) for table in before} == before
    assert shape(engine) == with_journal
    assert is_current(engine.url)


def test_a_journal_that_is_there_is_kept(engine: Engine) -> None:
    """With what is in it: the tables were merged before they were upgraded."""
    upgrade(engine.url)
    run(
        engine,
        "INSERT INTO rollcall_merge (action, table_name, duplicates)"
        " VALUES ('merge', 'employee', '[2]')",
        "DROP TABLE rollcall_token, rollcall_tenant",
        "UPDATE rollcall_version SET version_num = '0001'",
    )
    before = rows(engine, "rollcall_merge")
    assert upgrade(engine.url).after == "0004"
    assert rows(engine, "rollcall_merge") == before


def test_the_journal_is_beside_tables_in_another_schema(engine: Engine) -> None:
    """Of the search path; and it is found there, whatever the schema is called."""
    run(
        engine,
        'CREATE SCHEMA "Old %s"',
        'ALTER DATABASE upgraded SET search_path = public, "Old %s"',
        'CREATE TABLE "Old %s".department (id int, name text)',
        'CREATE TABLE "Old %s".employee (id int, department_id int, name text)',
    )
    upgrade(engine.url, adopt=True)
    with engine.connect() as connection:
        inspector = inspect(connection)
        assert inspector.get_table_names("public") == ["rollcall_version"]
        tables = read_tables(connection, Department)
        assert {journal.exists(connection, table) for table in tables.by_oid.values()} == {True}


def test_the_revision_and_the_library_make_the_same_journal(engine: Engine) -> None:
    """Columns, defaults, identities, constraints and indexes, to the letter of the catalogue."""
    upgrade(engine.url)
    by_the_revision = catalogued(engine)
    assert len(by_the_revision) > 20
    run(engine, "DROP TABLE rollcall_change, rollcall_merge")
    with engine.connect() as connection:
        table = read_tables(connection, Department).of(Department)
    journal.create(engine, table)
    assert catalogued(engine) == by_the_revision


def catalogued(engine: Engine) -> set[Any]:
    """Return what the catalogue says of the journal, each thing as a row."""
    statement = text(
        "SELECT a.attrelid::regclass::text, a.attnum, a.attname, format_type(a.atttypid,"
        "       a.atttypmod), a.attnotnull, a.attidentity, pg_get_expr(d.adbin, d.adrelid)"
        "  FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid"
        "       AND d.adnum = a.attnum WHERE a.attrelid = ANY (:tables ::regclass[])"
        " UNION ALL SELECT conname, 0, pg_get_constraintdef(oid), '', false, '', ''"
        "  FROM pg_constraint WHERE conrelid = ANY (:tables ::regclass[])"
        " UNION ALL SELECT indexname, 0, indexdef, '', false, '', '' FROM pg_indexes"
        "  WHERE tablename = ANY (:tables)"
    )
    with engine.connect() as connection:
        return set(map(tuple, connection.execute(statement, {"tables": list(JOURNAL)})))


def test_a_table_is_found_in_the_schema_that_is_named(engine: Engine) -> None:
    """On the search path or off it; and not elsewhere."""
    run(
        engine,
        'CREATE SCHEMA "Old %s"',
        'CREATE TABLE "Old %s".department (id int, name text)',
        "CREATE TABLE employee (id int)",
    )
    with engine.connect() as connection:
        found = catalogue.find_table(connection, "department", "Old %s")
        assert found is not None
        assert (found.schema, found.name) == ("Old %s", "department")
        assert catalogue.find_table(connection, "department") is None
        assert catalogue.find_table(connection, "employee", "Old %s") is None
        assert catalogue.find_table(connection, "employee", "public") == catalogue.find_table(
            connection, "employee"
        )


def test_a_failing_upgrade_leaves_nothing_behind(engine: Engine) -> None:
    """One transaction: a name that is taken stops it, and what was done before is undone."""
    run(engine, BARE, "CREATE TABLE pk_employee ()")
    before = shape(engine)
    with pytest.raises(BootstrapError, match='relation "pk_employee" already exists'):
        upgrade(engine.url, adopt=True)
    assert shape(engine) == before


@contextmanager
def held(engine: Engine, statement: str) -> Iterator[Connection]:
    """Keep a transaction open that has done `statement`."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SET application_name = 'the holder'")
        connection.exec_driver_sql(statement)
        yield connection


def test_a_table_in_use_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader in a long transaction holds the change up, not the other way round."""
    run(engine, BARE, ROWS)
    monkeypatch.setattr(schema, "DDL_LOCK_TIMEOUT", 1)
    monkeypatch.setattr(schema, "DDL_PATIENCE", 0.01)
    with held(engine, "SELECT * FROM employee") as reader:
        monkeypatch.setattr(schema.time, "sleep", lambda seconds: reader.rollback())
        done = upgrade(engine.url, adopt=True)
    assert done.adopted
    (retry,) = [line for line in caplog.messages if line.startswith("upgrade_retry")]
    assert "the holder" in retry


def test_a_table_in_use_is_not_tried_without_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names who holds it."""
    run(engine, BARE)
    monkeypatch.setattr(schema, "DDL_LOCK_TIMEOUT", 0.7)
    monkeypatch.setattr(schema, "DDL_PATIENCE", 0.01)
    monkeypatch.setattr(schema, "DDL_ATTEMPTS", 2)
    monkeypatch.setattr(schema, "DDL_PAUSE", 0)
    with (
        held(engine, "LOCK TABLE department IN ROW SHARE MODE"),
        pytest.raises(Blocked, match=r"held up by pid \d+ \(the holder, for \d+ s\)"),
    ):
        upgrade(engine.url, adopt=True)
    assert "rollcall_version" not in shape(engine)


def test_a_start_needs_no_more_than_reading_once_the_schema_is_current(engine: Engine) -> None:
    """The service's own role need not own the tables."""
    role = f"reader_{next(numbers)}"
    upgrade(engine.url)
    run(engine, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT ON rollcall_version TO {role}")
    assert upgrade(engine.url.set(username=role)).changes == ()


def test_threads_bring_up_different_databases_at_once(
    engine: Engine, administrator: Engine
) -> None:
    """Alembic keeps its state in module globals; tenants are made in threads."""
    urls = [engine.url.set(database=f"{engine.url.database}_{n}") for n in range(4)]
    for url in urls:
        run_autocommit(administrator, f"CREATE DATABASE {url.database}")
    done = together([lambda url=url: upgrade(url) for url in urls])
    for url in urls:
        assert is_current(url)
        run_autocommit(administrator, f"DROP DATABASE {url.database} WITH (FORCE)")
    assert [outcome.before for outcome in done] == [None] * 4


def test_an_outage_is_told_as_clearly_as_at_the_start() -> None:
    """upgrade() may be called by itself."""
    with pytest.raises(ServerUnreachable):
        upgrade("postgresql://somebody@/some?host=/nowhere")


@pytest.mark.parametrize(
    ("module", "table", "others"),
    [
        (
            tokens,
            tokens.token,
            {"ck_rollcall_token_scope", "fk_rollcall_token_tenant_rollcall_tenant"},
        ),
        (tenants, tenants.tenant, {"ck_rollcall_tenant_state", "uq_rollcall_tenant_database"}),
    ],
)
def test_a_table_of_ours_is_what_the_service_takes_it_for(
    engine: Engine, module: Any, table: Table, others: set[str]
) -> None:
    """Column by column; no unknown scope or state can be stored, nor a name twice."""
    upgrade(engine.url)
    with engine.connect() as connection:
        found = inspect(connection).get_columns(table.name)
        constraints = connection.execute(
            text("SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(:name)"),
            {"name": table.name},
        )
        named = {name for (name,) in constraints if "not_null" not in name}
    assert [
        (column["name"], column["type"].compile(engine.dialect), column["nullable"])
        for column in found
    ] == [
        (column.name, column.type.compile(engine.dialect), column.nullable)
        for column in table.columns
    ]
    assert named == module.RACE_INDEXES | {f"pk_{table.name}"} | others
