"""A client of Rollcall that needs the standard library alone: copy it, and make it yours.

client = Client("http://127.0.0.1:8000/api/v1")
ada = client.create("employees", name="Ada Lovelace", department="Research")
client.update("employees", ada["id"], lambda employee: {"title": "Analyst"})
for employee in client.each("employees", q="love"):
    print(employee["name"])
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urljoin
from urllib.request import Request, urlopen

TRIES = 5


class Refused(Exception):
    """An answer that is no success, and what the service says of it: a problem of RFC 9457."""

    def __init__(self, error: HTTPError) -> None:
        with error:
            super().__init__(error.code, error.read().decode())
        self.status = error.code
        self.wait = float(error.headers.get("Retry-After", "1"))  # seconds


@dataclass
class Client:
    """Speaks to one service. What it refuses is raised as Refused."""

    base: str
    token: str = ""
    timeout: float = 30  # seconds

    def create(self, collection: str, **fields: Any) -> Any:
        """Return the record that has the fields' natural key, created if it was not there."""
        record, _ = self._call("POST", collection, fields)
        return record

    def each(self, collection: str, **filters: Any) -> Iterator[Any]:
        """Yield the records of a collection; the next page is fetched when it is needed."""
        following = f"{collection}?{urlencode(filters)}"
        while following:
            page, _ = self._call("GET", following)
            yield from page["items"]
            following = page["next"]

    def update(
        self, collection: str, id: int, change: Callable[[Any], dict[str, Any]], tries: int = TRIES
    ) -> Any:
        """Change the fields that ``change`` returns, given the record; return the new record.

        The change is of the version that it was made for. If somebody was quicker (412) it is made
        again, for theirs.
        """
        record, version = self._call("GET", f"{collection}/{id}")
        try:
            changed, _ = self._call("PATCH", f"{collection}/{id}", change(record), version)
        except Refused as refused:
            if refused.status != 412 or tries == 1:
                raise
            return self.update(collection, id, change, tries - 1)
        return changed

    def _call(
        self, method: str, path: str, body: Any = None, version: str = "", tries: int = TRIES
    ) -> tuple[Any, str]:
        """Return an answer's content and the version (ETag) of what it shows, if it has one.

        Waits as long as the service asks for when it is busy (503), or we are (429). All that a
        client can send may be sent again: creates find what they have made before.
        """
        request = Request(  # noqa: S310 - the address is our caller's, no stranger's
            urljoin(f"{self.base}/", path),
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        if version:
            request.add_header("If-Match", version)
        try:
            with urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                return json.load(answer), answer.headers.get("ETag", "")
        except HTTPError as error:
            refused = Refused(error)
        if refused.status not in (429, 503) or tries == 1:
            raise refused
        time.sleep(refused.wait)
        return self._call(method, path, body, version, tries - 1)
