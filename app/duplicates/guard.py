"""Enforce a natural key with its duplicates still in place: mark them, then build the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError

from app.duplicates import journal
from app.duplicates.groups import Group, find_groups
from app.duplicates.marking import Marker
from app.duplicates.merging import Rules
from app.duplicates.plan import LEAVE, Decisions
from app.duplicates.tables import KeyedTable, Model, SoftReference, Tables, read_tables
from app.duplicates.undo import undo
from app.duplicates.writers import admit_all_writers, refuse_unsafe_writers
from app.errors import HomonymsFound, MergesRemain, NotGuarded, UnusablePlan
from app.transactions import RetryPolicy
from migrations_bootstrap import BootstrapError, build_guard_at_once, converge_indexes
from migrations_bootstrap.catalogue import get_table

# Writers whom nothing holds off may make new duplicates while the index is built. After so many
# builds in vain they have to wait for one.
PASSES = 3

Tell = Callable[[str, int], object]


@dataclass
class Guarded:
    """What the guard of one table took."""

    table: str
    marked: int = 0
    normalised: int = 0
    renamed: int = 0
    moved: dict[str, int] = field(default_factory=dict)  # rows that came along, by reference
    collapsed: dict[str, int] = field(default_factory=dict)  # duplicates for it, by table
    passes: int = 0
    actions: tuple[str, ...] = ()


def guard(
    engine: Engine,
    model: Model,
    *,
    rules: Rules = Rules(),  # noqa: B008 - frozen
    decisions: Decisions | None = None,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    refuse_unsafe: bool = False,
    soft_references: Sequence[SoftReference] = (),
    lock_timeout: float = 300,
    tell: Tell = lambda what, count: None,
) -> list[Guarded]:
    """Guard a model's table, and before it those that its natural key refers to.

    Marks duplicates, gives stored keys their normal form, and builds the guard online, again and
    again while new duplicates arrive. It may be interrupted and run again. ``refuse_unsafe`` has
    writers below SERIALIZABLE refused meanwhile. ``tell`` is told what is done, and how much.

    Raises HomonymsFound and UnusablePlan before anything is changed but for the names that the plan
    gives, NotGuarded where duplicates keep arriving, and BootstrapError, which names who holds up
    an index build for more than ``lock_timeout`` seconds.
    """
    with engine.connect() as connection:
        tables = read_tables(connection, model, soft_references)
        wanted = tables.in_order(tables.of(model))
        _require_found_by_name(connection, wanted)
    decisions = decisions or Decisions()
    _require_keys(wanted, decisions)
    _require_decided(engine, tables, wanted, rules, decisions, before_renaming=True)
    for table in wanted:
        journal.create(engine, table)
    renamed = {table.oid: _rename(engine, tables, table, decisions, policy) for table in wanted}
    if any(renamed.values()):  # which may have brought rows together with others
        _require_decided(engine, tables, wanted, rules, decisions)
    outcomes = []
    for table in wanted:
        marker = Marker(engine, tables, table, rules, policy, decisions)
        if refuse_unsafe:
            refuse_unsafe_writers(engine, table, lock_timeout)
        outcome = _guard(engine, marker, lock_timeout, tell)
        outcomes.append(replace(outcome, renamed=renamed[table.oid]))
        admit_all_writers(engine, table, lock_timeout)
    return outcomes


def undecided(
    engine: Engine, tables: Tables, table: KeyedTable, rules: Rules, decisions: Decisions
) -> Iterator[Group]:
    """Yield the groups that may be different people, and that nobody has decided on.

    So are those that a plan leaves as they are, which no guard can.
    """
    with engine.connect() as connection:
        for group in find_groups(connection, tables, table, rules.keep, which="unmarked"):
            same = rules.accept_homonyms or decisions.are_same(group)
            if decisions.leave(group) or (group.are_homonyms and not same):
                yield group


def _require_found_by_name(connection: Connection, wanted: list[KeyedTable]) -> None:
    """Refuse tables whose indexes cannot be built, which are found by their bare names."""
    for table in wanted:
        if get_table(connection, table.name).oid != table.oid:
            raise BootstrapError(f"another table is called {table.name!r} on the search path")


def _require_decided(
    engine: Engine,
    tables: Tables,
    wanted: list[KeyedTable],
    rules: Rules,
    decisions: Decisions,
    before_renaming: bool = False,
) -> None:
    """Raise HomonymsFound; a group that some row is about to leave is looked at after that."""
    if rules.accept_homonyms and not any(one.decision == LEAVE for one in decisions.groups):
        return
    groups = [
        one
        for table in wanted
        for one in undecided(engine, tables, table, rules, decisions)
        if not (before_renaming and decisions.renames(one))
    ]
    if groups:
        raise HomonymsFound(groups)


def _require_keys(wanted: list[KeyedTable], decisions: Decisions) -> None:
    keys = {table.name: table.key for table in wanted}
    for group in decisions.groups:
        for key in group.rename.values():
            if not key.keys() <= set(keys.get(group.table, key)):
                raise UnusablePlan(f"the key of {group.table} is {', '.join(keys[group.table])}")


def _rename(
    engine: Engine, tables: Tables, table: KeyedTable, decisions: Decisions, policy: RetryPolicy
) -> int:
    """Give rows the keys that the plan gives them; return how many had another one."""
    marker = Marker(engine, tables, table, Rules(), policy, decisions)
    keys = decisions.new_keys(table.name)
    renamed = 0
    for id, key in keys.items():
        try:
            renamed += marker.rekey({id: key})
        except (IntegrityError, DataError) as error:
            reason = f"{table.name} {id} cannot be given {dict(key)}: {error.orig}"
            raise UnusablePlan(reason) from error
    return renamed


def _guard(engine: Engine, marker: Marker, lock_timeout: float, tell: Tell) -> Guarded:
    outcome = Guarded(marker.table.name)
    for _ in range(PASSES):
        outcome.marked += marker.mark_all(lambda count: tell(f"{outcome.table}: marked", count))
        if _converges(engine, marker, outcome, lock_timeout, tell):
            return outcome
    tell(f"{outcome.table}: new duplicates keep arriving, writers wait for the guard", 0)
    outcome.marked += marker.mark_last(
        lambda connection: build_guard_at_once(connection, outcome.table, marker.table.key)
    )
    if _converges(engine, marker, outcome, lock_timeout, tell):
        return outcome
    raise NotGuarded(f"somebody else took the guard of {outcome.table} off meanwhile: run it again")


def _converges(
    engine: Engine, marker: Marker, outcome: Guarded, lock_timeout: float, tell: Tell
) -> bool:
    """Give stored keys their normal form and build the guard; tell whether it stands."""
    name = outcome.table
    outcome.passes += 1
    outcome.normalised += marker.normalise_all(lambda count: tell(f"{name}: normalised", count))
    tell(f"{name}: building the guard", 0)
    (built,) = converge_indexes(
        engine.url, {name: marker.table.key}, guard=True, lock_timeout=lock_timeout
    )
    outcome.actions += built.actions
    outcome.moved, outcome.collapsed = dict(marker.moved), dict(marker.collapsed)
    return built.guard


def unguard(
    engine: Engine,
    model: Model,
    *,
    unmark: bool = False,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    lock_timeout: float = 300,
    tell: Tell = lambda what, count: None,
) -> int:
    """Put the look-up index back and drop the guard; a start does not build it again.

    Writers whom a guard that came to no end has left refused are admitted again. With ``unmark``
    the marks and the keys are put back to what they were before the guard. Returns how many rows
    that changed. Raises MergesRemain before anything is changed.
    """
    with engine.connect() as connection:
        tables = read_tables(connection, model)
        table = tables.of(model)
        _require_found_by_name(connection, [table])
        marks = _marks(connection, tables, table) if unmark else []
    converge_indexes(engine.url, {table.name: table.key}, guard=False, lock_timeout=lock_timeout)
    admit_all_writers(engine, table, lock_timeout)
    restored = 0
    for mark in marks:
        restored += undo(engine, table, mark, policy, journal.MARK)
        tell(f"{table.name}: restored", restored)
    return restored


def require_unmerged(engine: Engine, model: Model) -> None:
    """Raise MergesRemain where merges are journalled, which marks cannot be taken off below."""
    with engine.connect() as connection:
        tables = read_tables(connection, model)
        _marks(connection, tables, tables.of(model))


def _marks(connection: Connection, tables: Tables, table: KeyedTable) -> list[int]:
    """Return the entries to undo. Merges rely on them, those of rows that moved along too."""
    if not journal.exists(connection, table):
        return []
    entries = "table_name = ANY (%(tables)s) AND undone_at IS NULL AND action = %(action)s"
    names = [table.name, *(child.name for child, _ in tables.children(table))]
    merges, marks = (
        journal.entries(connection, table, entries, {"tables": of, "action": action})
        for of, action in ((names, journal.MERGE), (names[:1], journal.MARK))
    )
    if merges:
        raise MergesRemain(
            f"{len(merges)} merges of {', '.join(sorted({one.table for one in merges}))}"
            " are journalled: undo them before their marks, unless they are purged"
        )
    return [entry.id for entry in marks]
