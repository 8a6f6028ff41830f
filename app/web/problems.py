"""From an exception to an RFC 9457 problem: the one place that knows both."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from http import HTTPStatus
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import HTTPException

from app import errors
from app.transactions import sqlstate
from app.web import BASE
from app.web.answers import Answer
from app.web.requests import Request
from migrations_bootstrap import BootstrapError

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
COLLECTIONS = {"Department": f"{BASE}/departments", "Employee": f"{BASE}/employees"}


@dataclass(frozen=True)
class Problem:
    """What the client is told: a stable code, words for people, and more by member name."""

    status: int
    code: str
    detail: str
    headers: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, root: str = "") -> Answer:
        """Return the problem as an answer; its Location is below what the service is mounted at."""
        content = {
            "type": f"urn:rollcall:problem:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.members,
        }
        headers = dict(self.headers)
        if "Location" in headers:
            headers["Location"] = f"{root}{headers['Location']}"
        return Answer(self.status, json.dumps(content), headers, "application/problem+json")


def respond(error: Exception, request: Request) -> Answer:
    """Return the answer for any exception; one that nobody foresaw is logged and a 500."""
    if isinstance(error, errors.RecordIsDuplicate) and request.method in ("GET", "HEAD"):
        return _moved(error, request.root)
    return problem_of(error).answer(request.root)


def _moved(error: errors.RecordIsDuplicate, root: str) -> Answer:
    """Lead a reader to the canonical record; an undone merge takes it back, so nobody may cache."""
    location = f"{root}{_path(error.record, error.canonical_id)}"
    headers = {"Location": location, "Cache-Control": "no-store"}
    return Answer(HTTPStatus.PERMANENT_REDIRECT, headers=headers)


def _path(record: str, id: int) -> str:
    return f"{COLLECTIONS[record]}/{id}"


UNFORESEEN = Problem(500, "internal_error", "The server met an error it did not foresee.")


@singledispatch
def problem_of(error: Exception) -> Problem:
    """Return what to tell the client about an exception."""
    logger.error("unforeseen error", exc_info=error)
    return UNFORESEEN


# Not http.HTTPStatus's names and phrases: they change between versions of Python.
HTTP_ERRORS = {
    400: ("bad_request", "The request is not well-formed."),
    403: ("forbidden", "This is not allowed."),
    404: ("not_found", "Nothing is here."),
    405: ("method_not_allowed", "This resource does not know the method; see Allow."),
    408: ("request_timeout", "The request took too long to arrive."),
    413: ("content_too_large", "The body is too large."),
    414: ("uri_too_long", "The address is too long."),
    415: ("unsupported_media_type", "The body must be application/json."),
    417: ("expectation_failed", "The expectation cannot be met."),
    429: ("too_many_requests", "Too many requests; see Retry-After."),
    431: ("header_fields_too_large", "The headers are too large."),
    501: ("not_implemented", "The transfer coding is not supported."),
    503: ("overloaded", "Too much is being sent at once; try again."),
}


def http_problem(status: int, headers: Mapping[str, str] | None = None) -> Problem:
    """Return the problem of a plain HTTP error."""
    code, detail = HTTP_ERRORS.get(status, ("http_error", "The request cannot be answered."))
    return Problem(status, code, detail, headers or {})


@problem_of.register
def _(error: HTTPException) -> Problem:
    kept = ("Allow", "Retry-After", "WWW-Authenticate")
    headers = {name: value for name, value in error.get_headers() if name in kept}
    return http_problem(error.code or 500, headers)


CHALLENGE = 'Bearer realm="rollcall"'


@problem_of.register
def _(error: errors.NotAuthenticated) -> Problem:
    if not error.presented:
        detail = "A token is needed, sent as Authorization: Bearer."
        return _challenge(401, "unauthorized", detail)
    detail = "The token is unknown, revoked or expired."
    return _challenge(401, "unauthorized", detail, error="invalid_token")


@problem_of.register
def _(error: errors.ScopeMissing) -> Problem:
    detail = f"The token's scope is not enough: this takes a token of scope {error.scope}."
    told = {"error": "insufficient_scope", "scope": error.scope}
    return replace(_challenge(403, "forbidden", detail, **told), members={"scope": error.scope})


@problem_of.register
def _(error: errors.CrossOrigin) -> Problem:
    return Problem(403, "cross_origin", "Pages of this origin may not change anything.")


def _challenge(status: int, code: str, detail: str, **told: str) -> Problem:
    """Return a problem that says what is wrong with a token as RFC 6750 does, too."""
    challenge = ", ".join([CHALLENGE, *(f'{name}="{value}"' for name, value in told.items())])
    return Problem(status, code, detail, {"WWW-Authenticate": challenge})


@problem_of.register
def _(error: errors.MalformedBody) -> Problem:
    return Problem(400, "malformed_json", "The body is not valid JSON.")


@problem_of.register
def _(error: errors.InvalidInput) -> Problem:
    detail = "The request breaks a rule; see errors."
    return Problem(422, "invalid", detail, members={"errors": error.errors})


@problem_of.register
def _(error: errors.RecordNotFound) -> Problem:
    return Problem(404, "not_found", f"No {error.record.lower()} has this id.")


@problem_of.register
def _(error: errors.NaturalKeyTaken) -> Problem:
    return _conflict(error, "key_taken", "already has this natural key", error.id)


@problem_of.register
def _(error: errors.RecordIsDuplicate) -> Problem:
    detail = f"is a duplicate of {error.canonical_id}; change that one"
    return _conflict(error, "is_duplicate", detail, error.canonical_id)


@problem_of.register
def _(error: errors.RecordChanged) -> Problem:
    detail = f"{error.record} {error.id} is not as the request expects it; look again."
    return Problem(412, "precondition_failed", detail)


@problem_of.register
def _(error: errors.TokenReused) -> Problem:
    detail = "This Idempotency-Key has created another record; give each request a key of its own."
    return Problem(422, "idempotency_key_reused", detail)


@problem_of.register
def _(error: errors.RecordHasDuplicates) -> Problem:
    return _conflict(error, "has_duplicates", "has duplicates; purge them first", error.id)


@problem_of.register
def _(error: errors.RecordInUse) -> Problem:
    return _conflict(error, "in_use", "is still referred to by other rows", error.id)


@problem_of.register
def _(error: errors.DepartmentNotEmpty) -> Problem:
    detail = "still has employees; use ?cascade=true to delete them too"
    return _conflict(error, "not_empty", detail, error.id)


def _conflict(error: errors.RecordError, code: str, detail: str, id: int) -> Problem:
    """Return a 409 that names the record in the way, in words, as a member and as a link."""
    headers = {"Location": _path(error.record, id)}
    return Problem(409, code, f"{error.record} {error.id} {detail}.", headers, {"id": id})


@problem_of.register
def _(error: errors.NothingToMerge) -> Problem:
    return _conflict(error, "no_duplicates", "has no duplicates to merge", error.id)


@problem_of.register
def _(error: errors.HomonymsFound) -> Problem:
    columns = sorted({name for group in error.groups for name in group.homonyms})
    detail = (
        f"These may be different records: they differ in {', '.join(columns)}."
        " Send accept_homonyms if they are one."
    )
    return Problem(409, "homonyms", detail)


@problem_of.register
def _(error: errors.RowsCollide) -> Problem:
    detail = "Rows that refer to these records would get in each other's way; see collisions."
    members = {"collisions": [collision._asdict() for collision in error.collisions]}
    return Problem(409, "collision", detail, members=members)


@problem_of.register
def _(error: errors.GroupChanged) -> Problem:
    return Problem(409, "changed", "The records have changed meanwhile; look again.")


@problem_of.register
def _(error: errors.UnknownMerge) -> Problem:
    return Problem(404, "not_found", "No merge has this id.")


@problem_of.register
def _(error: errors.CannotUndo) -> Problem:
    return Problem(409, "cannot_undo", f"Merge {error.id} cannot be undone: {error.reason}.")


@problem_of.register
def _(error: errors.TenantUnknown) -> Problem:
    return Problem(404, "unknown_tenant", "There is no tenant of this name.")


@problem_of.register
def _(error: errors.TenantForbidden) -> Problem:
    detail = "The token belongs to one tenant; this is not for that one."
    return _challenge(403, "wrong_tenant", detail, error="insufficient_scope")


@problem_of.register
def _(error: errors.TenantInUse) -> Problem:
    detail = "Others are connected to the tenant's database; use ?force=true to end their sessions."
    return Problem(409, "tenant_in_use", detail)


@problem_of.register
def _(error: errors.TenantGoing) -> Problem:
    return Problem(409, "tenant_dropping", "The tenant is being dropped; delete it again first.")


@problem_of.register
def _(error: errors.DatabaseTaken) -> Problem:
    detail = "There is a database of the name that the tenant's would have; it is not the tenant's."
    return Problem(409, "database_taken", detail)


@problem_of.register
def _(error: errors.UnusableName) -> Problem:
    return problem_of(errors.InvalidInput({"name": [_sentence(error)]}))


@problem_of.register
def _(error: errors.UnknownRole) -> Problem:
    return problem_of(errors.InvalidInput({"owner": [_sentence(error)]}))


def _sentence(error: Exception) -> str:
    return f"{str(error)[:1].upper()}{str(error)[1:]}."


@problem_of.register
def _(error: errors.SchemaBehind) -> Problem:
    return _unavailable("schema_behind", "The tenant's database has yet to be brought up to date.")


@problem_of.register
def _(error: BootstrapError) -> Problem:
    logger.error("a database cannot be brought up or dropped: %s", error)
    return _unavailable("database_away", "The database cannot do this now; the log says why.")


@problem_of.register
def _(error: errors.UnknownTable) -> Problem:
    logger.error("the database is not as the service needs it: %s", error)
    return _unavailable("schema_behind", "The database has yet to be brought up to date.")


@problem_of.register
def _(error: errors.NotStored) -> Problem:
    return Problem(409, "conflict", "A rule of the database keeps the row from being stored.")


@problem_of.register
def _(error: errors.ContentionError) -> Problem:
    if error.sqlstate is None and not isinstance(error.__cause__, PoolTimeout):
        return _unavailable("database_away", "The database does not answer; try again.")
    return _unavailable("contention", "Too many clients want the same at once; try again.")


def _unavailable(code: str, detail: str) -> Problem:
    return Problem(503, code, detail, RETRY_AFTER)


@problem_of.register
def _(error: DBAPIError) -> Problem:
    """Read the SQLSTATE: its first two characters are its class (manual, appendix A)."""
    state = sqlstate(error) or ""
    if state in REFUSED_VALUES or state.startswith("22"):
        return Problem(422, "invalid", "The database refuses one of the values.")
    if state in CONFLICTS:
        return Problem(409, "conflict", "Another row, or a rule of the database, is in the way.")
    if not state or state in NOT_NOW or state[:2] in NOT_NOW_CLASSES:
        logger.error("the database does not serve: sqlstate=%s", state, exc_info=error)
        return _unavailable("database_away", "The database cannot do this now; try again.")
    logger.error("unforeseen database error: sqlstate=%s", state, exc_info=error)
    return UNFORESEEN


REFUSED_VALUES = frozenset({"23502", "23514", "44000", "P0001"})  # not null, checks, triggers
CONFLICTS = frozenset({"23001", "23503", "23505", "23P01"})  # foreign, unique, exclusion
# Read-only, a standby (which knows no SERIALIZABLE), unknown, time-outs.
NOT_NOW = frozenset({"0A000", "25006", "40003", "55000", "55P03", "57014"})
# Connection, refused user, no such database (psycopg2 has no SQLSTATE then), resources, operator,
# system.
NOT_NOW_CLASSES = frozenset({"08", "28", "3D", "53", "57", "58"})
