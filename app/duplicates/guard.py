"""Enforce a natural key with its duplicates still in place: mark them, then build the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, Engine

from app.duplicates import journal
from app.duplicates.groups import Group, find_groups
from app.duplicates.marking import Marker
from app.duplicates.merging import Rules, differing
from app.duplicates.plan import LEAVE, Decisions
from app.duplicates.rows import read_rows
from app.duplicates.tables import KeyedTable, Model, SoftReference, Tables, read_tables
from app.duplicates.undo import undo
from app.duplicates.writers import admit_all_writers, refuse_unsafe_writers
from app.errors import HomonymsFound, MergesRemain, NotGuarded, UnusablePlan
from app.transactions import RetryPolicy
from migrations_bootstrap import converge_indexes

# Writers whom nothing holds off may make new duplicates while the index is built.
PASSES = 10

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

    Raises UnusablePlan and HomonymsFound before anything is changed, save that rows which get
    another key by ``decisions`` may have it, NotGuarded where duplicates keep arriving, and
    BootstrapError, which names who holds up an index build for more than ``lock_timeout`` seconds.
    """
    with engine.connect() as connection:
        tables = read_tables(connection, model, soft_references)
    wanted = in_order(tables, tables.of(model))
    decisions = decisions or Decisions()
    for table in wanted:
        journal.create(engine, table)
    _require_keys(wanted, decisions)
    _require_decided(engine, tables, wanted, rules, decisions)
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


def in_order(tables: Tables, table: KeyedTable) -> list[KeyedTable]:
    """Return the tables that the table's key refers to, directly or not, and then itself."""
    before = [one for parent in tables.parents(table) for one in in_order(tables, parent)]
    return list(dict.fromkeys([*before, table]))


def undecided(
    engine: Engine, tables: Tables, table: KeyedTable, rules: Rules, decisions: Decisions
) -> Iterator[Group]:
    """Yield the groups that may be different people, and that nobody has decided on.

    So are those that a plan leaves as they are, which no guard can.
    """
    with engine.connect() as connection:
        for group in find_groups(connection, tables, table, rules.keep, which="unmarked"):
            same = rules.accept_homonyms or decisions.are_same(group)
            if decisions.leave(group) or (
                not same and _are_homonyms(connection, tables, table, group, decisions)
            ):
                yield group


def _are_homonyms(
    connection: Connection, tables: Tables, table: KeyedTable, group: Group, decisions: Decisions
) -> bool:
    """Tell whether rows differ that no other key is planned for."""
    planned = decisions.of(group)
    if not group.are_homonyms or planned is None or not planned.rename:
        return group.are_homonyms
    rest = planned.without_renamed()
    rows = read_rows(connection, tables, table, list(rest.ids)) if rest else {}
    return bool(differing(list(rows.values())))


def _require_decided(
    engine: Engine, tables: Tables, wanted: list[KeyedTable], rules: Rules, decisions: Decisions
) -> None:
    if rules.accept_homonyms and not any(one.decision == LEAVE for one in decisions.groups):
        return
    groups = [one for table in wanted for one in undecided(engine, tables, table, rules, decisions)]
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
    renamed = 0
    for group in decisions.groups:
        if group.table == table.name and group.rename:
            keys = {id: group.rename[str(id)] for id in group.ids if str(id) in group.rename}
            renamed += marker.rekey(keys)
    return renamed


def _guard(engine: Engine, marker: Marker, lock_timeout: float, tell: Tell) -> Guarded:
    name = marker.table.name
    outcome = Guarded(name)
    for _ in range(PASSES):
        outcome.passes += 1
        outcome.marked += marker.mark_all(lambda count: tell(f"{name}: marked", count))
        outcome.normalised += marker.normalise_all(lambda count: tell(f"{name}: normalised", count))
        tell(f"{name}: building the guard", 0)
        (built,) = converge_indexes(
            engine.url, {name: marker.table.key}, guard=True, lock_timeout=lock_timeout
        )
        outcome.actions += built.actions
        if built.guard:
            outcome.moved, outcome.collapsed = dict(marker.moved), dict(marker.collapsed)
            return outcome
    raise NotGuarded(
        f"new duplicates of {name} keep arriving: run it again with --refuse-unsafe-writers"
    )


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

    With ``unmark`` the marks and the keys are put back to what they were before the guard. Returns
    how many rows that changed. Raises MergesRemain before anything is changed.
    """
    with engine.connect() as connection:
        table = read_tables(connection, model).of(model)
        marks = _marks(connection, table) if unmark else []
    converge_indexes(engine.url, {table.name: table.key}, guard=False, lock_timeout=lock_timeout)
    restored = 0
    for mark in marks:
        restored += undo(engine, table, mark, policy)
        tell(f"{table.name}: restored", restored)
    return restored


def require_unmerged(engine: Engine, model: Model) -> None:
    """Raise MergesRemain where merges are journalled, which marks cannot be taken off below."""
    with engine.connect() as connection:
        _marks(connection, read_tables(connection, model).of(model))


def _marks(connection: Connection, table: KeyedTable) -> list[int]:
    if not journal.exists(connection, table):
        return []
    of_table = "table_name = %(table)s AND undone_at IS NULL AND action = %(action)s"
    merges, marks = (
        journal.entries(connection, table, of_table, {"table": table.name, "action": action})
        for action in (journal.MERGE, journal.MARK)
    )
    if merges:
        raise MergesRemain(
            f"{len(merges)} merges of {table.name} are journalled: undo them before their marks"
        )
    return [entry.id for entry in marks]
