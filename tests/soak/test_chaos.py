"""Minutes of everything at once, at random; the seed is shown, so that a run can be repeated."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests import faults
from tests.conftest import private_server, unguard
from tests.faults import Site
from tests.ledger import CUT, stored, verify
from tests.load import Load
from tests.serving import serving_as_it_is
from tests.soak.minutes import MINUTES


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with private_server() as server:
        yield server


@pytest.mark.timeout(MINUTES * 60 + 300)
@pytest.mark.parametrize("kind", ["guarded", "unguarded"])
def test_chaos(kind: str, server: EmbeddedServer, tmp_path: Path) -> None:
    """No fault leaves a trace in the data, and after each the service is well again."""
    url = server.url(kind)
    bootstrap(url, NATURAL_KEYS)
    {"guarded": str, "unguarded": unguard}[kind](url)
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    dice = random.Random(seed)  # noqa: S311 - dice, not a secret
    settings = {"ROLLCALL_LOCK_TIMEOUT": "0.2", "ROLLCALL_RETRY_DEADLINE": "1"}
    with serving_as_it_is(url, tmp_path, WEB_CONCURRENCY="3", **settings) as service:
        site = Site(service, url)
        with site.under_load() as load:
            met, ill = torment(site, server, load, dice)
    wrongs = verify(load.answers, stored(url), {CUT})
    assert (ill, wrongs) == ([], []), f"SOAK_SEED={seed}: {met}"
    assert len(set(met)) > 3


def torment(
    site: Site, server: EmbeddedServer, load: Load, dice: random.Random
) -> tuple[list[str], list[str]]:
    """Bring about one fault after the other; return their names, and what was not well then."""
    ends = time.monotonic() + MINUTES * 60
    met: list[str] = []
    ill: list[str] = []
    while time.monotonic() < ends and not ill:
        name = dice.choice(sorted(FAULTS))
        FAULTS[name](site, server, load)
        met.append(name)
        ill = [f"after {name}: {what}" for what in load.well_again()]
        load.pass_rounds(dice.randint(1, 20))
    return met, ill


def locked(site: Site, server: EmbeddedServer, load: Load) -> None:
    with faults.locked(site, "employee"):
        time.sleep(0.5)  # how long the fault lasts


def full(site: Site, server: EmbeddedServer, load: Load) -> None:
    with faults.full_disk(site):
        load.pass_rounds(2)


def read_only(site: Site, server: EmbeddedServer, load: Load) -> None:
    with faults.read_only_server(site):
        load.pass_rounds(2)


FAULTS: dict[str, Callable[[Site, EmbeddedServer, Load], object]] = {
    "postmaster killed": lambda site, server, load: faults.kill_postmaster(server),
    "backends terminated": lambda site, server, load: faults.terminate_one_in_two(site),
    "worker killed": lambda site, server, load: faults.kill_worker(site.service),
    "reload": lambda site, server, load: faults.reload(site.service),
    "locked": locked,
    "disk full": full,
    "read-only": read_only,
}
