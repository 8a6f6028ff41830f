"""What is valid: the short way to the answer, beside marshmallow's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from marshmallow import Schema, ValidationError

from app.schemas import (
    EmployeeBatchSchema,
    EmployeeSchema,
    ImportedEmployeeSchema,
    _remembered,
)

SCHEMAS = {
    "single": EmployeeSchema(),
    "change": EmployeeSchema(partial=True),
    "row": ImportedEmployeeSchema(),
}
TEXTS = ("", " ", "Ada  Lovelace ", "a\0b", "é" * 256, "ada@example.org", "2004-01-15", "20040115")
OTHERS = (None, True, 0, 1, 2**63, 1.0, [], ["Ada"], {}, {"name": "Ada"})
VALUES = st.sampled_from((*TEXTS, *OTHERS))
NAMES = st.sampled_from([*EmployeeSchema().fields, "unknown", 3])
ITEMS = st.dictionaries(NAMES, VALUES, max_size=6) | VALUES
VALID = {"name": "Ada", "department": "Research", "hired_on": "2004-01-15"}


def outcome(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what comes of it, or the messages."""
    try:
        return load(*arguments, **options)
    except ValidationError as error:
        return error.messages, error.valid_data


@pytest.mark.parametrize("kind", SCHEMAS)
@given(item=ITEMS)
@example(item=VALID)
@example(item={"name": "Ada", "department_id": True})
def test_one_is_loaded_as_marshmallow_does_it(kind: str, item: Any) -> None:
    """Short of nothing, and with nothing that it would refuse."""
    schema = SCHEMAS[kind]
    assert outcome(schema.load, item) == outcome(Schema.load, schema, item)


@pytest.mark.parametrize("kind", SCHEMAS)
@given(items=st.lists(ITEMS, max_size=3) | VALUES)
@example(items=[VALID, VALID])
def test_a_list_is_loaded_as_marshmallow_does_it(kind: str, items: Any) -> None:
    """With its messages at the place of each item, and the others' values."""
    schema = SCHEMAS[kind]
    loaded = outcome(schema.load, items, many=True)
    assert loaded == outcome(Schema.load, schema, items, many=True)


def test_a_recurring_value_is_refused_each_time() -> None:
    """What is remembered is what passed, not that it was seen."""
    item = {**VALID, "hired_on": "2004-02-30"}
    for _ in range(2):
        with pytest.raises(ValidationError) as caught:
            EmployeeBatchSchema().load({"items": [VALID, item]})
        assert caught.value.messages == {"items": {1: {"hired_on": ["Not a valid date."]}}}


def test_a_long_value_is_not_remembered() -> None:
    """A client could fill our memory with blanks, which are trimmed."""
    schema = EmployeeSchema()
    schema.load(VALID)
    before = _remembered.cache_info().currsize
    assert schema.load({**VALID, "title": f"Analyst{' ' * 10_000}"})["title"] == "Analyst"
    assert _remembered.cache_info().currsize == before
