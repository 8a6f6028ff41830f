"""Find the rows that are one record: the row of each that is kept, and its duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection

from app.duplicates import journal
from app.duplicates.tables import KeyedTable, Reference, Tables, blank_as_null, literal, quote

KEEP = ("oldest", "newest", "most-referenced", "most-complete")

Which = Literal["all", "marked", "unmarked"]

AT_ONCE = 500  # groups fetched


class Within(NamedTuple):
    """The rows that refer, by a column of their key, to any of some rows."""

    column: str
    ids: Sequence[Any]


class Page(NamedTuple):
    """Groups whose lowest canonical id is above another, and no more than so many."""

    after: Any
    limit: int


@dataclass(frozen=True)
class Group:
    """Rows with one natural key. Ids are as JSON has them: numbers or strings."""

    table: str
    kept: Any
    duplicates: tuple[Any, ...]
    marked: tuple[Any, ...]  # those of the duplicates that point at their kept row already
    key: Mapping[str, Any]  # of the row that is kept, as stored
    homonyms: tuple[str, ...]  # the columns that are filled in several rows, and differ
    references: Mapping[str, Mapping[str, int]]  # by id and reference, how many rows refer to it
    merged: tuple[Any, ...] = ()  # duplicates that were merged, and that rows refer to all the same
    settled: bool = False  # the kept row has duplicates already, so that no policy chooses

    @property
    def unmarked(self) -> tuple[Any, ...]:
        """The duplicates that no mark tells from canonical rows."""
        marked = set(self.marked)
        return tuple(id for id in self.duplicates if id not in marked)

    @property
    def lowest(self) -> Any:
        """The lowest id of its canonical rows, which pages are in the order of."""
        return min(self.kept, *self.unmarked) if self.unmarked else self.kept

    @property
    def are_homonyms(self) -> bool:
        """Tell whether a person has to say first that these rows are the same."""
        return bool(self.homonyms and self.unmarked)


def find_groups(
    connection: Connection,
    tables: Tables,
    table: KeyedTable,
    keep: str = "oldest",
    *,
    which: Which = "all",
    of: Sequence[Any] | None = None,
    within: Within | None = None,
    page: Page | None = None,
) -> Iterator[Group]:
    """Yield each group of more than one row, the largest first; memory does not grow with them.

    ``which`` may leave out groups of which nothing is marked, which is much quicker, or duplicates
    that are marked. Rows that are merged already are left out, unless rows refer to them all the
    same. ``of`` are ids: only their groups then; a ``page`` comes in the order of their lowest ids.
    A row that has duplicates stays the one that is kept; among others ``keep`` decides.
    """
    journalled = journal.exists(connection, table)
    sql = groups_sql(tables, table, keep, which, journalled, of is not None, within, page)
    parameters = {"ids": list(of or ()), "table": table.name, "within": within and within.ids}
    parameters |= page._asdict() if page else {}
    # An option of this statement alone: given to the connection it would stay there, and have every
    # later statement sent by way of a cursor, which takes no INSERT.
    rows = connection.exec_driver_sql(sql, parameters, execution_options={"yield_per": AT_ONCE})
    for ids, marked, key, homonyms, references, settled, merged in rows:
        kept, *duplicates = ids
        yield Group(
            table=table.name,
            kept=kept,
            duplicates=tuple(duplicates),
            marked=tuple(marked),
            key=key,
            homonyms=tuple(homonyms),
            references=references,
            settled=settled,
            merged=tuple(merged),
        )


def groups_sql(
    tables: Tables,
    table: KeyedTable,
    keep: str,
    which: Which,
    journalled: bool,
    chosen: bool,
    within: Within | None,
    page: Page | None,
) -> str:
    """Return the query of :func:`find_groups`.

    Keys are compared as if the rows that they refer to were merged already: two employees of one
    name are one where their departments are. Within some of those rows, they are.
    """
    parts = canonical_parts(tables, table, keep, which, within)
    parts += [_marked(table, which, journalled), _group(table, chosen, page is not None)]
    parts += [_member(table), _referring(table)]
    details = [_differing(table, name) for name in table.details]
    homonyms = (
        f"array_remove(ARRAY[{', '.join(details)}]::text[], NULL)" if details else "'{}'::text[]"
    )
    return f"""
WITH {", ".join(parts)}
SELECT jsonb_agg(t.{quote(table.id)} ORDER BY {order(table, keep)}),
       coalesce(jsonb_agg(t.{quote(table.id)}) FILTER (WHERE m.root IS NOT NULL), '[]'),
       (array_agg(jsonb_build_object({_key_object(table)}) ORDER BY {order(table, keep)}))[1],
       {homonyms},
       coalesce(jsonb_object_agg(t.{quote(table.id)}::text, r.counts)
                FILTER (WHERE r.counts IS NOT NULL), '{{}}'),
       bool_or(m.has_duplicates),
       coalesce(jsonb_agg(t.{quote(table.id)}) FILTER (WHERE m.merged), '[]')
  FROM member AS m
  JOIN {table.table} AS t ON t.{quote(table.id)} = m.id
  LEFT JOIN referring AS r ON r.id = m.id
 GROUP BY m.n
 ORDER BY {"" if page else "count(*) DESC, "}min(m.n)
"""


def canonical_parts(
    tables: Tables,
    table: KeyedTable,
    keep: str,
    which: Which = "all",
    within: Within | None = None,
) -> list[str]:
    """Return CTEs that end in ``canonical``: id, and the key as new rows have it in k0, k1, …"""
    if within:
        return [_within(table, tables, within)]
    parents = [_kept_of(parent, keep) for parent in tables.parents(table)]
    return [*parents, _canonical(table, tables, which)]


def order(table: KeyedTable, keep: str) -> str:
    """Return what the rows of a group are sorted by, the one that is kept first."""
    id = f"t.{quote(table.id)}"
    first = "m.root IS NOT NULL, NOT m.has_duplicates"
    if keep == "newest":
        return f"{first}, {id} DESC"
    if keep == "most-referenced":
        return f"{first}, coalesce(r.total, 0) DESC, {id}"
    if keep == "most-complete":
        return f"{first}, {_filled(table)} DESC, {id}"
    return f"{first}, {id}"


def _filled(table: KeyedTable) -> str:
    terms = [f"({blank_as_null(name, 't')} IS NOT NULL)::int" for name in table.details]
    return f"({' + '.join(terms) or '0'})"


def _differing(table: KeyedTable, name: str) -> str:
    """Return the column's name where its filled values differ within the group, else NULL."""
    value = f'({table.detail(name)}) COLLATE "C"'
    return f"CASE WHEN min({value}) <> max({value}) THEN {literal(name)} END"


def _key_object(table: KeyedTable) -> str:
    return ", ".join(f"{literal(name)}, t.{quote(name)}" for name in table.key)


def _kept_of(parent: KeyedTable, keep: str) -> str:
    """Return a CTE: for each row of a table the one that it is, or is going to be, merged into."""
    id, mark = quote(parent.id), quote(parent.mark)
    counts = f"LEFT JOIN ({_counts(parent, 'true')}) AS r ON r.id = t.{id}"
    return f"""kept_{parent.oid} AS (
  WITH first AS (
    SELECT m.id, first_value(m.id) OVER (
             PARTITION BY {", ".join(parent.normalised(name, "t") for name in parent.key)}
             ORDER BY {order(parent, keep)}) AS kept
      FROM (SELECT {id} AS id, NULL AS root, EXISTS (
              SELECT FROM {parent.table} AS d WHERE d.{mark} = p.{id}) AS has_duplicates
              FROM {parent.table} AS p WHERE p.{mark} IS NULL) AS m
      JOIN {parent.table} AS t ON t.{id} = m.id
      {counts if keep == "most-referenced" else ""})
  SELECT id, kept FROM first
  UNION ALL
  SELECT d.{id}, first.kept FROM {parent.table} AS d JOIN first ON first.id = d.{mark})"""


def _within(table: KeyedTable, tables: Tables, within: Within) -> str:
    """Return what :func:`_canonical` does, of rows that refer to some rows only."""
    keys = (f"{tables.key(table, name)} AS k{n}" for n, name in enumerate(table.key))
    parent = tables.by_oid[table.parents[within.column]]
    return f"""canonical AS (
  SELECT t.{quote(table.id)} AS id, {", ".join(keys)} FROM {table.table} AS t
   WHERE t.{quote(table.mark)} IS NULL
     AND t.{quote(within.column)} = ANY ({parent.ids("within")}))"""


def _canonical(table: KeyedTable, tables: Tables, which: Which) -> str:
    """Return a CTE: canonical rows, and their keys as new rows are stored."""
    id, mark = quote(table.id), quote(table.mark)
    parents = {oid for oid in table.parents.values() if oid != table.oid}
    joins = [
        f"LEFT JOIN kept_{oid} ON kept_{oid}.id = t.{quote(name)}"
        for name, oid in table.parents.items()
        if oid in parents
    ]
    keys = [
        f"coalesce(kept_{table.parents[name]}.kept, t.{quote(name)})"
        if table.parents.get(name) in parents
        else table.normalised(name, "t")
        for name in table.key
    ]
    named = ", ".join(f"{key} AS k{number}" for number, key in enumerate(keys))
    roots = f"AND EXISTS (SELECT FROM {table.table} AS d WHERE d.{mark} = t.{id})"
    return f"""canonical AS (
  SELECT t.{id} AS id, {named} FROM {table.table} AS t {" ".join(joins)}
   WHERE t.{mark} IS NULL {roots if which == "marked" else ""})"""


def _marked(table: KeyedTable, which: Which, journalled: bool) -> str:
    """Return a CTE: duplicates, save those that are merged and that nothing refers to."""
    id, mark = quote(table.id), quote(table.mark)
    condition = "false" if which == "unmarked" else f"t.{mark} IS NOT NULL"
    join, merged = "", "false"
    if journalled and which != "unmarked":
        referred = [
            f"EXISTS (SELECT FROM {reference.table} AS c WHERE {reference.matches('c', 't')})"
            for reference in table.references
        ]
        # Joined and not IN (…), which asks all of many for each.
        join = f"LEFT JOIN ({journal.merged_ids(table)}) AS merged ON merged.id = t.{id}"
        merged = "merged.id IS NOT NULL"
        condition += f" AND ({' OR '.join(['merged.id IS NULL', *referred])})"
    return f"""marked AS (
  SELECT t.{id} AS id, t.{mark} AS root, {merged} AS merged FROM {table.table} AS t {join}
   WHERE {condition})"""


def _group(table: KeyedTable, chosen: bool, paged: bool) -> str:
    keys = ", ".join(f"k{number}" for number in range(len(table.key)))
    roots = f"SELECT coalesce({quote(table.mark)}, {quote(table.id)}) FROM {table.table}"
    # There is no min(uuid); as text they have the same order.
    lowest = "min(c.id::text)" if table.id_type == "uuid" else "min(c.id)"
    wanted = f"AND bool_or(c.id IN ({roots} WHERE {quote(table.id)} = ANY ({table.ids('ids')})))"
    return f"""grouped AS MATERIALIZED (
  SELECT row_number() OVER (ORDER BY {lowest}) AS n, array_agg(c.id) AS roots
    FROM canonical AS c LEFT JOIN (SELECT DISTINCT root FROM marked) AS m ON m.root = c.id
   GROUP BY {keys}
  HAVING (count(*) > 1 OR bool_or(m.root IS NOT NULL)) {wanted if chosen else ""}
         {f"AND {lowest} > %(after)s" if paged else ""}
   ORDER BY {lowest} {"LIMIT %(limit)s" if paged else ""})"""


def _member(table: KeyedTable) -> str:
    has_duplicates = f"EXISTS (SELECT FROM {table.table} AS d WHERE d.{quote(table.mark)} = one.id)"
    return f"""member AS MATERIALIZED (
  SELECT n, id, NULL AS root, {has_duplicates} AS has_duplicates, false AS merged
    FROM grouped, unnest(roots) AS one (id)
  UNION ALL
  SELECT n, marked.id, marked.root::text, false, marked.merged
    FROM grouped, unnest(roots) AS one (id) JOIN marked ON marked.root = one.id)"""


def _referring(table: KeyedTable) -> str:
    id = quote(table.id)
    return f"""referring AS MATERIALIZED (
  {_counts(table, f"t.{id} IN (SELECT id FROM member)")})"""


def _counts(table: KeyedTable, condition: str) -> str:
    """Return a query: for each row how many rows refer to it, in all and by reference."""
    counts = [_count(table, reference, condition) for reference in table.references]
    nothing = f"SELECT {quote(table.id)} AS id, '' AS name, 0 AS n FROM {table.table} WHERE false"
    return f"""SELECT id, sum(n) AS total, jsonb_object_agg(name, n) AS counts
    FROM ({" UNION ALL ".join(counts) or nothing}) AS c GROUP BY id"""


def _count(table: KeyedTable, reference: Reference, condition: str) -> str:
    return f"""SELECT t.{quote(table.id)} AS id, {literal(reference.name)} AS name, count(*) AS n
    FROM {table.table} AS t JOIN {reference.table} AS c ON {reference.matches("c", "t")}
   WHERE {condition} GROUP BY 1"""
