"""A standby that lags, goes and comes back answers reads, while their clients write."""

from __future__ import annotations

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from app.replica import HEADER
from tests.load import CLIENTS
from tests.races import eventually
from tests.replication import pair
from tests.serving import Service, ask, serving

EMPLOYEES = "/api/v1/employees"


class Writers:
    """Clients that look at once for what they have written."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.over = threading.Event()
        self.written = 0
        self.missed: list[str] = []

    def run(self, client: int) -> None:
        """Create, and look: in a list, with the position; by its address, without."""
        for number in itertools.takewhile(lambda _: not self.over.is_set(), itertools.count()):
            name = f"Person {client} {number}"
            with closing(self.service.connect()) as connection:
                person = {"name": name, "department": "Research"}
                status, headers, _ = ask(connection, "POST", EMPLOYEES, person)
                assert status == 201
                query = f"{EMPLOYEES}?{urlencode({'name': name})}"
                connection.request("GET", query, headers={HEADER: headers[HEADER]})
                if name.encode() not in connection.getresponse().read():
                    self.missed.append(f"{name} in the list")
                if ask(connection, "GET", headers["Location"])[0] != 200:
                    self.missed.append(f"{name} by its address")
            self.written += 1

    def go_on(self) -> None:
        """Wait until some more have been written."""
        enough = self.written + 100
        eventually(lambda: self.written > enough, 60)


def reads(service: Service) -> dict[str, float]:
    """Return how many reads the replica was asked for, by outcome."""
    with closing(service.connect()) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = re.findall(r'rollcall_replica_reads_total\{outcome="(\w+)"\} (\S+)', text)
    return {outcome: float(count) for outcome, count in found}


def test_nobody_misses_what_they_have_written(tmp_path: Path) -> None:
    """Whatever becomes of the replica, and it does answer when it can."""
    with pair() as (primary, standby):
        urls = {
            "DATABASE_URL": primary.url("rollcall"),
            "ROLLCALL_READ_URL": standby.url("rollcall"),
        }
        with serving(tmp_path, **urls) as service, ThreadPoolExecutor(CLIENTS) as threads:
            writers = Writers(service)
            running = [threads.submit(partial(writers.run, client)) for client in range(CLIENTS)]
            try:
                writers.go_on()
                standby.configure("recovery_min_apply_delay", "500ms")
                writers.go_on()
                standby.kill()
                writers.go_on()
                standby.start()
                standby.configure("recovery_min_apply_delay", "0")
                before = reads(service)
                eventually(lambda: reads(service)["answered"] > before["answered"] + 50, 30)
            finally:
                writers.over.set()
            outcomes = reads(service)
        for client in running:
            client.result()
    assert writers.missed == []
    assert min(outcomes[name] for name in ("answered", "behind", "unknown", "failed")) > 0
