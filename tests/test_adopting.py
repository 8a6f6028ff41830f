"""docs/adopting.md, followed to the letter by another application."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from migrations_bootstrap import converge_indexes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/adopting.md").read_text("utf-8")
SQL = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"`(\w+)\.py`", PAGE.partition("## 2.")[0])


@pytest.fixture
def borrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The files in a package of another name, which cannot import Rollcall or Flask."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    for name in FILES:
        text = (ROOT / f"app/{name}.py").read_text("utf-8")
        (package / f"{name}.py").write_text(text.replace("from app.", "from elsewhere."), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with monkeypatch.context() as blocked:
        for name in ("flask", "app"):
            blocked.setitem(sys.modules, name, None)
        yield importlib.import_module("elsewhere.get_or_create")
    for name in [name for name in sys.modules if name.partition(".")[0] == "elsewhere"]:
        del sys.modules[name]


@pytest.fixture
def legacy(fresh_database: str) -> Iterator[Engine]:
    """The other application's database: duplicates, and no constraint."""
    engine = create_engine(fresh_database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE tag (id serial PRIMARY KEY, label text NOT NULL, color text);"
            "INSERT INTO tag (label) VALUES ('old'), ('old'), ('other')"
        )
    yield engine
    engine.dispose()


def run_sql(engine: Engine, script: str) -> None:
    with engine.connect() as connection:
        for statement in filter(str.strip, script.split(";\n")):
            connection.exec_driver_sql(statement)


def run_python(script: str, names: dict[str, Any]) -> None:
    """Run a script of the page, without this module's own __future__ imports."""
    exec(compile(script, "docs/adopting.md", "exec", dont_inherit=True), names)  # noqa: S102


def test_another_application_can_take_the_mixin(borrowed: ModuleType, legacy: Engine) -> None:
    """Each step of the page, from a table with duplicates to a guarded one."""
    session = scoped_session(sessionmaker(legacy))
    names: dict[str, Any] = {
        "GetOrCreateMixin": borrowed.GetOrCreateMixin,
        "Base": type("Base", (DeclarativeBase,), {}),
        "Mapped": Mapped,
        "mapped_column": mapped_column,
        "engine": legacy,
        "session": session,
    }
    columns, guard = SQL
    model, use = PYTHON

    run_sql(legacy, columns)
    run_python(model, names)
    run_python(use, names)
    tag = names["tag"]
    assert (tag.label, tag.color, names["created"]) == ("urgent", "red", True)
    run_python(use, names)
    assert (names["tag"], names["created"]) == (tag, False)
    assert names["Tag"].get_or_create(label="old")[0].id == 1

    with pytest.raises(IntegrityError):
        run_sql(legacy, guard)
    run_sql(legacy, "DROP INDEX CONCURRENTLY uq_tag_natural_key")
    run_sql(legacy, "UPDATE tag SET duplicate_of_id = 1 WHERE id = 2")
    run_sql(legacy, guard)
    session.remove()
    with pytest.raises(IntegrityError):
        run_sql(legacy, "INSERT INTO tag (label) VALUES ('old')")
    session.remove()


def test_its_indexes_can_be_converged(legacy: Engine) -> None:
    """As the page says, instead of writing them by hand."""
    columns = SQL[0].partition(";")[0]
    run_sql(legacy, columns)
    url = legacy.url.render_as_string(hide_password=False)

    (with_duplicates,) = converge_indexes(url, {"tag": ["label"]})
    run_sql(legacy, "DELETE FROM tag WHERE id = 2")
    (without,) = converge_indexes(url, {"tag": ["label"]})

    assert (with_duplicates.guard, with_duplicates.lookup) == (False, True)
    assert (without.guard, without.lookup) == (True, False)
