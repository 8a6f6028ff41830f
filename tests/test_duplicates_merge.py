"""Merging rows, taking it back, and purging: nothing is lost, and nothing is half done."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from app.duplicates import journal
from app.duplicates.guard import guard
from app.duplicates.merging import Outcome, Rules
from app.duplicates.plan import PlannedGroup
from app.duplicates.purge import purge_merge
from app.duplicates.tables import SoftReference
from app.duplicates.undo import undo
from app.errors import (
    CannotUndo,
    GroupChanged,
    HomonymsFound,
    RowsCollide,
    UnknownMerge,
    UnusablePlan,
)
from app.models import Department, Employee
from app.transactions import RetryPolicy
from tests.conftest import waits
from tests.duplicated import Site, escaped
from tests.other_models import Badge, Legacy
from tests.proxy import lossy_proxy
from tests.races import eventually, started


@pytest.fixture
def anns(site: Site) -> Site:
    """Ann three times in one department, and Bob."""
    site.add_department("Sales")
    site.add_employee("Ann", "Ann", " Ann ", "Bob")
    return site


def test_a_merge_marks_the_duplicates_and_deletes_nothing(anns: Site) -> None:
    """The rows are there, and point at the one that is kept."""
    outcome = anns.merge(1, 2, 3)
    assert (outcome.table, outcome.kept, outcome.duplicates) == ("employee", 1, (2, 3))
    assert anns.rows("SELECT id, duplicate_of_id FROM employee ORDER BY id") == [
        (1, None),
        (2, 1),
        (3, 1),
        (4, None),
    ]


def test_blank_fields_are_filled_from_the_first_row_that_has_them(anns: Site) -> None:
    """White space is blank as NULL is; what is filled stays."""
    anns.run(
        "UPDATE employee SET title = ' ', email = 'a@b' WHERE id = 1",
        "UPDATE employee SET title = 'Clerk', email = NULL WHERE id = 2",
        "UPDATE employee SET title = 'Clerk', hired_on = '2020-01-02' WHERE id = 3",
    )
    outcome = anns.merge(1, 2, 3)
    assert outcome.filled == {"title": 2, "hired_on": 3}
    (row,) = anns.rows("SELECT title, email, hired_on::text FROM employee WHERE id = 1")
    assert row == ("Clerk", "a@b", "2020-01-02")


def test_a_plan_says_what_is_filled_from_where(anns: Site) -> None:
    """Only that is."""
    anns.run(
        "UPDATE employee SET title = 'Clerk', email = 'a@b' WHERE id = 2",
        "UPDATE employee SET title = 'Clerk' WHERE id = 3",
    )
    anns.merge(1, 2, 3, fill={"title": 3})
    assert anns.rows("SELECT title, email FROM employee WHERE id = 1") == [("Clerk", None)]


@pytest.mark.parametrize("fill", [{"name": 2}, {"title": 4}, {"email": 2}, {"wage": 2}])
def test_a_plan_cannot_fill_what_is_no_blank_detail_of_the_group(
    anns: Site, fill: dict[str, int]
) -> None:
    """A key, another's row, a filled field, no field."""
    anns.run("UPDATE employee SET email = 'a@b' WHERE id = 1")
    with anns.unchanged(), pytest.raises(UnusablePlan, match="cannot be filled"):
        anns.merge(1, 2, fill=fill)


def test_groups_that_have_duplicates_already_are_merged(anns: Site) -> None:
    """All of them point at the row that is kept then, and what refers to them as well."""
    anns.add_employee("Ann")
    anns.run(
        "UPDATE employee SET duplicate_of_id = 1 WHERE id = 2",
        "UPDATE employee SET duplicate_of_id = 3 WHERE id = 5",
        "UPDATE employee SET manager_id = 5 WHERE id = 4",
    )
    before = anns.image()
    (outcome,) = anns.merge_all()
    assert (outcome.kept, sorted(outcome.duplicates)) == (1, [2, 3, 5])
    assert anns.rows("SELECT id FROM employee WHERE duplicate_of_id = 1 ORDER BY id") == [2, 3, 5]
    assert anns.rows("SELECT manager_id FROM employee WHERE id = 4") == [1]
    anns.undo(outcome.id)
    assert anns.image() == before


def test_chains_are_flattened(anns: Site) -> None:
    """What pointed at a row that becomes a duplicate points at the row that is kept."""
    anns.merge(2, 3)
    anns.merge(1, 2)
    assert anns.rows("SELECT duplicate_of_id FROM employee WHERE id IN (2, 3)") == [1, 1]


@pytest.mark.parametrize("ids", [(1, 4), (1, 99), (99, 1), (2, 1), (3, 2)])
def test_rows_that_are_no_group_are_not_merged(anns: Site, ids: tuple[int, int]) -> None:
    """Another's row, none at all, one to keep that is a duplicate, one that is another's."""
    anns.run("UPDATE employee SET duplicate_of_id = 1 WHERE id = 2")
    with anns.unchanged(), pytest.raises(GroupChanged):
        anns.merge(*ids)


def test_homonyms_are_merged_only_when_somebody_says_so(anns: Site) -> None:
    """What they differ in stands in the error."""
    anns.run("UPDATE employee SET title = 'Clerk' WHERE id = 1")
    anns.run("UPDATE employee SET title = 'Smith' WHERE id = 2")
    with anns.unchanged(), pytest.raises(HomonymsFound) as caught:
        anns.merge(1, 2)
    assert caught.value.groups[0].homonyms == ("title",)
    assert anns.merge(1, 2, rules=Rules(accept_homonyms=True)).filled == {}


def test_a_row_that_would_be_its_own_manager_is_a_collision(anns: Site) -> None:
    """By being repointed."""
    anns.run("UPDATE employee SET manager_id = 2 WHERE id = 1")
    with anns.unchanged(), pytest.raises(RowsCollide, match="refer to the row itself") as caught:
        anns.merge(1, 2)
    assert caught.value.collisions[0].others == [{"id": 1}]


@pytest.mark.parametrize("manager", [1, 2, 3])
def test_a_row_is_not_filled_with_a_reference_to_itself(anns: Site, manager: int) -> None:
    """Nor to another row of its group."""
    anns.run(f"UPDATE employee SET manager_id = {manager} WHERE id = 2")
    with anns.unchanged(), pytest.raises(RowsCollide, match="refer to the row itself"):
        anns.merge(1, 2, 3)


def test_references_between_rows_of_other_groups_are_repointed(anns: Site) -> None:
    """A self reference is one like another; a duplicate's own moves too."""
    anns.run(
        "UPDATE employee SET manager_id = 3 WHERE id = 4",
        "UPDATE employee SET manager_id = 4 WHERE id = 1",
        "UPDATE employee SET manager_id = 4 WHERE id = 2",
    )
    assert anns.merge(1, 2, 3).repointed == {"employee.manager_id": 1}
    assert anns.rows("SELECT manager_id FROM employee ORDER BY id") == [4, 4, None, 1]


REFERENCES = {
    "another schema": (
        "CREATE SCHEMA hr; CREATE TABLE hr.note (id serial PRIMARY KEY, who int REFERENCES"
        " employee, words text); INSERT INTO hr.note (who, words) VALUES (2, 'a'), (4, 'b')",
        "SELECT who FROM hr.note ORDER BY id",
        [1, 4],
    ),
    "no primary key": (
        "CREATE TABLE note (who int REFERENCES employee, words jsonb); INSERT INTO note VALUES"
        """ (2, '{"a": [1, 1.50]}'), (2, '{"a": [1, 1.50]}'), (3, NULL), (1, NULL), (4, NULL)""",
        "SELECT who FROM note ORDER BY 1",
        [1, 1, 1, 1, 4],
    ),
    "partitioned": (
        "CREATE TABLE note (day date, who int REFERENCES employee ON DELETE CASCADE,"
        " PRIMARY KEY (day, who)) PARTITION BY RANGE (day);"
        "CREATE TABLE note_1 PARTITION OF note FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');"
        "CREATE TABLE note_2 PARTITION OF note DEFAULT;"
        "INSERT INTO note VALUES ('2020-05-05', 2), ('2022-05-05', 3)",
        "SELECT who FROM note",
        [1, 1],
    ),
    "partitioned by the reference": (
        "CREATE TABLE note (who int REFERENCES employee, words text) PARTITION BY LIST (who);"
        "CREATE TABLE note_1 PARTITION OF note FOR VALUES IN (1);"
        "CREATE TABLE note_2 PARTITION OF note DEFAULT;"
        "INSERT INTO note VALUES (2, 'a'), (3, 'b')",
        "SELECT who FROM note_1",
        [1, 1],
    ),
    "one partition": (
        "CREATE TABLE note (id int, who int) PARTITION BY LIST (id);"
        "CREATE TABLE note_1 PARTITION OF note FOR VALUES IN (1);"
        "ALTER TABLE note_1 ADD FOREIGN KEY (who) REFERENCES employee;"
        "INSERT INTO note VALUES (1, 2)",
        "SELECT who FROM note",
        [1],
    ),
    "in the primary key": (
        "CREATE TABLE note (who int REFERENCES employee ON DELETE CASCADE, number int,"
        " PRIMARY KEY (who, number)); INSERT INTO note VALUES (2, 1), (3, 2), (1, 3)",
        "SELECT number FROM note WHERE who = 1 ORDER BY 1",
        [1, 2, 3],
    ),
    "a pair": (
        "CREATE TABLE pair (a int REFERENCES employee, b int REFERENCES employee,"
        " PRIMARY KEY (a, b)); INSERT INTO pair VALUES (2, 4), (4, 3), (2, 3), (4, 4)",
        "SELECT a, b FROM pair ORDER BY a, b",
        [(1, 1), (1, 4), (4, 1), (4, 4)],
    ),
    "composite": (
        "ALTER TABLE employee ADD UNIQUE (department_id, id);"
        "CREATE TABLE note (number serial PRIMARY KEY, d int, e int,"
        " FOREIGN KEY (d, e) REFERENCES employee (department_id, id));"
        "INSERT INTO note (d, e) VALUES (1, 2), (1, 3), (1, NULL), (NULL, 2), (1, 4)",
        "SELECT d, e FROM note ORDER BY number",
        [(1, 1), (1, 1), (1, None), (None, 2), (1, 4)],
    ),
    "a unique column": (
        "ALTER TABLE employee ADD code text UNIQUE; UPDATE employee SET code = 'E' || id;"
        "CREATE TABLE note (number serial PRIMARY KEY, who text REFERENCES employee (code));"
        "INSERT INTO note (who) VALUES ('E1'), ('E2'), ('E3'), ('E4')",
        "SELECT who FROM note ORDER BY number",
        ["E1", "E1", "E1", "E4"],
    ),
    "set null": (
        "CREATE TABLE note (id serial PRIMARY KEY, who int REFERENCES employee ON DELETE SET NULL,"
        " made_at timestamptz DEFAULT now(), twice int GENERATED ALWAYS AS (who * 2) STORED);"
        "INSERT INTO note (who) VALUES (2), (3), (NULL)",
        "SELECT who, twice FROM note ORDER BY id",
        [(1, 2), (1, 2), (None, None)],
    ),
    "strange names": (
        'CREATE SCHEMA "50% \'off\'"; CREATE TABLE "50% \'off\'"."No""body {1}" ("I %s" serial'
        ' PRIMARY KEY, "Who:is %(x)s" int REFERENCES employee);'
        'INSERT INTO "50% \'off\'"."No""body {1}" ("Who:is %(x)s") VALUES (2), (4)',
        'SELECT "Who:is %(x)s" FROM "50% \'off\'"."No""body {1}" ORDER BY "I %s"',
        [1, 4],
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_kind_of_reference_is_repointed_and_taken_back(anns: Site, kind: str) -> None:
    """And after a purge nothing of it is gone; undo gives the exact rows back."""
    ddl, query, expected = REFERENCES[kind]
    accept = Rules(accept_homonyms=True)
    anns.run(escaped(ddl))
    before = anns.image()
    merge = anns.merge(1, 2, 3, rules=accept)
    assert anns.rows(escaped(query)) == expected
    anns.undo(merge.id)
    assert anns.image() == before
    anns.merge(1, 2, 3, rules=accept)
    assert [one.deleted for one in anns.purge()] == [2]
    assert anns.rows(escaped(query)) == expected


COLLISIONS = {
    "unique": "UNIQUE (who, day)",
    "nulls not distinct": "UNIQUE NULLS NOT DISTINCT (who, day)",
    "deferred": "UNIQUE (who, day) DEFERRABLE INITIALLY DEFERRED",
    "primary key": "PRIMARY KEY (who, id)",
    "exclusion": "EXCLUDE (who WITH =)",
    "check": "CHECK (who <> 1)",
}


@pytest.mark.parametrize("kind", COLLISIONS)
def test_a_group_whose_references_would_collide_is_left_as_it_was(anns: Site, kind: str) -> None:
    """The rows that collide are reported, or what the database says of them."""
    anns.run(
        f"CREATE TABLE badge (id int, who int REFERENCES employee, day date, {COLLISIONS[kind]})",
        "INSERT INTO badge VALUES (1, 2, NULL), (1, 3, NULL)",
    )
    if kind not in ("exclusion", "check", "primary key", "nulls not distinct"):
        anns.run("UPDATE badge SET day = '2020-01-01'")
    with anns.unchanged(), pytest.raises(RowsCollide) as caught:
        anns.merge(1, 2, 3)
    (collision,) = caught.value.collisions
    assert collision.table == "badge"
    if kind == "primary key":
        assert (collision.first, collision.others) == ({"who": 2, "id": 1}, [{"who": 3, "id": 1}])
    elif collision.first:
        assert [collision.first["who"], collision.others[0]["who"]] == [2, 3]


@pytest.mark.parametrize("index", ["(who) WHERE open", "(who, lower(word))", "(who, word)"])
def test_what_a_unique_index_allows_is_repointed(anns: Site, index: str) -> None:
    """Rows outside a predicate, or that differ in what is unique, or have a NULL there."""
    anns.run(
        "CREATE TABLE badge (id serial PRIMARY KEY, who int REFERENCES employee, word text,"
        " open bool)",
        f"CREATE UNIQUE INDEX ON badge {index}",
        "INSERT INTO badge (who, word, open) VALUES (1, 'a', true), (2, 'b', false)",
        "INSERT INTO badge (who, word, open) VALUES (2, NULL, NULL), (3, NULL, false)",
    )
    assert anns.merge(1, 2, 3).repointed == {"badge.who": 3}


@pytest.mark.parametrize("index", ["(who) WHERE open", "(who, lower(word))"])
def test_what_a_unique_index_forbids_leaves_the_group_as_it_was(anns: Site, index: str) -> None:
    """Also where only the database can tell."""
    anns.run(
        "CREATE TABLE badge (id serial PRIMARY KEY, who int REFERENCES employee, word text,"
        " open bool)",
        f"CREATE UNIQUE INDEX ON badge {index}",
        "INSERT INTO badge (who, word, open) VALUES (1, 'a', true), (2, 'A', true)",
    )
    with anns.unchanged(), pytest.raises(RowsCollide):
        anns.merge(1, 2)


@pytest.fixture
def badges(anns: Site) -> Site:
    """Ann's badges, of which two are of one day; and their stamps."""
    anns.run(
        "CREATE TABLE badge (id serial PRIMARY KEY, who int REFERENCES employee, day int,"
        " color text, UNIQUE (who, day))",
        "CREATE TABLE stamp (id serial PRIMARY KEY, badge_id int REFERENCES badge)",
        "INSERT INTO badge (who, day, color) VALUES (1, 1, NULL), (2, 1, 'red'), (2, 2, 'blue')",
        "INSERT INTO stamp (badge_id) VALUES (1), (2), (3)",
    )
    return anns


def test_rows_that_collide_may_be_skipped(badges: Site) -> None:
    """They stay where they are, and are told; nothing of them is purged."""
    outcome = badges.merge(1, 2, rules=Rules(on_collision={"badge": "skip"}))
    assert [one.others for one in outcome.left] == [[{"id": 2}]]
    assert badges.rows("SELECT who FROM badge ORDER BY id") == [1, 2, 1]
    (purged,) = badges.purge(rules=Rules(on_collision={"badge": "skip"}))
    assert purged.deleted == 0
    assert "badge.who" in purged.kept_back[0]


def test_rows_that_collide_may_be_merged(badges: Site) -> None:
    """What refers to them moves, blanks are filled, and they stay where they are."""
    before = badges.image()
    rules = Rules(on_collision={"badge": "merge"})
    outcome = badges.merge(1, 2, rules=rules)
    assert badges.rows("SELECT badge_id FROM stamp ORDER BY id") == [1, 1, 3]
    assert badges.rows("SELECT who, color FROM badge ORDER BY id") == [
        (1, "red"),
        (2, "red"),
        (1, "blue"),
    ]
    badges.undo(outcome.id)
    assert badges.image() == before


def test_rows_that_nothing_tells_apart_cannot_be_merged(badges: Site) -> None:
    """A primary key of two columns is none that something can be repointed to."""
    badges.run("ALTER TABLE stamp DROP COLUMN badge_id; ALTER TABLE badge DROP COLUMN id")
    with badges.unchanged(), pytest.raises(RowsCollide):
        badges.merge(1, 2, rules=Rules(on_collision={"badge": "merge"}))


def test_rows_that_nothing_tells_apart_can_be_skipped(badges: Site) -> None:
    """They are told by all that they hold."""
    badges.run("ALTER TABLE stamp DROP COLUMN badge_id; ALTER TABLE badge DROP COLUMN id")
    outcome = badges.merge(1, 2, rules=Rules(on_collision={"badge": "skip"}))
    assert outcome.left[0].others == [{"who": 2, "day": 1, "color": "red"}]
    assert badges.rows("SELECT who FROM badge ORDER BY color") == [1, 2, 1]


@pytest.fixture
def departments(site: Site) -> Site:
    """Sales twice, with Ann in both, and notes on the Anns."""
    site.add_department("Sales", " Sales")
    site.add_employee("Ann", "Bob")
    site.add_employee("Ann ", "Cid", department=2, title="Clerk")
    site.run(
        "CREATE TABLE note (id serial PRIMARY KEY, who int REFERENCES employee ON DELETE CASCADE)",
        "INSERT INTO note (who) VALUES (1), (3), (4)",
    )
    site.model = Department
    return site


def test_merging_departments_collapses_their_employees(departments: Site) -> None:
    """Those of one name are merged as well; undo takes all of it back."""
    before = departments.image()
    outcome = departments.merge(1, 2)
    assert outcome.collapsed == {"employee": 1}
    assert outcome.repointed == {"employee.department_id": 1, "note.who": 1}
    assert departments.rows("SELECT department_id, duplicate_of_id FROM employee ORDER BY id") == [
        (1, None),
        (1, None),
        (1, 1),
        (1, None),
    ]
    assert departments.rows("SELECT who FROM note ORDER BY id") == [1, 1, 4]
    assert departments.rows("SELECT title FROM employee WHERE id = 1") == ["Clerk"]
    departments.undo(outcome.id)
    assert departments.image() == before


def test_homonymous_employees_stop_the_merge_of_their_departments(departments: Site) -> None:
    """Nothing is merged then, until somebody accepts them."""
    departments.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    with departments.unchanged(), pytest.raises(HomonymsFound) as caught:
        departments.merge(1, 2)
    assert (caught.value.groups[0].table, caught.value.groups[0].kept) == ("employee", 1)
    departments.merge(1, 2, rules=Rules(accept_homonyms=True))


def test_that_departments_are_the_same_says_nothing_of_their_employees(departments: Site) -> None:
    """Each group of homonyms is decided on its own."""
    departments.run("UPDATE employee SET title = 'Boss' WHERE id = 1")
    same = PlannedGroup("department", 1, (2,), "same")
    with departments.unchanged():
        (left,) = departments.merge_planned(same)
    assert isinstance(left.error, HomonymsFound)
    anns = PlannedGroup("employee", 3, (1,), "same")
    (outcome,) = departments.merge_planned(same, anns)
    assert outcome.collapsed == {"employee": 1}
    marks = departments.rows("SELECT duplicate_of_id FROM employee ORDER BY id")
    assert marks == [3, None, None, None]


def test_a_plan_is_followed_group_by_group(anns: Site) -> None:
    """What it leaves is left; what cannot be merged is left too, and the reason told."""
    anns.add_employee("Cid", "Cid", title="Clerk")
    anns.run("UPDATE employee SET title = 'Boss' WHERE id = 5")
    gone = PlannedGroup("employee", 1, (9,))
    (left,) = anns.merge_planned(
        PlannedGroup("employee", 1, (2,), "leave"), PlannedGroup("department", 1, (2,)), gone
    )
    assert (left.group, type(left.error)) == (gone, GroupChanged)
    (left,) = anns.merge_planned(PlannedGroup("employee", 5, (6,)))
    assert isinstance(left.error, HomonymsFound)
    (outcome,) = anns.merge_planned(PlannedGroup("employee", 5, (6,), "same"))
    assert outcome.kept == 5


def test_rows_that_a_plan_gives_another_key_are_left_out_of_its_merges(anns: Site) -> None:
    """What the plan says of the others holds; of two rows there is no group left."""
    anns.add_employee("Ann")
    (third,) = anns.rows("SELECT max(id) FROM employee")
    rename = {"1": {"name": "Ann junior"}}
    assert anns.merge_planned(PlannedGroup("employee", 1, (2,), rename=rename)) == []
    (outcome,) = anns.merge_planned(
        PlannedGroup("employee", 1, (2, third), rename=rename, fill={"title": 2})
    )
    assert (outcome.kept, outcome.duplicates) == (2, (third,))


def test_a_mark_of_the_guard_is_no_merge_to_undo(anns: Site) -> None:
    """It is for unguard to take off."""
    guard(anns.engine, Employee, rules=Rules(accept_homonyms=True))
    (entry,) = (one.id for one in anns.entries())
    with anns.unchanged(), pytest.raises(UnknownMerge):
        anns.undo(entry)


def test_all_groups_are_merged_and_a_second_time_there_is_nothing_to_do(anns: Site) -> None:
    """One that is left does not stop the others, and is told once."""
    anns.add_employee("Cid", "Cid", "Dan", "Dan")
    anns.run("UPDATE employee SET manager_id = 6 WHERE id = 5")
    outcomes = anns.merge_all()
    assert [one.kept for one in outcomes if isinstance(one, Outcome)] == [1, 7]
    (left,) = (one for one in outcomes if not isinstance(one, Outcome))
    assert isinstance(left.error, RowsCollide)
    assert [one for one in anns.merge_all() if isinstance(one, Outcome)] == []


def test_what_came_to_refer_to_merged_rows_is_merged_by_the_next_round(anns: Site) -> None:
    """A field that was blanked since is not filled again."""
    anns.run("UPDATE employee SET title = 'Clerk' WHERE id = 2")
    anns.merge_all()
    anns.run("UPDATE employee SET title = NULL WHERE id = 1")
    anns.run("UPDATE employee SET manager_id = 2 WHERE id = 4")
    (outcome,) = anns.merge_all()
    assert outcome.repointed == {"employee.manager_id": 1}
    assert anns.rows("SELECT title, manager_id FROM employee WHERE id IN (1, 4) ORDER BY id") == [
        (None, None),
        (None, 1),
    ]


def test_a_reference_that_nobody_declared_is_not_known(anns: Site) -> None:
    """A soft reference is repointed when it is declared."""
    anns.run("CREATE TABLE log (id serial PRIMARY KEY, who bigint)")
    anns.run("INSERT INTO log (who) VALUES (2)")
    entry = anns.merge(1, 2)
    assert anns.rows("SELECT who FROM log") == [2]
    anns.undo(entry.id)
    anns.soft = [SoftReference("log", "who", "employee")]
    assert anns.merge(1, 2).repointed == {"log.who": 1}
    assert anns.rows("SELECT who FROM log") == [1]


def test_a_merge_is_undone_once(anns: Site) -> None:
    """A second time there is nothing to take back."""
    entry = anns.merge(1, 2).id
    anns.undo(entry)
    with pytest.raises(CannotUndo, match="undone already"):
        anns.undo(entry)
    with pytest.raises(UnknownMerge):
        anns.undo(99)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE employee SET title = 'Boss' WHERE id = 1",
        "UPDATE employee SET manager_id = 3 WHERE id = 4",
        "UPDATE employee SET duplicate_of_id = NULL WHERE id = 2",
        "UPDATE note SET words = 'new'",
        "DELETE FROM note",
        "DELETE FROM employee WHERE id = 4",
        "DROP TABLE note",
        "ALTER TABLE employee DROP COLUMN manager_id",
    ],
)
def test_what_has_changed_since_is_not_undone(anns: Site, change: str) -> None:
    """All of it stays as it is then."""
    anns.run(
        "UPDATE employee SET title = 'Clerk' WHERE id = 2",
        "UPDATE employee SET manager_id = 2 WHERE id = 4",
        "CREATE TABLE note (who int REFERENCES employee, words text)",
        "INSERT INTO note VALUES (2, 'old')",
    )
    entry = anns.merge(1, 2).id
    anns.run(change)
    with anns.unchanged(), pytest.raises(CannotUndo):
        anns.undo(entry)
    assert anns.entries()[0].undone_at is None


@pytest.mark.parametrize("table", ["employee", "note"])
def test_a_column_that_was_added_since_is_no_change(anns: Site, table: str) -> None:
    """Nor is what it holds."""
    anns.run(
        "UPDATE employee SET manager_id = 2 WHERE id = 4",
        "CREATE TABLE note (who int REFERENCES employee, words text)",
        "INSERT INTO note VALUES (2, 'old'), (2, 'old')",
    )
    entry = anns.merge(1, 2).id
    anns.run(f"ALTER TABLE {table} ADD flag int DEFAULT 1")
    assert anns.undo(entry) == 4
    assert anns.rows("SELECT who FROM note") == [2, 2]


def test_what_the_guard_forbids_is_not_undone(anns: Site) -> None:
    """A merge without marks before it would leave two canonical rows of one key."""
    entry = anns.merge(1, 2, 3).id
    anns.run(
        "CREATE UNIQUE INDEX uq_employee_natural_key ON employee (department_id, name)"
        " NULLS NOT DISTINCT WHERE duplicate_of_id IS NULL"
    )
    with anns.unchanged(), pytest.raises(CannotUndo, match="uq_employee_natural_key"):
        anns.undo(entry)


def test_times_are_undone_whatever_zone_and_style_the_session_has(anns: Site) -> None:
    """Images are compared in one zone, one style."""
    anns.run(
        "CREATE TABLE note (who int REFERENCES employee, at timestamptz, span interval, f float8,"
        " n numeric, b bytea, m money, r int4range[])",
        "INSERT INTO note VALUES (2, '2020-01-01 00:00Z', '-1 day 2 hours', 0.1::float8 / 3,"
        """ 12345678901234567890.1234567890, '\\x00ff', 1234.5, '{"[1,2)"}')""",
    )
    before = anns.image()
    entry = anns.merge(1, 2).id
    with create_engine(
        anns.engine.url,
        connect_args={
            "options": "-c timezone=Asia/Tokyo -c intervalstyle=sql_standard -c datestyle=German"
            " -c extra_float_digits=-15 -c bytea_output=escape"
        },
        poolclass=NullPool,
    ).connect() as connection:
        undo(connection.engine, anns.tables.of(Employee), entry, RetryPolicy())
    assert anns.image() == before


def test_a_lost_reply_to_commit_does_nothing_twice(anns: Site) -> None:
    """The journal says that it was done: a merge, what takes it back, a purge."""
    first = anns.merge(1, 2)
    with lossy_proxy(anns.engine.url.render_as_string(False)) as (proxy, through):
        lossy = Site(create_engine(through, poolclass=NullPool))
        proxy.lose_reply_to = b"COMMIT"
        second = lossy.merge(1, 3)
        assert [entry.id for entry in anns.entries()] == [second.id, first.id]
        proxy.lose_reply_to = b"COMMIT"
        assert lossy.undo(second.id) == 1
        proxy.lose_reply_to = b"COMMIT"
        assert [(one.merge, one.deleted) for one in lossy.purge()] == [(first.id, 1)]
        assert proxy.lost == 3
    assert [entry.action for entry in anns.entries()] == ["purge", "merge", "merge"]


def test_what_came_to_refer_to_merged_rows_is_repointed_before_they_are_purged(anns: Site) -> None:
    """No CASCADE fires; a purged merge cannot be undone."""
    anns.run(
        "CREATE TABLE note (id serial PRIMARY KEY, who int REFERENCES employee ON DELETE CASCADE)"
    )
    entry = anns.merge(1, 2).id
    anns.run("INSERT INTO note (who) VALUES (2), (4)")
    (purged,) = anns.purge()
    assert (purged.merge, purged.deleted, purged.repointed, purged.kept_back) == (entry, 1, 1, [])
    assert anns.rows("SELECT who FROM note ORDER BY id") == [1, 4]
    assert anns.rows("SELECT id FROM employee ORDER BY id") == [1, 3, 4]
    for one in anns.entries():
        with pytest.raises(CannotUndo, match="purged"):
            anns.undo(one.id)
    assert anns.purge() == []


def test_what_is_not_old_enough_is_not_purged(anns: Site) -> None:
    """Age is that of the merge."""
    anns.merge(1, 2)
    assert anns.purge(older_than=timedelta(minutes=1)) == []


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "SET DEFAULT", "RESTRICT", "NO ACTION"])
def test_what_cannot_be_repointed_keeps_its_row_from_being_purged(anns: Site, action: str) -> None:
    """The rest is told why; nothing is deleted or set to NULL along with it."""
    anns.run(
        f"CREATE TABLE badge (who int UNIQUE REFERENCES employee ON DELETE {action}, word text)",
        "INSERT INTO badge VALUES (1, 'a')",
    )
    anns.merge(1, 2)
    anns.run("INSERT INTO badge VALUES (2, 'b')")
    with anns.unchanged():
        (purged,) = anns.purge()
    assert purged.deleted == 0
    assert purged.kept_back == ["badge: unique (who)"]


def test_a_row_that_is_no_duplicate_any_more_is_not_purged(anns: Site) -> None:
    """Somebody took its mark off by hand."""
    anns.merge(1, 2)
    anns.run("UPDATE employee SET duplicate_of_id = NULL WHERE id = 2")
    (purged,) = anns.purge()
    assert purged.kept_back == ["a row of it is no duplicate any more"]


def test_a_row_whose_kept_row_was_merged_in_turn_is_purged(anns: Site) -> None:
    """Late references lead to the last of them."""
    anns.run("CREATE TABLE note (who int REFERENCES employee ON DELETE CASCADE)")
    anns.merge(2, 3)
    anns.merge(1, 2)
    anns.run("INSERT INTO note VALUES (2), (3)")
    assert [one.deleted for one in anns.purge()] == [1, 1]
    assert anns.rows("SELECT who FROM note") == [1, 1]


def test_a_merge_that_was_undone_meanwhile_is_not_purged(anns: Site) -> None:
    """The purge looks again."""
    tables, entry = anns.tables, anns.merge(1, 2)
    (merge,) = anns.entries()
    anns.undo(entry.id)
    with anns.unchanged():
        purged = purge_merge(
            anns.engine, tables, tables.of(Employee), merge, Rules(), RetryPolicy()
        )
    assert purged.kept_back == ["somebody else undid or purged it meanwhile"]


def test_purging_departments_brings_late_employees_along(departments: Site) -> None:
    """Those who collide are marked, and keep nothing from being purged."""
    departments.merge(1, 2)
    departments.add_employee("Bob", "Eve", department=2)
    (purged,) = departments.purge()
    assert (purged.deleted, purged.repointed) == (1, 1)
    assert departments.rows("SELECT department_id, duplicate_of_id FROM employee WHERE id > 4") == [
        (1, 2),
        (1, None),
    ]


def test_late_homonyms_keep_their_department_from_being_purged(departments: Site) -> None:
    """Somebody has to say who they are."""
    departments.merge(1, 2)
    departments.add_employee("Ann", department=2, title="Boss")
    with departments.unchanged():
        (purged,) = departments.purge()
    assert "may be different people" in purged.kept_back[0]


def test_what_only_the_database_forbids_keeps_a_row_from_being_purged(anns: Site) -> None:
    """Such as a check that no look can foresee."""
    anns.run("CREATE TABLE note (who int REFERENCES employee CHECK (who <> 1))")
    anns.merge(1, 2)
    anns.run("INSERT INTO note VALUES (2)")
    (purged,) = anns.purge()
    assert "note_who_check" in purged.kept_back[0]


def test_an_employee_merge_that_relies_on_a_mark_is_undone_first(departments: Site) -> None:
    """Undoing the departments' merge would leave it half."""
    first = departments.merge(1, 2)
    second = departments.merge(1, 3, model=Employee)
    with departments.unchanged(), pytest.raises(CannotUndo, match=f"merge {second.id}"):
        departments.undo(first.id)
    departments.undo(second.id)
    departments.undo(first.id)


def test_a_later_merge_of_another_table_is_in_no_way(departments: Site) -> None:
    """Though its rows have the same ids."""
    departments.add_employee("Bob")
    first = departments.merge(2, 5, model=Employee)
    departments.add_department("Lab", "Lab", "Lab")
    departments.run("UPDATE department SET name = 'Lab' WHERE id = 2")
    departments.merge(2, 5)
    assert departments.undo(first.id) == 1


def test_a_journal_that_somebody_else_makes_at_the_same_time_is_one(site: Site) -> None:
    """Who loses waits, and finds it; any other error is told."""
    table = site.tables.of(Employee)
    with site.engine.connect() as other:
        other.exec_driver_sql(journal.CREATE.format(schema=table.schema))
        created = started(lambda: journal.create(site.engine, table))
        eventually(lambda: waits(site.engine) == 1)
        other.commit()
    created()
    site.run("DROP TABLE rollcall_change")
    options = {"options": "-c default_transaction_read_only=on"}
    reader = create_engine(site.engine.url, connect_args=options, poolclass=NullPool)
    with pytest.raises(DBAPIError, match="read-only"):
        journal.create(reader, table)


def test_a_reference_to_a_column_that_is_blank_in_the_kept_row_collides(anns: Site) -> None:
    """To repoint it would set it to NULL."""
    anns.run(
        "ALTER TABLE employee ADD code text UNIQUE; UPDATE employee SET code = 'A' WHERE id = 2",
        "CREATE TABLE note (who text REFERENCES employee (code)); INSERT INTO note VALUES ('A')",
    )
    with anns.unchanged(), pytest.raises(RowsCollide, match="employee_code_key"):
        anns.merge(1, 2)
    with anns.unchanged(), pytest.raises(RowsCollide, match="code"):
        anns.merge(1, 2, fill={})


def test_a_self_reference_of_two_columns_is_no_reference_to_the_row_by_one(anns: Site) -> None:
    """Only where all its columns lead there would the row refer to itself."""
    anns.run(
        "ALTER TABLE employee ADD boss_d bigint, ADD boss bigint, ADD UNIQUE (department_id, id),"
        " ADD FOREIGN KEY (boss_d, boss) REFERENCES employee (department_id, id)",
        "UPDATE employee SET boss_d = 1, boss = 4 WHERE id = 2",
        "UPDATE employee SET boss_d = 1, boss = 3 WHERE id = 4",
    )
    before = anns.image()
    entry = anns.merge(1, 2, 3)
    assert entry.filled == {"boss_d": 2, "boss": 2}
    assert anns.rows("SELECT boss FROM employee ORDER BY id") == [4, 4, None, 1]
    anns.undo(entry.id)
    assert anns.image() == before
    anns.run("UPDATE employee SET boss_d = 1, boss = 2 WHERE id = 1")
    with anns.unchanged(), pytest.raises(RowsCollide, match="refer to the row itself"):
        anns.merge(1, 2, rules=Rules(accept_homonyms=True))


@pytest.mark.parametrize("manager", ["A", "B"])
def test_a_self_reference_by_another_column_than_the_id_is_one_too(
    anns: Site, manager: str
) -> None:
    """By filling, by repointing."""
    anns.run(
        "ALTER TABLE employee ADD code text UNIQUE, ADD boss text REFERENCES employee (code)",
        "UPDATE employee SET code = chr(64 + id::int)",
        f"UPDATE employee SET boss = '{manager}' WHERE id = {2 if manager == 'A' else 1}",
    )
    with anns.unchanged(), pytest.raises(RowsCollide, match="refer to the row itself"):
        anns.merge(1, 2, rules=Rules(accept_homonyms=True))


def test_keys_are_compared_as_the_database_compares_them(own: Engine) -> None:
    """Here without regard to case; uuids are ids like others, and in another schema."""
    site = Site(own, Badge)
    site.run("INSERT INTO item (label, position) VALUES ('ann', 'x'), ('ANN', 'x'), ('ann', 'X')")
    (group,) = site.look()
    assert (group.kept, group.duplicates) == (1, (2,))
    assert site.merge(1, 2).duplicates == (2,)
    site.model = Legacy
    site.run(
        "ALTER TABLE old.legacy ALTER duplicate_of_id TYPE uuid USING NULL",
        "INSERT INTO old.legacy (legacy_key, name) SELECT gen_random_uuid(), 'a'"
        " FROM generate_series(1, 3)",
    )
    (group,) = site.look()
    site.merge(group.kept, *group.duplicates)
    assert [one.deleted for one in site.purge()] == [2]
