"""Laws of guard, merge and undo, on schemas and rows of all kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.duplicates.guard import guard, unguard
from app.duplicates.merge import Left
from app.duplicates.merging import Outcome, Rules
from app.get_or_create import GetOrCreateMixin
from tests.duplicated import Site

ACCEPT = Rules(accept_homonyms=True)


class Generated(DeclarativeBase):
    """The models of an application that is generated."""


class Team(GetOrCreateMixin, Generated):
    """A key that may be NULL."""

    __tablename__ = "team"
    __natural_key__ = ("name", "town")

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    town: Mapped[str | None]
    duplicate_of_id: Mapped[int | None] = mapped_column(ForeignKey("team.id"))


class Person(GetOrCreateMixin, Generated):
    """A key that refers to a team, or to none, and a person above."""

    __tablename__ = "person"
    __natural_key__ = ("team_id", "name")

    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[int | None] = mapped_column(ForeignKey("team.id"))
    name: Mapped[str]
    title: Mapped[str | None]
    boss_id: Mapped[int | None] = mapped_column(ForeignKey("person.id"))
    duplicate_of_id: Mapped[int | None] = mapped_column(ForeignKey("person.id"))


MODELS = (Team, Person)
NAMES = st.sampled_from(["Ann", " Ann", "Ann ", "Zo\u00e9", "Zoe\u0301", "A  B", "A\u00a0B", "A B"])
TOWNS = st.sampled_from([None, "Ulm", "Ulm "])
ACTIONS = st.sampled_from(["CASCADE", "SET NULL", "RESTRICT", "NO ACTION"])

# The columns that a referring table may have, by how it refers.
KINDS = {
    "plain": "id serial PRIMARY KEY, ref int REFERENCES {table} ON DELETE {action}, words text",
    "keyless": "ref int REFERENCES {table} ON DELETE {action}, words text",
    "composite": (
        "id serial PRIMARY KEY, half int, ref int, words text,"
        " FOREIGN KEY (half, ref) REFERENCES {table} (half, id) ON DELETE {action}"
    ),
    "in key": (
        "ref int REFERENCES {table} ON DELETE CASCADE, words text, number serial,"
        " PRIMARY KEY (ref, number)"
    ),
    "unique": (
        "id serial PRIMARY KEY, ref int UNIQUE REFERENCES {table} ON DELETE {action}, words text"
    ),
    "pair": (
        "id serial PRIMARY KEY, ref int REFERENCES {table} ON DELETE {action},"
        " other int REFERENCES {table}, words text"
    ),
}


@dataclass(frozen=True)
class Referring:
    """A table that refers to one of the models'."""

    kind: str
    target: str
    action: str
    rows: Sequence[tuple[int, int, str | None]]  # which rows it refers to, and something else


@dataclass(frozen=True)
class World:
    """A schema and its rows."""

    teams: Sequence[tuple[str | None, str | None]]
    people: Sequence[tuple[int, str, str | None, int]]  # team, name, title, boss; 0: none
    tables: Sequence[Referring]

    def build(self, site: Site) -> None:
        """Make it, in an empty database."""
        for table in ("team", "person"):
            site.run(
                f"ALTER TABLE {table} ADD half int NOT NULL GENERATED ALWAYS AS (1) STORED,"
                " ADD UNIQUE (half, id)"
            )
        with site.engine.begin() as connection:
            for name, town in self.teams:
                connection.exec_driver_sql(
                    "INSERT INTO team (name, town) VALUES (%(name)s, %(town)s)",
                    {"name": name, "town": town},
                )
            for team, name, title, _ in self.people:
                connection.exec_driver_sql(
                    "INSERT INTO person (team_id, name, title) VALUES (nullif(%(team)s, 0),"
                    " %(name)s, %(title)s)",
                    {"team": within(team, self.teams), "name": name, "title": title},
                )
            for number, (_, _, _, boss) in enumerate(self.people, 1):
                boss_id = within(boss, self.people)
                if boss_id != number:
                    connection.exec_driver_sql(
                        "UPDATE person SET boss_id = nullif(%(boss)s, 0) WHERE id = %(id)s",
                        {"boss": boss_id, "id": number},
                    )
        for number, table in enumerate(self.tables):
            self._refer(site, f"r{number}", table)

    def _refer(self, site: Site, name: str, table: Referring) -> None:
        columns = KINDS[table.kind].format(table=table.target, action=table.action)
        site.run(f"CREATE TABLE {name} ({columns})")
        targets: Sequence[Any] = self.teams if table.target == "team" else self.people
        extra = {"composite": "half", "pair": "other"}.get(table.kind)
        names = ", ".join(["ref", "words", *([extra] if extra else [])])
        values = "nullif(%(ref)s, 0), %(words)s"
        values += {"composite": ", 1", "pair": ", nullif(%(other)s, 0)"}.get(table.kind, "")
        with site.engine.begin() as connection:
            for ref, other, words in table.rows:
                connection.exec_driver_sql(
                    f"INSERT INTO {name} ({names}) SELECT {values}"
                    f" WHERE %(kind)s <> 'in key' OR %(ref)s > 0 ON CONFLICT DO NOTHING",
                    {
                        "ref": within(ref, targets),
                        "other": within(other, targets),
                        "words": words,
                        "kind": table.kind,
                    },
                )


def within(number: int, rows: Sequence[Any]) -> int:
    """Return a row's number, or 0 for none."""
    return number % (len(rows) + 1)


NUMBER = st.integers(0, 11)
WORDS = st.sampled_from([None, "", "50% {of} \u00e9"])
REFERRING = st.builds(
    Referring,
    st.sampled_from(list(KINDS)),
    st.sampled_from(["team", "person"]),
    ACTIONS,
    st.lists(st.tuples(NUMBER, NUMBER, WORDS), max_size=6),
)
WORLDS = st.builds(
    World,
    st.lists(st.tuples(st.none() | NAMES, TOWNS), min_size=1, max_size=5),
    st.lists(
        st.tuples(NUMBER, NAMES, st.sampled_from([None, " ", "Boss", "Clerk"]), NUMBER),
        min_size=2,
        max_size=10,
    ),
    st.lists(REFERRING, max_size=4),
)


@pytest.fixture
def generated(shared_site: Engine) -> Site:
    """A database that each example empties for itself."""
    return Site(shared_site, Person)


def laws(examples: int) -> Any:
    """Return the settings of a property: examples cost a schema each."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def begin(site: Site, world: World) -> dict[str, list[Any]]:
    """Make the world anew; return all its rows."""
    site.engine.dispose()
    site.run("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    Generated.metadata.create_all(site.engine)
    world.build(site)
    return site.image()


def merge_both(site: Site) -> list[Outcome | Left]:
    return [*site.merge_all(Team, ACCEPT), *site.merge_all(Person, ACCEPT)]


def without_references(image: dict[str, list[Any]]) -> dict[str, Counter[str]]:
    """Return what no merge may change: in the tables that refer, all but the reference."""
    return {
        table: Counter(str(sorted({**row, "ref": 0, "other": 0}.items())) for row in rows)
        for table, rows in image.items()
        if table.startswith("public.r")
    }


def filled(image: dict[str, list[Any]]) -> dict[str, int]:
    """Return how many references are not NULL, by table."""
    return {
        table: sum(row.get(name) is not None for row in rows for name in ("ref", "other"))
        for table, rows in image.items()
    }


@laws(7)
@given(world=WORLDS)
def test_every_duplicate_is_planned_once(generated: Site, world: World) -> None:
    """With the row of its key that is kept, and no other row."""
    begin(generated, world)
    for model in MODELS:
        groups = generated.look(model)
        ids = [id for group in groups for id in (group.kept, *group.duplicates)]
        assert len(ids) == len(set(ids))
        assert all(group.duplicates for group in groups)
    teams = {
        id: group.kept for group in generated.look(Team) for id in (group.kept, *group.duplicates)
    }
    keys = Counter(
        (teams.get(team, team), " ".join(name.replace("e\u0301", "\u00e9").split()))
        for team, name in generated.rows("SELECT team_id, name FROM person")
    )
    planned = sum(len(group.duplicates) for group in generated.look(Person))
    assert planned == sum(count - 1 for count in keys.values())


@laws(12)
@given(world=WORLDS)
def test_merging_loses_nothing_and_undo_gives_the_exact_rows_back(
    generated: Site, world: World
) -> None:
    """Merging the merged changes nothing; merged, undone and merged again is merged."""
    before = begin(generated, world)
    merge_both(generated)
    merged = generated.image()
    assert without_references(merged) == without_references(before)
    assert filled(merged) == filled(before)
    assert {table: len(rows) for table, rows in merged.items()} == {
        table: len(rows) for table, rows in before.items()
    }
    assert [one for one in merge_both(generated) if isinstance(one, Outcome)] == []
    assert generated.image() == merged
    generated.undo_all()
    assert generated.image() == before
    merge_both(generated)
    assert generated.image() == merged


@laws(4)
@given(world=WORLDS)
def test_a_guard_taken_off_gives_the_exact_rows_back(generated: Site, world: World) -> None:
    """While it stands no key has two canonical rows; merges on top of it can be undone."""
    before = begin(generated, world)
    guard(generated.engine, Person, rules=ACCEPT)
    guarded = generated.image()
    assert without_references(guarded) == without_references(before)
    assert not [group for model in MODELS for group in generated.look(model, which="unmarked")]
    merge_both(generated)
    for entry in generated.entries("action = 'merge' AND undone_at IS NULL"):
        generated.undo(entry.id)
    assert generated.image() == guarded
    for model in reversed(MODELS):
        unguard(generated.engine, model, unmark=True)
    assert generated.image() == before


@laws(4)
@given(world=WORLDS)
def test_a_purge_deletes_duplicates_and_nothing_else(generated: Site, world: World) -> None:
    """What refers to something still does, and to a row that is kept."""
    begin(generated, world)
    merge_both(generated)
    merged = generated.image()
    purged = [*generated.purge(Person, ACCEPT), *generated.purge(Team, ACCEPT)]
    after = generated.image()
    models = ("public.team", "public.person")
    deleted = sum(len(merged[table]) - len(after[table]) for table in models)
    assert deleted == sum(one.deleted for one in purged)
    references = [table for table in merged if table.startswith("public.r")]
    assert [after[table] for table in references] == [merged[table] for table in references]
    assert without_references(after) == without_references(merged)
