"""HTTP: the API under ``/api/v1``, its Swagger UI, and the probes."""

from __future__ import annotations

from flask import Blueprint, Flask, request
from flask_restx import Api
from werkzeug.routing import IntegerConverter
from werkzeug.wrappers import Response

from app.api import departments, duplicates, employees, health, tenants
from app.api.documentation import AUTHORIZATIONS, MODELS
from app.api.exchange import CURRENT, respond
from app.web import BASE, problems


class RollcallApi(Api):  # type: ignore[misc]
    """An Api whose errors are answered as everywhere else in the application.

    Flask-RESTX would otherwise answer in a shape of its own, and prefer an exception's ``data``,
    which may be the client's input (flask-restx issue 33).
    """

    def handle_error(self, e: Exception) -> Response:
        return answer_error(e)


def answer_error(error: Exception) -> Response:
    """Answer any exception with a problem."""
    return respond(problems.respond(error, CURRENT))


class Id(IntegerConverter):
    """A record's id in a path: ASCII digits, where werkzeug would take those of every script."""

    regex = "[0-9]+"


def init_app(app: Flask) -> None:
    """Add the API and the probes to the application."""
    # Problems are ours alone, and Swagger shows every model.
    app.config.setdefault("RESTX_ERROR_404_HELP", False)
    app.config.setdefault("RESTX_MASK_SWAGGER", False)
    app.config.setdefault("RESTX_INCLUDE_ALL_MODELS", True)
    app.url_map.converters["int"] = Id
    blueprint = Blueprint("api", __name__, url_prefix=BASE)
    api = RollcallApi(
        blueprint,
        version="1",
        title="Rollcall",
        description="An employee directory that never stores the same record twice.",
        doc="/",
        authorizations=AUTHORIZATIONS,
        security=list(AUTHORIZATIONS),
    )
    for model in MODELS.values():
        api.add_model(model.name, model)
    for resource in (departments, employees, duplicates, tenants):
        api.add_namespace(resource.namespace)
    app.register_blueprint(blueprint)
    app.register_blueprint(health.blueprint)
    app.register_error_handler(Exception, answer_error)
    app.url_map.merge_slashes = False  # the redirect would be HTML with the client's path in it
    for path in ("/", BASE):
        app.add_url_rule(path, f"lead from {path}", _lead_to_swagger)


def _lead_to_swagger() -> Response:
    return Response(status=302, headers={"Location": f"{request.script_root}{BASE}/"})
