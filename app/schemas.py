"""What goes in and out, written once: these schemas validate, dump and document."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timezone
from functools import lru_cache
from typing import Any

from marshmallow import Schema, ValidationError, fields, missing, validates_schema
from marshmallow.validate import Email, Length, OneOf, Range

from app.models import EMAIL_LENGTH, NAME_LENGTH, RECORDS, TITLE_LENGTH
from app.natural_key import normalise
from app.tenants import NAME as TENANT_NAME
from app.tenants import is_name

BIGINT_MAX = 2**63 - 1
LONGEST_BATCH = 1000
LONGEST_REMEMBERED = 100  # characters
DIGITS = re.compile(r"[0-9]{1,19}")
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
YEAR_MONTH_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Recurring(fields.Field[Any]):
    """A field of few different values: a string that passed is not checked again for a while.

    Long ones are, for a body may be full of blanks, and what is remembered takes memory.
    """

    def deserialize(
        self,
        value: Any,
        attr: str | None = None,
        data: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if type(value) is str and len(value) <= LONGEST_REMEMBERED:
            return _remembered(self, value)
        return super().deserialize(value, attr, data, **kwargs)


@lru_cache(maxsize=4096)
def _remembered(field: Recurring, value: str) -> Any:
    return super(Recurring, field).deserialize(value)


class Text(fields.String):
    """A string that PostgreSQL can store and a person can read, of limited length.

    The limit is on the normalised value, which is what is stored and what comes out; with
    ``as_sent`` it stays as it came, for a natural key, which is looked up both ways.
    """

    def __init__(self, longest: int, *, as_sent: bool = False, **options: Any) -> None:
        options.setdefault("metadata", {}).update(minLength=1, maxLength=longest)
        super().__init__(**options)
        self.longest = longest
        self.as_sent = as_sent

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> str:
        if not isinstance(value, str):
            raise self.make_error("invalid")
        normalised: str = normalise(value)
        # Most text is printable, which Python tells at once; the rest is looked at closely.
        if not (normalised and value.isprintable()):
            _require_readable(value)
        if len(normalised) > self.longest:
            raise ValidationError(f"Must not be longer than {self.longest} characters.")
        return value if self.as_sent else normalised


def _require_readable(value: str) -> None:
    categories = [unicodedata.category(character) for character in value]
    if not {"Cc", "Cs"}.isdisjoint(categories):
        raise ValidationError("Must not contain control characters or lone surrogates.")
    if all(category[0] in "CZ" for category in categories):
        raise ValidationError("Must not be blank.")


class Label(Recurring, Text):
    """A text that many records share."""


class Id(fields.Integer):
    """A row's id: a JSON integer, no string and no fraction, within bigint."""

    def __init__(self, **options: Any) -> None:
        super().__init__(strict=True, validate=Range(1, BIGINT_MAX), **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        if type(value) is not int:
            raise self.make_error("invalid")
        return super()._deserialize(value, attr, data, **kwargs)


class Digits(fields.Integer):
    """A whole number in a query string: ASCII digits only."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        if not DIGITS.fullmatch(value):
            raise self.make_error("invalid")
        return super()._deserialize(value, attr, data, **kwargs)


class Flag(fields.Boolean):
    """True or false; marshmallow would take 1 and "yes" too."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Day(Recurring, fields.Date):
    """A date as YYYY-MM-DD; Python would take other forms of ISO 8601 too."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        if not isinstance(value, str) or not YEAR_MONTH_DAY.fullmatch(value):
            raise self.make_error("invalid", input=value, obj_type=self.OBJ_TYPE)
        return super()._deserialize(value, attr, data, **kwargs)


class Moment(fields.DateTime):
    """A time, shown in UTC: drivers differ in the zone that they read it in."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> Any:
        in_utc = None if value is None else value.astimezone(timezone.utc)
        return super()._serialize(in_utc, attr, obj, **kwargs)


class RecordSchema(Schema):
    """What every record comes with; the server sets these."""

    id = Id(dump_only=True)
    duplicate_of_id = Id(
        dump_only=True,
        allow_none=True,
        metadata={"description": "The canonical record, if this one is a duplicate."},
    )
    created_at = Moment(dump_only=True, allow_none=True)
    updated_at = Moment(dump_only=True, allow_none=True)


class DepartmentSchema(RecordSchema):
    name = Text(NAME_LENGTH, as_sent=True, required=True, metadata={"example": "Research"})


class EmployeeSchema(RecordSchema):
    name = Text(NAME_LENGTH, as_sent=True, required=True, metadata={"example": "Ada Lovelace"})
    department_id = Id()
    department = Label(
        NAME_LENGTH,
        as_sent=True,
        load_only=True,
        metadata={"description": "The department by name, instead of `department_id`."},
    )
    title = Label(TITLE_LENGTH, allow_none=True, metadata={"example": "Analyst"})
    email = Text(
        EMAIL_LENGTH,
        allow_none=True,
        validate=Email(),
        metadata={"example": "ada@example.org"},
    )
    hired_on = Day(format="iso", allow_none=True)
    manager_id = Id(allow_none=True)

    def load(self, data: Any, *, many: bool | None = None, **options: Any) -> Any:
        """Do what marshmallow does, at a third of its cost where nothing is wrong.

        What is wrong, and in which words, marshmallow says.
        """
        several = self.many if many is None else many
        with suppress(ValidationError):
            if not several:
                return self._accept(data)
            if isinstance(data, list):
                return [self._accept(item) for item in data]
        return super().load(data, many=many, **options)

    def _accept(self, item: Any) -> dict[str, Any]:
        """Return what a valid item says. It is asked for what it has, and for what it must have."""
        if not isinstance(item, dict) or not item.keys() <= self.load_fields.keys():
            raise ValidationError("This is no employee.")
        accepted = {
            name: field.deserialize(item.get(name, missing), name, item)
            for name, field in self.load_fields.items()
            if name in item or field.required
        }
        self._one_department(accepted)
        return accepted

    @validates_schema
    def _one_department(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        given = [name for name in ("department_id", "department") if name in data]
        if len(given) == 2 or (not given and not self.partial):
            message = ["Give either department_id or department."]
            raise ValidationError({"department_id": message, "department": message})


class ImportedEmployeeSchema(EmployeeSchema):
    class Meta:
        fields = ("name", "department", "title", "email", "hired_on")

    department = Label(NAME_LENGTH, as_sent=True, required=True)


class Items(fields.Nested):
    """A list that is refused for its length before any item is looked at."""

    def _deserialize(self, value: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(value, list):
            self._validate(value)
        return super()._deserialize(value, *arguments, **options)


class EmployeeBatchSchema(Schema):
    items = Items(EmployeeSchema, many=True, required=True, validate=Length(max=LONGEST_BATCH))


class EmployeeBatchItemSchema(Schema):
    id = fields.Integer()
    created = fields.Boolean()


class EmployeeBatchOutcomeSchema(Schema):
    items = fields.List(fields.Nested(EmployeeBatchItemSchema))
    created = fields.Integer()
    existing = fields.Integer()


class ProblemSchema(Schema):
    """An error, as RFC 9457 has it."""

    type = fields.String()
    title = fields.String()
    status = fields.Integer()
    detail = fields.String()
    code = fields.String()
    errors = fields.Dict(keys=fields.String(), values=fields.List(fields.String()))
    id = fields.Integer(metadata={"description": "The record that a conflict is with."})
    collisions = fields.List(
        fields.Nested(lambda: CollisionSchema()),
        metadata={"description": "The rows that keep records from being merged."},
    )


class DepartmentPageSchema(Schema):
    items = fields.List(fields.Nested(DepartmentSchema))
    next = fields.String(allow_none=True)


class EmployeePageSchema(Schema):
    items = fields.List(fields.Nested(EmployeeSchema))
    next = fields.String(allow_none=True)


class PageQuery(Schema):
    limit = Digits(load_default=50, validate=Range(1, 500))
    after = Digits(load_default=0, validate=Range(0, BIGINT_MAX))
    name = Text(NAME_LENGTH, as_sent=True)
    q = Text(NAME_LENGTH, metadata={"description": "Part of the name, in any case."})
    include = fields.String(validate=OneOf(["duplicates"]))


class EmployeePageQuery(PageQuery):
    department_id = Digits(validate=Range(1, BIGINT_MAX))


TABLES = tuple(model.__tablename__ for model in RECORDS)
POSITION = re.compile(rf"({'|'.join(TABLES)}):([0-9]{{1,19}})")


class Position(fields.String):
    """Where a list of groups goes on: a table and an id."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        found = POSITION.fullmatch(value)
        if found is None:
            raise self.make_error("invalid")
        return found[1], int(found[2])


class GroupQuery(Schema):
    limit = Digits(load_default=50, validate=Range(1, 500))
    after = Position(load_default=None, metadata={"description": "As `next` has it."})
    table = fields.String(validate=OneOf(TABLES))

    @validates_schema
    def _within_table(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        after = data.get("after")
        if after is not None and "table" in data and after[0] != data["table"]:
            raise ValidationError({"after": ["This is a place in another table."]})


class GroupSchema(Schema):
    """Records that are one: the one that would be kept, and its duplicates."""

    table = fields.String()
    kept = fields.Integer()
    duplicates = fields.List(fields.Integer())
    marked = fields.List(
        fields.Integer(), metadata={"description": "Those that the guard has marked already."}
    )
    key = fields.Dict(metadata={"description": "The natural key, as stored."})
    homonyms = fields.List(
        fields.String(), metadata={"description": "Fields that differ: perhaps other people."}
    )
    references = fields.Dict(
        metadata={"description": "How many rows refer to each, by id and by their column."}
    )


class GroupPageSchema(Schema):
    items = fields.List(fields.Nested(GroupSchema))
    next = fields.String(allow_none=True)


class MergeRequestSchema(Schema):
    accept_homonyms = Flag(
        load_default=False,
        metadata={"description": "Merge them though filled fields differ."},
    )


class MergeSchema(Schema):
    """What a merge did."""

    id = fields.Integer(metadata={"description": "What it is undone by."})
    table = fields.String()
    kept = fields.Integer()
    duplicates = fields.List(fields.Integer())
    repointed = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "How many rows now refer to the kept record, by their column."},
    )
    filled = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "Blank fields of the kept record, and whom they came from."},
    )
    collapsed = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "How many records became duplicates by it, by table."},
    )


class UndoSchema(Schema):
    id = fields.Integer()
    restored = fields.Integer(metadata={"description": "How many rows are as they were."})


class CollisionSchema(Schema):
    """Rows that a merge would bring into conflict."""

    table = fields.String()
    reason = fields.String()
    first = fields.Dict(allow_none=True)
    others = fields.List(fields.Dict())


class TenantName(fields.String):
    """What a tenant can be called; which names are taken or reserved is not known here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(metadata={"pattern": f"^{TENANT_NAME}$"}, **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> str:
        if not isinstance(value, str) or not is_name(value):
            raise ValidationError(
                "Must be 1 to 63 of a-z, digits, - and _, which are neither first nor last."
            )
        return value


class TenantSchema(Schema):
    name = TenantName(required=True)
    owner = Text(
        NAME_LENGTH,
        allow_none=True,
        as_sent=True,
        metadata={"description": "A role of PostgreSQL, to own the database."},
    )
    state = fields.String(
        dump_only=True, metadata={"description": "ready; or creating, or dropping: do it again."}
    )
    created_at = fields.DateTime(dump_only=True)


class TenantPageSchema(Schema):
    items = fields.List(fields.Nested(TenantSchema))
    next = fields.String(allow_none=True)


class TenantQuery(Schema):
    limit = Digits(load_default=50, validate=Range(1, 500))
    after = TenantName(load_default="")


class DeleteTenantQuery(Schema):
    force = fields.String(
        load_default="false",
        validate=OneOf(["true", "false"]),
        metadata={"description": "End the sessions of others in the database."},
    )


class DeleteDepartmentQuery(Schema):
    cascade = fields.String(
        load_default="false",
        validate=OneOf(["true", "false"]),
        metadata={"description": "Delete the department's employees too."},
    )


def messages_by_field(
    messages: Mapping[Any, Any], within: tuple[str, ...] = ()
) -> dict[str, Sequence[str]]:
    """Return a validation's messages by field, as ``items.3.name`` where one is inside another.

    A name that is no plain identifier is not repeated; its message goes to what it is in.
    """
    by_field: dict[str, list[str]] = {}
    for name, found in messages.items():
        path = (*within, str(name)) if _is_plain(name) else within
        nested = isinstance(found, Mapping)
        inner = messages_by_field(found, path) if nested else {".".join(path) or "body": found}
        for field, texts in inner.items():
            by_field.setdefault(field, []).extend(texts)
    return dict(by_field)


def _is_plain(name: Any) -> bool:
    return isinstance(name, int) or bool(name != "_schema" and FIELD_NAME.fullmatch(name))
