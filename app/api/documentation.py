"""The Swagger document, derived from the marshmallow schemas: no field is written twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask_restx import Namespace, SchemaModel
from marshmallow import Schema

from app import schemas

Method = TypeVar("Method", bound=Callable[..., Any])

# A schema comes after those nested in it.
SCHEMAS = {
    "Department": schemas.DepartmentSchema(),
    "DepartmentChange": schemas.DepartmentSchema(partial=True),
    "DepartmentPage": schemas.DepartmentPageSchema(),
    "Employee": schemas.EmployeeSchema(),
    "EmployeeChange": schemas.EmployeeSchema(partial=True),
    "EmployeePage": schemas.EmployeePageSchema(),
    "EmployeeBatch": schemas.EmployeeBatchSchema(),
    "EmployeeBatchOutcome": schemas.EmployeeBatchOutcomeSchema(),
    "Group": schemas.GroupSchema(),
    "GroupPage": schemas.GroupPageSchema(),
    "MergeRequest": schemas.MergeRequestSchema(),
    "Merge": schemas.MergeSchema(),
    "Undo": schemas.UndoSchema(),
    "Tenant": schemas.TenantSchema(),
    "TenantPage": schemas.TenantPageSchema(),
    "Collision": schemas.CollisionSchema(),
    "Problem": schemas.ProblemSchema(),
}
RECORDS = ("Department", "Employee")
TAG = {"ETag": "Which state of the record this is."}
HEADERS = {
    201: {"Location": "The new record."},
    304: TAG,
    308: {"Location": "The canonical record."},
    401: {"WWW-Authenticate": "What is wrong with the token."},
    403: {"WWW-Authenticate": "The scope that is missing."},
    409: {"Location": "The record in the way."},
    429: {"Retry-After": "When to try again, in seconds."},
    503: {"Retry-After": "When to try again, in seconds."},
}
ALWAYS = {"X-Request-ID": "The request's own, if it had a sane one, or a new one; logs have it."}
# Of every operation: no token, its scope, too long an address, too many requests, the database
# away or busy.
EVERYWHERE = (401, 403, 414, 429, 503)
# Of every operation on a tenant's records: no such tenant, no such name.
OF_A_TENANT = (404, 422)
PROBLEM = "application/problem+json"

REQUEST_HEADERS = {
    "If-Match": "Only if the record is still as one of these tags has it, or `*`: if it is there.",
    "If-None-Match": "Only if the record is not, or no longer, as one of these tags has it.",
    "Idempotency-Key": "What you call this request by, to be able to send it again.",
    "X-Tenant": "Whose database it is about; without, the service's own.",
}


def _models() -> dict[str, SchemaModel]:
    spec = APISpec("Rollcall", "1", "2.0", plugins=[MarshmallowPlugin()])
    for name, schema in SCHEMAS.items():
        spec.components.schema(name, schema=schema)
    definitions = spec.to_dict()["definitions"]
    return {name: SchemaModel(name, definition) for name, definition in definitions.items()}


MODELS = _models()

# What the Swagger UI's Authorize asks for. Swagger 2 knows no bearer tokens, only a header.
AUTHORIZATIONS = {
    "bearer": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "Bearer, a blank, and the token.",
    }
}


def describe(
    namespace: Namespace,
    answers: Mapping[int, str],
    refusals: tuple[int, ...] = (),
    body: str | None = None,
    optional_body: bool = False,
    query: Schema | None = None,
    headers: tuple[str, ...] = (),
    of_the_service: bool = False,
) -> Callable[[Method], Method]:
    """Document a method: the model of each answer, the statuses of problems, and what it takes.

    One that is not ``of_the_service`` as a whole may name a tenant.
    Flask-RESTX takes each body for one that has to be there, unless its parameter says otherwise.
    """

    headers = headers if of_the_service else (*headers, "X-Tenant")
    always = EVERYWHERE if of_the_service else EVERYWHERE + OF_A_TENANT

    def decorate(method: Method) -> Method:
        statuses = dict.fromkeys(sorted({*always, *refusals}), "Problem") | dict(answers)
        has_content = any(answers.values())
        params: dict[str, Any] = {}
        if optional_body:
            params["payload"] = {"in": "body", "required": False}
        if query is not None:
            params |= _parameters(query)
        params |= {name: _header(name) for name in headers}
        said: dict[str, Any] = {
            "responses": {
                str(status): _answer(status, model) for status, model in statuses.items()
            },
            "produces": ["application/json", PROBLEM] if has_content else [PROBLEM],
            "params": params,
        }
        if body is not None:
            said |= {"expect": [MODELS[body]], "validate": False}
        # At once: with each call Flask-RESTX copies all that was said before, models too.
        documented: Method = namespace.doc(**said)(method)
        return documented

    return decorate


def _answer(status: int, model: str) -> tuple[str, SchemaModel | None, dict[str, Any]]:
    headers = HEADERS.get(status, {}) | (TAG if model in RECORDS else {}) | ALWAYS
    return HTTPStatus(status).phrase, MODELS.get(model), {"headers": headers}


def _header(name: str) -> dict[str, Any]:
    return {"in": "header", "type": "string", "description": REQUEST_HEADERS[name]}


def _parameters(query: Schema) -> dict[str, Any]:
    plugin = MarshmallowPlugin()
    APISpec("Rollcall", "1", "2.0", plugins=[plugin])
    assert plugin.converter is not None  # noqa: S101 - set by APISpec, tells mypy so
    parameters = plugin.converter.schema2parameters(query, location="query")
    return {parameter.pop("name"): parameter for parameter in parameters}
