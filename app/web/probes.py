"""What machines ask: is the process up, and can it serve?"""

from __future__ import annotations

from app.readiness import readiness
from app.web.answers import Answer, as_json
from app.web.problems import RETRY_AFTER, Problem


def healthz() -> Answer:
    """Answer 200 as long as the process answers at all."""
    return as_json({"status": "ok"})


def readyz() -> Answer:
    """Answer 200 when the database answers and its schema is current, and 503 otherwise.

    What is amiss and no reason not to serve is said in ``notes``.
    """
    found = readiness()
    if found.is_ready:
        return as_json(found.state)
    members = {**found.state, "status": 503}
    return Problem(503, "not_ready", found.detail, RETRY_AFTER, members).answer()
