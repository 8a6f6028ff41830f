"""Tables get the indexes they should have, online, whatever an earlier build left behind."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, NullPool, create_engine, text

from migrations_bootstrap import census, converge_indexes, ensure_database, indexes, upgrade
from migrations_bootstrap.census import WHITE_SPACE, Census, normalised
from migrations_bootstrap.embedded import EmbeddedServer
from migrations_bootstrap.errors import Blocked, BootstrapError
from migrations_bootstrap.indexes import TableIndexes
from tests.races import eventually

numbers = itertools.count(1)

KEYS = {"department": ("name",), "employee": ("department_id", "name")}
DEPARTMENT = {"department": ("name",)}
GUARD, LOOKUP = "uq_department_natural_key", "ix_department_natural_key"
BEHIND = {"uq_department_creation_token", "ix_department_duplicate_of_id"}


@pytest.fixture(scope="module")
def own_database(server: EmbeddedServer, administrator: Engine) -> Iterator[Engine]:
    """A database for the tests here; making one for each would take them most of their time."""
    engine = create_engine(server.url("indexed"), poolclass=NullPool)
    run(administrator, "CREATE DATABASE indexed")
    yield engine
    run(administrator, "DROP DATABASE indexed WITH (FORCE)")


@pytest.fixture
def engine(own_database: Engine) -> Iterator[Engine]:
    """An engine on a database with our tables and no index but the primary keys."""
    upgrade(own_database.url)
    yield own_database
    run(own_database, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


def run(engine: Engine, *statements: str) -> None:
    """Run the statements, each in a transaction of its own."""
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def definitions(engine: Engine, table: str = "department") -> dict[str, str]:
    """Return the definitions of the valid indexes by name, without the primary key."""
    statement = text(
        "SELECT c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index AS i"
        " JOIN pg_class AS c ON c.oid = i.indexrelid"
        " WHERE i.indrelid = to_regclass(:table) AND NOT i.indisprimary"
        " AND i.indisvalid AND i.indisready"
    )
    with engine.connect() as connection:
        return dict(tuple(row) for row in connection.execute(statement, {"table": table}))


def converge(engine: Engine, **options: Any) -> TableIndexes:
    """Converge the departments alone."""
    (outcome,) = converge_indexes(engine.url, DEPARTMENT, **options)
    return outcome


def names(engine: Engine) -> set[str]:
    return set(definitions(engine))


def test_a_table_without_duplicates_is_guarded(engine: Engine) -> None:
    """The guard, the index on tokens, and one behind every foreign key; nothing else."""
    outcomes = converge_indexes(engine.url, KEYS)
    assert [(o.table, o.guard, o.lookup) for o in outcomes] == [
        ("department", True, False),
        ("employee", True, False),
    ]
    assert definitions(engine, "employee") == {
        "uq_employee_natural_key": "CREATE UNIQUE INDEX uq_employee_natural_key ON public.employee"
        " USING btree (department_id, name) NULLS NOT DISTINCT WHERE (duplicate_of_id IS NULL)",
        "uq_employee_creation_token": "CREATE UNIQUE INDEX uq_employee_creation_token"
        " ON public.employee USING btree (creation_token) WHERE (creation_token IS NOT NULL)",
        "ix_employee_department_id": "CREATE INDEX ix_employee_department_id"
        " ON public.employee USING btree (department_id)",
        "ix_employee_manager_id": "CREATE INDEX ix_employee_manager_id"
        " ON public.employee USING btree (manager_id) WHERE (manager_id IS NOT NULL)",
        "ix_employee_duplicate_of_id": "CREATE INDEX ix_employee_duplicate_of_id"
        " ON public.employee USING btree (duplicate_of_id) WHERE (duplicate_of_id IS NOT NULL)",
    }


def test_a_second_run_does_nothing(engine: Engine) -> None:
    """Neither with the guard nor with the look-up index; a census is taken where it is needed."""
    converge(engine)
    assert converge(engine) == TableIndexes("department", True, False, (), None)
    run(engine, f"DROP INDEX {GUARD}", "INSERT INTO department (name) VALUES ('a'), ('a')")
    converge(engine)
    assert converge(engine) == TableIndexes("department", False, True, (), Census(2, 1, 1, 0))


def test_a_table_with_duplicates_has_the_look_up_index(engine: Engine) -> None:
    """And the guard takes its place once they are gone, in one run."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales'), ('Sales'), ('Ops')")
    assert converge(engine).actions[-1] == f"built {LOOKUP}"
    assert names(engine) == {LOOKUP, *BEHIND}
    run(engine, "UPDATE department SET duplicate_of_id = 1 WHERE id = 2")
    assert converge(engine).actions == (f"built {GUARD}", f"dropped {LOOKUP}")
    assert names(engine) == {GUARD, *BEHIND}


def test_the_guard_is_there_before_the_look_up_index_goes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never neither: each statement finds one of them valid, once there was one."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales'), ('Sales')")
    converge(engine)
    seen = record_key_indexes(engine, monkeypatch)
    run(engine, "UPDATE department SET duplicate_of_id = 1 WHERE id = 2")
    converge(engine)
    run(engine, f"DROP INDEX {GUARD}", f"CREATE UNIQUE INDEX {GUARD} ON department (id)")
    converge(engine)
    assert seen == [{LOOKUP}, {LOOKUP, GUARD}, {GUARD}, {GUARD, LOOKUP}, {LOOKUP}, {LOOKUP, GUARD}]
    assert names(engine) == {GUARD, *BEHIND}


def test_a_table_can_be_unguarded_and_stays_so(engine: Engine) -> None:
    """Until somebody asks for the guard: who does not ask leaves it as it is."""
    converge(engine)
    assert converge(engine, guard=False) == TableIndexes(
        "department", False, True, (f"built {LOOKUP}", f"dropped {GUARD}"), None
    )
    for guard in (None, False):
        assert converge(engine, guard=guard) == TableIndexes("department", False, True, (), None)
    assert converge(engine, count=True).census == Census(0, 0, 0, 0)
    assert converge(engine, guard=True).actions == (f"built {GUARD}", f"dropped {LOOKUP}")
    assert converge(engine, guard=True).actions == ()
    assert converge(engine) == TableIndexes("department", True, False, (), None)


def test_a_guard_that_was_asked_for_is_built_when_it_can_be(engine: Engine) -> None:
    """Duplicates are in its way; once they are marked any start builds it."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales'), ('Sales')")
    assert converge(engine, guard=False).lookup
    asked = converge(engine, guard=True)
    assert asked == TableIndexes("department", False, True, (), Census(2, 1, 1, 0))
    run(engine, "UPDATE department SET duplicate_of_id = 1 WHERE id = 2")
    assert converge(engine).guard


def test_the_look_up_index_is_there_before_the_guard_goes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement finds one of them; stopped between them, it goes on where it was."""
    converge(engine)
    seen = record_key_indexes(engine, monkeypatch)
    converge(engine, guard=False)
    assert seen == [{GUARD}, {GUARD, LOOKUP}]
    run(engine, f"COMMENT ON INDEX {LOOKUP} IS NULL")
    converge(engine)
    with monkeypatch.context() as stopping:
        stopping.setattr(indexes._Builder, "discard", stop)
        with pytest.raises(KeyboardInterrupt):
            converge(engine, guard=False)
    assert {GUARD, LOOKUP} <= names(engine)
    assert converge(engine).actions == (f"dropped {GUARD}",)


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def record_key_indexes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Note, before each statement that builds or drops, which of the two are valid."""
    seen: list[set[str]] = []
    execute = indexes._Builder._run

    def note_and_run(builder: Any, statement: str) -> None:
        seen.append(names(engine) & {GUARD, LOOKUP})
        execute(builder, statement)

    monkeypatch.setattr(indexes._Builder, "_run", note_and_run)
    return seen


def set_ready(engine: Engine, ready: bool) -> None:
    """Give the broken guard the one face or the other."""
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE pg_index SET indisready = :ready WHERE indexrelid = to_regclass(:name)"),
            {"ready": ready, "name": GUARD},
        )


def fail_to_build(engine: Engine, *, ready: bool) -> None:
    """Leave behind a guard as a failed build does, with the one face or the other."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales'), ('Sales')")
    with pytest.raises(sa.exc.IntegrityError):
        run(
            engine,
            f"CREATE UNIQUE INDEX CONCURRENTLY {GUARD} ON department (name)"
            " NULLS NOT DISTINCT WHERE (duplicate_of_id IS NULL)",
        )
    run(engine, "DELETE FROM department WHERE id = 2")
    # A build that fails in its second scan leaves an index that is ready, but not valid.
    set_ready(engine, ready)


@pytest.mark.parametrize("ready", [True, False])
def test_a_guard_left_by_a_failed_build_is_built_anew(engine: Engine, ready: bool) -> None:
    """IF NOT EXISTS would be content with it."""
    fail_to_build(engine, ready=ready)
    assert GUARD not in names(engine)
    assert f"built {GUARD}" in converge(engine).actions
    assert names(engine) == {GUARD, *BEHIND}


@pytest.mark.parametrize("ready", [True, False])
def test_an_invalid_guard_over_duplicates_gives_way_to_the_look_up_index(
    engine: Engine, ready: bool
) -> None:
    """The look-up index first; an invalid guard may refuse rows that a valid one would not."""
    fail_to_build(engine, ready=False)
    run(engine, "INSERT INTO department (name) VALUES ('Sales')")
    set_ready(engine, ready)
    assert converge(engine).actions[-2:] == (f"built {LOOKUP}", f"dropped {GUARD}")
    assert names(engine) == {LOOKUP, *BEHIND}


@pytest.mark.parametrize(
    "other",
    [
        f"CREATE UNIQUE INDEX {GUARD} ON department (name) WHERE (duplicate_of_id IS NULL)",
        f"CREATE UNIQUE INDEX {GUARD} ON department (name) NULLS NOT DISTINCT",
        f"CREATE INDEX {GUARD} ON department (name) WHERE (duplicate_of_id IS NULL)",
        f"CREATE UNIQUE INDEX {GUARD} ON department (lower(name)) NULLS NOT DISTINCT"
        " WHERE (duplicate_of_id IS NULL)",
        f"CREATE INDEX {GUARD} ON department USING hash (name) WHERE (duplicate_of_id IS NULL)",
    ],
)
def test_an_index_of_our_name_that_is_another_is_rebuilt(engine: Engine, other: str) -> None:
    """A name says nothing about what an index enforces."""
    run(engine, other)
    converge(engine)
    assert "NULLS NOT DISTINCT WHERE (duplicate_of_id IS NULL)" in definitions(engine)[GUARD]
    assert names(engine) == {GUARD, *BEHIND}


def test_a_duplicate_that_comes_after_the_census_leads_to_the_look_up_index(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build meets it; the broken guard goes, and the new census shows it."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales')")
    count = indexes._Builder.census

    def count_too_early(builder: Any, key: tuple[str, ...]) -> Census:
        counted = count(builder, key)
        if counted.rows == 1:
            run(engine, "INSERT INTO department (name) VALUES ('Sales')")
        return counted

    monkeypatch.setattr(indexes._Builder, "census", count_too_early)
    outcome = converge(engine)
    assert outcome.census == Census(2, 1, 1, 0)
    assert outcome.actions[-2:] == (f"built {LOOKUP}", f"dropped {GUARD}")
    assert names(engine) == {LOOKUP, *BEHIND}


def test_a_duplicate_inserted_while_the_guard_is_built_leads_to_the_look_up_index(
    engine: Engine,
) -> None:
    """An open transaction holds the build up with the duplicate in it, and then commits."""
    run(engine, "INSERT INTO department (name) VALUES ('Sales')")
    run(engine, "CREATE INDEX ix_department_duplicate_of_id ON department (duplicate_of_id)")
    run(
        engine,
        "CREATE UNIQUE INDEX uq_department_creation_token ON department (creation_token)"
        " WHERE (creation_token IS NOT NULL)",
    )
    outcomes: list[TableIndexes] = []
    with engine.connect() as writer:
        writer.exec_driver_sql("INSERT INTO department (name) VALUES ('Sales')")
        thread = threading.Thread(target=lambda: outcomes.append(converge(engine)))
        thread.start()
        eventually(lambda: is_building(engine))
        writer.commit()
        thread.join()
    assert outcomes[0].census == Census(2, 1, 1, 0)
    assert not outcomes[0].guard
    assert LOOKUP in names(engine)


def is_building(engine: Engine, for_longer_than: str = "0 s") -> bool:
    """Tell whether an index build waits for an older transaction."""
    with engine.connect() as connection:
        waiting = text(
            "SELECT count(*) FROM pg_stat_progress_create_index JOIN pg_stat_activity USING (pid)"
            " WHERE lockers_total > 0 AND clock_timestamp() - query_start > :age ::interval"
        )
        return bool(connection.scalar(waiting, {"age": for_longer_than}))


def test_another_error_of_a_build_is_one_clear_line(engine: Engine) -> None:
    """A key that no index takes; and the next run repairs what this one left."""
    run(
        engine,
        "ALTER TABLE department ALTER name TYPE text",
        "INSERT INTO department (name) SELECT string_agg(md5(n::text), '')"
        " FROM generate_series(1, 200) AS n",
    )
    with pytest.raises(BootstrapError, match="exceeds btree version"):
        converge(engine)
    run(engine, "DELETE FROM department")
    assert converge(engine).guard


def test_a_deadlock_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that the build waits for wants the table: PostgreSQL ends one of the two."""
    execute = indexes._Builder._run
    monkeypatch.setattr(indexes._Builder, "_run", deadlocking(engine, execute, times=1))
    assert converge(engine).guard
    monkeypatch.setattr(indexes._Builder, "_run", deadlocking(engine, execute, times=9))
    run(engine, f"DROP INDEX {GUARD}")
    with pytest.raises(Blocked, match="40P01"):
        converge(engine)


def deadlocking(
    engine: Engine, execute: Callable[[Any, str], None], times: int
) -> Callable[[Any, str], None]:
    """Return a way to build that fails in a deadlock at first."""
    left = itertools.chain(range(times), itertools.repeat(None))

    def fail_first(builder: Any, statement: str) -> None:
        if next(left) is None:
            return execute(builder, statement)
        raise_deadlock = "DO $$ BEGIN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END $$"
        builder.connection.exec_driver_sql(raise_deadlock)

    return fail_first


def test_a_build_waits_for_an_old_transaction_and_says_for_whose(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bounded: the line names it, and the next run repairs what is left."""
    monkeypatch.setattr(indexes, "PATIENCE", 0.01)
    caplog.set_level(logging.INFO)
    with engine.connect() as writer:
        writer.exec_driver_sql("SET application_name = 'the import'")
        writer.exec_driver_sql("INSERT INTO department (name) VALUES ('Sales')")
        with pytest.raises(Blocked, match=r"waited 1 s for pid \d+ \(the import, for \d+ s\)"):
            converge(engine, lock_timeout=1)
    (line,) = [line for line in caplog.messages if line.startswith("bootstrap_blocked")]
    assert "the import" in line
    assert converge(engine).guard


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CREATE INDEX theirs ON department (duplicate_of_id, name)", False),
        ("CREATE INDEX theirs ON department USING hash (duplicate_of_id)", False),
        (
            "CREATE INDEX theirs ON department (duplicate_of_id) WHERE duplicate_of_id IS NOT NULL",
            False,
        ),
        ("CREATE INDEX theirs ON department (duplicate_of_id) WHERE name <> ''", True),
        ("CREATE INDEX theirs ON department (name, duplicate_of_id)", True),
        ("CREATE INDEX theirs ON department (abs(duplicate_of_id))", True),
        ("CREATE INDEX theirs ON department USING brin (duplicate_of_id)", True),
    ],
)
def test_an_index_that_serves_a_foreign_key_is_enough(
    engine: Engine, theirs: str, ours: bool
) -> None:
    """Whatever its name; one that does not serve it is no excuse."""
    run(engine, theirs)
    converge(engine)
    assert ("ix_department_duplicate_of_id" in names(engine)) is ours


def test_foreign_keys_the_application_does_not_know_are_served_too(engine: Engine) -> None:
    """Of several columns, with names that need quotes, twice the same."""
    run(
        engine,
        'CREATE TABLE site (city text, "Floor %%" int, PRIMARY KEY (city, "Floor %%"))',
        'ALTER TABLE department ADD city text, ADD "Floor %%" int,'
        ' ADD FOREIGN KEY (city, "Floor %%") REFERENCES site,'
        ' ADD FOREIGN KEY (city, "Floor %%") REFERENCES site',
    )
    converge(engine)
    assert definitions(engine)["ix_department_city_Floor %"].endswith(
        '(city, "Floor %") WHERE ((city IS NOT NULL) AND ("Floor %" IS NOT NULL))'
    )
    assert converge(engine).actions == ()


def test_a_name_that_postgresql_would_cut_off_is_refused(engine: Engine) -> None:
    """Cut names would collide; nothing is built."""
    table = "t" * 48
    run(
        engine,
        f"CREATE TABLE {table} (id int, name text, duplicate_of_id int, creation_token uuid)",
    )
    with pytest.raises(BootstrapError, match="longer than 63 bytes"):
        converge_indexes(engine.url, {table: ["name"]})
    assert definitions(engine, table) == {}


def test_a_table_that_is_not_there_is_one_clear_line(engine: Engine) -> None:
    """It is asked for by the caller, so this is his mistake."""
    with pytest.raises(BootstrapError, match="no table 'absent'"):
        converge_indexes(engine.url, {"absent": ["name"]})


def test_the_time_outs_of_the_role_do_not_end_a_build(engine: Engine) -> None:
    """Those of the service are far too short for it."""
    role = f"hasty_{next(numbers)}"
    run(
        engine,
        f"CREATE ROLE {role} LOGIN SUPERUSER",
        f"ALTER ROLE {role} SET statement_timeout = '300ms'",
        f"ALTER ROLE {role} SET lock_timeout = '300ms'",
        # Came with PostgreSQL 17.
        f"DO $$ BEGIN IF current_setting('transaction_timeout', true) IS NOT NULL THEN"
        f" ALTER ROLE {role} SET transaction_timeout = '300ms'; END IF; END $$",
    )
    hasty = create_engine(engine.url.set(username=role), poolclass=NullPool)
    outcomes: list[TableIndexes] = []
    with engine.connect() as writer:
        writer.exec_driver_sql("INSERT INTO department (name) VALUES ('Sales')")
        thread = threading.Thread(target=lambda: outcomes.append(converge(hasty)))
        thread.start()
        eventually(lambda: is_building(engine, for_longer_than="400 ms"))
        writer.commit()
        thread.join()
    assert outcomes[0].guard


def test_the_census_counts_groups_redundant_rows_and_unnormalised_keys(engine: Engine) -> None:
    """Of canonical rows; NULLs are equal, and a key is what it is when normalised."""
    run(
        engine,
        "ALTER TABLE employee ALTER name DROP NOT NULL, ALTER department_id DROP NOT NULL",
        "INSERT INTO department (name) VALUES ('Sales'), ('Ops')",
        "INSERT INTO employee (department_id, name) VALUES"
        " (1, 'Ann Lee'), (1, ' Ann  Lee '), (1, E'Ann\\u00a0\\tLee'), (2, 'Ann Lee'),"
        " (1, E'Zo\\u00eb'), (1, E'Zoe\\u0308'), (NULL, 'Bo'), (NULL, 'Bo'), (1, NULL), (1, NULL),"
        " (2, 'Cy')",
        "INSERT INTO employee (department_id, name, duplicate_of_id) VALUES (1, 'Ann Lee', 1)",
    )
    with engine.connect() as connection:
        assert census(connection, "employee", KEYS["employee"]) == Census(11, 4, 5, 3)
        assert census(connection, "employee", ("department_id",)) == Census(11, 3, 8, 0)


def test_the_census_is_taken_where_it_is_asked_for(engine: Engine) -> None:
    """A guarded table has no duplicates; who wants to see that pays for the scan."""
    run(engine, "INSERT INTO department (name) VALUES (' Sales')")
    converge(engine)
    assert converge(engine).census is None
    assert converge(engine, count=True).census == Census(1, 0, 0, 1)


def test_keys_that_only_normalising_makes_equal_keep_the_guard_away(engine: Engine) -> None:
    """The index would build, but the rows are duplicates all the same."""
    run(engine, "INSERT INTO department (name) VALUES ('Ann Lee'), ('Ann  Lee')")
    outcome = converge(engine)
    assert (outcome.guard, outcome.lookup, outcome.census) == (False, True, Census(2, 1, 1, 1))


def test_white_space_is_what_python_splits_on() -> None:
    """Every character of it, and no other."""
    every = map(chr, range(sys.maxunicode + 1))
    assert [character for character in every if not character.split()] == sorted(WHITE_SPACE)


@pytest.fixture(scope="module")
def normalise(server_url: str) -> Iterator[Callable[[str], str]]:
    """Normalise one text in SQL."""
    engine = create_engine(server_url)
    with engine.connect() as connection:
        value = sa.bindparam("value", type_=sa.Text)
        statement = sa.select(normalised(sa.cast(value, sa.Text), utf8=True))
        yield lambda given_text: str(connection.scalar(statement, {"value": given_text}))
    engine.dispose()


# PostgreSQL and Python may know different versions of Unicode: both know what is assigned here
# (Cn: not assigned), and neither takes NUL or a lone surrogate (Cs).
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cn"])


@settings(max_examples=100, deadline=None)
@example(WHITE_SPACE + "a" + WHITE_SPACE + "b" + WHITE_SPACE)
@example("e\u0301 \u2126 \ufb01 %s %% \\ ]^-")
@given(given_text=st.text(st.one_of(CHARACTERS, st.sampled_from(WHITE_SPACE + "ae\u0301\u0308"))))
def test_sql_normalises_as_python_does(normalise: Callable[[str], str], given_text: str) -> None:
    """The census and the service must agree on what is the same key."""
    assert normalise(given_text) == " ".join(unicodedata.normalize("NFC", given_text).split())


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_other_encodings_are_served_as_far_as_they_go(
    empty_database: str, administrator: Engine, encoding: str
) -> None:
    """ASCII white space is folded; nothing can be composed, and no character is missing."""
    with administrator.connect() as connection:
        connection.exec_driver_sql(
            f"CREATE DATABASE {sa.make_url(empty_database).database} ENCODING {encoding}"
            " LOCALE 'C' TEMPLATE template0"
        )
    assert ensure_database(empty_database) is False
    upgrade(empty_database)
    engine = create_engine(empty_database, poolclass=NullPool)
    run(engine, "INSERT INTO department (name) VALUES ('Ann Lee'), (E'Ann \\t Lee ')")
    outcome = converge(engine)
    assert (outcome.lookup, outcome.census) == (True, Census(2, 1, 1, 1))
