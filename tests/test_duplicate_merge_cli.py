"""``flask duplicates merge``, ``undo`` and ``purge``: what they do, say, and refuse."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import NullPool, create_engine

from tests.test_cli import FLASK, ROOT, flask, on_a_terminal
from tests.test_duplicate_guard_cli import (
    duplicates,
    everything,
    legacy,
    make_plan,
    marked,
    one_line,
    rows,
    run,
    stopped,
)

__all__ = ["legacy", "marked"]

NEXT = "Take a merge back with: flask duplicates undo NUMBER. Next: flask duplicates status"


def test_merge_says_what_became_of_each_table(marked: Flask) -> None:
    """Groups, rows repointed and blanks filled, by name; and how to take it back."""
    run(marked, "UPDATE employee SET email = 'x@example.org' WHERE id = 201")
    result = duplicates(marked, "merge", "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "department: merged 2 groups, 2 duplicates.",
        "  merges 3 to 4",
        "employee: merged 33 groups, 33 duplicates.",
        "  merges 5 to 37",
        "  repointed 22 rows: ticket.employee_id",
        "  filled 10 blanks: phone",
        "  filled 1 blanks: email",
        NEXT,
    ]
    assert len(run(marked, "SELECT FROM ticket")) == 2 * (233 // 3)


def test_a_merge_without_a_guard_tells_what_departments_bring_together(legacy: Flask) -> None:
    """Their employees become duplicates themselves."""
    result = duplicates(legacy, "merge", "--all", "--accept-homonyms")
    assert result.exit_code == 0
    assert "became duplicates themselves, and were merged: 33 rows of employee" in result.stdout


def test_a_second_merge_finds_nothing(marked: Flask) -> None:
    """And writes nothing."""
    first = json.loads(duplicates(marked, "merge", "--all", "--json").stdout)
    assert first["employee"] == {
        "merged": 33,
        "merges": list(range(5, 38)),
        "duplicates": 33,
        "repointed": {"ticket.employee_id": 22},
        "filled": {"phone": 10},
        "collapsed": {},
        "stayed": 0,
        "left": [],
    }
    before = everything(marked)
    again = duplicates(marked, "merge", "--all", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["employee"]["merged"] == 0
    assert everything(marked) == before


def test_one_table_can_be_merged_alone(marked: Flask) -> None:
    """--table, for a dry run too."""
    result = duplicates(marked, "merge", "--all", "--table", "employee", "--json")
    assert list(json.loads(result.stdout)) == ["employee"]
    shown = duplicates(marked, "merge", "--dry-run", "--table", "department")
    assert {group["table"] for group in json.loads(shown.stdout)["groups"]} == {"department"}
    assert shown.stderr == "Planned 2 groups; nothing was changed.\n"


def test_homonyms_are_left_and_listed(legacy: Flask) -> None:
    """Exit status 1; so are employees of departments that have yet to be merged."""
    result = duplicates(legacy, "merge", "--all", "--table", "employee")
    assert result.exit_code == 1
    assert "employee: merged 20 groups, 20 duplicates." in result.stdout
    left = result.stderr.splitlines()
    assert left[:10] == [
        f"  left: employee {n}, {n + 200}: the duplicates of employee {n} have changed"
        for n in range(21, 31)
    ]
    assert left[10:] == [
        *(
            f"  left: employee {n}, {n + 200}: 1 groups may be different people of one name"
            for n in (31, 32, 33)
        ),
        "13 groups were left as they were.",
    ]
    assert duplicates(legacy, "merge", "--all", "--accept-homonyms").exit_code == 0


def test_a_plan_is_followed_as_it_was_edited(legacy: Flask, tmp_path: Path) -> None:
    """Another kept row, other blanks filled, the same person, left, and renamed."""
    run(
        legacy,
        "INSERT INTO employee (name, department_id, title) VALUES ('Person 33', 2, 'Clerk')",  # 234
        "UPDATE employee SET email = 'old@example.org' WHERE id = 202",
    )
    plan = make_plan(
        legacy, tmp_path / "plan.json", "merge",
        department_1={"decision": "leave"},
        department_2={"decision": "leave"},
        **{f"employee_{n}": {"decision": "leave"} for n in range(21, 31)},
        employee_1={"kept": 201, "duplicates": [1], "fill": {"title": 1}},
        employee_2={"fill": {}},
        employee_3={"decision": "leave"},
        employee_31={"decision": "same"},
        employee_32={"decision": "leave"},
        employee_33={"rename": {"233": {"name": "Person 33 the Poet"}}},
    )  # fmt: skip
    result = duplicates(legacy, "merge", "--plan", plan)
    assert result.exit_code == 0, result.stderr
    found = {row.id: row for row in run(legacy, "SELECT * FROM employee")}
    marks = {id: row.duplicate_of_id for id, row in found.items()}
    assert [marks[id] for id in (1, 202, 203, 231, 232, 233, 234)] == [
        201, 2, None, 31, None, None, 33,
    ]  # fmt: skip
    assert (found[201].title, found[201].hired_on, found[2].phone) == ("Clerk", None, None)
    assert found[233].name == "Person 33"  # it is the guard that renames


def test_a_plan_can_be_followed_again_from_the_start(marked: Flask, tmp_path: Path) -> None:
    """What is merged already is passed over; what has come to refer to it since is repointed."""
    plan = make_plan(marked, tmp_path / "plan.json", "merge")
    duplicates(marked, "merge", "--plan", plan, "--table", "department")
    assert duplicates(marked, "merge", "--plan", plan).exit_code == 0
    before = everything(marked)
    again = duplicates(marked, "merge", "--plan", plan)
    assert again.exit_code == 0
    assert "employee: merged 0 groups, 0 duplicates." in again.stdout
    assert everything(marked) == before
    run(marked, "INSERT INTO ticket (employee_id) VALUES (201)")
    late = duplicates(marked, "merge", "--plan", plan)
    assert "  repointed 1 rows: ticket.employee_id" in late.stdout.splitlines()


def test_a_plan_that_is_out_of_date_is_left_and_said(legacy: Flask, tmp_path: Path) -> None:
    """Rows that have gone, changed, or been filled since: exit status 1, the others merged."""
    plan = make_plan(
        legacy,
        tmp_path / "plan.json",
        "merge",
        **{f"employee_{n}": {"decision": "leave"} for n in range(21, 34)},
    )
    run(
        legacy,
        "DELETE FROM employee WHERE id = 201",
        "UPDATE employee SET name = 'Another' WHERE id = 202",
        "UPDATE employee SET phone = '123' WHERE id = 4",
        "UPDATE employee SET duplicate_of_id = 6 WHERE id = 5",
    )
    result = duplicates(legacy, "merge", "--plan", plan, "--table", "employee", "--json")
    assert result.exit_code == 1
    totals = json.loads(result.stdout)["employee"]
    assert [(left["kept"], left["reason"]) for left in totals["left"]] == [
        (1, "the duplicates of employee 1 have changed"),
        (2, "the duplicates of employee 2 have changed"),
        (4, "employee 4: phone cannot be filled from 204"),
        (5, "employee 5 is not a row to keep any more"),
    ]
    assert totals["merged"] == 16


def test_the_guards_plan_decides_on_a_merge_of_departments(legacy: Flask, tmp_path: Path) -> None:
    """Homonyms that it brings together need a decision of their own."""
    plan = make_plan(legacy, tmp_path / "plan.json", "merge", employee_32={"decision": "same"})
    result = duplicates(legacy, "merge", "--plan", plan, "--table", "department")
    assert result.exit_code == 1
    assert result.stdout.startswith("department: merged 1 groups, 1 duplicates.")
    assert result.stderr.startswith("  left: department 2, 5: 2 groups may be different people")


COLLIDING = (
    "INSERT INTO ticket (employee_id, subject) VALUES (1, 'x'), (201, 'x'), (201, 'y')",
    "ALTER TABLE ticket ADD UNIQUE (employee_id, subject)",
)


def test_groups_whose_rows_collide_are_left_and_listed(marked: Flask) -> None:
    """With the rows, in text and as JSON; exit status 1, and the others are merged."""
    run(marked, *COLLIDING)
    first, other = (id for (id,) in run(marked, "SELECT id FROM ticket WHERE subject = 'x'"))
    result = duplicates(marked, "merge", "--all", "--json")
    assert result.exit_code == 1
    totals = json.loads(result.stdout)["employee"]
    (left,) = [one for one in totals["left"] if one["kept"] == 1]
    assert left == {
        "kept": 1,
        "duplicates": [201],
        "reason": "ticket: unique (employee_id, subject)",
        "collisions": [
            {
                "table": "ticket",
                "reason": "unique (employee_id, subject)",
                "first": {"id": first},
                "others": [{"id": other}],
            }
        ],
    }
    again = duplicates(marked, "merge", "--all")
    assert again.exit_code == 1
    assert again.stderr.splitlines()[0] == (
        "  left: employee 1, 201: ticket: unique (employee_id, subject)"
        f' ({{"id": {first}}}, {{"id": {other}}})'
    )
    assert f"{len(totals['left'])} groups were left as they were." in again.stderr


@pytest.mark.parametrize("policy", ["skip", "merge"])
def test_a_policy_settles_collisions(marked: Flask, policy: str) -> None:
    """Rows that would collide stay where they are; all of it can be undone."""
    run(marked, *COLLIDING)
    before = rows(marked)
    result = duplicates(marked, "merge", "--all", "--on-collision", f"ticket={policy}")
    assert result.exit_code == 0
    assert "stayed where they were, for they would collide:" in result.stdout
    owners = run(marked, "SELECT employee_id FROM ticket WHERE subject IN ('x', 'y') ORDER BY id")
    assert owners == [(1,), (201,), (1,)]
    assert duplicates(marked, "undo", "--all").exit_code == 0
    assert rows(marked) == before


def test_many_groups_that_are_left_are_not_all_listed(legacy: Flask) -> None:
    """Twenty, and how many more; --json has all."""
    run(legacy, "UPDATE employee SET title = 'Poet' WHERE id BETWEEN 201 AND 220")
    result = duplicates(legacy, "merge", "--all", "--table", "employee")
    assert "  and 13 more; --json shows all" in result.stderr.splitlines()
    assert "33 groups were left as they were." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge"], "Give either --all or --plan FILE."),
        (["merge", "--all", "--plan", "setup.cfg"], "Give either --all or --plan FILE."),
        (["merge", "--dry-run", "--plan", "setup.cfg"], "--dry-run writes a plan"),
        (["merge", "--all", "--table", "zoo"], "Invalid value for '--table'"),
        (["merge", "--all", "--keep", "tallest"], "Invalid value for '--keep'"),
        (["merge", "--all", "--on-collision", "ticket"], "must be TABLE=skip or TABLE=merge"),
        (["merge", "--all", "--on-collision", "=skip"], "must be TABLE=skip or TABLE=merge"),
        (["merge", "--all", "--on-collision", "ticket=x"], "must be TABLE=skip or TABLE=merge"),
        (["undo"], "Give the numbers of merges, or --all."),
        (["undo", "1", "--all"], "Give the numbers of merges, or --all."),
        (["undo", "0"], "Invalid value"),
        (["undo", "x"], "Invalid value"),
        (["purge"], "Missing option '--older-than'"),
        (["purge", "--older-than", "30"], "must be a number and a unit: 30d, 12h"),
        (["purge", "--older-than", "-1d"], "must be a number and a unit"),
        (["purge", "--older-than", "1.5d"], "must be a number and a unit"),
        (["purge", "--older-than", "9999999d"], "must be a number and a unit"),
        (["purge", "--older-than", "٣d"], "must be a number and a unit"),
    ],
)
def test_a_bad_option_is_refused(app: Flask, arguments: list[str], words: str) -> None:
    """Exit status 2, and what is wrong with it."""
    one_line(duplicates(app, *arguments), words, status=2)


@pytest.mark.parametrize("table", ["tickets", "public.tickets", "nowhere.ticket"])
def test_a_policy_for_a_table_that_is_not_there_is_refused(marked: Flask, table: str) -> None:
    """A typing error in --on-collision is no policy; nothing is merged."""
    before = everything(marked)
    result = duplicates(marked, "merge", "--all", "--on-collision", f"{table}=skip")
    one_line(result, f"--on-collision: there is no table {table}")
    assert everything(marked) == before


def test_undo_takes_merges_back(marked: Flask) -> None:
    """One by its number, or all, the newest first; every row is as it was."""
    before = rows(marked)
    assert duplicates(marked, "merge", "--all").exit_code == 0
    ids = [id for (id,) in run(marked, "SELECT id FROM rollcall_merge WHERE action = 'merge'")]
    one = duplicates(marked, "undo", str(ids[5]))
    assert one.stdout.startswith("Undone 1 merges, restored ")
    everything_else = duplicates(marked, "undo", "--all", "--json")
    assert everything_else.exit_code == 0
    undone = json.loads(everything_else.stdout)
    assert undone["refused"] == {}
    assert list(undone["undone"]) == [str(id) for id in sorted(ids, reverse=True) if id != ids[5]]
    assert rows(marked) == before
    nothing = duplicates(marked, "undo", "--all")
    assert (nothing.exit_code, nothing.stdout) == (0, "Undone 0 merges, restored 0 rows.\n")


def test_what_cannot_be_undone_is_said_and_the_others_are(marked: Flask) -> None:
    """Changed since, undone already, never made: exit status 1."""
    duplicates(marked, "merge", "--all", "--table", "employee")
    by_kept = dict(
        run(marked, "SELECT CAST(kept AS int), id FROM rollcall_merge WHERE action = 'merge'")
    )
    run(marked, "UPDATE employee SET phone = '5' WHERE id = 1")
    again = str(by_kept[2])
    wanted = (str(by_kept[1]), again, again, "999", str(10**30), str(by_kept[3]))
    result = duplicates(marked, "undo", *wanted)
    assert result.exit_code == 1
    assert result.stdout.startswith("Undone 2 merges")
    assert result.stderr.splitlines() == [
        f'  merge {by_kept[1]} cannot be undone: rows of "public"."employee" have been changed'
        " since: {'id': 1}",
        f"  merge {again} cannot be undone: it was undone already",
        "  merge 999 cannot be undone: there is no such merge",
        f"  merge {10**30} cannot be undone: there is no such merge",
        "Error: 4 merges were not undone.",
    ]
    as_json = duplicates(marked, "undo", "999", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {
        "undone": {}, "refused": {"999": "there is no such merge"},
    }  # fmt: skip


def test_purge_deletes_what_is_merged_for_good(marked: Flask) -> None:
    """What has come to refer to it since is repointed first; there is no way back."""
    duplicates(marked, "merge", "--all")
    run(marked, "INSERT INTO ticket (employee_id, subject) VALUES (201, 'late')")
    tickets = len(run(marked, "SELECT FROM ticket"))
    result = duplicates(marked, "purge", "--older-than", "0d", "--yes")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "employee: deleted 33 rows of 33 merges, which cannot be undone any more; "
        "repointed 1 rows that had come since.",
        "department: deleted 2 rows of 2 merges, which cannot be undone any more; "
        "repointed 0 rows that had come since.",
    ]
    assert run(marked, "SELECT employee_id FROM ticket WHERE subject = 'late'") == [(1,)]
    assert len(run(marked, "SELECT FROM ticket")) == tickets
    assert len(run(marked, "SELECT FROM employee")) == 200
    refused = duplicates(marked, "undo", "--all")
    assert (refused.exit_code, refused.stdout) == (0, "Undone 0 merges, restored 0 rows.\n")
    assert duplicates(marked, "purge", "--older-than", "0d").exit_code == 0  # nothing to ask about


def test_what_is_younger_is_not_purged(marked: Flask) -> None:
    """It stays restorable."""
    duplicates(marked, "merge", "--all", "--table", "department")
    before = everything(marked)
    for age in ("30d", "12h", "90m", "999999d"):
        result = duplicates(marked, "purge", "--older-than", age, "--yes", "--json")
        assert json.loads(result.stdout)["department"]["deleted"] == 0
    assert everything(marked) == before


def test_what_is_old_enough_is_purged(marked: Flask) -> None:
    """By the time of its merge, and in JSON too."""
    duplicates(marked, "merge", "--all")
    run(
        marked,
        "UPDATE rollcall_merge SET made_at = made_at - interval '31 days'"
        " WHERE action = 'merge' AND kept IN ('1', '2') AND table_name = 'employee'",
    )
    result = duplicates(marked, "purge", "--older-than", "30d", "--yes", "--json")
    assert json.loads(result.stdout) == {
        "employee": {"merges": 2, "deleted": 2, "repointed": 0, "kept_back": {}},
        "department": {"merges": 0, "deleted": 0, "repointed": 0, "kept_back": {}},
    }


def test_what_cannot_be_purged_is_kept_and_listed(marked: Flask) -> None:
    """A late row that would collide: exit status 1, and the rest is purged."""
    duplicates(marked, "merge", "--all", "--table", "employee")
    run(marked, *COLLIDING)
    result = duplicates(marked, "purge", "--older-than", "0d", "--yes")
    assert result.exit_code == 1
    assert "employee: deleted 32 rows of 32 merges" in result.stdout
    kept, last = result.stderr.splitlines()
    assert kept.startswith("  kept: employee, merge ")
    assert kept.endswith(": ticket: unique (employee_id, subject)")
    assert last == "Error: the duplicates of 1 merges were kept."
    as_json = duplicates(marked, "purge", "--older-than", "0d", "--yes", "--json")
    assert as_json.exit_code == 1
    (reasons,) = json.loads(as_json.stdout)["employee"]["kept_back"].values()
    assert reasons == ["ticket: unique (employee_id, subject)"]


def test_purge_asks_and_does_not_where_nobody_can_answer(marked: Flask) -> None:
    """Without a terminal it needs --yes; nothing is deleted."""
    duplicates(marked, "merge", "--all")
    before = everything(marked)
    one_line(duplicates(marked, "purge", "--older-than", "0d"), "so it needs --yes")
    assert everything(marked) == before


@pytest.mark.parametrize(("answer", "status", "left"), [(b"n\n", 1, 5), (b"y\n", 0, 3)])
def test_purge_asks_on_a_terminal(marked: Flask, answer: bytes, status: int, left: int) -> None:
    """It takes no for an answer."""
    duplicates(marked, "merge", "--all", "--table", "department")
    ended, shown = on_a_terminal(marked, "duplicates", "purge", "--older-than", "0d", typed=answer)
    assert ended == status
    assert "Delete the duplicates of 2 merges for good? [y/N]" in shown
    assert len(run(marked, "SELECT FROM department")) == left


def test_purge_asks_on_standard_error(marked: Flask, marked_url: str) -> None:
    """So that standard output stays what it is."""
    duplicates(marked, "merge", "--all", "--table", "department")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [FLASK, "duplicates", "purge", "--older-than", "0d"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": marked_url},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.write(ours, b"n\n")
        stdout, stderr = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode, stdout) == (1, b"")
    assert b"Delete the duplicates of 2 merges for good? [y/N]" in stderr


def test_a_merge_that_is_stopped_can_be_run_again(marked: Flask, marked_url: str) -> None:
    """Ctrl-C: what is merged is merged, the rest is done by the next run."""
    engine = create_engine(marked_url, poolclass=NullPool)
    with engine.connect() as holder:
        holder.exec_driver_sql("SELECT FROM employee WHERE id = 20 FOR UPDATE")
        with stopped(engine, marked_url, "merge", "--all", "--table", "employee") as said:
            assert said.splitlines()[-1] == "Stopped."
            assert "Traceback" not in said
    done = len(run(marked, "SELECT FROM rollcall_merge WHERE action = 'merge'"))
    assert 0 < done < 33
    result = duplicates(marked, "merge", "--all", "--table", "employee", "--json")
    assert json.loads(result.stdout)["employee"]["merged"] == 33 - done


def test_the_commands_work_as_an_operator_calls_them(marked: Flask, marked_url: str) -> None:
    """As a process of its own; what one has merged another undoes."""
    done = flask("duplicates", "merge", "--all", DATABASE_URL=marked_url)
    assert done.stdout.endswith(f"{NEXT}\n")
    assert duplicates(marked, "undo", "--all").stdout.startswith("Undone 35 merges")


def test_columns_without_a_foreign_key_are_repointed_where_they_are_declared(
    make_app: Callable[..., Flask], marked_url: str
) -> None:
    """By ROLLCALL_SOFT_REFERENCES, in every command; undone like others."""
    app = make_app(marked_url, ROLLCALL_SOFT_REFERENCES="audit.note.about=employee")
    run(
        app,
        "CREATE SCHEMA audit",
        "CREATE TABLE audit.note (id serial PRIMARY KEY, about bigint)",
        "INSERT INTO audit.note (about) VALUES (201), (1), (777)",
    )
    report = json.loads(duplicates(app, "report", "--json", "--table", "employee").stdout)
    assert report["employee"]["references"]["audit.note.about"] == 1
    result = duplicates(app, "merge", "--all")
    assert "  repointed 1 rows: audit.note.about" in result.stdout.splitlines()
    about = "SELECT about FROM audit.note ORDER BY id"
    assert run(app, about) == [(1,), (1,), (777,)]
    assert duplicates(app, "undo", "--all").exit_code == 0
    assert run(app, about) == [(201,), (1,), (777,)]


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("ticket.employe_id=employee", "there is no column ticket.employe_id"),
        ("tickets.employee_id=employee", "there is no column tickets.employee_id"),
        ("ticket.employee_id=employees", "ticket.employee_id: there is no table employees"),
    ],
)
def test_a_soft_reference_that_is_not_there_is_one_line(
    make_app: Callable[..., Flask], marked_url: str, declared: str, words: str
) -> None:
    """That names the setting, in every command that looks at references."""
    app = make_app(marked_url, ROLLCALL_SOFT_REFERENCES=declared)
    for arguments in (["merge", "--all"], ["guard"], ["status"], ["report"], ["undo", "--all"]):
        one_line(duplicates(app, *arguments), f"Error: ROLLCALL_SOFT_REFERENCES: {words}")
