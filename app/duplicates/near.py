"""Suggest near duplicates: rows whose keys are not the same, but may mean the same.

Nothing is compared with everything. Rows meet in blocks: those with the same letters, those that
have a word in common, and of single words those that begin or end alike, which any slip of one
letter leaves so. Blocks are small; in one that is not each row meets its neighbours.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz import process
from rapidfuzz.distance import OSA
from sqlalchemy import Connection, Engine

from app.duplicates.groups import canonical_parts
from app.duplicates.report import reading
from app.duplicates.spelling import differences, words
from app.duplicates.tables import (
    KeyedTable,
    Model,
    SoftReference,
    Tables,
    literal,
    quote,
    read_tables,
)

SUGGESTIONS = 50

AT_ONCE = 2000  # rows fetched
MOST_ROWS = 150_000  # held in memory at once, of one department
NEIGHBOURS = 250  # that a row is compared with in each block
MOST_EDITS = 2
LEAST_LENGTH = 5  # characters for each edit: at least 80 % stay as they are

DIGITS = re.compile(r"\d+")
SAME, WORD, BEGINNING, END = "=", "w", "<", ">"


@dataclass(frozen=True)
class Suggestion:
    """Two rows that may be one record; a person has to judge."""

    score: int  # 0 to 100: how much of the keys is the same
    reasons: tuple[str, ...]  # what they differ in
    ids: tuple[Any, Any]
    keys: tuple[Mapping[str, Any], Mapping[str, Any]]  # as stored


@dataclass(frozen=True)
class Near:
    """The best suggestions for a table.

    ``incomplete`` counts the sets of rows that were too large to compare all of them with all.
    """

    compared: int  # keys, of which each group of exact duplicates has one
    incomplete: int
    suggestions: tuple[Suggestion, ...]


def near_duplicates(
    engine: Engine,
    model: Model,
    keep: str = "oldest",
    *,
    soft_references: Sequence[SoftReference] = (),
    limit: int = SUGGESTIONS,
) -> Near:
    """Suggest near duplicates in a model's table; see :func:`find_near`."""
    with reading(engine) as connection:
        tables = read_tables(connection, model, soft_references)
        return find_near(connection, tables, tables.of(model), keep, limit=limit)


def find_near(
    connection: Connection,
    tables: Tables,
    table: KeyedTable,
    keep: str = "oldest",
    *,
    limit: int = SUGGESTIONS,
    seen: Callable[[int], object] = lambda rows: None,
) -> Near:
    """Return the best ``limit`` suggestions for a table.

    Only canonical rows are compared, one of each key, and only where the columns of the key that
    are no text are the same and the texts have the same digits. Memory is bounded, whatever the
    size of the table. ``seen`` is told now and then how many rows were compared.
    """
    best, compared, incomplete = Best(limit), 0, 0
    for ids, texts, cut in _sets_of_rows(connection, tables, table, keep):
        compared += len(ids)
        incomplete += cut + _compare(ids, texts, best)
        seen(compared)
    return Near(compared, incomplete, _suggestions(connection, table, best.pairs))


def _sets_of_rows(
    connection: Connection, tables: Tables, table: KeyedTable, keep: str
) -> Iterator[tuple[list[Any], list[str], bool]]:
    """Yield the ids and words of rows that can be compared, and whether there are more such rows.

    Where a department has too many, those whose names begin alike are together.
    """
    ids: list[Any] = []
    texts: list[str] = []
    current = None
    for id, others, text in _rows(connection, tables, table, keep):
        if ids and (others != current or len(ids) == MOST_ROWS):
            yield ids, texts, others == current
            ids, texts = [], []
        current = others
        ids.append(id)
        texts.append(" ".join(words(text)))
    yield ids, texts, False


def _rows(
    connection: Connection, tables: Tables, table: KeyedTable, keep: str
) -> Iterator[tuple[Any, str, str]]:
    """Yield for each key the id of a row, the columns that are no text, and the text."""
    texts = [f"k{n}" for n, name in enumerate(table.key) if name in table.texts]
    others = [f"k{n}" for n, name in enumerate(table.key) if name not in table.texts]
    if not texts:
        return
    keys = ", ".join([*others, *texts])
    sql = f"""
WITH {", ".join(canonical_parts(tables, table, keep))}
SELECT DISTINCT ON ({keys}) to_jsonb(id), CAST(ROW({", ".join(others)}) AS text),
       concat_ws(' ', {", ".join(texts)})
  FROM canonical ORDER BY {keys}, id"""
    rows = connection.exec_driver_sql(sql, {}, execution_options={"yield_per": AT_ONCE})
    for row in rows:
        yield tuple(row)


@dataclass
class Best:
    """The pairs that have most in common, each once; of equal ones those that came first."""

    limit: int
    _heap: list[tuple[float, int, Any, Any]] = field(default_factory=list)
    _held: set[tuple[Any, Any]] = field(default_factory=set)
    _offered: int = 0

    def offer(self, similarity: float, one: Any, other: Any) -> None:
        """Take a pair, unless there are enough better ones."""
        pair = (min(one, other), max(one, other))
        if pair in self._held:
            return
        self._offered += 1
        entry = (similarity, -self._offered, *pair)
        if len(self._heap) < self.limit:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            self._held.remove(heapq.heapreplace(self._heap, entry)[2:])
        else:
            return
        self._held.add(pair)

    @property
    def pairs(self) -> list[tuple[float, Any, Any]]:
        """The pairs, the best first."""
        ordered = sorted(self._heap, reverse=True)
        return [(similarity, one, other) for similarity, _, one, other in ordered]


def _compare(ids: Sequence[Any], texts: Sequence[str], best: Best) -> int:
    """Offer the pairs of rows that are near; return how many blocks were not compared in full."""
    incomplete = 0
    for block, members in _blocks(texts).items():
        if isinstance(members, list):
            incomplete += len(members) > NEIGHBOURS + 1
            for one, other, edits in _pairs(block, members, texts):
                length = max(_length(texts[one]), _length(texts[other]))
                if edits * LEAST_LENGTH <= length:
                    best.offer(1 - edits / length, ids[one], ids[other])
    return incomplete


def _blocks(texts: Sequence[str]) -> dict[str, int | list[int]]:
    """Return the positions of each block's rows; most blocks have one, and need no list for it."""
    blocks: dict[str, int | list[int]] = {}
    for position, text in enumerate(texts):
        for block in _blocks_of(text):
            members = blocks.setdefault(block, position)
            if isinstance(members, list):
                members.append(position)
            elif members != position:
                blocks[block] = [members, position]
    return blocks


def _blocks_of(text: str) -> set[str]:
    """Return the blocks that a row is in: kind and digits, a blank, and what its rows share."""
    parts = text.split()
    if not parts:
        return set()
    digits = "".join(DIGITS.findall(text))
    found = {f"{SAME}{digits} {''.join(parts)}", f"{SAME}{digits} {''.join(sorted(parts))}"}
    if len(parts) > 1:
        found.update(f"{WORD}{digits} {word}" for word in parts)
    else:
        # One slip cannot be in the first and the last letters both: not in so few of them.
        for few in {min(3, (len(text) - slips) // 2) for slips in (1, 2)}:
            found |= {
                f"{BEGINNING}{digits} {text[:few]}",
                f"{END}{digits} {text[len(text) - few :]}",
            }
    return found


def _pairs(
    block: str, members: Sequence[int], texts: Sequence[str]
) -> Iterator[tuple[int, int, int]]:
    """Yield pairs of the block's rows, and how many characters to change in what they do not share.

    Rows are sorted by that, so that neighbours are alike.
    """
    kind, shared = block[0], block.partition(" ")[2]
    rests = sorted((_rest(kind, shared, texts[member]), member) for member in members)
    choices = [rest for rest, _ in rests]
    for position, (rest, one) in enumerate(rests):
        most = min(MOST_EDITS, (_length(texts[one]) + MOST_EDITS) // LEAST_LENGTH)
        after = choices[position + 1 : position + 1 + NEIGHBOURS]
        for _, edits, place in process.extract_iter(
            rest, after, scorer=OSA.distance, score_cutoff=most
        ):
            yield one, rests[position + 1 + place][1], int(edits)


def _rest(kind: str, shared: str, text: str) -> str:
    if kind == SAME:
        return ""
    parts = text.split()
    if kind == WORD:
        parts.remove(shared)
    return "".join(parts)


def _length(text: str) -> int:
    return len(text) - text.count(" ")


def _suggestions(
    connection: Connection, table: KeyedTable, pairs: Sequence[tuple[float, Any, Any]]
) -> tuple[Suggestion, ...]:
    """Return the pairs as suggestions. Each formal difference takes a point off the score."""
    keys = _keys(connection, table, {id for _, *ids in pairs for id in ids})
    found = []
    for similarity, *ids in pairs:
        one, other = (keys[id] for id in ids)
        reasons = differences(_text(table, one), _text(table, other))
        score = max(0, round(100 * similarity) - len(reasons))
        found.append(Suggestion(score, reasons, (ids[0], ids[1]), (one, other)))
    return tuple(sorted(found, key=lambda one: -one.score))


def _keys(connection: Connection, table: KeyedTable, ids: set[Any]) -> dict[Any, Mapping[str, Any]]:
    named = ", ".join(f"{literal(name)}, t.{quote(name)}" for name in table.key)
    rows = connection.exec_driver_sql(
        f"SELECT to_jsonb(t.{quote(table.id)}), jsonb_build_object({named}) FROM {table.table} AS t"
        f" WHERE t.{quote(table.id)} = ANY ({table.ids('ids')})",
        {"ids": list(ids)},
    )
    return {id: key for id, key in rows}


def _text(table: KeyedTable, key: Mapping[str, Any]) -> str:
    return " ".join(key[name] or "" for name in table.key if name in table.texts)
