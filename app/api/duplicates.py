"""Duplicates and merges over HTTP, for data stewards."""

from __future__ import annotations

from flask import Response
from flask_restx import Namespace, Resource
from werkzeug.exceptions import NotFound

from app import stewards
from app.api.documentation import describe
from app.api.exchange import CURRENT, respond
from app.schemas import (
    TABLES,
    GroupQuery,
    GroupSchema,
    MergeRequestSchema,
    MergeSchema,
    UndoSchema,
)
from app.web import answers, requests

namespace = Namespace("duplicates", "Records that are there more than once.", path="/")
group_query = GroupQuery()
group = GroupSchema()
merge_request = MergeRequestSchema()
merge = MergeSchema()
undone = UndoSchema()


@namespace.route("/duplicates", endpoint="duplicates")
class Duplicates(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "GroupPage"}, refusals=(422,), query=group_query)
    def get(self) -> Response:
        """List groups of records that are one, and wait to be merged."""
        query = requests.query(CURRENT, group_query)
        names = [query["table"]] if "table" in query else TABLES
        groups, more = stewards.groups(names, query["after"], query["limit"])
        following = f"{groups[-1].table}:{groups[-1].lowest}" if more else None
        return respond(answers.page(CURRENT, group.dump(groups, many=True), following))


@namespace.route("/duplicates/<string:table>/<int:id>/merge", endpoint="duplicates_merge")
class MergeOne(Resource):  # type: ignore[misc]
    @describe(
        namespace,
        {200: "Merge"},
        refusals=(400, 404, 409, 413, 415, 422),
        body="MergeRequest",
        optional_body=True,
    )
    def post(self, table: str, id: int) -> Response:
        """Merge a record's duplicates into it; the body may be left out."""
        if table not in TABLES:
            raise NotFound
        asked = requests.body(CURRENT, merge_request, optional=True)
        return respond(answers.as_json(merge.dump(stewards.merge_one(table, id, **asked))))


@namespace.route("/merges/<int:id>/undo", endpoint="merge_undo")
class UndoOne(Resource):  # type: ignore[misc]
    @describe(namespace, {200: "Undo"}, refusals=(404, 409))
    def post(self, id: int) -> Response:
        """Take a merge back: every row is as it was before it, or nothing changes."""
        restored = stewards.undo_merge(id)
        return respond(answers.as_json(undone.dump({"id": id, "restored": restored})))
