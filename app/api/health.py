"""What machines ask: is the process up, can it serve, and what has it done so far?"""

from __future__ import annotations

from flask import Blueprint, Response

from app import metrics
from app.api.exchange import respond
from app.web import probes

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """Answer 200 as long as the process answers at all."""
    return respond(probes.healthz())


@blueprint.get("/readyz")
def readyz() -> Response:
    """Answer 200 when the database answers and its schema is current, and 503 otherwise.

    What is amiss and no reason not to serve is said in ``notes``.
    """
    return respond(probes.readyz())


@blueprint.get("/metrics", endpoint="metrics")
def show_metrics() -> Response:
    """Answer with what all workers have counted, in Prometheus' text format."""
    return Response(metrics.exposition(), content_type=metrics.CONTENT_TYPE)
