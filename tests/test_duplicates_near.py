"""Near duplicates are suggested with a score and the reasons, without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, create_engine, text

from app.duplicates import near
from app.duplicates.near import Best, Near, Suggestion, find_near, near_duplicates
from app.duplicates.spelling import differences, words
from app.duplicates.tables import Model, read_tables
from app.models import Department, Employee
from tests.conftest import empty
from tests.other_models import Stamp, Tag


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    empty(migrated_url)
    engine = create_engine(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """A transaction of which nothing stays, in which there are two departments."""
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "DROP INDEX IF EXISTS uq_department_natural_key, uq_employee_natural_key;"
            "INSERT INTO department (id, name) OVERRIDING SYSTEM VALUE"
            " VALUES (1, 'Sales'), (2, 'Operations')"
        )
        yield connection


def people(connection: Connection, *names: str, department: int = 1) -> None:
    """Insert employees, with ids that go on from those that are there."""
    rows = [{"name": name, "department": department} for name in names]
    connection.execute(
        text(
            "INSERT INTO employee (id, name, department_id) OVERRIDING SYSTEM VALUE"
            " SELECT 1 + count(*), :name, :department FROM employee"
        ),
        rows,
    )


def suggest(
    connection: Connection, model: Model = Employee, limit: int = 50, keep: str = "oldest"
) -> Near:
    tables = read_tables(connection, model)
    return find_near(connection, tables, tables.of(model), keep, limit=limit)


def only(connection: Connection) -> Suggestion:
    """Return the only suggestion."""
    (found,) = suggest(connection).suggestions
    return found


@pytest.mark.parametrize(
    ("one", "other", "score", "reasons"),
    [
        ("Ann Lee", "ann LEE", 99, ("case",)),
        ("José Ruiz", "Jose Ruiz", 99, ("accents",)),
        ("Søren Þór", "Soren Thor", 99, ("accents",)),
        ("Ann Lee", "\uff21nn Lee", 99, ("Unicode form",)),
        ("Ann Lee", "Ann\u200b Lee", 99, ("Unicode form",)),
        ("Ann Lee", "AnnLee", 99, ("white space",)),
        ("Ann Lee", "Lee, Ann", 99, ("word order",)),
        ("Ann Lee", "Lee Ann", 99, ("word order",)),
        ("Pat O'Brien", "Pat O\u2019Brien", 99, ("punctuation",)),
        ("Pat O'Brien", "Pat OBrien", 99, ("punctuation",)),
        ("Jo Smith-Jones", "Jo Smith Jones", 99, ("punctuation",)),
        ("Jo Smith-Jones", "Jo SmithJones", 98, ("punctuation", "white space")),
        ("José Ruiz", "RUIZ, JOSE", 97, ("case", "accents", "word order")),
        ("Georgi Facello", "Goergi Facello", 91, ("spelling",)),
        ("Georgi Facello", "Georgi Facelo", 91, ("spelling",)),
        ("Georgi Facello", "Zeorgi Facello", 91, ("spelling",)),
        ("Georgi Facello", "FACELO, Georgi", 89, ("case", "word order", "spelling")),
        ("Development", "Developmnet", 90, ("spelling",)),
        ("Sales", "Slaes", 79, ("spelling",)),
        ("किताब", "कताब", 79, ("spelling",)),  # a vowel sign is no accent
    ],
)
def test_a_pair_has_a_score_and_its_reasons(
    connection: Connection, one: str, other: str, score: int, reasons: tuple[str, ...]
) -> None:
    """The more is the same, the higher the score; each difference of form takes a point off."""
    people(connection, one, other)
    found = only(connection)
    assert (found.score, found.reasons, found.ids) == (score, reasons, (1, 2))
    assert [key["name"] for key in found.keys] == [one, other]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ann Lee", "Bob Ray"),
        ("Anna", "Anne"),  # too short: one letter of four
        ("Georgi Facello", "Georgi Simmel"),
        ("Room 101", "Room 102"),  # digits are no slips
        ("-", "..."),
    ],
)
def test_what_is_not_near_is_not_suggested(connection: Connection, one: str, other: str) -> None:
    """Though something may be the same."""
    people(connection, one, other)
    assert suggest(connection).suggestions == ()
    assert suggest(connection).compared == 2


def test_exact_duplicates_are_no_suggestion(connection: Connection) -> None:
    """Of each group one row is compared, of duplicates none, and each pair is said once."""
    people(connection, "Ann Mary Lee", "Ann  Mary Lee", "Ann Mary Leigh", "ann mary lee")
    connection.exec_driver_sql("UPDATE employee SET duplicate_of_id = 1 WHERE id = 3")
    assert only(connection).ids == (1, 4)
    assert suggest(connection).compared == 2


def test_only_rows_whose_other_columns_are_the_same_are_compared(connection: Connection) -> None:
    """Departments that are one are one here, too."""
    people(connection, "Ann Lee")
    people(connection, "ann lee", department=2)
    assert suggest(connection).suggestions == ()
    connection.exec_driver_sql("UPDATE department SET name = ' Sales' WHERE id = 2")
    found = only(connection)
    assert [key["department_id"] for key in found.keys] == [1, 2]


def test_departments_are_compared_by_their_names_alone(connection: Connection) -> None:
    """The table has nothing else in its key."""
    connection.exec_driver_sql(
        "INSERT INTO department (id, name)"
        " OVERRIDING SYSTEM VALUE VALUES (3, 'SALES'), (4, 'Opreations')"
    )
    scores = [one.score for one in suggest(connection, Department).suggestions]
    assert scores == [99, 89]


def test_the_best_are_suggested_first_and_no_more_than_wanted(connection: Connection) -> None:
    """The best of all, wherever they are found."""
    people(connection, "Maria Ruiz", "Maria Ruis", "Georgi Facello", "Georgi Facelo")
    people(connection, "georgi facello", department=2)
    people(connection, "Georgi Facello", department=2)
    scores = [one.score for one in suggest(connection).suggestions]
    assert scores == [99, 91, 88]
    assert suggest(connection, limit=2).suggestions == suggest(connection).suggestions[:2]
    (best,) = suggest(connection, limit=1).suggestions
    assert best.ids == (5, 6)
    assert suggest(connection, limit=0).suggestions == ()


def test_sets_that_are_too_large_are_cut_and_counted(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A department of too many, and a block in which each row meets some neighbours only."""
    people(connection, "Aaron Lee", "Anton Lee", "Bernd Lee", "Berndt Lee", "Xenia Lee", "Zoe Lee")
    assert suggest(connection).incomplete == 0
    monkeypatch.setattr(near, "MOST_ROWS", 3)
    found = suggest(connection)
    assert (found.compared, found.incomplete, found.suggestions) == (6, 1, ())
    monkeypatch.setattr(near, "MOST_ROWS", 100)
    monkeypatch.setattr(near, "NEIGHBOURS", 1)
    found = suggest(connection)
    assert found.incomplete == 1
    assert [one.ids for one in found.suggestions] == [(3, 4)]


def test_it_says_how_far_it_is(connection: Connection) -> None:
    """After each department."""
    people(connection, "Ann Lee", "Bob Ray")
    people(connection, "Cid Fox", department=2)
    tables, seen = read_tables(connection, Employee), list[int]()
    find_near(connection, tables, tables.of(Employee), seen=seen.append)
    assert seen == [2, 3]


def test_it_needs_an_engine_and_a_model_only(own: Engine) -> None:
    """NULLs and numbers in the key are compared as such; a key without text has no spelling."""
    with own.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO tag (scope_name, label, scalar, called, expression, numbered, color)"
            " SELECT s, l, 's', 0, now(), 0, n::text FROM (VALUES (1, 'Blue', 1), (2, 'BLUE', 1),"
            " (3, 'blue', 2), (4, NULL, 1), (5, '', 1)) AS v (n, s, l);"
            "INSERT INTO stamp (at, blob, notes) VALUES (NULL, '', '{}'), (now(), '', '[]')"
        )
    (found,) = near_duplicates(own, Tag).suggestions
    assert found.ids == (1, 2)
    assert near_duplicates(own, Stamp) == Near(0, 0, ())


def test_words_are_the_same_by_either_way() -> None:
    """ASCII has a short cut."""
    assert words("O'Brien-Lee, ANN_B") == ["obrien", "lee", "ann", "b"]
    assert words("Ö'Brien-Lee, ANN_B") == ["obrien", "lee", "ann", "b"]


NAMES = st.lists(st.text("abcdefgh", min_size=2, max_size=8), min_size=1, max_size=3).filter(
    lambda parts: len("".join(parts)) >= 5
)


@st.composite
def slips(draw: st.DrawFn) -> tuple[str, str]:
    """Return a name, and the same with one slip of the keyboard within a word."""
    parts = draw(NAMES)
    place = draw(st.integers(0, len(parts) - 1))
    word = parts[place]
    at, letter = draw(st.integers(0, len(word) - 1)), draw(st.sampled_from("abcdefgh"))
    slipped = draw(
        st.sampled_from(
            [
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            ]
        )
    )
    return " ".join(parts), " ".join([*parts[:place], slipped, *parts[place + 1 :]])


@settings(max_examples=150)
@given(pair=slips())
def test_every_slip_is_found(pair: tuple[str, str]) -> None:
    """Wherever it is in a name of five letters or more."""
    best = Best(10)
    near._compare(["one", "other"], pair, best)
    ((similarity, *ids),) = best.pairs
    assert similarity >= 0.8
    assert ids == ["one", "other"]


@given(one=st.text(max_size=12), other=st.text(max_size=12))
def test_what_differs_has_a_reason(one: str, other: str) -> None:
    """Either a form, or the spelling; a text does not differ from itself."""
    assert differences(one, one) == ()
    if words(one) != words(other):
        assert differences(one, other)
