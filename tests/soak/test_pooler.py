"""Through PgBouncer in transaction mode: a session may have another server at each transaction."""

from __future__ import annotations

from pathlib import Path

from tests.faults import Site, terminate_one_in_two
from tests.ledger import stored, verify
from tests.load import CONNECTIONS
from tests.serving import serving_as_it_is
from tests.soak.pooler import pgbouncer


def test_load_through_a_pooler(either_url: str, tmp_path: Path) -> None:
    """Fewer server connections than clients; the isolation level holds all the same."""
    with pgbouncer(either_url) as through:
        with serving_as_it_is(
            through, tmp_path, WEB_CONCURRENCY="3", ROLLCALL_ADMIN_URL=either_url
        ) as service:
            site = Site(service, either_url)
            with site.under_load(CONNECTIONS) as load, load.hit():
                load.pass_rounds(150)
        assert load.ill == []
        assert verify(load.answers, stored(either_url)) == []
        assert {answer.status for answer in load.answers} == {200, 201}


def test_server_connections_lost_behind_a_pooler(either_url: str, tmp_path: Path) -> None:
    """The pooler's own connections are cut at random."""
    with pgbouncer(either_url) as through:
        with serving_as_it_is(
            through, tmp_path, WEB_CONCURRENCY="3", ROLLCALL_ADMIN_URL=either_url
        ) as service:
            site = Site(service, either_url)
            with site.under_load() as load, load.hit():
                terminated = []
                for _ in range(15):
                    terminated.append(terminate_one_in_two(site))
                    load.pass_rounds(1)
        assert sum(terminated) > 10
        assert load.ill == []
        assert verify(load.answers, stored(either_url)) == []
