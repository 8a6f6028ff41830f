"""What can go wrong, in the words of the domain: one tree, no HTTP, no SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class RollcallError(Exception):
    """The root of everything Rollcall raises on purpose."""


class ConfigurationError(RollcallError):
    """A setting cannot be used; ``str(error)`` is the one line an operator reads."""


class ContentionError(RollcallError):
    """A unit of work was tried until its attempts or its time were spent.

    ``attempts`` counts the tries, ``elapsed`` is in seconds, and ``sqlstate`` is that of the last
    failure (None when the server did not get as far as giving one). Nothing that the caller can
    rely on was stored, and trying again later is safe.
    """

    def __init__(self, attempts: int, elapsed: float, sqlstate: str | None) -> None:
        super().__init__(
            f"gave up after {attempts} attempts in {elapsed:.2f} s (last SQLSTATE: {sqlstate})"
        )
        self.attempts = attempts
        self.elapsed = elapsed
        self.sqlstate = sqlstate


class LostRace(RollcallError):
    """Somebody else changed what a unit of work relied on; running it again can help."""


class NotStored(RollcallError):
    """The database took a row without an error, and did not store it: a trigger's doing."""


class TokenReused(RollcallError):
    """A request has the token of another one, which created a row of another natural key."""


class DatabaseAway(RollcallError):
    """The server cannot be reached, or takes no connections just now."""


class SessionShared(RollcallError):
    """A session is one task's, and another has used it: give each a session of its own."""


class ReplicaBehind(RollcallError):
    """The replica has not yet got as far as a reader has to see."""


class MalformedBody(RollcallError):
    """The body is not JSON as RFC 8259 has it."""


class InvalidInput(RollcallError):
    """What was sent breaks a rule; ``errors`` says which, by field."""

    def __init__(self, errors: Mapping[str, Sequence[str]]) -> None:
        super().__init__(f"invalid: {', '.join(errors)}")
        self.errors = errors


class NotAuthenticated(RollcallError):
    """A request has no token that is valid; ``presented`` tells whether it has one at all."""

    def __init__(self, presented: bool) -> None:
        super().__init__("the token is not valid" if presented else "there is no token")
        self.presented = presented


class ScopeMissing(RollcallError):
    """A request's token is not good for what is asked; ``scope`` is what would be."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"the scope {scope} is missing")
        self.scope = scope


class CrossOrigin(RollcallError):
    """A page of another origin, which may not call, had a browser send a change."""


class UnusableName(RollcallError):
    """Something cannot be called so; ``str(error)`` says why."""


class TokenNameTaken(RollcallError):
    """There is a token of this name, perhaps one that has expired."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is a token named {name}: revoke it first, or take another name")
        self.name = name


class UnknownToken(RollcallError):
    """There is no token of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no token named {name}")
        self.name = name


class TenantUnknown(RollcallError):
    """There is no tenant of this name, not yet or no longer."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no tenant named {name}")
        self.name = name


class TenantForbidden(RollcallError):
    """A request's token belongs to one tenant, and this is not for that one."""


class TenantInUse(RollcallError):
    """Others than the service are connected to a tenant's database, so that it cannot go."""

    def __init__(self, name: str, sessions: int) -> None:
        super().__init__(
            f"the database of tenant {name} is in use: sessions that are not Rollcall's: {sessions}"
        )
        self.name = name


class TenantGoing(RollcallError):
    """A tenant of this name is being dropped: that has to end first."""

    def __init__(self, name: str) -> None:
        super().__init__(f"tenant {name} is being dropped: drop it again to finish that")
        self.name = name


class DatabaseTaken(RollcallError):
    """There is a database of the name that a tenant's would have, and it is not a tenant's."""

    def __init__(self, database: str) -> None:
        super().__init__(f"there is a database {database} that was not made for this tenant")
        self.database = database


class UnknownRole(RollcallError):
    """There is no such role, or the service's may not give it a database."""


class SchemaBehind(RollcallError):
    """A tenant's database has yet to be brought up to date."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the database of tenant {name} has yet to be upgraded")
        self.name = name


class UnusableFile(RollcallError):
    """A file cannot be read as what it should be; ``str(error)`` ends a sentence on the file."""


class UnknownTable(RollcallError):
    """A table or column that was named is not there; ``str(error)`` says which."""


class UnknownReference(UnknownTable):
    """A soft reference was declared that the database does not have."""


class GroupChanged(RollcallError):
    """The rows of a group are not what they were when it was found: look again."""


class AlreadyMerged(GroupChanged):
    """The rows of a group have been merged by somebody else, and nothing is left to do."""


class RowsCollide(RollcallError):
    """A merge would break a rule of the rows that refer to what is merged; nothing was changed.

    Each of ``collisions`` has a table, a reason, and the rows: ``first``, ``others``.
    """

    def __init__(self, collisions: Sequence[Any]) -> None:
        super().__init__("; ".join(f"{one.table}: {one.reason}" for one in collisions))
        self.collisions = collisions


class HomonymsFound(RollcallError):
    """Rows of one key may be different people; ``groups`` are those that nobody has decided on."""

    def __init__(self, groups: Sequence[Any]) -> None:
        super().__init__(f"{len(groups)} groups may be different people of one name")
        self.groups = groups


class NotGuarded(RollcallError):
    """A table could not be guarded: writers make duplicates faster than they can be marked."""


class UnusablePlan(RollcallError):
    """A plan cannot be followed; ``str(error)`` says where and why."""


class UnknownMerge(RollcallError):
    """The journal has no such merge."""

    def __init__(self, id: int) -> None:
        super().__init__(f"there is no merge {id}")
        self.id = id


class CannotUndo(RollcallError):
    """A merge cannot be taken back; ``reason`` says why. Nothing was changed."""

    def __init__(self, id: int, reason: str) -> None:
        super().__init__(f"merge {id} cannot be undone: {reason}")
        self.id = id
        self.reason = reason


class MergesRemain(RollcallError):
    """Marks cannot be taken off while merges are journalled that rely on them."""


class RecordError(RollcallError):
    """An error about one record: ``record`` is the model's name, ``id`` the row's."""

    def __init__(self, record: str, id: int) -> None:
        super().__init__(f"{record} {id}")
        self.record = record
        self.id = id


class RecordNotFound(RecordError):
    """No row has this id."""


class RecordChanged(RecordError):
    """The row is not, or no longer, as the caller takes it to be; nothing was changed."""


class NaturalKeyTaken(RecordError):
    """Another row, ``id``, already has the natural key."""


class RecordIsDuplicate(RecordError):
    """The row is a duplicate; ``canonical_id`` is the row that is kept in its place."""

    def __init__(self, record: str, id: int, canonical_id: int) -> None:
        super().__init__(record, id)
        self.canonical_id = canonical_id


class RecordHasDuplicates(RecordError):
    """The row has duplicates that point at it, so that it cannot go or change its key."""


class RecordInUse(RecordError):
    """Other rows refer to the row, so that it cannot be deleted."""


class NothingToMerge(RecordError):
    """The row has no duplicates that wait to be merged."""


class DepartmentNotEmpty(RecordError):
    """The department still has employees."""
