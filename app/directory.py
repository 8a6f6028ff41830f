"""The directory's units of work: find, list, create, change and delete records.

Every write goes through the retry loop of ``transactions``; a read that loses its connection is
run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, ColumnElement, any_, delete, exists, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from app import replica, transactions
from app.batch import Row, find_or_create_all, keep_writers_out
from app.call import read_call, read_calls, with_key
from app.config import request_policy
from app.creation_token import RequestKey, repeatable_token
from app.db import current_engine, current_session
from app.errors import (
    DepartmentNotEmpty,
    InvalidInput,
    LostRace,
    NaturalKeyTaken,
    RecordChanged,
    RecordHasDuplicates,
    RecordInUse,
    RecordIsDuplicate,
    RecordNotFound,
)
from app.get_or_create import (
    find_created,
    find_or_create,
    race_indexes,
    tell_outcomes,
    telling_of_contention,
)
from app.models import RECORDS, Department, Employee, Record
from app.natural_key import canonical, columns_of, normalise, spellings
from app.transactions import FOREIGN_KEY_VIOLATION

AnyRecord = TypeVar("AnyRecord", bound=Record)
Result = TypeVar("Result")

LARGEST_ID = 2**63 - 1
UNKNOWN_DEPARTMENT = {"department_id": ["No department has this id."]}
UNKNOWN_MANAGER = {"manager_id": ["No employee has this id."]}
ID = ("id", "creation_token")
OWN_MANAGER = {"manager_id": ["An employee cannot be their own manager."]}


def read(query: Callable[[Session], Result]) -> Result:
    """Return what a query gives on the request's session, again if its connection is lost.

    The connection is given back with the last row: the rest of the request needs none, and
    get_or_create, which takes one of its own, may follow.
    """
    policy = request_policy()

    def attempt(number: int) -> Result:
        session = current_session()
        try:
            with transactions.reaching(current_engine()):
                connection = session.connection()
            transactions.begin(connection, transactions.limits(policy))
            result = query(session)
            session.commit()
            return result
        except Exception:
            session.rollback()
            raise

    return transactions.retry(attempt, policy)


def anything(found: Any) -> bool:
    """Expect nothing of what was found."""
    return True


def look(
    query: Callable[[Session], Result], suffices: Callable[[Result], bool] = anything
) -> Result:
    """Return what a query gives to somebody who reads: a replica may answer, if there is one.

    What it gives has to suffice; otherwise it is read from the primary.
    """
    return replica.look(query, lambda: read(query), suffices)


def find(model: type[AnyRecord], id: int) -> AnyRecord:
    """Return the canonical record with this id.

    Raises RecordNotFound, and RecordIsDuplicate, which names the row to look at instead.
    """
    record = look(lambda session: _get(session, model, id), suffices=is_there)
    return _require_canonical(model, id, record)


def _get(session: Session, model: type[AnyRecord], id: int) -> AnyRecord | None:
    """Return the row with this id; none beyond bigint, which not every driver would send."""
    return session.get(model, id) if id <= LARGEST_ID else None


def is_there(record: Record | None) -> bool:
    """Tell whether a record was found: a replica may not have it yet."""
    return record is not None


def page(
    model: type[AnyRecord], *, after: int, limit: int, include: str | None = None, **filters: Any
) -> tuple[Sequence[AnyRecord], bool]:
    """Return up to ``limit`` records with an id above ``after``, and whether there are more.

    ``filters`` are those of :func:`_filter`. Duplicates are left out unless ``include`` says
    "duplicates".
    """
    query = select(model).where(model.id > after).order_by(model.id).limit(limit + 1)
    if include != "duplicates":
        query = query.where(model.duplicate_of_id.is_(None))
    query = query.where(*(_filter(model, name, value) for name, value in filters.items()))
    records = look(lambda session: session.scalars(query).all())
    return records[:limit], len(records) > limit


def _filter(model: type[Record], name: str, value: Any) -> ColumnElement[bool]:
    """Return a condition: a name (as sent or normalised), a part of it (q), a department's id."""
    if name == "q":
        return model.name.icontains(value, autoescape=True)
    column: ColumnElement[Any] = getattr(model, name)
    if name == "name":
        return column.in_(spellings(value))
    return column == canonical(Employee.__table__.columns[name], literal(value))


def create_department(name: str, request: RequestKey | None = None) -> tuple[Row, bool]:
    """Return the department of this name, by attribute, and whether the request created it.

    A ``request`` with a key of its own may have been sent before; then it returns what it did.
    Raises TokenReused where its key has created a department of another name.
    """
    return find_or_create(Department, None, _token(Department, request, name=name), name=name)


def create_employee(
    name: str,
    department_id: int | None = None,
    department: str | None = None,
    request: RequestKey | None = None,
    **details: Any,
) -> tuple[Row, bool]:
    """Return the employee of this name and department, and whether the request created them.

    The employee's values come by attribute. The department is given by its id, or by its name,
    which is got or created last of all: a request that was sent before looks for its employee
    first, so that it brings no renamed department back. Raises InvalidInput for an id that nothing
    has, and TokenReused.
    """
    place = {"department_id": department_id} if department is None else {"department": department}
    token = _token(Employee, request, name=name, **place)
    if token is not None and (created := find_created(Employee, token)) is not None:
        return created, True
    if (manager_id := details.get("manager_id")) is not None:
        _require(Employee, manager_id, UNKNOWN_MANAGER)
    if department is None:
        return _create_employee(name, department_id, details, token)

    def attempt(number: int) -> tuple[Row, bool]:
        try:
            return _create_employee(name, create_department(department)[0]["id"], details, token)
        except InvalidInput as error:
            raise LostRace from error  # the department was deleted meanwhile

    return transactions.retry(attempt, request_policy())


def _token(model: type[Record], request: RequestKey | None, **sent: Any) -> UUID | None:
    return None if request is None else repeatable_token(request, model.__tablename__, sent)


def _create_employee(
    name: str, department_id: int | None, details: Mapping[str, Any], token: UUID | None
) -> tuple[Row, bool]:
    try:
        return find_or_create(Employee, details, token, name=name, department_id=department_id)
    except IntegrityError as error:
        if transactions.sqlstate(error) == FOREIGN_KEY_VIOLATION:
            _require(Department, department_id, UNKNOWN_DEPARTMENT)
        raise


def _require(model: type[Record], id: int | None, unknown: Mapping[str, Sequence[str]]) -> None:
    if not read(lambda session: session.scalar(select(exists().where(model.id == id)))):
        raise InvalidInput(unknown)


def create_employees(items: Sequence[Mapping[str, Any]]) -> list[tuple[int, bool]]:
    """Do for each item what :func:`create_employee` does, all in one transaction.

    Returns each employee's id and whether they were created just now, in the order of the items.
    Raises InvalidInput, which names items by their index, for ids that nothing has; nothing is
    stored then.
    """
    if not items:
        return []
    calls = read_calls(Employee, [_arguments(**item) for item in items])
    names = dict.fromkeys(item["department"] for item in items if "department" in item)
    departments = {name: read_call(Department, name=name) for name in names}

    def work(session: Session, unanswered: list[Row] | None) -> list[Row]:
        by_token = unanswered is not None
        keep_writers_out(session, request_policy(), *([Department] if names else []), Employee)
        _require_known(session, items)
        found = find_or_create_all(session, Department, list(departments.values()), by_token, ID)
        ids = dict(zip(departments, (row["id"] for row in found), strict=True))
        wanted = [
            with_key(Employee, call, department_id=ids[item["department"]])
            if "department" in item
            else call
            for item, call in zip(items, calls, strict=True)
        ]
        return [*found, *find_or_create_all(session, Employee, wanted, by_token, ID)]

    try:
        with telling_of_contention(Employee, len(items)):
            rows = transactions.look_again(lambda: _run(work))
    except IntegrityError as error:
        if transactions.sqlstate(error) == FOREIGN_KEY_VIOLATION:
            read(lambda session: _require_known(session, items))
        raise
    sent = [*departments.values(), *calls]
    created = [row["creation_token"] == call.token for row, call in zip(rows, sent, strict=True)]
    outcomes = list(zip((row["id"] for row in rows), created, strict=True))[len(departments) :]
    tell_outcomes(Department, created[: len(departments)])
    tell_outcomes(Employee, [new for _, new in outcomes])
    return outcomes


def _arguments(
    name: str, department_id: int | None = None, department: str | None = None, **details: Any
) -> dict[str, Any]:
    """Return what an item calls with; a department that is given by its name is put in later."""
    return {"name": name, "department_id": department_id, "defaults": details}


def _require_known(session: Session, items: Sequence[Mapping[str, Any]]) -> None:
    errors: dict[str, Sequence[str]] = {}
    for model, messages in ((Department, UNKNOWN_DEPARTMENT), (Employee, UNKNOWN_MANAGER)):
        ((attribute, message),) = messages.items()
        wanted = [item.get(attribute) for item in items]
        known = _known(session, model, {id for id in wanted if id is not None})
        errors |= {
            f"items.{index}.{attribute}": message
            for index, id in enumerate(wanted)
            if id is not None and id not in known
        }
    if errors:
        raise InvalidInput(errors)


def _known(session: Session, model: type[Record], ids: Collection[int]) -> set[int]:
    if not ids:
        return set()
    wanted = literal(list(ids), ARRAY(BigInteger))
    return set(session.scalars(select(model.id).where(model.id == any_(wanted))))


def update(
    model: type[AnyRecord],
    id: int,
    changes: Mapping[str, Any],
    expected: Callable[[AnyRecord], bool] = anything,
) -> AnyRecord:
    """Change a record's columns and return it, if it is as ``expected``.

    It is asked in the transaction that makes the change, of the row as it is there. Raises
    RecordNotFound, RecordIsDuplicate, RecordChanged, NaturalKeyTaken, RecordHasDuplicates where
    the key would change under the record's duplicates, and InvalidInput for an id that nothing has.
    """

    def work(session: Session, unanswered: AnyRecord | None) -> AnyRecord:
        record = _get(session, model, id)
        if record is None and unanswered is not None:
            return unanswered  # changed by us, then deleted by somebody else
        record = _require_canonical(model, id, record)
        if unanswered is not None and _values(record) == _values(unanswered):
            return record  # changed by us, only that the reply to COMMIT was lost
        _require_expected(record, expected)
        values = _resolved(session, id, changes)
        _require_free_key(session, record, values)
        for name, value in values.items():
            setattr(record, name, normalise(value))
        return record

    return _run(work, AFTER_LISTS)


def delete_record(
    model: type[AnyRecord],
    id: int,
    cascade: bool = False,
    expected: Callable[[AnyRecord], bool] = anything,
) -> None:
    """Delete a record, if it is as ``expected``; a department with employees only if ``cascade``.

    Its employees then go with it. Raises RecordNotFound, RecordIsDuplicate, RecordChanged,
    RecordHasDuplicates, DepartmentNotEmpty, and RecordInUse where other rows, perhaps of other
    tables, still refer to the record.
    """

    def work(session: Session, unanswered: int | None) -> int:
        record = _get(session, model, id)
        if record is None and unanswered is not None:
            return unanswered  # deleted by us, only that the reply to COMMIT was lost
        record = _require_canonical(model, id, record)
        _require_expected(record, expected)
        _require_no_duplicates(session, record)
        if isinstance(record, Department):
            _empty(session, record, cascade)
        session.delete(record)
        return id

    try:
        _run(work, AFTER_LISTS)
    except IntegrityError as error:
        if transactions.sqlstate(error) != FOREIGN_KEY_VIOLATION:
            raise
        raise RecordInUse(model.__name__, id) from error


def _run(work: Callable[[Session, Result | None], Result], beginning: str = "") -> Result:
    return transactions.run(current_engine(), work, request_policy(), RACE_INDEXES, beginning)


AFTER_LISTS = transactions.after_lists(model.__tablename__ for model in RECORDS)
RACE_INDEXES = race_indexes(Department.__tablename__) | race_indexes(Employee.__tablename__)


def _require_canonical(model: type[Record], id: int, record: AnyRecord | None) -> AnyRecord:
    if record is None:
        raise RecordNotFound(model.__name__, id)
    if record.duplicate_of_id is not None:
        raise RecordIsDuplicate(model.__name__, id, record.duplicate_of_id)
    return record


def _require_expected(record: AnyRecord, expected: Callable[[AnyRecord], bool]) -> None:
    if not expected(record):
        raise RecordChanged(type(record).__name__, record.id)


def _values(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in columns_of(type(record))}


def _require_no_duplicates(session: Session, record: Record) -> None:
    model = type(record)
    if session.scalar(select(exists().where(model.duplicate_of_id == record.id))):
        raise RecordHasDuplicates(model.__name__, record.id)


def _require_free_key(session: Session, record: Record, values: Mapping[str, Any]) -> None:
    """Refuse a change of the natural key that the record's duplicates or another row forbid."""
    model = type(record)
    key = {name: getattr(record, name) for name in model.__natural_key__}
    changed = {name: values[name] for name in key if name in values}
    if all(normalise(value) == key[name] for name, value in changed.items()):
        return
    _require_no_duplicates(session, record)
    others = select(model.id).where(model.has_natural_key(**key | changed), model.id != record.id)
    taken_by = session.scalar(others.order_by(model.id).limit(1))
    if taken_by is not None:
        raise NaturalKeyTaken(model.__name__, taken_by)


def _resolved(session: Session, id: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with the references led to canonical rows; strings stay as sent."""
    values = dict(changes)
    if "department" in values:
        values["department_id"] = _department_named(session, values.pop("department")).id
    elif "department_id" in values:
        department = session.get(Department, values["department_id"])
        values["department_id"] = _canonical_id(department, UNKNOWN_DEPARTMENT)
    if values.get("manager_id") is not None:
        manager = session.get(Employee, values["manager_id"])
        values["manager_id"] = _canonical_id(manager, UNKNOWN_MANAGER)
        if values["manager_id"] == id:
            raise InvalidInput(OWN_MANAGER)
    return values


def _canonical_id(record: Record | None, unknown: Mapping[str, Sequence[str]]) -> int:
    if record is None:
        raise InvalidInput(unknown)
    return record.duplicate_of_id or record.id


def _department_named(session: Session, name: str) -> Department:
    """Find or add a department within the transaction at hand, which SERIALIZABLE makes safe."""
    query = select(Department).where(Department.has_natural_key(name=name))
    department = session.scalars(query.order_by(Department.id).limit(1)).first()
    if department is None:
        department = Department(name=normalise(name))
        session.add(department)
        session.flush()
    return department


def _empty(session: Session, department: Department, cascade: bool) -> None:
    members = Employee.department_id == department.id
    if not session.scalar(select(exists().where(members))):
        return
    if not cascade:
        raise DepartmentNotEmpty(Department.__name__, department.id)
    kept_for_duplicates = select(duplicate.duplicate_of_id).join(
        Employee, Employee.id == duplicate.duplicate_of_id
    )
    canonical_id = session.scalar(kept_for_duplicates.where(members).limit(1))
    if canonical_id is not None:
        raise RecordHasDuplicates(Employee.__name__, canonical_id)
    session.execute(delete(Employee).where(members))


duplicate = aliased(Employee)
