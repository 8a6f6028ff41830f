"""What proves, or disproves, that no record of one tenant ever shows in another.

Each record bears its tenant's name. Clients create, find, list and change records of many tenants
at once, and connections are cut meanwhile. Every answer is looked at, and in the end every row.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import URL, NullPool, create_engine, text

NOBODY = "nobody-there"
ACTIONS = ("create", "batch", "list", "find", "rename", "refused", "unknown", "cut")
CUT = text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE datname = :name AND application_name = 'rollcall'"
)
DEPARTMENTS = "/api/v1/departments"
numbers = itertools.count(1)

Send = Callable[[str, str, str | None, Any], tuple[int, Any]]
"""Sends a request: method, path, tenant, body; returns status and content."""


class Step(NamedTuple):
    """What a client does next, and for which of the tenants."""

    action: str
    place: int


class Directory:
    """The tenants, what their databases are, and which records were acknowledged."""

    def __init__(self, databases: Mapping[str | None, URL]) -> None:
        self.databases = databases
        self.tenants = list(databases)
        self.acknowledged: dict[str | None, set[str]] = {tenant: set() for tenant in databases}
        self.lock = threading.Lock()

    def mark(self, tenant: str | None) -> str:
        """Return what the names of a tenant's records begin with."""
        return f"Of {tenant}, "

    def acknowledge(self, tenant: str | None, names: Iterable[str]) -> None:
        with self.lock:
            self.acknowledged[tenant].update(names)

    def cut(self, tenant: str | None) -> None:
        """End the service's connections to a tenant's database, whatever they are doing."""
        url = self.databases[tenant]
        engine = create_engine(url.set(database="postgres"), poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(CUT, {"name": url.database})

    def check(self) -> int:
        """Look at every row; return how many there are."""
        rows = 0
        for tenant, url in self.databases.items():
            engine = create_engine(url, poolclass=NullPool)
            with engine.connect() as connection:
                query = "SELECT name FROM department UNION ALL SELECT name FROM employee"
                names = list(connection.scalars(text(query)))
            foreign = [name for name in names if not name.startswith(self.mark(tenant))]
            assert foreign == [], f"{tenant} has {foreign}"
            assert len(names) == len(set(names))
            assert self.acknowledged[tenant] <= set(names), f"{tenant} has lost some"
            rows += len(names)
        return rows


class Client:
    """Goes through steps, and fails where an answer shows what is another tenant's.

    A connection that was cut is no reason for one: what lost it is run again.
    """

    def __init__(self, directory: Directory, send: Send) -> None:
        self.directory = directory
        self.send = send

    def go(self, steps: Sequence[Step]) -> None:
        tenants = self.directory.tenants
        for step in steps:
            getattr(self, step.action)(tenants[step.place % len(tenants)])

    def ask(self, method: str, path: str, tenant: str | None, body: Any = None) -> tuple[int, Any]:
        """Send a request; look at every name in the answer."""
        status, content = self.send(method, path, tenant, body)
        assert status in (200, 201, 422), (status, content)
        for item in content.get("items", [content]):
            own = item.get("name", self.directory.mark(tenant))
            assert own.startswith(self.directory.mark(tenant)), f"{tenant} was shown {own}"
        return status, content

    def new(self, tenant: str | None) -> str:
        return f"{self.directory.mark(tenant)}number {next(numbers)}"

    def create(self, tenant: str | None) -> None:
        """Create a department, and find it again by its id."""
        name = self.new(tenant)
        status, content = self.ask("POST", DEPARTMENTS, tenant, {"name": name})
        assert (status, content["name"]) == (201, name)
        self.directory.acknowledge(tenant, [name])
        status, found = self.ask("GET", f"{DEPARTMENTS}/{content['id']}", tenant)
        assert (status, found["name"]) == (200, name)

    def batch(self, tenant: str | None) -> None:
        """Create two employees of a new department."""
        department, names = self.new(tenant), [self.new(tenant), self.new(tenant)]
        items = [{"name": name, "department": department} for name in names]
        _, content = self.ask("POST", "/api/v1/employees/batch", tenant, {"items": items})
        assert content["created"] == 2
        self.directory.acknowledge(tenant, [department, *names])

    def list(self, tenant: str | None) -> None:
        """List departments and employees."""
        for path in (DEPARTMENTS, "/api/v1/employees"):
            self.ask("GET", f"{path}?limit=500", tenant)

    def find(self, tenant: str | None) -> None:
        """Ask for a department by name, one that every tenant has: by its own name."""
        name = f"{self.directory.mark(tenant)}head office"
        _, content = self.ask("POST", DEPARTMENTS, tenant, {"name": name})
        assert content["name"] == name

    def rename(self, tenant: str | None) -> None:
        """Give a new department another name."""
        _, made = self.ask("POST", DEPARTMENTS, tenant, {"name": self.new(tenant)})
        path, name = f"{DEPARTMENTS}/{made['id']}", self.new(tenant)
        _, content = self.ask("PATCH", path, tenant, {"name": name})
        assert content["name"] == name
        self.directory.acknowledge(tenant, [name])

    def refused(self, tenant: str | None) -> None:
        """Send what cannot be stored: the value, and what it refers to."""
        for path, body in ((DEPARTMENTS, {"name": " "}), ("/api/v1/employees", NO_DEPARTMENT)):
            assert self.ask("POST", path, tenant, body)[0] == 422

    def unknown(self, tenant: str | None) -> None:
        """Ask for a tenant that there is not."""
        status, content = self.send("GET", DEPARTMENTS, NOBODY, None)
        assert (status, content["code"]) == (404, "unknown_tenant")

    def cut(self, tenant: str | None) -> None:
        """Have the service lose its connections to a database, and go on."""
        self.directory.cut(tenant)
        self.list(tenant)


NO_DEPARTMENT = {"name": "Nobody's", "department_id": 2**62}
