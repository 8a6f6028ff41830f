"""Three services, as on three hosts, behind one nginx: one is stopped, and one is killed."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from tests.ledger import stored, verify
from tests.load import CONNECTIONS, under_load
from tests.races import eventually
from tests.serving import Service, serving_as_it_is
from tests.soak.balancer import nginx


def test_services_that_go_one_by_one(either_url: str, tmp_path: Path) -> None:
    """One record a key and one 201, and who is answered 503 is told when to try again."""
    with ExitStack() as stack:
        services = [
            stack.enter_context(serving_as_it_is(either_url, folder_for(tmp_path, number)))
            for number in range(3)
        ]
        balancer = stack.enter_context(nginx(services, tmp_path))
        with under_load(balancer, CONNECTIONS) as load:
            load.pass_rounds(5)
            shares = [requests_of(service) for service in services]
            services[0].stop()
            load.pass_rounds(5)
            with load.hit():
                kill(services[1])
                load.pass_rounds(5)
        found = stored(either_url)
    assert min(shares) > sum(shares) / 10, shares
    assert load.ill == []
    assert verify(load.answers, found, expected={503}) == []
    away = [answer for answer in load.answers if not answer.acknowledged]
    assert {(answer.content["code"], answer.retry_after) for answer in away} <= {
        ("service_away", "1")
    }
    # A request of each client was on its way at most, to the one that was killed.
    assert len(away) <= CONNECTIONS


def folder_for(folder: Path, number: int) -> Path:
    place = folder / str(number)
    place.mkdir()
    return place


def requests_of(service: Service) -> int:
    """Return how many requests to create an employee a service has logged."""
    return service.log.read_text().count('"event":"request"')


def kill(service: Service) -> None:
    """End gunicorn and its workers as a power cut would."""
    os.killpg(service.process.pid, signal.SIGKILL)
    eventually(lambda: service.process.poll() is not None)
