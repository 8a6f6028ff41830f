"""What can go wrong, in the words of the domain: one tree, no HTTP, no SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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


class DatabaseAway(RollcallError):
    """The server cannot be reached, or takes no connections just now."""


class MalformedBody(RollcallError):
    """The body is not JSON as RFC 8259 has it."""


class InvalidInput(RollcallError):
    """What was sent breaks a rule; ``errors`` says which, by field."""

    def __init__(self, errors: Mapping[str, Sequence[str]]) -> None:
        super().__init__(f"invalid: {', '.join(errors)}")
        self.errors = errors


class UnusableFile(RollcallError):
    """A file cannot be read as what it should be; ``str(error)`` ends a sentence on the file."""


class UnknownTable(RollcallError):
    """A table or column that was named is not there; ``str(error)`` says which."""


class RecordError(RollcallError):
    """An error about one record: ``record`` is the model's name, ``id`` the row's."""

    def __init__(self, record: str, id: int) -> None:
        super().__init__(f"{record} {id}")
        self.record = record
        self.id = id


class RecordNotFound(RecordError):
    """No row has this id."""


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


class DepartmentNotEmpty(RecordError):
    """The department still has employees."""
