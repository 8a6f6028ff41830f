"""What one call of get_or_create asks for, checked before the database is touched."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper

from app.creation_token import new_tokens
from app.natural_key import columns_of, spellings

KEPT_BY_THE_MIXIN = frozenset({"creation_token", "duplicate_of_id"})


class Call(NamedTuple):
    """A key to look for, what to create the row with, and the token that says who created it."""

    key: tuple[tuple[Any, ...], ...]  # of each part: its spellings, none for NULL
    given: dict[str, Any]  # further columns
    token: uuid.UUID


def read_call(
    model: type[Any],
    defaults: Mapping[str, Any] | None = None,
    token: uuid.UUID | None = None,
    /,
    **key: Any,
) -> Call:
    """Return the call that the arguments of get_or_create make; its token is a new one, or given.

    Raises TypeError for a wrong key, an unknown column, or a column default that reads its context.
    """
    token = token or next(new_tokens(1))
    return _read(_rules_of(inspect(model)), token, defaults, **key)


def read_calls(model: type[Any], items: Sequence[Mapping[str, Any]]) -> list[Call]:
    """Do for each item, the arguments of a call, what :func:`read_call` does."""
    rules = _rules_of(inspect(model))
    tokens = new_tokens(len(items))
    return [_read(rules, token, **item) for item, token in zip(items, tokens, strict=True)]


def _read(
    rules: _Rules, token: uuid.UUID, /, defaults: Mapping[str, Any] | None = None, **key: Any
) -> Call:
    model = rules.model
    require_natural_key(model, key)
    given = dict(defaults or {})
    if not given.keys() <= rules.further:
        unknown = ", ".join(sorted(given.keys() - rules.further))
        raise TypeError(f"{unknown}: not among the defaults {model.__name__} can have")
    for name, default in rules.defaults:
        if name not in given:
            given[name] = default.arg(_NoContext()) if default.is_callable else default.arg
    texts = tuple([spellings(key[name]) for name in model.__natural_key__])
    return Call(texts, given, token)


def with_key(model: type[Any], call: Call, /, **key: Any) -> Call:
    """Return the same call with other values for some parts of its key."""
    parts = zip(model.__natural_key__, call.key, strict=True)
    texts = (spellings(key[name]) if name in key else given for name, given in parts)
    return call._replace(key=tuple(texts))


def require_natural_key(model: type[Any], key: Mapping[str, Any]) -> None:
    """Raise TypeError unless the key's names are those of the natural key."""
    if key.keys() != set(model.__natural_key__):
        expected, got = ", ".join(model.__natural_key__), ", ".join(key) or "nothing"
        raise TypeError(f"the natural key of {model.__name__} is {expected}; got {got}")


class _Rules(NamedTuple):
    """What the calls of a model may say."""

    model: type[Any]
    further: frozenset[str]  # what defaults may give
    defaults: tuple[tuple[str, Any], ...]  # the columns' own that an ORM flush runs in Python


@lru_cache(maxsize=256)
def _rules_of(mapper: Mapper[Any]) -> _Rules:
    model = mapper.class_
    columns = columns_of(model)
    further = frozenset(columns) - set(model.__natural_key__) - KEPT_BY_THE_MIXIN
    own: dict[str, Any] = {name: columns[name].default for name in sorted(further)}
    in_python = (
        (name, default)
        for name, default in own.items()
        if default is not None and (default.is_callable or default.is_scalar)
    )
    return _Rules(model, further, tuple(in_python))


class _NoContext:
    """Stands in for SQLAlchemy's execution context, which there is none of."""

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError("get_or_create cannot evaluate a column default that reads its context")
