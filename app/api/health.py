"""The probes of an orchestrator: is the process up, and can it serve?"""

from __future__ import annotations

from flask import Blueprint, Response

from app.api.errors import RETRY_AFTER, Problem
from app.api.responses import as_json
from app.database import readiness

blueprint = Blueprint("health", __name__)

WHAT_IS_WRONG = {
    "away": "The database does not answer.",
    "behind": "The database's schema is not that of this version; run flask init-db.",
}


@blueprint.get("/healthz")
def healthz() -> Response:
    """Answer 200 as long as the process answers at all."""
    return as_json({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> Response:
    """Answer 200 when the database answers and its schema is current, and 503 otherwise."""
    state = readiness()
    if state["status"] == "ready":
        return as_json(state)
    detail = WHAT_IS_WRONG[state.get("schema", state["database"])]
    return Problem(503, "not_ready", detail, RETRY_AFTER, {**state, "status": 503}).response()
