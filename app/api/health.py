"""The probes of an orchestrator: is the process up, and can it serve?"""

from __future__ import annotations

from flask import Blueprint, Response

from app.api.responses import as_json
from app.database import readiness

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """Answer 200 as long as the process answers at all."""
    return as_json({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> Response:
    """Answer 200 when the database answers and its schema is current, and 503 otherwise."""
    state = readiness()
    return as_json(state, 200 if state["status"] == "ready" else 503)
