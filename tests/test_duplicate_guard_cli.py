"""``flask duplicates guard``, ``unguard`` and ``status``: what they do, say, and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from sqlalchemy import Engine, NullPool, create_engine, text

from app.db import db
from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from tests.conftest import waits
from tests.races import eventually
from tests.test_cli import FLASK, ROOT, flask

GUARDS = {"uq_department_natural_key", "uq_employee_natural_key"}
LOOKUPS = {"ix_department_natural_key", "ix_employee_natural_key"}

Run = Callable[..., Result]


@pytest.fixture
def legacy(make_app: Callable[..., Flask], legacy_url: str) -> Flask:
    """The service on an adopted legacy database that has no guard."""
    return make_app(legacy_url)


@pytest.fixture
def marked(make_app: Callable[..., Flask], marked_url: str) -> Flask:
    """The service on a guarded one, with its duplicates in place."""
    return make_app(marked_url)


def duplicates(app: Flask, *arguments: str) -> Result:
    """Run ``flask duplicates …``; it never ends in a traceback."""
    result = app.test_cli_runner().invoke(args=["duplicates", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def run(app: Flask, *statements: str) -> Any:
    """Run statements on the application's database; return the rows of the last."""
    with app.app_context(), db.engine.begin() as connection:
        for statement in statements:
            result = connection.execute(text(statement))
        return result.all() if result.returns_rows else None


def everything(app: Flask) -> dict[str, Any]:
    """Return every row of every table, with the transaction that wrote it, and the journal."""
    tables = ("department", "employee", "ticket", "rollcall_merge", "rollcall_change")
    return {name: run(app, f"SELECT xmin, * FROM {name} ORDER BY 2, 3") for name in tables}


def rows(app: Flask) -> dict[str, Any]:
    """Return every row of every table but the journal's."""
    names = ("department", "employee", "ticket")
    return {name: run(app, f"SELECT * FROM {name} ORDER BY id") for name in names}


def key_indexes(app: Flask) -> set[str]:
    """Return the valid indexes on natural keys."""
    found = run(
        app,
        "SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        " WHERE c.relname LIKE '%natural_key' AND i.indisvalid",
    )
    return {name for (name,) in found}


def one_line(result: Result, words: str, status: int = 1) -> None:
    """It failed, and said why in one line."""
    assert result.exit_code == status
    assert result.stdout == ""
    *_, last = result.stderr.splitlines()
    assert last.startswith("Error: ")
    assert words in last
    assert status == 2 or len(result.stderr.splitlines()) == 1


def make_plan(app: Flask, path: Path, *command: str, **changes: dict[str, Any]) -> str:
    """Write a plan and edit it; ``changes`` are by table and kept row: ``employee_31``."""
    result = duplicates(app, *(command or ("guard",)), "--dry-run", "--output", str(path))
    assert result.exit_code == 0
    plan = json.loads(path.read_text("utf-8"))
    groups = {f"{group['table']}_{group['kept']}": group for group in plan["groups"]}
    for name, change in changes.items():
        groups[name].update(change)
    path.write_text(json.dumps(plan), "utf-8")
    return str(path)


def test_guard_says_what_it_did_and_what_comes_next(legacy: Flask) -> None:
    """Marked, normalised, moved along, built; the rows are still there."""
    result = duplicates(legacy, "guard", "--accept-homonyms")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "department: guarded. Marked 2 duplicates, normalised 0 keys, renamed 0 rows.",
        "  became duplicates by that, and were marked: 33 rows of employee",
        "  built uq_department_natural_key",
        "  dropped ix_department_natural_key",
        "employee: guarded. Marked 0 duplicates, normalised 0 keys, renamed 0 rows.",
        "  built uq_employee_natural_key",
        "  dropped ix_employee_natural_key",
        "From now on PostgreSQL refuses new duplicates. Next: flask duplicates merge --all",
    ]
    assert key_indexes(legacy) == GUARDS
    assert len(run(legacy, "SELECT FROM employee WHERE duplicate_of_id IS NULL")) == 200
    assert len(run(legacy, "SELECT FROM ticket")) == 2 * (233 // 3)


def test_guard_tells_of_keys_it_normalised_and_rows_it_moved(legacy: Flask) -> None:
    """A canonical row with a key of its own spelling, and one alone in a doubled department."""
    run(
        legacy,
        "INSERT INTO employee (name, department_id) VALUES ('Only  There', 4), ('Only  Here', 3)",
    )
    result = duplicates(legacy, "guard", "--accept-homonyms")
    assert "  moved 1 rows: employee.department_id" in result.stdout.splitlines()
    assert "employee: guarded. Marked 0 duplicates, normalised 2 keys" in result.stdout
    found = run(legacy, "SELECT name, department_id FROM employee WHERE id > 233 ORDER BY id")
    assert found == [("Only There", 1), ("Only Here", 3)]


def test_guard_can_be_read_by_a_script_and_run_again(legacy: Flask) -> None:
    """With --json; the second run finds nothing to do."""
    first = json.loads(duplicates(legacy, "guard", "--accept-homonyms", "--json").stdout)
    assert (first["department"]["marked"], first["department"]["passes"]) == (2, 1)
    assert first["department"]["collapsed"] == {"employee": 33}
    before = everything(legacy)
    again = duplicates(legacy, "guard", "--json")
    assert json.loads(again.stdout)["employee"] == {
        "table": "employee",
        "marked": 0,
        "normalised": 0,
        "renamed": 0,
        "moved": {},
        "collapsed": {},
        "passes": 1,
        "actions": [],
    }
    assert everything(legacy) == before


def test_homonyms_are_listed_and_nothing_is_changed(legacy: Flask) -> None:
    """With what differs, and how to decide."""
    before = everything(legacy)
    result = duplicates(legacy, "guard")
    assert (result.exit_code, result.stdout) == (1, "")
    *listed, last = result.stderr.splitlines()
    assert listed == [
        "  employee 31, 231 (Person 31, 2): differ in title",
        "  employee 32, 232 (Person 32, 1): differ in title",
        "  employee 33, 233 (Person 33, 2): differ in title",
    ]
    assert "3 groups may be different people of one name; nothing was changed." in last
    assert "--accept-homonyms" in last
    assert everything(legacy) == before
    assert key_indexes(legacy) == LOOKUPS


def test_many_homonyms_are_not_all_listed(legacy: Flask) -> None:
    """Twenty, and how many more there are."""
    run(legacy, "UPDATE employee SET title = 'Poet' WHERE id BETWEEN 201 AND 220")
    result = duplicates(legacy, "guard")
    assert len(result.stderr.splitlines()) == 20 + 2
    assert "  and 3 more" in result.stderr.splitlines()


def test_the_kept_row_is_chosen_by_a_policy(legacy: Flask) -> None:
    """--keep newest."""
    assert duplicates(legacy, "guard", "--accept-homonyms", "--keep", "newest").exit_code == 0
    assert run(legacy, "SELECT duplicate_of_id FROM employee WHERE id = 1") == [(201,)]


def test_a_dry_run_writes_a_plan_and_changes_nothing(legacy: Flask, tmp_path: Path) -> None:
    """To standard output, or to a file; a group says all that a person needs to decide."""
    before = everything(legacy)
    shown = duplicates(legacy, "guard", "--dry-run")
    assert shown.stderr == "Planned 35 groups; nothing was changed.\n"
    plan = json.loads(shown.stdout)
    assert len(plan["groups"]) == 35
    assert plan["groups"][-1] == {
        "table": "employee",
        "key": {"name": "Person 33", "department_id": 2},
        "kept": 33,
        "duplicates": [233],
        "marked": [],
        "repoint": {},
        "fill": {},
        "collisions": [],
        "homonyms": {"title": {"33": "Clerk", "233": "Poet"}},
        "decision": None,
        "rename": {},
    }
    path = tmp_path / "plan.json"
    written = duplicates(legacy, "guard", "--dry-run", "--output", str(path))
    assert (written.exit_code, written.stdout) == (0, "")
    assert json.loads(path.read_text("utf-8")) == plan
    assert everything(legacy) == before


def test_guard_follows_an_edited_plan(legacy: Flask, tmp_path: Path) -> None:
    """The same person, another name for one, and another row to keep."""
    plan = make_plan(
        legacy,
        tmp_path / "plan.json",
        employee_1={"kept": 201, "duplicates": [1]},
        employee_31={"decision": "same"},
        employee_32={"rename": {"232": {"name": "Person 32 the Poet"}}},
        employee_33={"rename": {"33": {"name": "Person 33 the Clerk"}}},
    )
    result = duplicates(legacy, "guard", "--plan", plan)
    assert result.exit_code == 0, result.stderr
    assert "renamed 2 rows" in result.stdout
    marks = dict(run(legacy, "SELECT id, duplicate_of_id FROM employee")).__getitem__
    assert [marks(id) for id in (1, 201, 31, 231)] == [201, None, None, 31]
    assert [marks(id) for id in (32, 232, 33, 233)] == [None] * 4
    names = dict(run(legacy, "SELECT id, name FROM employee"))
    assert (names[232], names[33]) == ("Person 32 the Poet", "Person 33 the Clerk")


def test_what_is_left_of_a_group_after_a_rename_is_decided_with_it(
    legacy: Flask, tmp_path: Path
) -> None:
    """Of three rows one gets another name; the other two are the same, or do not differ."""
    run(
        legacy,
        "INSERT INTO employee (name, department_id, title)"
        " VALUES ('Person 31', 2, 'Smith'), ('Person 32', 1, 'Clerk'), ('Person 33', 2, 'Poet')",
    )
    plan = make_plan(
        legacy,
        tmp_path / "plan.json",
        employee_31={"decision": "same", "rename": {"234": {"name": "Person 31 Smith"}}},
        employee_32={"rename": {"232": {"name": "Person 32 the Poet"}}},
        employee_33={"rename": {"33": {"name": "Person 33 the Clerk"}}},
    )
    result = duplicates(legacy, "guard", "--plan", plan)
    assert result.exit_code == 0, result.stderr
    marks = dict(run(legacy, "SELECT id, duplicate_of_id FROM employee"))
    assert [marks[id] for id in (231, 232, 234, 235)] == [31, None, None, 32]
    assert [marks[id] for id in (33, 233, 236)] == [None, None, 233]


def test_a_plan_that_leaves_homonyms_open_changes_nothing(legacy: Flask, tmp_path: Path) -> None:
    """Not even the names that it gives."""
    plan = make_plan(
        legacy,
        tmp_path / "plan.json",
        employee_31={"rename": {"231": {"name": "Person 31 the Poet"}}},
        employee_32={"decision": "same"},
    )
    before = everything(legacy)
    result = duplicates(legacy, "guard", "--plan", plan)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0].startswith("  employee 33, 233")
    assert "1 groups" in result.stderr
    assert everything(legacy) == before


def test_a_name_that_others_have_makes_them_homonyms(legacy: Flask, tmp_path: Path) -> None:
    """They are listed after the rename, which is kept: the next plan is about them."""
    plan = make_plan(
        legacy,
        tmp_path / "plan.json",
        employee_31={"rename": {"231": {"name": "Person 33"}}},
        employee_32={"decision": "same"},
        employee_33={"decision": "same"},
    )
    result = duplicates(legacy, "guard", "--plan", plan)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0].startswith("  employee 33, 231, 233")


@pytest.mark.parametrize("accept", [[], ["--accept-homonyms"]])
def test_a_guard_cannot_leave_a_group_as_it_is(
    legacy: Flask, tmp_path: Path, accept: list[str]
) -> None:
    """What the plan leaves is listed, homonyms or not."""
    decided = {"decision": "same"}
    plan = make_plan(
        legacy, tmp_path / "plan.json",
        employee_1={"decision": "leave"},
        employee_31=decided, employee_32=decided, employee_33=decided,
    )  # fmt: skip
    before = everything(legacy)
    result = duplicates(legacy, "guard", "--plan", plan, *accept)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "  employee 1, 201 (Person 1, 2): left by the plan"
    assert everything(legacy) == before


GROUP = {"table": "employee", "kept": 1, "duplicates": [201]}
BAD_PLANS = [
    ("", "it is not JSON"),
    ("\udcff", "it is not JSON"),
    ("[" * 100_000, "it is not JSON"),
    ("[]", "it does not begin with"),
    ({"rollcall_plan": 2, "groups": []}, "it does not begin with"),
    ({"rollcall_plan": 1}, "it has no list of groups"),
    ([5], "group 1 is no object"),
    ([{**GROUP, "table": "zoo"}], "group 1: there is no table zoo"),
    ([GROUP, {**GROUP, "table": "Employee", "kept": 2}], "group 2: there is no table Employee"),
    ([{**GROUP, "kept": None}], "needs a table and the id of the row to keep"),
    ([{**GROUP, "kept": True}], "needs a table and the id of the row to keep"),
    ([{**GROUP, "kept": 1.0}], "needs a table and the id of the row to keep"),
    ([{**GROUP, "duplicates": []}], "needs a list of the ids of its duplicates"),
    ([{**GROUP, "duplicates": [None]}], "needs a list of the ids of its duplicates"),
    ([{**GROUP, "duplicates": [1]}], "employee 1 is there more than once"),
    ([GROUP, GROUP], "employee 1 is there more than once"),
    ([{**GROUP, "decision": "perhaps"}], 'decision is "same", "leave" or null'),
    ([{**GROUP, "decision": ["same"]}], 'decision is "same", "leave" or null'),
    ([{**GROUP, "rename": {"7": {"name": "x"}}}], "rename is by ids of the group"),
    ([{**GROUP, "rename": {"201": "x"}}], "rename gives columns of the key"),
    ([{**GROUP, "fill": [201]}], "fill gives, by column, the id"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_PLANS)
def test_a_bad_plan_is_one_line_that_names_the_file_and_the_group(
    app: Flask, tmp_path: Path, content: Any, words: str
) -> None:
    """Before anything is looked at, whichever command is to follow it."""
    path = tmp_path / "plan.json"
    groups = {"rollcall_plan": 1, "groups": content} if isinstance(content, list) else content
    written = content if isinstance(content, str) else json.dumps(groups)
    path.write_text(written, "utf-8", errors="surrogateescape")
    for command in ("guard", "merge"):
        result = duplicates(app, command, "--plan", str(path))
        one_line(result, words)
        assert f"{path}: " in result.stderr


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"title": "x"}, "the key of employee is department_id, name"),
        ({"name": None}, "null value in column"),
        ({"name": "x" * 200}, "value too long"),
        ({"name": "a\0b"}, "unsupported Unicode escape sequence"),
        ({"name": "\ud800"}, "invalid input syntax for type json"),
        ({"department_id": 77}, "violates foreign key constraint"),
        ({"department_id": "x"}, "invalid input syntax for type integer"),
    ],
)
def test_a_key_that_cannot_be_given_is_one_line(
    legacy: Flask, tmp_path: Path, rename: dict[str, Any], words: str
) -> None:
    """In the words of the database, where it is the one that refuses."""
    plan = make_plan(legacy, tmp_path / "plan.json", employee_1={"rename": {"201": rename}})
    before = everything(legacy)
    one_line(duplicates(legacy, "guard", "--accept-homonyms", "--plan", plan), words)
    assert everything(legacy) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["guard", "--keep", "tallest"], "Invalid value for '--keep'"),
        (["guard", "--lock-timeout", "0"], "Invalid value for '--lock-timeout'"),
        (["guard", "--plan", "nowhere.json"], "nowhere.json"),
        (["guard", "--dry-run", "--plan", "setup.cfg"], "--dry-run writes a plan"),
        (["guard", "employee"], "unexpected extra argument"),
        (["unguard", "--mark"], "No such option"),
        (["status", "--csv"], "No such option"),
    ],
)
def test_a_bad_option_is_refused(app: Flask, arguments: list[str], words: str) -> None:
    """Exit status 2, and what is wrong with it."""
    one_line(duplicates(app, *arguments), words, status=2)


@pytest.mark.parametrize("command", ["guard", "merge"])
def test_a_plan_that_cannot_be_written_is_one_line(
    legacy: Flask, tmp_path: Path, command: str
) -> None:
    """A full disk; a folder that is not there."""
    full = duplicates(legacy, command, "--dry-run", "--output", "/dev/full")
    one_line(full, "/dev/full: No space left on device")
    missing = duplicates(legacy, command, "--dry-run", "--output", f"{tmp_path}/no/plan.json")
    one_line(missing, "plan.json")


def test_writers_below_serializable_are_refused_only_until_the_guard_stands(
    legacy: Flask,
) -> None:
    """The trigger is gone after it, and its function."""
    result = duplicates(legacy, "guard", "--accept-homonyms", "--refuse-unsafe-writers")
    assert result.exit_code == 0
    assert run(legacy, "SELECT FROM pg_trigger WHERE tgname LIKE 'rollcall%'") == []
    assert run(legacy, "SELECT FROM pg_proc WHERE proname LIKE 'rollcall%'") == []


def test_a_guard_that_waits_too_long_names_who_holds_it_up(
    legacy: Flask, legacy_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, with the pid; run again it finishes."""
    monkeypatch.setattr("migrations_bootstrap.indexes.PATIENCE", 0.01)
    engine = create_engine(legacy_url, poolclass=NullPool)
    with engine.connect() as writer:
        pid = writer.scalar(text("SELECT pg_backend_pid()"))
        writer.exec_driver_sql("LOCK TABLE department IN ROW EXCLUSIVE MODE")
        result = duplicates(legacy, "guard", "--accept-homonyms", "--lock-timeout", "1")
    one_line(result, f"pid {pid}")
    assert duplicates(legacy, "guard", "--accept-homonyms").exit_code == 0
    assert key_indexes(legacy) == GUARDS


@contextmanager
def stopped(engine: Engine, url: str, *arguments: str) -> Iterator[str]:
    """Stop a command by Ctrl-C while it waits for a lock; yield what it says on standard error."""
    with subprocess.Popen(
        [FLASK, "duplicates", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            eventually(lambda: waits(engine) > 0)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, stdout) == (130, "")
    yield stderr


def test_a_guard_that_is_stopped_can_be_run_again(legacy: Flask, legacy_url: str) -> None:
    """Ctrl-C ends it at once, with status 130, also while the server works."""
    engine = create_engine(legacy_url, poolclass=NullPool)
    with engine.connect() as writer:
        writer.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('New', 3)")
        with stopped(engine, legacy_url, "guard", "--accept-homonyms") as said:
            assert said.splitlines()[-1] == "Stopped."
            assert "Traceback" not in said
        writer.commit()
    assert "employee: guarded." in duplicates(legacy, "guard", "--accept-homonyms").stdout
    assert key_indexes(legacy) == GUARDS


def test_the_commands_work_as_an_operator_calls_them(legacy: Flask, legacy_url: str) -> None:
    """As processes of their own, by their exit status."""
    env = {"DATABASE_URL": legacy_url}
    assert flask("duplicates", "guard", **env).returncode == 1
    assert flask("duplicates", "guard", "--accept-homonyms", **env).returncode == 0
    assert status(legacy)[-1].startswith("Next: flask duplicates merge")


def test_an_unguarded_table_stays_so_until_somebody_guards_it(
    marked: Flask, marked_url: str
) -> None:
    """A start of the service does not put the guard back; neither does init-db."""
    result = duplicates(marked, "unguard")
    assert (result.exit_code, result.stdout.splitlines()) == (0, [
        "employee: not guarded any more. Restored 0 rows.",
        "department: not guarded any more. Restored 0 rows.",
    ])  # fmt: skip
    assert key_indexes(marked) == LOOKUPS
    assert [table.guard for table in bootstrap(marked_url, NATURAL_KEYS).tables] == [False, False]
    assert marked.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
    assert key_indexes(marked) == LOOKUPS
    assert duplicates(marked, "guard").exit_code == 0
    assert key_indexes(marked) == GUARDS
    assert [table.guard for table in bootstrap(marked_url, NATURAL_KEYS).tables] == [True, True]


def test_unguard_can_take_the_marks_off_too(legacy: Flask) -> None:
    """Every row is as it was before the guard."""
    run(legacy, "INSERT INTO employee (name, department_id) VALUES ('Only  There', 4)")
    before = rows(legacy)
    assert duplicates(legacy, "guard", "--accept-homonyms").exit_code == 0
    result = duplicates(legacy, "unguard", "--unmark", "--json")
    restored = json.loads(result.stdout)
    assert restored == {"employee": {"restored": 1}, "department": {"restored": 36}}
    assert rows(legacy) == before
    assert key_indexes(legacy) == LOOKUPS


def test_marks_stay_while_merges_rely_on_them(marked: Flask) -> None:
    """Refused in one line before either table is touched, whichever the merges are of."""
    for table in ("department", "employee"):
        assert duplicates(marked, "merge", "--all", "--table", table).exit_code == 0
        before = everything(marked)
        result = duplicates(marked, "unguard", "--unmark")
        one_line(result, "are journalled")
        assert "undo them before their marks" in result.stderr
        assert everything(marked) == before
        assert key_indexes(marked) == GUARDS
    assert duplicates(marked, "unguard").exit_code == 0


def test_marks_without_a_journal_stay(marked: Flask) -> None:
    """Nothing says what there was before them; the guards go all the same."""
    run(marked, "DROP TABLE rollcall_change, rollcall_merge")
    before = rows(marked)
    result = duplicates(marked, "unguard", "--unmark", "--json")
    assert json.loads(result.stdout)["department"] == {"restored": 0}
    assert rows(marked) == before
    assert key_indexes(marked) == LOOKUPS


def status(app: Flask) -> list[str]:
    """Return what status prints, its first line after the table first."""
    result = duplicates(app, "status")
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


def test_status_says_which_rung_each_table_is_on_and_what_comes_next(legacy: Flask) -> None:
    """Adopted, guarded, merged, clean."""
    said = status(legacy)
    assert said[0].split() == [
        "table",
        "is",
        "guard",
        "rows",
        "unmarked",
        "marked",
        "to",
        "merge",
        "merges",
    ]
    assert said[2].split() == ["department", "adopted", "none", "5", "2", "0", "0", "0"]
    assert said[3].split() == ["employee", "adopted", "none", "233", "33", "0", "0", "0"]
    assert said[4:] == ["Next: flask duplicates guard"]
    duplicates(legacy, "guard", "--accept-homonyms")
    said = status(legacy)
    assert said[3].split() == ["employee", "guarded", "valid", "233", "0", "33", "33", "0"]
    assert said[4:] == ["Next: flask duplicates merge --all"]
    duplicates(legacy, "merge", "--all")
    said = status(legacy)
    assert said[3].split() == ["employee", "merged", "valid", "233", "0", "33", "0", "33"]
    assert said[4:] == ["Next: flask duplicates purge --older-than 30d"]
    duplicates(legacy, "purge", "--older-than", "0d", "--yes")
    said = status(legacy)
    assert said[3].split() == ["employee", "clean", "valid", "200", "0", "0", "0", "0"]
    assert said[4:] == ["Next: nothing, there are no duplicates and there can be none"]


def test_status_advises_by_the_table_that_is_furthest_behind(marked: Flask) -> None:
    """Also one whose journal is gone: its marks wait to be merged."""
    duplicates(marked, "merge", "--all", "--table", "department")
    assert status(marked)[2].split()[1] == "merged"
    assert status(marked)[-1] == "Next: flask duplicates merge --all"
    run(marked, "DROP TABLE rollcall_change, rollcall_merge")
    assert [line.split()[1] for line in status(marked)[2:4]] == ["guarded", "guarded"]


def test_status_tells_of_a_guard_whose_build_failed(marked: Flask) -> None:
    """And guard repairs it."""
    run(
        marked,
        "UPDATE pg_index SET indisvalid = false"
        " WHERE indexrelid = 'uq_employee_natural_key'::regclass",
    )
    said = status(marked)
    assert said[3].split()[1:3] == ["adopted", "invalid"]
    assert said[4] == (
        "employee: the build of its guard failed; flask duplicates guard repairs it."
    )
    assert duplicates(marked, "guard").exit_code == 0
    assert status(marked)[3].split()[1:3] == ["guarded", "valid"]


def test_status_names_those_who_may_make_duplicates(legacy: Flask, legacy_url: str) -> None:
    """Rows that came past get_or_create, and whoever writes now below SERIALIZABLE."""
    engine = create_engine(f"{legacy_url}&application_name=psql", poolclass=NullPool)
    with engine.connect() as writer:
        writer.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('Cy', 1)")
        writer.commit()
        pid = writer.scalar(text("SELECT pg_backend_pid()"))
        writer.exec_driver_sql("INSERT INTO employee (name, department_id) VALUES ('Di', 1)")
        said = status(legacy)
        found = json.loads(duplicates(legacy, "status", "--json").stdout)
    assert said[4].startswith("employee: 1 rows were written past get_or_create, the last at 20")
    assert said[5].startswith(f"employee: is being written by pid {pid} (psql, for 0 s), which")
    assert found["department"]["unsafe_writers"] == []
    assert found["employee"]["written_by_others"] == 1
    assert found["employee"]["unsafe_writers"][0]["pid"] == pid
    assert found["employee"]["rung"] == "adopted"


COMMANDS = [
    ["guard"],
    ["guard", "--dry-run"],
    ["unguard"],
    ["unguard", "--unmark"],
    ["status"],
    ["status", "--json"],
    ["merge", "--all"],
    ["merge", "--dry-run"],
    ["undo", "1"],
    ["undo", "--all"],
    ["purge", "--older-than", "0d", "--yes"],
    ["report"],
]


def test_a_database_that_is_away_is_one_line(make_app: Callable[..., Flask]) -> None:
    """For each command, without the password."""
    app = make_app("postgresql://u:secret@127.0.0.1:1/d", ROLLCALL_RETRY_ATTEMPTS=1)
    for arguments in COMMANDS:
        result = duplicates(app, *arguments)
        one_line(result, "")
        assert "secret" not in result.output


def test_a_database_that_was_never_adopted_is_one_line(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """That says what to run, for each command."""
    app = make_app(fresh_database)
    run(
        app,
        "CREATE TABLE department (id int, name text)",
        "CREATE TABLE employee (id int, department_id int, name text)",
    )
    for arguments in COMMANDS:
        one_line(duplicates(app, *arguments), "run flask init-db first")


def test_an_empty_database_is_one_line(make_app: Callable[..., Flask], fresh_database: str) -> None:
    """There is no table at all."""
    app = make_app(fresh_database)
    for arguments in (["status"], ["merge", "--all"], ["guard"]):
        one_line(duplicates(app, *arguments), "run flask init-db first")


def test_a_database_of_an_earlier_version_is_one_line(legacy: Flask) -> None:
    """It has no journal yet."""
    run(legacy, "DROP TABLE rollcall_change, rollcall_merge")
    words = "there is no journal of merges beside the table department: run flask init-db first"
    purge = ["purge", "--older-than", "0d", "--yes"]
    for arguments in (["merge", "--all"], ["undo", "1"], ["undo", "--all"], purge):
        one_line(duplicates(legacy, *arguments), words)


def test_the_commands_go_past_a_pooler(make_app: Callable[..., Flask], legacy_url: str) -> None:
    """By ROLLCALL_ADMIN_URL, where it is set: nobody listens at the other."""
    app = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_ADMIN_URL=legacy_url)
    assert "guarded" in duplicates(app, "guard", "--accept-homonyms").stdout
    assert json.loads(duplicates(app, "merge", "--all", "--json").stdout)["employee"]["merged"]
    assert duplicates(app, "undo", "--all").exit_code == 0
    assert duplicates(app, "status").exit_code == 0
    assert duplicates(app, "purge", "--older-than", "0d", "--yes").exit_code == 0
    assert duplicates(app, "unguard", "--unmark").exit_code == 0


def test_tables_in_two_schemas_climb_the_ladder(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """With one journal for both, whatever the schemas are called."""
    app = make_app(fresh_database)
    with app.app_context(), db.engine.begin() as connection:
        connection.execution_options(no_parameters=True).exec_driver_sql(
            'CREATE SCHEMA "Old %s";'
            f'ALTER DATABASE "{db.engine.url.database}" SET search_path = public, "Old %s";'
            'CREATE TABLE "Old %s".department (id int, name text);'
            "CREATE TABLE employee (id int, department_id int, name text, note text);"
            """INSERT INTO "Old %s".department VALUES (1, 'Ops'), (2, 'Ops '), (3, 'HR');"""
            "INSERT INTO employee VALUES (1, 1, 'Ann', NULL), (2, 2, 'Ann', 'x'),"
            " (3, 3, 'Bo', NULL), (4, 3, 'Bo', NULL)"
        )
    with app.app_context():
        db.engine.dispose()
    assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
    before = run(app, "SELECT * FROM employee ORDER BY id")
    assert duplicates(app, "guard").exit_code == 0
    merged = json.loads(duplicates(app, "merge", "--all", "--json").stdout)
    assert (merged["department"]["merged"], merged["employee"]["merged"]) == (1, 2)
    assert duplicates(app, "undo", "--all").exit_code == 0
    assert duplicates(app, "unguard", "--unmark").exit_code == 0
    assert run(app, "SELECT * FROM employee ORDER BY id") == before
    assert duplicates(app, "guard").exit_code == 0
    assert duplicates(app, "merge", "--all").exit_code == 0
    assert duplicates(app, "purge", "--older-than", "0d", "--yes").exit_code == 0
    assert status(app)[-1].startswith("Next: nothing")
