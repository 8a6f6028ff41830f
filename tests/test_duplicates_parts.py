"""Long work in parts: in order, several at a time, and stopped between items."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.duplicates import merge, parts
from app.duplicates.merging import Outcome
from app.duplicates.parts import in_parts, side_by_side
from app.models import Department
from tests.duplicated import Site
from tests.races import eventually


def test_parts_hold_every_item_once_and_in_order() -> None:
    assert list(in_parts("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(in_parts("", 2)) == []


def test_several_are_done_at_a_time_and_come_back_in_order() -> None:
    """Each of the first two items can only end when the other has begun."""
    both = threading.Barrier(2, timeout=60)

    def work(item: int) -> int:
        if item < 2:
            both.wait()
        return item * 10

    assert list(side_by_side(work, range(7), 1, 2)) == [0, 10, 20, 30, 40, 50, 60]


def test_nothing_is_begun_after_the_caller_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The item under way is finished; the rest of its part, and the parts behind it, are not."""
    begun, waited_for = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *arguments: Any, **options: Any) -> None:
            waited_for.set()
            super().shutdown(*arguments, **options)

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            assert waited_for.wait(60)
        return item

    monkeypatch.setattr(parts, "ThreadPoolExecutor", Pool)
    results = side_by_side(work, range(8), 2, 1)
    assert [next(results), next(results)] == [0, 1]
    eventually(lambda: 2 in begun)
    results.close()
    assert begun == [0, 1, 2]


def test_an_item_that_fails_stops_the_others() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError
        return item

    results = side_by_side(work, range(1000), 2, 1)
    assert next(results) == 0
    with pytest.raises(ValueError):  # noqa: PT011 - our own, without words
        list(results)
    assert len(begun) < 10


def test_two_threads_merge_what_one_would(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two groups they meet on every page of the indexes, and lose races."""
    monkeypatch.setattr(merge, "IN_SUCCESSION", 2)
    site.add_department("Sales")
    names = [f"Ann {number}" for number in range(60)]
    site.add_employee(*names, *names)
    site.run("UPDATE employee SET manager_id = 61 + mod(id, 60) WHERE id <= 60")
    outcomes = site.merge_all()
    assert [type(one) for one in outcomes] == [Outcome] * 60
    assert site.rows(
        "SELECT count(*), count(*) FILTER (WHERE duplicate_of_id = id - 60),"
        " count(*) FILTER (WHERE id <= 60 AND manager_id <= 60) FROM employee"
    ) == [(120, 60, 60)]
    assert site.merge_all() == []
    assert site.merge_all(Department) == []
