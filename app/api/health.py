"""What machines ask: is the process up, can it serve, and what has it done so far?"""

from __future__ import annotations

from flask import Blueprint, Response

from app import metrics
from app.api.errors import RETRY_AFTER, Problem
from app.api.responses import as_json
from app.readiness import readiness

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """Answer 200 as long as the process answers at all."""
    return as_json({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> Response:
    """Answer 200 when the database answers and its schema is current, and 503 otherwise.

    What is amiss and no reason not to serve is said in ``notes``.
    """
    found = readiness()
    if found.is_ready:
        return as_json(found.state)
    members = {**found.state, "status": 503}
    return Problem(503, "not_ready", found.detail, RETRY_AFTER, members).response()


@blueprint.get("/metrics", endpoint="metrics")
def show_metrics() -> Response:
    """Answer with what all workers have counted, in Prometheus' text format."""
    return Response(metrics.exposition(), content_type=metrics.CONTENT_TYPE)
