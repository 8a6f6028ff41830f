"""The primary is gone for good, and its standby takes its place while clients write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from tests.ledger import Answer, stored, verify
from tests.load import CONNECTIONS, under_load
from tests.races import eventually
from tests.replication import Node, pair
from tests.serving import Service, serving

RECEIVING = "SELECT count(*) = 1 FROM pg_stat_wal_receiver"


@dataclass
class Failover:
    """What clients, a probe and the ledger have seen of one."""

    answers: list[Answer] = field(default_factory=list)
    probe: tuple[int, Any] = (0, None)
    ill: list[str] = field(default_factory=list)
    around: tuple[int, int, int] = (0, 0, 0)
    wrongs: list[str] = field(default_factory=list)


def fail_over(folder: Path, synchronous: bool) -> Failover:
    """Kill the primary under load and promote the standby; one that is asynchronous lags behind."""
    seen = Failover()
    with pair(synchronous) as (primary, standby):
        url = url_of(primary, standby, target_session_attrs="read-write")
        # So short that some give up before the promotion, and the probe gets a thread.
        settings = {"WEB_CONCURRENCY": "3", "ROLLCALL_RETRY_DEADLINE": "2"}
        with serving(folder, DATABASE_URL=url, **settings) as service:
            with under_load(service, CONNECTIONS) as load:
                if not synchronous:
                    cut_off(standby)
                load.pass_rounds(8)
                with load.hit():
                    primary.kill()
                    seen.probe = unready(service)
                    eventually(lambda: load.has(503, 1))
                    promote(standby)
            seen.ill, seen.around = load.ill, load.answers_around_the_fault()
        seen.answers = load.answers
        seen.wrongs = verify(seen.answers, stored(standby.url("rollcall")))
    return seen


def url_of(*nodes: Node, database: str = "rollcall", **options: str) -> str:
    """Return the URL of a database that any of the servers may have."""
    hosts = tuple(f"127.0.0.1:{node.port}" for node in nodes)
    url = URL.create("postgresql", "postgres", database=database, query={"host": hosts, **options})
    return url.render_as_string(hide_password=False)


def cut_off(standby: Node) -> None:
    """Have the standby receive no more; what it has it keeps."""
    standby.configure("primary_conninfo", "host=127.0.0.1 port=1")
    eventually(lambda: not standby.execute(RECEIVING))


def unready(service: Service) -> tuple[int, Any]:
    """Return what the probe says once it has noticed."""
    eventually(lambda: not service.is_ready())
    return service.call("GET", "/readyz")


def promote(standby: Node) -> None:
    """Do what an operator does: the copied setting would have it wait for a standby of its own."""
    standby.configure("synchronous_standby_names", "")
    standby.execute("SELECT pg_promote()")


def test_a_primary_that_is_gone(tmp_path: Path) -> None:
    """Well within seconds of the promotion; what was acknowledged is there, and once."""
    seen = fail_over(tmp_path, synchronous=True)
    status, problem = seen.probe
    assert (status, problem["code"], problem["database"]) == (503, "not_ready", "away")
    assert "read-write" in problem["detail"]
    assert seen.ill == []
    assert seen.wrongs == []
    assert min(seen.around) >= CONNECTIONS, seen.around
    assert {answer.status for answer in seen.answers} == {200, 201, 503}


def test_what_synchronous_replication_is_for(tmp_path: Path) -> None:
    """Without it what the standby had not yet received is lost, and the ledger says so."""
    seen = fail_over(tmp_path, synchronous=False)
    assert seen.ill == []
    assert any(wrong.startswith(("lost", "changed")) for wrong in seen.wrongs)
    assert not any(wrong.startswith(("dishonest", "repeated")) for wrong in seen.wrongs)
