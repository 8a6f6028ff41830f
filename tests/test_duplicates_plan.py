"""Plans: what they say of a group, how they are written and read, and what makes one unusable."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from app.duplicates.groups import find_groups
from app.duplicates.plan import Decisions, PlannedGroup, describe, read_plan, write_plan
from app.errors import UnusablePlan
from app.models import Employee
from tests.duplicated import Site


@pytest.fixture
def anns(site: Site) -> Site:
    """Ann three times, one of them marked, two who differ, and a badge each."""
    site.add_department("Sales")
    site.add_employee("Ann")
    site.add_employee("Ann", title="Boss", email="a@b")
    site.add_employee("Ann ", title="Clerk")
    site.run(
        "UPDATE employee SET duplicate_of_id = 1 WHERE id = 3",
        "CREATE TABLE badge (id serial PRIMARY KEY, who int UNIQUE REFERENCES employee)",
        "INSERT INTO badge (who) VALUES (1), (2), (3)",
    )
    return site


def planned(site: Site) -> list[dict[str, Any]]:
    tables = site.tables
    table = tables.of(Employee)
    with site.engine.connect() as connection:
        groups = list(find_groups(connection, tables, table))
        return [describe(connection, tables, table, group) for group in groups]


def plan_of(*groups: dict[str, Any]) -> str:
    file = io.StringIO()
    assert list(write_plan(file, groups)) == list(range(1, len(groups) + 1))
    return file.getvalue()


def test_a_plan_says_what_would_be_done(anns: Site) -> None:
    """Which row is kept, what is repointed, filled and collides, and who may be somebody else."""
    with anns.unchanged():
        (group,) = planned(anns)
    assert group == {
        "table": "employee",
        "key": {"department_id": 1, "name": "Ann"},
        "kept": 1,
        "duplicates": [2, 3],
        "marked": [3],
        "repoint": {"2": {"badge.who": 1}, "3": {"badge.who": 1}},
        "fill": {"title": 2, "email": 2},
        "collisions": [
            {
                "table": "badge",
                "reason": "unique (who)",
                "first": {"id": 1},
                "others": [{"id": 2}, {"id": 3}],
            }
        ],
        "homonyms": {"title": {"1": None, "2": "Boss", "3": "Clerk"}},
        "decision": None,
        "rename": {},
    }


def test_a_plan_that_is_written_can_be_read(anns: Site) -> None:
    """A group a line, so that it can be edited; an empty one too."""
    text = plan_of(*planned(anns))
    assert len(text.splitlines()) == 3
    (group,) = read_plan(io.StringIO(text))
    filled = {"title": 2, "email": 2}
    assert group == PlannedGroup("employee", 1, (2, 3), fill=filled)
    assert group.ids == {1, 2, 3}
    assert read_plan(io.StringIO(plan_of())) == []


def test_ids_may_be_strings(anns: Site) -> None:
    """Such as uuids."""
    text = plan_of({"table": "t", "kept": "a", "duplicates": ["b"], "decision": "leave"})
    assert read_plan(io.StringIO(text)) == [PlannedGroup("t", "a", ("b",), "leave")]


GOOD = {"table": "employee", "kept": 1, "duplicates": [2]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it does not begin with"),
        ('{"rollcall_plan": 2, "groups": []}', "it does not begin with"),
        ('{"rollcall_plan": 1, "groups": {}}', "it has no list of groups"),
        ('{"rollcall_plan": 1, "groups": [1]}', "group 1 is no object"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, says: str) -> None:
    """With what is wrong with it."""
    with pytest.raises(UnusablePlan, match=says):
        read_plan(io.StringIO(text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"table": None}, "group 2 needs a table and the id of the row to keep"),
        ({"kept": True}, "group 2 needs a table and the id of the row to keep"),
        ({"kept": [1]}, "group 2 needs a table and the id of the row to keep"),
        ({"duplicates": []}, "group 2 needs a list of the ids"),
        ({"duplicates": 2}, "group 2 needs a list of the ids"),
        ({"duplicates": [2, None]}, "group 2 needs a list of the ids"),
        ({"decision": "maybe"}, 'group 2: decision is "same", "leave" or null'),
        ({"rename": [1]}, "group 2: rename is by ids"),
        ({"rename": {"9": {"name": "B"}}}, "group 2: rename is by ids"),
        ({"rename": {"12": "B"}}, "group 2: rename gives columns"),
        ({"rename": {"12": {}}}, "group 2: rename gives columns"),
        ({"fill": ["title"]}, "group 2: fill gives"),
        ({"fill": {"title": None}}, "group 2: fill gives"),
        ({"duplicates": [11]}, "employee 11 is there more than once"),
        ({"duplicates": [1]}, "employee 1 is there more than once"),
    ],
)
def test_a_group_that_cannot_be_read_is_named(change: dict[str, Any], says: str) -> None:
    """By its number, counted from 1."""
    other = {"table": "employee", "kept": 11, "duplicates": [12], **change}
    with pytest.raises(UnusablePlan, match=says):
        read_plan(io.StringIO(json.dumps({"rollcall_plan": 1, "groups": [GOOD, other]})))


def test_a_plan_decides_on_the_rows_that_it_names(anns: Site) -> None:
    """On fewer of them as well, not on others."""
    (group,) = anns.look(Employee)
    (part,) = anns.look(Employee, which="unmarked")
    same = Decisions([PlannedGroup("employee", 2, (1, 3), "same")])
    assert same.are_same(group)
    assert same.are_same(part)
    assert (same.apply(group).kept, same.apply(group).duplicates) == (2, (1, 3))
    assert (same.apply(part).kept, same.apply(part).duplicates) == (2, (1,))
    other = Decisions([PlannedGroup("employee", 1, (2,), "same")])
    assert other.apply(group) == group
    assert not other.are_same(group)
    assert other.apply(part) == part
