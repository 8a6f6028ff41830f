"""What the service counts, for Prometheus; the counts of all worker processes add up.

Names and labels are an interface: dashboards and alerts use them. No label takes a value that a
client chooses. Under gunicorn each worker keeps its counts in a file of the folder that
``PROMETHEUS_MULTIPROC_DIR`` names, which has to be set before this module is imported.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy.exc import SQLAlchemyError

from app import get_or_create, replica, transactions
from app.errors import ContentionError
from app.models import NATURAL_KEYS
from app.pool import pool_state
from app.readiness import look_at_tables

logger = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
OUR_OWN = CollectorRegistry()

REQUESTS = Counter(
    "rollcall_requests_total",
    "Requests answered.",
    ["method", "route", "status"],
    registry=OUR_OWN,
)
SECONDS = Histogram(
    "rollcall_request_seconds",
    "Time from a request's head to its answer.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=OUR_OWN,
)
OUTCOMES = Counter(
    "rollcall_get_or_create_total",
    "Records asked for by natural key: created, existing, or given up (contention).",
    ["table", "outcome"],
    registry=OUR_OWN,
)
RETRIES = Counter(
    "rollcall_retries_total",
    "Transactions run again, by the SQLSTATE of what they failed with.",
    ["sqlstate"],
    registry=OUR_OWN,
)
REPLICA_READS = Counter(
    "rollcall_replica_reads_total",
    "Reads that the replica was asked for: answered, or left to the primary, and why.",
    ["outcome"],
    registry=OUR_OWN,
)
CONNECTIONS = Gauge(
    "rollcall_pool_connections",
    "Database connections that the workers hold.",
    ["state"],
    registry=OUR_OWN,
    multiprocess_mode="livesum",
)
WAITING = Gauge(
    "rollcall_pool_waiting",
    "Threads that wait for a database connection.",
    registry=OUR_OWN,
    multiprocess_mode="livesum",
)
DUPLICATES = Gauge(
    "rollcall_duplicates",
    "Rows marked as duplicates and not purged; counted up to a million.",
    ["table"],
    registry=OUR_OWN,
    multiprocess_mode="mostrecent",
)
GUARDED = Gauge(
    "rollcall_guarded",
    "Whether the table's guard, its unique index, is in force.",
    ["table"],
    registry=OUR_OWN,
    multiprocess_mode="mostrecent",
)
LOOKED_AT = "rollcall_tables_looked_at_timestamp_seconds"
LOOKED = Gauge(
    LOOKED_AT,
    "When duplicates and guards were last looked at.",
    registry=OUR_OWN,
    multiprocess_mode="mostrecent",
)

NO_ROUTE = "none"
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
LOOK_EVERY = 60.0  # seconds


def init_app() -> None:
    """Have the core tell what it does; doing so again changes nothing.

    What is rare begins at 0, so that the first time shows as a change.
    """
    for table in NATURAL_KEYS:
        for outcome in ("created", "existing", "contention"):
            _outcomes[table, outcome].inc(0)
    for state in transactions.LOST_THE_RACE:
        _retries[(state,)].inc(0)
    for outcome in replica.OUTCOMES:
        count_replica_read(outcome, 0)
    transactions.on_retry.add(count_retry)
    get_or_create.on_outcome.add(count_outcome)
    replica.on_read.add(count_replica_read)


class _Children(dict[Any, Any]):
    """A metric's children by their labels, which prometheus_client would look for with a lock."""

    def __init__(self, metric: Counter | Histogram) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: tuple[str, ...]) -> Any:
        return self.setdefault(labels, self._metric.labels(*labels))


_requests, _seconds = _Children(REQUESTS), _Children(SECONDS)
_outcomes, _retries = _Children(OUTCOMES), _Children(RETRIES)
_replica_reads = _Children(REPLICA_READS)


# What was counted, and is not in the metrics yet: several writes to a file for each count, which
# take thrice as long in the middle of a request as one after the other.
_pending: deque[tuple[Any, ...]] = deque()
MOST_PENDING = 1000


def count_request(method: str | None, route: str | None, status: str, seconds: float) -> None:
    """Count an answer; ``route`` is the rule that matched, if one did."""
    _put_off(_count_request, method, route, status, seconds)


def _count_request(method: str | None, route: str | None, status: str, seconds: float) -> None:
    rule = route or NO_ROUTE
    _requests[label_of(method), rule, status].inc()
    _seconds[(rule,)].observe(seconds)


def label_of(method: str | None) -> str:
    """Return what stands for a method: itself, if it is one of the few that there are."""
    return method if method in METHODS else "other"


def count_retry(sqlstate: str | None) -> None:
    """Count a retry; without a SQLSTATE it was for a connection."""
    _retries[(sqlstate or "none",)].inc()


def count_replica_read(outcome: str, reads: int = 1) -> None:
    """Count reads that the replica was asked for."""
    _replica_reads[(outcome,)].inc(reads)


def count_outcome(table: str, outcome: str, records: int) -> None:
    """Count records that were got or created."""
    _put_off(_count_outcome, table, outcome, records)


def _count_outcome(table: str, outcome: str, records: int) -> None:
    _outcomes[table, outcome].inc(records)


def _put_off(count: Callable[..., None], *what: Any) -> None:
    _pending.append((count, *what))
    if len(_pending) >= MOST_PENDING:
        _catch_up()


def _catch_up() -> None:
    with suppress(IndexError):  # nothing is left, or another thread took it
        while True:
            count, *what = _pending.popleft()
            count(*what)


def bring_up_to_date() -> None:
    """Put into the metrics what this process has counted, and the state of its pools.

    To be called every second, and at the process's end.
    """
    _catch_up()
    state = pool_state()
    CONNECTIONS.labels("in_use").set(state.in_use)
    CONNECTIONS.labels("idle").set(state.idle)
    WAITING.set(state.waiting)


def exposition() -> bytes:
    """Return all metrics of all workers as Prometheus reads them."""
    bring_up_to_date()
    registry = _registry()
    _tables.look_if_due(registry)
    return generate_latest(registry)


def _registry() -> CollectorRegistry:
    if FOLDER not in os.environ:
        return OUR_OWN
    registry = CollectorRegistry()
    OfAllProcesses(registry)  # type: ignore[no-untyped-call]
    return registry


class OfAllProcesses(MultiProcessCollector):
    """The library's, which takes a file that is just being made, and still empty, for a fault."""

    def collect(self) -> Iterable[Metric]:
        try:
            return super().collect()  # type: ignore[no-untyped-call, no-any-return]
        except struct.error:
            time.sleep(A_MOMENT)
            return super().collect()  # type: ignore[no-untyped-call, no-any-return]


A_MOMENT = 0.01  # seconds


class _Tables:
    """What the tables are like, looked at once a minute, by whichever process is asked then."""

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._tried = -math.inf

    def look_if_due(self, registry: CollectorRegistry) -> None:
        """Look again where that was long ago; ``registry`` knows when another process did.

        A failure is tried again as late as a success, so that a database that is away does not
        hold up every scrape; the time of the last success is a metric of its own.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._tried >= LOOK_EVERY:
                self._tried = time.monotonic()
                self._look(registry)
        finally:
            self._looking.release()

    def _look(self, registry: CollectorRegistry) -> None:
        if time.time() - (registry.get_sample_value(LOOKED_AT) or 0.0) < LOOK_EVERY:
            return
        try:
            tables = look_at_tables()
        except (ContentionError, SQLAlchemyError) as error:
            logger.warning("the tables could not be looked at for /metrics: %s", error)
            return
        for name, state in tables.items():
            DUPLICATES.labels(name).set(state.duplicates)
            GUARDED.labels(name).set(state.guarded)
        LOOKED.set_to_current_time()


_tables = _Tables()
